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
    of_planned,
    plain,
    precision_mark,
    spent,
    swept,
    tested,
    value,
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


def results(section: Section) -> list[Table]:
    """Returns the tables of a section's results that have rows: of a run that stands alone its
    figures and settings, else those that compare methods."""
    if len(section.runs) == 1:
        found = [facts(section.runs[0]), chosen_keys(section.runs[0])]
    else:
        found = tables(section)
    return [table for table in found if table.rows]


def tables(section: Section) -> list[Table]:
    """Returns validation loss by method, the paired tests, and what the methods cost."""
    return [by_method(section), paired(section), cost(section)] if section.best else []


def by_method(section: Section) -> Table:
    """Returns validation loss by method at equal steps, FLOPs and time."""
    rows = []
    for method, setting in section.best.items():
        losses = [loss_cell(section, axis, method) for axis in AXES]
        seeds = [of_planned(section, section.at_equal(axis, method)) for axis in AXES]
        rows.append(
            [
                method + precision_mark(section, method),
                *losses,
                f"{setting.lr:g}",
                "" if setting.rho is None else f"{setting.rho:g}",
                str(len(section.tried(method))),
                *(text.split(" seed")[0] for text in seeds),
            ]
        )
    at = {axis: f"{AT[axis]}: {spent(section, axis)}" for axis in AXES}
    if section.doubt:
        at["seconds"] += f" (no evidence: {section.doubt.partition(':')[0]})"
    numbers = [f"n, {AT[axis]}" for axis in AXES]
    header = ["method", *at.values(), "best lr", "best rho", "settings", *numbers]
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
    if not found.seeds:
        return "ends earlier" if axis == "steps" else "not reached"
    text = value(found)
    if setting is not section.best[method]:
        text += f" ({setting.numbers})"
    doubted = axis == "seconds" and section.doubt
    if len(section.best) > 1 and not doubted and section.ranked(axis)[0] == method:
        text += " *"
    return text


def paired(section: Section) -> Table:
    """Returns each method beside AdamW by seed."""
    rows = []
    for method in section.tests["steps"]:
        cells = [tested(section.tests[axis][method], axis) for axis in AXES]
        rows.append([method + precision_mark(section, method), *cells])
    head = [f"at {AT[axis]}" for axis in AXES]
    if section.doubt:
        head[-1] += " (no evidence)"
    caption = f"Difference to {section.baseline}, paired by seed (negative: a lower loss)"
    return Table(["method", *head], rows, caption=caption)


def cost(section: Section) -> Table:
    """Returns what a step of each method costs, beside AdamW's; a column that no method has a
    figure for is left out."""
    rates = {method: Rate.of(setting) for method, setting in section.best.items()}
    base = rates.get(section.baseline or "", Rate())
    rows = [
        [
            method,
            plain(rate.speed, ",.0f"),
            plain(ratio(rate.seconds, base.seconds), ".2f"),
            plain(ratio(rate.flops, base.flops), ".2f"),
            plain(rate.utilisation, ".1%"),
        ]
        for method, rate in rates.items()
    ]
    doubt = " (no evidence)" if section.doubt else ""
    header = [
        "method",
        f"tokens per second (median){doubt}",
        f"time of a step / AdamW's{doubt}",
        "FLOPs of a step / AdamW's",
        f"MFU (median){doubt}",
    ]
    # MFU needs a device whose peak is known.
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
        speeds = [median(run, "perf/tokens_per_second") for run in setting.runs]
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


def facts(run: Record) -> Table:
    """Returns the final figures of a run that stands alone."""
    rows = [["state", f"{run.state}: {run.reason}" if run.reason else run.state]]
    for key, name in FINAL.items():
        if isinstance(figure := run.summary.get(key), (int, float)):
            rows.append([name, number(figure)])
    for key, name in MEDIANS.items():
        if not math.isnan(typical := median(run, key)):
            rows.append([name, number(typical)])
    if run.hardware:
        rows.append(["machine", run.hardware])
    return Table(["figure", "value"], rows, (0, 1), "The run")


def chosen_keys(run: Record) -> Table:
    """Returns the settings of a run that are not the defaults."""
    rows = [[name, shown(given)] for name, given in run.settings.items() if given != DEFAULTS[name]]
    return Table(["key", "value"], rows, (0, 1), "Settings other than the defaults")


def failed(records: list[Record]) -> Table:
    """Returns every run that is not finished."""
    unfinished = [run for run in records if run.state != "finished"]
    rows = [[run.name, run.state, *swept(run), f"{run.step:,}", run.reason] for run in unfinished]
    header = ["run", "state", "method", "lr", "rho", "seed", "last step", "why"]
    return Table(header, rows, (0, 1, 2, 7), folders=[run.folder for run in unfinished])


def all_runs(section: Section) -> Table:
    """Returns every run of a section, the best first."""
    ordered = sorted(section.runs, key=lambda run: (math.isnan(run.loss), run.loss))
    names = Counter(run.folder.name for run in ordered)
    rows = [
        [
            # The path tells apart runs whose folders have one name.
            Path(run.name).name if names[run.folder.name] == 1 else run.name,
            *swept(run),
            plain(run.loss),
            f"{run.step:,}",
            plain(run.summary.get("flops", math.nan), ".3g"),
            plain(run.summary.get("seconds", math.nan), ",.0f"),
            str(run.summary.get("skipped", "")),
            run.state,
        ]
        for run in ordered
    ]
    return Table(RUNS, rows, (0, 1, 10), folders=[run.folder for run in ordered])


def number(given: float) -> str:
    """Returns a number of any size as a person reads it."""
    if isinstance(given, float) and given.is_integer() and abs(given) < 1e15:
        given = int(given)
    return f"{given:,}" if isinstance(given, int) and abs(given) < 1e9 else f"{given:.5g}"
