"""Gradient rules on any nn.Module: an adapter says how to get its logits, and the loss of each
target.

What people have at hand works without one: a module that gives logits, a model of transformers, and
batches as pairs or as dicts with labels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT
from model.logits import IGNORED, Cotangent, InstanceWeighting, instance_means, logit_statistics


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each target in nats, 0 where it is -100; logits have one
    dimension more, the classes, last. Raises ValueError where targets do not fit them."""
    if (
        logits.shape[:-1] != targets.shape
        or targets.is_floating_point()
        or targets.dtype == torch.bool
    ):
        raise ValueError(
            f"targets {tuple(targets.shape)} of {targets.dtype} do not fit logits"
            f" {tuple(logits.shape)}: give the number of a class for each vector of logits, or"
            " optim.Adapter(model, losses=...)"
        )
    z = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        z, targets.flatten().long(), reduction="none", ignore_index=IGNORED
    ).view(targets.shape)


def is_counted(targets: Tensor) -> Tensor:
    """Returns which targets count: those that are not -100."""
    return targets != IGNORED


def logits_of(module: nn.Module, inputs: Any) -> Tensor:
    """Returns the logits of a module, which takes a dict by names: what it gives, or the `logits`
    in that, as models of transformers have them. Raises ValueError where there are none."""
    # A dict goes in by names, as models of transformers take it.
    output = module(**inputs) if hasattr(inputs, "items") else module(inputs)
    # What comes out may be the logits, a dict that holds them, or an object that has them.
    logits = output.get("logits") if hasattr(output, "items") else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim == 0:
        raise ValueError(
            f"{type(module).__name__} gives a {type(output).__name__}, and a rule needs logits; say"
            " how to get them: optim.Adapter(model, logits=lambda model, inputs: ...)"
        )
    return logits


class Adapter:
    """Makes a module that is no GPT one that a rule can differentiate:

    logits(module, inputs) -> logits      default: module(inputs), by names where inputs are a dict,
                                          and of its output the `.logits`
    losses(logits, targets) -> losses     of each target, in the targets' shape; default:
                                          cross-entropy
    counted(targets) -> bools             which targets count, in the same shape; default: those
                                          that are not -100

    Inputs are a tensor or a dict of tensors; the first dimension of inputs and targets is that of
    instances. The logits are dense, so the cotangent of the functional path is always stored."""

    def __init__(
        self,
        module: nn.Module,
        logits: Callable[[nn.Module, Any], Tensor] = logits_of,
        losses: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        counted: Callable[[Tensor], Tensor] = is_counted,
    ) -> None:
        self.module = module
        self.logits = logits
        self.losses = losses
        self.counted = counted

    def lazy_logits(self, inputs: Any) -> "DenseLogits":
        """Returns the logits of a micro-batch, behind the interface of the lazy ones."""
        return DenseLogits(self.logits(self.module, inputs), self.losses, self.counted)


@dataclass
class DenseLogits:
    """Logits that are there already, behind the interface of `model.logits.LazyLogits`; its
    docstrings say what the methods give."""

    z: Tensor
    losses: Callable[[Tensor, Tensor], Tensor]
    counted: Callable[[Tensor], Tensor]

    def cross_entropy_and_cotangent(
        self,
        targets: Tensor,
        scale: float = 1.0,
        keep_r: bool = False,
        keep_h: bool = False,
        weighting: InstanceWeighting | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Cotangent]:
        # r = dL/dz by autograd on a leaf of its own, since the loss may be any function of z.
        with torch.enable_grad():  # r is wanted even where no gradient is
            leaf = self.z.detach().requires_grad_()
            losses, counted = self.losses(leaf, targets), self.counted(targets)
            total = torch.where(counted, losses, 0).sum() * scale
            r = torch.autograd.grad(total, leaf, retain_graph=weighting is not None)[0]
            factor = counted * torch.full_like(losses, scale)
            cotangent = Cotangent(targets, factor, factor, r_NxV=r)
            # Instance weights enter the gradient alone: the loss and the stored r are without them.
            if weighting is not None:
                weights_B = weighting(
                    slice(0, len(targets)), instance_means(losses.detach(), counted)
                )
                losses_B = torch.where(counted, losses, 0).reshape(len(targets), -1).sum(1)
                r = torch.autograd.grad((weights_B * losses_B).sum() * scale, leaf)[0]
                cotangent.weights_B = weights_B
        return _Surrogate.apply(self.z, r, total.detach()), cotangent

    def vjp(self, cotangent: Cotangent, source_VxD: Tensor | None = None) -> Tensor:
        assert cotangent.r_NxV is not None
        return _Surrogate.apply(
            self.z, cotangent.r_NxV, torch.zeros_like(cotangent.r_NxV.flatten()[0])
        )

    def products_at(
        self, targets: Tensor, scale: float, h_NxD: Tensor | None, weight_VxD: Tensor | None
    ) -> tuple[Tensor, Cotangent]:
        total, cotangent = self.cross_entropy_and_cotangent(targets, scale)
        return total.detach(), cotangent

    @torch.no_grad()
    def instance_losses(self, targets: Tensor) -> Tensor:
        return instance_means(self.losses(self.z, targets), self.counted(targets))

    @torch.no_grad()
    def statistics(self) -> tuple[dict[str, Tensor], float]:
        z = self.z.flatten(0, -2) if self.z.ndim > 1 else self.z[:, None]
        return logit_statistics(z.to(torch.promote_types(z.dtype, torch.float32))), 0.0


