"""What a report says of a comparison in words and tables, for its page, its Markdown and its
CSV."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.report.comparison import AXES, DEFAULTS, Section, Setting, shown
from launch.report.estimates import FEWEST, Estimate, PairedTest
from launch.report.record import Record

AT = {"steps": "equal steps", "flops": "equal FLOPs", "seconds": "equal time"}
MIDWAY = "\u2020"
PRECISION = "\u2021"
HOW = (
    "\u00b1 is half the 95 % interval of Student's t over seeds, n their number (of those that were"
    " planned). Every method stands with one setting (learning rate, radius), the one with the"
    " lowest mean loss among the settings that it tried: at equal steps the final loss, at equal"
    " FLOPs and time the loss at that budget, where another setting than at equal steps is named."
    " Chosen on the same seeds that are reported, the figure of a method is lucky, the more so the"
    " more settings it tried: select_seeds=0,1 chooses on some seeds and reports on the others, and"
    " so do runs with the tags role=tune and role=report. The budget of equal FLOPs and of equal"
    " time is the largest that all runs compared here reached; a run that ends within 5 % of it"
    " counts with its final loss, any other is read on the straight line between its two"
    " evaluations around the budget. Time is spent in steps, without evaluations."
)
TESTING = (
    f"Differences are paired by seed. Below {FEWEST} pairs each difference stands for itself; else"
    " a two-sided paired t-test, with p adjusted by Holm over the methods of a column. Time is the"
    " machine's as much as the method's and is not tested."
)
UNANNEALED = (
    f"{MIDWAY} read in the middle of the learning-rate schedule: the rate is not annealed there"
    " yet, which costs these runs loss that a run of this length would not pay."
    " optim.compute_matched=true trains a method to AdamW's FLOPs on a schedule of its own."
)


class Table(NamedTuple):
    """Rows of text under a header; columns in `text` are left-aligned, the first cells lead to
    `folders`, where there are some."""

    header: list[str]
    rows: list[list[str]]
    text: tuple[int, ...] = (0,)
    caption: str = ""
    folders: Sequence[Path] = ()


def headline(section: Section) -> list[str]:
    """Returns what won, and whatever is to be said against it."""
    return [*winners(section), *caveats(section)]


def winners(section: Section) -> list[str]:
    """Returns what won at equal steps, FLOPs and time, a sentence each."""
    if len(section.runs) == 1:
        return [lone(section.runs[0])]
    if not section.best:
        return ["No run is finished yet."]
    if len(section.best) == 1:
        ((method, setting),) = section.best.items()
        found = section.at_equal("steps", method)
        return [
            f"{setting}: final validation loss {value(found)} over {of_planned(section, found)},"
            f" {how_chosen(section, method)}. There is no other method to compare."
        ]
    return [winner(section, axis) for axis in AXES]


def lone(run: Record) -> str:
    """Returns how a run that stands alone has fared."""
    name = ", ".join(
        f"{key} {text}"
        for key, text in zip(("lr", "rho", "seed"), swept(run)[1:], strict=True)
        if text
    )
    ended = (
        f"final validation loss {run.loss:.4f}"
        if run.state == "finished"
        else f"{run.state} at step {run.step:,}. {run.reason}".rstrip(". ")
    )
    return f"{swept(run)[0]} ({name}): {ended}. There is no other method to compare."


def winner(section: Section, axis: str) -> str:
    """Returns what won at the budget of an axis, in a sentence."""
    at = f"At {AT[axis]} ({spent(section, axis)}): "
    if axis == "seconds" and section.doubt:
        return f"{at}no evidence, for {section.doubt.partition(':')[0]}."
    ranked = section.ranked(axis)
    if not ranked:
        return f"{at}no run was there."
    first, *others = ranked
    found = section.at_equal(axis, first)
    sentence = (
        f"{at}{section.chosen[axis][first]}{PRECISION * (first in section.imprecise)} has the"
        f" lowest validation loss, {value(found)} over "
    )
    sentence += f"{of_planned(section, found)}, {how_chosen(section, first)}"
    tried = first if first != section.baseline else next(iter(others), None)
    if tried and (test := section.tests[axis].get(tried)):
        ours = (
            ""
            if tried == first
            else f" ({section.chosen[axis][tried].numbers}; {how_chosen(section, tried)})"
        )
        theirs = (
            ""
            if tried != first
            else (
                f" ({section.chosen[axis][section.baseline or ''].numbers};"
                f" {how_chosen(section, section.baseline or '')})"
            )
        )
        sentence += (
            f"; {tried}{PRECISION * (tried in section.imprecise)}{ours} minus"
            f" {section.baseline}{theirs} by seed: {tested(test, axis)}"
        )
    return f"{sentence}."


def how_chosen(section: Section, method: str) -> str:
    """Returns of how many settings that of a method is the best, and on what; variants of a method
    are told apart by other keys."""
    tried = sum(bool(setting.chosen_by) for setting in section.methods[method])
    found = (
        f"best of {tried} settings, chosen {section.selectors[method]}"
        if tried > 1
        else "its only setting"
    )
    name = method.split()[0]
    variants = sum(other.split()[0] == name for other in section.best)
    if variants > 1:
        found += f", one of {variants} variants of {name}"
        if method == section.baseline:
            found += ", the best on the reported seeds"
    return found


def of_planned(section: Section, found: Estimate) -> str:
    """Returns the number of seeds, and of those that were planned where these are more."""
    planned = max(section.planned, found.seeds)
    return (
        plural(found.seeds, "seed")
        if found.seeds == planned
        else f"{found.seeds} of {planned} seeds"
    )


def caveats(section: Section) -> list[str]:
    """Returns what is to be said against the figures."""
    midway = any(
        section.at_equal(axis, method).midway for axis in section.chosen for method in section.best
    )
    marked = (
        [f"{PRECISION} the compute precision distorts the method's gradient; see the notes."]
        if section.imprecise
        else []
    )
    untested = (
        []
        if section.baseline or not section.best or len(section.runs) == 1
        else ["No run of AdamW is finished here, so there is no paired test."]
    )
    unfinished = sum(run.state != "finished" for run in section.runs)
    open_runs = (
        [f"{unfinished} of {plural(len(section.runs), 'run')} did not finish."]
        if unfinished and section.best
        else []
    )
    return [*([UNANNEALED] if midway else []), *marked, *untested, *open_runs, *section.notes]


def tables(section: Section) -> list[Table]:
    """Returns validation loss by method, the paired tests, and what the methods cost."""
    return [by_method(section), paired(section), cost(section)] if section.best else []


def by_method(section: Section) -> Table:
    """Returns validation loss by method at equal steps, FLOPs and time."""
    rows = []
    for method, setting in section.best.items():
        losses = [loss_cell(section, axis, method) for axis in AXES]
        seeds = [
            of_planned(section, section.at_equal(axis, method)).split(" seed")[0] for axis in AXES
        ]
        best = [f"{setting.lr:g}", "" if setting.rho is None else f"{setting.rho:g}"]
        tried = sum(bool(other.chosen_by) for other in section.methods[method])
        rows.append(
            [method + PRECISION * (method in section.imprecise), *losses, *best, str(tried), *seeds]
        )
    at = {axis: f"{AT[axis]}: {spent(section, axis)}" for axis in AXES}
    at["seconds"] += f" (no evidence: {section.doubt.partition(':')[0]})" if section.doubt else ""
    header = [
        "method",
        *at.values(),
        "best lr",
        "best rho",
        "settings",
        *(f"n, {AT[axis]}" for axis in AXES),
    ]
    selectors = ", ".join(dict.fromkeys(section.selectors[method] for method in section.best))
    caption = (
        "Validation loss (nats per token) by method, \u00b1 half the 95 % interval; * is the"
        f" lowest; settings chosen {selectors}"
    )
    return Table(header, rows, caption=caption)


def loss_cell(section: Section, axis: str, method: str) -> str:
    """Returns a method's loss at a budget with its marks, and its setting where that is another
    than at equal steps."""
    found, setting = section.at_equal(axis, method), section.chosen[axis][method]
    if not found.seeds:
        return "ends earlier" if axis == "steps" else "not reached"
    other = "" if setting is section.best[method] else f" ({setting.numbers})"
    doubted = axis == "seconds" and section.doubt
    lowest = len(section.best) > 1 and not doubted and section.ranked(axis)[0] == method
    return value(found) + other + " *" * lowest


def paired(section: Section) -> Table:
    """Returns each method beside AdamW by seed."""
    marks = {method: PRECISION * (method in section.imprecise) for method in section.best}
    rows = [
        [method + marks[method], *(tested(section.tests[axis][method], axis) for axis in AXES)]
        for method in section.tests["steps"]
    ]
    head = [f"at {AT[axis]}" for axis in AXES]
    head[-1] += " (no evidence)" * bool(section.doubt)
    return Table(
        ["method", *head],
        rows,
        caption=f"Difference to {section.baseline}, paired by seed (negative: a lower loss)",
    )


def tested(test: PairedTest, axis: str) -> str:
    """Returns a comparison by seed as text, for tables and sentences alike."""
    mark = MIDWAY * test.difference.midway
    pairs = test.difference.seeds
    if not pairs:
        return "no pair of seeds"
    if pairs < FEWEST:
        each = ", ".join(
            f"{signed(difference)}{mark} (seed {seed})" for seed, difference in test.by_seed.items()
        )
        return f"{each}; too few pairs for a test"
    of = f"{pairs} pairs"
    if axis != "seconds":
        of += (
            ", no spread, so no test"
            if math.isnan(test.p)
            else f", t {test.t:.2f}, p {test.p:.2g}, by Holm {test.holm:.2g}"
        )
    chance = "" if axis == "seconds" or test.holm < 0.05 else "; may be chance"
    text = f"{signed(test.difference.mean)} \u00b1 {test.difference.margin:.4f}{mark} ("
    return text + f"{of}{chance if math.isfinite(test.p) else ''})".replace(" ", "\u00a0").replace(
        ",\u00a0", ", "
    ).replace(";\u00a0", "; ")


def facts(run: Record) -> Table:
    """Returns the final figures of a run that stands alone."""
    names = {
        "val/loss": "final validation loss (nats per token)",
        "val/bits_per_byte": "bits per byte",
        "val/perplexity": "perplexity",
        "step": "steps",
        "tokens": "tokens",
        "flops": "FLOPs",
        "seconds": "seconds in steps",
        "parameters": "parameters",
        "skipped": "skipped steps",
    }
    rows = [["state", f"{run.state}: {run.reason}" if run.reason else run.state]]
    rows += [
        [name, number(run.summary[key])]
        for key, name in names.items()
        if isinstance(run.summary.get(key), (int, float))
    ]
    medians = {
        "perf/tokens_per_second": "tokens per second (median)",
        "perf/mfu": "MFU (median)",
        "perf/memory_gib": "memory (GiB, median)",
    }
    rows += [
        [name, number(float(np.median(known)))]
        for key, name in medians.items()
        if len(known := run.curve("step", key)[1])
    ]
    rows += [["machine", run.hardware]] if run.hardware else []
    return Table(["figure", "value"], rows, (0, 1), "The run")


def chosen_keys(run: Record) -> Table:
    """Returns the settings of a run that are not the defaults."""
    rows = [[name, shown(given)] for name, given in run.settings.items() if given != DEFAULTS[name]]
    return Table(["key", "value"], rows, (0, 1), "Settings other than the defaults")


def number(given: float) -> str:
    """Returns a number of any size as a person reads it."""
    if isinstance(given, float) and given.is_integer() and abs(given) < 1e15:
        given = int(given)
    return f"{given:,}" if isinstance(given, int) and abs(given) < 1e9 else f"{given:.5g}"


def cost(section: Section) -> Table:
    """What a step of each method costs, beside AdamW's."""
    rates = {method: rate(setting) for method, setting in section.best.items()}
    base = rates.get(section.baseline or "", (math.nan,) * 4)
    rows = []
    for method, (speed, seconds, flops, utilisation) in rates.items():
        beside = [
            plain(ours / theirs if theirs else math.nan, ".2f")
            for ours, theirs in ((seconds, base[1]), (flops, base[2]))
        ]
        rows.append([method, plain(speed, ",.0f"), *beside, plain(utilisation, ".1%")])
    doubt = " (no evidence)" if section.doubt else ""
    header = [
        "method",
        f"tokens per second (median){doubt}",
        f"time of a step / AdamW's{doubt}",
        "FLOPs of a step / AdamW's",
        f"MFU (median){doubt}",
    ]
    # MFU needs a device whose peak is known
    known = [column for column in range(len(header)) if any(row[column] for row in rows)]
    header, rows = (
        [header[column] for column in known],
        [[row[column] for column in known] for row in rows],
    )
    return Table(header, rows, caption="Throughput")


