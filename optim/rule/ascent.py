"""The clean pass over a group: its loss, the gradient g of its ascent loss, and its cotangents r.

    L_a = sum_i w_i n_i l_i / N      over the instances that ascend, n_i counted targets each

With uniform weights and every instance, L_a is the loss, and g the plain gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from model.logits import Cotangent, InstanceWeighting
from optim.gradient import Gradient, MicroBatch, Step, add_loss, take_gradients
from optim.rule.conditions import set_random_state
from optim.rule.cotangents import CotangentStorage
from optim.rule.scope import Scope


@dataclass
class Ascent:
    """A group on its way through the passes of a step.

    group         its micro-batches
    random        the random state that each of its passes begins with
    token_share   counted targets of the group / of the step
    scale         1 / counted targets of the step
    reduce        sums a gradient of the group over all groups that move at the same time
    weights_moved_loss
                  whether the loss at the moved point has the instance weights of the ascent
    took_pass     whether there was a clean pass
    gradients     g by parameter, where it was taken
    clean_head    the unembedding W(t), where a term reads it
    spent         r(t~) of each micro-batch, as its products with h(t) and W(t)"""

    group: list[MicroBatch]
    random: dict[str, Tensor]
    token_share: float
    scale: float
    reduce: Callable[[Tensor], Tensor]
    weights_moved_loss: bool = False
    took_pass: bool = False
    gradients: dict[str, Tensor] = field(default_factory=dict)
    clean_head: Tensor | None = None
    spent: list[Cotangent] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Counted targets of the group, at least 1."""
        return max(1, sum(micro.tokens for micro in self.group))


@dataclass
class CleanPass:
    """The clean pass of a rule.

    with_gradient    whether it takes g
    with_r           whether it keeps r, stored or to be rebuilt
    with_h           whether it keeps the hidden states h"""

    rule: Gradient
    scope: Scope
    cotangents: CotangentStorage
    with_gradient: bool
    with_r: bool
    with_h: bool

    def run(self, ascent: Ascent, step: Step) -> None:
        """Takes the pass over a group, whose micro-batches know how they weigh their instances."""
        # r is stored whole, or h is kept to rebuild it; the logit path reads h in either case.
        stored = self.with_r and self.cotangents.decide(ascent.group)
        with_h = self.with_h or (self.with_r and not stored)
        ascending = [micro for micro in ascent.group if micro.ascends]
        # Probes may have come before, and every pass sees the same dropout masks.
        set_random_state(ascent.random)
        for turn, micro in enumerate(ascent.group):
            is_trained = self.with_gradient and micro.ascends > 0
            with torch.set_grad_enabled(is_trained):
                logits = self.rule.forward(micro, step)
                loss, micro.cotangent = logits.cross_entropy_and_cotangent(
                    micro.targets,
                    1 / ascent.tokens,
                    keep_r=stored,
                    keep_h=with_h,
                    weighting=weighting_of(micro),
                    into=self.cotangents.buffers.get(turn),
                )
                if stored:
                    self.cotangents.buffers[turn] = micro.cotangent.r_NxV
                if is_trained:
                    self.rule.backward(loss, micro is ascending[-1])
            # What other processes need of this pass is padding.
            share = 0.0
            if is_trained:
                share = micro.ascends
            step.result.count(micro.share, backwards=share, head_products=1 + 2 * share)
            step.result.loss = add_loss(step.result.loss, loss * ascent.token_share)
        ascent.gradients = self.mean_gradient(ascent)

    def mean_gradient(self, ascent: Ascent) -> dict[str, Tensor]:
        """Takes g out of p.grad, as the mean over what ascends, each instance with its weight, and
        notes the weights whose mean over the counted targets is 1."""
        found = take_gradients(self.rule.parameters)
        tokens = ascent.tokens
        ascending = [micro for micro in ascent.group if micro.ascends]
        # The sum of w_i n_i, by which the loss of the pass should have been divided.
        mass = float(sum(micro.tokens for micro in ascending))
        if any(weights_of(micro) is not None for micro in ascent.group):
            weighted_B = torch.cat([weighted_counts(micro) for micro in ascending])
            mass = float(self.scope.sum(weighted_B.double().sum()))
        # The same normalised weights serve at the moved point (delta_descent=reweighted).
        for micro in ascent.group:
            weights_B = weights_of(micro)
            if weights_B is not None and mass:
                micro.weights_B = weights_B * (tokens / mass)
        # The pass divided by the tokens of the group; a weighted mean is over the mass instead.
        if found and mass not in (0, tokens):
            torch._foreach_mul_(list(found.values()), tokens / mass)
        return found


def weighting_of(micro: MicroBatch) -> InstanceWeighting | None:
    """Returns how the clean pass weighs the instances of a micro-batch; None where all of them
    weigh the same."""
    if micro.ascends and (micro.weighting is not None or micro.chosen_B is not None):
        return partial(ascent_weights, micro)
    return None


def ascent_weights(micro: MicroBatch, which: slice, losses_b: Tensor) -> Tensor:
    """Returns the weights in the ascent loss, up to a factor, of some instances of a micro-batch
    whose mean losses are given; 0 for those that do not ascend."""
    weights_b = torch.ones_like(losses_b)
    if micro.weighting is not None:
        weights_b = micro.weighting(which, losses_b)
    if micro.chosen_B is not None:
        weights_b = weights_b * micro.chosen_B[which]
    return weights_b


def weights_of(micro: MicroBatch) -> Tensor | None:
    """Returns the weights that the clean pass gave the instances of a micro-batch."""
    return None if micro.cotangent is None else micro.cotangent.weights_B


def weighted_counts(micro: MicroBatch) -> Tensor:
    """Returns the counted targets of each instance of a micro-batch, times its weight."""
    weights_B = weights_of(micro)
    if weights_B is None:
        return micro.counted_B
    return micro.counted_B * weights_B
