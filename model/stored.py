"""Tensors in safetensors files: each whole in one file, or in parts over the files of several processes.

The header of a file of parts says where in the full tensors they begin, in the words of torch.distributed.checkpoint, whose
HuggingFaceStorageReader reads these folders too:

    DCP_SHARDING_INFO = {"<name>": {"saved_offsets": [first row, first column, ...]}, ...}

Its writer builds a whole file in memory before it writes and names files by no group, and planning a load costs more than the few lines here.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARDING = "DCP_SHARDING_INFO"


class Part(NamedTuple):
    """A part of a tensor, and the indices of its first number in the full one."""

    values: Tensor
    offset: tuple[int, ...]


class StoredPart(NamedTuple):
    """The same on disk."""

    file: Any
    offset: list[int]
    shape: list[int]


class Stored:
    """A tensor on disk. `stored[region]`, a slice with both bounds for every dimension, reads that part of it and nothing else;
    `stored[...]` reads all. What was opened stays readable though its files be removed."""

    def __init__(self, name: str, parts: list[StoredPart]) -> None:
        self.name, self.parts = name, parts
        ends = [[first + size for first, size in zip(part.offset, part.shape, strict=True)] for part in parts]
        self.shape = torch.Size(map(max, zip(*ends, strict=True)))

    def __getitem__(self, region: tuple[slice, ...] | EllipsisType) -> Tensor:
        wanted = tuple(slice(0, size) for size in self.shape) if isinstance(region, EllipsisType) else region
        found = self.parts[0].file.get_slice(self.name)[:0].new_empty([side.stop - side.start for side in wanted])
        filled = 0
        for file, offset, shape in self.parts:
            common = [slice(max(side.start, first), min(side.stop, first + size)) for side, first, size in zip(wanted, offset, shape, strict=True)]
            if all(side.start < side.stop for side in common):
                values = file.get_slice(self.name)[tuple(within(side, first) for side, first in zip(common, offset, strict=True))]
                found[tuple(within(side, other.start) for side, other in zip(common, wanted, strict=True))] = values
                filled += values.numel()
        assert filled == found.numel(), f"the parts of {self.name} are not all there"
        return found


def within(side: slice, first: int) -> slice:
    """A slice counted from `first`."""
    return slice(side.start - first, side.stop - first)


def save_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """Writes contiguous tensors of the CPU to one file. Raises OSError or SafetensorError where the disk refuses."""
    offsets = {name: {"saved_offsets": part.offset} for name, part in parts.items()}
    partial = any(any(part.offset) for part in parts.values())  # else they begin where whole tensors do
    save_file({name: part.values for name, part in parts.items()}, path, {SHARDING: json.dumps(offsets)} if partial else None)


def open_tensors(files: Iterable[Path]) -> dict[str, Any]:
    """The tensors of some files by name: a number as a tensor, any other as `Stored`. Raises OSError, SafetensorError, KeyError or
    ValueError where a file is missing or is not what `save_parts` wrote."""
    parts: dict[str, list[StoredPart]] = {}
    for path in files:
        file = safe_open(path, "pt")
        offsets = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
        for name in file.keys():  # noqa: SIM118 - no mapping
            shape = file.get_slice(name).get_shape()
            parts.setdefault(name, []).append(StoredPart(file, offsets[name]["saved_offsets"] if offsets else [0] * len(shape), shape))
    return {name: Stored(name, found) if found[0].shape else found[0].file.get_tensor(name).clone() for name, found in parts.items()}


def file_of(group: str, rank: int, world: int) -> str:
    """The name of a process's file of a group of tensors."""
    return f"{group}.safetensors" if world == 1 else f"{group}-{rank + 1:05d}-of-{world:05d}.safetensors"


def files_of(group: str, names: Iterable[str]) -> list[str]:
    """Those of some names that are files of a group."""
    return sorted(name for name in names if re.fullmatch(rf"{group}(-\d+-of-\d+)?\.safetensors", name))


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their steps, oldest first; partial ones, and what else lies there, are none."""
    found = {path.name.removeprefix("step_"): path for path in (run / "checkpoints").glob("step_*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def describe(file: Path) -> list:
    """[size in bytes, sha256] of a file."""
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
