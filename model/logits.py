"""Logits that are kept lazy: hidden states h and the unembedding W, never a tokens x vocabulary tensor.

    z = h W^T      l_n = logsumexp(z_n) - z_n[target_n]      r = dl/dz = softmax(z) - onehot(target)
    dl/dh = r W    dl/dW = r^T h

A soft-cap c replaces z by z' = c tanh(z / c) in l, so that r gains the factor 1 - (z'/c)^2; a z-loss b adds b logsumexp(z')^2 to l,
so that softmax in r gains the factor 1 + 2 b logsumexp(z').

The loss and its two gradients are computed together, chunk of tokens by chunk of tokens, so that the head costs its three matrix
products and nothing twice. A chunk is large enough for the products; within it, z turns into r in blocks of rows that stay in
a CPU's cache, where the softmax is free of memory traffic. Shapes: N tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a target that is not counted
CHUNK_ELEMENTS = {"cpu": 2**27, "cuda": 2**27}  # logits per chunk, in the compute dtype
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}  # logits per block of rows, in fp32: what a core's cache holds on CPU


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

    def cross_entropy(self, targets_BxT: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """`scale` times the cross-entropy in nats summed over the counted targets, in fp32 or wider, and their number."""
        targets_N = targets_BxT.reshape(-1)
        h_NxD = self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1])
        settings = Settings(self.vocab_size, self.softcap, self.z_loss, scale, compute_dtype(h_NxD), torch.is_grad_enabled())
        total, _, _ = _CrossEntropy.apply(h_NxD, self.weight_VxD, targets_N, settings)
        return total, (targets_N != IGNORED).sum()


class Settings(NamedTuple):
    """What the loss of a head needs beside tensors; `gradients`: whether dl/dh and dl/dW are wanted."""

    vocab_size: int
    softcap: float | None
    z_loss: float
    scale: float
    dtype: torch.dtype
    gradients: bool


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cross_entropy_and_gradients(h_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(scale * sum of l, its gradients by h_NxD and W_VxD); h and W in the compute dtype, softmax and dl/dW in fp32 or wider."""
    device, gradients = h_NxD.device.type, settings.gradients
    wide = torch.promote_types(h_NxD.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=h_NxD.device)
    dh_NxD = torch.empty_like(h_NxD) if gradients else h_NxD.new_empty(0)
    dW_VxD = h_NxD.new_empty(0)
    chunk, block = (max(1, sizes.get(device, 2**24) // weight_VxD.shape[0]) for sizes in (CHUNK_ELEMENTS, BLOCK_ELEMENTS))
    chunk = -(-len(targets_N) // max(1, -(-len(targets_N) // chunk)))  # as many chunks as needed, of one size
    buffer_CxV = h_NxD.new_empty(chunk, weight_VxD.shape[0])  # one for all: fresh memory of this size is paid for page by page
    for begin in range(0, len(targets_N), chunk or 1):
        h_CxD, targets_C = h_NxD[begin : begin + chunk], targets_N[begin : begin + chunk]
        z_CxV = torch.mm(h_CxD, weight_VxD.T, out=buffer_CxV[: len(h_CxD)])
        for first in range(0, len(targets_C), block):
            total += softmax_block(z_CxV[first : first + block], targets_C[first : first + block], settings, wide)
        if gradients:  # z holds r now
            torch.mm(z_CxV, weight_VxD, out=dh_NxD[begin : begin + chunk])
            product = z_CxV.T @ h_CxD
            dW_VxD = dW_VxD.add_(product) if begin else product.to(wide)
    if gradients and not len(targets_N):
        dW_VxD = torch.zeros_like(weight_VxD, dtype=wide)
    return total, dh_NxD, dW_VxD


def softmax_block(z_CxV: Tensor, targets_C: Tensor, settings: Settings, wide: torch.dtype) -> Tensor:
    """scale * sum of l over a block of rows; where gradients are wanted, z is overwritten by scale * r."""
    vocab_size, cap, z_loss, scale, _, gradients = settings
    counted = (targets_C != IGNORED)[:, None]
    index = targets_C[:, None].where(counted, 0)
    factor = counted.to(wide) * scale  # of each row
    z, top = z_CxV[:, :vocab_size].to(wide), z_CxV[:, :vocab_size].amax(1, keepdim=True).to(wide)
    if cap is not None:
        z, top = cap * torch.tanh(z / cap), cap * torch.tanh(top / cap)
    slope = 1.0 if cap is None or not gradients else 1 - (z / cap).square()
    target = z.gather(1, index)
    p = z.sub_(top).exp_()  # softmax but for its denominator: every row is passed over as few times as can be
    denominator = p.sum(1, keepdim=True)
    lse = top + denominator.log()
    if gradients:
        r = p.mul_(factor * (1 + 2 * z_loss * lse) / denominator).scatter_add_(1, index, -factor)
        z_CxV[:, :vocab_size] = r if cap is None else r.mul_(slope)
        z_CxV[:, vocab_size:] = 0
    return (lse - target + z_loss * lse.square()).mul(factor).sum()


def differentiable_gradients(h_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """dl/dh and dl/dW once more, densely, by operations that can be differentiated themselves."""
    vocab_size, cap, z_loss, scale, _, _ = settings
    counted = (targets_N != IGNORED)[:, None]
    z = (h_NxD @ weight_VxD.T)[:, :vocab_size].to(torch.promote_types(h_NxD.dtype, torch.float32))
    z = z if cap is None else cap * torch.tanh(z / cap)
    onehot = torch.zeros_like(z).scatter(1, targets_N[:, None].where(counted, 0), 1.0)
    r = scale * counted * (z.softmax(1) * (1 + 2 * z_loss * z.logsumexp(1, keepdim=True)) - onehot)
    r = (r if cap is None else r * (1 - (z / cap).square())).to(h_NxD.dtype)
    dW_VxD = torch.cat([r.T @ h_NxD, weight_VxD.new_zeros(weight_VxD.shape[0] - vocab_size, weight_VxD.shape[1])])
    return r @ weight_VxD[:vocab_size], dW_VxD


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradients are made in the forward pass, where the logits are at hand."""

    @staticmethod
    def forward(h_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(h_NxD.device.type, enabled=False):
            return cross_entropy_and_gradients(h_NxD.to(settings.dtype), weight_VxD.to(settings.dtype), targets_N, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        h_NxD, weight_VxD, targets_N, ctx.settings = inputs
        _, dh_NxD, dW_VxD = output
        ctx.mark_non_differentiable(dh_NxD, dW_VxD)
        ctx.save_for_backward(h_NxD, weight_VxD, targets_N, dh_NxD, dW_VxD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        h_NxD, weight_VxD, targets_N, dh_NxD, dW_VxD = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate again
            dh_NxD, dW_VxD = differentiable_gradients(h_NxD, weight_VxD, targets_N, ctx.settings)
        elif grad.device.type == "cpu" and grad == 1:  # spares a pass over dW; on CUDA the question would cost more than the pass
            return dh_NxD.to(h_NxD.dtype), dW_VxD.to(weight_VxD.dtype), None, None
        return (dh_NxD * grad).to(h_NxD.dtype), (dW_VxD * grad).to(weight_VxD.dtype), None, None
