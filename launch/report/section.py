"""The comparison of runs as data: a section holds the runs that can be compared, their methods, and
of every method its settings."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from launch.report.estimates import Estimate, PairedTest, estimate
from launch.report.record import Record
from launch.track.tracker import NEAR

BASELINE = "adamw"
# Methods are compared at equal values of each of these.
AXES = ("steps", "flops", "seconds")
# Rows and summaries name the value of an axis by these.
FIGURES = {
    "steps": "step",
    "flops": "flops",
    "seconds": "seconds",
}


@dataclass
class Setting:
    """One method at one learning rate and radius: runs that differ by their seeds only.

    chosen_by  finished runs that it is chosen by
    runs       finished runs that are reported; the same ones, unless runs carry roles
    failed     the others
    diverged   whether a run that it would be chosen by diverged
    planned    seeds to report, finished or not
    """

    method: str
    lr: float
    rho: float | None
    chosen_by: list[Record] = field(default_factory=list)
    runs: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    diverged: bool = False
    planned: set[int] = field(default_factory=set)

    @cached_property
    def final(self) -> Estimate:
        """Returns the validation loss at the end of the runs that it is chosen by."""
        return estimate(run.loss for run in self.chosen_by)

    @property
    def numbers(self) -> str:
        """Returns its learning rate and radius in words."""
        if self.rho is None:
            return f"lr {self.lr:g}"
        return f"lr {self.lr:g}, rho {self.rho:g}"

    def __str__(self) -> str:
        return f"{self.method} ({self.numbers})"


@dataclass
class Section:
    """Runs that can be compared.

    keys        the settings that the runs share
    methods     the settings of every method, the baseline's first; variants of the baseline are
                methods of their own
    best        of every method with a finished run, the setting with the lowest mean final loss;
                any in which no seed diverged comes first
    chosen      of every axis the same at its budget: at equal steps the best, at equal FLOPs and
                time the lowest there
    budgets     of every axis the largest that all runs of the best settings reached; of steps the
                longest horizon
    tests       of every axis the methods beside the baseline
    selectors   of every method which runs chose its settings
    doubt       why equal time is no evidence here, if it is none
    imprecise   methods whose perturbation the compute precision distorts, and how far
    notes       what a reader has to know before believing the numbers
    """

    keys: dict[str, Any]
    runs: list[Record]
    title: str = ""
    methods: dict[str, list[Setting]] = field(default_factory=dict)
    best: dict[str, Setting] = field(default_factory=dict)
    chosen: dict[str, dict[str, Setting]] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    tests: dict[str, dict[str, PairedTest]] = field(default_factory=dict)
    selectors: dict[str, str] = field(default_factory=dict)
    doubt: str = ""
    imprecise: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def baseline(self) -> str | None:
        """Returns the method that the others are tested against: the best of AdamW's variants."""
        names = [method for method in self.best if method.split()[0] == BASELINE]
        return min(names, key=lambda method: self.best[method].final.mean, default=None)

    @cached_property
    def planned(self) -> int:
        """Returns the most seeds that were planned of one setting."""
        settings = [setting for several in self.methods.values() for setting in several]
        return max((len(setting.planned) for setting in settings), default=0)

    @property
    def drawn(self) -> dict[str, list[Record]]:
        """Returns the runs that curves are drawn of: those of the best settings, or the only run,
        however it ended."""
        if len(self.runs) == 1:
            return {next(iter(self.methods)): self.runs}
        return {method: setting.runs for method, setting in self.best.items()}

    def tried(self, method: str) -> list[Setting]:
        """Returns the settings of a method that have a run to choose by."""
        return [setting for setting in self.methods[method] if setting.chosen_by]

    def at_equal(self, axis: str, method: str) -> Estimate:
        """Returns the validation loss of the method's setting at the budget."""
        return self.mean_of(self.chosen[axis][method].runs, axis)

    def mean_of(self, runs: list[Record], axis: str) -> Estimate:
        """Returns the validation loss of runs at the budget."""
        read = [self.read(run, axis) for run in runs]
        midway = any(midway for loss, midway in read if math.isfinite(loss))
        return estimate((loss for loss, _ in read), midway)

    def read(self, run: Record, axis: str) -> tuple[float, bool]:
        """Returns (validation loss of a run at the budget, whether the run was in the middle of its
        schedule then).

        The loss is the final one where the run ends there, else it is read on the straight line
        between the two evaluations around the budget; nan where the run never was there."""
        budget = self.budgets[axis]
        end = run.summary[FIGURES[axis]]
        # Steps are whole numbers and alike in all runs. FLOPs and time are not: a run that ends
        # near the budget was meant to end there, as one that was matched to the baseline's FLOPs.
        tolerance = 0.0
        if axis != "steps":
            tolerance = NEAR * budget
        if abs(end - budget) <= tolerance:
            return run.loss, False
        spent, losses = run.curve(FIGURES[axis], "val/loss")
        # A finished run may have lost its rows: its last loss is known, and no other.
        if not len(spent):
            return math.nan, False
        # Outside of the evaluations there is no loss to read: interp would give the nearest.
        loss = float(np.interp(budget, spent, losses, left=math.nan, right=math.nan))
        return loss, self.keys["schedule.shape"] != "constant"

    def ranked(self, axis: str) -> list[str]:
        """Returns the methods that have a loss at the budget, the best first."""
        losses = {method: self.at_equal(axis, method).mean for method in self.best}
        known = [method for method in losses if math.isfinite(losses[method])]
        return sorted(known, key=losses.__getitem__)
