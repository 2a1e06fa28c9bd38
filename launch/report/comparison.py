"""What runs say when they are compared: the best learning rate and radius of every method, its
validation loss at equal steps, equal FLOPs and equal time, and a paired test against AdamW by seed.

Only runs with the same model, tokenizer, data, batch and schedule are compared.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from conf.keys import KEYS, lookup
from conf.schema import Config
from launch.report.estimates import Estimate, PairedTest, estimate, holm, paired_test
from launch.report.record import Record
from launch.track.tracker import NEAR

# keys of these set runs apart that cannot be compared
SECTIONS = (
    "model.",
    "tokenizer.",
    "data.",
    "batch.",
    "schedule.",
    "task.",
)
# where data lie, which is no part of what they are
PLACES = (
    "data.path",
    "data.sources",
    "data.validation",
)
# what a comparison is about; any other key makes a variant of a method
SWEPT = (
    "seed",
    "optim.name",
    "optim.lr",
    "optim.rho",
)
DEFAULTS = {name: lookup(Config(), name) for name in KEYS}
BASELINE = "adamw"
AXES = ("steps", "flops", "seconds")  # at equal what
# the name of each in rows and summaries
FIGURES = {
    "steps": "step",
    "flops": "flops",
    "seconds": "seconds",
}
TUNE = "role=tune"  # tracking.tags of runs that only choose a setting
REPORT = "role=report"  # and of those that only report on it
UNEVEN = 0.1  # share by which seconds per FLOP of runs on one machine may differ


@dataclass
class Setting:
    """One method at one learning rate and radius: runs that differ by their seeds only.

    chosen_by  finished runs that it is chosen by
    runs       finished runs that are reported; the same ones, unless roles are told apart
    failed     the others
    """

    method: str
    lr: float
    rho: float | None
    chosen_by: list[Record] = field(default_factory=list)
    runs: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    diverged: bool = False  # whether a run that it would be chosen by did
    planned: set[int] = field(default_factory=set)  # seeds to report, finished or not

    @cached_property
    def final(self) -> Estimate:
        """The validation loss at the end of the runs that it is chosen by."""
        return estimate(run.loss for run in self.chosen_by)

    @property
    def numbers(self) -> str:
        """Its learning rate and radius."""
        return f"lr {self.lr:g}" + ("" if self.rho is None else f", rho {self.rho:g}")

    def __str__(self) -> str:
        return f"{self.method} ({self.numbers})"


@dataclass
class Section:
    """Runs that can be compared.

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
        """The method that the others are tested against: of AdamW's variants the best."""
        names = [method for method in self.best if method.split()[0] == BASELINE]
        return min(names, key=lambda method: self.best[method].final.mean, default=None)

    @cached_property
    def planned(self) -> int:
        """The most seeds that were planned of one setting."""
        return max(
            (len(setting.planned) for settings in self.methods.values() for setting in settings),
            default=0,
        )

    @property
    def drawn(self) -> dict[str, list[Record]]:
        """The runs that curves are drawn of: those of the best settings, or the only run, however
        it ended."""
        if len(self.runs) == 1:
            return {next(iter(self.methods)): self.runs}
        return {method: setting.runs for method, setting in self.best.items()}

    def at_equal(self, axis: str, method: str) -> Estimate:
        """The validation loss of the method's setting at the budget."""
        return self.mean_of(self.chosen[axis][method].runs, axis)

    def mean_of(self, runs: list[Record], axis: str) -> Estimate:
        """The validation loss of runs at the budget."""
        read = [self.read(run, axis) for run in runs]
        return estimate(
            (loss for loss, _ in read), any(midway for loss, midway in read if math.isfinite(loss))
        )

    def read(self, run: Record, axis: str) -> tuple[float, bool]:
        """(validation loss of a run at the budget, whether it was in the middle of its schedule
        then): its final loss where it ends there, else a straight line between the two evaluations
        around it. nan where it never was there."""
        budget, end = self.budgets[axis], run.summary[FIGURES[axis]]
        if abs(end - budget) <= (0.0 if axis == "steps" else NEAR * budget):
            return run.loss, False
        spent, losses = run.curve(FIGURES[axis], "val/loss")
        if not len(spent):
            return math.nan, False
        return (
            float(np.interp(budget, spent, losses, left=math.nan, right=math.nan)),
            self.keys["schedule.shape"] != "constant",
        )

    def ranked(self, axis: str) -> list[str]:
        """The methods that have a loss at the budget, the best first."""
        found = {method: self.at_equal(axis, method).mean for method in self.best}
        return sorted(
            (method for method in found if math.isfinite(found[method])), key=found.__getitem__
        )


