"""The device of a process, its precision, and its determinism."""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

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
    """Returns the device that `device=name` means. Raises ValueError for CUDA without CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but torch sees no CUDA device; use device=cpu or install the CUDA build"
            " of torch"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 FLOP/s of a known device, None of another."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None
    )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of matrix products: bf16 by `auto` where the hardware multiplies bf16, on
    CUDA and on CPUs alike."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    # Of CPUs, those with instructions for it: the others only emulate bf16.
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if supported else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Returns the context of bf16 products over fp32 weights; for fp32 it does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16)


def missing_for_kernels() -> list[str]:
    """Returns what Triton needs to build a kernel for CUDA and this machine lacks: Triton itself,
    a C compiler and Python's headers, with which it builds the code that launches a kernel."""
    missing = []
    if find_spec("triton") is None:
        missing.append("triton")
    # Triton takes what CC names without a look at others.
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        missing.append("C compiler")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python.h")
    return missing


def float32_switches() -> list[Any]:
    """Returns where torch keeps the precision of fp32 operations, one place for each kind."""
    backends: Any = torch.backends
    return [
        backends.cuda.matmul,
        backends.mkldnn.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
    ]


def has_fast_products(device: torch.device) -> bool:
    """Returns whether products of fp32 matrices on a device keep less than fp32: TF32, of 10 bits,
    or bf16."""
    on_cuda, on_cpu, *_ = float32_switches()
    switch = on_cpu
    if device.type == "cuda":
        switch = on_cuda
    # torch.get_float32_matmul_precision raises where a caller chose TF32 by `fp32_precision`.
    return switch.fp32_precision in ("tf32", "bf16")


@contextmanager
def ieee_products() -> Iterator[None]:
    """Takes products and convolutions of fp32 in fp32, on CUDA without TF32. The switches are the
    process's own, and are as they were afterwards, whichever of torch's two ways they were set
    in."""
    switches = float32_switches()
    before = [switch.fp32_precision for switch in switches]
    precision = legacy(torch.get_float32_matmul_precision)
    cudnn = legacy(lambda: torch.backends.cudnn.allow_tf32)
    # The old way sets both: torch's compiler reads it, and refuses where the two differ.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def legacy(switch: Callable[[], T]) -> T | None:
    """Returns a switch that torch reads in the old way; None where it was set in the new one."""
    try:
        return switch()
    except RuntimeError:
        return None


def set_up_process(seed: int, rank: int, deterministic: bool, device: torch.device) -> None:
    """Prepares this process to compute: its random state, and on CPUs its memory."""
    seed_everything(seed, rank, deterministic)
    if device.type == "cpu":
        keep_freed_memory()


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Seeds torch (dropout, apart on every process; weights and data have generators of their own)
    and forbids nondeterministic kernels if asked. The main process has the seed itself, the others
    a hash: generators of CPUs look at the lower 32 bits of a seed only."""
    # Dropout must differ between processes, which have different parts of the batch.
    digest = hashlib.sha256(f"{seed}/{rank}".encode()).digest()
    own_seed = seed
    if rank:
        own_seed = int.from_bytes(digest[:8], "little") >> 1
    torch.manual_seed(own_seed)
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


@contextmanager
def profiled(path: Path | None) -> Iterator[Callable[[], None]]:
    """Writes a trace of steps 5 to 8 to a file; without one it does nothing. Gives what to call
    after each step."""
    if path is None:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(skip_first=3, wait=0, warmup=1, active=4, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda done: done.export_chrome_trace(str(path))
    ) as profile:
        yield profile.step
