"""Tensors that may be sharded (DTensors of FSDP2) seen as what this process holds of them, and sums
over all that hold the rest.

Importing torch.distributed.tensor takes long, so a DTensor is told by what it can do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")


class AgreedError(ValueError):
    """A mistake that the main process found and all processes know of."""


@dataclass
class Layout:
    """How a run is spread over processes: every replica holds the whole model in shards, and takes
    its part of each batch. A run on one process without a process group has no `mesh`."""

    rank: int = 0
    world: int = 1
    mesh: Any = None  # the shards of this replica
    replicas: Any = (
        None  # the processes that hold the same shard, where there is more than one replica
    )
    # all processes once more, on CPUs, for the threads that save: collectives of two threads must
    # not meet
    saving: Any = None
    summing: bool = True  # whether gradients are added up over the replicas
    # the micro-batches of a pass after which gradients are added up over the processes: every, or
    # the last
    sync: str = "every"

    phase: str = "starting"  # what this process is doing, for whoever watches that it gets on
    step: int = 0
    allowance: float = 1.0  # how many times longer than usual that may take
    marks: int = 0  # how often it has got on; processes make the same marks in the same order

    def enter(self, phase: str, step: int = 0, allowance: float = 1.0) -> None:
        """Says what this process does from here on."""
        self.phase, self.step, self.allowance = phase, step, allowance
        self.marks += 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def sum_over_replicas(self, gradient: Tensor) -> None:
        """Adds up a shard of a gradient over the replicas, in place."""
        if self.summing and self.replicas is not None:
            # FSDP2 calls this on a stream that did not allocate the gradient, and holds on to none
            # that a hook works on
            if gradient.is_cuda:
                gradient.record_stream(torch.cuda.current_stream())
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
        """Acts on the main process; the others wait. A ValueError there is raised on all of them,
        as an AgreedError."""
        failure = None
        if self.main:
            try:
                for action in actions:
                    action()
            except ValueError as error:
                failure = str(error)
        if failure := self.agreed(failure):
            raise AgreedError(failure)

    def saves(self, tensor: Tensor) -> bool:
        """Whether this process writes to a checkpoint what it holds of a tensor: its shard, unless
        another replica does or it is empty, and of what every process has whole the main
        process's."""
        first = self.replicas is None or torch.distributed.get_rank(self.replicas) == 0
        return first and local(tensor).numel() > 0 if is_sharded(tensor) else self.main

    def collected(self, value: T, group: Any = None) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        values: list[Any] = [value] * self.world
        if self.mesh is not None:
            torch.distributed.all_gather_object(values, value, group=group)
        return values

    def agreed(self, value: T, group: Any = None) -> T:
        """The first value of all processes, in the order of their ranks, that is true; else this
        process's. Where none is true, as at most steps, it costs a sum of one number, on the
        CPU."""
        if group is None:  # else it is a thread that agrees
            self.marks += 1
        if self.mesh is None:
            return value
        true = torch.tensor(bool(value), dtype=torch.int64)
        torch.distributed.all_reduce(true, group=group)
        return next(found for found in self.collected(value, group) if found) if true else value


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def compute_device(parameter: Tensor) -> torch.device:
    """Where products with a parameter are computed: its device, or that of the mesh where a CPU
    keeps its shards."""
    sharded: Any = parameter
    return (
        torch.device(sharded.device_mesh.device_type) if is_sharded(parameter) else parameter.device
    )


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds, sharing its memory; a plain tensor as it is,
    without its graph."""
    plain: Any = tensor.detach()
    return plain.to_local() if is_sharded(tensor) else plain


def summed(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """A sum over local shards, made the sum over all shards: over the processes that share one copy
    of the tensors, and no others."""
    like: Any = tensors[0] if tensors else None
    if like is not None and is_sharded(like):
        for dim, placement in enumerate(like.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dim))
    return value


def region_of(like: Tensor) -> tuple[slice, ...]:
    """Where in the full tensor lies what this process holds of it: shards are cut as torch.chunk
    cuts."""
    region, sharded = [slice(0, size) for size in like.shape], cast(Any, like)
    for dim, placement in enumerate(sharded.placements if is_sharded(like) else ()):
        if placement.is_shard():
            whole, mesh = region[placement.dim], sharded.device_mesh
            size = -(-(whole.stop - whole.start) // mesh.size(dim))
            first = min(whole.start + size * mesh.get_local_rank(dim), whole.stop)
            region[placement.dim] = slice(first, min(first + size, whole.stop))
    return tuple(region)


def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this process would hold of it, were it sharded as `like`; of
    one on disk it reads no more than that."""
    assert full.shape == like.shape
    return full[region_of(like)]


def sharded_as(shard: Tensor, like: Tensor) -> Any:
    """The tensor of which every process holds a shard, as it does of `like`."""
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
    """The same as a full tensor, on every process."""
    return sharded_as(shard, like).full_tensor() if is_sharded(like) else shard


def full_norm(norm: Tensor) -> float:
    """The number behind a norm that may be a DTensor."""
    whole: Any = norm
    return (whole.full_tensor() if is_sharded(norm) else norm).item()


def sharded_modules(module: nn.Module) -> list[Any]:
    """What FSDP2 gathers each on its own, the module itself first; nothing where it is on one
    process. Unlike its parameters, which may be gathered at the moment, this tells whether it is
    sharded."""
    return [owner for owner in module.modules() if hasattr(owner, "reshard")]


def reshard(module: nn.Module | None) -> None:
    """Lets go of gathered weights: what was gathered before the shards changed would be used
    again."""
    sharded = sharded_modules(module) if module is not None else []
    for owner in sharded:
        owner.reshard()
    if sharded and compute_device(first := next(sharded[0].parameters())).type != first.device.type:
        torch.accelerator.synchronize()  # shards on the CPU may still be on their way to the device


def all_sum(module: nn.Module, values: Tensor) -> Tensor:
    """Values added up over all processes that train the module; its own where it is on one
    process."""
    if sharded_modules(module):
        torch.distributed.all_reduce(values)
    return values


def all_min(module: nn.Module, value: int) -> int:
    """The smallest value of all processes that train the module."""
    if sharded_modules(module):
        smallest = torch.tensor(value, dtype=torch.int64)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        value = int(smallest)
    return value


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies full tensors, in memory or on disk, into a model's parameters, or this process's
    shards of them. Raises ValueError where the names are not the same."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        raise ValueError(
            "the weights are of another model:"
            f" {', '.join(sorted(parameters.keys() ^ tensors.keys())[:4])}"
        )
    for name, parameter in parameters.items():
        local(parameter).copy_(shard_of(tensors[name], parameter))
