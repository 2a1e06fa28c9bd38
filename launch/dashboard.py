"""The project on W&B: python -m launch.dashboard [entity=E] [project=P] [offline=true] [out=FILE]

Creates a workspace and a report: validation loss against steps, tokens, FLOPs and seconds, radius
and learning-rate responses, stability, sharpness, throughput. Runs are grouped by setting: a line,
a bar or a dot is one setting, a mean over the runs that share it, as its seeds do. Where W&B cannot
be reached, what would be created goes into a file."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.key import key
from data.files import write_result
from launch.track.wandb_run import PROJECT, wandb_mode, wandb_settings

NAME = "flatgpt: methods compared"
# runs with the same of these are a group, everywhere
SETTING = (
    "model.name",
    "optim.name",
    "optim.lr",
    "optim.rho",
)
SHOWN = 100  # groups that a panel shows; W&B's default is 10
WIDE, HIGH = 12, 8  # of a panel, where a report is 24 wide


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


def sections() -> list[tuple[str, str, list[Any]]]:
    """(title, what it shows, panels) of each part. No panel groups runs itself: all follow the
    groups of the table of runs."""
    import wandb_workspaces.reports.v2 as wr

    means: dict[str, Any] = {
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stderr",
        "max_runs_to_show": SHOWN,
    }

    def lines(title: str, x: str, *y: str, **how: Any) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=x, y=list(y), **means, **how)

    def bars(title: str, metric: str) -> wr.BarPlot:
        return wr.BarPlot(title=title, metrics=[metric], max_bars_to_show=SHOWN, **means)

    def dots(title: str, setting: str, metric: str) -> wr.ScatterPlot:
        return wr.ScatterPlot(
            title=title, x=wr.Config(setting), y=wr.SummaryMetric(metric), log_x=True
        )

    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in SETTING]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric("val/loss")))
    return [
        (
            "Validation loss",
            (
                "At equal steps the end of each curve counts; at equal FLOPs, what a method had"
                " reached when it had spent AdamW's."
            ),
            [
                bars("final validation loss, equal steps (nats per token)", "val/loss"),
                bars(
                    "validation loss at AdamW's FLOPs (nats per token)", "val/loss_at_equal_flops"
                ),
                lines("validation loss by steps", "step", "val/loss"),
                lines("validation loss by FLOPs", "flops", "val/loss", log_x=True),
                lines("validation loss by tokens", "tokens", "val/loss"),
                lines("validation loss by seconds", "seconds", "val/loss"),
            ],
        ),
        (
            "Radius and learning rate",
            (
                "A dot or a line is one setting, the mean over its seeds. Radii compare within a"
                " method only."
            ),
            [
                dots("final validation loss by radius", "optim.rho", "val/loss"),
                dots("final validation loss by learning rate", "optim.lr", "val/loss"),
                wr.ParallelCoordinatesPlot(title="every setting", columns=columns),
            ],
        ),
        (
            "Stability",
            "Spikes of loss or gradient norm, growing logits, skipped steps.",
            [
                lines("training loss", "step", "train/loss"),
                lines("gradient norm before clipping", "step", "grad/norm", log_y=True),
                lines("steps skipped as not finite", "step", "skipped"),
                lines("largest logit", "step", "logits/largest"),
                lines("log-normaliser", "step", "logits/log_normaliser"),
                lines("entropy of predictions (nats)", "step", "logits/entropy"),
            ],
        ),
        (
            "Sharpness",
            (
                "The component along says whether bf16 followed the move, fidelity whether the"
                " rule's change of the gradient did."
            ),
            [
                lines("curvature along the ascent", "step", "sharpness/curvature"),
                lines("loss at the moved weights minus clean loss (nats)", "step", "sharpness/gap"),
                lines("cosine of clean and rule's gradient", "step", "sharpness/cosine"),
                lines(
                    "realised move: cosine with the intended one, component along it",
                    "step",
                    "sharpness/realised_cosine",
                    "sharpness/realised_along",
                ),
                lines(
                    "fidelity: cosine of the change of the gradient with its fp32 self",
                    "step",
                    "sharpness/fidelity",
                ),
                lines(
                    "radius: wanted and realised",
                    "step",
                    "sharpness/rho",
                    "sharpness/realised_radius",
                ),
                lines(
                    "functional and logit part of SAM's change (optim.diagnostics_every)",
                    "step",
                    "sharpness/delta_func",
                    "sharpness/delta_logit",
                ),
            ],
        ),
        (
            "Throughput",
            "Speeds are taken between rows; evaluations and checkpoints are no part of them.",
            [
                lines("tokens per second", "step", "perf/tokens_per_second"),
                lines("model FLOPs utilisation", "step", "perf/mfu"),
                lines("peak memory (GiB)", "step", "perf/memory_gib"),
                lines("share of time spent waiting for data", "step", "perf/data_wait"),
            ],
        ),
    ]


def build(entity: str, project: str) -> tuple[Any, Any]:
    """The workspace and the report, not saved yet."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import Config

    parts = sections()
    told = (
        f"Runs with the same {', '.join(SETTING)} are a group: lines, bars and dots are its mean"
        " over seeds, bands the standard error. Whatever else differs in a project (data, batch,"
        " horizon, weight decay) is averaged over too: filter it away."
    )
    blocks: list[Any] = [wr.P(told), wr.TableOfContents()]
    for title, text, panels in parts:
        for panel in panels:
            panel.layout = wr.Layout(w=WIDE, h=HIGH)  # the grid finds it a place
        blocks += [
            wr.H1(title),
            wr.P(text),
            wr.PanelGrid(
                runsets=[wr.Runset(groupby=[f"config.{name}" for name in SETTING])], panels=panels
            ),
        ]
    report = wr.Report(entity=entity, project=project, title=NAME, width="fluid", blocks=blocks)
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(name=title, panels=panels, is_open=True)
            for title, _text, panels in sections()
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=SHOWN),
        runset_settings=ws.RunsetSettings(groupby=[Config(name) for name in SETTING]),
    )
    return workspace, report


def specification(workspace: Any, report: Any) -> dict[str, Any]:
    """What saving would send, as W&B's own library writes it; it has no public name for that."""
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
        try:
            import wandb
            import wandb_workspaces  # noqa: F401
        except ImportError:
            raise ValueError(
                "wandb-workspaces is missing, which builds W&B's pages; pip install -e '.[report]'"
            ) from None
        tracking = compose([]).tracking
        mode, why = ("offline", "offline") if options.offline else wandb_mode("online")
        own = wandb_settings()
        entity = options.entity or tracking.entity or own.entity
        project = options.project or tracking.project or own.project or PROJECT
        if mode == "online":
            try:
                workspace, report = build(entity or wandb.Api().default_entity or "", project)
                # first, for it makes the project where there is none
                print(f"report: {report.save().url}")
                print(f"workspace: {workspace.save().url}")
                return
            except Exception as error:  # whatever the network or the server makes of it
                why = f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            write_result(
                out, json.dumps(specification(*build(entity or "", project)), indent=1) + "\n"
            )
        except OSError as error:
            raise ValueError(
                f"out={out} cannot be written ({error.strerror}); name another file"
            ) from None
        print(f"W&B: {why}; {out} holds what would be created")


if __name__ == "__main__":
    main(sys.argv[1:])
