"""The charts of a report that are drawn against steps, tokens, FLOPs or time."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.report.drawing import (
    INK,
    RC,
    Line,
    Style,
    draw_lines,
    evaluated_together,
    frame_late,
    in_units,
    joined_line,
    lay_out,
    lines_of,
    logarithmic_values,
    new_axes,
    thousands,
)
from launch.report.meanings import LONE, MEANINGS, meaning, title
from launch.report.section import BASELINE, Section

# A figure that varies by less than this share of its mean is constant: digits of rounding are no
# news.
STEADY = 0.01
# A figure whose largest value is more than this many times its least has a logarithmic axis.
WIDE = 30


@matplotlib.rc_context(RC)
def loss_chart(section: Section, looks: dict[str, Style], axis: str) -> Figure | None:
    """Draws the validation loss of the best settings against "step" (with tokens above), "tokens",
    "flops" or "seconds", a dot for every seed; None where nothing was evaluated."""
    lines, unit = in_units(lines_of(section, axis, "val/loss"), axis)
    if not lines:
        return None
    figure, axes = new_axes()
    draw_lines(axes, lines, looks, dots=True)
    axes.set(xlabel=unit, ylabel="validation loss (nats per token)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    if axis != "step":
        return lay_out(figure, axes)
    tokens = section.keys["batch.sequences"] * section.keys["batch.length"]
    add_tokens_above(axes, tokens, tokens * max(line.x[-1] for line in lines))
    return lay_out(figure, axes, above=0.5)


def add_tokens_above(axes: Axes, tokens: int, largest: float) -> None:
    """Adds an axis of tokens, up to the largest, above one of steps of `tokens` each."""
    # The axis needs both directions, from steps to tokens and back, for arrays.
    power, prefix = thousands(largest)
    scale = tokens / power
    top = axes.secondary_xaxis(
        "top", functions=(lambda x: np.multiply(x, scale), lambda x: np.divide(x, scale))
    )
    top.set_xlabel(f"tokens{prefix}")


@matplotlib.rc_context(RC)
def difference_chart(section: Section, looks: dict[str, Style]) -> Figure | None:
    """Draws the validation loss minus the baseline's of the same seed, by step: a thin line for
    every seed, a thick one for their mean. None where no method has seeds in common with the
    baseline and runs as long as its."""
    lines = differences(section)
    if not lines:
        return None
    figure, axes = new_axes()
    for line in lines:
        look = looks[line.method]
        axes.plot(
            line.x, line.seeds.T, color=look.color, linestyle=look.dash, linewidth=0.6, alpha=0.7
        )
        axes.plot(
            line.x,
            line.mean,
            color=look.color,
            linestyle=look.dash,
            label=line.method,
            linewidth=2.0,
        )
    # The baseline's difference to itself.
    axes.axhline(0.0, color=INK, linewidth=0.8, label=section.baseline)
    axes.set(xlabel="steps", ylabel=f"loss minus {BASELINE}'s (nats)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    return lay_out(figure, axes)


def differences(section: Section) -> list[Line]:
    """Returns of every method but the baseline its validation loss minus the baseline's of the same
    seed, by step; a method without such a seed is left out."""
    if section.baseline is None:
        return []
    # Seed by seed: what the seed does to the loss of both cancels out.
    theirs = {run.settings["seed"]: run for run in section.best[section.baseline].runs}
    lines = []
    for method, setting in section.best.items():
        if method == section.baseline:
            continue
        curves = []
        for run in setting.runs:
            other = theirs.get(run.settings["seed"])
            # A shorter schedule is further on at the same step.
            if other is not None and run.step == other.step:
                steps, difference = evaluated_together(run, other)
                curves.append((steps, steps, difference))
        lines.append(joined_line(method, curves))
    return [line for line in lines if len(line.x)]


@matplotlib.rc_context(RC)
def training_chart(section: Section, looks: dict[str, Style], axis: str = "step") -> Figure | None:
    """Draws the training loss of the best settings against "step", "tokens", "flops" or "seconds";
    None where no rule has it for free."""
    lines, unit = in_units(lines_of(section, axis, "train/loss"), axis)
    if not lines:
        return None
    figure, axes = new_axes()
    draw_lines(axes, lines, looks)
    axes.set(xlabel=unit, ylabel="training loss (nats per token)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    return lay_out(figure, axes)


def measured_charts(
    section: Section, looks: dict[str, Style], axis: str = "step"
) -> tuple[dict[str, Figure], list[str]]:
    """Returns (a chart, on the axis of `training_chart`, of each figure of sharpness that the best
    settings logged, of the gradient's norm and the speed, by the figure's name; a sentence for each
    that never changed)."""
    drawn = {}
    constant = []
    for name in figures_of(section):
        lines, unit = in_units(lines_of(section, axis, name), axis)
        if not lines:
            continue
        # A chart of a constant would show its rounding; a sentence says it better. Where one method
        # varies, the others are drawn beside it.
        if all(is_constant(line) for line in lines):
            levels = [f"{line.method}: {line.mean.mean():.4g}" for line in lines]
            constant.append(f"{meaning(name)} {', '.join(levels)}")
        else:
            drawn[name] = measured_chart(lines, looks, unit, name)
    return drawn, constant


def is_constant(line: Line) -> bool:
    """Returns whether a line varies by no more than rounding does."""
    return bool(np.ptp(line.mean) <= STEADY * abs(line.mean.mean()))


def figures_of(section: Section) -> list[str]:
    """Returns the names of the figures that are charted beside the losses, in the order of
    MEANINGS."""
    # Whatever a method of the user's own logs under sharpness/ is drawn too, after the known ones.
    logged = {name for runs in section.drawn.values() for run in runs for name in run.columns}
    names = sorted(name for name in logged if name.startswith("sharpness/") or name in MEANINGS)
    wanted = [name for name in names if name not in LONE or len(section.runs) == 1]
    return sorted(wanted, key=lambda name: [*MEANINGS, name].index(name))


@matplotlib.rc_context(RC)
def measured_chart(lines: list[Line], looks: dict[str, Style], unit: str, name: str) -> Figure:
    """Draws one figure."""
    figure, axes = new_axes()
    draw_lines(axes, lines, looks)
    axes.set(xlabel=unit, ylabel=title(name))
    axes.set_xlim(left=0)
    # A figure of both signs, or with a zero, has no logarithm and keeps a linear axis.
    values = np.concatenate([line.mean for line in lines])
    if values.min() > 0 and values.max() > WIDE * values.min():
        logarithmic_values(axes)
    return lay_out(figure, axes)
