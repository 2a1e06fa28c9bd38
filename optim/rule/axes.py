"""How the axes of a gradient rule go together: which combinations mean nothing, and what a step
costs. Each part says its own needs and costs where it is defined."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer

from conf.key import check_value
from conf.rule import (
    COMBINATIONS,
    DIRECTIONS,
    METRICS,
    WEIGHTINGS,
    OptimConfig,
    RuleConfig,
)
from optim.rule import combine, delta, descent, directions, metrics  # noqa: F401 - they register
from optim.rule.descent import terms_of
from optim.rule.fraction import num_ascending


def needs_gradient(axes: RuleConfig) -> bool:
    """Returns whether a perturbed step takes the clean gradient g."""
    direction = DIRECTIONS[axes.direction]
    return (
        direction.needs_gradient
        or direction.observes_gradient()
        or METRICS[axes.metric].needs_gradient(axes)
        or COMBINATIONS[axes.combine].needs_gradient
        or terms_of(axes).clean != 0
    )


def takes_ieee_passes(optim: OptimConfig) -> bool:
    """Returns whether a run takes any passes in IEEE fp32 whatever its precision, so that weights
    must not be gathered in less."""
    if optim.path == "none":
        return False
    return (
        optim.compute == "fp32"
        or WEIGHTINGS[optim.weights].in_fp32
        or optim.diagnostics_every is not None
    )


class Passes(NamedTuple):
    """The cost of a step: passes through the body and matrix products with the head, in units of
    the batch; the plain gradient by default."""

    forwards: float = 1.0
    backwards: float = 1.0
    head_products: float = 3.0


def passes(axes: RuleConfig, store: bool, instances: int, rough: bool = False) -> Passes:
    """Returns what a perturbed step costs, which is what `SharpnessAware` counts as it goes.

    Args:
        axes: of the rule
        store: whether cotangents are stored, or else rebuilt
        instances: of a group, over all processes
        rough: whether the rule's passes round to less than IEEE fp32
    """
    # The weighting's probes are forwards with the head, without a backward.
    terms = terms_of(axes)
    probes = WEIGHTINGS[axes.weights].forwards(axes, rough)
    forwards: float = probes
    backwards: float = 0
    products: float = probes
    # The clean pass: r and the loss are taken on the whole batch, g on a part of it.
    share = 0.0
    if needs_gradient(axes):
        share = num_ascending(axes.ascent_fraction, instances) / instances
    if share or terms.reads_cotangent:
        # One product for the logits, and two for the gradients of what is differentiated.
        forwards += 1
        backwards += share
        products += 1 + 2 * share
    # The moved pass, whose forward and backward all terms share.
    forwards += 1
    if any(term.is_differentiated for term in terms.nonzero()):
        backwards += 1
    for term in terms.nonzero():
        products += term.head_products(store)
        forwards += term.extra_passes
        backwards += term.extra_passes
    return Passes(forwards, backwards, products)


class Copies(NamedTuple):
    """The tensors that a rule keeps beside weights, optimiser and p.grad, each in copies of the
    parameters that move, of all parameters where it says so.

    direction_memory      from step to step
    combination_memory    from step to step, of all parameters
    noise                 while the weighting probes
    direction             while the move is made
    metric                while the move is made
    combines_g            whether g lives until the end of the step, of all parameters"""

    direction_memory: int
    combination_memory: int
    noise: int
    direction: int
    metric: int
    combines_g: bool


def copies(axes: RuleConfig) -> Copies:
    """Returns the tensors that a rule keeps, as its parts declare them."""
    direction = DIRECTIONS[axes.direction]
    combination = COMBINATIONS[axes.combine]
    return Copies(
        direction_memory=direction.memory,
        combination_memory=combination.memory,
        noise=WEIGHTINGS[axes.weights].copies(axes),
        direction=direction.copies,
        metric=METRICS[axes.metric].copies,
        combines_g=combination.needs_gradient,
    )


def make_axes(given: dict[str, Any]) -> RuleConfig:
    """Returns the axes of a rule from keyword arguments. Raises ValueError for one that does not
    exist, a value out of range, or a contradiction."""
    known = {entry.name: entry for entry in fields(RuleConfig)}
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]!r}: no such axis; choose among {', '.join(known)}"
        )
    axes = RuleConfig(**given)
    # A command line is typed by Hydra; arguments of Python are not checked by anything yet.
    for name, kind in get_type_hints(RuleConfig).items():
        value = getattr(axes, name)
        # An integer will do where a float is meant.
        allowed = kind
        if isinstance(0.0, kind):
            allowed = kind | int
        if not isinstance(value, allowed):
            raise ValueError(
                f"{name}={value!r} is of the wrong type; it must be"
                f" {getattr(kind, '__name__', kind)}"
            )
        check_value(name, value, known[name].metadata)
    if axes.path == "none":
        raise ValueError(
            "path=none is the plain gradient, which optim.Gradient takes; choose another path"
        )
    check_axes(axes)
    return axes


def check_axes(axes: RuleConfig) -> None:
    """Raises ValueError, with the reason, for a combination of axes that means nothing."""
    check_without_gradient(axes)
    check_uneven(axes)
    WEIGHTINGS[axes.weights].check(axes)


def uneven(axes: RuleConfig) -> str:
    """Returns the axis that makes the ascent gradient another than the plain one, if any."""
    if not WEIGHTINGS[axes.weights].is_uniform:
        return f"weights={axes.weights}"
    if axes.ascent_fraction < 1:
        return f"ascent_fraction={axes.ascent_fraction:g}"
    return ""


def check_without_gradient(axes: RuleConfig) -> None:
    """Raises ValueError for axes of an ascent gradient that the direction does not take."""
    if DIRECTIONS[axes.direction].needs_gradient:
        return
    if axes.scope != "batch":
        raise ValueError(
            f"direction={axes.direction} is the same for every group, so scope={axes.scope}"
            " means nothing; use scope=batch"
        )
    if uneven(axes):
        raise ValueError(
            f"{uneven(axes)} is about the ascent gradient, which direction={axes.direction} does"
            " not take; use direction=gradient"
        )


def check_uneven(axes: RuleConfig) -> None:
    """Raises ValueError where the plain gradient is needed and the ascent takes another one."""
    needs = ""
    if COMBINATIONS[axes.combine].needs_gradient:
        needs = f"combine={axes.combine}"
    if terms_of(axes).clean:
        needs = f"path={axes.path}"
    if needs and uneven(axes):
        raise ValueError(
            f"{needs} needs the plain gradient, which {uneven(axes)} does not compute; use"
            " weights=uniform and ascent_fraction=1"
        )


def check_span(axes: RuleConfig) -> None:
    """Raises ValueError where `start` and `stop` are no steps, or leave none."""
    if axes.start % 1 or (axes.stop or 0) % 1:
        raise ValueError(
            f"start={axes.start:g}, stop={axes.stop}: a fraction needs a horizon; give steps"
        )
    if axes.stop is not None and axes.stop <= axes.start:
        raise ValueError(
            f"stop={axes.stop:g} is not after start={axes.start:g}: the rule would never act; stop"
            " later"
        )


def check_optimizer(axes: RuleConfig, optimizer: Optimizer, moving: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the optimiser does not hold what the axes read of it, or a weight is
    too narrow to be moved."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer={optimizer} is no optimiser of torch; give the one that steps on the rule's"
            " gradient"
        )
    # Parameters are found by identity: comparing tensors compares their numbers.
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in moving.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"{name} is {parameter.dtype}: a perturbation would be lost in its rounding; keep"
                " weights in fp32 and use autocast"
            )
        group = groups.get(id(parameter), {})
        METRICS[axes.metric].check(name, group)
        DIRECTIONS[axes.direction].check(name, group)
