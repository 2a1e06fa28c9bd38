"""Creates the project's pages on W&B:

    python -m launch.dashboard [entity=E] [project=P] [offline=true] [out=FILE]

They are a workspace and a report: validation loss against steps, tokens, FLOPs and seconds, radius
and learning-rate responses, stability, sharpness, throughput. Runs are grouped by setting: a line,
a bar or a dot is one setting, a mean over the runs that share it, as its seeds do. Where W&B cannot
be reached, what would be created goes into a file."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.key import key
from data.files import write_result
from launch.track.wandb_run import PROJECT, wandb_mode, wandb_settings

NAME = "flatgpt: methods compared"
# Runs with the same values of these keys are a group, everywhere.
SETTING = (
    "model.name",
    "optim.name",
    "optim.lr",
    "optim.rho",
)
GROUPS = (
    f"Runs with the same {', '.join(SETTING)} are a group: lines, bars and dots are its mean"
    " over seeds, bands the standard error. Whatever else differs in a project (data, batch,"
    " horizon, weight decay) is averaged over too: filter it away."
)
# Lines and bars are means over a group.
MEANS: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
# A panel shows at most this many groups; W&B's default is 10.
SHOWN = 100
# The size of a panel, where a report is 24 wide.
WIDE = 12
HIGH = 8


@dataclass
class Options:
    """Creates a workspace and a report on W&B; what cannot be created there goes into a file.

    python -m launch.dashboard entity=my-group project=flatgpt
    python -m launch.dashboard offline=true out=dashboard.json
    """

    entity: str | None = key(
        None, "W&B entity; default tracking.entity, else WANDB_ENTITY, else your own"
    )
    project: str | None = key(
        None, "W&B project; default tracking.project, else WANDB_PROJECT, else flatgpt"
    )
    offline: bool = key(False, "write what would be created, and ask nobody")
    out: str = key("dashboard.json", "file for what would be created", path=True)


class Part(NamedTuple):
    """A part of the pages: its title, what it shows, and its panels."""

    title: str
    text: str
    panels: list[Any]


def parts() -> list[Part]:
    """Returns the parts of both pages, with panels of their own at every call. No panel groups runs
    itself: all follow the groups of the table of runs."""
    return [
        Part(
            "Validation loss",
            "At equal steps the end of each curve counts; at equal FLOPs, what a method had"
            " reached when it had spent AdamW's.",
            loss_panels(),
        ),
        Part(
            "Radius and learning rate",
            "A dot or a line is one setting, the mean over its seeds. Radii compare within a"
            " method only.",
            response_panels(),
        ),
        Part(
            "Stability",
            "Spikes of loss or gradient norm, growing logits, skipped steps.",
            stability_panels(),
        ),
        Part(
            "Sharpness",
            "The component along says whether bf16 followed the move, fidelity whether the"
            " rule's change of the gradient did.",
            sharpness_panels(),
        ),
        Part(
            "Throughput",
            "Speeds are taken between rows; evaluations and checkpoints are no part of them.",
            throughput_panels(),
        ),
    ]


def loss_panels() -> list[Any]:
    """Returns the panels of the validation loss at equal steps, FLOPs, tokens and seconds."""
    return [
        bars("final validation loss, equal steps (nats per token)", "val/loss"),
        bars("validation loss at AdamW's FLOPs (nats per token)", "val/loss_at_equal_flops"),
        lines("validation loss by steps", "val/loss"),
        lines("validation loss by FLOPs", "val/loss", x="flops", log_x=True),
        lines("validation loss by tokens", "val/loss", x="tokens"),
        lines("validation loss by seconds", "val/loss", x="seconds"),
    ]


def response_panels() -> list[Any]:
    """Returns the panels of the final validation loss by radius and learning rate."""
    return [
        dots("final validation loss by radius", "optim.rho", "val/loss"),
        dots("final validation loss by learning rate", "optim.lr", "val/loss"),
        settings("every setting", "val/loss"),
    ]


def stability_panels() -> list[Any]:
    """Returns the panels that show whether a run is about to diverge."""
    return [
        lines("training loss", "train/loss"),
        lines("gradient norm before clipping", "grad/norm", log_y=True),
        lines("steps skipped as not finite", "skipped"),
        lines("largest logit", "logits/largest"),
        lines("log-normaliser", "logits/log_normaliser"),
        lines("entropy of predictions (nats)", "logits/entropy"),
    ]


def sharpness_panels() -> list[Any]:
    """Returns the panels of what a rule measures of the loss around the weights."""
    return [
        lines("curvature along the ascent", "sharpness/curvature"),
        lines("loss at the moved weights minus clean loss (nats)", "sharpness/gap"),
        lines("cosine of clean and rule's gradient", "sharpness/cosine"),
        lines(
            "realised move: cosine with the intended one, component along it",
            "sharpness/realised_cosine",
            "sharpness/realised_along",
        ),
        lines(
            "fidelity: cosine of the change of the gradient with its fp32 self",
            "sharpness/fidelity",
        ),
        lines("radius: wanted and realised", "sharpness/rho", "sharpness/realised_radius"),
        lines(
            "functional and logit part of SAM's change (optim.diagnostics_every)",
            "sharpness/delta_func",
            "sharpness/delta_logit",
        ),
    ]


def throughput_panels() -> list[Any]:
    """Returns the panels of speed and memory."""
    return [
        lines("tokens per second", "perf/tokens_per_second"),
        lines("model FLOPs utilisation", "perf/mfu"),
        lines("peak memory (GiB)", "perf/memory_gib"),
        lines("share of time spent waiting for data", "perf/data_wait"),
    ]


def lines(title: str, *figures: str, x: str = "step", **scales: Any) -> Any:
    """Returns a panel of figures as lines against steps, or what `x` names; `scales` are log_x and
    log_y."""
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=x, y=list(figures), max_runs_to_show=SHOWN, **MEANS, **scales)


def bars(title: str, figure: str) -> Any:
    """Returns a panel of a final figure, a bar for every setting."""
    import wandb_workspaces.reports.v2 as wr

    return wr.BarPlot(
        title=title, metrics=[figure], max_bars_to_show=SHOWN, max_runs_to_show=SHOWN, **MEANS
    )


def dots(title: str, key: str, figure: str) -> Any:
    """Returns a panel of a final figure by a key, a dot for every setting."""
    import wandb_workspaces.reports.v2 as wr

    return wr.ScatterPlot(title=title, x=wr.Config(key), y=wr.SummaryMetric(figure), log_x=True)


def settings(title: str, figure: str) -> Any:
    """Returns a panel of a final figure by all keys of a setting, a line for every setting."""
    import wandb_workspaces.reports.v2 as wr

    metrics: list[Any] = [*map(wr.Config, SETTING), wr.SummaryMetric(figure)]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=metric) for metric in metrics]
    return wr.ParallelCoordinatesPlot(title=title, columns=columns)


def build(entity: str, project: str) -> tuple[Any, Any]:
    """Returns the workspace and the report, neither of them saved yet."""
    return build_workspace(entity, project), build_report(entity, project)


def build_workspace(entity: str, project: str) -> Any:
    """Returns the workspace, not saved yet."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import Config

    sections = [ws.Section(name=part.title, panels=part.panels, is_open=True) for part in parts()]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=SHOWN),
        runset_settings=ws.RunsetSettings(groupby=[Config(name) for name in SETTING]),
    )