@dataclass
class Selection:
    """Which runs choose the setting of a method, and which are reported: by their seeds where some
    are given, else by their tags."""

    seeds: tuple[int, ...] = ()

    def of(self, runs: list[Record]) -> tuple[list[Record], list[Record], str]:
        """Returns (runs that choose, runs that are reported, the former in words) of a method's
        runs."""
        if self.seeds:
            choosing = [run for run in runs if run.settings["seed"] in self.seeds]
            reported = [run for run in runs if run.settings["seed"] not in self.seeds]
            role = ""
        else:
            tuned = [run for run in runs if TUNE in run.tags]
            choosing = tuned or [run for run in runs if REPORT not in run.tags]
            # Without another, the runs that choose are all that there is so far.
            reported = (
                [run for run in runs if REPORT in run.tags]
                or [run for run in runs if TUNE not in run.tags]
                or tuned
            )
            role = f" ({TUNE})" if tuned else ""
        if not choosing or choosing == reported:
            return reported, reported, "on these seeds"
        return (
            choosing,
            reported,
            f"on {seeds_in_words({run.settings['seed'] for run in choosing})}{role}",
        )

    def check(self, records: list[Record]) -> None:
        """Raises ValueError where the seeds are not those of runs, or leave none to report."""
        known = {record.settings["seed"] for record in records if record.settings}
        given = ",".join(map(str, self.seeds))
        if unknown := set(self.seeds) - known:
            raise ValueError(
                f"select_seeds={given}: no run has seed {min(unknown)}; there are"
                f" {seeds_in_words(known)}"
            )
        if self.seeds and not known - set(self.seeds):
            raise ValueError(
                f"select_seeds={given} leaves no seed to report on; leave one of them out"
            )


def seeds_in_words(seeds: Iterable[int]) -> str:
    """Returns "seed 0" or "seeds 0, 1"."""
    ordered = sorted(seeds)
    return f"seed{'' if len(ordered) == 1 else 's'} {', '.join(map(str, ordered))}"


def compare(records: list[Record], selection: Selection | None = None) -> list[Section]:
    """The sections of all runs with a configuration, the largest first. Raises ValueError for a
    selection that these runs do not allow."""
    selection = selection or Selection()
    selection.check(records)
    found: dict[str, Section] = {}
    known = [record for record in records if record.settings]
    parents = kinds_of_parents(known)
    places: dict[str, dict[str, Any]] = {}
    for record in known:
        keys = section_keys(record.settings, parents[id(record)])
        if data := record.measured_on.get("data"):
            # The same by checksum count as lying where they were met first.
            keys |= places.setdefault(data, {name: keys[name] for name in PLACES if name in keys})
        found.setdefault(frozen(keys), Section(keys, [])).runs.append(record)
    sections = sorted(found.values(), key=lambda section: -len(section.runs))
    for section in sections:
        alike = [other.keys for other in sections if horizon(other.keys) == horizon(section.keys)]
        section.title = ", ".join(
            [
                horizon(section.keys),
                *(f"{key}={shown(section.keys.get(key))}" for key in differing(alike)),
            ]
        )
        analyse(section, selection, parents)
        if section.best and len(known) < len(records):
            section.notes.append(
                f"{len(records) - len(known)} more runs have not begun or cannot be read: a setting"
                " may lack their seeds."
            )
    return sections


def kinds_of_parents(records: list[Record]) -> dict[int, dict[str, Any]]:
    """Returns what each run's parent was, by the run's id. The parents' seeds are no part of it
    where all runs that otherwise are alike have the seed of their parent: then they are repetitions
    from the start."""
    kinds = {}
    groups: dict[str, list[Record]] = {}
    for run in records:
        kinds[id(run)] = {
            key: value
            for key, value in run.parent.items()
            if key.rpartition("parent.")[2] != "seed"
        }
        own = {key: value for key, value in run.settings.items() if key not in ("seed", "init.run")}
        groups.setdefault(frozen([own, kinds[id(run)]]), []).append(run)
    for alike in groups.values():
        seeds = [
            {value for key, value in run.parent.items() if key not in kinds[id(run)]}
            for run in alike
        ]
        if not all(
            theirs <= {run.settings["seed"]} for run, theirs in zip(alike, seeds, strict=True)
        ):
            for run in alike:
                kinds[id(run)] = run.parent
    return kinds


