"""The charts of a report: on its page SVG in which text is text and black follows the colour
scheme, or a file of its own."""

import io
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from launch.report.comparison import BASELINE, Section, Setting
from launch.report.meanings import LONE, MEANINGS, meaning, title
from launch.report.record import Record

INK = "#010203"  # becomes currentColor
# Petroff's ten (2107.02270), which colour-blind people can tell apart; its greys come last, for
# AdamW is black.
COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#832db6",
    "#e76300",
    "#92dadd",
    "#a96b59",
    "#b9ac70",
    "#717581",
    "#94a4a2",
)
# a half of the colours each, so that a colour returns with another dash
DASHES = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1)),
    (0, (6, 1.5, 1, 1.5)),
)
MARKERS = "osD^vP*X"
DIVERGED = "a seed diverged"
POINTS = 150  # of a line that is not of evaluations
WIDTH = 5.0  # inches, 360 units: about a telephone's width, so that text has its size there
SHARPEST = 300  # dots per inch of a PNG
STEADY = 0.01  # share of its mean by which a constant may vary: digits of rounding are no news
RC: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#80808050",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "pdf.fonttype": 42,
}
PRINT = "#010101"  # on a coloured cell, in any colour scheme
SHADES = LinearSegmentedColormap.from_list("losses", ["#6fb1ec", "#eef3f8"])


