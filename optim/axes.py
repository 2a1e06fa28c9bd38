"""What the axes of a gradient rule mean together: which combinations mean nothing, and which
parameters are moved."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conf.schema import DIRECTIONS, OptimConfig, RuleConfig, check_value
from optim.direction import Direction
from optim.gradient import ascending


class Terms(NamedTuple):
    """Coefficients of the four products that every path is a sum of; r~ and t~ are at the moved
    point."""

    clean: float = 0.0  # J(t)^T r(t) = g
    full: float = 0.0  # J(t~)^T r(t~)
    functional: float = 0.0  # J(t~)^T r(t)
    logit: float = 0.0  # J(t)^T r(t~)


def terms_of(axes: RuleConfig) -> Terms:
    """The terms of a path: one of them, or for the angle phi

        J(t)^T [(1 - a - b) r + a r~] + b J(t~)^T r,   (a, b) = c (cos phi, sin phi),   c = 1 /
                                                       max(cos, sin), or sqrt 2 (angle_norm=paper)

    so that with max 0 degrees are exactly the logit path, 90 the functional one, and 45 SAM to
    first order."""
    if axes.path != "angle":
        return Terms(**{axes.path: 1.0})
    # exact at 0, 45 and 90 degrees
    cos, sin = (round(f(math.radians(axes.angle)), 15) for f in (math.cos, math.sin))
    a, b = (
        part / max(cos, sin) if axes.angle_norm == "max" else part * math.sqrt(2)
        for part in (cos, sin)
    )
    return Terms(clean=1 - a - b, functional=b, logit=a)


def needs_gradient(axes: RuleConfig) -> bool:
    """Whether a perturbed step takes the clean gradient g."""
    direction = DIRECTIONS[axes.direction]
    with_gradient = axes.metric == "adam" and axes.second_moment == "with_gradient"
    return (
        direction.needs_gradient
        or direction.saw is not Direction.saw
        or with_gradient
        or axes.combine != "replace"
        or terms_of(axes).clean != 0
    )


def takes_ieee_passes(optim: OptimConfig) -> bool:
    """Whether a run takes any passes in IEEE fp32 whatever its precision, so that weights must not
    be gathered in less."""
    return optim.path != "none" and (
        optim.compute == "fp32" or optim.weights == "delta" or optim.diagnostics_every is not None
    )


class Passes(NamedTuple):
    """What a step costs: passes through the body and matrix products with the head, in units of the
    batch; the plain gradient by default."""

    forwards: float = 1.0
    backwards: float = 1.0
    head_products: float = 3.0


def passes(axes: RuleConfig, store: bool, instances: int, rough: bool = False) -> Passes:
    """Returns what a perturbed step costs, which is what `SharpnessAware` counts as it goes.

    Args:
        axes: of the rule
        store: whether cotangents are stored, or else rebuilt
        instances: of a group, over all processes
        rough: whether the rule's passes round to less than IEEE fp32, so that delta-SAM takes its
        losses between the probes once more
    """
    terms, needs, share = (
        terms_of(axes),
        needs_gradient(axes),
        ascending(axes.ascent_fraction, instances) / instances,
    )
    forwards = backwards = products = 0.0
    if needs or terms.functional or terms.logit:
        forwards, backwards, products = 1, share * needs, 1 + 2 * share * needs
    if axes.weights == "delta":
        probes = (2 if axes.delta_probe == "central" else 3) + rough
        forwards, products = forwards + probes, products + probes
    products += (
        3 * bool(terms.full) + 3 * bool(terms.logit) + (2 if store else 3) * bool(terms.functional)
    )
    moved = bool(terms.full or terms.functional)
    return Passes(forwards + 1 + bool(terms.logit), backwards + moved + bool(terms.logit), products)


def make_axes(given: dict[str, Any]) -> RuleConfig:
    """The axes of a rule from keyword arguments. Raises ValueError for one that does not exist, a
    value out of range, or a contradiction."""
    known = {entry.name: entry for entry in fields(RuleConfig)}
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]!r}: no such axis; choose among {', '.join(known)}"
        )
    axes = RuleConfig(**given)
    for name, kind in get_type_hints(RuleConfig).items():
        value = getattr(axes, name)
        if not isinstance(value, kind | int if isinstance(0.0, kind) else kind):
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
    direction, terms = DIRECTIONS[axes.direction], terms_of(axes)
    uneven = (
        "weights=delta"
        if axes.weights == "delta"
        else f"ascent_fraction={axes.ascent_fraction:g}"
        if axes.ascent_fraction < 1
        else ""
    )
    if not direction.needs_gradient:
        if axes.scope != "batch":
            raise ValueError(
                f"direction={axes.direction} is the same for every group, so scope={axes.scope}"
                " means nothing; use scope=batch"
            )
        if uneven:
            raise ValueError(
                f"{uneven} is about the ascent gradient, which direction={axes.direction} does not"
                " take; use direction=gradient"
            )
    if uneven and (terms.clean or axes.combine != "replace"):
        needs = f"path={axes.path}" if terms.clean else f"combine={axes.combine}"
        raise ValueError(
            f"{needs} needs the plain gradient, which {uneven} does not compute; use"
            " weights=uniform and ascent_fraction=1"
        )
    if axes.weights == "delta" and axes.delta_descent == "reweighted" and not terms.full:
        raise ValueError(
            f"delta_descent=reweighted weighs the loss at the moved point, which path={axes.path}"
            " does not take; use path=full"
        )
    if axes.weights == "delta" and axes.delta_descent == "reweighted" and axes.ascent_fraction < 1:
        raise ValueError(
            "delta_descent=reweighted needs a weight of every instance, and"
            f" ascent_fraction={axes.ascent_fraction:g} leaves some without; use ascent_fraction=1"
            " or delta_descent=plain"
        )


def check_optimizer(axes: RuleConfig, optimizer: Optimizer, moving: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the optimiser does not hold what the axes read of it, or a weight is
    too narrow to be moved."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer={optimizer} is no optimiser of torch; give the one that steps on the rule's"
            " gradient"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in moving.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"{name} is {parameter.dtype}: a perturbation would be lost in its rounding; keep"
                " weights in fp32 and use autocast"
            )
        if axes.metric == "adam" and "betas" not in groups.get(id(parameter), {}):
            raise ValueError(
                f"metric=adam needs Adam's second moment of {name}, which the optimiser does not"
                " keep; use AdamW or metric=euclidean"
            )
        if axes.direction == "momentum" and not any(
            groups.get(id(parameter), {}).get(key) for key in ("betas", "momentum")
        ):
            raise ValueError(
                f"direction=momentum needs a momentum of {name}, which the optimiser does not keep;"
                " use AdamW or SGD with momentum"
            )


def kinds(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """What each parameter is: embedding (a tied head among them), head, norm or body."""
    owners = {id(p): owner for owner in module.modules() for p in owner.parameters(recurse=False)}
    output = getattr(module, "unembedding", None)
    if output is None:
        linear = [owner for owner in module.modules() if isinstance(owner, nn.Linear)]
        # Not `.weight`: of a layer that is parametrised, as by spectral_norm, it is computed, and
        # its buffers with it.
        output = dict(linear[-1].named_parameters(recurse=False)).get("weight") if linear else None

    def kind(parameter: Tensor) -> str:
        owner = owners[id(parameter)]
        if isinstance(owner, nn.Embedding):
            return "embedding"
        return (
            "head"
            if parameter is output or parameter is getattr(owners.get(id(output)), "bias", None)
            else "norm"
            if "Norm" in type(owner).__name__
            else "body"
        )

    return {name: kind(p) for name, p in parameters.items()}


def multiplied(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The names of the parameters that matrix products take, and that autocast therefore rounds:
    matrices, and the biases beside them. Look-ups of embeddings and positions, norms, and scales of
    their own are not; an embedding that is the head as well is."""

    def multiplies(owner: nn.Module, parameter: Tensor) -> bool:
        # Not `owner.weight`: of a layer that is parametrised it is computed, and its buffers with
        # it.
        weight = dict(owner.named_parameters(recurse=False)).get("weight", parameter)
        product = isinstance(owner, nn.Linear) or max(parameter.ndim, weight.ndim) >= 2
        return (
            product and not isinstance(owner, nn.Embedding) and "Norm" not in type(owner).__name__
        )

    found = {
        id(p)
        for owner in module.modules()
        for p in owner.parameters(recurse=False)
        if multiplies(owner, p)
    }
    found.add(id(getattr(module, "unembedding", None)))
    return {name for name, p in parameters.items() if id(p) in found}


def choose(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], pattern: str
) -> dict[str, nn.Parameter]:
    """The parameters to be moved: all, no_embeddings, no_norms, head (the tied embedding, where it
    is the head), or those whose name matches a pattern. Raises ValueError where there are none."""
    of = kinds(module, parameters)
    if pattern == "head":
        tied = getattr(module, "unembedding", None)
        chosen = {name: p for name, p in parameters.items() if of[name] == "head" or p is tied}
    else:
        out = {"all": "", "no_embeddings": "embedding", "no_norms": "norm"}
        chosen = {
            name: p
            for name, p in parameters.items()
            if (of[name] != out[pattern] if pattern in out else fnmatch.fnmatch(name, pattern))
        }
    if not chosen:
        raise ValueError(
            f"parameters={pattern} matches no parameter; the first is {next(iter(parameters))}"
        )
    return chosen
