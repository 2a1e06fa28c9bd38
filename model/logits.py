"""Logits that are kept lazy: hidden states h and the unembedding W, never a tokens x vocabulary
tensor.

    z = h W^T      l_n = logsumexp(z_n) - z_n[target_n]      r = dl/dz = softmax(z) - onehot(target)
    dl/dh = r W    dl/dW = r^T h

A soft-cap c replaces z by z' = c tanh(z / c) in l, so that r gains the factor 1 - (z'/c)^2; a
z-loss b adds b logsumexp(z')^2 to l, so that softmax in r gains the factor 1 + 2 b logsumexp(z').

The loss and its two gradients are computed together, chunk of tokens by chunk of tokens
(model/chunked_head.py), so that the head costs its three matrix products and nothing twice. A chunk
is large enough for the products; within it, z turns into r in blocks of rows that stay in a CPU's
cache, where the softmax is free of memory traffic.

Sharpness-aware rules take the cotangent r at one point of weight space, the source, and the
products r W and r^T h at another, the target. A `Cotangent` is r on its way between the two: kept
whole, or to be rebuilt from the source's h, or already turned into the products.

Shapes: B instances of T tokens each, N = B T tokens, D width, V vocabulary with its padding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.chunked_head import (
    IGNORED,
    HeadConfig,
    InstanceWeighting,
    InstanceWeights,
    Labels,
    Point,
    Products,
    capped,
    differentiable_gradients,
    instance_means,
    losses,
    losses_and_gradients,
    rebuilt_products,
    stored_products,
    wide_dtype,
)
from model.sharding import compute_device

__all__ = [
    "IGNORED",
    "Cotangent",
    "InstanceWeighting",
    "LazyLogits",
    "compute_dtype",
    "instance_means",
]


@dataclass
class Cotangent:
    """scale * r of the counted tokens of a micro-batch, made at weights that may have moved since.

    stored       r_NxV, in the compute dtype
    to rebuild   h_NxD of the source, to be joined with its W, and lse_N, its log-normalisers
    spent        dh_NxD and dW_VxD, the products of r with the h and W of some target

    One class for the three, since they are no alternatives: the angle path keeps r and h of one
    pass, and the head fills in what it keeps only when it is computed."""

    targets_N: Tensor
    factor_N: Tensor  # scale of each row: 0 where the target is not counted
    lse_N: Tensor
    h_NxD: Tensor | None = None
    r_NxV: Tensor | None = None
    dh_NxD: Tensor | None = None
    dW_VxD: Tensor | None = None
    # Of the instances, where they were weighed; factor_N is without them.
    weights_B: Tensor | None = None

    def free(self) -> None:
        """Lets go of the large tensors."""
        self.h_NxD = None
        self.r_NxV = None
        self.dh_NxD = None
        self.dW_VxD = None


@dataclass
class LazyLogits:
    """The logits h_BxTxD W^T; rows of W from `vocab_size` on are padding that no softmax sees."""

    h_BxTxD: Tensor
    weight_VxD: Tensor
    vocab_size: int
    softcap: float | None = None
    z_loss: float = 0.0

    def dense(self) -> Tensor:
        """Returns logits_BxTxV, soft-capped, for callers that need them all."""
        z = torch.nn.functional.linear(self.h_BxTxD, self.weight_VxD)[..., : self.vocab_size]
        return capped(z, self.softcap)

    def cross_entropy(self, targets_BxT: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Returns `scale` times the cross-entropy in nats summed over the counted targets, in fp32
        or wider, and their number."""
        total, _ = self.cross_entropy_and_cotangent(targets_BxT, scale)
        return total, (targets_BxT != IGNORED).sum()

    def cross_entropy_and_cotangent(
        self,
        targets_BxT: Tensor,
        scale: float = 1.0,
        keep_r: bool = False,
        keep_h: bool = False,
        weighting: InstanceWeighting | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Cotangent]:
        """Returns the loss as `cross_entropy` does, and r.

        Args:
            targets_BxT: token ids, or `IGNORED`
            scale: what multiplies the loss and r
            keep_r: stores r, N x V in the compute dtype
            keep_h: keeps h, which with the W of this moment rebuilds r
            weighting: weights of the instances (sequences) in the gradient, and in no other result
            into: memory for r, used where it fits
        """
        # Where `compute` runs, both autocast and gradients are off: it needs what holds here.
        dtype = compute_dtype(self.h_BxTxD)
        with_gradients = torch.is_grad_enabled()
        head = self.config
        labels = self._labels(targets_BxT, scale)
        cotangent, weights = new_cotangent(targets_BxT, labels, weighting)

        def compute(h_NxD: Tensor, weight_VxD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            here = Point(h_NxD.to(dtype), weight_VxD.to(dtype))
            r_NxV = room_for_cotangent(here, into) if keep_r else None
            # Two of the head's three products are gradients, which only autograd asks for.
            if with_gradients:
                found, products = losses_and_gradients(here, here, labels, head, r_NxV, weights)
            else:
                found, products = losses(here, labels, head, r_NxV), Products.none(labels)
            cotangent.r_NxV = r_NxV
            if keep_h:
                cotangent.h_NxD = here.h_NxD.detach()
            cotangent.lse_N = found.lse_N
            return (found.losses_N * labels.factor_N).sum(), *products

        again = partial(differentiable_gradients, labels=labels, head=head)
        return self._apply(compute, again), cotangent

    def vjp(self, cotangent: Cotangent, source_VxD: Tensor | None = None) -> Tensor:
        """Returns a zero whose backward hands on J^T r: J is that of these logits, r a cotangent of
        any other weights. Neither these logits nor their loss are computed.

        Args:
            cotangent: r, in any of its three forms
            source_VxD: the unembedding that r was made with, needed where r is to be rebuilt
        """
        # The value is 0: all that matters of it is its backward.
        dtype = compute_dtype(self.h_BxTxD)
        labels = Labels(cotangent.targets_N, cotangent.factor_N)

        def compute(h_NxD: Tensor, weight_VxD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            zero = torch.zeros((), dtype=labels.factor_N.dtype, device=h_NxD.device)
            if cotangent.dh_NxD is not None:
                dW_VxD = cotangent.dW_VxD
                if dW_VxD is None:
                    # Without dimensions: no gradient by W, which another micro-batch hands on for
                    # all.
                    dW_VxD = weight_VxD.new_zeros(())
                return zero, cotangent.dh_NxD, dW_VxD
            here = Point(h_NxD.to(dtype), weight_VxD.to(dtype))
            if cotangent.r_NxV is not None:
                return zero, *stored_products(cotangent.r_NxV, here, labels)
            assert cotangent.h_NxD is not None and source_VxD is not None
            source = Point(cotangent.h_NxD, source_VxD.to(dtype))
            return zero, *rebuilt_products(source, here, labels, self.config, cotangent.lse_N)

        return self._apply(compute, None)

    @torch.no_grad()
    def products_at(
        self, targets_BxT: Tensor, scale: float, h_NxD: Tensor, weight_VxD: Tensor
    ) -> tuple[Tensor, Cotangent]:
        """Returns `scale` times the summed loss of these logits, and their r as its products with
        another point: dh = r W, dW = r^T h for the given h and W."""
        # The logits are of this point, and the products are taken with the h and W of the other.
        here, labels = self._point(), self._labels(targets_BxT, scale)
        target = Point(h_NxD, weight_VxD.to(here.weight_VxD.dtype))
        with torch.autocast(self.h_BxTxD.device.type, enabled=False):
            found, products = losses_and_gradients(here, target, labels, self.config)
        cotangent = Cotangent(
            labels.targets_N,
            labels.factor_N,
            found.lse_N,
            dh_NxD=products.dh_NxD,
            dW_VxD=products.dW_VxD,
        )
        return (found.losses_N * labels.factor_N).sum(), cotangent

    @torch.no_grad()
    def instance_losses(self, targets_BxT: Tensor) -> Tensor:
        """Returns the mean loss over the counted targets of every instance, 0 where there are
        none."""
        here, labels = self._point(), self._labels(targets_BxT, 1.0)
        with torch.autocast(self.h_BxTxD.device.type, enabled=False):
            found = losses(here, labels, self.config)
        return instance_means(found.losses_N.view(targets_BxT.shape), targets_BxT != IGNORED)

    @torch.no_grad()
    def statistics(self, max_tokens: int = 512) -> tuple[dict[str, Tensor], float]:
        """Returns what sharpness-aware rules are said to regularise, over at most `max_tokens`
        tokens spread evenly: the mean entropy of the softmax and mean log-normaliser in nats, the
        largest logit, the root mean square of |h|, and |W|. With it the share of the tokens whose
        logits had to be computed."""
        h_NxD = self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1])
        # Spread over the batch, since neighbouring tokens are alike.
        num_chosen = min(max_tokens, len(h_NxD))
        chosen = torch.linspace(0, len(h_NxD) - 1, num_chosen, device=h_NxD.device).long()
        h_CxD = h_NxD[chosen].to(wide_dtype(h_NxD))
        with torch.autocast(h_CxD.device.type, enabled=False):
            weight_VxD = self.weight_VxD.to(h_CxD.dtype)
            z_CxV = LazyLogits(h_CxD, weight_VxD, self.vocab_size, self.softcap).dense()
        found = logit_statistics(z_CxV) | {
            "hidden_norm": h_CxD.square().sum(1).mean().sqrt(),
            "weight_norm": self.weight_VxD[: self.vocab_size].norm(),
        }
        return found, num_chosen / max(1, len(h_NxD))

    @property
    def config(self) -> HeadConfig:
        """Returns the settings of the head."""
        return HeadConfig(self.vocab_size, self.softcap, self.z_loss)

    def _labels(self, targets_BxT: Tensor, scale: float) -> Labels:
        """Returns the targets row by row, with `scale` as the factor of those that are counted."""
        # A factor of 0 takes a row out of the loss and out of both gradients.
        targets_N = targets_BxT.reshape(-1)
        return Labels(targets_N, (targets_N != IGNORED).to(wide_dtype(self.h_BxTxD)) * scale)

    def _point(self) -> Point:
        """Returns h and W in the compute dtype, outside of autograd."""
        dtype = compute_dtype(self.h_BxTxD)
        h_NxD = self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1])
        return Point(h_NxD.to(dtype), self.weight_VxD.to(dtype))

    def _apply(self, compute: Callable, again: Callable | None) -> Tensor:
        """Returns the value of `compute(h_NxD, W_VxD) -> (value, dh, dW)`, with its gradients."""
        h_NxD = self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1])
        return _Head.apply(h_NxD, self.weight_VxD, compute, again)[0]


