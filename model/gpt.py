"""A decoder-only transformer that covers NanoDO, GPT-2 and Llama. Shapes: B batch, T time, D width,
H heads, d = D/H, V vocabulary.

x = E[tokens] + P[0..T)                                          without P for rotary positions
x = x + Attention(Norm(x));  x = x + MLP(Norm(x))                for each block
logits = Norm(x) U^T                                             U = E where the head is tied
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import GPTConfig
from model.logits import LazyLogits
from model.processes import Layout
from model.randomness import named_generator
from model.rotary import Rotary, rotary_table, rotate
from model.sharding import local, shard_of

# Attention on CPUs writes out the scores of sequences of at most SHORT tokens, QUERIES rows at
# once.
# Beside the fused kernel that is 1.76 x as fast at 1024 without AMX; with AMX 1.38 x at 512, and
# 0.72 x at 1024 (tests/benchmarks/results/cpu.md).
SHORT = 512 if torch.cpu._is_amx_tile_supported() else 1024
QUERIES = 256


class KeyValueCache:
    """The keys and values that one block has computed so far, each B x H x T x D/H."""

    def __init__(self) -> None:
        # Empty until the first tokens come, whose batch and type they take.
        self.k = self.v = torch.empty(0)

    @property
    def length(self) -> int:
        """Returns the number of tokens held."""
        if not self.k.numel():
            return 0
        return self.k.shape[2]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new tokens and returns all of them."""
        if self.length:
            k = torch.cat([self.k, k], 2)
            v = torch.cat([self.v, v], 2)
        self.k = k
        self.v = v
        return k, v


def build_norm(config: GPTConfig, width: int) -> nn.Module:
    """Builds the LayerNorm or RMSNorm over the last `width` numbers."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes causal attention, B x H x T x d, by writing out its scores, B H x C x E of C queries
    and the E keys up to the last of them, in bf16; the softmax computes in fp32.

    On CPUs, on short sequences, it takes a third to a half of the time of the fused kernel, whose
    backward is slow there (tests/benchmarks/kernels.py)."""
    # All heads in one batched product. Queries go in parts: those of a part see no key behind its
    # last one, which spares nearly half of the products.
    B, H, T, d = q.shape
    q, k, v = (heads.reshape(B * H, T, d) for heads in (q, k, v))
    parts = []
    for begin in range(0, T, QUERIES):
        end = min(T, begin + QUERIES)
        mask_CxE = torch.full((end - begin, end), float("-inf"), dtype=q.dtype).triu(begin + 1)
        scores = torch.baddbmm(
            mask_CxE.expand(B * H, -1, -1),
            q[:, begin:end],
            k[:, :end].transpose(1, 2),
            alpha=d**-0.5,
        )
        parts.append(torch.bmm(scores.softmax(-1).to(v.dtype), v[:, :end]))
    return torch.cat(parts, 1).view(B, H, T, d)


def fused_kernel_takes_groups(q: Tensor) -> bool:
    """Returns whether a fused kernel takes queries with fewer heads of keys and values. On CUDA the
    only fused one for fp32 does not, and torch would write out T x T scores without a word."""
    return not (q.device.type == "cuda" and q.dtype == torch.float32)