class Line(NamedTuple):
    """A method's curve: its x, and a row of values for every seed."""

    method: str
    x: np.ndarray
    seeds: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean over the seeds."""
        return self.seeds.mean(axis=0)


class Style(NamedTuple):
    """How a method looks, in every chart of a report."""

    color: str
    dash: object
    marker: str


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A look for every method: a colour each for ten, and other dashes for the second five of them;
    then the colours again. AdamW and its variants are black, and differ by their dashes."""
    found: dict[str, Style] = {}
    ordered = sorted(set(methods))
    black = [method for method in ordered if method.split()[0] == BASELINE]
    coloured = [method for method in ordered if method not in black]
    for palette, alike, members in (((INK,), 1, black), (COLOURS, len(COLOURS) // 2, coloured)):
        for number, method in enumerate(members):
            marker = MARKERS[len(found) % len(MARKERS)]
            found[method] = Style(
                palette[number % len(palette)], DASHES[number // alike % len(DASHES)], marker
            )
    return found


@matplotlib.rc_context(RC)
def loss_chart(section: Section, looks: dict[str, Style], axis: str) -> Figure | None:
    """Draws the validation loss of the best settings against "step" (with tokens above), "tokens",
    "flops" or "seconds", a dot for every seed; None where nothing was evaluated."""
    lines, unit = in_units(lines_of(section, axis, "val/loss"), axis)
    if not lines:
        return None
    figure, axes = start()
    draw(axes, lines, looks, dots=True)
    axes.set(xlabel=unit, ylabel="validation loss (nats per token)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    if axis != "step":
        return lay_out(figure, axes)
    tokens = section.keys["batch.sequences"] * section.keys["batch.length"]
    power, prefix = si(tokens * max(line.x[-1] for line in lines))
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: np.multiply(x, tokens / power),
            lambda x: np.divide(x, tokens / power),
        ),
    )
    top.set_xlabel(f"tokens{prefix}")
    return lay_out(figure, axes, above=0.5)


@matplotlib.rc_context(RC)
def difference_chart(section: Section, looks: dict[str, Style]) -> Figure | None:
    """Draws the validation loss minus the baseline's of the same seed, by step: a thin line for
    every seed, a thick one for their mean. None where no method has seeds in common with the
    baseline and runs as long as its."""
    if section.baseline is None:
        return None
    theirs = {run.settings["seed"]: run for run in section.best[section.baseline].runs}
    lines = []
    for method, setting in section.best.items():
        pairs = [
            (run, theirs[run.settings["seed"]])
            for run in setting.runs
            if run.settings["seed"] in theirs and method != section.baseline
        ]
        # A shorter schedule is further on at the same step.
        together = [
            evaluated_together(run, other) for run, other in pairs if run.step == other.step
        ]
        lines += [line] if len((line := joined(method, [(x, x, y) for x, y in together])).x) else []
    if not lines:
        return None
    figure, axes = start()
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
    axes.axhline(0.0, color=INK, linewidth=0.8, label=section.baseline)
    axes.set(xlabel="steps", ylabel=f"loss minus {BASELINE}'s (nats)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    return lay_out(figure, axes)


@matplotlib.rc_context(RC)
def training_chart(section: Section, looks: dict[str, Style], axis: str = "step") -> Figure | None:
    """Draws the training loss of the best settings against "step", "tokens", "flops" or "seconds";
    None where no rule has it for free."""
    lines, unit = in_units(lines_of(section, axis, "train/loss"), axis)
    if not lines:
        return None
    figure, axes = start()
    draw(axes, lines, looks)
    axes.set(xlabel=unit, ylabel="training loss (nats per token)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    return lay_out(figure, axes)


@matplotlib.rc_context(RC)
def response_chart(section: Section, looks: dict[str, Style], key: str) -> Figure | None:
    """Draws the final validation loss against "rho" or "lr", the other at its best, a dot for every
    seed; None where nobody tried two values."""
    slices = {}
    for method, settings in section.methods.items():
        slices[method] = [
            setting for setting in settings if on_slice(setting, section.best.get(method), key)
        ]
    tried = {
        getattr(setting, key)
        for settings in slices.values()
        for setting in settings
        if len(settings) > 1
    }
    if not tried:
        return None
    flat = {
        method: setting
        for method, setting in section.best.items()
        if key == "rho" and setting.rho is None
    }
    shown = {
        method: settings for method, settings in slices.items() if settings and method not in flat
    }
    figure, axes = start()
    for method, setting in flat.items():
        axes.axhline(
            setting.final.mean,
            color=looks[method].color,
            linestyle=looks[method].dash,
            label=f"{method} (no radius)",
        )
    for method, settings in shown.items():
        look, finished = looks[method], [setting for setting in settings if setting.chosen_by]
        x, y = (
            [getattr(setting, key) for setting in finished],
            [setting.final.mean for setting in finished],
        )
        axes.plot(x, y, color=look.color, linestyle=look.dash, marker=look.marker, label=method)
        for place, setting in zip(x, finished, strict=True):
            losses = [run.loss for run in setting.chosen_by]
            axes.scatter([place] * len(losses), losses, 9, look.color, alpha=0.6, linewidths=0)
    failed = [
        (getattr(setting, key), looks[method].color)
        for method, settings in shown.items()
        for setting in settings
        if setting.diverged
    ]
    if failed:
        places, colours = ([one[part] for one in failed] for part in (0, 1))
        axes.scatter(
            places,
            [0.97] * len(failed),
            30,
            colours,
            marker="x",
            transform=axes.get_xaxis_transform(),
            label=DIVERGED,
        )
    name = {"rho": "radius rho", "lr": "peak learning rate"}[key]
    axes.set(xlabel=name, ylabel="final validation loss (nats)")
    log_ticks(
        axes, sorted({getattr(setting, key) for settings in shown.values() for setting in settings})
    )
    return lay_out(figure, axes)


@matplotlib.rc_context(RC)
def grid_chart(section: Section) -> Figure | None:
    """Draws the final validation loss as a map of learning rate by radius, a panel for each method
    that tried two values of both, on one scale; None where there is none."""
    swept = {}
    for method, settings in section.methods.items():
        known = [setting for setting in settings if setting.chosen_by or setting.diverged]
        rates, radii = {setting.lr for setting in known}, {setting.rho for setting in known}
        if len(rates) > 1 and len(radii) > 1:
            swept[method] = (sorted(rates), sorted(radii, key=lambda rho: rho or 0.0))
    losses = [
        setting.final.mean
        for method in swept
        for setting in section.methods[method]
        if setting.chosen_by
    ]
    if not losses:
        return None
    heights = [0.9 + 0.36 * len(radii) for _, radii in swept.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(swept), height_ratios=heights, squeeze=False)[:, 0]
    # The colours tell the good half apart; one bad corner would leave them all alike.
    scale = (
        min(losses),
        max(
            np.nextafter(min(losses), np.inf), min(max(losses), 2 * np.median(losses) - min(losses))
        ),
    )
    for axes, (method, tried) in zip(panels, swept.items(), strict=True):
        draw_grid(axes, section.methods[method], *tried, scale)
        axes.set_title(method, fontsize=11)
        axes.set(xlabel="peak learning rate", ylabel="radius rho")
    return figure


def draw_grid(
    axes: Axes,
    settings: list[Setting],
    rates: list[float],
    radii: list[float | None],
    scale: tuple[float, float],
) -> None:
    """Draws one panel: a coloured cell with its loss for every setting, a word where it has
    none."""
    values = np.full((len(radii), len(rates)), np.nan)
    for setting in settings:
        place = (
            (radii.index(setting.rho), rates.index(setting.lr))
            if setting.rho in radii and setting.lr in rates
            else None
        )
        if place and setting.chosen_by:
            values[place] = setting.final.mean
        if place and (setting.chosen_by or setting.diverged):
            text = (f"{setting.final.mean:.4f}" if setting.chosen_by else "") + (
                " x" if setting.diverged else ""
            )
            colour = PRINT if setting.chosen_by else INK
            axes.text(
                place[1],
                place[0],
                text.strip(),
                ha="center",
                va="center",
                fontsize=9 if len(rates) < 8 else 6.5,
                color=colour,
            )
    axes.grid(visible=False)
    axes.pcolormesh(
        np.ma.masked_invalid(values),
        shading="nearest",
        cmap=SHADES,
        vmin=scale[0],
        vmax=scale[1],
        edgecolors="#80808050",
    )
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(radii)), ["none" if rho is None else f"{rho:g}" for rho in radii])


def measured_charts(
    section: Section, looks: dict[str, Style], axis: str = "step"
) -> tuple[dict[str, Figure], list[str]]:
    """Returns (a chart, on the axis of `training_chart`, of each figure of sharpness that the best
    settings logged, of the gradient's norm and the speed, by the figure's name; a sentence for each
    that never changed)."""
    drawn, constant = {}, []
    for name in figures_of(section):
        lines, unit = in_units(lines_of(section, axis, name), axis)
        if lines and all(np.ptp(line.mean) <= STEADY * abs(line.mean.mean()) for line in lines):
            constant.append(
                f"{meaning(name)}"
                f" {', '.join(f'{line.method}: {line.mean.mean():.4g}' for line in lines)}"
            )
        elif lines:
            drawn[name] = measured_chart(lines, looks, unit, name)
    return drawn, constant


def figures_of(section: Section) -> list[str]:
    """Returns the names of the figures that are charted beside the losses, in the order of
    MEANINGS."""
    logged = {name for runs in section.drawn.values() for run in runs for name in run.columns}
    names = sorted(name for name in logged if name.startswith("sharpness/") or name in MEANINGS)
    wanted = [name for name in names if name not in LONE or len(section.runs) == 1]
    return sorted(wanted, key=lambda name: [*MEANINGS, name].index(name))


@matplotlib.rc_context(RC)
def measured_chart(lines: list[Line], looks: dict[str, Style], unit: str, name: str) -> Figure:
    """Draws one figure."""
    figure, axes = start()
    draw(axes, lines, looks)
    axes.set(xlabel=unit, ylabel=title(name))
    axes.set_xlim(left=0)
    values = np.concatenate([line.mean for line in lines])
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return lay_out(figure, axes)


def chart(section: Section, looks: dict[str, Style], name: str, axis: str) -> Figure:
    """Draws the one chart of this name. Raises ValueError where this comparison has none."""
    named: dict[str, Callable[[], Figure | None]] = {
        "loss": lambda: loss_chart(section, looks, axis),
        "difference": lambda: difference_chart(section, looks),
        "training": lambda: training_chart(section, looks, axis),
        "rho": lambda: response_chart(section, looks, "rho"),
        "lr": lambda: response_chart(section, looks, "lr"),
        "grid": lambda: grid_chart(section),
    }
    drawn = named[name]() if name in named else measured_charts(section, looks, axis)[0].get(name)
    if drawn is None:
        there = [
            *(known for known, make in named.items() if make()),
            *measured_charts(section, looks, axis)[0],
        ]
        raise ValueError(
            f"chart={name}: these runs have no such chart; choose one of"
            f" {', '.join(there) or 'none, for nothing is logged yet'}"
        )
    return drawn


def lines_of(section: Section, axis: str, figure: str) -> list[Line]:
    """Returns the curves of a figure, of every method that has one."""
    found = []
    for method, runs in section.drawn.items():
        line = joined(
            method,
            [(*run.curve("step", figure)[:1], *run.curve(axis, figure)) for run in runs],
            figure != "val/loss",
        )
        found += [line] if len(line.x) else []
    return found


def joined(
    method: str, curves: list[tuple[np.ndarray, np.ndarray, np.ndarray]], thin: bool = False
) -> Line:
    """Returns the line of curves, each of (steps, x, y), at the steps that all of them have, `thin`
    as means of consecutive points; x is the mean over the curves."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return Line(method, np.empty(0), np.empty((0, 0)))
    common = curves[0][0]
    for curve in curves[1:]:
        common = np.intersect1d(common, curve[0])
    chosen = [np.intersect1d(common, steps, return_indices=True)[2] for steps, _, _ in curves]
    x, y = (
        np.array([curve[part][index] for curve, index in zip(curves, chosen, strict=True)])
        for part in (1, 2)
    )
    size = len(common) // POINTS
    if size > 1 and thin:
        x, y = (
            part[:, : len(common) // size * size].reshape(len(curves), -1, size).mean(axis=2)
            for part in (x, y)
        )
    return Line(method, x.mean(axis=0), y)


def evaluated_together(run: Record, other: Record) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps at which both runs were evaluated, the loss of the first minus that of the
    second)."""
    (ours, losses), (theirs, others) = (
        run.curve("step", "val/loss"),
        other.curve("step", "val/loss"),
    )
    steps, here, there = np.intersect1d(ours, theirs, return_indices=True)
    return steps, losses[here] - others[there]


def on_slice(setting: Setting, best: Setting | None, key: str) -> bool:
    """Whether a setting differs from the best one in this key only."""
    return best is not None and (setting.lr == best.lr if key == "rho" else setting.rho == best.rho)


def draw(axes: Axes, lines: list[Line], looks: dict[str, Style], dots: bool = False) -> None:
    """Draws means as lines; the seeds as dots, or as a band from the lowest to the highest."""
    for line in lines:
        look = looks[line.method]
        axes.plot(
            line.x,
            line.mean,
            color=look.color,
            linestyle=look.dash,
            label=line.method,
            linewidth=1.1 if not dots else 1.5,
        )
        if dots:
            axes.plot(
                line.x,
                line.seeds.T,
                color=look.color,
                linestyle="none",
                marker=look.marker,
                markersize=3,
                alpha=0.6,
                markeredgewidth=0,
            )
        elif len(line.seeds) > 1:
            axes.fill_between(
                line.x,
                line.seeds.min(axis=0),
                line.seeds.max(axis=0),
                color=look.color,
                alpha=0.15,
                linewidth=0,
            )


def frame_late(axes: Axes, lines: list[Line]) -> None:
    """Cuts off the fall of the first fifth, beside which the differences at the end would not show;
    of the rest every seed fits."""
    late = np.concatenate(
        [line.seeds[:, line.x >= line.x.min() + 0.2 * np.ptp(line.x)].ravel() for line in lines]
    )
    room = 0.06 * (late.max() - late.min()) or 0.1
    axes.set_ylim(late.min() - room, late.max() + room)


def log_ticks(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis with ticks at the values that were tried; linear near a radius of 0."""
    positive = [value for value in values if value > 0]
    if len(positive) < len(values):
        axes.set_xscale("symlog", linthresh=min(positive))
    else:
        axes.set_xscale("log")
    if len(values) == 1:
        axes.set_xlim(values[0] / 2, values[0] * 2)
    kept = values if len(values) <= 7 else values[:: -(-len(values) // 7)]
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def si(largest: float) -> tuple[float, str]:
    """(a power of 1000 to divide by, what to write for it) of numbers up to the largest."""
    power = 3 * int(math.log10(max(largest, 1.0)) // 3)
    return 10.0**power, f" (10^{power})" if power else ""


def in_units(lines: list[Line], axis: str) -> tuple[list[Line], str]:
    """Returns the lines with their x in units that suit the longest of them, and the title of that
    axis."""
    longest = max((line.x[-1] for line in lines), default=1.0)
    if axis == "seconds":
        size, name = next(
            (
                (size, name)
                for size, name in ((3600.0, "hours"), (60.0, "minutes"))
                if longest > 2 * size
            ),
            (1.0, "seconds"),
        )
        label = f"training time ({name}, without evaluations)"
    else:
        size, power = (1.0, "") if axis == "step" else si(longest)
        label = {"step": "steps", "tokens": "tokens", "flops": "training FLOPs"}[axis] + power
    return [line._replace(x=line.x / size) for line in lines], label


def start() -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure()
    axes = figure.add_subplot()
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def lay_out(figure: Figure, axes: Axes, above: float = 0.12) -> Figure:
    """Fits the figure to its place: the legend below the axes, in two columns where they fit;
    `above` the axes so many inches are free."""
    handles, labels = zip(
        *sorted(
            zip(*axes.get_legend_handles_labels(), strict=True),
            key=lambda pair: pair[1] == DIVERGED,
        ),
        strict=True,
    )
    half = -(-len(labels) // 2)
    fits = max(map(len, labels[:half])) + max(map(len, labels[half:]), default=0) <= 46
    below, plot = 0.58 + 0.2 * (half if fits else len(labels)), 2.5
    height = below + plot + above
    figure.set_size_inches(WIDTH, height)
    axes.set_position((0.19, below / height, 0.78, plot / height))
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=1 + fits,
        borderaxespad=0.1,
        labelspacing=0.25,
        columnspacing=1.2,
    )
    return figure


def svg(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG element for a page; `name` sets the targets of its references
    apart from those of others."""
    out = io.StringIO()
    with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    found = out.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
    # of groups: nobody refers to them, and every chart has the same
    found = re.sub(r' id="[^"]*_\d+"', "", found)
    for size in ("width", "height"):
        found = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", found, count=1)
    return found.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1).strip()


def encoded(figure: Figure, suffix: str) -> bytes:
    """Returns the figure as the content of a .png, .svg or .pdf file, on white."""
    out = io.BytesIO()
    undated: dict[str, dict] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
    with matplotlib.rc_context(RC | {"svg.hashsalt": "flatgpt"}):
        figure.savefig(
            out, format=suffix[1:], dpi=SHARPEST, facecolor="white", metadata=undated[suffix]
        )
    return out.getvalue()
