"""Tensors that may be sharded (DTensors of FSDP2), seen as what this process holds of them, and
sums over the processes that hold the rest.

Importing torch.distributed.tensor takes long, so a DTensor is recognised by its attributes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Tensors


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def compute_device(parameter: Tensor) -> torch.device:
    """Returns where products with a parameter are computed: its device, or that of the mesh where a
    CPU keeps its shards."""
    if is_sharded(parameter):
        sharded: Any = parameter
        return torch.device(sharded.device_mesh.device_type)
    return parameter.device


def local(tensor: Tensor) -> Tensor:
    """Returns the shard of a tensor that this process holds, sharing its memory; a plain tensor as
    it is, without its graph."""
    plain: Any = tensor.detach()
    if is_sharded(tensor):
        return plain.to_local()
    return plain


def summed(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Returns a sum over local shards, made in place the sum over all shards: over the processes
    that share one copy of the tensors, and no others."""
    like: Any = tensors[0] if tensors else None
    if like is not None and is_sharded(like):
        for dim, placement in enumerate(like.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dim))
    return value


def region_of(like: Tensor) -> tuple[slice, ...]:
    """Returns where in the full tensor lies what this process holds of it, a slice for each
    dimension."""
    region = [slice(0, size) for size in like.shape]
    if not is_sharded(like):
        return tuple(region)
    sharded: Any = like
    # A tensor may be cut along several dimensions of the mesh, each cut within the one before.
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            whole = region[placement.dim]
            # Shards are cut as torch.chunk cuts: the last ones may be shorter, or empty.
            size = -(-(whole.stop - whole.start) // sharded.device_mesh.size(dim))
            first = whole.start + size * sharded.device_mesh.get_local_rank(dim)
            first = min(first, whole.stop)
            region[placement.dim] = slice(first, min(first + size, whole.stop))
    return tuple(region)


def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """Returns the part of a full tensor that this process would hold of it, were it sharded as
    `like`; of one on disk it reads no more than that."""
    assert full.shape == like.shape
    return full[region_of(like)]


def sharded_as(shard: Tensor, like: Tensor) -> Any:
    """Returns the tensor of which every process holds a shard, as it does of `like`."""
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    return DTensor.from_local(
        shard,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def gathered(shard: Tensor, like: Tensor) -> Tensor:
    """Returns the same as a full tensor, on every process."""
    if not is_sharded(like):
        return shard
    return sharded_as(shard, like).full_tensor()


def full_norm(norm: Tensor) -> float:
    """Returns the number behind a norm that may be a DTensor."""
    whole: Any = norm
    if is_sharded(norm):
        whole = whole.full_tensor()
    return whole.item()


# Modules


def sharded_modules(module: nn.Module) -> list[Any]:
    """Returns the modules that FSDP2 gathers each on its own, the module itself first; none where
    it is on one process. Parameters, which may be gathered at the moment, do not tell as much."""
    return [owner for owner in module.modules() if hasattr(owner, "reshard")]


def reshard(module: nn.Module | None) -> None:
    """Frees gathered weights: what was gathered before the shards changed would be used again."""
    if module is None:
        return
    sharded = sharded_modules(module)
    for owner in sharded:
        owner.reshard()
    if sharded:
        first = next(sharded[0].parameters())
        if compute_device(first).type != first.device.type:
            # Shards on the CPU may still be on their way to the device.
            torch.accelerator.synchronize()


def all_sum(module: nn.Module, values: Tensor) -> Tensor:
    """Returns values added up, in place, over all processes that train the module; as they are
    where it is on one process."""
    if sharded_modules(module):
        torch.distributed.all_reduce(values)
    return values


def all_min(module: nn.Module, value: int) -> int:
    """Returns the smallest value of all processes that train the module."""
    if not sharded_modules(module):
        return value
    smallest = torch.tensor(value, dtype=torch.int64)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return int(smallest)


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies full tensors, in memory or on disk, into a model's parameters, or this process's
    shards of them. Raises ValueError where the names are not the same."""
    parameters = dict(model.named_parameters())
    if differing := parameters.keys() ^ tensors.keys():
        raise ValueError(f"the weights are of another model: {', '.join(sorted(differing)[:4])}")
    for name, parameter in parameters.items():
        local(parameter).copy_(shard_of(tensors[name], parameter))
