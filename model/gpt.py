"""A decoder-only transformer that covers NanoDO, GPT-2 and Llama. Shapes: B batch, T time, D width,
H heads, d = D/H, V vocabulary.

x = E[tokens] + P[0..T)                                          without P for rotary positions
x = x + Attention(Norm(x));  x = x + MLP(Norm(x))                for each block
logits = Norm(x) U^T                                             U = E where the head is tied
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.files import check
from model.checkpoint import open_run
from model.logits import LazyLogits
from model.processes import Layout
from model.randomness import named_generator
from model.sharding import local, shard_of

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "rope_scaling": ("none", "linear", "llama3"),
    "activation": ("gelu", "swiglu", "relu2"),
    "init": ("nanodo", "gpt2"),
}
VOCAB_MULTIPLE = (
    64  # rows of the embedding are padded to this: matrix units want it, and nobody else sees it
)

SHORT = 1024  # longest sequence for `short_attention`
QUERIES = 256  # whose scores it writes out at once


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are NanoDO's. `vocab_size` is the tokenizer's own, without
    padding."""

    vocab_size: int
    max_length: int
    num_layers: int
    num_heads: int
    width: int
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query attention (2305.13245)
    mlp_width: int | None = None  # default 4 D; for swiglu 8/3 D, rounded up to a multiple of 64
    bias: bool = False
    norm: str = "layernorm"  # or rmsnorm
    norm_eps: float = 1e-6
    positions: str = "learned"  # or rope
    rope_base: float = 10000.0
    rope_scaling: str = "none"  # or linear, llama3: see `rotary_frequencies`
    rope_factor: float = 1.0
    rope_original_length: int = 8192
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    activation: str = "gelu"  # or swiglu (2002.05202), relu2 (2109.08668)
    qk_norm: bool = False  # RMSNorm of every head's q and k (2302.05442)
    tied: bool = True
    dropout: float = 0.0
    logit_softcap: float | None = None  # c tanh(logits / c) (2408.00118)
    z_loss: float = 0.0  # adds z_loss * logsumexp(logits)^2 to the training loss (2204.02311)
    init: str = "nanodo"  # or gpt2

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"model.num_heads={self.num_heads} is out of range; choose at least 1")
        if self.width % self.num_heads:
            raise ValueError(
                f"model.width={self.width} is not divisible by model.num_heads={self.num_heads};"
                " choose a divisor of the width"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.kv_heads} does not divide"
                f" model.num_heads={self.num_heads}; choose a divisor of it"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"model.num_heads={self.num_heads} makes heads of odd width {self.head_width},"
                " which rope cannot rotate; choose another"
            )
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(
                    f"model.{name}={value} is unknown; choose one of {', '.join(choices)}"
                )
        if self.rope_scaling == "llama3" and self.rope_high_factor <= self.rope_low_factor:
            raise ValueError(
                f"model.rope_high_factor={self.rope_high_factor} does not exceed"
                f" model.rope_low_factor={self.rope_low_factor}; raise it, Llama 3 has 4 and 1"
            )

    @property
    def head_width(self) -> int:
        """Width d of a head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_width(self) -> int:
        """Hidden width M of the MLP."""
        if self.mlp_width:
            return self.mlp_width
        return (
            -(-8 * self.width // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.width
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head, padding included."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class KeyValueCache:
    """The keys and values that one block has computed so far, each B x H x T x D/H."""

    def __init__(self) -> None:
        self.k = self.v = torch.empty(0)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.k.shape[2] if self.k.numel() else 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new tokens and returns all of them."""
        self.k, self.v = (
            (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)) if self.length else (k, v)
        )
        return self.k, self.v


def build_norm(config: GPTConfig, width: int) -> nn.Module:
    """LayerNorm or RMSNorm over the last `width` numbers."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rotary_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Radians per position of each of the d/2 pairs of a head: f_i = base^(-2i/d) (2104.09864),
    which a longer context may scale.

    linear: f_i / s for a factor s (2306.15595). llama3: a pair that turns n_i = original_length f_i
    / (2 pi) times over the original context keeps f_i where n_i > high_factor, gets
            f_i / s where n_i < low_factor, and between them ((1 - a) / s + a) f_i, a = (n_i -
            low_factor) / (high_factor - low_factor)
            (Llama 3.1, `apply_scaling` of its reference implementation).
    """
    half = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32)
    # rounded as transformers does: far positions magnify the difference
    frequencies = 1.0 / config.rope_base ** (half / config.head_width)
    if config.rope_scaling == "linear":
        return frequencies / config.rope_factor
    if config.rope_scaling == "llama3":
        turns = config.rope_original_length / (2 * math.pi / frequencies)
        kept = (
            (turns - config.rope_low_factor) / (config.rope_high_factor - config.rope_low_factor)
        ).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / config.rope_factor + kept * frequencies
    return frequencies


