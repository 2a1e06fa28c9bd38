"""What processes show each other while they run, and what is read off it."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import torch

from model.processes import Layout

Beat = dict[str, Any]  # a heartbeat, as the file holds it


class Heartbeat(TypedDict):
    """What a heartbeat must hold where it is read."""

    host: str
    pid: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
    phase: str
    step: int
    overdue: bool
    progress_count: int
    time: float


class Failure(TypedDict):
    """What ends a run, as failure.json holds it."""

    by: int
    code: int
    line: str


def meeting_place(folder: Path) -> Path | None:
    """Returns where the tasks of a Slurm step show themselves until they have met: beside the run
    folder, or what there is of its path.

    Other processes than tasks were started by torchrun or a sweep on this machine, which notice by
    themselves that one died."""
    if "RANK" in os.environ or "SLURM_JOB_ID" not in os.environ:
        return None
    parent = next(parent for parent in folder.absolute().parents if parent.is_dir())
    start = "-".join(
        os.environ.get(name, "0")
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    return parent / f".{folder.name}.meeting_{start}"


def missing_tasks(layout: Layout) -> list[int]:
    """Returns the ranks of a Slurm step on one host that have no process there; none where that
    cannot be known."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    if "," in nodes or "[" in nodes:
        return []
    step = tuple(os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    ranks = {}  # by process
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or it has ended meanwhile
            variables = dict(
                entry.partition("=")[::2]
                for entry in file.read_bytes().decode(errors="replace").split("\0")
            )
            if tuple(variables.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")) == step:
                ranks[file.parent.name] = variables.get("SLURM_PROCID")
    # In a container of its own a task does not see the others, nor itself under the number that
    # Slurm knows.
    own = ranks.get(os.environ.get("SLURM_TASK_PID", str(os.getpid())))
    if own != str(layout.rank):
        return []
    return [rank for rank in range(layout.world) if str(rank) not in ranks.values()]


def lost_contact(error: Exception) -> bool:
    """Returns whether a collective failed, as it does where another process is gone. gloo's errors
    have no type of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def has_died(seen: Beat) -> bool:
    """Returns whether a process of this host is no more."""
    if seen["host"] == socket.gethostname():
        try:
            os.kill(seen["pid"], 0)
        except (ProcessLookupError, PermissionError):  # its number may be another user's by now
            return True
    return False


def names(beats: dict[int, Beat], ranks: list[int]) -> str:
    """Returns ranks with what they were last seen doing."""
    known = {
        rank: "{host}, process {pid}, {phase} at step {step}".format(**seen)
        for rank, seen in beats.items()
    }
    return " and ".join(f"rank {rank} ({known.get(rank, 'never seen')})" for rank in ranks)
