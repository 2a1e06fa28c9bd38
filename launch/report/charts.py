"""The charts of a comparison, by name and with their captions."""

from collections.abc import Callable

from matplotlib.figure import Figure

from launch.report.drawing import Style
from launch.report.line_charts import (
    difference_chart,
    loss_chart,
    measured_charts,
    training_chart,
)
from launch.report.meanings import meaning
from launch.report.response_charts import grid_chart, response_chart
from launch.report.section import Section

# A chart with its caption; None where the comparison has no such chart.
Captioned = tuple[str, Figure | None]
# The validation loss is drawn against each of these.
AGAINST = {
    "step": "steps and tokens",
    "flops": "training FLOPs",
    "seconds": "training time",
}
DIFFERENCE = (
    "Validation loss minus that of the baseline at the same step and seed (thin: each seed, thick:"
    " their mean)."
)
TRAINING = (
    "Training loss (clean). Rules of one pass, which see only the loss at the moved weights, have"
    " none."
)
RHO = "Response to the radius, each method at its best learning rate; a dot is a seed."
LR = "Response to the learning rate, each method at its best radius; a dot is a seed."
GRID = "Final validation loss by learning rate and radius; x: a seed diverged."


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
    # Any other name is that of a figure that was logged.
    make = named.get(name, lambda: measured_charts(section, looks, axis)[0].get(name))
    drawn = make()
    if drawn is None:
        # Which charts there are shows only when they are drawn.
        there = [known for known, make in named.items() if make()]
        there += measured_charts(section, looks, axis)[0]
        if not there and len(section.runs) > 1:
            raise ValueError(
                f"chart={name}: of several runs those that are finished are drawn, and none is;"
                " name one run alone to see its curves"
            )
        if not there:
            raise ValueError(f"chart={name}: the run has logged nothing to draw yet")
        raise ValueError(
            f"chart={name}: these runs have no such chart; choose one of {', '.join(there)}"
        )
    return drawn


def charts_of_losses(section: Section, looks: dict[str, Style], axis: str) -> list[Captioned]:
    """Returns the charts of losses with their captions."""
    # A run that stands alone is compared with nothing at equal FLOPs or time.
    drawn = [
        (caption_of_loss(section, over), loss_chart(section, looks, over))
        for over in AGAINST
        if over == "step" or len(section.runs) > 1
    ]
    return [
        *drawn,
        (DIFFERENCE, difference_chart(section, looks)),
        (TRAINING, training_chart(section, looks, axis)),
        (RHO, response_chart(section, looks, "rho")),
        (LR, response_chart(section, looks, "lr")),
        (GRID, grid_chart(section)),
    ]


def caption_of_loss(section: Section, axis: str) -> str:
    """Returns the caption of the chart of the validation loss against an axis."""
    caption = f"Validation loss against {AGAINST[axis]}."
    if len(section.runs) > 1:
        caption += " Settings that are best at equal steps; a dot is a seed."
    caption += " The first fifth is cut off."
    if axis == "seconds" and section.doubt:
        caption += f" No evidence: {section.doubt.partition(':')[0]}."
    return caption


def charts_while_training(
    section: Section, looks: dict[str, Style], axis: str
) -> tuple[list[Captioned], list[str]]:
    """Returns (the charts of what rows measured, with their captions; a sentence for each figure
    that never changed)."""
    drawn, constant = measured_charts(section, looks, axis)
    return [(meaning(name), figure) for name, figure in drawn.items()], constant
