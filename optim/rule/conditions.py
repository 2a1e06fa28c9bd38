"""The conditions under which a pass runs: the random stream, the buffers and the precision.

All passes of a step over a batch see the same dropout masks and leave the same buffers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.device import has_fast_products, ieee_products


def random_state(device: torch.device | None = None) -> dict[str, Tensor]:
    """Returns the states of torch's generators by device, CUDA's where it is in use: to ask for it
    elsewhere would take memory of a device that nothing else takes.

    Args:
        device: where the passes run; by default the current one, which is called "cuda"
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        # Every CUDA device has a generator of its own, and a model need not lie on the current one.
        name = "cuda"
        if device is not None and device.type == "cuda":
            name = str(device)
        state[name] = torch.cuda.get_rng_state(name)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restores what `random_state` returned; a state of a device that is not here is left alone."""
    for device, generator_state in state.items():
        if device == "cpu":
            torch.set_rng_state(generator_state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(generator_state, device)


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
    with ieee_products(), torch.autocast(device.type, enabled=False):
        yield


def rounds(device: torch.device) -> bool:
    """Returns whether matrix products on a device keep less than IEEE fp32, by autocast or TF32."""
    return torch.is_autocast_enabled(device.type) or has_fast_products(device)


@contextmanager
def same_masks(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Makes dropout draw the same masks in every precision. On CUDA attention's fused kernels draw
    theirs each in its own way, compiled blocks in yet another, and nn.Dropout by the width of its
    numbers."""
    drops = [
        owner
        for owner in module.modules()
        if isinstance(owner, nn.Dropout) and owner.training and owner.p > 0
    ]
    if not drops or device.type != "cuda":
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # A compiled graph is not made anew for another kernel: the blocks run eagerly meanwhile.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for owner in drops:
            stack.enter_context(drawn_in_fp32(owner))
        yield


@contextmanager
def drawn_in_fp32(dropout: nn.Dropout) -> Iterator[None]:
    """Draws a mask as for fp32 or wider: eight numbers of bf16 share what four of fp32 do."""
    forward = dropout.forward

    def in_fp32(x: Tensor) -> Tensor:
        return forward(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    dropout.forward = in_fp32  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del dropout.forward
