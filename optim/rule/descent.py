"""The moved pass, at t~ = t + e, and its paths: SAM, Functional-SAM and their relatives.

With logits F, J = dF/dt and r = dL/dF, a path sums up to four products (`Terms`):

    clean         J(t)^T r(t) = g
    full          J(t~)^T r(t~)
    functional    J(t~)^T r(t)
    logit         J(t)^T r(t~)

A path of your own is a function under `@path("name")` that returns their coefficients;
optim.path=name then selects it:

    @path("halfway")
    def halfway(axes):
        return Terms(full=0.5, functional=0.5)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.rule import COTANGENT_PATHS, PATHS, RuleConfig
from optim.gradient import Gradient, MicroBatch, Step, add_loss
from optim.rule.ascent import Ascent
from optim.rule.conditions import set_random_state

# A value whose gradient is the product, and the loss at the moved point; None where there is none.
Evaluated = tuple[Tensor | None, Tensor | None]

# The terms


class Term:
    """One product of a path, times its coefficient; the base of the four.

    is_differentiated    whether a backward at the moved point takes it; all such terms share one
    extra_passes         forwards and backwards that it takes after the weights are back"""

    is_differentiated = False
    extra_passes = 0

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    @staticmethod
    def head_products(is_stored: bool) -> int:
        """Returns its matrix products with the head, where r is stored or to be rebuilt."""
        return 0

    def start(self, rule: Gradient, ascent: Ascent, g: dict[str, Tensor]) -> None:
        """Adds to p.grad what is known before the moved pass, given g, which may be changed."""

    def evaluate(self, logits: Any, micro: MicroBatch, ascent: Ascent) -> Evaluated:
        """Returns the product, as a value to be differentiated, given the lazy logits at the moved
        point, and the loss there."""
        return None, None

    def finish(self, rule: Gradient, ascent: Ascent, step: Step) -> None:
        """Adds to p.grad what is taken after the weights are back."""


class Full(Term):
    """J(t~)^T r(t~): the gradient at the moved point (SAM, 2010.01412)."""

    is_differentiated = True

    @staticmethod
    def head_products(is_stored: bool) -> int:
        return 3

    def evaluate(self, logits: Any, micro: MicroBatch, ascent: Ascent) -> Evaluated:
        # delta_descent=reweighted: the moved loss has the weights of the ascent, too.
        weighting = None
        if ascent.weights_moved_loss and micro.weights_B is not None:
            weighting = partial(known_weights, micro.weights_B)
        loss, _ = logits.cross_entropy_and_cotangent(
            micro.targets, ascent.scale, weighting=weighting
        )
        return self.coefficient * loss, loss


class Functional(Term):
    """J(t~)^T r(t): the output derivative stays clean (Functional-SAM, 2502.02407), so that only
    the curvature of the network counts, and not that of the loss over the logits."""

    is_differentiated = True

    @staticmethod
    def head_products(is_stored: bool) -> int:
        return 2 if is_stored else 3

    def evaluate(self, logits: Any, micro: MicroBatch, ascent: Ascent) -> Evaluated:
        # r was made for the mean over the group, of which the step's mean has this share.
        product = logits.vjp(micro.cotangent, ascent.clean_head)
        return self.coefficient * ascent.token_share * product, None


class Logit(Term):
    """J(t)^T r(t~): the other half of SAM (2502.02407), in a pass of its own at the clean weights,
    to which r(t~) comes as its products with h(t) and W(t)."""

    extra_passes = 1

    @staticmethod
    def head_products(is_stored: bool) -> int:
        return 3

    def evaluate(self, logits: Any, micro: MicroBatch, ascent: Ascent) -> Evaluated:
        assert micro.cotangent is not None
        loss, spent = logits.products_at(
            micro.targets, ascent.scale, micro.cotangent.h_NxD, ascent.clean_head
        )
        ascent.spent.append(spent)
        # The first of them hands dW of all micro-batches on, so that one V x D is kept and not one
        # for each.
        total_VxD = ascent.spent[0].dW_VxD
        if len(ascent.spent) > 1 and total_VxD is not None and spent.dW_VxD is not None:
            total_VxD.add_(spent.dW_VxD)
            spent.dW_VxD = None
        return None, loss

    def finish(self, rule: Gradient, ascent: Ascent, step: Step) -> None:
        # The weights are back at t: this pass brings J(t), and r(t~) comes as its products.
        set_random_state(ascent.random)
        for micro, spent in zip(ascent.group, ascent.spent, strict=True):
            logits = rule.forward(micro, step)
            rule.backward(self.coefficient * logits.vjp(spent), micro is ascent.group[-1])
            step.result.count(micro.share, backwards=1)
            spent.free()


class Clean(Term):
    """J(t)^T r(t) = g, which the ascent has taken already."""

    def start(self, rule: Gradient, ascent: Ascent, g: dict[str, Tensor]) -> None:
        for name, own in g.items():
            p = rule.parameters[name]
            own = ascent.reduce(own.mul_(self.coefficient * ascent.token_share))
            p.grad = own if p.grad is None else own.add_(p.grad)


def known_weights(weights_B: Tensor, which: slice, losses_b: Tensor) -> Tensor:
    """Returns the weights of some instances of a micro-batch, which do not depend on the losses."""
    return weights_B[which]


class Terms(NamedTuple):
    """Coefficients of the four products that every path is a sum of."""

    clean: float = 0.0
    full: float = 0.0
    functional: float = 0.0
    logit: float = 0.0

    def nonzero(self) -> list[Term]:
        """Returns the terms that have a coefficient."""
        terms = [
            Clean(self.clean),
            Full(self.full),
            Logit(self.logit),
            Functional(self.functional),
        ]
        return [term for term in terms if term.coefficient]

    @property
    def reads_cotangent(self) -> bool:
        """Whether a term reads r, or h, of the clean pass."""
        return bool(self.functional or self.logit)


# The paths


def path(name: str) -> Callable[[Callable[[RuleConfig], Terms]], Callable[[RuleConfig], Terms]]:
    """Returns a decorator that registers a path as optim.path=name."""

    def add(terms: Callable[[RuleConfig], Terms]) -> Callable[[RuleConfig], Terms]:
        PATHS[name] = terms
        # These paths alone read optim.cotangent.
        if terms(RuleConfig(path=name)).functional:
            COTANGENT_PATHS[name] = terms
        return terms

    return add


def terms_of(axes: RuleConfig) -> Terms:
    """Returns the coefficients of a rule's path."""
    return PATHS[axes.path](axes)


