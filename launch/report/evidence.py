"""The evidence of a comparison: the tests by seed, and notes on what speaks against its numbers."""

import math
import re
from collections import Counter
from collections.abc import Iterable

from launch.report.estimates import PairedTest, holm, paired_test
from launch.report.record import Record
from launch.report.section import AXES, Section, Setting
from launch.report.settings import REPORT, TUNE, Selection
from launch.report.wording import plural

# Seconds per FLOP of runs on one machine may differ by this share.
UNEVEN = 0.1
# What validation losses are taken on, and what is wrong where it differs.
MEASURED = {
    "data": "the data themselves differ, by their checksums",
    "evaluation.tokens": "evaluation.tokens differs",
}


def paired_tests_at(section: Section, axis: str) -> dict[str, PairedTest]:
    """Returns the tests of the methods beside the baseline at the budget, by seed."""
    if section.baseline is None:
        return {}
    # Losses by seed: two runs of one seed saw the same data in the same order, and from the same
    # weights, so that their difference is freer of chance than that of two means.
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
    # Of many methods some would be significant by chance alone.
    adjusted = holm({method: test.p for method, test in found.items()})
    return {
        method: test._replace(holm=adjusted.get(method, math.nan)) for method, test in found.items()
    }


def doubt_about_time(section: Section, chosen: dict[str, Setting]) -> str:
    """Returns why equal time is no evidence between the settings chosen of each method, "" where
    nothing speaks against it."""
    runs = [run for setting in chosen.values() for run in setting.runs]
    machines = sorted({run.hardware or "unknown" for run in runs})
    if len(machines) > 1:
        return f"the machines differ: {'; '.join(machines)}"
    # Runs of one method spend the same time per FLOP on one machine, unless other work ran beside
    # some of them.
    spreads = {}
    for method, settings in section.methods.items():
        runs = [run for setting in settings for run in [*setting.chosen_by, *setting.runs]]
        spreads[method] = spread_of_speed(runs)
    worst = max(spreads, key=spreads.__getitem__, default="")
    if worst and spreads[worst] > UNEVEN:
        return (
            f"the machine was shared: seconds per FLOP of {worst} differ by {spreads[worst]:.0%}"
            " between its runs"
        )
    return ""


def spread_of_speed(runs: Iterable[Record]) -> float:
    """Returns by what share the seconds per FLOP of runs on one machine differ at most."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        if run.summary["flops"] > 0:
            rate = run.summary["seconds"] / run.summary["flops"]
            rates.setdefault(run.hardware, []).append(rate)
    # A run that took no time tells no rate.
    known = [each for each in rates.values() if min(each) > 0]
    return max((max(each) / min(each) - 1 for each in known), default=0.0)


def imprecise_methods(section: Section) -> dict[str, str]:
    """Returns the methods to whose rule rounding does harm, as far as their runs measured it, and
    which harm."""
    found = {}
    for method in section.best:
        harms = [run.harm for axis in AXES for run in section.chosen[axis][method].runs if run.harm]
        if harms:
            found[method] = harms[0]
    return found


def notes_on(section: Section, selection: Selection) -> list[str]:
    """Returns what a reader has to know before believing the numbers."""
    # A setting that is chosen at several budgets is noted once.
    settings = [setting for axis in AXES for setting in section.chosen[axis].values()]
    chosen = list({id(setting): setting for setting in settings}.values())
    found = notes_on_validation(chosen)
    found += notes_on_summaries(chosen)
    if section.doubt:
        found.append(f"Equal time is no evidence, for {section.doubt}.")
    for method, how in section.imprecise.items():
        found.append(f"Precision: of {method}, {how}; compare with optim.compute=fp32.")
    for setting in chosen:
        found += notes_on_setting(setting, section)
    found += notes_on_parents(section)
    found += notes_on_tags(section, selection)
    return found


def notes_on_validation(chosen: list[Setting]) -> list[str]:
    """Returns a note on each way in which the validation sets of the settings differ."""
    compared = {id(run): run for setting in chosen for run in setting.runs}
    found = []
    for key, what in MEASURED.items():
        # Twelve digits of a checksum tell data apart. A run without a checkpoint has none.
        measured = [str(run.measured_on.get(key, "unknown"))[:12] for run in compared.values()]
        counts = Counter(value for value in measured if value != "unknown")
        if len(counts) > 1:
            listed = ", ".join(f"{value} in {count} runs" for value, count in counts.items())
            found.append(
                f"Validation sets differ: {what} ({listed}). Losses on different sets are not"
                " comparable."
            )
    return found


def notes_on_summaries(chosen: list[Setting]) -> list[str]:
    """Returns a note on every run whose summary does not go with its rows."""
    compared = {id(run): run for setting in chosen for run in setting.runs}
    return [
        f"{run.name}: {differs}; its rows are cut, or one of the two files is another run's."
        for run in compared.values()
        if (differs := run.disagreement())
    ]


def notes_on_setting(setting: Setting, section: Section) -> list[str]:
    """Returns what is to be said against one setting."""
    found = []
    tried = section.tried(setting.method)
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
    found += note_on_seeds(setting, section.planned)
    rates = {other.lr for other in tried}
    radii = {other.rho for other in tried if other.rho is not None}
    found += note_on_edge(setting, "lr", setting.lr, rates)
    found += note_on_edge(setting, "rho", setting.rho, radii)
    return found


def note_on_seeds(setting: Setting, planned: int) -> list[str]:
    """Returns a note on a setting with fewer finished seeds than were planned of one."""
    finished = {run.settings["seed"] for run in setting.runs}
    if len(finished) >= planned:
        return []
    ended = [
        f"seed {run.settings['seed']} {run.state}"
        for run in setting.failed
        if run.settings["seed"] in setting.planned - finished
    ]
    note = (
        f"{setting} has {plural(len(finished), 'finished seed')}, where {planned} were planned of a"
        " setting"
    )
    if ended:
        note += f" ({', '.join(ended)})"
    return [f"{note}."]


def note_on_edge(setting: Setting, key: str, value: float | None, tried: set[float]) -> list[str]:
    """Returns a note on a setting whose learning rate or radius is the least or largest tried."""
    # A radius of 0 is no edge: below it there is nothing to try. One value has no edges.
    if value is None or value <= 0 or len(tried) < 2 or min(tried) < value < max(tried):
        return []
    return [
        f"{setting}: its {key} is at the edge of what was tried ({min(tried):g} to"
        f" {max(tried):g}); a better one may lie beyond."
    ]


def notes_on_parents(section: Section) -> list[str]:
    """Returns a note on parents of runs whose folders are gone."""
    parents = [run.parent for run in section.runs]
    gone = sorted({parent["parent.run"] for parent in parents if "parent.run" in parent})
    if not gone:
        return []
    return [
        "Runs that started from other folders of runs, which are gone, are apart by those"
        f" folders: {', '.join(gone)}."
    ]


def notes_on_tags(section: Section, selection: Selection) -> list[str]:
    """Returns notes on tags that name no role, and on roles that do not count."""
    # Role = tune and the like look as if they counted, and do not.
    tags = {tag for run in section.runs for tag in run.tags}
    roles = {tag for tag in tags if re.match(r"\s*role\s*=", tag, re.IGNORECASE)}
    found = []
    if unknown := sorted(roles - {TUNE, REPORT}):
        found.append(f"No such role: {', '.join(unknown)}; roles are {TUNE} and {REPORT}.")
    if selection.seeds and roles:
        found.append(
            "select_seeds says which runs choose and which are reported; their tags do not count."
        )
    return found
