"""The charts of a report that show the final loss by learning rate and radius."""

from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from launch.report.drawing import DIVERGED, INK, RC, WIDTH, Style, lay_out, new_axes, plain_numbers
from launch.report.section import Section, Setting

# Text on a coloured cell is dark in any colour scheme.
PRINT = "#010101"
SHADES = LinearSegmentedColormap.from_list("losses", ["#6fb1ec", "#eef3f8"])
# An axis has at most this many ticks.
TICKS = 7
TITLES = {"rho": "radius rho", "lr": "peak learning rate"}


@matplotlib.rc_context(RC)
def response_chart(section: Section, looks: dict[str, Style], key: str) -> Figure | None:
    """Draws the final validation loss against "rho" or "lr", the other at its best, a dot for every
    seed; None where no method tried two values."""
    # One line through the settings of each method: the other key stays at the best one's.
    slices = {}
    for method, best in section.best.items():
        settings = section.methods[method]
        slices[method] = [setting for setting in settings if on_slice(setting, best, key)]
    if all(len(settings) < 2 for settings in slices.values()):
        return None
    figure, axes = new_axes()
    # A method without a radius has no place on its axis, so it is a level across the whole of it.
    without_radius = []
    for method in slices:
        setting = section.best[method]
        if key == "rho" and setting.rho is None:
            without_radius.append(method)
            draw_level(axes, setting, looks[method])
    shown = {method: slices[method] for method in slices if method not in without_radius}
    for method, settings in shown.items():
        draw_response(axes, method, settings, looks[method], key)
    mark_diverged(axes, shown, looks, key)
    axes.set(xlabel=TITLES[key], ylabel="final validation loss (nats)")
    values = {getattr(setting, key) for settings in shown.values() for setting in settings}
    log_ticks(axes, sorted(values))
    return lay_out(figure, axes)


def on_slice(setting: Setting, best: Setting, key: str) -> bool:
    """Returns whether a setting differs from the best one in this key only."""
    if key == "rho":
        return setting.lr == best.lr
    return setting.rho == best.rho


def draw_level(axes: Axes, setting: Setting, look: Style) -> None:
    """Draws the final loss of a method without a radius as a level."""
    axes.axhline(
        setting.final.mean,
        color=look.color,
        linestyle=look.dash,
        label=f"{setting.method} (no radius)",
    )


def draw_response(axes: Axes, method: str, settings: list[Setting], look: Style, key: str) -> None:
    """Draws the final loss of a method's settings as a line, and a dot for every seed."""
    # A setting of which every seed failed has no loss; the line goes on to the next.
    finished = [setting for setting in settings if setting.chosen_by]
    x = [getattr(setting, key) for setting in finished]
    y = [setting.final.mean for setting in finished]
    axes.plot(x, y, color=look.color, linestyle=look.dash, marker=look.marker, label=method)
    for place, setting in zip(x, finished, strict=True):
        losses = [run.loss for run in setting.chosen_by]
        axes.scatter([place] * len(losses), losses, 9, look.color, alpha=0.6, linewidths=0)


def mark_diverged(
    axes: Axes, shown: dict[str, list[Setting]], looks: dict[str, Style], key: str
) -> None:
    """Draws a cross at the upper edge for every setting of which a seed diverged."""
    places = []
    colours = []
    for method, settings in shown.items():
        for setting in settings:
            if setting.diverged:
                places.append(getattr(setting, key))
                colours.append(looks[method].color)
    if not places:
        return
    # The height is a share of the axis, not a loss: a diverged seed has none.
    axes.scatter(
        places,
        [0.97] * len(places),
        30,
        colours,
        marker="x",
        transform=axes.get_xaxis_transform(),
        label=DIVERGED,
    )


