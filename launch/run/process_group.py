"""The processes of a run: how they find each other, and the group that they form."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from uuid import uuid4

import torch

from conf.ranks import rank_and_world
from conf.schema import ParallelConfig
from launch.run.liveness import Liveness
from model.processes import Layout

# numbers that processes agree on stay on the CPU, and the device need not wait
BACKENDS = {
    "cpu": "gloo",
    "cuda": "cpu:gloo,cuda:nccl",
}

# How long a collective waits. A process may wait long for data being prepared, and the watchdog
# ends what waits too long.
PATIENCE = timedelta(days=7)


@contextmanager
def processes(
    parallel: ParallelConfig, device: torch.device, layout: Layout, liveness: Liveness
) -> Iterator[None]:
    """Makes the process group of a run, which completes its layout. Processes find each other by
    torchrun's variables, else by Slurm's; a run with `parallel=single` has no group. Raises
    ValueError for replicas without processes."""
    if parallel.name == "single":
        yield
        return
    replicas = 1
    if parallel.name == "hsdp":
        replicas = parallel.replicas
    if layout.world < replicas:
        raise ValueError(
            f"parallel.replicas={replicas} with one process; start more, with torchrun"
            f" --nproc-per-node {replicas} or by srun"
        )
    liveness.report_phase("meeting the other processes")
    if device.type == "cuda":
        torch.cuda.set_device(local_index())
    torch.distributed.init_process_group(
        BACKENDS[device.type],
        store=met(layout.rank, layout.world),
        rank=layout.rank,
        world_size=layout.world,
        timeout=PATIENCE,
    )
    try:
        complete(layout, replicas, device)
        layout.sync = parallel.sync
        yield
    except BaseException as error:
        # NCCL lets sums under way come to their end first. Mistakes are agreed upon, but any other
        # error is this process's alone, and the others may wait in a sum for it.
        if device.type != "cuda" or isinstance(error, ValueError):
            torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def local_index() -> int:
    """Returns which CUDA device of its node is this process's own."""
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    # Slurm may show each task no device but its own.
    return local % torch.cuda.device_count()


def complete(layout: Layout, replicas: int, device: torch.device) -> None:
    """Gives a layout the groups of its processes."""
    from torch.distributed.device_mesh import init_device_mesh

    # Rows are replicas, and the processes of a row share the shards of one copy of the model.
    sides = (replicas, layout.world // replicas)
    mesh = init_device_mesh(device.type, sides, mesh_dim_names=("replica", "shard"))
    layout.mesh = mesh["shard"]
    layout.replicas = mesh["replica"].get_group() if replicas > 1 else None
    # The thread that saves agrees over a group of its own, for its collectives would mix with those
    # of the main thread.
    layout.saving = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def met(rank: int, world: int) -> torch.distributed.Store:
    """Returns the store by which the processes of a run have met."""
    from torch.distributed.rendezvous import rendezvous

    # A process alone meets nobody, and needs no port.
    if world == 1 and "MASTER_ADDR" not in os.environ:
        return torch.distributed.HashStore()
    for name, value in meeting_point(os.environ).items():
        os.environ.setdefault(name, value)
    store, _, _ = next(rendezvous("env://", rank, world, timeout=PATIENCE))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return of_this_start(store, rank, world)
    return store


def of_this_start(store: torch.distributed.Store, rank: int, world: int) -> torch.distributed.Store:
    """Returns a part of torchrun's store for this start alone: its agent keeps one store over all
    restarts, and addresses of processes that are gone would be taken for those of their successors.
    Nor do the agents of several nodes count restarts alike. So the main process names a part, and
    the others answer; a name that an earlier start left does not know who answers now."""
    # Rank 0 names a part and waits until every other has written its own id there, then writes
    # down the ids that it has seen. Another rank takes the part in which its id is among them.
    mine = uuid4().hex
    if rank == 0:
        store.set("start", mine)
        store.set(
            f"{mine}/known",
            " ".join(store.get(f"{mine}/{other}").decode() for other in range(1, world)),
        )
        return torch.distributed.PrefixStore(mine, store)
    while True:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", mine)
        with contextlib.suppress(
            torch.distributed.DistStoreError
        ):  # another start's, or the others are not there yet
            store.wait([f"{name}/known"], timedelta(seconds=1))
            if mine in store.get(f"{name}/known").decode().split():
                return torch.distributed.PrefixStore(name, store)
        time.sleep(0.01)


def refuse_duplicate_training(parallel: ParallelConfig) -> None:
    """Raises ValueError where several processes would each train the same run."""
    started = rank_and_world()[1]
    if parallel.name == "single" and started > 1:
        raise ValueError(
            f"parallel=single with {started} processes: each would train the same run; use"
            " parallel=fsdp or hsdp, or, if this is an interactive shell of several Slurm tasks,"
            " unset SLURM_STEP_NUM_TASKS"
        )


def meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns where the processes of a Slurm step meet: on the step's first node, at a port that
    other steps and jobs there do not use, below those that Linux gives out by itself."""
    lists = (environment.get(f"SLURM_{part}_NODELIST") for part in ("STEP", "JOB"))
    nodes = next(filter(None, lists), "localhost")
    # each task of an array is a job of its own
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": str(20000 + (16 * job + step) % 12000),
    }


@cache
def first_host(nodes: str) -> str:
    """Returns the first of Slurm's list of nodes, as in gpu[003-005,7],login1. Raises ValueError
    where nobody can tell."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return listed.stdout.split()[0]
    # A container may lack Slurm's commands.
    try:
        from submitit.slurm.slurm import _parse_node_list

        return _parse_node_list(nodes)[0]
    except Exception as error:  # submitit's own is no ValueError
        or_install = ", or pip install submitit" if isinstance(error, ImportError) else ""
        raise ValueError(
            f"SLURM_STEP_NODELIST={nodes}, and neither scontrol nor submitit says which node is the"
            f" first; set MASTER_ADDR to it{or_install}"
        ) from None
