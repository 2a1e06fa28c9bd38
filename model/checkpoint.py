"""Checkpoints as they lie on a disk: their names, the tensors in them, and the one way to open one,
which verifies it.

Tensors are in safetensors files, each whole in one file, or in parts over the files of several
processes. The header of a file of parts says where in the full tensors they begin, in the words of
torch.distributed.checkpoint, whose HuggingFaceStorageReader reads these folders too:

    DCP_SHARDING_INFO = {"<name>": {"saved_offsets": [first row, first column, ...]}, ...}

Its writer builds a whole file in memory before it writes and names files by no group, and planning
a load costs more than the few lines here.

state.json says what else a checkpoint is: counters, shape, the identity of its run, size and sha256
of every other file, and its own checksum. launch/checkpoint/step_folder.py writes them."""

import hashlib
import json
import operator
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.keys import KEYS, lookup
from conf.schema import Config
from data.files import DamagedFile, check, open_regular, parse_json, read_json, read_yaml
from model.config import GPTConfig
from model.gpt import GPT
from model.processes import Layout

T = TypeVar("T")
SHARDING = "DCP_SHARDING_INFO"
TENSORS = ("model", "optimizer", "random", "rule")
# Keys that say where something lies, not what it is.
PLACES = {name for name, entry in KEYS.items() if entry.metadata.get("place")}
# Sections of every config.yaml, of whatever version.
SECTIONS = {"model", "tokenizer", "data", "batch", "optim", "schedule", "seed"}


class DamagedCheckpoint(DamagedFile):
    """The error of a checkpoint that cannot be used, with the reason."""


class OtherRun(DamagedCheckpoint):
    """The error of a checkpoint of another run than the one in whose folder it lies."""


class Part(NamedTuple):
    """A part of a tensor, and the indices of its first number in the full one."""

    values: Tensor
    offset: tuple[int, ...]


class StoredPart(NamedTuple):
    """A part of a tensor on disk."""

    file: Any
    offset: list[int]
    shape: list[int]


class Stored:
    """A tensor on disk. `stored[region]`, a slice with both bounds for every dimension, reads that
    part of it and nothing else; `stored[...]` reads all. What was opened stays readable though its
    files be removed."""

    def __init__(self, name: str, parts: list[StoredPart]) -> None:
        self.name = name
        self.parts = parts
        ends = [map(operator.add, part.offset, part.shape) for part in parts]
        self.shape = torch.Size(map(max, zip(*ends, strict=True)))

    def __getitem__(self, region: tuple[slice, ...] | EllipsisType) -> Tensor:
        if isinstance(region, EllipsisType):
            region = tuple(slice(0, size) for size in self.shape)
        # An empty slice has the type of the numbers, and costs no reading.
        empty = self.parts[0].file.get_slice(self.name)[:0]
        found = empty.new_empty([side.stop - side.start for side in region])
        # The parts of a full tensor do not overlap, so their sizes add up to the region's.
        filled = 0
        for part in self.parts:
            common = overlap(region, part)
            if all(side.start < side.stop for side in common):
                values = part.file.get_slice(self.name)[shifted(common, part.offset)]
                found[shifted(common, [side.start for side in region])] = values
                filled += values.numel()
        if filled != found.numel():
            raise DamagedCheckpoint(f"the parts of {self.name} are not all there")
        return found


def overlap(region: tuple[slice, ...], part: StoredPart) -> list[slice]:
    """Returns what a region and a part of a tensor have in common, along each dimension; empty
    slices where that is nothing."""
    return [
        slice(max(side.start, first), min(side.stop, first + size))
        for side, first, size in zip(region, part.offset, part.shape, strict=True)
    ]


def shifted(region: Iterable[slice], origin: Iterable[int]) -> tuple[slice, ...]:
    """Returns a region counted from another origin."""
    sides = zip(region, origin, strict=True)
    return tuple(slice(side.start - first, side.stop - first) for side, first in sides)


def save_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """Writes contiguous tensors of the CPU to one file. Raises OSError or SafetensorError where the
    disk refuses."""
    offsets = {name: {"saved_offsets": part.offset} for name, part in parts.items()}
    # Where all begin with the first number, as whole tensors do, the header says nothing.
    has_parts = any(any(part.offset) for part in parts.values())
    metadata = None
    if has_parts:
        metadata = {SHARDING: json.dumps(offsets)}
    save_file({name: part.values for name, part in parts.items()}, path, metadata)
    open_as_its_folder(path)


def open_as_its_folder(path: Path) -> None:
    """Lets those who may read a folder read a file in it: safetensors makes files that nobody but
    their owner may read, whatever the umask, and runs are shared."""
    path.chmod(path.parent.stat().st_mode & 0o666)


class Beginning(TypedDict):
    """Where a part begins in its full tensor."""

    saved_offsets: list[int]