def build_report(entity: str, project: str) -> Any:
    """Returns the report, not saved yet."""
    import wandb_workspaces.reports.v2 as wr

    # One grid for each part, all over the same groups of runs.
    blocks: list[Any] = [wr.P(GROUPS), wr.TableOfContents()]
    for part in parts():
        for panel in part.panels:
            # The grid finds a place for a panel of this size.
            panel.layout = wr.Layout(w=WIDE, h=HIGH)
        runs = wr.Runset(groupby=[f"config.{name}" for name in SETTING])
        blocks += [
            wr.H1(part.title),
            wr.P(part.text),
            wr.PanelGrid(runsets=[runs], panels=part.panels),
        ]
    return wr.Report(entity=entity, project=project, title=NAME, width="fluid", blocks=blocks)


def specification(workspace: Any, report: Any) -> dict[str, Any]:
    """Returns what saving would send, as W&B's own library writes it; the library has no public
    name for that."""
    return {
        name: part._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, part in (("workspace", workspace), ("report", report))
    }


def main(arguments: list[str]) -> None:
    """Creates workspace and report and prints where they are, or writes what would be created."""
    from conf.cli import parse, user_errors
    from launch.config import compose

    with user_errors():
        options, _ = parse(Options, arguments)
        out = Path(options.out)
        if out.is_dir() or not out.parent.is_dir():
            raise ValueError(f"out={out} cannot be written; name a file in a folder that exists")
        require_workspaces()
        tracking = compose([]).tracking
        mode = why = "offline"
        if not options.offline:
            mode, why = wandb_mode("online")
        # Our options before our configuration before W&B's own variables and settings.
        own = wandb_settings()
        entity = options.entity or tracking.entity or own.entity or ""
        project = options.project or tracking.project or own.project or PROJECT
        # What W&B did not take goes into the file, with the reason.
        if mode == "online":
            why = save(entity, project)
            if not why:
                return
        write(out, specification(*build(entity, project)))
        print(f"W&B: {why}; {out} holds what would be created")


def require_workspaces() -> None:
    """Raises ValueError where the package that builds W&B's pages is missing."""
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise ValueError(
            "wandb-workspaces is missing, which builds W&B's pages; pip install -e '.[report]'"
        ) from None


def save(entity: str, project: str) -> str:
    """Creates workspace and report on W&B and prints where they are; returns why that failed, ""
    where it did not."""
    import wandb

    try:
        workspace, report = build(entity or wandb.Api().default_entity or "", project)
        # The report comes first, for it makes the project where there is none.
        print(f"report: {report.save().url}")
        print(f"workspace: {workspace.save().url}")
    except Exception as error:
        # The network and the server can fail in any way, and the file is written in all of them.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def write(out: Path, content: dict[str, Any]) -> None:
    """Writes what would be created. Raises ValueError where the file cannot be written."""
    try:
        write_result(out, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ValueError(
            f"out={out} cannot be written ({error.strerror}); name another file"
        ) from None


if __name__ == "__main__":
    main(sys.argv[1:])
