"""What run folders tell afterwards: their configuration, their curves, and how each run ended."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import Config
from data.files import DamagedFile, read_bytes, read_json
from launch.run.folder import Row, lines_of, load_config, parse_row, read_summary
from launch.run.heartbeats import Failure
from launch.run.identity import canonical
from launch.run.lock import is_in_use, owner_in
from launch.sweep.jobs import Job, read_jobs, reason
from model.checkpoint import checkpoints, read_state
from optim.rule.diagnostics import unfaithful

# Rows with one of these are always read: they are few.
KEPT = (b'"val/loss"', b'"sharpness/delta_func"', b'"sharpness/fidelity"')
ANCESTORS = 10  # runs that a run goes back to, one from another, that are asked for their settings
SAMPLED = 400  # rows that are read of the others
# beside config.yaml, what tells a run's folder from others
FILES = {
    "metrics.jsonl",
    "summary.json",
    "lock",
}


@dataclass
class Start:
    """What environment.json tells of a start."""

    devices: list[str] = field(default_factory=list)
    cpu: str = ""
    folder: str = ""


@dataclass
class Measured:
    """What the state of a checkpoint tells of the data."""

    data: str | None = None


@dataclass(eq=False)
class Record:
    """One run, as its folder tells it.

    state       finished; diverged; crashed; running; waiting (a job of a sweep that was never
                started); stopped; damaged (a file of it)
    reason      why, where the folder tells
    settings    every key that the run reads and that may change its result, by dotted name
    parent      the same of the run that it started from, by "parent.KEY"; "parent.run", its folder,
                where that is gone
    tags        its tracking.tags
    columns     its rows, by name of the figure: arrays of one length, nan where a row has none
    summary     its final figures
    measured_on what its validation loss was taken on, as far as the folder tells
    harm        what rounding did to its rule, where a row that was read tells
    hardware    what its last start ran on
    """

    folder: Path
    state: str = "waiting"
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    parent: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    measured_on: dict[str, Any] = field(default_factory=dict)
    harm: str = ""
    hardware: str = ""

    @property
    def loss(self) -> float:
        """The final validation loss, nan unless the run is finished."""
        return self.summary["val/loss"] if self.state == "finished" else np.nan

    @property
    def step(self) -> int:
        """The last step that the run has told of."""
        steps = self.columns.get("step", np.empty(0))
        return int(self.summary.get("step", steps[-1] if len(steps) else 0))

    def curve(self, axis: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """(values of the axis, values of the figure) where the figure is known."""
        values, along = self.columns.get(figure, np.empty(0)), self.columns.get(axis, np.empty(0))
        if not (len(values) and len(along)):
            return np.empty(0), np.empty(0)
        known = np.isfinite(values) & np.isfinite(along)
        return along[known], values[known]


def find_runs(folders: Iterable[Path]) -> Iterator[Path]:
    """The run folders among and below the given ones, each once, with those that a sweep has yet to
    fill. Raises ValueError where there is no such folder."""
    seen = set()
    for given in folders:
        if not given.is_dir():
            raise ValueError(f"{given} is no folder; name run folders, or folders that hold some")
        for root, below, files in os.walk(given, followlinks=True):
            here = {*below, *files}
            found = [Path(root)] if "config.yaml" in here and not FILES.isdisjoint(here) else []
            below[:] = (
                []
                if found or os.path.realpath(root) in seen
                else sorted(name for name in below if not name.startswith("."))
            )
            for run in found or [
                job.run
                for job in jobs_of(Path(root), warn=True)
                if not (job.run / "config.yaml").exists()
            ]:
                if (real := os.path.realpath(run)) not in seen:
                    yield run
                seen.add(real)
            seen.add(os.path.realpath(root))


def jobs_of(folder: Path, warn: bool = False) -> list[Job]:
    """The jobs of a sweep's folder; none where its list is damaged, which takes no run with it."""
    try:
        return read_jobs(folder)
    except DamagedFile as error:
        if warn:
            print(
                f"note: {error}; the sweep's own command writes it anew once it is removed",
                file=sys.stderr,
            )
        return []


