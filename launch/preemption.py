"""Ends a run in time to save it: on a signal from the scheduler or the keyboard, or at a time limit."""

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any, Self

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved but not done; start the same command again

# Slurm sends SIGTERM, or SIGUSR1 or SIGUSR2 where asked for with --signal; the keyboard sends SIGINT.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Preemption:
    """Says when to save and stop; a loop reads `requested` after each step.

    requested    why to stop: the first signal's name, "time limit" once `minutes` are over, or None

    A second signal exits at once, with status 128 + its number and without saving. The handlers that were there
    before come back when the context closes. Enter it in the main thread.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self._signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        return self._signal or ("time limit" if time.monotonic() >= self._deadline else None)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            os._exit(128 + number)
        self._signal = signal.Signals(number).name
        text = f"received {self._signal}: saving after this step, then exiting with code {EXIT_PREEMPTED}; a second signal exits at once"
        erase = "\r\x1b[K" if os.isatty(2) else ""  # of the live line
        with contextlib.suppress(OSError):  # the terminal may be gone, and an exception here would end the run unsaved
            os.write(2, f"{erase}{text}\n".encode())  # not print: the signal may have come in the middle of one
