"""The tables of a report, for its page, its Markdown and its CSV."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.report.keys import shown
from launch.report.record import Record
from launch.report.section import AXES, Section, Setting
from launch.report.settings import DEFAULTS
from launch.report.wording import (
    AT,
    budget_text,
    difference_text,
    loss_text,
    number_text,
    of_planned,
    precision_mark,
    setting_text,
    setting_texts,
)

# Figures of a run that stands alone: of its summary the last, of its rows the median.
FINAL = {
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
MEDIANS = {
    "perf/tokens_per_second": "tokens per second (median)",
    "perf/mfu": "MFU (median)",
    "perf/memory_gib": "memory (GiB, median)",
}
RUNS = [
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


class Table(NamedTuple):
    """Rows of text under a header; columns in `text` are left-aligned, the first cells lead to
    `folders`, where there are some."""

    header: list[str]
    rows: list[list[str]]
    text: tuple[int, ...] = (0,)
    caption: str = ""
    folders: Sequence[Path] = ()


def result_tables(section: Section) -> list[Table]:
    """Returns the tables of a section's results that have rows: of a run that stands alone its
    figures and settings, else those that compare methods."""
    if len(section.runs) == 1:
        found = [figures_table(section.runs[0]), settings_table(section.runs[0])]
    else:
        found = method_tables(section)
    return [table for table in found if table.rows]


def method_tables(section: Section) -> list[Table]:
    """Returns validation loss by method, the paired tests, and what the methods cost; nothing
    before a run is finished."""
    if not section.best:
        return []
    return [loss_table(section), difference_table(section), throughput_table(section)]


def loss_table(section: Section) -> Table:
    """Returns validation loss by method at equal steps, FLOPs and time."""
    rows = []
    for method, setting in section.best.items():
        losses = [loss_cell(section, axis, method) for axis in AXES]
        seeds = [of_planned(section, section.at_equal(axis, method)) for axis in AXES]
        # The losses come first: on a telephone the columns after them are beyond the edge.
        rows.append(
            [
                method + precision_mark(section, method),
                *losses,
                setting_text(setting.lr),
                setting_text(setting.rho),
                str(len(section.tried(method))),
                *(text.split(" seed")[0] for text in seeds),
            ]
        )
    # The header says how much of each axis the methods had, and where that is no fair comparison.
    at = {axis: f"{AT[axis]}: {budget_text(section, axis)}" for axis in AXES}
    if section.doubt:
        at["seconds"] += f" (no evidence: {section.doubt.partition(':')[0]})"
    numbers = [f"n, {AT[axis]}" for axis in AXES]
    header = ["method", *at.values(), "best lr", "best rho", "settings", *numbers]
    # Methods may be chosen on different runs, if only some carry roles.
    selectors = ", ".join(dict.fromkeys(section.selectors[method] for method in section.best))
    caption = (
        "Validation loss (nats per token) by method, \u00b1 half the 95 % interval; * is the"
        f" lowest; settings chosen {selectors}"
    )
    return Table(header, rows, caption=caption)


def loss_cell(section: Section, axis: str, method: str) -> str:
    """Returns a method's loss at a budget with its marks, and its setting where that is another
    than at equal steps."""
    found = section.at_equal(axis, method)
    setting = section.chosen[axis][method]
    # At equal steps a compute-matched run has ended before the others; at equal FLOPs or time the
    # rows of a run may be lost where they would have to be read.
    if not found.seeds and axis == "steps":
        return "ends earlier"
    if not found.seeds:
        return "not reached"
    text = loss_text(found)
    if setting is not section.best[method]:
        text += f" ({setting.numbers})"
    # One method wins over nothing, and where times are no evidence none wins.
    doubted = axis == "seconds" and section.doubt
    if len(section.best) > 1 and not doubted and section.ranked(axis)[0] == method:
        text += " *"
    return text


def difference_table(section: Section) -> Table:
    """Returns each method beside AdamW by seed."""
    rows = []
    for method in section.tests["steps"]:
        cells = [difference_text(section.tests[axis][method], axis) for axis in AXES]
        rows.append([method + precision_mark(section, method), *cells])
    head = [f"at {AT[axis]}" for axis in AXES]
    # Time is the last of the axes.
    head[-1] += no_evidence(section)
    caption = f"Difference to {section.baseline}, paired by seed (negative: a lower loss)"
    return Table(["method", *head], rows, caption=caption)


def no_evidence(section: Section) -> str:
    """Returns the mark of figures of time where time is no evidence, "" where it is."""
    return " (no evidence)" if section.doubt else ""


def throughput_table(section: Section) -> Table:
    """Returns what a step of each method costs, beside AdamW's; a column that no method has a
    figure for is left out."""
    rates = {method: Rate.of(setting) for method, setting in section.best.items()}
    # Without AdamW the rates beside it are unknown, and their columns go.
    base = rates.get(section.baseline or "", Rate())
    rows = [
        [
            method,
            number_text(rate.speed, ",.0f"),
            number_text(ratio(rate.seconds, base.seconds), ".2f"),
            number_text(ratio(rate.flops, base.flops), ".2f"),
            number_text(rate.utilisation, ".1%"),
        ]
        for method, rate in rates.items()
    ]
    doubt = no_evidence(section)
    header = [
        "method",
        f"tokens per second (median){doubt}",
        f"time of a step / AdamW's{doubt}",
        "FLOPs of a step / AdamW's",
        f"MFU (median){doubt}",
    ]
    # MFU needs a device whose peak is known. The columns are tuples of a title and its cells, so a
    # table is transposed twice to leave out those without a cell.
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    kept = [list(line) for line in zip(*columns, strict=True)]
    return Table(kept[0], kept[1:], caption="Throughput")


class Rate(NamedTuple):
    """What a step of a setting costs: tokens per second, seconds and FLOPs of a step, and MFU;
    means over the setting's runs."""

    speed: float = math.nan
    seconds: float = math.nan
    flops: float = math.nan
    utilisation: float = math.nan

    @classmethod
    def of(cls, setting: Setting) -> "Rate":
        """Returns the rate of a setting."""
        # The median, for single rows, such as the first after a start, are slow.
        speeds = [median(run, "perf/tokens_per_second") for run in setting.runs]
        # Of whole runs, in which steps that move the weights and plain ones are mixed as the rule
        # mixes them. A run that has taken no step divides by 1.
        seconds = [run.summary["seconds"] / max(1, run.step) for run in setting.runs]
        flops = [run.summary["flops"] / max(1, run.step) for run in setting.runs]
        utilisations = [median(run, "perf/mfu") for run in setting.runs]
        return cls(*map(mean, (speeds, seconds, flops, utilisations)))