def rate(setting: Setting) -> tuple[float, float, float, float]:
    """(tokens per second, seconds and FLOPs of a step, MFU) of a setting, means over its runs."""
    runs = setting.runs
    medians = [
        float(
            np.mean(
                [
                    np.median(values) if len(values := run.curve("step", name)[1]) else math.nan
                    for run in runs
                ]
            )
        )
        for name in ("perf/tokens_per_second", "perf/mfu")
    ]
    steps = [max(1, run.step) for run in runs]
    seconds, flops = (
        float(np.mean([run.summary[name] / step for run, step in zip(runs, steps, strict=True)]))
        for name in ("seconds", "flops")
    )
    return medians[0], seconds, flops, medians[1]


def failed(records: list[Record]) -> Table:
    """Returns every run that is not finished."""
    unfinished = [run for run in records if run.state != "finished"]
    rows = [
        [str(run.folder), run.state, *swept(run), f"{run.step:,}", run.reason] for run in unfinished
    ]
    header = ["run", "state", "method", "lr", "rho", "seed", "last step", "why"]
    return Table(header, rows, (0, 1, 2, 7), folders=[run.folder for run in unfinished])


def all_runs(section: Section) -> Table:
    """Returns every run of a section, the best first."""
    rows = []
    ordered = sorted(section.runs, key=lambda run: (math.isnan(run.loss), run.loss))
    for run in ordered:
        last = [
            f"{run.step:,}",
            plain(run.summary.get("flops", math.nan), ".3g"),
            plain(run.summary.get("seconds", math.nan), ",.0f"),
        ]
        rows.append(
            [
                run.folder.name,
                *swept(run),
                plain(run.loss),
                *last,
                str(run.summary.get("skipped", "")),
                run.state,
            ]
        )
    header = [
        "run",
        "method",
        "lr",
        "rho",
        "seed",
        "final loss",
        "steps",
        "FLOPs",
        "seconds",
        "skipped steps",
        "state",
    ]
    return Table(header, rows, (0, 1, 10), folders=[run.folder for run in ordered])