# Batches


def as_groups(batches: Iterable[Any], module: nn.Module) -> list[list[tuple[Any, Tensor]]]:
    """Returns the groups of micro-batches (inputs, targets) that a caller means: each element of
    `batches` is one of them or a list, and a pair or a dict by itself is the whole batch. A dict
    has its targets as "labels". Raises ValueError for anything else."""
    if is_micro_batch(batches):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches={batches} is no list; give one of pairs (inputs, targets), or of dicts with"
            " labels"
        )
    groups = [
        [element] if is_micro_batch(element) or not isinstance(element, list) else element
        for element in batches
    ]
    return [[as_pair(micro, module) for micro in group] for group in groups]


def is_micro_batch(element: Any) -> bool:
    """Returns whether something is a pair (inputs, targets), in a tuple or as a DataLoader's list,
    or a dict."""
    is_pair = (
        isinstance(element, (tuple, list)) and len(element) == 2 and isinstance(element[1], Tensor)
    )
    return is_pair or hasattr(element, "items")


def as_pair(micro: Any, module: nn.Module) -> tuple[Any, Tensor]:
    """Returns the inputs and targets of a micro-batch. Raises ValueError, with the remedy, for what
    is not a micro-batch of this module."""
    if not is_micro_batch(micro):
        raise ValueError(
            f"a {type(micro).__name__} is no micro-batch; give pairs (inputs, targets), or dicts"
            " with labels"
        )
    inputs, targets = split_labels(micro, module) if hasattr(micro, "items") else micro
    if isinstance(module, GPT):
        inputs = tokens_of(inputs)
        if inputs.shape != targets.shape or targets.is_floating_point():
            raise ValueError(
                f"targets {tuple(targets.shape)} of {targets.dtype} do not fit tokens"
                f" {tuple(inputs.shape)}: give the next of each"
            )
    if targets.ndim == 0:
        raise ValueError("targets have no dimension of instances; give a target for every instance")
    return inputs, targets


def split_labels(micro: Any, module: nn.Module) -> tuple[dict[str, Any], Tensor]:
    """Returns a dict without its labels, and targets made of these. Labels are those of
    transformers, whose language models compare them with the logits of the position before."""
    if not isinstance(micro.get("labels"), Tensor):
        raise ValueError(
            f"a dict of {', '.join(micro)} has no labels; add them, or give a pair (inputs,"
            " targets)"
        )
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(module).__name__} makes its decoder's inputs of its labels; give pairs, and"
            " optim.Adapter(model, logits=...)"
        )
    inputs = {name: value for name, value in micro.items() if name != "labels"}
    targets = micro["labels"]
    # The last position has no next token here, and is not counted.
    if is_causal(module) and targets.ndim == 2:
        targets = nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
    return inputs, targets


def tokens_of(inputs: Any) -> Tensor:
    """Returns the tokens that a GPT reads. Raises ValueError for a dict of anything else."""
    if not hasattr(inputs, "items"):
        return inputs
    if [*inputs] != ["input_ids"]:
        raise ValueError(
            f"a GPT reads tokens, and no {', '.join(inputs.keys() - {'input_ids'})}; give"
            " pairs (tokens, targets)"
        )
    return inputs["input_ids"]


def is_causal(module: nn.Module) -> bool:
    """Returns whether a module is a language model that predicts the next token: a GPT, or one of
    transformers, which says so, also within torch's wrappers for several devices."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return is_causal(module.module)
    return isinstance(module, GPT) or getattr(module, "loss_type", "none") in (None, "ForCausalLM")


def refuse_unshifted(inputs: Any, targets: Tensor, module: nn.Module) -> None:
    """Raises ValueError where a language model is to predict the token that it reads, and not the
    next one."""
    tokens = inputs
    if hasattr(inputs, "items"):
        tokens = inputs.get("input_ids")
    # A module that does not say what it is: with "input_ids" it is most likely such a model within
    # another.
    unknown = hasattr(inputs, "items") and not hasattr(module, "loss_type")
    if (
        not (is_causal(module) or unknown)
        or not isinstance(tokens, Tensor)
        or tokens.shape != targets.shape
        or targets.ndim != 2
    ):
        return
    # A text of one token repeated is its own shift: only targets that are no shift are a mistake.
    counted = targets != IGNORED
    same = (tokens == targets) | ~counted
    shifted = (tokens[:, 1:] == targets[:, :-1]) | ~counted[:, :-1]
    if counted.any() and same.all() and not shifted.all():
        raise ValueError(
            "targets are the inputs themselves, which a language model would copy; give the next"
            " tokens: inputs tokens[:, :-1] and targets tokens[:, 1:]"
        )


class _Surrogate(torch.autograd.Function):
    """A value whose gradient by z is r."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, r: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(r)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None
