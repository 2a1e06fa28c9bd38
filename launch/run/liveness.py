"""The phase of a run that this process is in, by which the watchdog sees that it gets on."""

from dataclasses import dataclass

from model.processes import Layout


@dataclass
class Liveness:
    """The phase and step of this process, and how often it has got on."""

    layout: Layout
    phase: str = "starting"
    step: int = 0
    timeout_factor: float = 1.0  # how many times longer than parallel.timeout the phase may take
    num_reports: int = 0

    def report_phase(self, phase: str, step: int = 0, timeout_factor: float = 1.0) -> None:
        """Says what this process does from here on."""
        self.phase = phase
        self.step = step
        self.timeout_factor = timeout_factor
        self.num_reports += 1

    @property
    def progress_count(self) -> int:
        """Returns how often this process has got on: by a report, or an agreement with the others.
        All processes count the same in the same order."""
        return self.num_reports + self.layout.num_agreements
