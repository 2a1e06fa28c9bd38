"""What a rule's move says about the loss: looked at where it is free, and at the price of passes where it is asked for."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.logits import compute_dtype
from model.sharding import all_sum, local, sharded_as
from optim.axes import Terms
from optim.gradient import Micro, RuleResult, take_gradients
from optim.perturbation import dot, norm, random_state, realised, same_buffers, set_random_state

if TYPE_CHECKING:
    from optim.sharpness import SharpnessAware

FAITHFUL = 0.9  # below this cosine of the realised with the intended move, a warning


def look_at_move(rule: "SharpnessAware", moving: Sequence[Tensor], copies: Sequence[Tensor], terms: Terms, weight: float, result: RuleResult) -> None:
    """Logs what became of the move in the compute precision, whose weights moved, and the slope of g_rule along it."""
    seen, cosine, squares = realised(moving, copies, compute_dtype(moving[0]))
    length = math.sqrt(math.fsum(squares))
    names = {id(p): name for name, p in rule.parameters.items()}
    shares = dict.fromkeys(("embedding", "body", "head"), 0.0)
    for parameter, square in zip(moving, squares, strict=True):
        kind = rule.kinds[names[id(parameter)]]
        shares["body" if kind == "norm" else kind] += square / max(length**2, 1e-300)
    found = {"sharpness/realised_radius": seen, "sharpness/realised_cosine": cosine}
    rule.log(result, weight, found | {f"sharpness/share_{kind}": share for kind, share in shares.items()})
    if weight == 1 and not terms.logit and length > 0:
        pairs = [(sharded_as(local(now) - before, now), now.grad) for now, before in zip(moving, copies, strict=True) if now.grad is not None]
        slope = dot([e for e, _ in pairs], [g for _, g in pairs]).item() / length
        result.metrics["sharpness/rule_slope"] = slope
        if "sharpness/slope" in result.metrics:
            result.metrics["sharpness/curvature"] = (slope - float(result.metrics["sharpness/slope"])) / length
    if length > 0 and cosine < FAITHFUL and not rule.warned:
        rule.warned = True
        precision = str(compute_dtype(moving[0])).removeprefix("torch.")
        rule.say(
            f"warning: in {precision} the weights move by {seen:.3g} at a cosine of {cosine:.2f} with the intended move of {length:.3g}: rounding "
            "hides it, and curvatures are unreliable; compute the rule in IEEE fp32 (optim.compute=fp32) or take a larger radius (optim.rho)"
        )


def clean_loss(rule: "SharpnessAware", group: list[Micro], result: RuleResult, random: dict[str, Tensor]) -> None:
    """One forward over a group at the weights as they are, for rules that take their only pass elsewhere."""
    with same_buffers(rule.module):
        losses = rule.instance_losses(group, result, random)
    for micro, losses_B in zip(group, losses, strict=True):
        total = all_sum(rule.module, (losses_B * micro.counted_B).double().sum())
        result.log(1 / result.tokens, {"sharpness/clean_loss": total})


def decompose(rule: "SharpnessAware", group: list[Micro], result: RuleResult) -> None:
    """SAM's change of the gradient in its two parts, at the point that the rule moves the first group to (2502.02407): norms and
    cosines of

        delta_func = J(t~)^T r - g        delta_logit = J(t)^T r~ - g

    It takes 6 forwards and 5 backwards over the group, and leaves p.grad empty."""
    tokens = sum(micro.tokens for micro in group) if rule.axes.scope == "micro_batch" else result.tokens
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
    result.forwards, result.backwards, result.head_products = scratch.forwards, scratch.backwards, scratch.head_products
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
