"""Norms and inner products of lists of tensors that may be sharded, and stretches of tensors."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.sharding import is_sharded, local, summed

BLOCK = {"cpu": 2**20}  # numbers that are worked on at once; on CUDA a kernel takes a whole tensor


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same stretches of tensors of one shape, contiguous ones as flat views."""
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
    """Returns the global Euclidean norm, accumulated in fp32 or the tensors' dtype, whichever is
    wider; 0 for none."""
    if not tensors:
        return torch.zeros(())
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors], 2, wide)).norm()
    # Squares add up over shards, norms do not.
    if is_sharded(tensors[0]):
        total = summed(total.square(), tensors).sqrt()
    return total


def dot(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Returns the global inner product, accumulated as `norm` does; 0 for none."""
    if not ones:
        return torch.zeros(())
    pairs = (
        (local(one).reshape(-1), local(other).reshape(-1))
        for one, other in zip(ones, others, strict=True)
    )
    return summed(torch.stack([torch.dot(one, other) for one, other in pairs]).sum(), ones)
