"""The settings of every method, and which of them is chosen."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from conf.keys import KEYS, lookup
from conf.schema import Config
from launch.report.keys import differing, shown
from launch.report.record import Record
from launch.report.section import BASELINE, Section, Setting

# A comparison is about these keys; any other key makes a variant of a method.
SWEPT = (
    "seed",
    "optim.name",
    "optim.lr",
    "optim.rho",
)
DEFAULTS = {name: lookup(Config(), name) for name in KEYS}
# A run with the first of these in tracking.tags only chooses a setting, one with the second only
# reports on it.
TUNE = "role=tune"
REPORT = "role=report"


@dataclass
class Selection:
    """Which runs choose the setting of a method, and which are reported: by their seeds where some
    are given, else by their tags."""

    seeds: tuple[int, ...] = ()

    def divide(self, runs: list[Record]) -> tuple[list[Record], list[Record], str]:
        """Returns (runs that choose, runs that are reported, the former in words) of a method's
        runs."""
        if self.seeds:
            choosing = [run for run in runs if run.settings["seed"] in self.seeds]
            reported = [run for run in runs if run.settings["seed"] not in self.seeds]
        else:
            choosing, reported = by_roles(runs)
        # Without a run to choose by there is nothing to choose on but what is reported.
        if not choosing or choosing == reported:
            return reported, reported, "on these seeds"
        words = f"on {seeds_in_words({run.settings['seed'] for run in choosing})}"
        if not self.seeds and TUNE in choosing[0].tags:
            words += f" ({TUNE})"
        return choosing, reported, words

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


def by_roles(runs: list[Record]) -> tuple[list[Record], list[Record]]:
    """Returns (runs that choose, runs that are reported) of a method's runs by their tags.

    Runs without a role do what no run is tagged for: they choose where none has role=tune, and are
    reported where none has role=report."""
    tuning = [run for run in runs if TUNE in run.tags]
    reporting = [run for run in runs if REPORT in run.tags]
    choosing = tuning or [run for run in runs if REPORT not in run.tags]
    # Where every run is tagged to choose, those are all that there is to report so far.
    reported = reporting or [run for run in runs if TUNE not in run.tags] or tuning
    return choosing, reported


def seeds_in_words(seeds: Iterable[int]) -> str:
    """Returns "seed 0" or "seeds 0, 1"."""
    ordered = sorted(seeds)
    word = "seed" if len(ordered) == 1 else "seeds"
    return f"{word} {', '.join(map(str, ordered))}"


def find_methods(
    section: Section, selection: Selection, parents: dict[int, dict[str, Any]]
) -> dict[str, list[Setting]]:
    """Returns every method's settings.

    Runs of one method that differ in any other key than seed, rate and radius become variants,
    named by those keys where they do not have their default."""
    # Keys that vary are looked for among the runs of one method only: those in which two methods
    # differ are what their names stand for.
    variants: dict[str, list[Record]] = {}
    # Where a run branches off makes a variant, from which folder does not.
    same = {*section.keys, *SWEPT, "init.run"} - {"init.step"}
    for name in dict.fromkeys(run.settings["optim.name"] for run in section.runs):
        runs = [run for run in section.runs if run.settings["optim.name"] == name]
        others = [without(run.settings | parents[id(run)], same) for run in runs]
        varying = differing(others)
        for run, other in zip(runs, others, strict=True):
            variants.setdefault(variant_name(run, other, varying), []).append(run)
    ordered = sorted(variants, key=lambda method: (method.split()[0] != BASELINE, method))
    return {method: settings_of(section, selection, method, variants[method]) for method in ordered}


def without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Returns settings but for those of the given names."""
    return {name: value for name, value in settings.items() if name not in names}