def open_tensors(files: Iterable[Path]) -> dict[str, Any]:
    """Returns the tensors of some files by name: a number as a tensor, any other as `Stored`.
    Raises OSError, SafetensorError, KeyError or ValueError where a file is missing or is not what
    `save_parts` wrote."""
    # A tensor may lie in several files, each of which says where its part begins.
    parts: dict[str, list[StoredPart]] = {}
    for path in files:
        file = safe_open(path, "pt")
        offsets = parse_json(
            (file.metadata() or {}).get(SHARDING, "{}"), dict[str, Beginning], f"{path}'s header"
        )
        for name in file.keys():  # noqa: SIM118 - no mapping
            shape = file.get_slice(name).get_shape()
            offset = [0] * len(shape)
            if offsets:
                offset = offsets[name]["saved_offsets"]
            parts.setdefault(name, []).append(StoredPart(file, offset, shape))
    tensors: dict[str, Any] = {}
    for name, found in parts.items():
        if found[0].shape:
            tensors[name] = Stored(name, found)
        else:
            tensors[name] = found[0].file.get_tensor(name).clone()
    return tensors


def file_of(group: str, rank: int, world: int) -> str:
    """Returns the name of a process's file of a group of tensors."""
    if world == 1:
        return f"{group}.safetensors"
    return f"{group}-{rank + 1:05d}-of-{world:05d}.safetensors"


def files_of(group: str, names: Iterable[str]) -> list[str]:
    """Returns those of some names that are files of a group."""
    pattern = re.compile(rf"{group}(-\d+-of-\d+)?\.safetensors")
    return sorted(filter(pattern.fullmatch, names))


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns the checkpoints of a run by their steps, oldest first; partial ones, and what else
    lies there, are none. Raises OSError for a folder that cannot be read."""
    # Listed rather than globbed: a folder that cannot be read must not look like one without any.
    folder = run / "checkpoints"
    names = []
    if os.path.lexists(folder):
        names = os.listdir(folder)
    steps = {name.removeprefix("step_"): name for name in names if name.startswith("step_")}
    numbers = sorted(filter(str.isdecimal, steps), key=int)
    return {int(step): folder / steps[step] for step in numbers}


def checkpoint_path(run: str | Path, step: int | None = None) -> Path:
    """Returns the folder of a run's checkpoint; `step=None` means the newest. Raises ValueError
    where there is none."""
    found = checkpoints(Path(run))
    if os.path.isdir(run) and not os.access(run, os.R_OK | os.X_OK):
        raise ValueError(f"run={run} cannot be read (Permission denied); get the right to read it")
    if not found:
        raise ValueError(f"run={run} has no checkpoints; name the folder of a run that was trained")
    if step is not None and step not in found:
        raise ValueError(
            f"step={step} is not among the checkpoints of {run}; it has"
            f" {', '.join(map(str, found))}"
        )
    if step is None:
        step = max(found)
    return found[step]


def describe(file: Path) -> tuple[int, str]:
    """Returns the size in bytes and the sha256 of a file. Raises OSError or DamagedFile where it
    cannot be read."""
    with open_regular(file) as stream:
        return os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(state: Mapping[str, Any]) -> str:
    """Returns the sha256 of plain values, as JSON holds them."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@dataclass
class Checkpoint:
    """The content of a checkpoint: tensors by file and name, not read yet (`Stored`), and plain
    values."""

    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]
    path: Path
    checksum: str  # of the state, and so of every file

    @property
    def step(self) -> int:
        """Returns the optimiser steps done when it was made."""
        return self.state["step"]


def open_checkpoint(
    path: Path, only: Collection[str] = TENSORS, layout: Layout | None = None
) -> Checkpoint:
    """Opens a checkpoint whose files are verified: those of the groups of tensors that are asked
    for, each process some of them, and all that hold no tensors, as the tokenizer's do.

    Args:
        path: its folder
        only: groups of tensors, of TENSORS
        layout: of the processes that open it together; by default this process alone

    Raises:
        DamagedCheckpoint: on all processes, where a file is missing, cut, changed or of another
            kind
    """
    layout = layout or Layout()
    state = together(layout, lambda: verified_state(path, only, layout))
    if path.name != f"step_{state.get('step')!s:0>8}":
        raise DamagedCheckpoint(f"it is of step {state.get('step')}")
    tensors = together(layout, lambda: open_groups(path, only, state["files"]))
    del state["files"]
    return Checkpoint(tensors, state, path, state.pop("checksum"))


def verified_state(path: Path, only: Collection[str], layout: Layout) -> dict[str, Any]:
    """Returns the state of a checkpoint after this process has verified its part of the files.
    Raises ValueError or OSError where one is damaged."""
    state = read_state(path)
    files = check(state.get("files"), dict[str, tuple[int, str]], path / "state.json")
    wanted = {name for name in files if not name.endswith(".safetensors")}
    for group in only:
        wanted.update(files_of(group, files))
    # Each process reads some of the files: a checksum costs as much as loading.
    for name in sorted(wanted)[layout.rank :: layout.world]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedCheckpoint(f"{name} lies outside it")
        if files[name] != describe(path / name):
            raise DamagedCheckpoint(f"{name} does not match its size or checksum")
    return state


