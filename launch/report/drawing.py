"""The look of the charts of a report: styles of methods, curves and axes; and how a chart is
written, on the page as SVG in which text is text and black follows the colour scheme, or as a file
of its own."""

import io
import math
import re
import warnings
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from launch.report.record import Record
from launch.report.section import BASELINE, Section

# On the page this colour becomes currentColor.
INK = "#010203"
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
# Each dash serves half of the colours, so that a colour returns with another dash.
DASHES = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1)),
    (0, (6, 1.5, 1, 1.5)),
)
MARKERS = "osD^vP*X"
DIVERGED = "a seed diverged"
# A line that is not of evaluations has about this many points.
POINTS = 150
# In inches, 360 units: about a telephone's width, so that text has its size there.
WIDTH = 5.0
# A legend has two columns where the longest labels of both have at most this many characters.
LEGEND = 46
# Dots per inch of a PNG.
SHARPEST = 300
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


class Line(NamedTuple):
    """A method's curve: its x, and a row of values for every seed."""

    method: str
    x: np.ndarray
    seeds: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Returns the mean over the seeds."""
        return self.seeds.mean(axis=0)


class Style(NamedTuple):
    """How a method looks, in every chart of a report."""

    color: str
    dash: object
    marker: str


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Returns a look for every method.

    Ten methods have a colour each, the second five of them other dashes; then the colours return.
    AdamW and its variants are black, and differ by their dashes."""
    # By the order of their names, so that the same methods look the same in every chart.
    found: dict[str, Style] = {}
    ordered = sorted(set(methods))
    black = [method for method in ordered if method.split()[0] == BASELINE]
    coloured = [method for method in ordered if method not in black]
    # `alike` methods in a row share a dash before the next one's turn comes.
    for palette, alike, members in (((INK,), 1, black), (COLOURS, len(COLOURS) // 2, coloured)):
        for number, method in enumerate(members):
            color = palette[number % len(palette)]
            dash = DASHES[number // alike % len(DASHES)]
            marker = MARKERS[len(found) % len(MARKERS)]
            found[method] = Style(color, dash, marker)
    return found


def lines_of(section: Section, axis: str, figure: str) -> list[Line]:
    """Returns the curves of a figure, of every method that has one."""
    found = []
    for method, runs in section.drawn.items():
        curves = [run.points(axis, figure) for run in runs]
        found.append(joined_line(method, curves, thin=figure != "val/loss"))
    return [line for line in found if len(line.x)]


def joined_line(
    method: str, curves: list[tuple[np.ndarray, np.ndarray, np.ndarray]], thin: bool = False
) -> Line:
    """Returns the line of curves, each of steps, x and y, at the steps that all of them have,
    `thin` as means of consecutive points; x is the mean over the curves."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return Line(method, np.empty(0), np.empty((0, 0)))
    # Long runs are sampled, each at steps of its own, and rows may be lost: only at the steps that
    # all seeds have is the mean one of the same seeds all along.
    common = curves[0][0]
    for steps, _, _ in curves[1:]:
        common = np.intersect1d(common, steps)
    x_rows = []
    y_rows = []
    for steps, x, y in curves:
        index = np.intersect1d(common, steps, return_indices=True)[2]
        x_rows.append(x[index])
        y_rows.append(y[index])
    x_of_seeds = np.array(x_rows)
    y_of_seeds = np.array(y_rows)
    # Single steps are noisy, and more points than a screen shows only make the page larger.
    size = len(common) // POINTS
    if size > 1 and thin:
        x_of_seeds = means_of(x_of_seeds, size)
        y_of_seeds = means_of(y_of_seeds, size)
    return Line(method, x_of_seeds.mean(axis=0), y_of_seeds)


def means_of(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns the means of every `size` consecutive values of each row; a rest is left out."""
    whole = rows.shape[1] // size * size
    return rows[:, :whole].reshape(len(rows), -1, size).mean(axis=2)


def evaluated_together(run: Record, other: Record) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps at which both runs were evaluated, the loss of the first minus that of the
    second)."""
    ours, losses = run.curve("step", "val/loss")
    theirs, others = other.curve("step", "val/loss")
    steps, here, there = np.intersect1d(ours, theirs, return_indices=True)
    return steps, losses[here] - others[there]


def draw_lines(axes: Axes, lines: list[Line], looks: dict[str, Style], dots: bool = False) -> None:
    """Draws means as lines; the seeds as dots, or as a band from the lowest to the highest."""
    for line in lines:
        look = looks[line.method]
        axes.plot(
            line.x,
            line.mean,
            color=look.color,
            linestyle=look.dash,
            label=line.method,
            linewidth=1.5 if dots else 1.1,
        )
        # Evaluations are few, and every one of every seed is a dot. Of the many other rows a band
        # shows how far the seeds lie apart.
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
    # A little room above and below the seeds; some, too, where all losses are the same.
    room = 0.06 * (late.max() - late.min()) or 0.1
    axes.set_ylim(late.min() - room, late.max() + room)


def thousands(largest: float) -> tuple[float, str]:
    """Returns (a power of 1000 to divide by, how the power is written) for numbers up to the
    largest."""
    # 10^3, 10^6, 10^9 and so on, as the prefixes of units go.
    power = 3 * int(math.log10(max(largest, 1.0)) // 3)
    if not power:
        return 1.0, ""
    return 10.0**power, f" (10^{power})"


def in_units(lines: list[Line], axis: str) -> tuple[list[Line], str]:
    """Returns the lines with their x in units that suit the longest of them, and the title of that
    axis."""
    longest = max((line.x[-1] for line in lines), default=1.0)
    if axis == "seconds":
        size, name = unit_of_time(longest)
        label = f"training time ({name}, without evaluations)"
    elif axis == "step":
        size = 1.0
        label = "steps"
    else:
        size, power = thousands(longest)
        label = {"tokens": "tokens", "flops": "training FLOPs"}[axis] + power
    return [line._replace(x=line.x / size) for line in lines], label


def unit_of_time(longest: float) -> tuple[float, str]:
    """Returns (length in seconds, name) of the largest unit that `longest` seconds are more than
    two of."""
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest > 2 * size:
            return size, name
    return 1.0, "seconds"


def new_axes() -> tuple[Figure, Axes]:
    """Returns a figure with one pair of axes."""
    # Not by pyplot, which keeps every figure until it is closed.
    figure = Figure()
    axes = figure.add_subplot()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def lay_out(figure: Figure, axes: Axes, above: float = 0.12) -> Figure:
    """Fits the figure to its place: the legend below the axes, in two columns where they fit, and
    `above` the axes room of that many inches."""
    # The methods stay in their order; the cross of diverged seeds, which is no method, comes last.
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    entries.sort(key=lambda entry: entry[1] == DIVERGED)
    labels = [label for _, label in entries]
    half = -(-len(labels) // 2)
    left = max(map(len, labels[:half]))
    right = max(map(len, labels[half:]), default=0)
    if left + right <= LEGEND:
        columns = 2
        rows = half
    else:
        columns = 1
        rows = len(labels)
    # In inches: the ticks and the title of the axis, and a line for every row of the legend.
    below = 0.58 + 0.2 * rows
    plot = 2.5
    height = below + plot + above
    figure.set_size_inches(WIDTH, height)
    axes.set_position((0.19, below / height, 0.78, plot / height))
    figure.legend(
        [handle for handle, _ in entries],
        labels,
        loc="lower center",
        ncols=columns,
        borderaxespad=0.1,
        labelspacing=0.25,
        columnspacing=1.2,
    )
    return figure


def plain_numbers() -> FuncFormatter:
    """Returns a formatter of ticks that writes numbers without powers of ten."""
    return FuncFormatter(lambda value, _: f"{value:g}")


def logarithmic_values(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers at its ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(plain_numbers())
    axes.yaxis.set_minor_locator(NullLocator())


def svg(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG element for a page; `name` sets the targets of its references
    apart from those of others."""
    out = io.StringIO()
    save(figure, out, "svg", name)
    # The metadata say which program drew the chart, with links to its pages.
    found = out.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
    # The names of groups go: nothing refers to them, and every chart has the same.
    found = re.sub(r' id="[^"]*_\d+"', "", found)
    # Without a size of its own the chart is as wide as its place on the page.
    for size in ("width", "height"):
        found = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", found, count=1)
    return found.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1).strip()


def encoded(figure: Figure, suffix: str) -> bytes:
    """Returns the figure as the content of a .png, .svg or .pdf file, on white."""
    out = io.BytesIO()
    save(figure, out, suffix[1:], "flatgpt", dpi=SHARPEST, facecolor="white")
    return out.getvalue()


def save(figure: Figure, out: IO, form: str, salt: str, **looks: Any) -> None:
    """Writes the figure into a stream as "png", "svg" or "pdf", without its date: the same runs
    give the same bytes. `salt` makes the names of an SVG's references its own."""
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context(RC | {"svg.hashsalt": salt}), warnings.catch_warnings():
        if form == "svg":
            # In an SVG text is text, which the reader's fonts show.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format=form, metadata=undated.get(form), **looks)
