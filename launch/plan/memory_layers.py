"""Tables of the tensors of a model's layers: a transformer block, operation by operation, and the
head.

A token costs a layer the same wherever it stands, so the rows are numbers per token. Everything is
for eager execution: compiled blocks keep less, as inductor computes again what is cheap.

N tokens are in a micro-batch of sequences of length T; D is the width, M that of the MLP, H the
heads of width d, G those of keys and values, V the padded vocabulary, s the bytes of a number in
the compute precision."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from launch.plan.memory_table import Table, larger, tensor
from model.chunked_head import block_size, rows_per_chunk
from model.config import GPTConfig
from model.gpt import QUERIES, SHORT


class PerToken(NamedTuple):
    """Tensors of a layer: numbers per token, and bytes of a number."""

    name: str
    numbers: int
    size: int


def of_tokens(rows: Iterable[PerToken], blocks: int, tokens: int) -> Table:
    """Returns the table of per-token rows, for a number of blocks and the tokens of a
    micro-batch."""
    table: Table = []
    for row in rows:
        table += tensor("activations", row.name, blocks, tokens, row.numbers, size=row.size)
    return table


@dataclass(frozen=True)
class Block:
    """One transformer block over sequences of length T.

    RMSNorm is not fused on CPUs, nor of heads in bf16: what it normalised is kept in fp32, and the
    fp32 copy of an input in bf16."""

    shape: GPTConfig
    length: int
    device: str
    size: int  # s

    @property
    def on_cpu(self) -> bool:
        """Returns whether the kernels are those of CPUs."""
        return self.device == "cpu"

    @property
    def is_cast(self) -> bool:
        """Returns whether autocast is on, so that products take casts of fp32 tensors."""
        return self.size != 4

    @property
    def has_dropout(self) -> bool:
        """Returns whether there is any dropout."""
        return self.shape.dropout > 0

    @property
    def kv(self) -> int:
        """Returns the width of all keys, G d."""
        return self.shape.kv_heads * self.shape.head_width

    @property
    def writes_out_scores(self) -> bool:
        """Returns whether attention is `model.gpt.short_attention`."""
        plain = self.on_cpu and self.is_cast and not self.has_dropout
        return plain and self.kv == self.shape.width and self.length <= SHORT

    @property
    def keys_of_a_query(self) -> int:
        """Returns how many scores a query has on average, where they are written out."""
        # Blocks of QUERIES queries see the keys up to their last query, and no later ones.
        T = self.length
        scores = 0
        for first in range(0, T, QUERIES):
            scores += min(QUERIES, T - first) * min(T, first + QUERIES)
        return scores // T

    def norm(self, where: str) -> list[PerToken]:
        """Returns what a norm keeps: its input, which is the residual, and its statistics."""
        D = self.shape.width
        is_layernorm = self.shape.norm == "layernorm"
        # Mean and deviation, or the latter alone.
        num_statistics = 2 if is_layernorm else 1
        rows = [
            PerToken(f"{where} norm: input", D, 4),
            PerToken(f"{where} norm: statistics", num_statistics, 4),
        ]
        if not is_layernorm and self.on_cpu:
            rows.append(PerToken(f"{where} norm: what it normalised", D, 4))
        return rows

    def dropout(self, where: str) -> list[PerToken]:
        """Returns what dropout keeps: a byte a number on CUDA, the noise on CPUs."""
        if not self.has_dropout:
            return []
        num_bytes = 1
        if self.on_cpu:
            num_bytes = self.size
        return [PerToken(f"{where} dropout", self.shape.width, num_bytes)]

    def head_norms(self) -> list[PerToken]:
        """Returns what the RMSNorm of every head's q and k keeps."""
        if not self.shape.qk_norm:
            return []
        qk = self.shape.width + self.kv
        rows = [
            PerToken("q and k norms: statistics", self.shape.num_heads + self.shape.kv_heads, 4)
        ]
        if self.on_cpu or self.is_cast:
            rows.append(PerToken("q and k norms: what they normalised", qk, 4))
        if self.is_cast:
            rows.append(PerToken("q and k norms: fp32 copies of inputs", qk, 4))
        return rows

    def scores(self) -> list[PerToken]:
        """Returns what attention itself keeps of q, k, v and their softmax."""
        D, H, T, s = self.shape.width, self.shape.num_heads, self.length, self.size
        output = PerToken("attention: output", D, s)
        if self.writes_out_scores:
            return [
                PerToken("attention: copies of q, k, v", 3 * D, s),
                PerToken("attention: softmax", H * self.keys_of_a_query, s),
                output,
            ]
        if self.on_cpu and self.has_dropout:
            # The fused kernel has no dropout there, and the scores are computed in fp32.
            return [
                PerToken("attention: q, k, v", 3 * D, 4),
                PerToken("attention: softmax, noise and product", 3 * H * T, 4),
                output,
            ]
        rows = [PerToken("attention: q, k, v as one", D + 2 * self.kv, s)]
        if self.shape.qk_norm or self.shape.positions == "rope":
            rows.append(PerToken("attention: q and k, turned or normalised", D + self.kv, s))
        return [*rows, output, PerToken("attention: log-normalisers", H, 4)]

    def attention(self) -> list[PerToken]:
        """Returns what the attention half keeps for its backward."""
        qkv_input = PerToken("attention: input of q, k, v", self.shape.width, self.size)
        rows = [*self.norm("attention"), qkv_input, *self.head_norms(), *self.scores()]
        return rows + self.dropout("attention")

    def mlp(self) -> list[PerToken]:
        """Returns what the MLP half keeps for its backward: both sides of GELU or squared ReLU; for
        SwiGLU gate, silu, up and their product."""
        D, M, s = self.shape.width, self.shape.hidden_width, self.size
        is_swiglu = self.shape.activation == "swiglu"
        num_inputs = 1
        num_hidden = 2
        if is_swiglu:
            num_hidden = 4
            # Under autocast each map that reads the norm's output has a cast of its own.
            if self.is_cast:
                num_inputs = 2
        return [
            *self.norm("MLP"),
            PerToken("MLP: input", num_inputs * D, s),
            PerToken("MLP: around the activation", num_hidden * M, s),
            *self.dropout("MLP"),
        ]

    def attention_backward(self) -> list[PerToken]:
        """Returns what the attention's backward needs on top of what was kept."""
        D, H, T, s = self.shape.width, self.shape.num_heads, self.length, self.size
        residual = PerToken("backward: gradient of the residual", D, 4)
        if self.writes_out_scores:
            return [
                residual,
                PerToken("backward: gradient of the output", D, s),
                PerToken("backward: gradients of scores", 2 * H * min(T, QUERIES), s),
            ]
        if self.on_cpu and self.has_dropout:
            return [
                residual,
                PerToken("backward: gradients of output and v", 2 * D, 4),
                PerToken("backward: gradients of scores", 2 * H * T, 4),
            ]
        return [
            residual,
            PerToken("backward: gradient of the output", D, s),
            PerToken("backward: gradients of q, k, v", 2 * (D + 2 * self.kv), s),
        ]

    def mlp_backward(self) -> list[PerToken]:
        """Returns what the MLP's backward needs on top of what was kept."""
        D, s = self.shape.width, self.size
        num_hidden = {"gelu": 1, "swiglu": 2, "relu2": 3}[self.shape.activation]
        rows = [
            PerToken("backward: gradient of the residual", D, 4),
            PerToken("backward: in the MLP", num_hidden * self.shape.hidden_width, s),
        ]
        if self.is_cast:
            rows.append(PerToken("backward: cast of the gradient", D, s))
        return rows


