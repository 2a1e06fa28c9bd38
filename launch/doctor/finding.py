"""One line of the doctor's table: what was looked at, what was found, and what to do about it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

# From best to worst. A failure means that runs cannot work here, a warning that they may not, or
# work worse than they could; a note is worth knowing.
VERDICTS = ("ok", "note", "warning", "failed")


@dataclass(frozen=True)
class Finding:
    """A verdict on one subject, what was found, and the remedy where there is one."""

    verdict: str
    subject: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.verdict:8} {self.subject:12} {self.found}{remedy}"


def show(*parts: Iterable[Finding]) -> list[Finding]:
    """Prints findings as they come, then how many there are of each verdict; returns them."""
    shown = []
    for finding in chain(*parts):
        print(finding, flush=True)
        shown.append(finding)
    counts = Counter(finding.verdict for finding in shown)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS), flush=True)
    return shown


def is_bad(findings: Iterable[Finding]) -> bool:
    """Returns whether something failed."""
    return any(finding.verdict == "failed" for finding in findings)
