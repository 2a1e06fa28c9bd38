"""The conditions under which a pass runs: the random stream, the buffers and the precision.

All passes of a step over a batch see the same dropout masks and leave the same buffers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def random_state() -> dict[str, Tensor]:
    """Returns the states of torch's generators, CUDA's where it is in use: to ask for it elsewhere
    would take memory of a device that nothing else takes."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restores what `random_state` returned; a state of a device that is not here is left alone."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def same_buffers(module: nn.Module) -> Iterator[None]:
    """Puts the buffers (running statistics and their like) back as they were: only the clean pass
    of a step may update them."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in kept:
                buffer.copy_(copy)


@contextmanager
def ieee_fp32(device: torch.device) -> Iterator[None]:
    """Runs passes in IEEE fp32: no autocast, no TF32."""
    # Both switches are the process's own, so that they must be as they were afterwards.
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def rounds(device: torch.device) -> bool:
    """Returns whether matrix products on a device keep less than IEEE fp32, by autocast or TF32."""
    return (
        torch.is_autocast_enabled(device.type) or torch.get_float32_matmul_precision() != "highest"
    )


def same_masks(module: nn.Module, device: torch.device) -> AbstractContextManager:
    """Makes dropout draw the same masks in every precision: attention's fused kernels on CUDA draw
    theirs each in its own way."""
    drops = any(
        isinstance(owner, nn.Dropout) and owner.training and owner.p > 0
        for owner in module.modules()
    )
    if drops and device.type == "cuda":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