def logit_statistics(z_NxV: Tensor) -> dict[str, Tensor]:
    """Returns the mean entropy and log-normaliser of rows of logits, in nats, and the largest
    logit."""
    log_p = z_NxV.log_softmax(-1)
    return {
        "entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "log_normaliser": z_NxV.logsumexp(-1).mean(),
        "largest": z_NxV.max(),
    }


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = compute_device(x).type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def new_cotangent(
    targets_BxT: Tensor, labels: Labels, weighting: InstanceWeighting | None
) -> tuple[Cotangent, InstanceWeights | None]:
    """Returns the cotangent of a micro-batch before the head has been computed, and the weights of
    its instances, which the head fills in."""
    cotangent = Cotangent(labels.targets_N, labels.factor_N, lse_N=labels.factor_N)
    if weighting is None:
        return cotangent, None
    weights = InstanceWeights.of(targets_BxT, weighting, labels)
    cotangent.weights_B = weights.weights_B
    return cotangent, weights


def room_for_cotangent(point: Point, into: Tensor | None) -> Tensor:
    """Returns memory for r_NxV of a point: `into` where that fits, else new memory."""
    # A micro-batch of another size, or another precision, needs memory of its own.
    shape = (len(point.h_NxD), len(point.weight_VxD))
    if into is not None and into.shape == shape and into.dtype == point.h_NxD.dtype:
        return into
    return point.h_NxD.new_empty(shape)


