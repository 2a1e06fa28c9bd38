"""The shape of a GPT."""

from dataclasses import dataclass

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "rope_scaling": ("none", "linear", "llama3"),
    "activation": ("gelu", "swiglu", "relu2"),
    "init": ("nanodo", "gpt2"),
}
# Rows of the embedding are padded to a multiple of this, which matrix units want; no softmax sees
# the padding.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are NanoDO's.

    Raises ValueError, naming the key as a run has it (model.width), for values that do not fit each
    other."""

    vocab_size: int  # the tokenizer's own, without padding
    max_length: int  # tokens of a sequence, at most
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
        self._check_heads()
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

    def _check_heads(self) -> None:
        """Raises ValueError where the width cannot be shared by the heads."""
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

    @property
    def head_width(self) -> int:
        """Returns the width d of a head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Returns the heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_width(self) -> int:
        """Returns the hidden width M of the MLP."""
        if self.mlp_width:
            return self.mlp_width
        if self.activation == "swiglu":
            # Three matrices of 8/3 D are as many weights as two of 4 D.
            return round_up(8 * self.width, 3 * 64) // 3
        return 4 * self.width

    @property
    def padded_vocab_size(self) -> int:
        """Returns the rows of the embedding and of the head, padding included."""
        return round_up(self.vocab_size, VOCAB_MULTIPLE)


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is no less than a number."""
    return -(-number // multiple) * multiple
