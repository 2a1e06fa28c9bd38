"""Reads run folders: their configuration, their curves, and how each run ended."""

import math
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
from launch.run.folder import LARGEST, Row, lines_of, load_config, parse_row, read_summary
from launch.run.heartbeats import Failure
from launch.run.identity import canonical
from launch.run.lock import is_in_use, owner_in
from launch.sweep.jobs import Job, read_jobs, reason
from model.checkpoint import checkpoints, read_state
from optim.rule.diagnostics import unfaithful

# Rows with one of these are always read: they are few.
KEPT = (b'"val/loss"', b'"sharpness/delta_func"', b'"sharpness/fidelity"')
# At most this many of the other rows are read.
SAMPLED = 400
# A run may start from another, and that one from a third: the settings of at most this many of them
# are read.
ANCESTORS = 10
# A folder with config.yaml and one of these is a run's.
FILES = {
    "metrics.jsonl",
    "summary.json",
    "lock",
}


@dataclass
class Start:
    """A start of a run, as environment.json has it."""

    devices: list[str] = field(default_factory=list)
    cpu: str = ""
    folder: str = ""


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
    def name(self) -> str:
        """Returns the path of the run's folder as text that every file and terminal takes: a
        character that cannot be shown, or a byte that is none, as its escape."""
        path = str(self.folder)
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in path)

    @property
    def loss(self) -> float:
        """Returns the final validation loss, nan unless the run is finished."""
        if self.state != "finished":
            return np.nan
        return self.summary["val/loss"]

    @property
    def step(self) -> int:
        """Returns the last step that the run has written of."""
        steps = self.columns.get("step", np.zeros(1))
        return int(self.summary.get("step", steps[-1]))

    def curve(self, axis: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (values of the axis, values of the figure) where both are known."""
        _, along, values = self.points(axis, figure)
        return along, values

    def points(self, axis: str, figure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (steps, values of the axis, values of the figure) where all three are known: a
        row of the run may lack any of them."""
        names = ("step", axis, figure)
        if not all(name in self.columns for name in names):
            return np.empty(0), np.empty(0), np.empty(0)
        steps, along, values = np.array([self.columns[name] for name in names])
        # Every comparison with nan is false, so nan is left out as well.
        known = (np.abs(along) <= LARGEST) & (np.abs(values) <= LARGEST)
        return steps[known], along[known], values[known]

    def disagreement(self) -> str:
        """Returns how summary.json differs from the last row of metrics.jsonl, "" where it does
        not: a run writes the same figures into both when it ends."""
        steps, _, losses = self.points("step", "val/loss")
        if not len(steps) or self.state != "finished":
            return ""
        end = self.columns["step"][-1]
        if end != self.step:
            return f"its metrics.jsonl ends at step {end:,.0f}, its summary.json at {self.step:,}"
        if steps[-1] == end and not math.isclose(losses[-1], self.loss, rel_tol=1e-6):
            return (
                f"its metrics.jsonl ends at a validation loss of {losses[-1]:.4f}, its summary.json"
                f" at {self.loss:.4f}"
            )
        return ""


def find_runs(folders: Iterable[Path]) -> Iterator[Path]:
    """Yields the run folders among and below the given ones, each once, with those that a sweep has
    yet to fill. Raises ValueError where there is no such folder."""
    seen = set()
    for given in folders:
        if not given.is_dir():
            raise ValueError(f"{given} is no folder; name run folders, or folders that hold some")
        for root, below, files in os.walk(given, onerror=note_unreadable, followlinks=True):
            here = {*below, *files}
            is_run = "config.yaml" in here and not FILES.isdisjoint(here)
            # The walk goes on to the folders that are left in `below`. Those inside a run are its
            # own, and a folder that was seen is met again where links lead in a circle.
            if is_run or os.path.realpath(root) in seen:
                below.clear()
            # Folders are walked in the order of their names, so that a report of the same runs is
            # the same on any file system.
            below[:] = sorted(name for name in below if not name.startswith("."))
            found = [Path(root)] if is_run else unfilled(Path(root))
            for run in found:
                # A run that lies in two of the given folders, or that a link leads to, counts once.
                if (real := os.path.realpath(run)) not in seen:
                    yield run
                seen.add(real)
            seen.add(os.path.realpath(root))


def note_unreadable(error: OSError) -> None:
    """Prints that a folder cannot be looked into."""
    print(
        f"note: {error.filename} cannot be read ({error.strerror}); what runs it holds are left"
        " out",
        file=sys.stderr,
    )


def unfilled(folder: Path) -> list[Path]:
    """Returns the run folders of a sweep's folder in which no run has begun."""
    runs = [job.run for job in jobs_of(folder, warn=True)]
    return [run for run in runs if not (run / "config.yaml").exists()]


def jobs_of(folder: Path, warn: bool = False) -> list[Job]:
    """Returns the jobs of a sweep's folder; none where its list is damaged, so that a report of its
    runs is made all the same."""
    try:
        return read_jobs(folder)
    except DamagedFile as error:
        if warn:
            print(
                f"note: {error}; the sweep's own command writes it anew once it is removed",
                file=sys.stderr,
            )
        return []


class Sweeps(dict[Path, dict[Path, Job]]):
    """The jobs of sweeps, by the folder of the sweep and that of the run; each sweep's list is read
    once for all of its runs."""

    def __missing__(self, folder: Path) -> dict[Path, Job]:
        self[folder] = {job.run: job for job in jobs_of(folder)}
        return self[folder]


def read_runs(folders: Iterable[Path]) -> list[Record]:
    """Returns the records of run folders."""
    sweeps = Sweeps()
    return [read_run(folder, sweeps) for folder in folders]


def read_run(folder: Path, sweeps: Sweeps | None = None) -> Record:
    """Returns the record of a run folder; where a file is damaged, state and reason say so.

    `sweeps` holds the jobs that are known from other runs."""
    if sweeps is None:
        sweeps = Sweeps()
    record = Record(folder)
    # What was read before a damaged file is met stays in the record: its settings still say to
    # which method and seed the lost run belongs.
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
        # The folder may be given as "." or by a link; its sweep is the folder that it lies in.
        real = folder.resolve()
        job = sweeps[real.parent].get(real)
        record.state, record.reason = ending(folder, record.summary, rows, job)
        start = last_start(folder)
        record.hardware = ", ".join(start.devices) or start.cpu
        if data := data_of(folder):
            record.measured_on["data"] = data
    except (OSError, ValueError) as error:
        record.state = "damaged"
        record.reason = " ".join(str(error).split())
    return record


def read_settings(folder: Path) -> tuple[dict[str, Any], Config | None]:
    """Returns (settings of a run, its whole configuration) from its config.yaml; nothing for a run
    that never began. Raises ValueError for a file that is damaged."""
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
    # init.run may be relative to where the run was started, and folders may lie elsewhere by now.
    try:
        # Where the run was started, and beside it: folders of runs are copied together.
        places = (last_start(folder).folder / named, folder.parent / named.name)
        parent = next((place for place in places if (place / "config.yaml").exists()), places[0])
        settings, theirs = read_settings(parent)
    except (OSError, ValueError):
        parent = named
        settings = {}
        theirs = None
    # Without an end to the ancestors, two runs that name each other as parents would never be read.
    if theirs is None or not ancestors:
        return {"parent.run": str(parent)}
    # The path of a run is no part of what it is.
    known = settings | read_parent(parent, theirs, ancestors - 1)
    return {f"parent.{name}": value for name, value in known.items() if name != "init.run"}


def read_sampled(file: Path) -> list[Row]:
    """Returns the rows of a metrics.jsonl with an evaluation, and of the others at most SAMPLED,
    evenly spread, with the last; none where there is no file.

    Raises DamagedFile where a line is damaged, and where the steps of those rows do not rise."""
    lines = lines_of(file)
    # Every stride-th line is parsed, rounded up so that at most SAMPLED are.
    stride = -(-len(lines) // SAMPLED)
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        # To parse every line would cost most of a report's time. How a line begins and ends is
        # looked at in all of them: that shows half a line, which a crash or a second writer left.
        if not (line.startswith(b'{"step": ') and line.endswith(b"}")):
            raise DamagedFile(f"{file}, line {number}, is damaged (it is no row)")
        if number % stride == 0 or number == len(lines) or any(key in line for key in KEPT):
            row = parse_row(line, number, file)
            if rows and row["step"] <= rows[-1]["step"]:
                # A run only ever appends, so these are rows of two runs, or not in their order.
                raise DamagedFile(
                    f"{file}, line {number}, is damaged (step {row['step']} comes after step"
                    f" {rows[-1]['step']})"
                )
            rows.append(row)
    return rows


def columns(rows: list[Row]) -> dict[str, np.ndarray]:
    """Returns the rows as an array for every figure. A figure that a row lacks is nan, and so is
    null, which stands for one that was not finite."""
    names = {name for row in rows for name in row}
    found = {}
    for name in names:
        found[name] = np.array([row.get(name) for row in rows], dtype=float)
    return found


def ending(
    folder: Path, summary: dict[str, Any], rows: list[Row], job: Job | None
) -> tuple[str, str]:
    """Returns (state, reason) of a run whose files are in order; `job` is its part in a sweep."""
    # A run writes its summary last, so a run with one is done.
    if summary and summary["val/loss"] is None:
        return "diverged", "its final validation loss is not finite"
    if summary:
        return "finished", ""
    if is_in_use(folder):
        return "running", ""
    return ending_before_the_end(folder, rows, job)


def ending_before_the_end(folder: Path, rows: list[Row], job: Job | None) -> tuple[str, str]:
    """Returns (state, reason) of a run that is not done and that no process works on."""
    line = last_word(folder, job)
    # A row has null for the norm of a gradient that is not finite: such a step is skipped, and too
    # many in a row end the run.
    if rows and rows[-1].get("grad/norm", 0.0) is None:
        skipped = rows[-1].get("skipped", "?")
        return (
            "diverged",
            line or f"its last step was not finite; {skipped} steps were skipped in all",
        )
    if line and job and job.stopped:
        return "stopped", line
    if line:
        return "crashed", line
    if job and not rows:
        return "waiting", ""
    # A process that ends in order empties its lock; one that is killed leaves its name there.
    lock = folder / "lock"
    content = read_bytes(lock) if lock.exists() else b""
    if content:
        return "stopped", f"killed: {owner_in(content, lock)} had it; the same command goes on"
    return (
        "stopped",
        "ended before its end, for a reason that is not in its folder; the same command goes on",
    )


def last_word(folder: Path, job: Job | None) -> str:
    """Returns the line that says why a run ended, "" where none does: of a run of a sweep by its
    log, of any other the error with which a process ended it."""
    if job and job.log().exists():
        return reason(job)[0]
    return read_failure(folder)


def data_of(folder: Path) -> str | None:
    """Returns the fingerprint of a run's data by its newest sound checkpoint; None where none has
    it."""
    for path in reversed(checkpoints(folder).values()):
        with suppress(OSError, ValueError):
            return read_state(path).get("data")
    return None


def read_failure(folder: Path) -> str:
    """Returns the error with which a process ended its run, "" where none did."""
    nothing: Failure = {"by": 0, "code": 0, "line": ""}
    return read_json(folder / "heartbeat" / "failure.json", Failure, absent=nothing)["line"]
