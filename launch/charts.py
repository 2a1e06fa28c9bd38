"""The charts of a report, as SVG that stands in the page: text is text, and black follows the colour scheme of the page."""

import io
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from launch.comparison import BASELINE, Section, Setting
from launch.record import Record

INK = "#010203"  # becomes currentColor
# Petroff's ten (2107.02270), which colour-blind people can tell apart; its greys come last, for AdamW is black.
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#e76300", "#92dadd", "#a96b59", "#b9ac70", "#717581", "#94a4a2")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))  # a half of the colours each, so that a colour returns with another dash
MARKERS = "osD^vP*X"
DIVERGED = "a seed diverged"
POINTS = 150  # of a line that is not of evaluations
WIDTH = 5.0  # inches, 360 units: about a telephone's width, so that text has its size there
RC: Any = {"svg.fonttype": "none", "font.size": 11, "text.parse_math": False, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
      "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#80808050",
      "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.5, "lines.markersize": 4.5,
      "figure.facecolor": "none", "axes.facecolor": "none"}  # fmt: skip
MEANINGS = {
    "sharpness/gap": "Loss at the moved weights minus the clean loss (nats per token).",
    "sharpness/perturbed_loss": "Loss at the moved weights (nats per token).",
    "sharpness/clean_loss": "Loss at the weights as they are, of rules whose own pass does not tell it (nats per token).",
    "sharpness/curvature": "Curvature along the ascent: the slope there minus the slope here, over the distance (nats per token per unit of weight, "
    "squared).",
    "sharpness/slope": "Slope of the loss along the ascent, at the weights as they are (nats per token per unit of weight).",
    "sharpness/rule_slope": "Slope along the ascent by the rule's own gradient, at the moved weights (nats per token per unit of weight).",
    "sharpness/gradient_norm": "Norm of the clean gradient, along which the weights move (nats per token per unit of weight).",
    "sharpness/rule_norm": "Norm of the gradient that the rule hands on, before clipping (nats per token per unit of weight).",
    "sharpness/cosine": "Cosine of the rule's gradient and the plain one.",
    "sharpness/rho": "Radius that the schedule asks for, in the norm of the rule's metric (units of weight where that is euclidean).",
    "sharpness/realised_radius": "Length of what the compute precision left of the move (units of weight).",
    "sharpness/realised_cosine": "Cosine of the move and of what the compute precision left of it.",
    "sharpness/share_embedding": "Share of the move's squared length in the embeddings.",
    "sharpness/share_body": "Share of the move's squared length in the blocks and norms.",
    "sharpness/share_head": "Share of the move's squared length in the head.",
    "sharpness/delta_func": "Norm of the functional part of SAM's change of the gradient (nats per token per unit of weight).",
    "sharpness/delta_logit": "Norm of the logit part of SAM's change of the gradient (nats per token per unit of weight).",
    "sharpness/cosine_func_logit": "Cosine of the functional and the logit part.",
    "sharpness/cosine_func_gradient": "Cosine of the functional part and the plain gradient.",
    "sharpness/cosine_logit_gradient": "Cosine of the logit part and the plain gradient.",
    "grad/norm": "Norm of the gradient before clipping (nats per token per unit of weight).",
    "perf/tokens_per_second": "Tokens per second, without evaluations and checkpoints.",
}
Line = tuple[str, np.ndarray, np.ndarray, np.ndarray]  # method, x, mean, standard error


