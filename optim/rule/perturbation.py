"""Moving the weights, and putting them back: `moved` is the only code that changes weights between
two optimiser steps.

All of it works on fp32 (or wider) weights in place, so that addresses never change, and restores by
copy: adding and subtracting again would leave rounding errors behind. Tensors are taken block by
block, so that what is touched twice is still in the cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.sharding import local, reshard
from optim.rule.tensors import blocks


@dataclass
class Move:
    """e = scale d, of the parameters that move.

    parameters    by name
    d             of each; let go of once the weights have moved
    n             n(d)
    scale         rho / n, with the direction's sign
    length        |e|, where it is logged"""

    parameters: dict[str, Tensor]
    d: list[Tensor]
    n: float
    scale: float
    length: float = 0.0


@contextmanager
def moved(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: float,
    module: nn.Module | None = None,
) -> Iterator[list[Tensor]]:
    """Adds scale * d to each parameter in place, and restores it afterwards, whatever happens
    meanwhile. Gradients play no part in that, so a parameter that gets none is restored as well.

    Args:
        parameters: the weights; of sharded ones the shards are moved
        directions: d of each; their list may be cleared inside, where the memory is wanted
        scale: their factor
        module: of sharded parameters, which lets go of what it has gathered before either move

    Yields:
        copies of the parameters as they were
    """
    reshard(module)
    saved = [torch.empty_like(local(parameter)) for parameter in parameters]
    # Noted piece by piece: an interrupt in the middle puts back exactly what has moved.
    done: list[tuple[Tensor, Tensor]] = []
    direction = d = None  # where nothing moves
    try:
        with torch.no_grad():
            for parameter, copy, direction in zip(parameters, saved, directions, strict=True):
                for w, kept, d in blocks(local(parameter), copy, local(direction)):
                    kept.copy_(w)
                    done.append((w, kept))
                    w.add_(d, alpha=scale)
            # The caller may let go of them.
            del directions, direction, d
        # Autocast keeps casts of the weights, and looks at addresses only.
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
    """Moves to another point, saved + scale * d, within `moved`, which yielded `saved`: that spares
    the way back between the two."""
    reshard(module)
    for parameter, copy, direction in zip(parameters, saved, directions, strict=True):
        torch.add(copy, local(direction), alpha=scale, out=local(parameter))
    torch.clear_autocast_cache()