def variant_name(run: Record, other: dict[str, Any], varying: list[str]) -> str:
    """Returns the name of a run's method, with those keys that vary between runs of that name and
    do not have their default."""
    name = run.settings["optim.name"]
    if name == BASELINE and run.settings["optim.path"] != "none":
        # Its path moves the weights, so it is no baseline.
        name = f"perturbed {name}"
    named = [
        key
        for key in varying
        if other.get(key) is not None and (key not in DEFAULTS or other[key] != DEFAULTS[key])
    ]
    return " ".join([name, *(f"{key.removeprefix('optim.')}={shown(other[key])}" for key in named)])


def settings_of(
    section: Section, selection: Selection, method: str, runs: list[Record]
) -> list[Setting]:
    """Returns the settings of a method by learning rate and radius; runs that are left out are
    named in the section's notes."""
    found: dict[tuple, Setting] = {}
    # The first finished run of each setting, seed and role: a seed counts once in a mean.
    seen: dict[tuple, Record] = {}
    choosing, reported, section.selectors[method] = selection.divide(runs)
    section.notes += notes_on_roles(method, runs, choosing, reported)
    for run in runs:
        chooses = run in choosing
        reports = run in reported
        if not (chooses or reports):
            continue
        place = (run.settings["optim.lr"], run.settings.get("optim.rho"))
        seed = run.settings["seed"]
        setting = found.setdefault(place, Setting(method, *place))
        # Runs that failed count as planned, so that a setting whose bad seeds all failed is seen to
        # lack them.
        if reports:
            setting.planned.add(seed)
        if run.state != "finished":
            setting.failed.append(run)
            setting.diverged |= chooses and run.state == "diverged"
            continue
        first = seen.setdefault((*place, seed, chooses, reports), run)
        if first is not run:
            section.notes.append(
                f"{run.name} repeats {first.name}, seed and all, and is left out"
                f" ({run.loss:.4f} beside {first.loss:.4f})."
            )
            continue
        if chooses:
            setting.chosen_by.append(run)
        if reports:
            setting.runs.append(run)
    return [found[place] for place in sorted(found, key=lambda place: (place[0], place[1] or 0.0))]


def notes_on_roles(
    method: str, runs: list[Record], choosing: list[Record], reported: list[Record]
) -> list[str]:
    """Returns notes on the runs of a method without a role, and on seeds with both roles."""
    # Runs that neither choose nor report are those without a role, where others have one.
    found = []
    idle = [run for run in runs if run not in choosing and run not in reported]
    if idle:
        found.append(
            f"Runs of {method} with neither {TUNE} nor {REPORT} among their tags are left out:"
            f" {len(idle)}."
        )
    chosen_on = {run.settings["seed"] for run in choosing}
    both = chosen_on.intersection(run.settings["seed"] for run in reported)
    if choosing != reported and both:
        found.append(
            f"{method}: {seeds_in_words(both)} chose the setting and are in its figure as well."
        )
    return found


def choose_best(section: Section) -> dict[str, Setting]:
    """Returns the best setting of every method that has a run to report; a method without is named
    in the section's notes."""
    found = {}
    for method, settings in section.methods.items():
        if tried := section.tried(method):
            # A setting of which a seed diverged comes after all others: the mean over the seeds
            # that did not flatters it.
            best = min(tried, key=lambda setting: (setting.diverged, setting.final.mean))
            if best.runs:
                found[method] = best
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
    return found


def chosen_at(section: Section, axis: str, method: str) -> Setting:
    """Returns the setting of a method with the lowest mean loss at the budget, of those that
    reached it with every run they are chosen by."""
    # At equal steps runs are read at their end, which is what the best is chosen by. Times that are
    # no evidence choose nothing.
    best = section.best[method]
    if axis == "steps" or (axis == "seconds" and section.doubt):
        return best
    lowest = (True, math.inf)
    for setting in section.methods[method]:
        at = section.mean_of(setting.chosen_by, axis)
        # A mean over those seeds alone that came far enough would be one of a lucky choice.
        if setting.runs and at.seeds and at.seeds == len(setting.chosen_by):
            rank = (setting.diverged, at.mean)
            if rank < lowest:
                lowest = rank
                best = setting
    return best
