"""The figures that a rule logs of its moves: those that are free, and on request those that cost
passes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from model.logits import compute_dtype
from model.sharding import all_sum, local, sharded_as, summed
from optim.gradient import MicroBatch, RuleResult, Step, named_gradients, take_gradients
from optim.rule.ascent import Ascent
from optim.rule.conditions import (
    ieee_fp32,
    random_state,
    rounds,
    same_buffers,
    same_masks,
    set_random_state,
)
from optim.rule.descent import Terms
from optim.rule.parameters import kinds, multiplied
from optim.rule.perturbation import Move
from optim.rule.tensors import blocks, dot, norm

if TYPE_CHECKING:
    from optim.rule.sharpness import SharpnessAware

FAITHFUL = 0.9  # fidelity below which rounding is said to harm a rule
TOLERANCE = 0.1  # and how far the part of the move along the intended one may be from all of it


class Diagnostics:
    """The figures that a rule logs of its moves.

    kinds         of parameters, by name
    multiplied    names of the parameters that autocast rounds
    warned        whether it was said what rounding does to the rule"""

    def __init__(self, rule: "SharpnessAware") -> None:
        self.rule = rule
        self.kinds = kinds(rule.module, rule.parameters)
        self.multiplied = multiplied(rule.module, rule.parameters)
        self.warned = False
        axes = rule.axes
        # What is logged of g is had for free only where the ascent takes it, and its cosine with
        # g_rule where all of it is the move.
        self.takes_plain_gradient = rule.weighting.is_uniform and axes.ascent_fraction == 1
        along_g = axes.direction == "gradient" and axes.metric == "euclidean"
        moves_all = len(rule.moving) == len(rule.parameters)
        self.moves_along_g = self.takes_plain_gradient and along_g and moves_all

    # Free of passes

    def log_ascent(self, ascent: Ascent, move: Move, step: Step) -> None:
        """Logs |g|, and the slope of the loss along the move, d g / |d|; notes |e|."""
        if not step.logged:
            return
        # |e| = rho |d| / n(d), which is rho only where n is the Euclidean norm.
        if move.n > 0:
            move.length = self.rule.rho * float(norm(move.d)) / move.n
        g = ascent.gradients
        if not (g and self.takes_plain_gradient):
            return
        # Both lists are of the parameters that move and have a gradient, in one order.
        names = [name for name in move.parameters if name in g]
        d = [one for name, one in zip(move.parameters, move.d, strict=True) if name in g]
        slope = dot(d, [g[name] for name in names]) / norm(move.d).clamp_min(1e-30)
        found = {
            "sharpness/gradient_norm": norm(list(g.values())),
            "sharpness/slope": slope * self.rule.direction.sign,
        }
        self.rule.scope.log(step, ascent.token_share, found)

    def log_move(
        self, ascent: Ascent, move: Move, clean: Sequence[Tensor], step: Step, terms: Terms
    ) -> None:
        """Logs what became of the move in the compute precision, whose weights moved, and the slope
        of g_rule along it.

        realised_radius    |e~|, e~ = the move as the passes see it: rounded where matrix products
                           take a weight, exact where it is looked up or scales
        realised_cosine    of e~ with e. Low in bf16 at small radii, and no harm by itself: what
                           rounding adds lies at right angles to e
        realised_along     e.e~ / |e|^2, the component along e in units of the intended |e|: 1 where
                           nothing of the move is lost

        Args:
            ascent: of the group
            move: that the weights have made
            clean: the weights that moved, as they were
            step: where it is logged
            terms: of the path, whose gradients are in p.grad
        """
        if not (step.logged and move.parameters):
            return
        # Autocast rounds the weights of products only; look-ups and scales see the stored weight.
        moving = list(move.parameters.values())
        dtype = compute_dtype(moving[0])
        dtypes = [
            dtype if name in self.multiplied else p.dtype for name, p in move.parameters.items()
        ]
        seen = realised(moving, clean, dtypes)
        length = math.sqrt(math.fsum(seen.squares))
        found = {"sharpness/realised_radius": seen.norm, "sharpness/realised_cosine": seen.cosine}
        if self.rule.rho > 0:
            # A replica that counts no target does not move, but adds up the same figures as the
            # others. The square may be too large for a float.
            along = 1.0
            if move.length > 0:
                along = seen.product / move.length / move.length
            found["sharpness/realised_along"] = along
        for kind, share in self.shares(move, seen.squares, length).items():
            found[f"sharpness/share_{kind}"] = share
        self.rule.scope.log(step, ascent.token_share, found)
        # p.grad holds g_rule of the whole step here, but for a logit term, which comes later.
        if ascent.token_share == 1 and not terms.logit and length > 0:
            log_slope(moving, clean, length, step.result.metrics)

    def shares(self, move: Move, squares: list[float], length: float) -> dict[str, float]:
        """Returns the shares of |e|^2 in the embedding, the body (norms among it) and the head."""
        shares = dict.fromkeys(("embedding", "body", "head"), 0.0)
        for name, square in zip(move.parameters, squares, strict=True):
            kind = self.kinds[name]
            if kind == "norm":
                kind = "body"
            shares[kind] += square / max(length**2, 1e-300)
        return shares

    def log_cosine(self, step: Step, size: Tensor) -> None:
        """Logs the cosine of g with g_rule, of norm `size`, where the slope along the move tells
        it."""
        metrics = step.result.metrics
        if step.logged and "sharpness/rule_slope" in metrics and self.moves_along_g:
            metrics["sharpness/cosine"] = metrics["sharpness/rule_slope"] / size.clamp_min(1e-30)

    def log_update(self, step: Step) -> None:
        """Logs the norm of the gradient that is handed on, and the loss at the moved point."""
        if not step.logged:
            return
        result = step.result
        update = named_gradients(self.rule.parameters)
        result.metrics["sharpness/rule_norm"] = norm(list(update.values()))
        if result.perturbed_loss is None:
            return
        result.metrics["sharpness/perturbed_loss"] = result.perturbed_loss
        loss = result.loss
        if loss is None:
            loss = result.metrics.get("sharpness/clean_loss")
        if loss is not None:
            result.metrics["sharpness/gap"] = result.perturbed_loss - loss

    def warn_of_rounding(self, result: RuleResult) -> None:
        """Says once what rounding does to the rule, and what helps."""
        if self.warned:
            return
        harm = unfaithful(result.metrics)
        if not harm:
            return
        self.warned = True
        remedy = "take a larger radius (optim.rho)"
        if self.rule.axes.compute == "precision" and rounds(self.rule.device):
            remedy = f"compute the rule in IEEE fp32 (optim.compute=fp32) or {remedy}"
        self.rule.say(f"warning: {harm}; {remedy}")

    # At the price of passes

    def log_clean_loss(self, ascent: Ascent, step: Step) -> None:
        """Takes one forward over a group at the weights as they are, for rules that take their only
        pass elsewhere, and logs its loss."""
        if not step.diagnosed:
            return
        with same_buffers(self.rule.module):
            losses = self.rule.instance_losses(ascent.group, step, ascent.random)
        for micro, losses_B in zip(ascent.group, losses, strict=True):
            total = all_sum(self.rule.module, (losses_B * micro.counted_B).double().sum())
            step.result.log(1 / step.result.tokens, {"sharpness/clean_loss": total})

    def decompose(self, group: list[MicroBatch], step: Step) -> None:
        """Logs SAM's change of the gradient in its two parts, at the point that the rule moves the
        first group to (2502.02407): norms and cosines of

            delta_func = J(t~)^T r - g        delta_logit = J(t)^T r~ - g

        It takes 6 forwards and 5 backwards over the group, and leaves p.grad empty."""
        # g, J(t~)^T r and J(t)^T r~, each from the random state that the step began with.
        scratch = self.scratch(step, self.rule.scope.concurrent_tokens(group, step))
        random = random_state(self.rule.device)
        found = []
        with same_buffers(self.rule.module):
            for terms in (None, Terms(functional=1.0), Terms(logit=1.0)):
                set_random_state(random)
                found.append(self.gradient_of(group, scratch, terms))
        set_random_state(random)
        self.count(step, scratch)
        if not all(found):
            # The ascent was not finite.
            return
        g, functional, logit = ([gradients[name] for name in found[0]] for gradients in found)
        torch._foreach_sub_(functional, g)
        torch._foreach_sub_(logit, g)
        sizes = [norm(tensors).clamp_min(1e-30) for tensors in (g, functional, logit)]
        step.result.metrics |= {
            "sharpness/delta_func": sizes[1],
            "sharpness/delta_logit": sizes[2],
            "sharpness/cosine_func_logit": dot(functional, logit) / (sizes[1] * sizes[2]),
            "sharpness/cosine_func_gradient": dot(functional, g) / (sizes[1] * sizes[0]),
            "sharpness/cosine_logit_gradient": dot(logit, g) / (sizes[2] * sizes[0]),
        }

    def measure_fidelity(self, group: list[MicroBatch], step: Step) -> None:
        """Logs the fidelity of a rule: the cosine of g_rule - g, as the passes find it, with the
        same in IEEE fp32, on the first micro-batch that counts tokens, with the same weights and
        dropout masks. It is of g_rule before `combine`, and there is none where nothing moves."""
        # Copies: the measurement leaves its own cotangents and weights in a micro-batch.
        rule = self.rule
        micros = [replace(micro) for micro in group]
        rule.count_tokens(micros)
        micro = next((micro for micro in micros if micro.tokens), None)
        if micro is None:
            return
        scratch = self.scratch(step, micro.tokens)
        # Replicas count their own targets.
        rule.scope.groups([[micro]])
        with same_buffers(rule.module), same_masks(rule.module, rule.device):
            ours = self.change_of_gradient(micro, scratch)
            with ieee_fp32(rule.device):
                exact = self.change_of_gradient(micro, scratch)
        self.count(step, scratch)
        size = norm(ours) * norm(exact)
        if size.isfinite() and size > 0:
            step.result.metrics["sharpness/fidelity"] = dot(ours, exact) / size

    def change_of_gradient(self, micro: MicroBatch, scratch: Step) -> list[Tensor]:
        """Returns g_rule - g of a micro-batch, by parameter; none where the ascent is not finite.
        The random stream stays where it is."""
        random = random_state(self.rule.device)
        g = self.gradient_of([micro], scratch, None)
        set_random_state(random)
        update = self.gradient_of([micro], scratch, self.rule.terms)
        set_random_state(random)
        return [update[name].sub_(g[name]) for name in g if name in update]

    def gradient_of(
        self, group: list[MicroBatch], scratch: Step, terms: Terms | None
    ) -> dict[str, Tensor]:
        """Takes the gradient of a group along a path, or the plain one, out of p.grad."""
        if terms is None:
            self.rule.plain(group, scratch)
        else:
            self.rule.perturbed(group, scratch, terms)
        return take_gradients(self.rule.parameters)

    def scratch(self, step: Step, tokens: int) -> Step:
        """Returns a step of its own for a measurement, of which the rule remembers nothing."""
        result = replace(step.result, metrics={}, tokens=tokens)
        return Step(step.number, step.groups, result, logged=False, clean=None)

    def count(self, step: Step, scratch: Step) -> None:
        """Counts the passes of a measurement among those of its step."""
        step.result.forwards = scratch.result.forwards
        step.result.backwards = scratch.result.backwards
        step.result.head_products = scratch.result.head_products


def log_slope(
    moving: Sequence[Tensor], clean: Sequence[Tensor], length: float, metrics: dict[str, Any]
) -> None:
    """Logs the slope of g_rule along the move, of this length, and with that of g the curvature
    along it."""
    # e is read off the weights themselves, since d has been let go of.
    e, g_rule = [], []
    for now, before in zip(moving, clean, strict=True):
        if now.grad is not None:
            e.append(sharded_as(local(now) - before, now))
            g_rule.append(now.grad)
    slope = dot(e, g_rule).item() / length
    metrics["sharpness/rule_slope"] = slope
    # Over a finite step, so at a small radius in low precision it is mostly rounding.
    if "sharpness/slope" in metrics:
        metrics["sharpness/curvature"] = (slope - float(metrics["sharpness/slope"])) / length


def unfaithful(figures: Mapping[str, Any]) -> str:
    """Returns, by the figures of a row, what rounding does to a rule, in words; nothing where it
    does no harm that was measured."""
    fidelity = figures.get("sharpness/fidelity")
    along = figures.get("sharpness/realised_along")
    if fidelity is not None and fidelity < FAITHFUL:
        return (
            f"the change of the gradient by the rule has a cosine of {fidelity:.2f} with itself in"
            " IEEE fp32 (sharpness/fidelity)"
        )
    if along is not None and abs(along - 1) > TOLERANCE:
        return (
            f"the weights move by {along:.2f} of the radius along the intended direction"
            " (sharpness/realised_along)"
        )
    return ""


class Realised(NamedTuple):
    """The move that the passes see: its norm, its inner product and its cosine with the move of
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
    # Over blocks of millions of squares sums are in fp64.
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
