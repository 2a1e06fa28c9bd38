"""Floating-point operations of a GPT, counted from its shape. A product of a x b and b x c counts
2abc."""

from dataclasses import dataclass

from model.gpt import GPTConfig


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward per token; a backward costs twice as much.

    body       2 (2 D^2 + 2 D G d + n D M) L
               the linear maps of L blocks: q and out, k and v with G heads of width d, and the
               n maps of the MLP, 3 for SwiGLU, else 2 (24 D^2 L at G d = D, M = 4 D, n = 2)
    attention  4 T D L
               q k^T and its product with v over the whole T x T square, as PaLM counts
               (2204.02311, appendix B); good kernels skip the half of it that causality hides
    head       2 D V
               over all V rows of the head, the vocabulary's padding included, as the product
               runs; the embedding look-up costs nothing
    """

    body: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """FLOPs of one forward per token."""
        return self.body + self.attention + self.head

    def of(self, forwards: float, backwards: float, head_products: float) -> float:
        """Returns the FLOPs per token of passes through the body and products with the head."""
        return (self.body + self.attention) * (forwards + 2 * backwards) + self.head * head_products


def forward_flops(config: GPTConfig, length: int) -> ForwardFlops:
    """Returns the forward FLOPs per token of a model on sequences of `length` tokens."""
    D = config.width
    M = config.hidden_width
    L = config.num_layers
    kv = config.kv_heads * config.head_width
    # SwiGLU has a gate beside the two maps, up and down.
    maps = 3 if config.activation == "swiglu" else 2
    body = 2 * (2 * D * D + 2 * D * kv + maps * D * M) * L
    return ForwardFlops(body, attention=4 * length * D * L, head=2 * D * config.padded_vocab_size)
