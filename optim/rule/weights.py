"""How much each instance weighs in the ascent loss sum_i w_i n_i l_i / N, whose gradient the
weights move along. Only the proportions of the weights count, and no gradient goes through them.

A weighting of your own is a class under `@weighting("name")`; optim.weights=name then selects it:

    @weighting("hard")
    class Hard(Weighting):
        def __call__(self, which, losses_b):
            return losses_b
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from conf.rule import WEIGHTINGS, RuleConfig
from optim.gradient import MicroBatch
from optim.rule.directions import Direction

weighting = WEIGHTINGS.register

# One forward over a group: the mean loss of every instance of every micro-batch.
InstanceLosses = Callable[[], list[Tensor]]
# The sum of values over the processes that share one perturbation.
SumOverGroup = Callable[[Tensor], Tensor]


class Weighting:
    """The base of all weightings.

    is_uniform    whether all instances weigh the same
    in_fp32       whether it takes passes in IEEE fp32, whatever the precision of the run"""

    is_uniform = False
    in_fp32 = False

    def __init__(
        self,
        axes: RuleConfig,
        module: nn.Module,
        moving: Mapping[str, Tensor],
        direction: Direction,
    ) -> None:
        self.axes = axes
        self.module = module
        self.moving = moving
        self.direction = direction

    @classmethod
    def check(cls, axes: RuleConfig) -> None:
        """Raises ValueError, with the reason, where other axes contradict the weighting."""

    @classmethod
    def forwards(cls, axes: RuleConfig, rough: bool) -> int:
        """Returns how many forwards `prepare` takes; `rough` where the rule's passes round to less
        than IEEE fp32."""
        return 0

    @classmethod
    def copies(cls, axes: RuleConfig) -> int:
        """Returns how many copies of the moved parameters `prepare` makes beside the clean ones."""
        return 0

    @classmethod
    def weights_moved_loss(cls, axes: RuleConfig) -> bool:
        """Returns whether the loss at the moved point has the same weights."""
        return False

    def prepare(self, group: list[MicroBatch], losses: InstanceLosses, add: SumOverGroup) -> None:
        """Takes the passes that weights are made of, and sets how each micro-batch weighs its
        instances."""
        for micro in group:
            micro.weighting = self

    def __call__(self, which: slice, losses_b: Tensor) -> Tensor:
        """Returns the weights, not negative, of some instances of a micro-batch whose mean losses
        are given."""
        return torch.ones_like(losses_b)


@weighting("uniform")
class Uniform(Weighting):
    """w_i = 1: the gradient of the plain mean (SAM, 2010.01412)."""

    is_uniform = True

    def prepare(self, group: list[MicroBatch], losses: InstanceLosses, add: SumOverGroup) -> None:
        """Weighs nothing, which spares the products with the weights."""
