"""The softmax of rows of logits as one kernel for GPUs, in Triton.

Eager operations make fp32 copies of the logits and pass over them about eight times, some 32 bytes
a logit. Here a program has a row to itself, reads it once for its log-normaliser and once more to
overwrite it by its cotangent: 2 + 2 + 2 bytes a logit in bf16, of which the second reading mostly
comes out of the cache (a row of 50304 logits has 100 KB). The least that is possible is 2 + 2.

The equations are those of model/chunked_head.py:

    z~ = c tanh(z / c)                                      where there is a soft-cap c
    l = lse - z~[target] + b lse^2,  lse = logsumexp(z~)    b is the z-loss
    factor r = factor (softmax(z~) (1 + 2 b lse) - onehot) (1 - (z~ / c)^2)

tests/test_fused_head.py counts the loads and stores in the code that is generated for two kinds of
devices; no device has run it yet."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.chunked_head import HeadConfig, Labels, RowLosses

# Columns that a program takes at a time, in fp32 registers of its WARPS x 32 threads.
COLUMNS = 4096
WARPS = 8
IGNORED = tl.constexpr(-100)


@triton.jit
def capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """Returns c tanh(z / c), by the exponential that every device has; z without a soft-cap."""
    if HAS_SOFTCAP:
        # tanh x = 1 - 2 / (exp(2 x) + 1), which is 1 and -1 where the exponential is inf and 0.
        z = softcap * (1 - 2 / (tl.exp(2 * z / softcap) + 1))
    return z


@triton.jit
def log_normaliser(
    z_row, vocab_size, padded_size, softcap, HAS_SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr
):
    """Returns logsumexp(z~) of a row, from one reading."""
    columns = tl.arange(0, COLUMNS)
    # The sum is kept relative to the largest logit so far.
    largest = float("-inf")
    total = 0.0
    for begin in range(0, padded_size, COLUMNS):
        here = begin + columns
        z = tl.load(z_row + here, mask=here < padded_size, other=0.0).to(tl.float32)
        z = tl.where(here < vocab_size, capped(z, softcap, HAS_SOFTCAP), float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
    return largest + tl.log(total)


@triton.jit
def write_cotangent(  # noqa: PLR0913 - a kernel takes pointers and numbers one by one
    z_row,
    index,
    lse,
    factor,
    vocab_size,
    padded_size,
    softcap,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Overwrites a row by factor * r, from one more reading."""
    columns = tl.arange(0, COLUMNS)
    scale = factor * (1 + 2 * z_loss * lse)
    for begin in range(0, padded_size, COLUMNS):
        here = begin + columns
        z = tl.load(z_row + here, mask=here < padded_size, other=0.0).to(tl.float32)
        z = capped(z, softcap, HAS_SOFTCAP)
        r = tl.exp(z - lse) * scale - tl.where(here == index, factor, 0.0)
        if HAS_SOFTCAP:
            r = r * (1 - (z / softcap) * (z / softcap))
        # The padding has no cotangent.
        r = tl.where(here < vocab_size, r, 0.0)
        tl.store(z_row + here, r.to(z_row.dtype.element_ty), mask=here < padded_size)


# Rows of a chunk may begin at any address: one compilation for all of them.
@triton.jit(do_not_specialize_on_alignment=["targets_ptr", "factor_ptr", "losses_ptr", "lse_ptr"])
def row_kernel(  # noqa: PLR0913 - a kernel takes pointers and numbers one by one
    z_ptr,
    targets_ptr,
    factor_ptr,
    losses_ptr,
    lse_ptr,
    row_stride,
    vocab_size,
    padded_size,
    softcap,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    KNOWS_LSE: tl.constexpr,
    WRITES_COTANGENT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes one row: its loss and log-normaliser, unless that is known, and its cotangent in
    place of its logits, if asked for. The padding is read too: its size is a multiple of 16, so a
    thread reads 16 bytes at once."""
    row = tl.program_id(0)
    # In 64 bits: 2^31 logits are 43,000 rows of GPT-2's vocabulary.
    z_row = z_ptr + row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row)
    index = tl.where(target == IGNORED, 0, target)
    # A target outside of the vocabulary is a mistake, for which the loss is NaN: nothing in the
    # kernel can raise, and what lies beside the row must not be read.
    is_token = (index >= 0) & (index < vocab_size)
    z_target = tl.load(z_row + index, mask=is_token, other=float("nan")).to(tl.float32)
    z_target = capped(z_target, softcap, HAS_SOFTCAP)
    if KNOWS_LSE:
        lse = tl.load(lse_ptr + row)
    else:
        lse = log_normaliser(z_row, vocab_size, padded_size, softcap, HAS_SOFTCAP, COLUMNS)
        tl.store(lse_ptr + row, lse)
        tl.store(losses_ptr + row, lse - z_target + z_loss * lse * lse)
    if WRITES_COTANGENT:
        factor = tl.load(factor_ptr + row)
        write_cotangent(
            z_row,
            index,
            lse,
            factor,
            vocab_size,
            padded_size,
            softcap,
            z_loss,
            HAS_SOFTCAP,
            COLUMNS,
        )


def rows_of_logits(
    z_KxV: Tensor,
    labels: Labels,
    head: HeadConfig,
    writes_cotangent: bool,
    lse_K: Tensor | None = None,
) -> RowLosses:
    """Returns l and the log-normaliser of every row, and overwrites z by factor * r if asked for.

    Args:
        z_KxV: logits with their padding, in bf16, fp16 or fp32
        labels: targets and factors of the rows
        head: vocabulary, soft-cap and z-loss
        writes_cotangent: whether z is overwritten
        lse_K: the log-normalisers, where they are known; then no losses are computed
    """
    K, V = z_KxV.shape
    losses_K = labels.factor_N.new_empty(K)
    knows_lse = lse_K is not None
    if lse_K is None:
        lse_K = torch.empty_like(losses_K)
    assert z_KxV.stride(1) == 1
    # Triton launches on the current device, which need not be the one where the logits lie.
    with torch.cuda.device_of(z_KxV):
        row_kernel[(K,)](
            z_KxV,
            # The kernel reads row after row; targets may be a column of a larger tensor.
            labels.targets_N.contiguous(),
            labels.factor_N.contiguous(),
            losses_K,
            lse_K.contiguous(),
            z_KxV.stride(0),
            head.vocab_size,
            V,
            head.softcap or 1.0,
            head.z_loss,
            HAS_SOFTCAP=head.softcap is not None,
            KNOWS_LSE=knows_lse,
            WRITES_COTANGENT=writes_cotangent,
            COLUMNS=min(COLUMNS, triton.next_power_of_2(V)),
            num_warps=WARPS,
        )
    return RowLosses(losses_K, lse_K)
