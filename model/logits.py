"""Logits that are kept lazy: hidden states h and the unembedding W, never a tokens x vocabulary
tensor.

    z = h W^T      l_n = logsumexp(z_n) - z_n[target_n]      r = dl/dz = softmax(z) - onehot(target)
    dl/dh = r W    dl/dW = r^T h

A soft-cap c replaces z by z' = c tanh(z / c) in l, so that r gains the factor 1 - (z'/c)^2; a
z-loss b adds b logsumexp(z')^2 to l, so that softmax in r gains the factor 1 + 2 b logsumexp(z').

The loss and its two gradients are computed together, chunk of tokens by chunk of tokens, so that
the head costs its three matrix products and nothing twice. A chunk is large enough for the
products; within it, z turns into r in blocks of rows that stay in a CPU's cache, where the softmax
is free of memory traffic.

Sharpness-aware rules take the cotangent r at one point of weight space and the products r W and r^T
h at another. A `Cotangent` is r on its way between the two: stored, to be rebuilt from h and the
log-normalisers of the point where it was made, or spent: its products with another point's h and W
are all that is left of it. Shapes: N tokens, D width, V vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.sharding import compute_device

IGNORED = -100  # a target that is not counted
CHUNK_ELEMENTS = {"cpu": 2**27, "cuda": 2**27}  # logits per chunk, in the compute dtype
# logits per block of rows, in fp32: what a core's cache holds on CPU
BLOCK_ELEMENTS = {
    "cpu": 2**20,
    "cuda": 2**27,
}

# (which instances of the micro-batch, the mean loss of each) -> their weights
Weigh = Callable[[slice, Tensor], Tensor]


@dataclass
class Cotangent:
    """scale * r of the counted tokens of a micro-batch, made at weights that may have moved since.

    stored       r_NxV, in the compute dtype
    to rebuild   h_NxD and lse_N of the point where it was made, to be joined with that point's W
    spent        dh_NxD and dW_VxD, already its products with h and W of some point"""

    targets_N: Tensor
    factor_N: Tensor  # scale of each row: 0 where the target is not counted
    lse_N: Tensor
    h_NxD: Tensor | None = None
    r_NxV: Tensor | None = None
    dh_NxD: Tensor | None = None
    dW_VxD: Tensor | None = None
    weights_B: Tensor | None = (
        None  # of the instances, where they were weighed; factor_N is without them
    )

    def free(self) -> None:
        """Lets go of the large tensors."""
        self.h_NxD = self.r_NxV = self.dh_NxD = self.dW_VxD = None


class Point(NamedTuple):
    """Where in weight space a head is evaluated, in the compute dtype."""

    h_NxD: Tensor
    weight_VxD: Tensor


class Shape(NamedTuple):
    """What a head is beside its tensors."""

    vocab_size: int
    softcap: float | None
    z_loss: float


class Rows(NamedTuple):
    """What `sweep` finds: the loss and log-normaliser of every row, and the gradients by h and W
    where they were asked for."""

    losses_N: Tensor
    lse_N: Tensor
    dh_NxD: Tensor
    dW_VxD: Tensor


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
        """`scale` times the cross-entropy in nats summed over the counted targets, in fp32 or
        wider, and their number."""
        total, _ = self.cross_entropy_and_cotangent(targets_BxT, scale)
        return total, (targets_BxT != IGNORED).sum()

    def cross_entropy_and_cotangent(
        self,
        targets_BxT: Tensor,
        scale: float = 1.0,
        keep_r: bool = False,
        keep_h: bool = False,
        weigh: Weigh | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Cotangent]:
        """The loss as `cross_entropy` gives it, and r: `keep_r` stores it, tokens x vocabulary in
        the compute dtype, in the memory of `into` where it fits; `keep_h` keeps h, which with the W
        of this moment rebuilds it.

        With `weigh`, the gradient of the loss, and no other result, is that of sum_i w_i sum_{n in
        i} l_n over the instances (sequences) of the micro-batch."""
        targets_N, shape, dtype = targets_BxT.reshape(-1), self.shape, compute_dtype(self.h_BxTxD)
        wide = torch.promote_types(self.h_BxTxD.dtype, torch.float32)
        factor_N = (targets_N != IGNORED).to(wide) * scale
        cotangent = Cotangent(targets_N, factor_N, factor_N)
        gradients = torch.is_grad_enabled()
        instance = None
        if weigh is not None:
            cotangent.weights_B = factor_N.new_zeros(len(targets_BxT))
            instance = Instances(targets_BxT.shape[1], weigh, cotangent.weights_B)

        def compute(h_NxD: Tensor, weight_VxD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            here = Point(h_NxD.to(dtype), weight_VxD.to(dtype))
            if keep_r:
                fits = (
                    into is not None
                    and into.shape == (len(targets_N), len(weight_VxD))
                    and into.dtype == dtype
                )
                cotangent.r_NxV = (
                    into if fits else here.h_NxD.new_empty(len(targets_N), len(weight_VxD))
                )
            if keep_h:
                cotangent.h_NxD = here.h_NxD.detach()
            rows = sweep(
                here,
                here if gradients else None,
                targets_N,
                factor_N,
                shape,
                r_NxV=cotangent.r_NxV,
                instances=instance,
            )
            cotangent.lse_N = rows.lse_N
            return (rows.losses_N * factor_N).sum(), rows.dh_NxD, rows.dW_VxD

        def again(h_NxD: Tensor, weight_VxD: Tensor) -> tuple[Tensor, Tensor]:
            return differentiable_gradients(h_NxD, weight_VxD, targets_N, factor_N, shape)

        return self._apply(compute, again), cotangent

    def pull(self, cotangent: Cotangent, made_at_VxD: Tensor | None = None) -> Tensor:
        """A zero whose backward hands J^T r on, J being that of these logits and r a cotangent of
        any other weights. Where r is to be rebuilt, `made_at_VxD` is the unembedding it was made
        with. Neither these logits nor their loss are computed."""
        dtype = compute_dtype(self.h_BxTxD)

        def compute(h_NxD: Tensor, weight_VxD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            zero = torch.zeros((), dtype=cotangent.factor_N.dtype, device=h_NxD.device)
            if cotangent.dh_NxD is not None:
                return (
                    zero,
                    cotangent.dh_NxD,
                    weight_VxD.new_zeros(()) if cotangent.dW_VxD is None else cotangent.dW_VxD,
                )
            at, made, lse_N = Point(h_NxD.to(dtype), weight_VxD.to(dtype)), None, None
            if cotangent.r_NxV is None:
                assert cotangent.h_NxD is not None and made_at_VxD is not None
                made, lse_N = Point(cotangent.h_NxD, made_at_VxD.to(dtype)), cotangent.lse_N
            rows = sweep(
                made,
                at,
                cotangent.targets_N,
                cotangent.factor_N,
                self.shape,
                lse_N=lse_N,
                r_NxV=cotangent.r_NxV,
            )
            return zero, rows.dh_NxD, rows.dW_VxD

        return self._apply(compute, None)

    @torch.no_grad()
    def spend(
        self, targets_BxT: Tensor, scale: float, h_NxD: Tensor, weight_VxD: Tensor
    ) -> tuple[Tensor, Cotangent]:
        """The loss of these logits, and their r as its products with another point: dh = r W, dW =
        r^T h for the given h and W."""
        targets_N, dtype = targets_BxT.reshape(-1), compute_dtype(self.h_BxTxD)
        factor_N = (targets_N != IGNORED).to(
            torch.promote_types(self.h_BxTxD.dtype, torch.float32)
        ) * scale
        with torch.autocast(self.h_BxTxD.device.type, enabled=False):
            here = Point(
                self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1]).to(dtype),
                self.weight_VxD.to(dtype),
            )
            rows = sweep(here, Point(h_NxD, weight_VxD.to(dtype)), targets_N, factor_N, self.shape)
        cotangent = Cotangent(
            targets_N, factor_N, rows.lse_N, dh_NxD=rows.dh_NxD, dW_VxD=rows.dW_VxD
        )
        return (rows.losses_N * factor_N).sum(), cotangent

    @torch.no_grad()
    def instance_losses(self, targets_BxT: Tensor) -> Tensor:
        """Mean loss over the counted targets of every instance, 0 where there are none."""
        targets_N, dtype = targets_BxT.reshape(-1), compute_dtype(self.h_BxTxD)
        counted_N = (targets_N != IGNORED).to(
            torch.promote_types(self.h_BxTxD.dtype, torch.float32)
        )
        with torch.autocast(self.h_BxTxD.device.type, enabled=False):
            here = Point(
                self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1]).to(dtype),
                self.weight_VxD.to(dtype),
            )
            rows = sweep(here, None, targets_N, counted_N, self.shape)
        return instance_means(rows.losses_N.view(targets_BxT.shape), targets_BxT != IGNORED)

    @torch.no_grad()
    def statistics(self, max_tokens: int = 512) -> tuple[dict[str, Tensor], float]:
        """What sharpness-aware rules are said to regularise, over at most `max_tokens` tokens
        spread evenly: the mean entropy of the softmax and mean log-normaliser in nats, the largest
        logit, the root mean square of |h|; and |W|. With it the share of the tokens whose logits
        had to be computed."""
        h_NxD = self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1])
        chosen = torch.linspace(
            0, len(h_NxD) - 1, min(max_tokens, len(h_NxD)), device=h_NxD.device
        ).long()
        h_NxD = h_NxD[chosen].to(torch.promote_types(h_NxD.dtype, torch.float32))
        with torch.autocast(h_NxD.device.type, enabled=False):
            z = LazyLogits(
                h_NxD, self.weight_VxD.to(h_NxD.dtype), self.vocab_size, self.softcap
            ).dense()
        found = logit_statistics(z) | {
            "hidden_norm": h_NxD.square().sum(1).mean().sqrt(),
            "weight_norm": self.weight_VxD[: self.vocab_size].norm(),
        }
        return found, len(chosen) / max(1, self.h_BxTxD[..., 0].numel())

    @property
    def shape(self) -> Shape:
        """The head beside its tensors."""
        return Shape(self.vocab_size, self.softcap, self.z_loss)

    def _apply(self, compute: Callable, again: Callable | None) -> Tensor:
        """The value of `compute(h_NxD, W_VxD) -> (value, dh, dW)`, with its gradients."""
        return _Head.apply(
            self.h_BxTxD.reshape(-1, self.h_BxTxD.shape[-1]), self.weight_VxD, compute, again
        )[0]


@dataclass
class Instances:
    """Rows in instances of `length` rows each, which `weigh` weighs by their mean loss; the weights
    go to `weights_B`."""

    length: int
    weigh: Weigh
    weights_B: Tensor


def logit_statistics(z_NxV: Tensor) -> dict[str, Tensor]:
    """Mean entropy and log-normaliser of rows of logits, in nats, and the largest logit."""
    log_p = z_NxV.log_softmax(-1)
    return {
        "entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "log_normaliser": z_NxV.logsumexp(-1).mean(),
        "largest": z_NxV.max(),
    }


def instance_means(losses: Tensor, counted: Tensor) -> Tensor:
    """Mean loss over the counted targets of each instance, the first dimension, 0 where there are
    none."""
    losses, counted = losses.reshape(len(losses), -1), counted.reshape(len(counted), -1)
    return torch.where(counted, losses, 0).sum(1) / counted.sum(1).clamp_min(1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = compute_device(x).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def sweep(
    made: Point | None,
    at: Point | None,
    targets_N: Tensor,
    factor_N: Tensor,
    shape: Shape,
    lse_N: Tensor | None = None,
    r_NxV: Tensor | None = None,
    instances: Instances | None = None,
) -> Rows:
    """Once over all tokens: r, each row times its factor, of the logits at `made`, and its products
    r W and r^T h with `at`; in chunks, unless `r_NxV` has room for them all.

    made=None takes r from `r_NxV`; else r is written there if it is given. With `lse_N`, the
    log-normalisers at `made`, no loss comes out. `instances` weigh the products, and not r. Softmax
    and dW in fp32 or wider."""
    like = made or at
    assert like is not None
    device, V = factor_N.device.type, like.weight_VxD.shape[0]
    N, write, rebuild = len(targets_N), at is not None or r_NxV is not None, lse_N is not None
    losses_N = torch.zeros_like(factor_N)
    lse_N = torch.zeros_like(factor_N) if lse_N is None else lse_N
    dh_NxD, dW_VxD = (
        (torch.empty_like(at.h_NxD) if at else factor_N.new_empty(0)),
        factor_N.new_empty(0),
    )
    chunk, block = (
        max(1, sizes.get(device, 2**24) // V) for sizes in (CHUNK_ELEMENTS, BLOCK_ELEMENTS)
    )
    chunk = even(N, chunk) if r_NxV is None else N  # what is whole anyway need not be cut
    if (
        made is not None and at is not None and made.weight_VxD is not at.weight_VxD
    ):  # room for the second V x D
        chunk = even(N, max(chunk // 2, chunk - at.h_NxD.shape[1]))
    if instances:
        # whole instances
        chunk = max(instances.length, chunk // instances.length * instances.length)
    # one for all: fresh memory of this size is paid for page by page
    buffer_CxV = like.h_NxD.new_empty(chunk, V) if r_NxV is None else r_NxV
    for begin in range(0, N, chunk or 1):
        rows = slice(begin, min(N, begin + chunk))
        z_CxV = buffer_CxV[: rows.stop - begin]
        if made is not None:
            torch.mm(made.h_NxD[rows], made.weight_VxD.T, out=z_CxV)
            for first in range(begin, rows.stop, block):
                b = slice(first, min(rows.stop, first + block))
                given = lse_N[b] if rebuild else None
                found = softmax_block(
                    z_CxV[b.start - begin : b.stop - begin],
                    targets_N[b],
                    factor_N[b],
                    shape,
                    given,
                    write,
                )
                if found:
                    losses_N[b], lse_N[b] = found
        if at is not None:  # z holds r now
            torch.mm(z_CxV, at.weight_VxD, out=dh_NxD[rows])
            h_CxD = at.h_NxD[rows]
            if (
                instances
            ):  # their losses had to be known: the weights of r's rows are those of its products
                weight_Cx1 = weights_of(instances, rows, losses_N[rows], targets_N[rows])[:, None]
                h_CxD = (h_CxD * weight_Cx1).to(h_CxD.dtype)
                dh_NxD[rows] *= weight_Cx1
            product = z_CxV.T @ h_CxD
            dW_VxD = dW_VxD.add_(product) if begin else product.to(factor_N.dtype)
    if at is not None and not N:
        dW_VxD = torch.zeros_like(at.weight_VxD, dtype=factor_N.dtype)
    return Rows(losses_N, lse_N, dh_NxD, dW_VxD)


def even(total: int, size: int) -> int:
    """The size of parts of one size, as few as can be, that are at most `size`."""
    return -(-total // max(1, -(-total // max(1, size))))


def weights_of(instances: Instances, rows: slice, losses_C: Tensor, targets_C: Tensor) -> Tensor:
    """The weight of every row of some whole instances, noted in `instances`."""
    T = instances.length
    which = slice(rows.start // T, rows.stop // T)
    instances.weights_B[which] = instances.weigh(
        which, instance_means(losses_C.view(-1, T), targets_C.view(-1, T) != IGNORED)
    )
    return instances.weights_B[which].repeat_interleave(T)


def softmax_block(
    z_CxV: Tensor,
    targets_C: Tensor,
    factor_C: Tensor,
    shape: Shape,
    lse_C: Tensor | None,
    write: bool,
) -> tuple[Tensor, Tensor] | None:
    """(l, log-normaliser) of a block of rows, unless that is known; with `write`, z is overwritten
    by factor * r."""
    vocab_size, cap, z_loss = shape
    index = targets_C.where(targets_C != IGNORED, 0)[:, None]
    z = z_CxV[:, :vocab_size].to(factor_C.dtype)  # every row is passed over as few times as can be
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    if not write:
        log_p = z.log_softmax(1).gather(1, index)
        lse = z.gather(1, index) - log_p
        return (z_loss * lse.square() - log_p)[:, 0], lse[:, 0]
    p, factor = z.softmax(1), factor_C[:, None]
    lse = (
        z.amax(1, keepdim=True) - p.amax(1, keepdim=True).log() if lse_C is None else lse_C[:, None]
    )
    found = (
        None
        if lse_C is not None
        else ((lse - z.gather(1, index) + z_loss * lse.square())[:, 0], lse[:, 0])
    )
    r = p.mul_(factor * (1 + 2 * z_loss * lse) if z_loss else factor).scatter_add_(
        1, index, -factor
    )
    z_CxV[:, :vocab_size] = r if cap is None else r.mul_(1 - (z / cap).square())
    z_CxV[:, vocab_size:] = 0
    return found


def differentiable_gradients(
    h_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor, factor_N: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """dl/dh and dl/dW once more, densely, by operations that can be differentiated themselves."""
    vocab_size, cap, z_loss = shape
    z = (h_NxD @ weight_VxD.T)[:, :vocab_size].to(torch.promote_types(h_NxD.dtype, torch.float32))
    z = z if cap is None else cap * torch.tanh(z / cap)
    onehot = torch.zeros_like(z).scatter(1, targets_N.where(targets_N != IGNORED, 0)[:, None], 1.0)
    r = factor_N[:, None] * (
        z.softmax(1) * (1 + 2 * z_loss * z.logsumexp(1, keepdim=True)) - onehot
    )
    r = (r if cap is None else r * (1 - (z / cap).square())).to(h_NxD.dtype)
    dW_VxD = torch.cat(
        [r.T @ h_NxD, weight_VxD.new_zeros(weight_VxD.shape[0] - vocab_size, weight_VxD.shape[1])]
    )
    return r @ weight_VxD[:vocab_size], dW_VxD


class _Head(torch.autograd.Function):
    """A function of h and W whose gradients are made in the forward pass, where the logits are at
    hand.

    `compute(h, W)` gives the value, dh and dW (without dimensions: none); `again(h, W)` gives dh
    and dW once more where somebody wants to differentiate them."""

    @staticmethod
    def forward(
        h_NxD: Tensor, weight_VxD: Tensor, compute: Callable, again: Callable | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(h_NxD.device.type, enabled=False):
            return compute(h_NxD, weight_VxD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        h_NxD, weight_VxD, _, ctx.again = inputs
        _, dh_NxD, dW_VxD = output
        ctx.mark_non_differentiable(dh_NxD, dW_VxD)
        ctx.save_for_backward(h_NxD, weight_VxD, dh_NxD, dW_VxD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        h_NxD, weight_VxD, dh_NxD, dW_VxD = ctx.saved_tensors
        if (
            torch.is_grad_enabled() and ctx.again
        ):  # create_graph=True: somebody will differentiate again
            dh_NxD, dW_VxD = ctx.again(h_NxD, weight_VxD)
        elif (
            grad.device.type == "cpu" and grad == 1
        ):  # spares a pass over dW; on CUDA the question would cost more than the pass
            return (
                dh_NxD.to(h_NxD.dtype),
                dW_VxD.to(weight_VxD.dtype) if dW_VxD.ndim else None,
                None,
                None,
            )
        return (
            (dh_NxD * grad).to(h_NxD.dtype),
            (dW_VxD * grad).to(weight_VxD.dtype) if dW_VxD.ndim else None,
            None,
            None,
        )