@dataclass(frozen=True)
class Head:
    """The head over the tokens of a micro-batch (model/chunked_head.py), on a kind of device."""

    width: int
    V: int  # rows of the unembedding
    softcap: bool
    tokens: int
    device: str
    size: int  # s

    @property
    def table(self) -> int:
        """Returns the numbers of the unembedding."""
        return self.V * self.width

    @property
    def copies(self) -> int:
        """Returns how many blocks in fp32 the softmax has by eager operations."""
        copies = 1
        if self.size != 4:
            # Under autocast the block beside its cast.
            copies += 1
        if self.softcap:
            # tanh and its argument.
            copies += 2
        return copies

    def chunk_rows(self, stored: bool, rebuilt: bool) -> int:
        """Returns the rows of a chunk of logits; a stored cotangent needs no chunks."""
        if stored:
            return self.tokens
        return rows_per_chunk(self.tokens, self.V, self.device, self.width if rebuilt else 0)

    def tensors(self, stored: bool = False, rebuilt: bool = False, gradients: bool = True) -> Table:
        """Returns what lives in the head when it is fullest.

        Args:
            stored: the chunks are written to a cotangent, which is counted elsewhere
            rebuilt: the cotangent is of another W than the one it is multiplied with
            gradients: dh and dW are computed, and not the losses alone
        """
        s = self.size
        is_cast = s != 4
        num_rows = self.chunk_rows(stored, rebuilt)
        block = min(num_rows, block_size(self.V, self.device))
        # On CUDA one kernel overwrites the logits, and has no copies of them.
        softmax: Table = []
        if self.device != "cuda":
            softmax = tensor("head", "softmax of a block of rows", self.copies, block, self.V)
        table: Table = []
        if is_cast:
            table += tensor("head", "cast of h", self.tokens, self.width, size=s)
            table += tensor("head", "cast of W", self.V, self.width, size=s)
        if not stored:
            table += tensor("head", "chunk of logits, which turns into r", num_rows, self.V, size=s)
        if not gradients:
            return table + softmax
        table += tensor("head", "dh", self.tokens, self.width, size=s)
        return table + self.products(softmax, -(-self.tokens // num_rows))

    def products(self, softmax: Table, num_chunks: int) -> Table:
        """Returns what lives of dW and the product that is added to it, or beside it the softmax of
        the next chunk."""
        is_cast = self.size != 4
        product = tensor("head", "r^T h of a chunk", self.V, self.width, size=self.size)
        dW = tensor("head", "dW", self.V, self.width)
        if num_chunks == 1:
            # In fp32 the first product becomes dW.
            if not is_cast:
                dW = []
            return larger(softmax, product + dW)
        table = dW
        if is_cast or num_chunks > 2:
            # That of the chunk before is there until the next one is computed.
            table = dW + tensor("head", "r^T h of the last", self.V, self.width, size=self.size)
        return table + larger(softmax, product)
