"""What runs say when they are compared: the best learning rate and radius of every method, its validation loss at equal steps, equal FLOPs
and equal time, and a paired test against AdamW by seed.

Only runs with the same model, tokenizer, data, batch and schedule are compared. A method's mean is over seeds, its standard error
s / sqrt(n) with s^2 = sum (x - mean)^2 / (n - 1).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_rel

from conf.schema import KEYS, Config, lookup
from launch.record import Record
from launch.tracking import NEAR

SECTIONS = ("model.", "tokenizer.", "data.", "batch.", "schedule.", "task.")  # keys of these set runs apart that cannot be compared
SWEPT = ("seed", "optim.name", "optim.lr", "optim.rho")  # what a comparison is about; any other key makes a variant of a method
DEFAULTS = {name: lookup(Config(), name) for name in KEYS}
BASELINE = "adamw"
AXES = ("steps", "flops", "seconds")  # at equal what
FIGURES = {"steps": "step", "flops": "flops", "seconds": "seconds"}  # the name of each in rows and summaries


class Estimate(NamedTuple):
    """A mean over seeds with its standard error, nan for fewer than two; `midway`: of runs still in the middle of their schedule."""

    mean: float
    error: float
    seeds: int
    midway: bool = False


class PairedTest(NamedTuple):
    """Differences to the baseline by seed: their mean and its standard error, Student's t and the two-sided p; nan where n allows none."""

    difference: Estimate
    t: float
    p: float


def estimate(values: Iterable[float], midway: bool = False) -> Estimate:
    """The estimate from the values that are known."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not len(known):
        return Estimate(math.nan, math.nan, 0)
    return Estimate(known.mean(), known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan, len(known), midway)


@dataclass
class Setting:
    """One method at one learning rate and radius: runs that differ by their seeds only."""

    method: str
    lr: float
    rho: float | None
    runs: list[Record] = field(default_factory=list)  # finished
    failed: list[Record] = field(default_factory=list)  # the others

    @cached_property
    def final(self) -> Estimate:
        """The validation loss at the end of its own runs."""
        return estimate(run.loss for run in self.runs)

    @property
    def diverged(self) -> bool:
        """Whether a seed diverged."""
        return any(run.state == "diverged" for run in self.failed)

    def __str__(self) -> str:
        return f"{self.method} (lr {self.lr:g}{'' if self.rho is None else f', rho {self.rho:g}'})"


@dataclass
class Section:
    """Runs that can be compared.

    methods     the settings of every method, the baseline's first; variants of the baseline are methods of their own
    best        of every method with a finished run, the setting with the lowest mean final loss; any in which no seed diverged comes first
    budgets     of every axis the largest that all runs of the best settings reached; of steps the longest horizon
    notes       what a reader has to know before believing the numbers
    """

    keys: dict[str, Any]
    runs: list[Record]
    title: str = ""
    methods: dict[str, list[Setting]] = field(default_factory=dict)
    best: dict[str, Setting] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> str | None:
        """The method that the others are tested against: of AdamW's variants the best."""
        names = [method for method in self.best if method.split()[0] == BASELINE]
        return min(names, key=lambda method: self.best[method].final.mean, default=None)

    def at_equal(self, axis: str, method: str) -> Estimate:
        """The validation loss of the method's best setting at the budget."""
        read = [self.read(run, axis) for run in self.best[method].runs]
        return estimate((loss for loss, _ in read), any(midway for loss, midway in read if math.isfinite(loss)))

    def read(self, run: Record, axis: str) -> tuple[float, bool]:
        """(validation loss of a run at the budget, whether it was in the middle of its schedule then): its final loss where it ends there, else a
        straight line between the two evaluations around it. nan where it never was there."""
        budget, end = self.budgets[axis], run.summary[FIGURES[axis]]
        if abs(end - budget) <= (0.0 if axis == "steps" else NEAR * budget):
            return run.loss, False
        spent, losses = run.curve(FIGURES[axis], "val/loss")
        if not len(spent):
            return math.nan, False
        return float(np.interp(budget, spent, losses, left=math.nan, right=math.nan)), self.keys["schedule.shape"] != "constant"

    def tested(self, axis: str, method: str) -> PairedTest | None:
        """The method beside the baseline at the budget, by seed; None without a baseline or for itself."""
        if self.baseline in (None, method):
            return None
        ours, theirs = ({run.settings["seed"]: self.read(run, axis)[0] for run in self.best[name].runs} for name in (method, self.baseline))
        seeds = [seed for seed in ours if math.isfinite(ours[seed] - theirs.get(seed, math.nan))]
        return paired_test([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])

    def ranked(self, axis: str) -> list[str]:
        """The methods that have a loss at the budget, the best first."""
        found = {method: self.at_equal(axis, method).mean for method in self.best}
        return sorted((method for method in found if math.isfinite(found[method])), key=found.__getitem__)


def paired_test(ours: list[float], theirs: list[float]) -> PairedTest:
    """Student's paired t-test of equal means; t and p are nan for fewer than two pairs, or where all differences are the same."""
    differences = estimate(np.subtract(ours, theirs))
    if differences.seeds < 2 or differences.error < 1e-12 * np.abs(ours).max():
        return PairedTest(differences, math.nan, math.nan)
    result = ttest_rel(ours, theirs)
    return PairedTest(differences, float(result.statistic), float(result.pvalue))


