"""The examination of a machine by one process, or by several together."""

import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from conf.cli import parse
from conf.key import key
from conf.ranks import rank_and_world
from launch.config import compose
from launch.doctor.finding import Finding, show
from launch.doctor.hardware import hardware
from launch.doctor.places import places
from launch.doctor.self_check import check_compiler, check_gradients
from launch.doctor.several import check_all_reduce, gather, local_device, process_group


@dataclass
class Options:
    """Looks whether this machine can run flatgpt, and says a line a subject: a verdict (ok, note,
    warning, failed), what was found, and what to do about it. It needs no network, leaves no file
    behind, and takes up to half a minute a device; the exit code is 1 where something failed.

    python -m launch.doctor
    python -m launch.doctor dir=/scratch/me/runs data.cache=/scratch/me/cache
    torchrun --nproc-per-node 8 -m launch.doctor
    """

    dir: str = key("runs", "folder that runs are written to", path=True)


def examine(arguments: list[str], found: list[Finding]) -> list[Finding]:
    """Prints the findings on this machine, and returns them; of several processes the main one
    prints.

    Args:
        arguments: words of the command line
        found: what is known already
    """
    # `parse` would print the help where nothing is given.
    options, overrides = parse(Options, arguments or ["dir=runs"], ("data", "tracking"))
    config = compose(overrides)
    rank, world = rank_and_world()
    around = [*hardware(), *places(config, options.dir)]
    if world == 1:
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        checks = (self_check(device) for device in devices or [torch.device("cpu")])
        return show(found + around, *checks)
    device = local_device()
    with process_group(rank, world, device):
        own = [*found, *around, *self_check(device)]
        own += guarded("all-reduce", lambda: [check_all_reduce(rank, world, device)])
        gathered = gather(own, world, socket.gethostname())
    return show(gathered) if rank == 0 else gathered


def self_check(device: torch.device) -> Iterator[Finding]:
    """Yields what a device computes beside what it should."""
    yield from guarded(f"{device}", lambda: check_gradients(device))
    # compile=auto compiles on CUDA only.
    if device.type == "cuda":
        yield from guarded(f"{device}", lambda: [check_compiler(device)])


def guarded(subject: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yields the findings of a check; an error of the device is one more."""
    try:
        yield from check()
    except RuntimeError as error:  # CUDA, NCCL and gloo raise it, and out of memory is one
        line = str(error).strip().splitlines()[0]
        yield Finding("failed", subject, line, "nvidia-smi and dmesg tell more")
