"""The head over all tokens, chunk of rows by chunk of rows: losses of the logits z = h W^T, and
products of their cotangent r with an h and a W. The equations are in model/logits.py.

`chunked_head` is the one loop over chunks, and the functions named for what they compute go through
it:

    losses                   l of every row, and r if there is room for it
    losses_and_gradients     l, r W and r^T h, the latter two with the same h and W or others
    rebuilt_products         r W and r^T h, of an r that was computed before
    stored_products          the same of an r that was kept whole, which needs no chunks

Within a chunk, z turns into factor * r in blocks of rows; on CUDA by the kernel of
model/fused_head.py, where there is Triton.

Shapes: N tokens, C tokens of a chunk, K tokens of a block, B instances of T tokens, D width, V
vocabulary with its padding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.device import missing_for_kernels

HAS_KERNELS = not missing_for_kernels()
IGNORED = -100  # a target that is not counted
# Logits per chunk, in the compute dtype.
CHUNK_ELEMENTS = {"cpu": 2**27, "cuda": 2**27}
# Logits per block of rows, in fp32: on CPUs what the cache of a core holds.
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
ELEMENTS_ELSEWHERE = 2**24  # of both, on any other kind of device

# (which instances of the micro-batch, the mean loss of each) -> their weights w_i: the gradient is
# that of sum_i w_i sum_{n in i} l_n over the instances i.
InstanceWeighting = Callable[[slice, Tensor], Tensor]


class Point(NamedTuple):
    """A point of weight space as the head sees it: h and W there, in the compute dtype."""

    h_NxD: Tensor
    weight_VxD: Tensor


class Labels(NamedTuple):
    """The targets of rows of logits, and the factors of their losses."""

    targets_N: Tensor
    factor_N: Tensor  # the scale of the loss; 0 where the target is not counted

    def of(self, rows: slice) -> "Labels":
        """Returns the labels of some rows."""
        return Labels(self.targets_N[rows], self.factor_N[rows])


class HeadConfig(NamedTuple):
    """The settings of a head."""

    vocab_size: int  # without the padding
    softcap: float | None
    z_loss: float


class RowLosses(NamedTuple):
    """The loss l and the log-normaliser logsumexp(z) of every row, in nats, in fp32 or wider."""

    losses_N: Tensor
    lse_N: Tensor


class Products(NamedTuple):
    """r W, in the compute dtype, and r^T h, in fp32 or wider: the gradients by h and by W."""

    dh_NxD: Tensor
    dW_VxD: Tensor

    @staticmethod
    def none(labels: Labels) -> "Products":
        """Returns empty tensors in place of products that are not computed."""
        return Products(labels.factor_N.new_empty(0), labels.factor_N.new_empty(0))


@dataclass
class InstanceWeights:
    """Weights of instances of `length` rows each, which `weighting` gives by their mean losses."""

    length: int
    weighting: InstanceWeighting
    weights_B: Tensor  # filled in as they become known

    @staticmethod
    def of(targets_BxT: Tensor, weighting: InstanceWeighting, labels: Labels) -> "InstanceWeights":
        """Returns the weights of a micro-batch, none of which is known yet."""
        weights_B = labels.factor_N.new_zeros(len(targets_BxT))
        return InstanceWeights(targets_BxT.shape[1], weighting, weights_B)

    def of_rows(self, rows: slice, losses_N: Tensor, targets_N: Tensor) -> Tensor:
        """Returns the weight of every row of some whole instances, and fills in `weights_B`."""
        T = self.length
        instances = slice(rows.start // T, rows.stop // T)
        means = instance_means(losses_N[rows].view(-1, T), targets_N[rows].view(-1, T) != IGNORED)
        self.weights_B[instances] = self.weighting(instances, means)
        return self.weights_B[instances].repeat_interleave(T)


def instance_means(losses: Tensor, counted: Tensor) -> Tensor:
    """Returns the mean loss over the counted targets of each instance, the first dimension; 0 where
    there are none."""
    losses = losses.reshape(len(losses), -1)
    counted = counted.reshape(len(counted), -1)
    return torch.where(counted, losses, 0).sum(1) / counted.sum(1).clamp_min(1)


# Over all tokens


def losses(
    source: Point, labels: Labels, head: HeadConfig, r_NxV: Tensor | None = None
) -> RowLosses:
    """Returns the losses of the logits of a point; with `r_NxV`, writes factor * r there."""
    found = RowLosses(torch.zeros_like(labels.factor_N), torch.zeros_like(labels.factor_N))
    block_losses = losses_of_block
    if r_NxV is not None:
        block_losses = turn_into_cotangent
    for rows, z_CxV in chunked_head(source, chunk_size(source), r_NxV):
        for block, z_KxV in blocks_of(rows, z_CxV):
            found.losses_N[block], found.lse_N[block] = block_losses(z_KxV, labels.of(block), head)
    return found


def losses_and_gradients(
    source: Point,
    target: Point,
    labels: Labels,
    head: HeadConfig,
    r_NxV: Tensor | None = None,
    weights: InstanceWeights | None = None,
) -> tuple[RowLosses, Products]:
    """Returns the losses of the logits of the source, and the products of their r with the target,
    each row times its factor.

    Args:
        source: where the logits are taken
        target: whose W and h r is multiplied with; the source, for the gradients of the loss
        labels: targets and factors
        head: vocabulary, soft-cap and z-loss
        r_NxV: where factor * r is written, if anywhere
        weights: of instances; they multiply the products, and not `r_NxV`
    """
    found = RowLosses(torch.zeros_like(labels.factor_N), torch.zeros_like(labels.factor_N))
    dh_NxD = torch.empty_like(target.h_NxD)
    dW_VxD: Tensor | None = None
    size = chunk_size(source, target)
    # An instance's weight takes its mean loss, so a chunk holds whole instances.
    if weights:
        size = max(weights.length, size // weights.length * weights.length)
    for rows, z_CxV in chunked_head(source, size, r_NxV):
        for block, z_KxV in blocks_of(rows, z_CxV):
            row_losses = turn_into_cotangent(z_KxV, labels.of(block), head)
            found.losses_N[block], found.lse_N[block] = row_losses
        r_CxV = z_CxV  # what z has been turned into
        torch.mm(r_CxV, target.weight_VxD, out=dh_NxD[rows])
        h_CxD = target.h_NxD[rows]
        if weights:
            # A row of r times its weight, in either product: the losses had to be known first.
            weight_Cx1 = weights.of_rows(rows, found.losses_N, labels.targets_N)[:, None]
            dh_NxD[rows] *= weight_Cx1
            h_CxD = (h_CxD * weight_Cx1).to(h_CxD.dtype)
        product_VxD = r_CxV.T @ h_CxD
        dW_VxD = added(dW_VxD, product_VxD, labels)
    return found, Products(dh_NxD, total_of(dW_VxD, target, labels))


def stored_products(r_NxV: Tensor, target: Point, labels: Labels) -> Products:
    """Returns the products of a stored factor * r with the target. It is whole anyway, so nothing
    is saved by chunks."""
    dh_NxD = r_NxV @ target.weight_VxD
    product_VxD = r_NxV.T @ target.h_NxD
    return Products(dh_NxD, product_VxD.to(labels.factor_N.dtype))


def rebuilt_products(
    source: Point, target: Point, labels: Labels, head: HeadConfig, lse_N: Tensor
) -> Products:
    """Returns the products with the target of factor * r of the source, which is computed once
    more; `lse_N` are its log-normalisers."""
    dh_NxD = torch.empty_like(target.h_NxD)
    dW_VxD: Tensor | None = None
    for rows, z_CxV in chunked_head(source, chunk_size(source, target)):
        for block, z_KxV in blocks_of(rows, z_CxV):
            turn_into_known_cotangent(z_KxV, labels.of(block), head, lse_N[block])
        r_CxV = z_CxV
        torch.mm(r_CxV, target.weight_VxD, out=dh_NxD[rows])
        product_VxD = r_CxV.T @ target.h_NxD[rows]
        dW_VxD = added(dW_VxD, product_VxD, labels)
    return Products(dh_NxD, total_of(dW_VxD, target, labels))


def added(total_VxD: Tensor | None, product_VxD: Tensor, labels: Labels) -> Tensor:
    """Returns a running sum of products, in fp32 or wider, which is changed in place."""
    if total_VxD is None:
        return product_VxD.to(labels.factor_N.dtype)
    return total_VxD.add_(product_VxD)


def total_of(total_VxD: Tensor | None, target: Point, labels: Labels) -> Tensor:
    """Returns the sum over all chunks, which is zero where there were no tokens."""
    if total_VxD is None:
        return torch.zeros_like(target.weight_VxD, dtype=labels.factor_N.dtype)
    return total_VxD


# Chunks of rows, and blocks of a chunk


def chunked_head(
    source: Point, size: int, r_NxV: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, z_CxV = h W^T of these rows) over all tokens, in chunks of at most `size` rows
    and one after another in the same memory; or all at once, in `r_NxV`, where that is given."""
    if r_NxV is not None:
        size = len(r_NxV)
        buffer_CxV = r_NxV
    else:
        # One buffer for all chunks: fresh memory of this size is paid for page by page.
        buffer_CxV = source.h_NxD.new_empty(size, len(source.weight_VxD))
    for rows in slices(len(source.h_NxD), size):
        z_CxV = buffer_CxV[: rows.stop - rows.start]
        torch.mm(source.h_NxD[rows], source.weight_VxD.T, out=z_CxV)
        yield rows, z_CxV


