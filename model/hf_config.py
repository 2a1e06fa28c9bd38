"""Shapes in config.json of Hugging Face folders, in both directions.

A folder may come from anywhere, so nothing in it is believed: its settings are typed and bounded as
our own keys are, and whatever does not fit is named."""

import json
import re
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from conf.key import check_value, type_name
from conf.key import key as declare
from conf.keys import KEYS
from data.hf_folder import LARGEST_VOCABULARY
from model.config import GPTConfig
from model.hf_formats import FORMATS, GELU, ROPE, SCALING, Format

# Keys of GPTConfig that every config.json must have.
REQUIRED = ("vocab_size", "max_length", "num_layers", "num_heads", "width")
# The keys of rope_parameters that are read, and those of them that may stand outside of it.
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE.values())
OUTSIDE = ("rope_theta", "partial_rotary_factor", ROPE["rope_original_length"])


@dataclass
class Vocabulary:
    """The number that a folder has and our configuration does not: it comes from the tokenizer."""

    vocab_size: int = declare(1, "rows of the embedding", low=1, high=LARGEST_VOCABULARY)


[VOCABULARY] = fields(Vocabulary)


# Out


def to_config(config: GPTConfig, format: str) -> dict[str, Any]:
    """Returns the config.json of a shape, but for its special tokens."""
    common = {
        "architectures": [FORMATS[format].architecture],
        "model_type": format,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }
    if format == "gpt2":
        return common | to_gpt2(config)
    return common | to_llama(config)


def to_gpt2(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys of GPT-2 alone."""
    return {
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.width,
        "n_inner": config.hidden_width,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu" else config.activation,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def to_llama(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys of Llama alone."""
    scaling = {ROPE[key]: getattr(config, key) for key in SCALING[config.rope_scaling]}
    scaling["rope_type"] = config.rope_scaling if scaling else "default"
    older: dict[str, Any] = {}
    if scaling["rope_type"] != "default":
        older["rope_scaling"] = scaling
    return older | {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        # Transformers 5 reads the first, and 4 the second.
        "rope_parameters": scaling | {"rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
    }


# In


def from_config(theirs: dict[str, Any]) -> GPTConfig:
    """Returns the shape that a config.json describes, without dropout. Raises ValueError, naming
    the key, for what a GPT cannot be."""
    kind = theirs.get("model_type")
    if kind not in [*FORMATS]:
        raise ValueError(
            f"model_type={show(kind)} is not among {', '.join(FORMATS)}; choose a model of theirs"
        )
    format = FORMATS[kind]
    theirs = with_rotary_keys(with_own_names(theirs, format))
    refuse_other_computation(theirs, format)
    shape: dict[str, Any] = {}
    for key, ours in format.keys.items():
        if (value := stated(theirs, key, ours)) is not None:
            shape[ours] = value
    if kind == "gpt2":
        defaults = gpt2_defaults(theirs)
    else:
        defaults = LLAMA_DEFAULTS
        shape |= llama_extras(theirs)
    try:
        config = GPTConfig(**defaults | {"init": "gpt2"} | shape)
    except ValueError as error:
        raise ValueError(in_their_words(str(error), format)) from None
    if theirs.get("head_dim") not in (None, config.head_width):
        raise ValueError(
            f"head_dim={show(theirs['head_dim'])} is not the width over the heads,"
            f" {config.head_width}; choose another model"
        )
    return config


def with_own_names(theirs: dict[str, Any], format: Format) -> dict[str, Any]:
    """Returns a config.json with the names of its own format for keys that transformers knows by
    two. The general name wins where both are there, as it does in transformers."""
    general = {own: theirs[key] for key, own in format.aliases.items() if key in theirs}
    return theirs | general


def with_rotary_keys(theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json with its rotary keys on top: those of transformers 4, which had
    rope_theta outside, and of 5, which goes by the older name where both are there."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={show(rope)} is of the wrong type; it must be an object")
    # A key such as "type" or "factor" on top is of something else.
    on_top = {key: theirs[key] for key in theirs if key not in ROPE_KEYS or key in OUTSIDE}
    merged = on_top | {key: rope[key] for key in ROPE_KEYS if key in rope}
    # Of this one alone transformers takes the number outside (`standardize_rope_params`).
    original = ROPE["rope_original_length"]
    if original in on_top:
        merged[original] = on_top[original]
    merged["rope_type"] = merged.get("rope_type") or merged.get("type", "default")
    return merged


def refuse_other_computation(theirs: dict[str, Any], format: Format) -> None:
    """Raises ValueError, naming the key, where a config.json asks for what a GPT does not
    compute."""
    for key, allowed in format.computable.items():
        if theirs.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{key}={show(theirs[key])} is not what a GPT computes"
                f" ({', '.join(map(show, allowed))}); choose another model"
            )
    if theirs.get("quantization_config"):
        raise ValueError(
            f"quantization_config={show(theirs['quantization_config'])} would quantise the weights,"
            " which a GPT does not; choose a model without it"
        )


def gpt2_defaults(theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns the defaults of GPT-2, where its config.json does not say."""
    activation = GELU[theirs.get("activation_function", "gelu_new")]
    return {"norm_eps": 1e-5, "tied": True, "bias": True, "activation": activation}


# The defaults of Llama, where its config.json does not say.
LLAMA_DEFAULTS = {
    "norm_eps": 1e-6,
    "tied": False,
    "norm": "rmsnorm",
    "positions": "rope",
    "activation": "swiglu",
}


def llama_extras(theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a Llama's shape that several keys of its config.json decide."""
    scaling = theirs["rope_type"].replace("default", "none")
    biases = [stated(theirs, key, "bias") for key in ("attention_bias", "mlp_bias")]
    extras = {"rope_scaling": scaling, "bias": any(biases)}
    for ours in SCALING[scaling]:
        if (value := stated(theirs, ROPE[ours], ours)) is None:
            raise ValueError(
                f"{ROPE[ours]} is missing, which rope_type={scaling} needs; fetch the folder again"
            )
        extras[ours] = value
    return extras


def in_their_words(message: str, format: Format) -> str:
    """Returns what a GPTConfig says of its own keys, with those of a config.json."""
    names = {ours: key for key, ours in format.keys.items()} | ROPE
    return re.sub(r"model\.(\w+)", lambda found: names.get(found[1], found[0]), message)


def stated(theirs: dict[str, Any], key: str, ours: str) -> Any:
    """Returns the value of a key in config.json, or None where it says nothing, and the default
    holds. Raises ValueError, naming the key, where it lacks one that has no default, and for a
    value that the key `ours` of a model cannot have."""
    value = theirs.get(key)
    if value is None and ours in REQUIRED:
        raise ValueError(f"{key} is missing; fetch the folder again")
    if value is None:
        return None
    # Of the size of the vocabulary there is no key: a run takes it from its tokenizer.
    entry = VOCABULARY if ours == "vocab_size" else KEYS[f"model.{ours}"]
    try:
        value = msgspec.convert(value, entry.type, strict=True)
    except msgspec.ValidationError:
        raise ValueError(
            f"{key}={show(value)} is of the wrong type; it must be {type_name(entry)}; fetch the"
            " folder again"
        ) from None
    check_value(key, value, entry.metadata)
    return value


def show(value: Any) -> str:
    """Returns a value of a JSON file as it stands there, cut where it is long."""
    # As it is where it is a word; else as JSON, so that "" and a line break are seen.
    is_word = isinstance(value, str) and value and value.isprintable()
    text = value if is_word else json.dumps(value)
    if len(text) > 60:
        text = text[:60] + "..."
    return text
