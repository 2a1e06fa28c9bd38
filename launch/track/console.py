"""What a run shows on its terminal, or in the file or pipe that stands for one."""

import math
import os
import shutil
import sys
import threading
import time
from typing import Any

from tqdm import tqdm

REDRAW = 0.2  # seconds between redraws of the live line

PLAIN = 10.0  # seconds between plain lines where stdout is no terminal

BAR = "{bar:20}  step {n_fmt}/{total_fmt}  {desc}"

GREEN, YELLOW, RED = 32, 33, 31

LOSSES = (
    ("train/loss", "loss {:.4f}"),
    ("sharpness/perturbed_loss", "loss at the moved weights {:.4f}"),
    ("val/loss", "val {:.4f}"),
)

SPEEDS = (("perf/tokens_per_second", "{:,.0f} tokens/s"), ("perf/mfu", "MFU {:.1%}"))


class Console:
    """Shows a run's rows: on a terminal a live line, elsewhere a plain line now and then, and every
    evaluation a line that stays.

    The time left is that of the steps and of the evaluations to come, each at its own pace.
    """

    def __init__(self, total_steps: int, evaluation_every: int) -> None:
        self._total = total_steps
        self._evaluation_every = evaluation_every
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._colours = self._live and not os.environ.get("NO_COLOR")
        self._bar: tqdm | None = None
        self._latest: dict[str, Any] = {}
        self._first: dict[str, Any] = {}  # the first row of this start
        self._seen = time.monotonic()  # when the latest row came
        self._evaluating = 0.0  # seconds that the last evaluation took
        self._shown = -math.inf  # when the last plain line was written
        self._written = -1  # the step that it told of
        self._lock = threading.Lock()  # W&B's thread prints too

    def row(self, row: dict[str, Any]) -> None:
        """Shows a row."""
        with self._lock:
            self._time(row)
            self._latest = row
            now = time.monotonic()
            # A terminal keeps evaluations above the live line; a file gets a line now and then too.
            if "val/loss" in row or (not self._live and now - self._shown >= PLAIN):
                self._line(self._with_step())
            if self._live:
                self._draw()

    def message(self, text: str) -> None:
        """Shows a line of its own."""
        colours = {"error:": RED, "warning:": YELLOW}
        with self._lock:
            self._write(self._painted(text, colours.get(text.partition(" ")[0])))

    def close(self) -> None:
        """Ends the live line; later messages stand alone."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            elif self._latest and not self._live and self._written != self._latest["step"]:
                self._line(self._with_step())

    def _line(self, text: str) -> None:
        self._shown = time.monotonic()
        self._written = self._latest["step"]
        colour = GREEN if "val/loss" in self._latest else None
        self._write(self._painted(text, colour))

    def _write(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _draw(self) -> None:
        """Moves the bar on, at most every REDRAW seconds."""
        if self._bar is None:
            self._bar = tqdm(
                total=self._total,
                initial=self._latest["step"],
                file=sys.stdout,
                bar_format=BAR,
                colour="green" if self._colours else None,
                mininterval=REDRAW,
                miniters=1,
                ncols=_columns(),
                nrows=2,  # a terminal may say that it has no rows
            )
        self._bar.ncols = _columns()
        self._bar.set_description_str(self._text(), refresh=False)
        self._bar.update(self._latest["step"] - self._bar.n)
        if self._latest["step"] == self._total:
            self._bar.refresh()

    def _painted(self, text: str, colour: int | None) -> str:
        if not (self._colours and colour):
            return text
        return f"\x1b[{colour}m{text}\x1b[0m"

    def _with_step(self) -> str:
        return f"step {self._latest['step']}/{self._total}  {self._text()}"

    def _text(self) -> str:
        """Returns the figures of the latest row, and the time left."""
        parts = [*self._figures(LOSSES), *self._left_text()]
        if num_skipped := self._latest.get("skipped"):
            parts.append(f"skipped {num_skipped}")
        return "  ".join([*parts, *self._figures(SPEEDS)])

    def _figures(self, forms: tuple[tuple[str, str], ...]) -> list[str]:
        row = self._latest
        # The loss at the moved weights stands in where a rule knows no other.
        hidden = ""
        if row.get("train/loss") is not None:
            hidden = "sharpness/perturbed_loss"
        return [
            form.format(row[key])
            for key, form in forms
            if row.get(key) is not None and key != hidden
        ]

    def _left_text(self) -> list[str]:
        left = self._left()
        if left is None:
            return []
        minutes, seconds = divmod(round(left), 60)
        return [f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"]

    def _time(self, row: dict[str, Any]) -> None:
        """Learns from a row's seconds, which are those of the steps alone, how long an evaluation
        takes."""
        self._first = self._first or row
        now = time.monotonic()
        if "val/loss" in row:
            stepping = row["seconds"] - self._latest.get("seconds", row["seconds"])
            self._evaluating = max(0.0, now - self._seen - stepping)
        self._seen = now

    def _left(self) -> float | None:
        """Returns the seconds until the end, None before the first step."""
        step, first = self._latest["step"], self._first
        if step == first["step"]:
            return None
        # Seconds of steps alone, since this start: the one before may have run on another machine.
        pace = (self._latest["seconds"] - first["seconds"]) / (step - first["step"])
        # The end of a run is evaluated too, where no interval ends there.
        at_intervals = self._total // self._evaluation_every - step // self._evaluation_every
        at_the_end = step < self._total and self._total % self._evaluation_every != 0
        return pace * (self._total - step) + self._evaluating * (at_intervals + at_the_end)


def _columns() -> int:
    """Returns how wide a live line may be. The last column stays free: a full line would make some
    terminals wrap."""
    return shutil.get_terminal_size().columns - 1
