"""What a run tells the world: metrics.jsonl, the console, W&B and summary.json, behind one object.

`Tracker` is the whole interface of train.py. Rows are flat dicts with a "step"; the file is the
truth, and the console and W&B are views of it that may fail without harm."""

import json
import math
import secrets
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import Config, TrackingConfig
from data.files import write_atomically
from launch.plan.plan import Plan
from launch.run.folder import Counted, Row, RowFile, read_rows, read_summary
from launch.run.identity import as_read
from launch.run.opening import OpenRun
from launch.track.console import Console
from launch.track.progress import Start
from launch.track.wandb_run import PROJECT, Wandb, recorded_id, unsent, wandb_mode, wandb_settings

NEAR = 0.05  # a run that ends within this share of a budget is read at its end


def loss_at_flops(rows: list[Row], budget: float) -> float | None:
    """Returns the validation loss where a run had spent `budget` FLOPs, on a line between the
    evaluations around it; the last one's where the run ended short of the budget or within NEAR of
    it. None where no evaluation was finite."""
    points = [(row["flops"], row["val/loss"]) for row in rows if row.get("val/loss") is not None]
    if not points:
        return None
    flops, losses = zip(*points, strict=True)
    if flops[-1] <= (1 + NEAR) * budget:
        return losses[-1]
    return float(np.interp(budget, flops, losses))


class Tracker:
    """Tracks one run from start to end. Only one process of a run should have one.

    dir, run_name    the run folder, and the name shown in W&B
    plain_config     the configuration as plain dicts, for W&B
    wandb_id         the id of an earlier start of this run, where its checkpoint knows one
    console          where its rows are shown
    last_logged      step of the last row that the checkpoint knows, -1 from scratch; later ones are
                     dropped
    counted          the rows that it counts, where it tells
    """

    def __init__(  # noqa: PLR0913 - `open_tracker` is how a run makes one
        self,
        dir: Path,
        config: TrackingConfig,
        run_name: str,
        plain_config: dict[str, Any],
        wandb_id: str | None,
        console: Console,
        last_logged: int = -1,
        counted: Counted | None = None,
    ) -> None:
        self._dir = dir
        self._console = console
        self._file = RowFile(dir / "metrics.jsonl", last_logged, counted)
        self._wandb: Wandb | None = None
        self.wandb_id = wandb_id
        # W&B decides whether and how it tracks, and the user reads why.
        mode, why = wandb_mode(config.mode)
        if mode == "offline":
            self.message(
                f"W&B: recording offline, {why}; `wandb sync"
                f" {shlex.quote(str(dir))}/wandb/offline-run-*` uploads it"
            )
        elif mode == "off" and config.mode != "off":
            self.message(f"W&B: tracking off, {why}")
        if mode != "off":
            # The id of the checkpoint, else of a start that left none, else that of WANDB_RUN_ID.
            named = wandb_settings().run_id
            self.wandb_id = wandb_id or recorded_id(dir) or named or secrets.token_hex(4)
            arguments = wandb_arguments(dir, config, run_name, plain_config, self.wandb_id)
            self._wandb = Wandb(
                mode,
                config.timeout,
                arguments,
                lambda: read_rows(dir / "metrics.jsonl"),
                self.message,
            )

    def log(self, row: Row) -> None:
        """Appends a row, which has a "step", to metrics.jsonl; numbers that JSON lacks (nan, inf)
        become null there."""
        # The file first: it is the truth, and the other two are views of it.
        row = _strict(row)
        self._file.append(row)
        if self._wandb:
            self._wandb.log(row)
        self._console.row(row)

    def message(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.message(text)

    def sync(self) -> None:
        """Puts the rows so far on disk, so that a checkpoint never knows more than the metrics."""
        self._file.sync()

    @property
    def counted(self) -> Counted | None:
        """Returns the rows so far, for a checkpoint."""
        return self._file.counted

    def summary(self, values: dict[str, Any]) -> None:
        """Writes summary.json, whose presence means that the run is done."""
        # With the summary the run counts as done, so its rows are on disk before.
        values = _strict(values)
        self.sync()
        write_atomically(
            self._dir / "summary.json", json.dumps(values, allow_nan=False, indent=1) + "\n"
        )
        if self._wandb:
            self._wandb.send(lambda run: run.summary.update(values))

    def close(self, exit_code: int = 0) -> None:
        """Ends the live line and the W&B run; takes bounded time, whatever the network does."""
        self._console.close()
        self._file.close()
        if self._wandb:
            self._wandb.close(exit_code)


def wandb_arguments(
    dir: Path, config: TrackingConfig, run_name: str, plain_config: dict[str, Any], wandb_id: str
) -> dict[str, Any]:
    """Returns the arguments of a run that starts on W&B.

    What our keys set overrides W&B's own environment variables and settings files, and these
    override our defaults."""
    own = wandb_settings()
    # A run has the same id over all its starts, so "allow" resumes it where W&B knows it.
    model, method, data = (plain_config[group]["name"] for group in ("model", "optim", "data"))
    return {
        "dir": dir,
        "id": wandb_id,
        "resume": "allow",
        "name": own.run_name or run_name,
        "project": config.project or own.project or PROJECT,
        "entity": config.entity or own.entity,
        "group": config.group or own.run_group or f"{model}-{data}",
        "tags": list(dict.fromkeys([method, model, *(config.tags or own.run_tags or ())])),
        "job_type": own.run_job_type or "train",
        "config": plain_config,
    }


def send_rest(
    dir: Path, config: TrackingConfig, run_name: str, plain_config: dict[str, Any]
) -> None:
    """Sends W&B what it lacks of a finished run, whose last start may have had no network at its
    end. Where nothing is known to be lacking, or the run is not tracked online, nobody is asked."""
    # No fallback to a record, which would be one more that nobody has sent.
    wandb_id = recorded_id(dir)
    if wandb_id and unsent(dir) and wandb_mode(config.mode)[0] == "online":
        summary = read_summary(dir) or {}
        arguments = wandb_arguments(dir, config, run_name, plain_config, wandb_id)
        wandb = Wandb(
            "online",
            config.timeout,
            arguments,
            lambda: read_rows(dir / "metrics.jsonl"),
            print,
            fall_back=False,
        )
        wandb.send(lambda run: run.summary.update(summary))
        wandb.close(0)


def open_tracker(opened: OpenRun, settings: Config, plan: Plan, start: Start) -> "Tracker | Silent":
    """Returns what tells the world of a run; on all processes but the main one it says nothing."""
    if not opened.layout.main:
        return Silent()
    wandb_id = counted = None
    if start.resumed:
        wandb_id = start.resumed.wandb_id
        counted = start.resumed.rows
    console = Console(plan.schedule.steps, plan.evaluation_every)
    return Tracker(
        opened.folder,
        settings.tracking,
        opened.name,
        as_read(settings),
        wandb_id,
        console,
        start.progress.logged,
        counted,
    )


class Silent:
    """The tracker of a process that is not the main one: it tracks nothing."""

    wandb_id: str | None = None
    counted: Counted | None = None

    def log(self, row: Row) -> None: ...

    def message(self, text: str) -> None: ...

    def sync(self) -> None: ...

    def summary(self, values: dict[str, Any]) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