def open_groups(path: Path, only: Iterable[str], files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the tensors of some groups by group and name; `files` are those of the
    checkpoint."""
    names = list(files)
    return {group: open_tensors(path / name for name in files_of(group, names)) for group in only}


def read_state(path: Path) -> dict[str, Any]:
    """Returns the state of a checkpoint, its checksum included. Raises ValueError or OSError where
    it is damaged."""
    state = read_json(path / "state.json", dict[str, Any])
    signed = {key: value for key, value in state.items() if key != "checksum"}
    if state.get("checksum") != checksum(signed):
        raise DamagedCheckpoint("state.json does not match its checksum")
    return state


def together(layout: Layout, action: Callable[[], T]) -> T:
    """Returns the result of an action on this process. Raises DamagedCheckpoint on all processes
    where one of them finds damage."""
    result = None
    error = None
    try:
        result = action()
    except FileNotFoundError as missing:
        error = f"{Path(str(missing.filename)).name} is missing"
    except ValueError as damage:
        error = str(damage)
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as damage:
        # RecursionError is a RuntimeError, and so is what torch says of tensors that it cannot
        # take.
        error = " ".join(f"{type(damage).__name__}: {damage}".split())
    if error := layout.any_rank(error):
        raise DamagedCheckpoint(error)
    return result  # type: ignore[return-value]


def open_run(
    run: str | Path,
    step: int | None,
    only: Collection[str],
    layout: Layout | None = None,
    key: str = "step",
) -> Checkpoint:
    """Opens a checkpoint of a run that is not this process's own, by default the newest.

    Args:
        run: the run folder
        step: the checkpoint's; None means the newest
        only: groups of tensors
        layout: of the processes that open it together
        key: what the user gives the step by

    Raises:
        ValueError: there is none, or it is damaged or another run's; the message names the others
    """
    layout = layout or Layout()
    # The run may be under way, and the newest of one process may not be that of another.
    path = layout.any_rank(checkpoint_path(run, step))
    config = read_config(Path(run))
    try:
        saved = open_checkpoint(path, only, layout)
        if config:
            refuse_other_run(saved, asdict(config), PLACES)
        return saved
    except DamagedFile as error:
        others = [str(other) for other, place in checkpoints(Path(run)).items() if place != path]
        remedy = "it is the only one of the run"
        if others:
            remedy = f"choose another with {key}={' or '.join(others)}"
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None


def refuse_other_run(
    saved: Checkpoint, settings: Mapping[str, Any], found: Collection[str]
) -> None:
    """Raises OtherRun, with the keys that differ, where a checkpoint was made by a run of another
    identity than that of the settings. What the keys in `found` name may lie at another place."""
    theirs = check(saved.state.get("identity", {}), dict[str, Any], saved.path / "state.json")
    if changed := differing(theirs, settings, found):
        keys = [f"{name} {before} -> {now}" for name, (before, now) in changed.items()]
        raise OtherRun(f"it is of another run: {', '.join(keys)}")


def differing(
    identity: Mapping[str, Any], settings: Mapping[str, Any], found: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Returns (value there, value here) of each key in which settings differ from the identity of a
    checkpoint; of the keys in `found` paths do not count. A key that the identity lacks is newer
    than it, or read by neither."""
    changed = {}
    for name, theirs in identity.items():
        # Keys of another version may be mutable, or unknown, by now.
        if name not in KEYS or KEYS[name].metadata.get("mutable") is True:
            continue
        ours = lookup(settings, name)
        is_same = theirs == ours
        if name in found:
            is_same = without_places(theirs) == without_places(ours)
        if not is_same:
            changed[name] = (theirs, ours)
    return changed


def without_places(value: Any) -> Any:
    """Returns a key of PLACES without its paths: whether it is given, or the names in it, in their
    order, with their weights."""
    if not isinstance(value, Mapping):
        return value is not None
    weights = []
    for name, entry in value.items():
        weights.append((name, entry.get("weight") if isinstance(entry, Mapping) else None))
    return weights


def read_config(run: Path) -> Config | None:
    """Returns the configuration in a run's folder, None where there is no config.yaml; a key that
    it lacks is newer than the run, and has its default. Raises DamagedFile."""
    file = run / "config.yaml"
    try:
        plain = read_yaml(file, dict[str, Any])
    except FileNotFoundError:
        return None
    if missing := SECTIONS - plain.keys():
        raise DamagedFile(f"{file} is damaged (it lacks {', '.join(sorted(missing))})")
    return check(plain, Config, file)


def load(run: str | Path, step: int | None = None) -> GPT:
    """Returns the GPT of a run, on the CPU and in evaluation mode.

    Args:
        run: the run folder
        step: the checkpoint's; None means the newest

    Raises:
        ValueError: there is none, or it is damaged
    """
    saved = open_run(run, step, ("model",))
    try:
        config = check(saved.state.get("model"), GPTConfig, saved.path / "state.json")
        with torch.device("meta"):
            model = GPT(config)
        weights = {name: stored[...] for name, stored in saved.tensors["model"].items()}
        model.load_state_dict(weights, assign=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{saved.path} is damaged ({' '.join(str(error).split())}); choose another step of"
            " the run"
        ) from None
    return model.eval()
