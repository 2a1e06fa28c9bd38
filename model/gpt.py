"""A decoder-only transformer that covers NanoDO and GPT-2. Shapes: B batch, T time, D width, H heads, V vocabulary.

x = E[tokens] + P[0..T)
x = x + Attention(LayerNorm(x));  x = x + MLP(LayerNorm(x))       for each block
logits = LayerNorm(x) E^T
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from model.logits import LazyLogits

VOCAB_MULTIPLE = 64  # rows of the embedding are padded to this: matrix units want it, and nobody else sees it


@dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are NanoDO's. `vocab_size` is the tokenizer's own, without padding."""

    vocab_size: int
    max_length: int
    num_layers: int
    num_heads: int
    width: int
    mlp_width: int | None = None  # default 4 D
    bias: bool = False
    norm_eps: float = 1e-6
    init: str = "nanodo"

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"model.width={self.width} is not divisible by model.num_heads={self.num_heads}; choose a divisor of the width")
        if self.init not in ("nanodo", "gpt2"):
            raise ValueError(f"model.init={self.init} is unknown; choose nanodo or gpt2")


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
        self.k, self.v = (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)) if self.length else (k, v)
        return self.k, self.v


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BxTxD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        B, T, D = x_BxTxD.shape
        qkv = self.qkv(x_BxTxD).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # B x H x T x D/H
        causal = True
        if cache is not None:  # a prompt into an empty cache is causal; a single token after it sees everything
            assert T == 1 or cache.length == 0
            causal = T > 1
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.mlp_width or 4 * config.width
        self.up = nn.Linear(config.width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BxTxD), approximate="tanh"))


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP, each added to the residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BxTxD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD), cache)
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class GPT(nn.Module):
    """`GPT(config)(tokens_BxT int64) -> logits_BxTxV`; `loss` never holds tokens x vocabulary.

    The weights are drawn from `seed` (see `init_weights`), unless the default device is meta: then the caller
    materialises the parameters and calls `init_weights`.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        padded_vocab_size = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        with torch.device("meta"):
            self.embedding = table(padded_vocab_size, config.width)  # also the head
            self.positions = table(config.max_length, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    def hidden(self, tokens_BxT: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Final hidden states h_BxTxD, which the head turns into logits. `caches`, one per block, hold the past."""
        past, T = (caches[0].length if caches else 0), tokens_BxT.shape[1]
        if past + T > self.config.max_length:
            raise ValueError(f"{past + T} tokens exceed model.max_length={self.config.max_length}; shorten the sequence")
        x_BxTxD = self.embedding(tokens_BxT) + self.positions(torch.arange(past, past + T, device=tokens_BxT.device))
        for layer, block in enumerate(self.blocks):
            x_BxTxD = block(x_BxTxD, caches[layer] if caches else None)
        return self.norm(x_BxTxD)

    def logits(self, h_BxTxD: Tensor) -> LazyLogits:
        """The logits of hidden states, as the pair (h, unembedding) until somebody asks for them."""
        return LazyLogits(h_BxTxD, self.embedding.weight, self.config.vocab_size)

    def forward(self, tokens_BxT: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        return self.logits(self.hidden(tokens_BxT, caches)).dense()

    def loss(self, tokens_BxT: Tensor, targets_BxT: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the counted targets (those that are not -100), and their number."""
        return self.logits(self.hidden(tokens_BxT)).cross_entropy(targets_BxT)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every weight from a generator of its own, seeded by (seed, name), so that the numbers depend neither on
        the order of drawing nor on the device, nor on how the weights will be sharded. Biases are 0, LayerNorm scales 1.

        nanodo: linear maps R^a -> R^b uniform in +-sqrt(6 / (a + b)) (Glorot; q, k and v each on their own);
                embedding and positions normal with variance 1 / D.
        gpt2:   linear maps and embedding normal with deviation 0.02, positions 0.01; the two projections that write to
                the residual 0.02 / sqrt(2 L), since 2 L of them add up there.
        """
        for name, parameter in self.named_parameters():
            values = torch.zeros(parameter.shape)
            if name.endswith("norm.weight"):
                values.fill_(1.0)
            elif not name.endswith("bias"):
                rows = self.config.vocab_size if name == "embedding.weight" else parameter.shape[0]
                self._draw(name, values[:rows], named_generator(seed, name))
            parameter.copy_(values)

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
            out = D if name.endswith("qkv.weight") else values.shape[0]
            bound = math.sqrt(6 / (out + values.shape[1]))
            values.uniform_(-bound, bound, generator=generator)

    def num_parameters(self, embedding: bool = True) -> int:
        """Parameters, without the vocabulary's padding; `embedding=False` leaves out token and position embeddings."""
        total = sum(p.numel() for name, p in self.named_parameters() if name not in ("embedding.weight", "positions.weight"))
        return total + embedding * (self.config.vocab_size + self.config.max_length) * self.config.width


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding that is not initialised: nn.Embedding's own draw on the meta device imports the compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and a name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def checkpoint_path(run: str | Path, step: int | None = None) -> Path:
    """The folder of a run's checkpoint; `step=None` means the newest. Raises ValueError where there is none."""
    found = {int(path.name.removeprefix("step_")): path for path in Path(run).glob("checkpoints/step_*")}
    if not found:
        raise ValueError(f"run={run} has no checkpoints; name the folder of a run that was trained")
    if step is not None and step not in found:
        raise ValueError(f"step={step} is not among the checkpoints of {run}; it has {', '.join(map(str, sorted(found)))}")
    return found[max(found) if step is None else step]


def load(run: str | Path, step: int | None = None) -> GPT:
    """The GPT of a run, from its newest checkpoint or that of a step. Raises ValueError where there is none."""
    path = checkpoint_path(run, step)
    config = GPTConfig(**json.loads((path / "state.json").read_text())["model"])
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(load_file(path / "model.safetensors"), assign=True)
    return model
