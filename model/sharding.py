"""Tensors that may be sharded (DTensors of FSDP2) seen as what this process holds of them, and sums over all that hold the rest.

Importing torch.distributed.tensor takes long, so a DTensor is told by what it can do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass
class Layout:
    """How a run is spread over processes: every replica holds the whole model in shards, and takes its part of each batch. A run on one
    process without a process group has no `mesh`."""

    rank: int = 0
    world: int = 1
    mesh: Any = None  # the shards of this replica
    replicas: Any = None  # the processes that hold the same shard, where there is more than one replica
    summing: bool = True  # whether gradients are added up over the replicas

    @property
    def main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def sum_over_replicas(self, gradient: Tensor) -> None:
        """Adds up a shard of a gradient over the replicas, in place."""
        if self.summing and self.replicas is not None:
            torch.distributed.all_reduce(gradient, group=self.replicas)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keeps each replica's gradient to itself."""
        self.summing = False
        try:
            yield
        finally:
            self.summing = True

    def on_main(self, *actions: Callable[[], Any]) -> None:
        """Acts on the main process; the others wait. A ValueError there is raised on all of them."""
        failure = None
        if self.main:
            try:
                for action in actions:
                    action()
            except ValueError as error:
                failure = str(error)
        if failure := self.agreed(failure):
            raise ValueError(failure)

    def collected(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        values: list[Any] = [value] * self.world
        if self.mesh is not None:
            torch.distributed.all_gather_object(values, value)
        return values

    def agreed(self, value: T) -> T:
        """The first value of all processes, in the order of their ranks, that is true; else the main process's."""
        values = self.collected(value)
        return next((found for found in values if found), values[0])


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds, sharing its memory; a plain tensor as it is, without its graph."""
    plain: Any = tensor.detach()
    return plain.to_local() if is_sharded(tensor) else plain


def summed(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """A sum over local shards, made the sum over all shards: over the processes that share one copy of the tensors, and no others."""
    like: Any = tensors[0] if tensors else None
    if like is not None and is_sharded(like):
        for dim, placement in enumerate(like.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dim))
    return value


def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this process would hold of it, were it sharded as `like`."""
    if not is_sharded(like):
        return full
    sharded: Any = like
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            parts, mine = full.chunk(sharded.device_mesh.size(dim), placement.dim), sharded.device_mesh.get_local_rank(dim)
            full = parts[mine] if mine < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def sharded_as(shard: Tensor, like: Tensor) -> Any:
    """The tensor of which every process holds a shard, as it does of `like`."""
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    return DTensor.from_local(shard, sharded.device_mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride())


def gathered(shard: Tensor, like: Tensor) -> Tensor:
    """The same as a full tensor, on every process."""
    return sharded_as(shard, like).full_tensor() if is_sharded(like) else shard


def full_norm(norm: Tensor) -> float:
    """The number behind a norm that may be a DTensor."""
    whole: Any = norm
    return (whole.full_tensor() if is_sharded(norm) else norm).item()


def reshard(module: nn.Module | None) -> None:
    """Lets go of gathered weights: what was gathered before the shards changed would be used again."""
    sharded: list[Any] = [owner for owner in module.modules() if hasattr(owner, "reshard")] if module is not None else []
    for owner in sharded:
        owner.reshard()


def all_sum(module: nn.Module, values: Tensor) -> Tensor:
    """Values added up over all processes that train the module; its own where it is on one process."""
    if any(is_sharded(p) for p in module.parameters()):
        torch.distributed.all_reduce(values)
    return values


def all_min(module: nn.Module, value: int) -> int:
    """The smallest value of all processes that train the module."""
    if any(is_sharded(p) for p in module.parameters()):
        smallest = torch.tensor(value, dtype=torch.int64)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        value = int(smallest)
    return value


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies full tensors into a model's parameters, or this process's shards of them. Raises ValueError where the names are not the same."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        raise ValueError(f"the weights are of another model: {', '.join(sorted(parameters.keys() ^ tensors.keys())[:4])}")
    for name, parameter in parameters.items():
        local(parameter).copy_(shard_of(tensors[name], parameter))


def full_tensors(tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
    """The full tensors behind shards, one after the other; kept on the main process only, and on the CPU where they were sharded."""
    found = {}
    for name, tensor in tensors.items():
        full = gathered(local(tensor), tensor).cpu() if is_sharded(tensor) else tensor
        if main:
            found[name] = full
    return found
