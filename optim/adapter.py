"""Gradient rules on any nn.Module: an adapter says how to get its logits, and the loss of each target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.logits import IGNORED, Cotangent, Weigh, instance_means, logit_statistics


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each target in nats, 0 where it is -100; logits have one dimension more, the classes, last."""
    z = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(z, targets.flatten(), reduction="none", ignore_index=IGNORED).view(targets.shape)


def is_counted(targets: Tensor) -> Tensor:
    """Which targets count: those that are not -100."""
    return targets != IGNORED


class Adapter:
    """How a rule sees a module that is no GPT:

    logits(module, inputs) -> logits      default: module(inputs); a Hugging Face model: lambda m, inputs: m(**inputs).logits
    losses(logits, targets) -> losses     of each target, in the targets' shape; default: cross-entropy
    counted(targets) -> bools             which targets count, in the same shape; default: those that are not -100

    Inputs are a tensor or a dict of tensors; the first dimension of inputs and targets is that of instances. The logits are dense, so
    the cotangent of the functional path is always stored."""

    def __init__(
        self,
        module: nn.Module,
        logits: Callable[[nn.Module, Any], Tensor] = lambda module, inputs: module(inputs),
        losses: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        counted: Callable[[Tensor], Tensor] = is_counted,
    ) -> None:
        self.module, self.logits, self.losses, self.counted = module, logits, losses, counted

    def lazy_logits(self, inputs: Any) -> "DenseLogits":
        """The logits of a micro-batch, behind the interface of the lazy ones."""
        return DenseLogits(self.logits(self.module, inputs), self.losses, self.counted)


@dataclass
class DenseLogits:
    """Logits that are there already, behind the interface of `model.logits.LazyLogits`; its docstrings say what the methods give."""

    z: Tensor
    losses: Callable[[Tensor, Tensor], Tensor]
    counted: Callable[[Tensor], Tensor]

    def cross_entropy_and_cotangent(
        self, targets: Tensor, scale: float = 1.0, keep_r: bool = False, keep_h: bool = False, weigh: Weigh | None = None, into: Tensor | None = None
    ) -> tuple[Tensor, Cotangent]:
        with torch.enable_grad():  # r is wanted even where no gradient is
            leaf = self.z.detach().requires_grad_()
            losses, counted = self.losses(leaf, targets), self.counted(targets)
            total = torch.where(counted, losses, 0).sum() * scale
            r = torch.autograd.grad(total, leaf, retain_graph=weigh is not None)[0]
            factor = counted * torch.full_like(losses, scale)
            cotangent = Cotangent(targets, factor, factor, r_NxV=r)
            if weigh is not None:
                weights_B = weigh(slice(0, len(targets)), instance_means(losses.detach(), counted))
                losses_B = torch.where(counted, losses, 0).reshape(len(targets), -1).sum(1)
                r = torch.autograd.grad((weights_B * losses_B).sum() * scale, leaf)[0]
                cotangent.weights_B = weights_B
        return _Surrogate.apply(self.z, r, total.detach()), cotangent

    def pull(self, cotangent: Cotangent, made_at_VxD: Tensor | None = None) -> Tensor:
        assert cotangent.r_NxV is not None
        return _Surrogate.apply(self.z, cotangent.r_NxV, torch.zeros_like(cotangent.r_NxV.flatten()[0]))

    def spend(self, targets: Tensor, scale: float, h_NxD: Tensor | None, weight_VxD: Tensor | None) -> tuple[Tensor, Cotangent]:
        total, cotangent = self.cross_entropy_and_cotangent(targets, scale)
        return total.detach(), cotangent

    @torch.no_grad()
    def instance_losses(self, targets: Tensor) -> Tensor:
        return instance_means(self.losses(self.z, targets), self.counted(targets))

    @torch.no_grad()
    def statistics(self) -> tuple[dict[str, Tensor], float]:
        z = self.z.flatten(0, -2) if self.z.ndim > 1 else self.z[:, None]
        return logit_statistics(z.to(torch.promote_types(z.dtype, torch.float32))), 0.0


class _Surrogate(torch.autograd.Function):
    """A value whose gradient by z is r."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, r: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(r)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None
