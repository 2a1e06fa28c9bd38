"""Compares runs: the best learning rate and radius of every method, its validation loss at equal
steps, equal FLOPs and equal time, and a paired test against AdamW by seed.

Only runs with the same model, tokenizer, data, batch and schedule are compared.
"""

from typing import Any

from launch.report.evidence import doubt_about_time, imprecise_methods, notes_on, paired_tests_at
from launch.report.keys import differing, frozen, shown
from launch.report.record import Record
from launch.report.section import AXES, FIGURES, Section
from launch.report.settings import Selection, choose_best, chosen_at, find_methods

# Keys that begin so set runs apart that cannot be compared.
SECTIONS = (
    "model.",
    "tokenizer.",
    "data.",
    "batch.",
    "schedule.",
    "task.",
)
# Where data lie is no part of what they are.
PLACES = (
    "data.path",
    "data.sources",
    "data.validation",
)


def compare(records: list[Record], selection: Selection | None = None) -> list[Section]:
    """Returns the sections of all runs with a configuration, the largest first. Raises ValueError
    for a selection that these runs do not allow."""
    selection = selection or Selection()
    selection.check(records)
    # A run that has not begun, or whose config.yaml cannot be read, belongs to no comparison.
    known = [record for record in records if record.settings]
    parents = kinds_of_parents(known)
    sections = sorted(group_runs(known, parents), key=lambda section: -len(section.runs))
    for section in sections:
        section.title = title_of(section, sections)
        analyse(section, selection, parents)
        if section.best and len(known) < len(records):
            section.notes.append(
                f"Runs that have not begun or cannot be read: {len(records) - len(known)}; a"
                " setting may lack their seeds."
            )
    return sections


def group_runs(records: list[Record], parents: dict[int, dict[str, Any]]) -> list[Section]:
    """Returns the sections of runs, not analysed yet, in the order the runs were found."""
    found: dict[str, Section] = {}
    places: dict[str, dict[str, Any]] = {}
    for record in records:
        keys = section_keys(record.settings, parents[id(record)])
        if data := record.measured_on.get("data"):
            # The same by checksum count as lying where they were met first.
            keys |= places.setdefault(data, {name: keys[name] for name in PLACES if name in keys})
        found.setdefault(frozen(keys), Section(keys, [])).runs.append(record)
    return list(found.values())


def title_of(section: Section, sections: list[Section]) -> str:
    """Returns model, data and horizon of a section, with the keys that tell it from others which
    share those."""
    # Only the keys that are needed to tell it from the others are named.
    start = horizon(section.keys)
    alike = [other.keys for other in sections if horizon(other.keys) == start]
    return ", ".join(
        [start, *(f"{key}={shown(section.keys.get(key))}" for key in differing(alike))]
    )


def kinds_of_parents(records: list[Record]) -> dict[int, dict[str, Any]]:
    """Returns what each run's parent was, by the run's id.

    The parents' seeds are no part of it where all runs that otherwise are alike have the seed of
    their parent: then they are repetitions from the start."""
    kinds = {}
    groups: dict[str, list[Record]] = {}
    for run in records:
        # To begin with, without the seeds of its parents.
        kinds[id(run)] = {
            key: value for key, value in run.parent.items() if not is_parents_seed(key)
        }
        own = {key: value for key, value in run.settings.items() if key not in ("seed", "init.run")}
        groups.setdefault(frozen([own, kinds[id(run)]]), []).append(run)
    # Where one of several runs that are alike has another seed than its parent, what the parents'
    # seeds were is part of what was done.
    for alike in groups.values():
        if not all(has_seed_of_parents(run) for run in alike):
            kinds |= {id(run): run.parent for run in alike}
    return kinds


def is_parents_seed(key: str) -> bool:
    """Returns whether a key is the seed of a parent, of its parent, and so on."""
    return key.rpartition("parent.")[2] == "seed"


def has_seed_of_parents(run: Record) -> bool:
    """Returns whether a run has the seed of every run that it goes back to."""
    seeds = {value for key, value in run.parent.items() if is_parents_seed(key)}
    return seeds <= {run.settings["seed"]}


def horizon(keys: dict[str, Any]) -> str:
    """Returns model, data and horizon of a section."""
    if keys["schedule.name"] == "chinchilla":
        length = f"{keys['schedule.tokens_per_parameter']:g} tokens per parameter"
    elif keys["schedule.tokens"] is not None:
        length = f"{keys['schedule.tokens']:,.0f} tokens"
    else:
        length = f"{keys['schedule.steps']:,} steps"
    return f"{keys['model.name']}, {keys['data.name']}, {length}"


def section_keys(settings: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that runs must share to be compared.

    A run that goes on from another with its optimiser is compared with whole ones; runs that start
    from another's weights only where those came about in the same way."""
    keys = {name: value for name, value in settings.items() if name.startswith(SECTIONS)}
    if settings.get("init.optimizer"):
        return keys | {"init.step": None, "init.hf": None}
    keys |= {name: settings.get(name) for name in ("init.step", "init.hf")}
    if not parent:
        return keys
    # The path of a parent is left out where its settings are known: they say what it was.
    origin = parent.get("parent.run") or f"a run of {parent['parent.optim.name']}"
    return keys | parent | {"init.run": origin}


def analyse(section: Section, selection: Selection, parents: dict[int, dict[str, Any]]) -> None:
    """Fills in methods, settings, budgets, tests and notes."""
    section.methods = find_methods(section, selection, parents)
    section.best = choose_best(section)
    compared = [run for setting in section.best.values() for run in setting.runs]
    if not compared:
        return
    # At equal FLOPs and time every run has to have been there; at equal steps the longest runs are
    # compared, and those that end earlier are not.
    for axis in AXES:
        section.budgets[axis] = min(run.summary[FIGURES[axis]] for run in compared)
    section.budgets["steps"] = max(run.step for run in compared)
    # Whether times count has to be known first, for it decides which settings equal time chooses.
    section.doubt = doubt_about_time(section, section.best)
    for axis in AXES:
        section.chosen[axis] = {method: chosen_at(section, axis, method) for method in section.best}
    if not section.doubt:
        # A setting that is the best at equal time may have run elsewhere.
        section.doubt = doubt_about_time(section, section.chosen["seconds"])
        if section.doubt:
            section.chosen["seconds"] = dict(section.best)
    section.tests = {axis: paired_tests_at(section, axis) for axis in AXES}
    section.imprecise = imprecise_methods(section)
    section.notes += notes_on(section, selection)
