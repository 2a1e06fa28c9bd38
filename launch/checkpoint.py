"""Checkpoints: everything the next step depends on, on disk, atomically, in files that cannot execute code.

    checkpoints/step_00001000/
        model.safetensors       weights by name
        optimizer.safetensors   optimiser state by <weight name>.<key>
        random.safetensors      states of the random generators, by process
        rule.safetensors        what the gradient rule remembers, if anything
        tokenizer.json          the tokenizer
        state.json              counters, shape, identity, and size and sha256 of every file above; written last

Several processes write model-00001-of-00004.safetensors and so on, each its own shards (model/stored.py). Any number of them reads what
any number has written, each no more than its own part.

A checkpoint is written beside its final name and renamed once every file of every process is on disk: it exists whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from model.sharding import Layout
from model.stored import Part, checkpoints, describe, file_of, files_of, open_tensors, save_parts

T = TypeVar("T")
TENSORS = ("model", "optimizer", "random", "rule")


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used, and why."""


@dataclass
class Checkpoint:
    """The content of a checkpoint: tensors by file and name, not read yet (`Stored`), and plain values."""

    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]
    path: Path

    @property
    def step(self) -> int:
        """Optimiser steps done when it was made."""
        return self.state["step"]


def save(
    run: Path,
    tensors: Mapping[str, Mapping[str, Part]],
    state: dict[str, Any],
    tokenizer: Any,
    keep: int,
    milestones: list[int],
    layout: Layout | None = None,
) -> Path:
    """Writes the checkpoint of `state["step"]`, of which every process has a part, and removes those beyond the newest `keep` that are no
    milestones.

    Raises OSError on all processes where the disk refuses one of them; earlier checkpoints are then untouched."""
    layout = layout or Layout()
    final = run / "checkpoints" / f"step_{state['step']:08d}"
    partial = final.with_name(f".{final.name}.partial")
    found = layout.collected(attempt(lambda: write(partial, tensors, layout)), layout.saving)
    error = next((error for _, error in found if error), None)
    if layout.main and not error:
        files = {name: described for written, _ in found for name, described in (written or {}).items()}
        _, error = attempt(lambda: commit(partial, final, files, state, tokenizer))
        if not error:
            _, error = attempt(lambda: remove_old(run, state["step"], keep, milestones))
    if layout.main and error:
        shutil.rmtree(partial, ignore_errors=True)
    if error := layout.agreed(error, layout.saving):
        raise OSError(error)
    return final


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What an action returns, or what the disk said where it refused."""
    try:
        return action(), None
    except (OSError, SafetensorError) as error:
        return None, str(error) or type(error).__name__


def write(partial: Path, tensors: Mapping[str, Mapping[str, Part]], layout: Layout) -> dict[str, list]:
    """Writes this process's files; [size, sha256] of each by name."""
    partial.mkdir(parents=True, exist_ok=True)
    paths = {partial / file_of(group, layout.rank, layout.world): parts for group, parts in tensors.items() if parts}
    for path, parts in paths.items():
        save_parts(path, parts)
        fsync(path)
    return {path.name: describe(path) for path in paths}


def commit(partial: Path, final: Path, files: dict[str, list], state: dict[str, Any], tokenizer: Any) -> None:
    """Adds what the main process writes alone, and makes the partial folder the checkpoint."""
    if unseen := [name for name, (size, _) in files.items() if not (partial / name).exists() or (partial / name).stat().st_size != size]:
        raise OSError(f"the main process does not see {unseen[0]} of another; the run folder must be one that all nodes share")
    tokenizer.save(partial)
    own = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.name not in files]
    files = files | {str(path.relative_to(partial)): describe(path) for path in own}
    write_json(partial / "state.json", state | {"files": files, "checksum": checksum(state | {"files": files})})
    for path in [*own, partial / "state.json", *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    fsync(final.parent)


def remove_old(run: Path, step: int, keep: int, milestones: list[int]) -> None:
    """Removes checkpoints up to a step beyond the newest `keep` that are no milestones. Later ones can only be damaged: they must not push
    out those that are not."""
    for old in [path for number, path in checkpoints(run).items() if number <= step and number not in milestones][:-keep]:
        shutil.rmtree(old)


def load(path: Path, only: tuple[str, ...] = TENSORS, layout: Layout | None = None) -> Checkpoint:
    """Verifies a checkpoint, each process some of its files, and opens it. Raises DamagedCheckpoint on all processes where a file is missing,
    cut or changed."""
    layout, error = layout or Layout(), None
    try:
        state = json.loads((path / "state.json").read_text())
        if state.pop("checksum") != checksum(state):
            raise DamagedCheckpoint("state.json does not match its checksum")
        files = state.pop("files")
        for name in sorted(files)[layout.rank :: layout.world]:
            if files[name] != describe(path / name):
                raise DamagedCheckpoint(f"{name} does not match its size or checksum")
        tensors = {group: open_tensors(path / name for name in files_of(group, files)) for group in only}
    except DamagedCheckpoint as damage:
        error = str(damage)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as damage:
        error = f"{type(damage).__name__}: {damage}"
    if error := layout.agreed(error):
        raise DamagedCheckpoint(error)
    return Checkpoint(tensors, state, path)


def load_newest(run: Path, layout: Layout | None = None, warn: Callable[[str], Any] = print) -> Checkpoint | None:
    """The newest usable checkpoint of a run, None where it has none yet; a damaged one is reported and the one before it used, by all
    processes together.

    Raises ValueError where there are checkpoints and all of them are damaged."""
    layout = layout or Layout()
    found = layout.agreed(list(checkpoints(run).values()))
    for path in reversed(found):
        try:
            return load(path, layout=layout)
        except DamagedCheckpoint as error:
            if layout.main:
                warn(f"checkpoint {path} is damaged ({error}); trying the one before it")
    if found:
        raise ValueError(f"dir={run}: all {len(found)} checkpoints are damaged; move the folder away to start again")
    return None


def remove_partial(run: Path) -> None:
    """Removes what a killed save left."""
    for path in (run / "checkpoints").glob(".step_*.partial"):
        shutil.rmtree(path)


def checksum(state: dict[str, Any]) -> str:
    """sha256 of plain values, as JSON holds them."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically: the file is the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1))
    fsync(partial)
    partial.rename(path)


def fsync(path: Path) -> None:
    """Forces a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
