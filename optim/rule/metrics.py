"""How the direction q is scaled: the metric P of d = P q, and the norm n that the radius is
measured by, so that the weights move by e = rho d / n(d).

A metric of your own is a class under `@metric("name")`; optim.metric=name then selects it:

    @metric("sign")
    class SignMetric(Metric):
        copies = 1

        def scale(self, parameters, q, gradients):
            return [one.sign() for one in q]
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conf.rule import METRICS, RuleConfig
from model.sharding import local
from optim.rule.tensors import blocks, dot, norm

metric = METRICS.register


@metric("euclidean")
class Metric:
    """P = 1, n(d) = |d| (SAM, 2010.01412), and the base of the other metrics.

    copies    of the moved parameters that `scale` makes"""

    copies = 0

    def __init__(self, axes: RuleConfig, optimizer: Optimizer) -> None:
        self.axes = axes
        self.optimizer = optimizer

    @classmethod
    def needs_gradient(cls, axes: RuleConfig) -> bool:
        """Returns whether P is made of the clean gradient of this step."""
        return False

    @classmethod
    def check(cls, name: str, group: dict[str, Any]) -> None:
        """Raises ValueError where the optimiser's group of a parameter lacks what P reads."""

    def scale(
        self, parameters: Sequence[Tensor], q: list[Tensor], gradients: list[Tensor | None]
    ) -> list[Tensor]:
        """Returns d = P q of every parameter, q itself or new tensors. `gradients` are the clean
        ones, where there are any."""
        return q

    def norm(self, d: list[Tensor], q: list[Tensor]) -> Tensor:
        """Returns n(d)."""
        return norm(d)


@metric("adam")
class AdamMetric(Metric):
    """P = 1 / ((v^)^p + eps), Adam's preconditioner, v^ bias-corrected, p = metric_power.

    second_moment   with_gradient: v' = b2 v + (1 - b2) g^2, as this step would leave it, corrected
                    for step + 1. before: v as it stands, and P = 1 before there is a v
    metric_norm     n(d): |d| (l2), |q| (raw) or sqrt(q.d) (dual)

    v is only read."""

    copies = 1

    @classmethod
    def needs_gradient(cls, axes: RuleConfig) -> bool:
        return axes.second_moment == "with_gradient"

    @classmethod
    def check(cls, name: str, group: dict[str, Any]) -> None:
        if "betas" not in group:
            raise ValueError(
                f"metric=adam needs Adam's second moment of {name}, which the optimiser does not"
                " keep; use AdamW or metric=euclidean"
            )

    def scale(
        self, parameters: Sequence[Tensor], q: list[Tensor], gradients: list[Tensor | None]
    ) -> list[Tensor]:
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        scaled = []
        for w, along, gradient in zip(parameters, q, gradients, strict=True):
            state = self.optimizer.state.get(w, {})
            scaled.append(self.scale_one(groups[w], state, along, gradient))
        return scaled

    def scale_one(
        self, group: dict[str, Any], state: dict[str, Any], q: Tensor, gradient: Tensor | None
    ) -> Tensor:
        """Returns q / ((v^)^p + eps) of one parameter, in a new tensor."""
        v = state.get("exp_avg_sq")
        ahead = self.needs_gradient(self.axes)
        # second_moment=before has no v yet in the first step, where P = 1.
        if v is None and not ahead:
            return q
        if ahead and gradient is None:
            # Nothing came of this parameter in this step.
            if v is None:
                return torch.zeros_like(q)
            gradient = torch.zeros_like(q)
        d = torch.empty_like(q)
        # second_moment=before reads v alone.
        if not ahead:
            gradient = None
        inputs = [tensor for tensor in (gradient, v) if tensor is not None]
        # v is corrected for the steps that it has seen: with this step's g in it, one more.
        step = float(state.get("step", 0)) + ahead
        eps = self.axes.metric_eps
        if eps is None:
            eps = group["eps"]
        # Block by block, so that d, q, g and v of a block are still in the cache when read again.
        for out, along, *rest in blocks(*map(local, [d, q, *inputs])):
            self.second_moment(out, rest, group["betas"][1], step)
            if self.axes.metric_power == 0.5:
                root = out.sqrt_()
            else:
                root = out.pow_(self.axes.metric_power)
            # What never had a gradient does not move.
            never = root == 0 if eps == 0 else None
            torch.div(along, root.add_(eps), out=out)
            if never is not None:
                out.masked_fill_(never, 0)
        return d

    def second_moment(self, out: Tensor, inputs: list[Tensor], b2: float, step: float) -> None:
        """Writes v^ of a stretch: of [g, v] or [g] as this step leaves it, or of [v] as it is."""
        correction = 1 - b2**step
        if not self.needs_gradient(self.axes):
            torch.div(inputs[0], correction, out=out)
            return
        torch.mul(inputs[0], inputs[0], out=out).mul_((1 - b2) / correction)
        if len(inputs) > 1:
            out.add_(inputs[1], alpha=b2 / correction)

    def norm(self, d: list[Tensor], q: list[Tensor]) -> Tensor:
        if self.axes.metric_norm == "dual":
            return dot(q, d).sqrt()
        if self.axes.metric_norm == "l2":
            return norm(d)
        return norm(q)


@metric("adaptive")
class AdaptiveMetric(Metric):
    """P = T^2, T = |w| + floor for matrices and 1 for vectors (ASAM, 2102.11600);
    n(d) = |T q| = sqrt(q.d)."""

    copies = 1

    def scale(
        self, parameters: Sequence[Tensor], q: list[Tensor], gradients: list[Tensor | None]
    ) -> list[Tensor]:
        scaled = []
        for w, along in zip(parameters, q, strict=True):
            if w.ndim < 2:
                scaled.append(along)
            else:
                T = w.detach().abs().add_(self.axes.adaptive_floor)
                scaled.append(T.square_().mul_(along))
        return scaled

    def norm(self, d: list[Tensor], q: list[Tensor]) -> Tensor:
        return dot(q, d).sqrt()