def swept(run: Record) -> list[str]:
    """Method, learning rate, radius and seed of a run, as far as it tells."""
    values = [run.settings.get(name) for name in ("optim.name", "optim.lr", "optim.rho", "seed")]
    return [
        "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        for value in values
    ]


def conditions(section: Section) -> str:
    """What all runs of a section share, in a line."""
    keys = section.keys
    sequences, length = keys["batch.sequences"], keys["batch.length"]
    shape = (
        f"{plural(keys['model.num_layers'], 'layer')} x {keys['model.width']}, tokenizer"
        f" {keys['tokenizer.name']}"
    )
    step = f"{sequences} sequences x {length} = {sequences * length:,} tokens a step"
    return f"{shape}, {step}, {keys['schedule.shape']} schedule; {plural(len(section.runs), 'run')}"


def spent(section: Section, axis: str) -> str:
    """The budget of an axis, as a person reads it."""
    budget = section.budgets[axis]
    return {
        "steps": f"{budget:,.0f} steps",
        "flops": f"{budget:.3g} FLOPs",
        "seconds": f"{budget:,.0f} s" if budget >= 10 else f"{budget:.2g} s",
    }[axis]


def value(found: Estimate) -> str:
    """Returns a mean with half its 95 % interval, where it has one, and the mark of runs in the
    middle of their schedule."""
    return (
        f"{found.mean:.4f}"
        + ("" if math.isnan(found.margin) else f" \u00b1 {found.margin:.4f}")
        + MIDWAY * found.midway
    )


def plain(value: float, form: str = ".4f") -> str:
    """A number, or nothing where it is unknown."""
    return "" if math.isnan(value) else f"{value:{form}}"


def signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.4f}"


def plural(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
