"""Logits that are kept lazy: hidden states h and the unembedding W, never a tokens x vocabulary tensor.

    z = h W^T      l_n = logsumexp(z_n) - z_n[target_n]      r = dl/dz = softmax(z) - onehot(target)
    dl/dh = r W    dl/dW = r^T h

A soft-cap c replaces z by z' = c tanh(z / c) in l, so that r gains the factor 1 - (z'/c)^2; a z-loss b adds b logsumexp(z')^2 to l,
so that softmax in r gains the factor 1 + 2 b logsumexp(z').

The loss and its two gradients are computed together, chunk of tokens by chunk of tokens, so that z and r exist for one
chunk only and the head costs its three matrix products and nothing twice. Shapes: N tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a target that is not counted
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}  # logits per chunk: a core's cache on CPU, a small part of memory on CUDA


@dataclass
class LazyLogits:
    """The logits h_BxTxD W^T; rows of W from `vocab_size` on are padding that no softmax sees."""

    h_BxTxD: Tensor
    weight_VxD: Tensor
    vocab_size: int
    softcap: float | None = None
    z_loss: float = 0.0

    def dense(self) -> Tensor:
        """logits_BxTxV, soft-capped, for those who need them all."""
        z = torch.nn.functional.linear(self.h_BxTxD, self.weight_VxD)[..., : self.vocab_size]
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def cross_entropy(self, targets_BxT: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats summed over the counted targets, in fp32 or wider, and their number."""
        targets_N = targets_BxT.reshape(-1)
        h_NxD = self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1])
        settings = Settings(self.vocab_size, self.softcap, self.z_loss, compute_dtype(h_NxD), torch.is_grad_enabled())
        total, _, _ = _CrossEntropy.apply(h_NxD, self.weight_VxD, targets_N, settings)
        return total, (targets_N != IGNORED).sum()


class Settings(NamedTuple):
    """What the loss of a head needs beside tensors; `gradients`: whether dl/dh and dl/dW are wanted."""

    vocab_size: int
    softcap: float | None
    z_loss: float
    dtype: torch.dtype
    gradients: bool


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cross_entropy_and_gradients(h_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of l, dl/dh_NxD, dl/dW_VxD) by chunks; h and W in the compute dtype, softmax and dl/dW in fp32 or wider."""
    vocab_size, cap, z_loss, _, gradients = settings
    wide = torch.promote_types(h_NxD.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=h_NxD.device)
    dh_NxD = torch.empty_like(h_NxD) if gradients else h_NxD.new_empty(0)
    dW_VxD = torch.zeros_like(weight_VxD, dtype=wide) if gradients else h_NxD.new_empty(0)
    size = max(1, CHUNK_ELEMENTS.get(h_NxD.device.type, 2**24) // weight_VxD.shape[0])
    for begin in range(0, len(targets_N), size):
        h, targets = h_NxD[begin : begin + size], targets_N[begin : begin + size]
        counted = (targets != IGNORED)[:, None]
        index = targets[:, None].where(counted, 0)
        z = (h @ weight_VxD.T).to(wide)
        if cap is not None:
            z.div_(cap).tanh_().mul_(cap)
        slope = 1 if cap is None or not gradients else 1 - (z / cap).square()
        z[:, vocab_size:] = float("-inf")
        lse = z.logsumexp(1, keepdim=True)
        total += (lse - z.gather(1, index) + z_loss * lse.square()).where(counted, 0).sum()
        if gradients:
            r = z.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse).scatter_add_(1, index, torch.full_like(lse, -1.0))
            r = r.mul_(slope).mul_(counted).to(h.dtype)
            dh_NxD[begin : begin + size] = r @ weight_VxD
            dW_VxD += r.T @ h
    return total, dh_NxD, dW_VxD


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradients are made in the forward pass, where the logits are at hand; differentiable once."""

    @staticmethod
    def forward(h_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(h_NxD.device.type, enabled=False):
            return cross_entropy_and_gradients(h_NxD.to(settings.dtype), weight_VxD.to(settings.dtype), targets_N, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        h_NxD, weight_VxD = inputs[:2]
        _, dh_NxD, dW_VxD = output
        ctx.mark_non_differentiable(dh_NxD, dW_VxD)
        ctx.save_for_backward(dh_NxD, dW_VxD)
        ctx.dtypes = h_NxD.dtype, weight_VxD.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        dh_NxD, dW_VxD = ctx.saved_tensors
        h_dtype, weight_dtype = ctx.dtypes
        return (dh_NxD * grad).to(h_dtype), (dW_VxD * grad).to(weight_dtype), None, None