@path("full")
def full(axes: RuleConfig) -> Terms:
    """SAM (2010.01412): J(t~)^T r(t~)."""
    return Terms(full=1.0)


@path("functional")
def functional(axes: RuleConfig) -> Terms:
    """Functional-SAM (2502.02407): J(t~)^T r(t)."""
    return Terms(functional=1.0)


@path("logit")
def logit(axes: RuleConfig) -> Terms:
    """Logit path, the other half of SAM (2502.02407): J(t)^T r(t~)."""
    return Terms(logit=1.0)


@path("angle")
def angle(axes: RuleConfig) -> Terms:
    """Angle path, phi between logit and functional (2502.02407):

        J(t)^T [(1 - a - b) r + a r~] + b J(t~)^T r,   (a, b) = c (cos phi, sin phi)

    with c = 1 / max(cos, sin), so that 0 degrees are exactly the logit path, 90 the functional one,
    and 45 SAM to first order; or c = sqrt 2 (angle_norm=paper)."""
    # Rounded, as they are exact at 0, 45 and 90 degrees.
    cos = round(math.cos(math.radians(axes.angle)), 15)
    sin = round(math.sin(math.radians(axes.angle)), 15)
    if axes.angle_norm == "max":
        a = cos / max(cos, sin)
        b = sin / max(cos, sin)
    else:
        a = cos * math.sqrt(2)
        b = sin * math.sqrt(2)
    return Terms(clean=1 - a - b, functional=b, logit=a)


# The pass


def moved_pass(rule: Gradient, ascent: Ascent, step: Step, terms: Terms) -> None:
    """Adds to p.grad what a path takes at the moved point. All terms share one forward, and one
    backward."""
    parts = terms.nonzero()
    # The dropout masks are those of the clean pass: else their change would look like curvature.
    set_random_state(ascent.random)
    for micro in ascent.group:
        with torch.set_grad_enabled(any(term.is_differentiated for term in parts)):
            logits = rule.forward(micro, step)
            values, losses = [], []
            is_stored = micro.cotangent is not None and micro.cotangent.r_NxV is not None
            for term in parts:
                value, loss = term.evaluate(logits, micro, ascent)
                if value is not None:
                    values.append(value)
                if loss is not None:
                    losses.append(loss)
                step.result.count(micro.share, head_products=term.head_products(is_stored))
            # The functional path never compares its logits with targets.
            if step.diagnosed and not losses:
                losses.append(measure_loss(logits, micro, ascent, step))
            # One backward for all: a second would need the graph kept.
            if values:
                rule.backward(sum(values[1:], values[0]), micro is ascent.group[-1])
                step.result.count(micro.share, backwards=1)
        # Every term finds the same loss, that at t~.
        if losses:
            step.result.perturbed_loss = add_loss(step.result.perturbed_loss, losses[0])
        # Its memory is wanted by the next micro-batch; a buffer of stored ones is kept elsewhere.
        if terms.reads_cotangent and micro.cotangent is not None:
            micro.cotangent.free()


def measure_loss(logits: Any, micro: MicroBatch, ascent: Ascent, step: Step) -> Tensor:
    """Returns the loss at the moved point, of which no term makes use."""
    with torch.no_grad():
        loss, _ = logits.cross_entropy_and_cotangent(micro.targets, ascent.scale)
    step.result.count(micro.share, head_products=1)
    return loss
