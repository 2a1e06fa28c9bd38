"""Processor, devices, the compile toolchain, and what connects several devices."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from launch.doctor.finding import Finding
from model.device import choose_precision, missing_for_kernels, peak_flops

GIB = 2**30
# Less free memory than this share of a device: something else is on it.
SHARE_FREE = 0.9
# NCCL's ring buffers between the processes of a node lie in shared memory.
LEAST_SHARED_MEMORY = GIB


def hardware() -> Iterator[Finding]:
    """Yields the findings on everything that computes."""
    yield processor()
    if not torch.cuda.is_available():
        yield without_cuda()
        return
    for index in range(torch.cuda.device_count()):
        yield device(index)
    yield toolchain()
    yield nccl()
    if torch.cuda.device_count() > 1:
        yield peers(torch.cuda.device_count())
        yield shared_memory(Path("/dev/shm"))


def processor() -> Finding:
    """Returns the finding on the CPUs: cores that this process may use, memory, instructions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    dtype = str(choose_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    found = f"{cores} cores, {memory:.0f} GiB, {torch.backends.cpu.get_cpu_capability()}"
    return Finding("ok", "cpu", f"{found}; precision=auto computes in {dtype}")


def without_cuda() -> Finding:
    """Returns the finding where torch sees no CUDA device: that there is none, or why not."""
    has_driver = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")
    if not has_driver:
        return Finding("note", "devices", "no CUDA device; runs go to the CPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding(
            "warning",
            "devices",
            f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides all devices",
            "unset it",
        )
    if torch.version.cuda is None:
        return Finding(
            "failed",
            "devices",
            f"there is an NVIDIA driver, but torch {torch.__version__} is built for CPUs",
            "pip install -c constraints.txt 'torch===2.13.0' installs the CUDA build",
        )
    return Finding(
        "failed",
        "devices",
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device of the driver",
        "nvidia-smi shows the driver's version: CUDA of the same major version needs one as new",
    )


def device(index: int) -> Finding:
    """Returns the finding on a CUDA device: name, free memory, bf16, known peak."""
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found = (
        f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {free / GIB:.1f} of"
        f" {total / GIB:.1f} GiB free, {'bf16' if has_bf16 else 'no bf16'}"
    )
    subject = f"cuda:{index}"
    if free < SHARE_FREE * total:
        return Finding("warning", subject, found, "nvidia-smi shows what else is on it")
    if peak_flops(torch.device("cuda", index)) is None:
        return Finding("note", subject, f"{found}; its peak is unknown, so perf/mfu is not logged")
    return Finding("ok", subject, found)


def toolchain() -> Finding:
    """Returns the finding on what torch.compile needs for CUDA: Triton, a C compiler and Python's
    headers."""
    missing = missing_for_kernels()
    if missing:
        return Finding(
            "warning",
            "toolchain",
            f"{', '.join(missing)} missing, which torch.compile needs",
            "install it (gcc, python3-dev); without it a run is eager, which is slower",
        )
    return Finding("ok", "toolchain", "Triton, a C compiler and Python.h are there")


def nccl() -> Finding:
    """Returns the finding on NCCL and on the network between nodes."""
    if not torch.distributed.is_nccl_available():
        return Finding("warning", "nccl", "this torch has none", "parallel=fsdp needs it on CUDA")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    infiniband = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    network = f"InfiniBand {', '.join(infiniband)}" if infiniband else "no InfiniBand"
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NCCL_")]
    return Finding("ok", "nccl", ", ".join([version, network, *settings]))


def peers(count: int) -> Finding:
    """Returns the finding on what connects the devices of this node."""
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    reached = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
    found = f"{reached} of {len(pairs)} pairs of devices reach each other's memory, {links()}"
    if reached < len(pairs):
        return Finding("note", "interconnect", f"{found}; the others go through the host's memory")
    return Finding("ok", "interconnect", found)


def links() -> str:
    """Returns whether nvidia-smi shows NVLink between devices."""
    try:
        shown = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "links unknown (nvidia-smi does not answer)"
    # A cell NV4 stands for four NVLinks between two devices.
    found = sorted({cell for cell in shown.split() if cell[:2] == "NV" and cell[2:].isdigit()})
    return f"NVLink ({', '.join(found)})" if found else "no NVLink"


def shared_memory(path: Path) -> Finding:
    """Returns the finding on the shared memory through which processes of a node exchange."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding("warning", "shared memory", f"{path}: {error.strerror}")
    found = f"{free / GIB:.1f} GiB free in {path}"
    if free < LEAST_SHARED_MEMORY:
        return Finding("warning", "shared memory", found, "start the container with --shm-size=8g")
    return Finding("ok", "shared memory", found)