def rotary_table(config: GPTConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, T x d each, of the angles position * f_i (see `rotary_frequencies`), once for
    either half of a head."""
    angles = positions_T.float()[:, None] * rotary_frequencies(config, positions_T.device)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x_BxHxTxd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) by its angle, in fp32 or wider."""
    x, (cos, sin) = x_BxHxTxd.to(torch.promote_types(x_BxHxTxd.dtype, torch.float32)), rotary
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BxHxTxd.dtype)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention that writes out its scores, B H x C x E of C queries and the E keys up to
    the last of them, in bf16; the softmax computes in fp32. On CPUs, on short sequences, it takes a
    third to a half of the time of the fused kernel, whose backward is slow there
    (tests/benchmarks/kernels.py)."""
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
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        B, T, D = x_BxTxD.shape
        H, G = self.config.num_heads, self.config.kv_heads
        heads = self.qkv(x_BxTxD).view(B, T, H + 2 * G, self.config.head_width).transpose(1, 2)
        q, k, v = heads.split([H, G, G], dim=1)  # B x H x T x d, and G heads of k and v
        if self.config.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        causal = True
        if (
            cache is not None
        ):  # a prompt into an empty cache is causal; a single token after it sees everything
            assert T == 1 or cache.length == 0
            causal = T > 1
            k, v = cache.extend(k, v)
        dropout = self.config.dropout if self.training else 0.0
        if (
            causal
            and G == H
            and dropout == 0
            and q.dtype == torch.bfloat16
            and q.device.type == "cpu"
            and T <= SHORT
        ):
            y = short_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=G < H
            )
        return self.out(y.transpose(1, 2).reshape(B, T, D))


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
        up = self.up(x_BxTxD)
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x_BxTxD)) * up)
        return self.down(
            F.gelu(up, approximate="tanh") if self.activation == "gelu" else F.relu(up).square()
        )


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
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        x_BxTxD = x_BxTxD + self.dropout(
            self.attention(self.attention_norm(x_BxTxD), rotary, cache)
        )
        return x_BxTxD + self.dropout(self.mlp(self.mlp_norm(x_BxTxD)))


class GPT(nn.Module):
    """`GPT(config)(tokens_BxT int64) -> logits_BxTxV`; `loss` never holds tokens x vocabulary.

    The weights are drawn from `seed` (see `init_weights`), unless the default device is meta: then
    the caller materialises the parameters and calls `init_weights`. With `checkpoint_activations` a
    block keeps its input only, and its backward runs its forward again."""

    checkpoint_activations = False
    layout = Layout()

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
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
        """U_VxD, padded rows included; the embedding where the head is tied."""
        return self.embedding.weight if self.config.tied else self.head.weight

    @property
    def unpadded_rows(self) -> dict[str, int]:
        """Rows that are the vocabulary's own, by name, of the parameters that are padded."""
        names = ["embedding.weight"] if self.config.tied else ["embedding.weight", "head.weight"]
        return dict.fromkeys(names, self.config.vocab_size)

    def hidden(self, tokens_BxT: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Final hidden states h_BxTxD, which the head turns into logits. `caches`, one per block,
        hold the past."""
        past, T = (caches[0].length if caches else 0), tokens_BxT.shape[1]
        if past + T > self.config.max_length:
            raise ValueError(
                f"{past + T} tokens exceed model.max_length={self.config.max_length}; shorten the"
                " sequence"
            )
        positions_T = torch.arange(past, past + T, device=tokens_BxT.device)
        x_BxTxD, rotary = self.embedding(tokens_BxT), None
        if self.config.positions == "learned":
            x_BxTxD = x_BxTxD + self.positions(positions_T)
        else:
            rotary = rotary_table(self.config, positions_T)
        x_BxTxD = self.dropout(x_BxTxD)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BxTxD = checkpoint(block, x_BxTxD, rotary, use_reentrant=False)
            else:
                x_BxTxD = block(x_BxTxD, rotary, caches[layer] if caches else None)
        return self.norm(x_BxTxD)

    def logits(self, h_BxTxD: Tensor) -> LazyLogits:
        """The logits of hidden states, as the pair (h, unembedding) until somebody asks for
        them."""
        z_loss = self.config.z_loss if self.training else 0.0
        return LazyLogits(
            h_BxTxD, self.unembedding, self.config.vocab_size, self.config.logit_softcap, z_loss
        )

    def lazy_logits(self, tokens_BxT: Tensor) -> LazyLogits:
        """The logits of a batch, not computed yet: what a gradient rule asks a model for."""
        return self.logits(self.hidden(tokens_BxT))

    def forward(self, tokens_BxT: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        return self.logits(self.hidden(tokens_BxT, caches)).dense()

    def loss(
        self, tokens_BxT: Tensor, targets_BxT: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`scale` times the cross-entropy in nats summed over the counted targets (those that are
        not -100), and their number; in training with the z-loss, if the model has one."""
        return self.lazy_logits(tokens_BxT).cross_entropy(targets_BxT, scale)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every weight from a generator of its own, seeded by (seed, name), so that the
        numbers depend neither on the order of drawing nor on the device, nor on how the weights
        will be sharded. Biases are 0, LayerNorm scales 1.

        nanodo: linear maps R^a -> R^b uniform in +-sqrt(6 / (a + b)) (Glorot; q, k and v each on
        their own);
                embedding and positions normal with variance 1 / D.
        gpt2:   linear maps and embedding normal with deviation 0.02, positions 0.01; the two
                projections that write to
                the residual 0.02 / sqrt(2 L), since 2 L of them add up there.
        """
        for name, parameter in self.named_parameters():
            # even where another device is the default
            values = torch.zeros(parameter.shape, device="cpu")
            if name.endswith("norm.weight"):
                values.fill_(1.0)
            elif not name.endswith("bias"):
                rows = (
                    self.config.vocab_size
                    if name in ("embedding.weight", "head.weight")
                    else parameter.shape[0]
                )
                self._draw(name, values[:rows], named_generator(seed, name))
            local(parameter).copy_(shard_of(values, parameter))

    def _draw(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Fills one weight matrix, out x in, by the rules of `init_weights`."""
        D = self.config.width
        if self.config.init == "gpt2":
            std = 0.01 if name == "positions.weight" else 0.02
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            values.normal_(0.0, std, generator=generator)
        elif name in ("embedding.weight", "positions.weight"):
            values.normal_(0.0, D**-0.5, generator=generator)
        else:
            kv = self.config.kv_heads * self.config.head_width
            parts = values.split([D, kv, kv]) if name.endswith("qkv.weight") else [values]
            for part in parts:
                bound = math.sqrt(6 / (part.shape[0] + part.shape[1]))
                part.uniform_(-bound, bound, generator=generator)

    def num_parameters(self, embedding: bool = True) -> int:
        """Parameters, without the vocabulary's padding; `embedding=False` leaves out what grows
        with the vocabulary or the length: token and position embeddings and an untied head."""
        shape = {
            "embedding.weight": self.config.vocab_size,
            "head.weight": self.config.vocab_size,
            "positions.weight": self.config.max_length,
        }
        body = sum(p.numel() for name, p in self.named_parameters() if name not in shape)
        tables = sum(
            rows * self.config.width
            for name, rows in shape.items()
            if name in dict(self.named_parameters())
        )
        return body + embedding * tables


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
    """An embedding that is not initialised: nn.Embedding's own draw on the meta device imports the
    compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def load(run: str | Path, step: int | None = None) -> GPT:
    """Returns the GPT of a run, in evaluation mode, from its newest checkpoint or that of a step.
    Raises ValueError where there is none, or it is damaged."""
    saved = open_run(run, step, ("model",))
    try:
        config = check(saved.state.get("model"), GPTConfig, saved.path / "state.json")
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(
            {name: stored[...] for name, stored in saved.tensors["model"].items()}, assign=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{saved.path} is damaged ({' '.join(str(error).split())}); choose another step of"
            " the run"
        ) from None
    return model.eval()