class _Head(torch.autograd.Function):
    """A function of h and W whose gradients are made in the forward pass, where the logits are at
    hand.

    `compute(h, W)` gives the value, dh and dW (without dimensions: none); `again(h, W)` gives dh
    and dW once more where they are to be differentiated themselves."""

    @staticmethod
    def forward(
        h_NxD: Tensor, weight_VxD: Tensor, compute: Callable, again: Callable | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # `compute` chooses its own types: autocast would cast sums that are meant to be wide.
        with torch.autocast(h_NxD.device.type, enabled=False):
            return compute(h_NxD, weight_VxD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        h_NxD, weight_VxD, _, ctx.again = inputs
        # The gradients are outputs so that torch.func can save them; nobody differentiates them.
        _, dh_NxD, dW_VxD = output
        ctx.mark_non_differentiable(dh_NxD, dW_VxD)
        ctx.save_for_backward(h_NxD, weight_VxD, dh_NxD, dW_VxD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        h_NxD, weight_VxD, dh_NxD, dW_VxD = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.again:
            # create_graph=True: the gradients will be differentiated again.
            dh_NxD, dW_VxD = ctx.again(h_NxD, weight_VxD)
            is_one = False
        else:
            # Spares a pass over dW; on CUDA the question would cost more than the pass.
            is_one = grad.device.type == "cpu" and bool(grad == 1)
        if not is_one:
            dh_NxD = dh_NxD * grad
            dW_VxD = dW_VxD * grad
        return (
            dh_NxD.to(h_NxD.dtype),
            dW_VxD.to(weight_VxD.dtype) if dW_VxD.ndim else None,
            None,
            None,
        )
