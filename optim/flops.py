"""Floating-point operations of a GPT, counted from its shape. A product of a x b and b x c counts 2abc."""

from dataclasses import dataclass

from model.gpt import GPTConfig


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward per token; a backward costs twice as much.

    body       2 (4 D^2 + 2 D M) L     the linear maps of L blocks with MLP width M (24 D^2 L at M = 4 D)
    attention  4 T D L                 q k^T and its product with v over the whole T x T square, as PaLM counts
                                       (2204.02311, appendix B); the causal half of it is skipped by good kernels
    head       2 D V                   exactly; the embedding look-up costs nothing
    """

    body: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """FLOPs of one forward per token."""
        return self.body + self.attention + self.head


def forward_flops(config: GPTConfig, length: int) -> ForwardFlops:
    """The forward FLOPs per token of a model on sequences of `length` tokens."""
    D, M, L = config.width, config.mlp_width or 4 * config.width, config.num_layers
    return ForwardFlops(body=2 * (4 * D * D + 2 * D * M) * L, attention=4 * length * D * L, head=2 * D * config.vocab_size)