def mean(values: list[float]) -> float:
    """Returns the mean of values."""
    return float(np.mean(values))


def median(run: Record, figure: str) -> float:
    """Returns the median of a figure over a run's rows, nan where no row has it."""
    values = run.curve("step", figure)[1]
    return float(np.median(values)) if len(values) else math.nan


def ratio(ours: float, theirs: float) -> float:
    """Returns ours / theirs, nan for a divisor of 0."""
    return ours / theirs if theirs else math.nan


def figures_table(run: Record) -> Table:
    """Returns the final figures of a run that stands alone."""
    rows = [["state", ": ".join(filter(None, (run.state, run.reason)))]]
    # A run that is not done has no summary, and not every run has every figure.
    for key, name in FINAL.items():
        if isinstance(figure := run.summary.get(key), (int, float)):
            rows.append([name, figure_text(figure)])
    for key, name in MEDIANS.items():
        if not math.isnan(typical := median(run, key)):
            rows.append([name, figure_text(typical)])
    if run.hardware:
        rows.append(["machine", run.hardware])
    return Table(["figure", "value"], rows, (0, 1), "The run")


def settings_table(run: Record) -> Table:
    """Returns the settings of a run that are not the defaults."""
    rows = [[name, shown(given)] for name, given in run.settings.items() if given != DEFAULTS[name]]
    return Table(["key", "value"], rows, (0, 1), "Settings other than the defaults")


def unfinished_table(records: list[Record]) -> Table:
    """Returns every run that is not finished."""
    unfinished = [run for run in records if run.state != "finished"]
    rows = [
        [run.name, run.state, *setting_texts(run), f"{run.step:,}", run.reason]
        for run in unfinished
    ]
    header = ["run", "state", "method", "lr", "rho", "seed", "last step", "why"]
    return Table(header, rows, (0, 1, 2, 7), folders=[run.folder for run in unfinished])


def runs_table(section: Section) -> Table:
    """Returns every run of a section, the best first."""
    # Nan compares with nothing, so runs without a loss are put last by hand.
    ordered = sorted(section.runs, key=lambda run: (math.isnan(run.loss), run.loss))
    rows = [
        [
            name,
            *setting_texts(run),
            number_text(run.loss),
            f"{run.step:,}",
            number_text(run.summary.get("flops", math.nan), ".3g"),
            number_text(run.summary.get("seconds", math.nan), ",.0f"),
            str(run.summary.get("skipped", "")),
            run.state,
        ]
        for name, run in zip(short_names(ordered), ordered, strict=True)
    ]
    return Table(RUNS, rows, (0, 1, 10), folders=[run.folder for run in ordered])


def short_names(runs: list[Record]) -> list[str]:
    """Returns the names of runs' folders, with their paths where two have one name."""
    names = Counter(run.folder.name for run in runs)
    return [Path(run.name).name if names[run.folder.name] == 1 else run.name for run in runs]


def figure_text(given: float) -> str:
    """Returns a number of any size as a person reads it: whole ones below a billion with all of
    their digits, any other with five."""
    if abs(given) < 1e9 and given == int(given):
        return f"{int(given):,}"
    return f"{given:.5g}"
