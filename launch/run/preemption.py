"""Ends a run in time to save it: on a signal from the scheduler or the keyboard, or at a time
limit."""

import contextlib
import math
import os
import signal
import time
from types import FrameType
from typing import Any, Self

from conf.exit_codes import EXIT_PREEMPTED

# Slurm sends SIGTERM, or SIGUSR1 or SIGUSR2 where asked for with --signal; the keyboard sends
# SIGINT, and a terminal that is closed SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

ECHO = 3.0


def caught_signals() -> list[signal.Signals]:
    """Returns the signals that ask for an end: under nohup SIGHUP, which is ignored, is none."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not ignores_hangup]


class Preemption:
    """Says when to save and stop; a loop reads `requested` after each step.

    requested    why to stop: the first signal's name, "time limit" once `minutes` are over, or None

    A second signal exits at once, with status 128 + its number and without saving. The handlers
    that were there before come back when the context closes. Enter it in the main thread.

    torchrun passes on to its workers the signals it gets, and so does a task of a sweep on Slurm,
    and a scheduler sends them to both: under these what comes within ECHO seconds of the first is
    the same signal. So is a second SIGHUP, for the kernel and the shell each send one. torchrun
    also sends SIGTERM to the others as soon as one has died, which must not cut short what they are
    about to say: where an exception closes the context, SIGTERM is ignored from then on. And the
    echo may come when the context has closed: it is ignored, too."""

    def __init__(self, minutes: float | None = None) -> None:
        self._deadline = math.inf
        if minutes is not None:
            self._deadline = time.monotonic() + 60 * minutes
        self._signal: str | None = None
        self._torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._echoes = self._torchrun or "SUBMITIT_EXECUTOR" in os.environ
        self._until = 0.0  # when a signal is no echo any more
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        """Returns why to stop, None where there is no reason."""
        if self._signal is None and time.monotonic() >= self._deadline:
            return "time limit"
        return self._signal

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._handle) for number in caught_signals()
        }
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._previous.items():
            echo = self._echoes and number.name == self._signal
            deaf = number == signal.SIGTERM and self._torchrun and kind is not None
            signal.signal(number, signal.SIG_IGN if echo or deaf else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            if time.monotonic() < self._until or number == signal.SIGHUP:
                return
            os._exit(128 + number)
        self._signal = signal.Signals(number).name
        if self._echoes:
            self._until = time.monotonic() + ECHO
        text = (
            f"received {self._signal}: saving after this step, then exiting with code"
            f" {EXIT_PREEMPTED}; a second signal exits at once"
        )
        # A terminal may show the live line, which is erased first.
        erase = "\r\x1b[K" if os.isatty(2) else ""
        # The terminal may be gone, and an exception here would end the run unsaved. Not by print:
        # the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, f"{erase}{text}\n".encode())