def log_ticks(axes: Axes, values: list[float]) -> None:
    """Makes the horizontal axis logarithmic, linear near a radius of 0, with ticks at the values
    that were tried."""
    # A logarithm has no place for a radius of 0, which stands for plain AdamW in a sweep of radii.
    positive = [value for value in values if value > 0]
    if len(positive) < len(values):
        axes.set_xscale("symlog", linthresh=min(positive))
    else:
        axes.set_xscale("log")
    # One value would make an axis of no length.
    if len(values) == 1:
        axes.set_xlim(values[0] / 2, values[0] * 2)
    stride = max(1, -(-len(values) // TICKS))
    axes.xaxis.set_major_locator(FixedLocator(values[::stride]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(plain_numbers())


class Grid(NamedTuple):
    """The learning rates and radii that a method tried, as columns and rows of a map."""

    rates: list[float]
    radii: list[float | None]

    def place(self, setting: Setting) -> tuple[int, int] | None:
        """Returns (row, column) of a setting, None where the map has none for it."""
        if setting.rho not in self.radii or setting.lr not in self.rates:
            return None
        return self.radii.index(setting.rho), self.rates.index(setting.lr)


@matplotlib.rc_context(RC)
def grid_chart(section: Section) -> Figure | None:
    """Draws the final validation loss as a map of learning rate by radius, a panel for each method
    that tried two values of both, on one scale; None where there is none."""
    grids = {}
    for method, settings in section.methods.items():
        grid = grid_of(settings)
        if len(grid.rates) > 1 and len(grid.radii) > 1:
            grids[method] = grid
    # One scale of colours over all panels, so that methods can be compared by eye.
    losses = [setting.final.mean for method in grids for setting in section.tried(method)]
    if not losses:
        return None
    heights = [0.9 + 0.36 * len(grid.radii) for grid in grids.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(grids), height_ratios=heights, squeeze=False)[:, 0]
    scale = scale_of(losses)
    for axes, (method, grid) in zip(panels, grids.items(), strict=True):
        draw_grid(axes, section.methods[method], grid, scale)
        axes.set_title(method, fontsize=11)
        axes.set(xlabel=TITLES["lr"], ylabel=TITLES["rho"])
    return figure


def grid_of(settings: list[Setting]) -> Grid:
    """Returns the rates and radii of the settings of which something is known."""
    # A setting whose runs have yet to finish would be an empty row or column.
    known = [setting for setting in settings if setting.chosen_by or setting.diverged]
    radii = {setting.rho for setting in known}
    return Grid(
        sorted({setting.lr for setting in known}), sorted(radii, key=lambda rho: rho or 0.0)
    )


def scale_of(losses: list[float]) -> tuple[float, float]:
    """Returns the losses at both ends of the colours.

    The colours tell the good half apart; one bad corner would leave them all alike."""
    least = min(losses)
    good = min(max(losses), 2 * np.median(losses) - least)
    return least, max(np.nextafter(least, np.inf), good)


def draw_grid(axes: Axes, settings: list[Setting], grid: Grid, scale: tuple[float, float]) -> None:
    """Draws one panel: a coloured cell with its loss for every setting, a cross where a seed
    diverged."""
    values = np.full((len(grid.radii), len(grid.rates)), np.nan)
    # Points: a cell of more than seven columns is too narrow for the larger text.
    size = 9 if len(grid.rates) < 8 else 6.5
    for setting in settings:
        place = grid.place(setting)
        if place is None or not (setting.chosen_by or setting.diverged):
            continue
        if setting.chosen_by:
            values[place] = setting.final.mean
        row, column = place
        axes.text(
            column,
            row,
            cell_text(setting),
            ha="center",
            va="center",
            fontsize=size,
            color=PRINT if setting.chosen_by else INK,
        )
    # Cells without a loss stay without a colour.
    axes.grid(visible=False)
    axes.pcolormesh(
        np.ma.masked_invalid(values),
        shading="nearest",
        cmap=SHADES,
        vmin=scale[0],
        vmax=scale[1],
        edgecolors="#80808050",
    )
    radii = ["none" if rho is None else f"{rho:g}" for rho in grid.radii]
    axes.set_xticks(range(len(grid.rates)), [f"{rate:g}" for rate in grid.rates])
    axes.set_yticks(range(len(radii)), radii)


def cell_text(setting: Setting) -> str:
    """Returns the text of a setting's cell: its loss, and a cross where a seed diverged."""
    parts = []
    if setting.chosen_by:
        parts.append(f"{setting.final.mean:.4f}")
    if setting.diverged:
        parts.append("x")
    return " ".join(parts)