def horizon(keys: dict[str, Any]) -> str:
    """Model, data and horizon of a section."""
    if keys["schedule.name"] == "chinchilla":
        length = f"{keys['schedule.tokens_per_parameter']:g} tokens per parameter"
    elif keys["schedule.tokens"] is not None:
        length = f"{keys['schedule.tokens']:,.0f} tokens"
    else:
        length = f"{keys['schedule.steps']:,} steps"
    return f"{keys['model.name']}, {keys['data.name']}, {length}"


def section_keys(settings: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """The settings that runs must share to be compared. A run that goes on from another with its
    optimiser is compared with whole ones; runs that start from another's weights only where those
    came about in the same way."""
    keys = {name: value for name, value in settings.items() if name.startswith(SECTIONS)}
    if settings.get("init.optimizer"):
        return keys | {"init.step": None, "init.hf": None}
    keys |= {name: settings.get(name) for name in ("init.step", "init.hf")}
    if not parent:
        return keys
    origin = parent.get("parent.run") or f"a run of {parent['parent.optim.name']}"
    return keys | parent | {"init.run": origin}


def analyse(section: Section, selection: Selection, parents: dict[int, dict[str, Any]]) -> None:
    """Fills in methods, settings, budgets, tests and notes."""
    section.methods = methods(section, selection, parents)
    for method, settings in section.methods.items():
        if candidates := [setting for setting in settings if setting.chosen_by]:
            best = min(candidates, key=lambda setting: (setting.diverged, setting.final.mean))
            if best.runs:
                section.best[method] = best
            else:
                section.notes.append(
                    f"{best} was chosen {section.selectors[method]} and has no finished run to"
                    f" report; {method} is left out."
                )
        elif any(setting.runs for setting in settings):
            section.notes.append(
                f"{method} has no finished run to choose by ({section.selectors[method]}); {method}"
                " is left out, finished runs and all."
            )
    compared = [run for setting in section.best.values() for run in setting.runs]
    if not compared:
        return
    section.budgets = {axis: min(run.summary[FIGURES[axis]] for run in compared) for axis in AXES}
    section.budgets["steps"] = max(run.step for run in compared)
    section.doubt = doubt_about_time(section, section.best)
    for axis in AXES:
        section.chosen[axis] = {method: chosen_at(section, axis, method) for method in section.best}
        if (
            axis == "seconds"
            and not section.doubt
            and (doubt := doubt_about_time(section, section.chosen[axis]))
        ):
            # A setting that is the best at equal time ran elsewhere.
            section.doubt, section.chosen[axis] = doubt, dict(section.best)
        section.tests[axis] = tests(section, axis)
    section.imprecise = imprecise(section)
    section.notes += notes(section, selection)


def chosen_at(section: Section, axis: str, method: str) -> Setting:
    """Returns the setting of a method with the lowest mean loss at the budget, of those that
    reached it with every run they are chosen by."""
    best = section.best[method]
    if axis == "steps" or (axis == "seconds" and section.doubt):
        return best
    found = {}
    for number, setting in enumerate(section.methods[method]):
        at = section.mean_of(setting.chosen_by, axis)
        if setting.runs and at.seeds and at.seeds == len(setting.chosen_by):
            found[number] = (setting.diverged, at.mean)
    return section.methods[method][min(found, key=found.__getitem__)] if found else best


def tests(section: Section, axis: str) -> dict[str, PairedTest]:
    """Returns the methods beside the baseline at the budget, by seed."""
    if section.baseline is None:
        return {}
    losses = {}
    for method, setting in section.chosen[axis].items():
        losses[method] = {run.settings["seed"]: section.read(run, axis)[0] for run in setting.runs}
    midway = {method: section.at_equal(axis, method).midway for method in losses}
    theirs = losses.pop(section.baseline)
    found = {}
    for method, ours in losses.items():
        found[method] = paired_test(ours, theirs, midway[method] or midway[section.baseline])
    if axis == "seconds":
        # Time is the machine's as much as the method's: no p value.
        return {method: test._replace(t=math.nan, p=math.nan) for method, test in found.items()}
    adjusted = holm({method: test.p for method, test in found.items()})
    return {
        method: test._replace(holm=adjusted.get(method, math.nan)) for method, test in found.items()
    }


def methods(
    section: Section, selection: Selection, parents: dict[int, dict[str, Any]]
) -> dict[str, list[Setting]]:
    """Every method's settings. Runs of one method that differ in any other key than seed, rate and
    radius become variants, named by those keys where they do not have their default."""
    variants: dict[str, list[Record]] = {}
    for name in {run.settings["optim.name"]: None for run in section.runs}:
        runs = [run for run in section.runs if run.settings["optim.name"] == name]
        # where a run branches off is a variant
        same = {*section.keys, *SWEPT, "init.run"} - {"init.step"}
        others = [
            {
                key: value
                for key, value in (run.settings | parents[id(run)]).items()
                if key not in same
            }
            for run in runs
        ]
        varying = differing(others)
        for run, other in zip(runs, others, strict=True):
            variants.setdefault(variant(run, other, varying), []).append(run)
    ordered = sorted(variants, key=lambda method: (method.split()[0] != BASELINE, method))
    return {method: settings_of(section, selection, method, variants[method]) for method in ordered}


def variant(run: Record, other: dict[str, Any], varying: list[str]) -> str:
    """Returns the name of a run's method, with those keys that vary between runs of that name and
    do not have their default."""
    name = run.settings["optim.name"]
    if name == BASELINE and run.settings["optim.path"] != "none":
        name = f"perturbed {name}"  # by its path: it is no baseline
    told = [
        key
        for key in varying
        if other.get(key) is not None and (key not in DEFAULTS or other[key] != DEFAULTS[key])
    ]
    return " ".join([name, *(f"{key.removeprefix('optim.')}={shown(other[key])}" for key in told)])


def settings_of(
    section: Section, selection: Selection, method: str, runs: list[Record]
) -> list[Setting]:
    """Returns the settings of a method by learning rate and radius."""
    found: dict[tuple, Setting] = {}
    seen: dict[tuple, Record] = {}
    choosing, reported, section.selectors[method] = selection.of(runs)
    used = [run for run in runs if run in choosing or run in reported]
    if len(used) < len(runs):
        section.notes.append(
            f"{len(runs) - len(used)} runs of {method} have neither {TUNE} nor {REPORT} among their"
            " tags and are left out."
        )
    both = {run.settings["seed"] for run in choosing} & {run.settings["seed"] for run in reported}
    if choosing != reported and both:
        section.notes.append(
            f"{method}: {seeds_in_words(both)} chose the setting and are in its figure as well."
        )
    for run in used:
        lr, rho = run.settings["optim.lr"], run.settings.get("optim.rho")
        seed, chooses, reports = run.settings["seed"], run in choosing, run in reported
        setting = found.setdefault((lr, rho), Setting(method, lr, rho))
        setting.planned |= {seed} if reports else set()
        if run.state != "finished":
            setting.failed.append(run)
            setting.diverged |= chooses and run.state == "diverged"
        elif (first := seen.setdefault((lr, rho, seed, chooses, reports), run)) is run:
            setting.chosen_by += [run] if chooses else []
            setting.runs += [run] if reports else []
        else:
            section.notes.append(
                f"{run.folder} repeats {first.folder}, seed and all, and is left out"
                f" ({run.loss:.4f} beside {first.loss:.4f})."
            )
    return [found[key] for key in sorted(found, key=lambda key: (key[0], key[1] or 0.0))]


def doubt_about_time(section: Section, chosen: dict[str, Setting]) -> str:
    """Returns why equal time is no evidence between the settings chosen of each method, "" where
    nothing speaks against it."""
    machines = sorted({run.hardware for setting in chosen.values() for run in setting.runs})
    if len(machines) > 1:
        return f"the machines differ: {'; '.join(machines)}"
    spreads = dict[str, float]()
    for method, settings in section.methods.items():
        runs = [
            run
            for setting in settings
            for run in [*setting.chosen_by, *setting.runs]
            if run.summary["flops"] > 0
        ]
        for machine in {run.hardware for run in runs}:
            rates = [
                run.summary["seconds"] / run.summary["flops"]
                for run in runs
                if run.hardware == machine
            ]
            spreads[method] = max(
                spreads.get(method, 0.0), max(rates) / min(rates) - 1 if min(rates) > 0 else 0.0
            )
    worst = max(spreads, key=spreads.__getitem__, default="")
    if worst and spreads[worst] > UNEVEN:
        return (
            f"the machine was shared: seconds per FLOP of {worst} differ by {spreads[worst]:.0%}"
            " between its runs"
        )
    return ""


def imprecise(section: Section) -> dict[str, str]:
    """Returns the methods to whose rule rounding does harm, as far as their runs measured it, and
    which."""
    found = {}
    for method in section.best:
        harms = [run.harm for axis in AXES for run in section.chosen[axis][method].runs if run.harm]
        if harms:
            found[method] = harms[0]
    return found


def notes(section: Section, selection: Selection) -> list[str]:
    """What a reader has to know before believing the numbers."""
    chosen = {
        id(setting): setting for axis in AXES for setting in section.chosen[axis].values()
    }.values()
    compared = list({id(run): run for setting in chosen for run in setting.runs}.values())
    found = []
    for key, what in (
        ("data", "the data themselves differ, by their checksums"),
        ("evaluation.tokens", "evaluation.tokens differs"),
    ):
        counts = Counter(str(run.measured_on.get(key, "unknown"))[:12] for run in compared)
        counts.pop("unknown", None)
        if len(counts) > 1:
            listed = ", ".join(f"{value} in {count} runs" for value, count in counts.items())
            found.append(
                f"Validation sets differ: {what} ({listed}). Losses on different sets are not"
                " comparable."
            )
    if section.doubt:
        found.append(f"Equal time is no evidence, for {section.doubt}.")
    for method, how in section.imprecise.items():
        found.append(f"Precision: of {method}, {how}; compare with optim.compute=fp32.")
    for setting in chosen:
        found += notes_on(setting, section)
    if gone := sorted(
        {run.parent["parent.run"] for run in section.runs if "parent.run" in run.parent}
    ):
        found.append(
            "Runs that started from other folders of runs, which are gone, are apart by those"
            f" folders: {', '.join(gone)}."
        )
    tags = {
        tag
        for run in section.runs
        for tag in run.tags
        if re.match(r"\s*role\s*=", tag, re.IGNORECASE)
    }
    if unknown := sorted(tags - {TUNE, REPORT}):
        found.append(f"No such role: {', '.join(unknown)}; roles are {TUNE} and {REPORT}.")
    if selection.seeds and tags:
        found.append(
            "select_seeds says which runs choose and which are reported; their tags do not count."
        )
    return found


def notes_on(setting: Setting, section: Section) -> list[str]:
    """Returns what is to be said against one setting."""
    found = []
    tried = [other for other in section.methods[setting.method] if other.chosen_by]
    most = max(len(other.chosen_by) for other in tried)
    if setting.diverged:
        found.append(
            f"In every setting of {setting.method} a seed diverged; {setting} is judged by those"
            " that did not."
        )
    if len(setting.chosen_by) < most:
        found.append(
            f"{setting} was chosen by fewer seeds than another of its settings has:"
            f" {len(setting.chosen_by)} instead of {most}."
        )
    finished = {run.settings["seed"] for run in setting.runs}
    ended = [
        f"seed {run.settings['seed']} {run.state}"
        for run in setting.failed
        if run.settings["seed"] in setting.planned - finished
    ]
    if len(finished) < section.planned:
        why = f" ({', '.join(ended)})" if ended else ""
        found.append(
            f"{setting} has {len(finished)} finished seed{'s' * (len(finished) != 1)}, where"
            f" {section.planned} were planned of a setting{why}."
        )
    for key, values in (
        ("lr", {other.lr for other in tried}),
        ("rho", {other.rho for other in tried if other.rho is not None}),
    ):
        if (
            len(values) > 1
            and (value := getattr(setting, key)) in (min(values), max(values))
            and value > 0
        ):
            found.append(
                f"{setting}: its {key} is at the edge of what was tried ({min(values):g} to"
                f" {max(values):g}); a better one may lie beyond."
            )
    return found


def differing(several: list[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all; those of parents, in all that have one."""
    names = dict.fromkeys(name for settings in several for name in settings)
    found = []
    for name in names:
        holders = [
            settings for settings in several if name in settings or not name.startswith("parent.")
        ]
        if len({frozen(settings.get(name)) for settings in holders}) > 1:
            found.append(name)
    return found


def frozen(value: Any) -> str:
    """A value as something that can be a key."""
    return json.dumps(value, sort_keys=True)


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
