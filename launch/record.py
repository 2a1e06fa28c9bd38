"""What run folders tell afterwards: their configuration, their curves, and how each run ended."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from conf.schema import KEYS, Config, lookup
from launch.config import is_read
from launch.identity import is_mutable
from launch.jobs import read_jobs, reason
from launch.lock import is_in_use

KEPT = ('"val/loss"', '"sharpness/delta_func"')  # rows with one of these are always read: they are few
FIGURES = {"step", "tokens", "flops", "seconds", "val/loss"}  # of every summary
SAMPLED = 400  # rows that are read of the others
FILES = {"metrics.jsonl", "summary.json", "lock"}  # beside config.yaml, what tells a run's folder from others


@dataclass
class Record:
    """One run, as its folder tells it.

    state       finished; diverged; crashed; running; waiting (a job of a sweep that was never started); stopped; damaged (a file of it)
    reason      why, where the folder tells
    settings    every key that the run reads and that may change its result, by dotted name
    columns     its rows, by name of the figure: arrays of one length, nan where a row has none
    summary     its final figures
    measured_on what its validation loss was taken on, as far as the folder tells
    hardware    what its last start ran on
    """

    folder: Path
    state: str = "waiting"
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    measured_on: dict[str, Any] = field(default_factory=dict)
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
        values = self.columns.get(figure, np.empty(0))
        known = np.isfinite(values)
        return (self.columns[axis][known] if len(values) else values), values[known]


def find_runs(folders: Iterable[Path]) -> Iterator[Path]:
    """The run folders among and below the given ones, each once, with those that a sweep has yet to fill. Raises ValueError where there is
    no such folder."""
    seen = set()
    for given in folders:
        if not given.is_dir():
            raise ValueError(f"{given} is no folder; name run folders, or folders that hold some")
        for root, below, files in os.walk(given, followlinks=True):
            found = [Path(root)] if "config.yaml" in files and not FILES.isdisjoint(files) else []
            below[:] = [] if found or os.path.realpath(root) in seen else sorted(name for name in below if not name.startswith("."))
            for run in found or [job.run for job in read_jobs(Path(root)) if not (job.run / "config.yaml").exists()]:
                if (real := os.path.realpath(run)) not in seen:
                    yield run
                seen.add(real)
            seen.add(os.path.realpath(root))


def read_run(folder: Path) -> Record:
    """The record of a run folder; where a file of it is damaged, its state and reason say so."""
    record = Record(folder)
    try:
        record.settings, evaluated = read_settings(folder / "config.yaml")
        record.measured_on["evaluation.tokens"] = evaluated
        rows = read_sampled(folder / "metrics.jsonl")
        record.columns = columns(rows, folder / "metrics.jsonl")
        record.summary = read_json(folder / "summary.json")
        if record.summary and (lacking := FIGURES - record.summary.keys()):
            raise ValueError(f"{folder}/summary.json is damaged (it lacks {', '.join(sorted(lacking))})")
        record.state, record.reason = ending(folder, record.summary, rows)
        last_start = [{}, *read_json(folder / "code" / "environment.json", [])][-1]
        record.hardware = ", ".join(last_start.get("devices") or [str(last_start.get("cpu", ""))])
        newest = max((folder / "checkpoints").glob("step_*/state.json"), default=folder / "no checkpoint")
        record.measured_on |= {"data": data} if (data := read_json(newest).get("data")) else {}
    except ValueError as error:
        record.state, record.reason = "damaged", " ".join(str(error).split())
    return record


def read_settings(file: Path) -> tuple[dict[str, Any], int | None]:
    """(settings of a run, the tokens it evaluated on) from its config.yaml. Hydra and OmegaConf would take 20 times as long.

    Raises ValueError for a file that is damaged; a key that it lacks is newer than the run, and has its default. A run that never began has
    no settings."""
    if not file.exists():
        return {}, None
    try:
        given = yaml.CSafeLoader(file.read_bytes()).get_single_data()
        plain: Any = merged(asdict(Config()), given)
        settings = {name: lookup(plain, name) for name in KEYS if not is_mutable(plain, name) and is_read(plain, name)}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error})") from None
    return settings, plain["evaluation"]["tokens"]


def merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The given values, section by section, over the defaults."""
    inner = {name: merged(value, given[name]) for name, value in defaults.items() if isinstance(value, dict) and name in given}
    return defaults | given | inner


def read_sampled(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl with an evaluation, and of the others at most SAMPLED, evenly spread, with the last; none where there is
    no file. A last line that a crash cut short is left out.

    Raises ValueError where a line is damaged."""
    *lines, _torn = file.read_text(errors="replace").split("\n") if file.exists() else [""]
    stride = -(-len(lines) // SAMPLED)
    rows = []
    for number, line in enumerate(lines, 1):
        wanted = number % stride == 0 or number == len(lines) or any(key in line for key in KEPT)
        try:
            if not (line.startswith('{"step": ') and line.endswith("}")):
                raise ValueError("it is no row")
            if wanted:
                rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file} is damaged in line {number} ({error})") from None
    return rows


def columns(rows: list[dict[str, Any]], file: Path) -> dict[str, np.ndarray]:
    """The rows as an array for every figure. Raises ValueError for a value that is no number."""
    names = {name for row in rows for name in row}
    try:
        return {name: np.array([row.get(name) for row in rows], dtype=float) for name in names}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error})") from None


def read_json(file: Path, absent: Any = None) -> Any:
    """The content of a file; `absent`, by default an empty object, where there is none. Raises ValueError for content of another kind."""
    absent = {} if absent is None else absent
    try:
        found = json.loads(file.read_text()) if file.exists() else absent
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error})") from None
    if not isinstance(found, type(absent)):
        raise ValueError(f"{file} is damaged (it holds no {type(absent).__name__})")
    return found


def ending(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, str]:
    """(state, reason) of a run whose files are in order."""
    last = rows[-1] if rows else {}
    if summary:
        return ("finished", "") if summary["val/loss"] is not None else ("diverged", "its final validation loss is not finite")
    if is_in_use(folder):
        return "running", ""
    job = next((job for job in read_jobs(folder.parent) if job.run == folder), None)
    line = reason(job)[0] if job and job.log().exists() else read_json(folder / "heartbeat" / "failure.json").get("line", "")
    if "grad/norm" in last and last["grad/norm"] is None:
        return "diverged", line or f"its last step was not finite; {last['skipped']} steps were skipped in all"
    if line:
        return "stopped" if job and job.stopped else "crashed", line
    if job and not rows:
        return "waiting", ""
    lock = folder / "lock"
    if lock.exists() and lock.stat().st_size:
        owner = read_json(lock)
        return "stopped", f"killed: process {owner.get('pid')} on {owner.get('host')} had it; the same command goes on"
    return "stopped", "ended in order before its end; the same command goes on"