def compare(records: list[Record]) -> list[Section]:
    """The sections of all runs with a configuration, the largest first."""
    found: dict[str, Section] = {}
    for record in records:
        if record.settings:
            keys = section_keys(record.settings)
            found.setdefault(frozen(keys), Section(keys, [])).runs.append(record)
    sections = sorted(found.values(), key=lambda section: -len(section.runs))
    for section in sections:
        alike = [other.keys for other in sections if horizon(other.keys) == horizon(section.keys)]
        section.title = ", ".join([horizon(section.keys), *(f"{key}={shown(section.keys.get(key))}" for key in differing(alike))])
        analyse(section)
    return sections


def horizon(keys: dict[str, Any]) -> str:
    """Model, data and horizon of a section."""
    if keys["schedule.name"] == "chinchilla":
        length = f"{keys['schedule.tokens_per_parameter']:g} tokens per parameter"
    elif keys["schedule.tokens"] is not None:
        length = f"{keys['schedule.tokens']:,.0f} tokens"
    else:
        length = f"{keys['schedule.steps']:,} steps"
    return f"{keys['model.name']}, {keys['data.name']}, {length}"


def section_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that runs must share to be compared. A run that goes on from another with its optimiser is compared with whole ones."""
    keys = {name: value for name, value in settings.items() if name.startswith(SECTIONS)}
    return keys | {name: None if settings["init.optimizer"] else settings[name] for name in ("init.run", "init.step", "init.hf")}


def analyse(section: Section) -> None:
    """Fills in methods, best settings, budgets and notes."""
    section.methods = methods(section)
    for method, settings in section.methods.items():
        if candidates := [setting for setting in settings if setting.runs]:
            section.best[method] = min(candidates, key=lambda setting: (setting.diverged, setting.final.mean))
    compared = [run for setting in section.best.values() for run in setting.runs]
    if compared:
        section.budgets = {axis: min(run.summary[FIGURES[axis]] for run in compared) for axis in AXES}
        section.budgets["steps"] = max(run.step for run in compared)
    section.notes += notes(section, compared)


def methods(section: Section) -> dict[str, list[Setting]]:
    """Every method's settings. Runs of one method that differ in any other key than seed, rate and radius become variants, named by those
    keys where they do not have their default."""
    found: dict[str, dict[tuple, Setting]] = {}
    seen: dict[str, Record] = {}
    for name in {run.settings["optim.name"]: None for run in section.runs}:
        runs = [run for run in section.runs if run.settings["optim.name"] == name]
        same = {*section.keys, *SWEPT} - {"init.step"}  # where a run branches off is a variant
        others = [{key: value for key, value in run.settings.items() if key not in same} for run in runs]
        varying = differing(others)
        for run, other in zip(runs, others, strict=True):
            method = " ".join(
                [name, *(f"{key.removeprefix('optim.')}={shown(other.get(key))}" for key in varying if other.get(key) not in (None, DEFAULTS[key]))]
            )
            lr, rho = run.settings["optim.lr"], run.settings.get("optim.rho")
            setting = found.setdefault(method, {}).setdefault((lr, rho), Setting(method, lr, rho))
            if run.state != "finished":
                setting.failed.append(run)
            elif (first := seen.setdefault(frozen(run.settings), run)) is run:
                setting.runs.append(run)
            else:
                section.notes.append(f"{run.folder} repeats {first.folder}, seed and all, and is left out.")
    ordered = sorted(found, key=lambda method: (method.split()[0] != BASELINE, method))
    return {method: [found[method][key] for key in sorted(found[method], key=lambda key: (key[0], key[1] or 0.0))] for method in ordered}


def notes(section: Section, compared: list[Record]) -> list[str]:
    """What a reader has to know before believing the numbers."""
    found = []
    for key, what in (("data", "the data themselves differ, by their checksums"), ("evaluation.tokens", "evaluation.tokens differs")):
        values = {run.measured_on.get(key, "unknown") for run in compared} - {"unknown"}
        if len(values) > 1:
            counts = ", ".join(f"{str(value)[:12]} in {sum(run.measured_on.get(key) == value for run in compared)} runs" for value in values)
            found.append(f"Validation sets differ: {what} ({counts}). Losses on different sets are not comparable.")
    machines = sorted({run.hardware for run in compared})
    if len(machines) > 1:
        found.append(f"Equal time compares different machines: {'; '.join(machines)}.")
    for method, setting in section.best.items():
        tried = [other for other in section.methods[method] if other.runs]
        most = max(len(other.runs) for other in tried)
        if setting.diverged:
            found.append(f"In every setting of {method} a seed diverged; {setting} is judged by those that did not.")
        if len(setting.runs) < most:
            found.append(f"{setting} was chosen by fewer seeds than another of its settings has: {len(setting.runs)} instead of {most}.")
        for key, values in (("lr", {other.lr for other in tried}), ("rho", {other.rho for other in tried if other.rho is not None})):
            if len(values) > 1 and (value := getattr(setting, key)) in (min(values), max(values)) and value > 0:
                found.append(
                    f"{setting}: its {key} is at the edge of what was tried ({min(values):g} to {max(values):g}); a better one may lie beyond."
                )
    return found


def differing(several: list[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all."""
    names = dict.fromkeys(name for settings in several for name in settings)
    return [name for name in names if len({frozen(settings.get(name)) for settings in several}) > 1]


def frozen(value: Any) -> str:
    """A value as something that can be a key."""
    return json.dumps(value, sort_keys=True)


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
