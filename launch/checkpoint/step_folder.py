"""Checkpoints: everything the next step depends on, on disk, atomically, in files that cannot
execute code.

    checkpoints/step_00001000/
        model.safetensors       weights by name
        optimizer.safetensors   optimiser state by <weight name>.<key>
        random.safetensors      states of the random generators, by process
        rule.safetensors        what the gradient rule remembers, if anything
        tokenizer.json          the tokenizer
        state.json              counters, shape, identity, and size and sha256 of every file above;
                                written last

Several processes write model-00001-of-00004.safetensors and so on, each its own shards. Any number
of them reads what any number has written, each no more than its own part (model/checkpoint.py).

A checkpoint is written beside its final name and renamed once every file of every process is on
disk: it exists whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from data.files import DamagedFile
from model.checkpoint import (
    Checkpoint,
    OtherRun,
    Part,
    checkpoints,
    checksum,
    describe,
    file_of,
    open_checkpoint,
    save_parts,
)
from model.processes import Layout

T = TypeVar("T")


def save(  # noqa: PLR0913 - a call names what a checkpoint is made of
    run: Path,
    tensors: Mapping[str, Mapping[str, Part]],
    state: dict[str, Any],
    tokenizer: Any,
    keep: int,
    milestones: list[int],
    layout: Layout | None = None,
) -> Path:
    """Writes the checkpoint of `state["step"]`, of which every process has a part, and removes
    those beyond the newest `keep` that are no milestones.

    Raises OSError on all processes where the disk refuses one of them; earlier checkpoints are then
    untouched."""
    layout = layout or Layout()
    final = run / "checkpoints" / f"step_{state['step']:08d}"
    partial = final.with_name(f".{final.name}.partial")
    # Every process writes its own files, and learns what became of those of the others.
    found = layout.all_gather(attempt(lambda: write(partial, tensors, layout)), layout.saving)
    error = next((error for _, error in found if error), None)
    # The main process alone adds the rest, renames the folder, and only then removes older ones.
    if layout.main and not error:
        files = {
            name: described for written, _ in found for name, described in (written or {}).items()
        }
        _, error = attempt(lambda: commit(partial, final, files, state, tokenizer))
        if not error:
            _, error = attempt(lambda: remove_old(run, state["step"], keep, milestones))
    if layout.main and error:
        shutil.rmtree(partial, ignore_errors=True)
    # All raise or none does: a process that went on alone would wait for the others in vain.
    if error := layout.any_rank(error, layout.saving):
        raise OSError(error)
    return final


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Calls an action; returns its result, or the words of the disk where that refused."""
    try:
        return action(), None
    except (OSError, DamagedFile, SafetensorError) as error:
        return None, str(error) or type(error).__name__


def write(
    partial: Path, tensors: Mapping[str, Mapping[str, Part]], layout: Layout
) -> dict[str, tuple[int, str]]:
    """Writes this process's files; (size, sha256) of each by name."""
    partial.mkdir(parents=True, exist_ok=True)
    paths = {
        partial / file_of(group, layout.rank, layout.world): parts
        for group, parts in tensors.items()
        if parts
    }
    for path, parts in paths.items():
        save_parts(path, parts)
        fsync(path)
    return {path.name: describe(path) for path in paths}


def commit(
    partial: Path,
    final: Path,
    files: dict[str, tuple[int, str]],
    state: dict[str, Any],
    tokenizer: Any,
) -> None:
    """Adds what the main process writes alone, and makes the partial folder the checkpoint."""
    # On disks of their own the nodes would each hold a part of the checkpoint.
    if unseen := [
        name
        for name, (size, _) in files.items()
        if not (partial / name).exists() or (partial / name).stat().st_size != size
    ]:
        raise OSError(
            f"the main process does not see {unseen[0]} of another; the run folder must be one that"
            " all nodes share"
        )
    # state.json comes last, since it holds the checksums of all others.
    tokenizer.save(partial)
    own = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.name not in files]
    files = files | {str(path.relative_to(partial)): describe(path) for path in own}
    write_json(
        partial / "state.json",
        state | {"files": files, "checksum": checksum(state | {"files": files})},
    )
    # Everything is on disk before the name says that the checkpoint is there.
    for path in [
        *own,
        partial / "state.json",
        *(path for path in partial.rglob("*") if path.is_dir()),
        partial,
    ]:
        fsync(path)
    # One of the same step can only be a damaged one, which the start has passed over.
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    fsync(final.parent)


def remove_old(run: Path, step: int, keep: int, milestones: list[int]) -> None:
    """Removes checkpoints up to a step beyond the newest `keep` that are no milestones. Later ones
    can only be damaged: they must not push out those that are not."""
    for old in [
        path
        for number, path in checkpoints(run).items()
        if number <= step and number not in milestones
    ][:-keep]:
        shutil.rmtree(old)


def use_newest(
    run: Path,
    use: Callable[[Checkpoint], T],
    layout: Layout | None = None,
    warn: Callable[[str], Any] = print,
) -> T | None:
    """Returns what `use` makes of the newest usable checkpoint of a run, None where it has none
    yet; a damaged one is reported and the one before it used, by all processes together.

    Args:
        run: the run folder
        use: raises DamagedFile, on all processes, for a checkpoint that it cannot use
        layout: of the processes
        warn: takes a line about each damaged one

    Raises:
        ValueError: there are checkpoints and all of them are damaged, or another run's
    """
    # All try the same ones in the same order, though a shared folder may not look the same to all.
    layout = layout or Layout()
    refusals: list[DamagedFile] = []
    for path in reversed(layout.any_rank(list(checkpoints(run).values()))):
        try:
            return use(open_checkpoint(path, layout=layout))
        except DamagedFile as error:
            refusals.append(error)
            if layout.main:
                warn(f"checkpoint {path} is damaged ({error}); trying the one before it")
    if refusals and all(isinstance(error, OtherRun) for error in refusals):
        raise ValueError(
            f"dir={run} holds the checkpoints of another run ({refusals[0]}); choose another dir"
        )
    if refusals:
        raise ValueError(
            f"dir={run}: all {len(refusals)} checkpoints are damaged; move the folder away to start"
            " again"
        )
    return None


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
