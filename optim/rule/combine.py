"""Combinations of the clean gradient g with the moved gradient g_rule, after both passes.

A combination of your own is a class under `@combination("name")`;
optim.combine=name then selects it:

    @combination("average")
    class Average(Combination):
        needs_gradient = True

        def combine(self, g, g_rule, overlap):
            torch._foreach_lerp_(g_rule, g, 0.5)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.rule import COMBINATIONS, RuleConfig
from optim.rule.tensors import dot, norm

combination = COMBINATIONS.register


class Overlap(NamedTuple):
    """The inner product of g and g_rule, and their norms."""

    inner: Tensor  # g . g_rule
    size: Tensor  # |g|
    rule_size: Tensor  # |g_rule|

    @property
    def cosine(self) -> Tensor:
        """The cosine between the two."""
        return self.inner / (self.size * self.rule_size).clamp_min(1e-30)


class Combination:
    """The base of all combinations.

    needs_gradient    whether `combine` is called, with g, which then lives until the end of the
                      step; True for every class that has a `combine`
    changes_update    whether `combine` changes g_rule
    memory            copies of all parameters that `state` holds from step to step
    state             tensors by name that the next step depends on; a checkpoint keeps them"""

    needs_gradient = False
    changes_update = True
    memory = 0

    def __init_subclass__(cls) -> None:
        if cls.combine is not Combination.combine and not cls.needs_gradient:
            raise TypeError(
                f"{cls.__name__}.combine would never be called; set needs_gradient = True"
            )

    def __init__(self, axes: RuleConfig) -> None:
        self.axes = axes
        self.state: dict[str, Tensor] = {}

    def combine(self, g: list[Tensor], g_rule: list[Tensor], overlap: Overlap) -> None:
        """Changes g_rule in place, in a step that moves the weights; g may be overwritten."""

    def remember(self, g: Mapping[str, Tensor], rho: float) -> None:
        """Receives what `combine` left in g, by name, and the radius of the step."""

    def combine_plain(self, g: Mapping[str, Tensor], size: Tensor) -> None:
        """Changes the plain gradient g, of norm `size`, in place, in a step from `start` to before
        `stop` that does not move the weights."""


def combine_in_place(
    combination: Combination, g: list[Tensor], g_rule: list[Tensor], overlap: Overlap
) -> None:
    """Has a combination change g_rule. Raises ValueError for one that returns a result instead,
    which would be lost."""
    combine: Callable[..., Any] = combination.combine
    if combine(g, g_rule, overlap) is not None:
        raise ValueError(
            f"combine={combination.axes.combine} returned a result; change g_rule in place"
        )


@combination("replace")
class Replace(Combination):
    """g_rule."""

    changes_update = False


@combination("reuse")
class Reuse(Combination):
    """LookSAM (2203.02714): off the period, the last step's part of g_rule is used again.

    g_v = g_rule - (g_rule . g / |g|^2) g       the part of g_rule orthogonal to g
    g + alpha (|g| / |g_v|) g_v                 the gradient of the steps in between"""

    needs_gradient = True
    changes_update = False
    memory = 1

    def combine(self, g: list[Tensor], g_rule: list[Tensor], overlap: Overlap) -> None:
        # g_v takes the memory of g, which nothing needs any longer.
        torch._foreach_mul_(g, -float(overlap.inner) / max(float(overlap.size) ** 2, 1e-60))
        torch._foreach_add_(g, g_rule)

    def remember(self, g: Mapping[str, Tensor], rho: float) -> None:
        # At radius 0 there is nothing but rounding in g_v.
        self.state = dict(g) if rho else {}

    def combine_plain(self, g: Mapping[str, Tensor], size: Tensor) -> None:
        g_v = [self.state[name] for name in g if name in self.state]
        if g_v:
            factor = float(self.axes.alpha * size / norm(g_v).clamp_min(1e-30))
            torch._foreach_add_([g[name] for name in g if name in self.state], g_v, alpha=factor)


@combination("orthogonal")
class Orthogonal(Combination):
    """GSAM (2203.08065): g_rule - alpha (g - (g . g_rule / |g_rule|^2) g_rule), without a part of
    what g has orthogonal to g_rule."""

    needs_gradient = True

    def combine(self, g: list[Tensor], g_rule: list[Tensor], overlap: Overlap) -> None:
        # g_rule (1 + alpha g.g_rule / |g_rule|^2) - alpha g, the equation above in two passes.
        rule_square = max(float(overlap.rule_size) ** 2, 1e-60)
        torch._foreach_mul_(g_rule, 1 + self.axes.alpha * float(overlap.inner) / rule_square)
        torch._foreach_add_(g_rule, g, alpha=-self.axes.alpha)


def overlap_of(g: list[Tensor], g_rule: list[Tensor], rule_size: Tensor) -> Overlap:
    """Returns how g and g_rule, whose norm is known, lie to each other."""
    return Overlap(dot(g, g_rule), norm(g), rule_size)
