"""Checkpoints: everything the next step depends on, on disk, atomically, in files that cannot execute code.

    checkpoints/step_00001000/
        model.safetensors       weights by name
        optimizer.safetensors   optimiser state by <weight name>.<key>
        random.safetensors      states of the random generators
        rule.safetensors        what the gradient rule remembers, if anything
        tokenizer.json          the tokenizer
        state.json              counters, shape, identity, and size and sha256 of every file above; written last

A checkpoint is written beside its final name, synced and renamed: it exists whole or not at all. The tensor files are what
torch.distributed.checkpoint's safetensors storage reads, so that sharded runs share the format.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS = ("model", "optimizer", "random", "rule")


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used, and why."""


@dataclass
class Checkpoint:
    """The content of a checkpoint: tensors by file and name, and plain values."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path

    @property
    def step(self) -> int:
        """Optimiser steps done when it was made."""
        return self.state["step"]


def save(run: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], tokenizer: Any, keep: int, milestones: list[int]) -> Path:
    """Writes the checkpoint of `state["step"]` and removes those beyond the newest `keep` that are no milestones.

    Raises OSError where the disk refuses; earlier checkpoints are then untouched."""
    final = run / "checkpoints" / f"step_{state['step']:08d}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            if group:
                save_file({key: value.detach().contiguous() for key, value in group.items()}, partial / f"{name}.safetensors")
        tokenizer.save(partial)
        files = {str(file.relative_to(partial)): describe(file) for file in sorted(partial.rglob("*")) if file.is_file()}
        write_json(partial / "state.json", state | {"files": files, "checksum": checksum(state | {"files": files})})
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        fsync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from None
    # Later ones can only be damaged: they must not push out those that are not.
    for old in [path for path in steps(run) if step_of(path) <= state["step"] and step_of(path) not in milestones][:-keep]:
        shutil.rmtree(old)
    return final


def try_to_save(*arguments: Any) -> str | None:
    """`save`; what the disk said where it refused."""
    try:
        save(*arguments)
    except OSError as error:
        return str(error)
    return None


def load(path: Path, only: tuple[str, ...] = TENSORS) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises DamagedCheckpoint where a file is missing, cut or changed."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state.pop("checksum") != checksum(state):
            raise DamagedCheckpoint("state.json does not match its checksum")
        files = state.pop("files")
        for name, described in files.items():
            if described != describe(path / name):
                raise DamagedCheckpoint(f"{name} does not match its size or checksum")
        tensors = {name: load_file(path / file) if (file := f"{name}.safetensors") in files else {} for name in only}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__}: {error}") from None
    return Checkpoint(tensors, state, path)


def load_newest(run: Path, warn: Any = print) -> Checkpoint | None:
    """The newest usable checkpoint of a run, None where it has none yet; a damaged one is reported and the one before it used.

    Raises ValueError where there are checkpoints and all of them are damaged."""
    found = steps(run)
    for path in reversed(found):
        try:
            return load(path)
        except DamagedCheckpoint as error:
            warn(f"checkpoint {path} is damaged ({error}); trying the one before it")
    if found:
        raise ValueError(f"dir={run}: all {len(found)} checkpoints are damaged; move the folder away to start again")
    return None


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; partial ones are none."""
    return sorted((path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def remove_partial(run: Path) -> None:
    """Removes what a killed save left."""
    for path in (run / "checkpoints").glob(".step_*.partial"):
        shutil.rmtree(path)


def describe(file: Path) -> list:
    """[size in bytes, sha256] of a file."""
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


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
