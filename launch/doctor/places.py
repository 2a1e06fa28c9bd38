"""Folders that are written, tokenizer files, the W&B account, and Slurm."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from conf.key import expand
from conf.schema import Config
from data.tokenizer import find_gpt2
from launch.doctor.finding import Finding
from launch.track.wandb_run import wandb_mode

GB = 1e9
# A checkpoint of 124M parameters with its moments has 1.5 GB, and three may lie there for a while.
LEAST_FREE = 5 * GB


def places(config: Config, runs: str) -> Iterator[Finding]:
    """Yields the findings on what lies around a run: disks, tokenizer, W&B and Slurm."""
    cache = Path(expand("data.cache", config.data.cache))
    yield folder("data.cache", cache)
    yield folder("dir", Path(runs).absolute())
    yield tokenizer(cache)
    yield wandb(config.tracking.mode)
    yield slurm()


def folder(subject: str, path: Path) -> Finding:
    """Returns the finding on a folder that is written: it, or the one it will be made in, takes
    files, has room, and has locks."""
    there = next(place for place in (path, *path.parents) if place.exists())
    shown = str(path) if there == path else f"{path} (to be made in {there})"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            locks = takes_locks(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding("failed", subject, f"{shown}: {error.strerror}", f"give {subject}=FOLDER")
    found = f"{shown}, {free / GB:,.0f} GB free"
    if free < LEAST_FREE:
        return Finding("warning", subject, found, "make room: a checkpoint may not fit")
    if not locks:
        return Finding("note", subject, f"{found}; it has no locks, so heartbeats take their place")
    return Finding("ok", subject, found)


def takes_locks(descriptor: int) -> bool:
    """Returns whether the file system of an open file has locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def tokenizer(cache: Path) -> Finding:
    """Returns the finding on GPT-2's ranks, which tokenizer=gpt2 otherwise fetches."""
    folders = [os.environ.get("TIKTOKEN_CACHE_DIR"), cache / "gpt2"]
    found = next((file for place in folders if place and (file := find_gpt2(Path(place)))), None)
    if found is None:
        return Finding(
            "note",
            "tokenizer",
            "tokenizer=gpt2 fetches its ranks from the network once",
            f"without one, put vocab.bpe into {cache / 'gpt2'}",
        )
    return Finding("ok", "tokenizer", f"GPT-2's ranks are in {found}")


def wandb(mode: str) -> Finding:
    """Returns the finding on what tracking.mode comes to, as W&B itself decides."""
    found, why = wandb_mode(mode)
    verdict = "ok" if found == "online" else "note"
    return Finding(verdict, "wandb", f"tracking.mode={mode} is {found}: {why}")


def slurm() -> Finding:
    """Returns the finding on Slurm: its partitions, and submitit, which submits to them."""
    if not shutil.which("sbatch"):
        return Finding("note", "slurm", "none here; sweeps run with hydra/launcher=local")
    try:
        shown = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %a %l %D nodes %G"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("warning", "slurm", f"sinfo fails: {error}", "ask who runs the cluster")
    found = "; ".join(" ".join(line.split()) for line in shown.splitlines())
    if not find_spec("submitit"):
        return Finding(
            "warning",
            "slurm",
            f"{found}; submitit is missing",
            "pip install -c constraints.txt -e '.[slurm]'",
        )
    return Finding("ok", "slurm", found)
