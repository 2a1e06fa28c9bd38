"""Moving the weights, and putting them back: `moved` is the only code that changes weights between
two optimiser steps.

All of it works on fp32 (or wider) weights in place, so that addresses never change, and restores by
copy: adding and subtracting again would leave rounding errors behind. Tensors are taken block by
block, so that what is touched twice is still in the cache."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.sharding import is_sharded, local, reshard, summed

BLOCK = {"cpu": 2**20}  # numbers that are worked on at once; on CUDA a kernel takes a whole tensor


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretches of tensors of one shape, contiguous ones as flat views."""
    size = BLOCK.get(tensors[0].device.type)
    if (
        size is None
        or tensors[0].numel() <= size
        or not all(tensor.is_contiguous() for tensor in tensors)
    ):
        yield tensors
    else:
        yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The global Euclidean norm, accumulated in fp32 or the tensors' dtype, whichever is wider; 0
    for none."""
    if not tensors:
        return torch.zeros(())
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors], 2, wide)).norm()
    return summed(total.square(), tensors).sqrt() if is_sharded(tensors[0]) else total


def dot(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The global inner product, accumulated as `norm` does; 0 for none."""
    if not ones:
        return torch.zeros(())
    pairs = (
        (local(one).reshape(-1), local(other).reshape(-1))
        for one, other in zip(ones, others, strict=True)
    )
    return summed(torch.stack([torch.dot(one, other) for one, other in pairs]).sum(), ones)


@contextmanager
def moved(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: float,
    module: nn.Module | None = None,
) -> Iterator[list[Tensor]]:
    """Adds scale * d to each parameter in place and yields copies of the parameters before;
    afterwards, whatever happens meanwhile, copies them back. Gradients play no part in that, so a
    parameter that gets none is restored as well. Of sharded parameters the shards are copied and
    moved; their `module` lets go of what it has gathered before either."""
    reshard(module)
    saved = [torch.empty_like(local(parameter)) for parameter in parameters]
    done: list[tuple[Tensor, Tensor]] = []
    direction = d = None  # where nothing moves
    try:
        with torch.no_grad():
            for parameter, copy, direction in zip(parameters, saved, directions, strict=True):
                for w, kept, d in blocks(local(parameter), copy, local(direction)):
                    kept.copy_(w)
                    done.append((w, kept))
                    w.add_(d, alpha=scale)
            del directions, direction, d  # the caller may let go of them
        # autocast keeps casts of the weights, and looks at addresses only
        torch.clear_autocast_cache()
        yield saved
    finally:
        reshard(module)
        with torch.no_grad():
            for w, kept in done:
                w.copy_(kept)
        torch.clear_autocast_cache()


@torch.no_grad()
def move_on(
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: float,
    module: nn.Module | None = None,
) -> None:
    """Within `moved`, which yielded `saved`: moves to another point, saved + scale * d, which
    spares the way back between the two."""
    reshard(module)
    for parameter, copy, direction in zip(parameters, saved, directions, strict=True):
        torch.add(copy, local(direction), alpha=scale, out=local(parameter))
    torch.clear_autocast_cache()


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
    """Passes in IEEE fp32: no autocast, no TF32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def rounds(device: torch.device) -> bool:
    """Whether matrix products on a device keep less than IEEE fp32, by autocast or TF32."""
    return (
        torch.is_autocast_enabled(device.type) or torch.get_float32_matmul_precision() != "highest"
    )


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators, CUDA's where it is in use: asking for it would take memory
    of a device that nobody else does."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """The inverse of `random_state`; a state of a device that is not here is left alone."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Realised(NamedTuple):
    """What the passes see of a move: its norm, its inner product and its cosine with the move of
    the weights as they are stored, and the |e|^2 of that one, of every parameter."""

    norm: float
    product: float
    cosine: float
    squares: list[float]


def realised(
    parameters: Sequence[Tensor], saved: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> Realised:
    """Returns what became of a move where each parameter is rounded to a dtype before it is
    used."""
    sums = []
    for now, before, dtype in zip(parameters, saved, dtypes, strict=True):
        total = torch.zeros(3, dtype=torch.float64, device=now.device)
        for w, kept in blocks(local(now), before):
            intended = w - kept
            seen = w.to(dtype).to(w.dtype) - kept.to(dtype).to(w.dtype)
            total += torch.stack(
                [seen.square().sum(), intended.square().sum(), (seen * intended).sum()]
            )
        sums.append(total)
    found = summed(torch.stack(sums), parameters)
    seen_squared, intended_squared, product = found.sum(0).tolist()
    cosine = product / max(math.sqrt(seen_squared * intended_squared), 1e-300)
    return Realised(math.sqrt(seen_squared), product, cosine, found[:, 1].tolist())


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take on a device: what is free there and what torch holds
    unused; on CPUs within the cgroup's limit."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    free = next(
        (
            1024 * int(line.split()[1])
            for line in read("/proc/meminfo").splitlines()
            if line.startswith("MemAvailable:")
        ),
        free,
    )
    limit, used = (read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def read(path: str) -> str:
    """The text of a file, empty where there is none."""
    return Path(path).read_text() if Path(path).exists() else ""