class Style(NamedTuple):
    """How a method looks, in every chart of a report."""

    color: str
    dash: object
    marker: str


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A look for every method: a colour each for ten, and other dashes for the second five of them; then the colours again. AdamW and its
    variants are black, and differ by their dashes."""
    found: dict[str, Style] = {}
    ordered = sorted(set(methods))
    black = [method for method in ordered if method.split()[0] == BASELINE]
    coloured = [method for method in ordered if method not in black]
    for palette, alike, members in (((INK,), 1, black), (COLOURS, len(COLOURS) // 2, coloured)):
        for number, method in enumerate(members):
            marker = MARKERS[len(found) % len(MARKERS)]
            found[method] = Style(palette[number % len(palette)], DASHES[number // alike % len(DASHES)], marker)
    return found


@matplotlib.rc_context(RC)
def loss_chart(section: Section, looks: dict[str, Style], axis: str) -> str:
    """Validation loss of the best settings against what was spent: "step" (with tokens above), "flops" or "seconds"."""
    lines = [averaged(method, setting.runs, axis, "val/loss") for method, setting in section.best.items()]
    lines, unit = in_units(lines, axis)
    figure, axes = start()
    draw(axes, lines, looks, markers=True)
    axes.set(xlabel=unit, ylabel="validation loss (nats per token)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    if axis == "step":
        run = next(iter(section.best.values())).runs[0]
        tokens = run.summary["tokens"] / max(1, run.step)
        power, prefix = si(tokens * max((x[-1] for _, x, _, _ in lines if len(x)), default=1.0))
        top = axes.secondary_xaxis("top", functions=(lambda x: np.multiply(x, tokens / power), lambda x: np.divide(x, tokens / power)))
        top.set_xlabel(f"tokens{prefix}")
    return finish(figure, axes, f"loss against {axis} {section.title}", above=0.5 if axis == "step" else 0.12)


@matplotlib.rc_context(RC)
def training_chart(section: Section, looks: dict[str, Style], axis: str = "step") -> str | None:
    """Training loss of the best settings against "step", "tokens", "flops" or "seconds"; None where no rule has it for free."""
    lines = [averaged(method, setting.runs, axis, "train/loss") for method, setting in section.best.items()]
    lines, unit = in_units([line for line in lines if len(line[1])], axis)
    if not lines:
        return None
    figure, axes = start()
    draw(axes, lines, looks)
    axes.set(xlabel=unit, ylabel="training loss (nats per token)")
    axes.set_xlim(left=0)
    frame_late(axes, lines)
    return finish(figure, axes, f"training loss {section.title}")


@matplotlib.rc_context(RC)
def response_chart(section: Section, looks: dict[str, Style], key: str) -> str | None:
    """Final validation loss against "rho" or "lr", the other at its best; None where nobody tried two values."""
    slices = {method: [setting for setting in settings if on_slice(setting, section.best.get(method), key)]
              for method, settings in section.methods.items()}  # fmt: skip
    tried = {getattr(setting, key) for settings in slices.values() for setting in settings if len(settings) > 1}
    if not tried:
        return None
    flat = {method: setting for method, setting in section.best.items() if key == "rho" and setting.rho is None}
    shown = {method: settings for method, settings in slices.items() if settings and method not in flat}
    figure, axes = start()
    for method, setting in flat.items():
        look, (mean, error, *_) = looks[method], setting.final
        axes.axhline(mean, color=look.color, linestyle=look.dash, label=f"{method} (no radius)")
        axes.axhspan(mean - np.nan_to_num(error), mean + np.nan_to_num(error), color=look.color, alpha=0.12, linewidth=0)
    for method, settings in shown.items():
        look, finished = looks[method], [setting for setting in settings if setting.runs]
        x, y = [getattr(setting, key) for setting in finished], [setting.final.mean for setting in finished]
        axes.errorbar(x, y, [np.nan_to_num(setting.final.error) for setting in finished], color=look.color, linestyle=look.dash, marker=look.marker,
                      capsize=2.5, label=method)  # fmt: skip
    failed = [(getattr(setting, key), looks[method].color) for method, settings in shown.items() for setting in settings if setting.diverged]
    if failed:
        places, colours = ([one[part] for one in failed] for part in (0, 1))
        axes.scatter(places, [0.97] * len(failed), 30, colours, marker="x", transform=axes.get_xaxis_transform(), label=DIVERGED)
    name = {"rho": "radius rho", "lr": "peak learning rate"}[key]
    axes.set(xlabel=name, ylabel="final validation loss (nats per token)")
    values = sorted({getattr(setting, key) for settings in shown.values() for setting in settings})
    log_ticks(axes, values)
    return finish(figure, axes, f"response to {key} {section.title}")


@matplotlib.rc_context(RC)
def measured_charts(section: Section, looks: dict[str, Style], axis: str = "step") -> dict[str, str]:
    """A chart, on the axis of `training_chart`, for each figure of sharpness that the best settings logged, the gradient's norm and the
    speed, by its meaning."""
    logged = {name for setting in section.best.values() for run in setting.runs for name in run.columns}
    names = sorted(name for name in logged if name.startswith("sharpness/") or name in MEANINGS)
    charts = {}
    for name in sorted(names, key=lambda name: [*MEANINGS, name].index(name)):
        lines = [averaged(method, setting.runs, axis, name) for method, setting in section.best.items()]
        lines, unit = in_units([line for line in lines if len(line[1])], axis)
        if not lines:
            continue
        figure, axes = start()
        draw(axes, lines, looks)
        axes.set(xlabel=unit, ylabel=name)
        axes.set_xlim(left=0)
        values = np.concatenate([mean for _, _, mean, _ in lines])
        if np.ptp(values) < 0.01 * abs(values.mean()):  # as good as constant: digits of rounding are no news
            axes.set_ylim(*sorted((0.95 * values.mean(), 1.05 * values.mean())))
        if values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        charts[MEANINGS.get(name, name)] = finish(figure, axes, f"{name} {section.title}")
    return charts


def averaged(method: str, runs: list[Record], axis: str, figure: str) -> Line:
    """The mean over runs, with its standard error, at the steps that all of them logged; x is their mean too."""
    curves = [[run.curve(name, figure) for name in ("step", axis)] for run in runs]
    curves = [curve for curve in curves if len(curve[0][0])]
    if not curves:
        return method, np.empty(0), np.empty(0), np.empty(0)
    common = curves[0][0][0]
    for curve in curves[1:]:
        common = np.intersect1d(common, curve[0][0])
    chosen = [np.searchsorted(curve[0][0], common) for curve in curves]
    x, y = (np.array([curve[1][part][index] for curve, index in zip(curves, chosen, strict=True)]) for part in (0, 1))
    size = len(common) // POINTS
    if size > 1 and figure != "val/loss":  # means of consecutive points
        x, y = (part[:, : len(common) // size * size].reshape(len(curves), -1, size).mean(axis=2) for part in (x, y))
    errors = y.std(axis=0, ddof=1) / math.sqrt(len(y)) if len(y) > 1 else np.full(y.shape[1], np.nan)
    return method, x.mean(axis=0), y.mean(axis=0), errors


def on_slice(setting: Setting, best: Setting | None, key: str) -> bool:
    """Whether a setting differs from the best one in this key only."""
    return best is not None and (setting.lr == best.lr if key == "rho" else setting.rho == best.rho)


def draw(axes: Axes, lines: list[Line], looks: dict[str, Style], markers: bool = False) -> None:
    """Means as lines with a band of a standard error to both sides."""
    for method, x, mean, error in lines:
        look, error = looks[method], np.nan_to_num(error)
        style = {"marker": look.marker} if markers else {"linewidth": 1.1}
        axes.plot(x, mean, color=look.color, linestyle=look.dash, label=method, **style)
        axes.fill_between(x, mean - error, mean + error, color=look.color, alpha=0.15, linewidth=0)


def frame_late(axes: Axes, lines: list[Line]) -> None:
    """Cuts off the fall of the first fifth, beside which the differences at the end would not show; of the rest means and bands fit."""
    edges = [(x, mean + sign * np.nan_to_num(error)) for _, x, mean, error in lines if len(x) for sign in (-1, 1)]
    late = np.concatenate([edge[x >= 0.2 * x[-1]] for x, edge in edges] or [np.zeros(1)])
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
    """The lines with their x in units that suit the longest of them, and the label of that axis."""
    longest = max((x[-1] for _, x, _, _ in lines if len(x)), default=1.0)
    if axis == "seconds":
        size, name = next(((size, name) for size, name in ((3600.0, "hours"), (60.0, "minutes")) if longest > 2 * size), (1.0, "seconds"))
        label = f"training time ({name}, without evaluations)"
    else:
        size, power = (1.0, "") if axis == "step" else si(longest)
        label = {"step": "steps", "tokens": "tokens", "flops": "training FLOPs"}[axis] + power
    return [(method, x / size, mean, error) for method, x, mean, error in lines], label


def start() -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure()
    axes = figure.add_subplot()
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def finish(figure: Figure, axes: Axes, name: str, above: float = 0.12) -> str:
    """The figure as an SVG element that fits its place. The legend stands below the axes, in two columns where they fit; `above` the axes so
    many inches are free."""
    handles, labels = zip(*sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: pair[1] == DIVERGED), strict=True)
    half = -(-len(labels) // 2)
    fits = max(map(len, labels[:half])) + max(map(len, labels[half:]), default=0) <= 46
    below, plot = 0.58 + 0.2 * (half if fits else len(labels)), 2.5
    height = below + plot + above
    figure.set_size_inches(WIDTH, height)
    axes.set_position((0.19, below / height, 0.78, plot / height))
    figure.legend(handles, labels, loc="lower center", ncols=1 + fits, borderaxespad=0.1, labelspacing=0.25, columnspacing=1.2)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[^"]*_\d+"', "", svg)  # of groups: nobody refers to them, and every chart has the same
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    return svg.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1).strip()
