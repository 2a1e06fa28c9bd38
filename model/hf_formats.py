"""The formats of Hugging Face checkpoints that a GPT can be read from and written to: GPT-2 and
Llama.

A format says what it can express of a GPTConfig and what it calls each of our tensors; both
directions read the same table, and neither needs transformers."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from model.config import GPTConfig

# Tables, which no format keeps transposed.
TABLES = ("embedding.weight", "positions.weight", "head.weight")
HEAD = "lm_head.weight"
# Keys of GPTConfig that a trained model's logits do not depend on.
TRAINING = {"dropout", "z_loss", "init"}
# Their names of activations to ours; theirs of "gelu" is another.
GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu2": "relu2"}

# Keys of GPTConfig for the scaled rotary positions of Llama 3.1, by their names, and those that
# each kind of scaling reads.
ROPE = {
    "rope_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_low_factor": "low_freq_factor",
    "rope_high_factor": "high_freq_factor",
}
SCALING = {"none": [], "linear": ["rope_factor"], "llama3": [*ROPE]}


@dataclass(frozen=True)
class Format:
    """How a family of checkpoints is laid out."""

    architecture: str
    # The numbers of a shape in config.json, to GPTConfig's; those of model.hf_config.REQUIRED have
    # no default.
    keys: dict[str, str]
    # The values of GPTConfig's keys that it has; keys that are not listed are free.
    expresses: dict[str, tuple]
    # The values of config.json's keys that a GPT has, where there is more than its sizes.
    computable: dict[str, tuple]
    prefix: str  # of every tensor but the head's
    outer: dict[str, str]  # our modules to its modules
    layers: str
    # The same within a block; several share the rows of ours, in this order.
    inner: dict[str, tuple[str, ...]]
    transposed: bool  # whether linear layers within blocks are kept input x output
    buffers: str  # names of what older versions kept beside the weights, a regular expression
    aliases: dict[str, str]  # other names of keys of config.json, which transformers takes too

    def names_of(self, name: str) -> tuple[str, ...]:
        """Returns what the format calls, without its prefix, the tensors that share the rows of
        ours."""
        *module, kind = name.split(".")
        if module[0] != "blocks":
            return (f"{self.outer[module[0]]}.{kind}",)
        layer = f"{self.layers}.{module[1]}"
        return tuple(f"{layer}.{theirs}.{kind}" for theirs in self.inner[".".join(module[2:])])

    def is_transposed(self, name: str) -> bool:
        """Returns whether the format keeps a matrix of ours input x output."""
        return self.transposed and name not in TABLES


FORMATS = {
    "gpt2": Format(
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size",
            "n_positions": "max_length",
            "n_layer": "num_layers",
            "n_head": "num_heads",
            "n_embd": "width",
            "n_inner": "mlp_width",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tied",
        },
        {
            "norm": ("layernorm",),
            "positions": ("learned",),
            "activation": ("gelu", "relu2"),
            "qk_norm": (False,),
            "logit_softcap": (None,),
        },
        {
            "activation_function": tuple(GELU),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "is_causal": (True,),
        },
        "transformer.",
        {"embedding": "wte", "positions": "wpe", "norm": "ln_f", "head": "lm_head"},
        "h",
        {
            "attention_norm": ("ln_1",),
            "attention.qkv": ("attn.c_attn",),
            "attention.out": ("attn.c_proj",),
            "mlp_norm": ("ln_2",),
            "mlp.up": ("mlp.c_fc",),
            "mlp.down": ("mlp.c_proj",),
        },
        transposed=True,
        buffers=r"h\.\d+\.attn\.(masked_)?bias",
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    "llama": Format(
        "LlamaForCausalLM",
        {
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_length",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "hidden_size": "width",
            "num_key_value_heads": "num_kv_heads",
            "intermediate_size": "mlp_width",
            "rms_norm_eps": "norm_eps",
            "tie_word_embeddings": "tied",
            "rope_theta": "rope_base",
            "attention_bias": "bias",
            "mlp_bias": "bias",
        },
        {
            "norm": ("rmsnorm",),
            "positions": ("rope",),
            "activation": ("swiglu",),
            "qk_norm": (False,),
            "logit_softcap": (None,),
        },
        {
            "hidden_act": ("silu",),
            "rope_type": ("default", "linear", "llama3"),
            "partial_rotary_factor": (1.0,),
            "is_causal": (True,),
        },
        "model.",
        {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"},
        "layers",
        {
            "attention_norm": ("input_layernorm",),
            "attention.out": ("self_attn.o_proj",),
            "mlp_norm": ("post_attention_layernorm",),
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.up": ("mlp.up_proj",),
            "mlp.gate": ("mlp.gate_proj",),
            "mlp.down": ("mlp.down_proj",),
        },
        transposed=False,
        buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        aliases={},
    ),
}


def override(key: str, value: Any) -> str:
    """Returns a key of GPTConfig with its value, as a person would type it."""
    return f"model.{key}={value if isinstance(value, str) else json.dumps(value)}"


def objections(config: GPTConfig, name: str) -> list[str]:
    """Returns the keys of a shape that a format cannot express, with their values."""
    values = asdict(config) | {"num_kv_heads": config.kv_heads}
    expresses = FORMATS[name].expresses
    if name == "gpt2":
        expresses = expresses | {"num_kv_heads": (config.num_heads,)}
    return [
        override(key, values[key])
        for key, allowed in expresses.items()
        if values[key] not in allowed
    ]


def choose_format(config: GPTConfig, format: str = "auto") -> str:
    """Returns the format, gpt2 or llama, that expresses a shape.

    Args:
        config: the shape
        format: the one asked for, or auto: whichever can

    Raises:
        ValueError: it cannot, or none can; the message names the keys
    """
    found = {name: objections(config, name) for name in FORMATS}
    closest = format
    if format == "auto":
        closest = min(found, key=lambda name: len(found[name]))
    if not found[closest]:
        return closest
    other = next((name for name in FORMATS if not found[name]), None)
    remedy = "use format=plain, or train a shape that transformers has: model=gpt2_124m, llama_150m"
    if other:
        remedy = f"use format={other}"
    raise ValueError(
        f"format={format}: {closest} cannot express {', '.join(found[closest])}; {remedy}"
    )