def read_run(folder: Path) -> Record:
    """The record of a run folder; where a file of it is damaged, its state and reason say so."""
    record = Record(folder)
    try:
        record.settings, config = read_settings(folder)
        if config:
            record.measured_on["evaluation.tokens"] = config.evaluation.tokens
            record.parent = read_parent(folder, config)
            record.tags = config.tracking.tags
        rows = read_sampled(folder / "metrics.jsonl")
        record.columns = columns(rows)
        record.summary = read_summary(folder) or {}
        record.harm = next(filter(None, map(unfaithful, rows)), "")
        record.state, record.reason = ending(folder, record.summary, rows)
        start = last_start(folder)
        record.hardware = ", ".join(start.devices) or start.cpu
        record.measured_on |= {"data": data} if (data := data_of(folder)) else {}
    except (OSError, ValueError) as error:
        record.state, record.reason = "damaged", " ".join(str(error).split())
    return record


def read_settings(folder: Path) -> tuple[dict[str, Any], Config | None]:
    """(settings of a run, its whole configuration) from its config.yaml; none of a run that never
    began. Raises ValueError for a file that is damaged."""
    if not os.path.lexists(folder / "config.yaml"):
        return {}, None
    config = load_config(folder)
    return canonical(config), config


def last_start(folder: Path) -> Start:
    """Returns what the run's last start ran on."""
    return [Start(), *read_json(folder / "code" / "environment.json", list[Start], absent=[])][-1]


def read_parent(folder: Path, config: Config, ancestors: int = ANCESTORS) -> dict[str, Any]:
    """Returns the settings of the run that the run in `folder` started from, by "parent.KEY", those
    of its own parent by "parent.parent.KEY"; nothing where it started from none, and only the
    folder where nothing is known of it."""
    if not config.init.run:
        return {}
    named = Path(config.init.run)
    try:
        # Where the run was started, and beside it: folders of runs are copied together.
        places = (last_start(folder).folder / named, folder.parent / named.name)
        parent = next((place for place in places if (place / "config.yaml").exists()), places[0])
        settings, theirs = read_settings(parent) if ancestors else ({}, None)
    except (OSError, ValueError):
        parent, settings, theirs = named, {}, None
    if theirs is None:
        return {"parent.run": str(parent)}
    # The path of a run is no part of what it is.
    known = settings | read_parent(parent, theirs, ancestors - 1)
    return {f"parent.{name}": value for name, value in known.items() if name != "init.run"}


def read_sampled(file: Path) -> list[Row]:
    """The rows of a metrics.jsonl with an evaluation, and of the others at most SAMPLED, evenly
    spread, with the last; none where there is no file.

    Raises DamagedFile where a line is damaged."""
    lines = lines_of(file)
    stride = -(-len(lines) // SAMPLED)
    rows = []
    for number, line in enumerate(lines, 1):
        if not (line.startswith(b'{"step": ') and line.endswith(b"}")):
            raise DamagedFile(f"{file}, line {number}, is damaged (it is no row)")
        if number % stride == 0 or number == len(lines) or any(key in line for key in KEPT):
            rows.append(parse_row(line, number, file))
    return rows


def columns(rows: list[Row]) -> dict[str, np.ndarray]:
    """The rows as an array for every figure."""
    names = {name for row in rows for name in row}
    return {name: np.array([row.get(name) for row in rows], dtype=float) for name in names}


def ending(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, str]:
    """(state, reason) of a run whose files are in order."""
    last = rows[-1] if rows else {}
    if summary:
        return (
            ("finished", "")
            if summary["val/loss"] is not None
            else ("diverged", "its final validation loss is not finite")
        )
    if is_in_use(folder):
        return "running", ""
    job = next((job for job in jobs_of(folder.parent) if job.run == folder), None)
    line = reason(job)[0] if job and job.log().exists() else read_failure(folder)
    if "grad/norm" in last and last["grad/norm"] is None:
        return (
            "diverged",
            line
            or "its last step was not finite;"
            f" {last.get('skipped', '?')} steps were skipped in all",
        )
    if line:
        return "stopped" if job and job.stopped else "crashed", line
    if job and not rows:
        return "waiting", ""
    if content := read_bytes(lock) if (lock := folder / "lock").exists() else b"":
        return "stopped", f"killed: {owner_in(content, lock)} had it; the same command goes on"
    return "stopped", "ended in order before its end; the same command goes on"


def data_of(folder: Path) -> str | None:
    """The fingerprint of a run's data, as its newest sound checkpoint tells it; None where none
    does."""
    for path in reversed(checkpoints(folder).values()):
        with suppress(OSError, ValueError):
            return read_state(path).get("data")
    return None


def read_failure(folder: Path) -> str:
    """What a process of a run said when it ended it, empty where none did."""
    nothing: Failure = {"by": 0, "code": 0, "line": ""}
    return read_json(folder / "heartbeat" / "failure.json", Failure, absent=nothing)["line"]
