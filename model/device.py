"""The device of a process, its precision, and its determinism."""

import contextlib
import ctypes
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

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
