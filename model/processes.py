"""The processes of a run: which one this is, which of them share what, and how they agree."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.sharding import is_sharded, local

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
    # The processes that hold the same shard, where there is more than one replica.
    replicas: Any = None
    # All processes once more, on CPUs, for the threads that save: collectives of two threads must
    # not meet.
    saving: Any = None
    summing: bool = True  # whether gradients are added up over the replicas
    # The micro-batches of a pass after which gradients are added up over the processes: every, or
    # the last.
    sync: str = "every"
    # Agreements that the main thread has come to: the same number on all processes, so that the one
    # with the fewest keeps the others waiting.
    num_agreements: int = 0

    @property
    def main(self) -> bool:
        """Returns whether this process writes the files of the run."""
        return self.rank == 0

    def sum_over_replicas(self, gradient: Tensor) -> None:
        """Adds up a shard of a gradient over the replicas, in place."""
        if self.summing and self.replicas is not None:
            if gradient.is_cuda:
                # FSDP2 calls this on a stream that did not allocate the gradient, and holds on to
                # none that a hook works on.
                gradient.record_stream(torch.cuda.current_stream())
            torch.distributed.all_reduce(gradient, group=self.replicas)

    @contextmanager
    def without_replica_sync(self) -> Iterator[None]:
        """Keeps each replica's gradient to itself."""
        self.summing = False
        try:
            yield
        finally:
            self.summing = True

    def on_main(self, *actions: Callable[[], Any]) -> None:
        """Acts on the main process, while the others wait. Raises AgreedError on all of them where
        an action raises ValueError there."""
        failure = None
        if self.main:
            try:
                for action in actions:
                    action()
            except ValueError as error:
                failure = str(error)
        if failure := self.any_rank(failure):
            raise AgreedError(failure)

    def writes_to_checkpoint(self, tensor: Tensor) -> bool:
        """Returns whether this process writes what it holds of a tensor. Shards: the first replica
        writes them, and empty ones are skipped. Tensors that every process has whole: the main
        process writes them."""
        if not is_sharded(tensor):
            return self.main
        if self.replicas is not None and torch.distributed.get_rank(self.replicas) != 0:
            return False
        return local(tensor).numel() > 0

    def all_gather(self, value: T, group: Any = None) -> list[T]:
        """Returns the values of all processes, in the order of their ranks."""
        values: list[Any] = [value] * self.world
        if self.mesh is not None:
            torch.distributed.all_gather_object(values, value, group=group)
        return values

    def any_rank(self, value: T, group: Any = None) -> T:
        """Returns the first true value of all processes, in the order of their ranks; else this
        process's.

        Args:
            value: any object; it is pickled only where one of them is true, and at most steps this
                costs a sum of one number, on the CPU
            group: the process group of a thread beside the main one
        """
        if group is None:
            self.num_agreements += 1
        if self.mesh is None:
            return value
        num_true = torch.tensor(bool(value), dtype=torch.int64)
        torch.distributed.all_reduce(num_true, group=group)
        if not num_true:
            return value
        return next(found for found in self.all_gather(value, group) if found)