def blocks_of(rows: slice, z_CxV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields a chunk in blocks that stay in a CPU's cache: their rows among all, and z_KxV."""
    for block in slices(len(z_CxV), block_size(z_CxV.shape[1], z_CxV.device.type)):
        yield slice(rows.start + block.start, rows.start + block.stop), z_CxV[block]


def slices(total: int, size: int) -> Iterator[slice]:
    """Yields slices of at most `size` rows that together are `total` rows."""
    for begin in range(0, total, max(1, size)):
        yield slice(begin, min(total, begin + size))


def chunk_size(source: Point, target: Point | None = None) -> int:
    """Returns the rows of a chunk of the head; see `rows_per_chunk`."""
    V, D = source.weight_VxD.shape
    second_width = 0
    if target is not None and target.weight_VxD is not source.weight_VxD:
        second_width = D
    return rows_per_chunk(len(source.h_NxD), V, source.h_NxD.device.type, second_width)


def rows_per_chunk(num_rows: int, V: int, device: str, second_width: int = 0) -> int:
    """Returns the rows of logits of a chunk, on a kind of device.

    Args:
        num_rows: N, of which the chunks are even parts
        V: vocabulary, with its padding
        device: cpu or cuda
        second_width: D where the W of a second point lives beside the chunk, else 0
    """
    size = even_chunk_size(num_rows, max(1, CHUNK_ELEMENTS.get(device, ELEMENTS_ELSEWHERE) // V))
    if second_width:
        # The chunk makes room for a second V x D, but not for more than half of itself.
        size = even_chunk_size(num_rows, max(size // 2, size - second_width))
    return size


def block_size(V: int, device: str) -> int:
    """Returns the rows of logits of a block, on a kind of device."""
    return max(1, BLOCK_ELEMENTS.get(device, ELEMENTS_ELSEWHERE) // V)


def even_chunk_size(total: int, largest: int) -> int:
    """Returns the size of parts of one size, as few as can be, of at most `largest` rows."""
    # A short last part would make a small, slow product.
    num_parts = max(1, -(-total // max(1, largest)))
    return -(-total // num_parts)


# The softmax of a block of rows


def is_fused(z_KxV: Tensor) -> bool:
    """Returns whether logits turn into losses and r by one kernel: on CUDA, where Triton
    can build one. In fp64 the eager operations are the more exact."""
    return z_KxV.is_cuda and z_KxV.dtype != torch.float64 and HAS_KERNELS


def fused_rows(
    z_KxV: Tensor,
    labels: Labels,
    head: HeadConfig,
    writes_cotangent: bool,
    lse_K: Tensor | None = None,
) -> RowLosses | None:
    """Returns what the kernel computes of a block of rows, None where it does not run."""
    if not is_fused(z_KxV):
        return None
    # Imported late: where there is no Triton, there is no such module.
    from model.fused_head import rows_of_logits

    return rows_of_logits(z_KxV, labels, head, writes_cotangent, lse_K)


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """Returns c tanh(z / c), or z where there is no soft-cap c."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of losses and sums: fp32, or x's own where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def capped_logits(z_KxV: Tensor, labels: Labels, head: HeadConfig) -> Tensor:
    """Returns the logits of a block without the padding, soft-capped, in fp32 or wider."""
    return capped(z_KxV[:, : head.vocab_size].to(labels.factor_N.dtype), head.softcap)


def index_of(labels: Labels) -> Tensor:
    """Returns the column of every row's target, 0 where the target is not counted."""
    return labels.targets_N.where(labels.targets_N != IGNORED, 0)[:, None]


def losses_of_block(z_KxV: Tensor, labels: Labels, head: HeadConfig) -> RowLosses:
    """Returns l and the log-normaliser of a block of rows."""
    found = fused_rows(z_KxV, labels, head, writes_cotangent=False)
    if found is not None:
        return found
    index_Kx1 = index_of(labels)
    # log p[target] = z[target] - logsumexp(z): the log-normaliser comes without another pass.
    z = capped_logits(z_KxV, labels, head)
    log_p = z.log_softmax(1).gather(1, index_Kx1)
    lse = z.gather(1, index_Kx1) - log_p
    return RowLosses((head.z_loss * lse.square() - log_p)[:, 0], lse[:, 0])


def turn_into_cotangent(z_KxV: Tensor, labels: Labels, head: HeadConfig) -> RowLosses:
    """Overwrites z of a block by factor * r; returns l and the log-normaliser of its rows."""
    found = fused_rows(z_KxV, labels, head, writes_cotangent=True)
    if found is not None:
        return found
    z = capped_logits(z_KxV, labels, head)
    p = z.softmax(1)
    # Every row is passed over as few times as can be: max p = exp(max z - lse).
    lse = z.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
    losses = lse - z.gather(1, index_of(labels)) + head.z_loss * lse.square()
    write_cotangent(z_KxV, z, p, lse, labels, head)
    return RowLosses(losses[:, 0], lse[:, 0])


def turn_into_known_cotangent(
    z_KxV: Tensor, labels: Labels, head: HeadConfig, lse_K: Tensor
) -> None:
    """Overwrites z of a block by factor * r, where its log-normalisers are known already."""
    if fused_rows(z_KxV, labels, head, writes_cotangent=True, lse_K=lse_K) is not None:
        return
    z = capped_logits(z_KxV, labels, head)
    write_cotangent(z_KxV, z, z.softmax(1), lse_K[:, None], labels, head)


def write_cotangent(
    out_KxV: Tensor, z: Tensor, p: Tensor, lse: Tensor, labels: Labels, head: HeadConfig
) -> None:
    """Writes factor * r = factor (p (1 + 2 b lse) - onehot) (1 - (z/c)^2), with zeros for the
    padding, where b is the z-loss and c the soft-cap. Changes p."""
    factor_Kx1 = labels.factor_N[:, None]
    scale = factor_Kx1
    if head.z_loss:
        scale = factor_Kx1 * (1 + 2 * head.z_loss * lse)
    # In place of p, and -factor at the targets for the one-hot: no further K x V is made.
    r = p.mul_(scale).scatter_add_(1, index_of(labels), -factor_Kx1)
    if head.softcap is not None:
        r.mul_(1 - (z / head.softcap).square())
    out_KxV[:, : head.vocab_size] = r
    out_KxV[:, head.vocab_size :] = 0


def differentiable_gradients(
    h_NxD: Tensor, weight_VxD: Tensor, labels: Labels, head: HeadConfig
) -> Products:
    """Returns dl/dh and dl/dW once more, densely, by operations that can be differentiated
    themselves."""
    vocab_size = head.vocab_size
    z = (h_NxD @ weight_VxD.T)[:, :vocab_size].to(wide_dtype(h_NxD))
    z = capped(z, head.softcap)
    onehot = torch.zeros_like(z).scatter(1, index_of(labels), 1.0)
    p = z.softmax(1) * (1 + 2 * head.z_loss * z.logsumexp(1, keepdim=True))
    r = labels.factor_N[:, None] * (p - onehot)
    if head.softcap is not None:
        r = r * (1 - (z / head.softcap).square())
    r = r.to(h_NxD.dtype)
    # Rows of the padding belong to W and get no gradient.
    padding = weight_VxD.new_zeros(weight_VxD.shape[0] - vocab_size, weight_VxD.shape[1])
    return Products(r @ weight_VxD[:vocab_size], torch.cat([r.T @ h_NxD, padding]))
