"""What a rule's move says about the loss: looked at where it is free, and at the price of passes
where it is asked for."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.logits import compute_dtype
from model.sharding import all_sum, local, sharded_as
from optim.axes import Terms
from optim.gradient import Micro, RuleResult, take_gradients
from optim.perturbation import (
    dot,
    ieee_fp32,
    norm,
    random_state,
    realised,
    rounds,
    same_buffers,
    set_random_state,
)

if TYPE_CHECKING:
    from optim.sharpness import SharpnessAware

FAITHFUL = 0.9  # fidelity below which rounding is said to harm a rule
TOLERANCE = 0.1  # and how far the part of the move along the intended one may be from all of it


def look_at_move(
    rule: "SharpnessAware",
    moving: Sequence[Tensor],
    copies: Sequence[Tensor],
    radius: float,
    terms: Terms,
    weight: float,
    result: RuleResult,
) -> None:
    """Logs what became of the move in the compute precision, whose weights moved, and the slope of
    g_rule along it.

    realised_radius    |e~|, e~ = the move as the passes see it: rounded where matrix products take
                       a weight, exact where it is looked up or scales
    realised_cosine    of e~ with e. Low in bf16 at small radii, and no harm by itself: what
                       rounding adds lies at right angles to e
    realised_along     e.e~ / |e|^2, the component along e in units of the intended |e| (`radius`):
                       1 where nothing of the move is lost"""
    names = {id(p): name for name, p in rule.parameters.items()}
    dtype = compute_dtype(moving[0])
    seen = realised(
        moving, copies, [dtype if names[id(p)] in rule.multiplied else p.dtype for p in moving]
    )
    length = math.sqrt(math.fsum(seen.squares))
    shares = dict.fromkeys(("embedding", "body", "head"), 0.0)
    for parameter, square in zip(moving, seen.squares, strict=True):
        kind = rule.kinds[names[id(parameter)]]
        shares["body" if kind == "norm" else kind] += square / max(length**2, 1e-300)
    found = {"sharpness/realised_radius": seen.norm, "sharpness/realised_cosine": seen.cosine}
    if rule.rho > 0:
        # A replica that counts no target does not move, but adds up the same figures as the others.
        # The square may be too large for a float.
        found["sharpness/realised_along"] = seen.product / radius / radius if radius > 0 else 1.0
    rule.log(
        result, weight, found | {f"sharpness/share_{kind}": share for kind, share in shares.items()}
    )
    if weight == 1 and not terms.logit and length > 0:
        pairs = [
            (sharded_as(local(now) - before, now), now.grad)
            for now, before in zip(moving, copies, strict=True)
            if now.grad is not None
        ]
        slope = dot([e for e, _ in pairs], [g for _, g in pairs]).item() / length
        result.metrics["sharpness/rule_slope"] = slope
        if "sharpness/slope" in result.metrics:
            result.metrics["sharpness/curvature"] = (
                slope - float(result.metrics["sharpness/slope"])
            ) / length


def unfaithful(figures: Mapping[str, Any]) -> str:
    """Returns, by the figures of a row, what rounding does to a rule, in words; nothing where it
    does no harm that was measured."""
    fidelity, along = figures.get("sharpness/fidelity"), figures.get("sharpness/realised_along")
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


def warn_of_rounding(rule: "SharpnessAware", result: RuleResult) -> None:
    """Says once what rounding does to a rule, and what helps."""
    harm = "" if rule.warned else unfaithful(result.metrics)
    if harm:
        rule.warned = True
        rough = rule.axes.compute == "precision" and rounds(rule.device)
        remedy = "compute the rule in IEEE fp32 (optim.compute=fp32) or " if rough else ""
        rule.say(f"warning: {harm}; {remedy}take a larger radius (optim.rho)")


def clean_loss(
    rule: "SharpnessAware", group: list[Micro], result: RuleResult, random: dict[str, Tensor]
) -> None:
    """One forward over a group at the weights as they are, for rules that take their only pass
    elsewhere."""
    with same_buffers(rule.module):
        losses = rule.instance_losses(group, result, random)
    for micro, losses_B in zip(group, losses, strict=True):
        total = all_sum(rule.module, (losses_B * micro.counted_B).double().sum())
        result.log(1 / result.tokens, {"sharpness/clean_loss": total})


def decompose(rule: "SharpnessAware", group: list[Micro], result: RuleResult) -> None:
    """SAM's change of the gradient in its two parts, at the point that the rule moves the first
    group to (2502.02407): norms and cosines of

        delta_func = J(t~)^T r - g        delta_logit = J(t)^T r~ - g

    It takes 6 forwards and 5 backwards over the group, and leaves p.grad empty."""
    tokens = (
        sum(micro.tokens for micro in group) if rule.axes.scope == "micro_batch" else result.tokens
    )
    random, scratch = random_state(), replace(result, metrics={}, tokens=tokens)
    found = []
    with same_buffers(rule.module):
        rule.plain(group, scratch)
        found.append(take_gradients(rule.parameters))
        for terms in (Terms(functional=1), Terms(logit=1)):
            set_random_state(random)
            rule.one_group(group, scratch, terms, None, False, False)
            found.append(take_gradients(rule.parameters))
    set_random_state(random)
    result.forwards, result.backwards, result.head_products = (
        scratch.forwards,
        scratch.backwards,
        scratch.head_products,
    )
    if not all(found):  # the ascent was not finite
        return
    g, functional, logit = ([gradients[name] for name in found[0]] for gradients in found)
    torch._foreach_sub_(functional, g)
    torch._foreach_sub_(logit, g)
    sizes = [norm(tensors).clamp_min(1e-30) for tensors in (g, functional, logit)]
    result.metrics |= {
        "sharpness/delta_func": sizes[1],
        "sharpness/delta_logit": sizes[2],
        "sharpness/cosine_func_logit": dot(functional, logit) / (sizes[1] * sizes[2]),
        "sharpness/cosine_func_gradient": dot(functional, g) / (sizes[1] * sizes[0]),
        "sharpness/cosine_logit_gradient": dot(logit, g) / (sizes[2] * sizes[0]),
    }


def measure_fidelity(rule: "SharpnessAware", group: list[Micro], result: RuleResult) -> None:
    """Logs the fidelity of a rule: the cosine of g_rule - g, as the passes find it, with the same
    in IEEE fp32, on the first micro-batch that counts tokens, with the same weights and dropout
    masks. It is of g_rule before `combine`, and there is none where nothing moves."""
    micros = [replace(micro) for micro in group]
    rule.count_tokens(micros)
    micro = next((micro for micro in micros if micro.tokens), None)
    if micro is None:
        return
    scratch = replace(result, metrics={}, tokens=micro.tokens)
    if rule.axes.scope == "replica":
        rule.count_tokens([micro], rule.add)
    with same_buffers(rule.module), same_masks(rule.module, rule.device):
        ours = change_of_gradient(rule, micro, scratch)
        with ieee_fp32(rule.device):
            exact = change_of_gradient(rule, micro, scratch)
    result.forwards, result.backwards, result.head_products = (
        scratch.forwards,
        scratch.backwards,
        scratch.head_products,
    )
    size = norm(ours) * norm(exact)
    if size.isfinite() and size > 0:
        result.metrics["sharpness/fidelity"] = dot(ours, exact) / size


def change_of_gradient(rule: "SharpnessAware", micro: Micro, scratch: RuleResult) -> list[Tensor]:
    """g_rule - g of a micro-batch, by parameter; none where the ascent is not finite. The random
    stream stays where it is."""
    random = random_state()
    rule.plain([micro], scratch)
    g = take_gradients(rule.parameters)
    set_random_state(random)
    rule.one_group([micro], scratch, rule.terms, None, False, False)
    moved = take_gradients(rule.parameters)
    set_random_state(random)
    return [moved[name].sub_(g[name]) for name in g if name in moved]


def same_masks(module: nn.Module, device: torch.device) -> AbstractContextManager:
    """Has dropout draw the same masks in every precision: attention's fused kernels on CUDA draw
    theirs each in its own way."""
    drops = any(
        isinstance(owner, nn.Dropout) and owner.training and owner.p > 0
        for owner in module.modules()
    )
    return sdpa_kernel(SDPBackend.MATH) if drops and device.type == "cuda" else nullcontext()
