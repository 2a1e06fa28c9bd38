"""Who shares one perturbation, and what that means where several processes train together.

batch          one e for the whole batch
micro_batch    mSAM (2302.09693): one e_i for each element of `batches`, and the gradients at
               their t + e_i averaged by counted tokens
replica        one e_r for what each replica has of the batch"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from model.sharding import all_sum, local, sharded_modules, summed
from optim.gradient import Gradient, MicroBatch, Step


class Scope:
    """One perturbation for the whole batch, and the base of the other scopes."""

    def __init__(self, rule: Gradient, moving: list[Tensor]) -> None:
        self.rule = rule
        self.moving = moving

    def groups(self, groups: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Returns the groups that move apart."""
        return [[micro for group in groups for micro in group]]

    def concurrent_tokens(self, group: list[MicroBatch], step: Step) -> int:
        """Returns the counted targets of all groups that move at the same time as this one."""
        return sum(micro.tokens for micro in group)

    def is_whole(self, token_share: float) -> bool:
        """Returns whether the ascent gradient of a group with this share of the tokens is that of
        the step."""
        return token_share == 1

    def sum(self, values: Tensor) -> Tensor:
        """Returns values summed over the processes that share one perturbation."""
        return all_sum(self.rule.module, values)

    def any_group(self, flag: bool) -> bool:
        """Returns whether a flag is set for any of the groups that move at the same time."""
        return flag

    def place(self) -> tuple[int, int]:
        """Returns the place of this process among those that share one perturbation, and their
        number."""
        # In shards without replicas all processes share the one perturbation.
        if sharded_modules(self.rule.module):
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def without_replica_sync(self) -> AbstractContextManager:
        """Keeps the ascent gradient to the processes that share it."""
        return nullcontext()

    def reduce(self, gradient: Tensor) -> Tensor:
        """Sums an ascent gradient, times the group's share of the tokens, in place over all groups
        that move at the same time."""
        return gradient

    def log(self, step: Step, token_share: float, metrics: dict[str, Any]) -> None:
        """Logs metrics of a move, averaged over the groups by their tokens."""
        step.result.log(token_share, metrics)


class MicroBatchScope(Scope):
    """One perturbation for each element of `batches`."""

    def groups(self, groups: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        return groups


class ReplicaScope(Scope):
    """One perturbation for each replica. All replicas go through the same passes; one that counts
    no target does not move."""

    def __init__(self, rule: Gradient, moving: list[Tensor]) -> None:
        super().__init__(rule, moving)
        if rule.layout.replicas is None:
            raise ValueError(
                "scope=replica needs replicas, which a single process does not have; use"
                " scope=micro_batch or batch"
            )

    def groups(self, groups: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        # A replica moves by its own part of the batch, so a micro-batch counts its targets there.
        (group,) = super().groups(groups)
        self.rule.count_tokens(group, self.sum)
        return [group]

    def concurrent_tokens(self, group: list[MicroBatch], step: Step) -> int:
        return step.result.tokens

    def is_whole(self, token_share: float) -> bool:
        # Even where one replica counts all targets, the others must take part in the sums.
        return False

    def sum(self, values: Tensor) -> Tensor:
        return summed(values, self.moving)

    def any_group(self, flag: bool) -> bool:
        return any(self.rule.layout.all_gather(flag))

    def place(self) -> tuple[int, int]:
        mesh = self.rule.layout.mesh
        return mesh.get_local_rank(), mesh.size()

    def without_replica_sync(self) -> AbstractContextManager:
        return self.rule.layout.without_replica_sync()

    def reduce(self, gradient: Tensor) -> Tensor:
        self.rule.layout.sum_over_replicas(local(gradient))
        return gradient

    def log(self, step: Step, token_share: float, metrics: dict[str, Any]) -> None:
        # The shares of all replicas add up to 1, so that the sum is the mean.
        weighted = [token_share * float(value) for value in metrics.values()]
        values = torch.tensor(weighted, dtype=torch.float64, device=self.rule.device)
        self.rule.layout.sum_over_replicas(values)
        step.result.log(1.0, dict(zip(metrics, values.tolist(), strict=True)))


SCOPES = {"batch": Scope, "micro_batch": MicroBatchScope, "replica": ReplicaScope}