class Attention(nn.Module):
    """Causal self-attention with H heads of queries and as many, or fewer, of keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(
            config.width,
            (config.num_heads + 2 * config.kv_heads) * config.head_width,
            bias=config.bias,
        )
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)

    def forward(
        self,
        x_BxTxD: Tensor,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Returns what attention adds to the residual, B x T x D."""
        B, T, D = x_BxTxD.shape
        H, G = self.config.num_heads, self.config.kv_heads
        heads = self.qkv(x_BxTxD).view(B, T, H + 2 * G, self.config.head_width).transpose(1, 2)
        # B x H x T x d for q, and B x G x T x d for k and v.
        q, k, v = heads.split([H, G, G], dim=1)
        # Autocast may compute a norm in fp32, and attention takes q, k and v of one dtype.
        if self.config.qk_norm:
            q = self.q_norm(q).to(v.dtype)
            k = self.k_norm(k).to(v.dtype)
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)
        is_causal = True
        if cache is not None:
            # A prompt into an empty cache is causal; a single token after it sees everything.
            assert T == 1 or cache.length == 0
            is_causal = T > 1
            k, v = cache.extend(k, v)
        y = self.attend(q, k, v, is_causal)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        """Computes attention, B x H x T x d, by the kernel that is fastest where it runs."""
        H, G = self.config.num_heads, self.config.kv_heads
        dropout = 0.0
        if self.training:
            dropout = self.config.dropout
        is_plain = is_causal and G == H and dropout == 0
        is_bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if is_plain and is_bf16_on_cpu and q.shape[2] <= SHORT:
            return short_attention(q, k, v)
        if G < H and not fused_kernel_takes_groups(q):
            k, v = (heads.repeat_interleave(H // G, 1) for heads in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=is_causal, enable_gqa=k.shape[1] < H
        )


class MLP(nn.Module):
    """Two linear layers around tanh-approximated GELU or squared ReLU, or three around SwiGLU:
    down(silu(gate x) * up x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.width, config.hidden_width, bias=config.bias)
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.width, config.hidden_width, bias=config.bias)
        self.down = nn.Linear(config.hidden_width, config.width, bias=config.bias)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        """Returns what the MLP adds to the residual, B x T x D."""
        up = self.up(x_BxTxD)
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x_BxTxD)) * up)
        if self.activation == "gelu":
            return self.down(F.gelu(up, approximate="tanh"))
        return self.down(F.relu(up).square())


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config, config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BxTxD: Tensor,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Returns the residual after the block, B x T x D."""
        x_BxTxD = x_BxTxD + self.dropout(
            self.attention(self.attention_norm(x_BxTxD), rotary, cache)
        )
        return x_BxTxD + self.dropout(self.mlp(self.mlp_norm(x_BxTxD)))


class GPT(nn.Module):
    """A decoder-only transformer: `GPT(config)(tokens_BxT int64) -> logits_BxTxV`. `loss` never
    holds tokens x vocabulary.

    Args:
        config: its shape
        seed: of its weights (see `init_weights`). On the meta device none are drawn: the caller
            materialises the parameters and calls `init_weights`
    """

    # With this a block keeps its input only, and its backward runs its forward again.
    checkpoint_activations = False
    layout = Layout()  # of the processes that share it; model.parallelize.shard sets it

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # Nothing is drawn on the meta device: `init_weights` draws all.
        with torch.device("meta"):
            self.embedding = table(config.padded_vocab_size, config.width)
            if config.positions == "learned":
                self.positions = table(config.max_length, config.width)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = build_norm(config, config.width)
            if not config.tied:
                self.head = nn.Linear(config.width, config.padded_vocab_size, bias=False)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    @property
    def unembedding(self) -> Tensor:
        """Returns U_VxD, padded rows included; the embedding where the head is tied."""
        if self.config.tied:
            return self.embedding.weight
        return self.head.weight

    @property
    def unpadded_rows(self) -> dict[str, int]:
        """Returns the rows that are the vocabulary's own, by name, of the parameters that are
        padded."""
        names = ["embedding.weight"]
        if not self.config.tied:
            names.append("head.weight")
        return dict.fromkeys(names, self.config.vocab_size)

    def hidden(self, tokens_BxT: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Returns the final hidden states h_BxTxD, which the head turns into logits.

        Args:
            tokens_BxT: int64
            caches: keys and values of the past, one per block, which are extended

        Raises:
            ValueError: past and tokens together are longer than `max_length`
        """
        past = caches[0].length if caches else 0
        T = tokens_BxT.shape[1]
        if past + T > self.config.max_length:
            raise ValueError(
                f"{past + T} tokens exceed model.max_length={self.config.max_length}; shorten the"
                " sequence"
            )
        # Positions go on where the cached ones end.
        positions_T = torch.arange(past, past + T, device=tokens_BxT.device)
        x_BxTxD = self.embedding(tokens_BxT)
        rotary = None
        if self.config.positions == "learned":
            x_BxTxD = x_BxTxD + self.positions(positions_T)
        else:
            rotary = rotary_table(self.config, positions_T)
        x_BxTxD = self.dropout(x_BxTxD)
        for layer, block in enumerate(self.blocks):
            # Without gradients there is no backward that a block would be run again for.
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BxTxD = checkpoint(block, x_BxTxD, rotary, use_reentrant=False)
            else:
                x_BxTxD = block(x_BxTxD, rotary, caches[layer] if caches else None)
        return self.norm(x_BxTxD)

    def logits(self, h_BxTxD: Tensor) -> LazyLogits:
        """Returns the logits of hidden states, as the pair (h, unembedding), not computed yet."""
        # Validation losses are cross-entropies, so that models with and without a z-loss compare.
        z_loss = 0.0
        if self.training:
            z_loss = self.config.z_loss
        return LazyLogits(
            h_BxTxD, self.unembedding, self.config.vocab_size, self.config.logit_softcap, z_loss
        )

    def lazy_logits(self, tokens_BxT: Tensor) -> LazyLogits:
        """Returns the logits of a batch, not computed yet: what a gradient rule asks a model
        for."""
        return self.logits(self.hidden(tokens_BxT))

    def forward(self, tokens_BxT: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Returns logits_BxTxV, soft-capped, without the padding of the vocabulary."""
        return self.logits(self.hidden(tokens_BxT, caches)).dense()

    def loss(
        self, tokens_BxT: Tensor, targets_BxT: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Returns `scale` times the cross-entropy in nats summed over the counted targets, and
        their number; in training with the z-loss, if the model has one.

        Args:
            tokens_BxT: int64
            targets_BxT: the next token of each, int64; -100 is not counted
            scale: 1 over the number of counted targets gives their mean
        """
        return self.lazy_logits(tokens_BxT).cross_entropy(targets_BxT, scale)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every weight from a generator of its own, seeded by (seed, name), so that the
        numbers depend neither on the order of drawing nor on the device, nor on how the weights
        will be sharded. Biases are 0, LayerNorm scales 1.

        nanodo: linear maps R^a -> R^b uniform in +-sqrt(6 / (a + b)) (Glorot; q, k and v each on
                their own); embedding and positions normal with variance 1 / D.
        gpt2:   linear maps and embedding normal with deviation 0.02, positions 0.01; the two
                projections that write to the residual 0.02 / sqrt(2 L), since 2 L of them add up
                there.
        """
        for name, parameter in self.named_parameters():
            # On the CPU even where another device is the default.
            values = torch.zeros(parameter.shape, device="cpu")
            if name.endswith("norm.weight"):
                values.fill_(1.0)
            elif not name.endswith("bias"):
                # The rows of the padding stay 0.
                rows = self.unpadded_rows.get(name, parameter.shape[0])
                self._draw(name, values[:rows], named_generator(seed, name))
            local(parameter).copy_(shard_of(values, parameter))

    def _draw(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Fills one weight matrix, out x in, by the rules of `init_weights`."""
        D = self.config.width
        if self.config.init == "gpt2":
            std = 0.02
            if name == "positions.weight":
                std = 0.01
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            values.normal_(0.0, std, generator=generator)
        elif name in ("embedding.weight", "positions.weight"):
            values.normal_(0.0, D**-0.5, generator=generator)
        else:
            # q, k and v share a matrix here, and are three maps for Glorot's formula.
            parts: Sequence[Tensor] = [values]
            if name.endswith("qkv.weight"):
                kv = self.config.kv_heads * self.config.head_width
                parts = values.split([D, kv, kv])
            for part in parts:
                bound = math.sqrt(6 / (part.shape[0] + part.shape[1]))
                part.uniform_(-bound, bound, generator=generator)

    def num_parameters(self, embedding: bool = True) -> int:
        """Counts the parameters, without the vocabulary's padding; `embedding=False` leaves out
        what grows with the vocabulary or the length: token and position embeddings and an untied
        head."""
        body = 0
        tables = 0
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "head.weight", "positions.weight"):
                rows = self.unpadded_rows.get(name, parameter.shape[0])
                tables += rows * self.config.width
            else:
                body += parameter.numel()
        if embedding:
            return body + tables
        return body


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout and the z-loss off, and leaves the model as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def table(rows: int, width: int) -> nn.Embedding:
    """Builds an embedding that is not initialised: nn.Embedding's own draw on the meta device
    imports the compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
