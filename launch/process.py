"""What a process computes on, and how: device, precision, determinism."""

import contextlib
import ctypes
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch

from conf.schema import ParallelConfig
from launch.liveness import Liveness
from model.processes import Layout

# numbers that processes agree on stay on the CPU, and the device need not wait
BACKENDS = {
    "cpu": "gloo",
    "cuda": "cpu:gloo,cuda:nccl",
}
# How long a collective waits. A process may wait long for data being prepared, and the watchdog
# ends what waits too long.
PATIENCE = timedelta(days=7)

# Dense peak in bf16, FLOP/s, by a part of the device's name. An unknown device has none, and no MFU
# is better than a wrong one.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def choose_device(name: str) -> torch.device:
    """The device that `device=name` means. Raises ValueError for CUDA without CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but torch sees no CUDA device; use device=cpu or install the CUDA build"
            " of torch"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None
    )


@contextmanager
def processes(
    parallel: ParallelConfig, device: torch.device, layout: Layout, liveness: Liveness
) -> Iterator[None]:
    """The process group of a run, which completes its layout. Processes find each other by
    torchrun's variables, else by Slurm's; a run with `parallel=single` has no group. Raises
    ValueError for replicas without processes."""
    if parallel.name == "single":
        yield
        return
    replicas = parallel.replicas if parallel.name == "hsdp" else 1
    if layout.world < replicas:
        raise ValueError(
            f"parallel.replicas={replicas} with one process; start more, with torchrun"
            f" --nproc-per-node {replicas} or by srun"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.rendezvous import rendezvous

    liveness.report_phase("meeting the other processes")
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        # Slurm may show each task no device but its own
        torch.cuda.set_device(local % torch.cuda.device_count())
    rank, world = layout.rank, layout.world
    store: torch.distributed.Store = torch.distributed.HashStore()
    if world > 1 or "MASTER_ADDR" in os.environ:
        for name, value in meeting_point(os.environ).items():
            os.environ.setdefault(name, value)
        store, _, _ = next(rendezvous("env://", rank, world, timeout=PATIENCE))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = of_this_start(store, rank, world)
    torch.distributed.init_process_group(
        BACKENDS[device.type], store=store, rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        mesh = init_device_mesh(
            device.type, (replicas, layout.world // replicas), mesh_dim_names=("replica", "shard")
        )
        layout.mesh, layout.replicas = (
            mesh["shard"],
            mesh["replica"].get_group() if replicas > 1 else None,
        )
        layout.saving = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        layout.sync = parallel.sync
        yield
    finally:
        torch.distributed.destroy_process_group()


def of_this_start(store: torch.distributed.Store, rank: int, world: int) -> torch.distributed.Store:
    """A part of torchrun's store for this start alone: its agent keeps one store over all restarts,
    and addresses of processes that are gone would be taken for those of their successors. Nor do
    the agents of several nodes count restarts alike. So the main process names a part, and the
    others answer; a name that an earlier start left does not know who answers now."""
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


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes: torchrun's, else those of a Slurm
    step of several tasks, else (0, 1).

    A shell of `srun --pty` has the variables of a step of several tasks, too, but what is typed
    there is started once."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world in os.environ:
            if rank == "SLURM_PROCID" and typed_in_a_task():
                break
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def typed_in_a_task() -> bool:
    """Returns whether this process was started in an interactive shell of Slurm's: it has a
    terminal, and is not the task itself."""
    has_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    return has_terminal and os.environ.get("SLURM_TASK_PID") != str(os.getpid())


def refuse_copies(parallel: ParallelConfig) -> None:
    """Raises ValueError where several processes would each train the same run."""
    started = rank_and_world()[1]
    if parallel.name == "single" and started > 1:
        raise ValueError(
            f"parallel=single with {started} processes: each would train the same run; use"
            " parallel=fsdp or hsdp, or, if this is an interactive shell of several Slurm tasks,"
            " unset SLURM_STEP_NUM_TASKS"
        )


def meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the processes of a Slurm step meet: on the step's first node, at a port that other
    steps and jobs there do not use, below those that Linux gives to whoever asks for any."""
    nodes = environment.get(
        "SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost")
    )
    # each task of an array is a job of its own
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": str(20000 + (16 * job + step) % 12000),
    }


def num_processes(parallel: ParallelConfig) -> int:
    """Returns how many processes a run has, or the one that is planned for."""
    alone = parallel.name == "single"
    return parallel.processes or (1 if alone else rank_and_world()[1])


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
    except (ImportError, ValueError, IndexError):
        raise ValueError(
            f"SLURM_STEP_NODELIST={nodes}, and neither scontrol nor submitit is here to say which"
            " node is the first; set MASTER_ADDR to it, or pip install submitit"
        ) from None


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bf16 by `auto` where the hardware multiplies bf16, on CUDA and
    on CPUs alike."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if supported else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """bf16 compute over fp32 weights; nothing for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16)


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Seeds torch (dropout, apart on every process; weights and data have generators of their own)
    and forbids nondeterministic kernels if asked. The main process has the seed itself, the others
    a hash: generators of CPUs look at the lower 32 bits of a seed only."""
    digest = hashlib.sha256(f"{seed}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1 if rank else seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed for the next step, where there is a glibc. By default
    it hands every tensor of megabytes back to the system, and a step on a CPU then spends a tenth
    of its time on being given zeroed pages again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: 2 GiB may lie free


def profiler(path: Path) -> torch.profiler.profile:
    """A started profiler that writes a trace of steps 5 to 8; call its step() after each, and
    stop() at the end."""
    schedule = torch.profiler.schedule(skip_first=3, wait=0, warmup=1, active=4, repeat=1)
    profile = torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda done: done.export_chrome_trace(str(path))
    )
    profile.start()
    return profile
