"""Hugging Face in and out: GPT-2 and Llama checkpoints, folders of config.json, safetensors and tokenizer.json.

A format says what it can express of a GPTConfig and what it calls each of our tensors; both directions read the same table. Neither
needs transformers, and neither unpickles anything. model/export.py writes a whole folder, data/hf_tokenizer.py does the tokenizers.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data import Tokenizer
from data.hf_tokenizer import FILES, find_folder, read_tokenizer
from model.gpt import GPT, GPTConfig
from model.sharding import load_weights

TABLES = ("embedding.weight", "positions.weight", "head.weight")
WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", *FILES)
TRAINING = {"dropout", "z_loss", "init"}  # keys of GPTConfig that a trained model's logits do not depend on
GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu2": "relu2"}  # their names of activations to ours; theirs of "gelu" is another

# Keys of GPTConfig for the scaled rotary positions of Llama 3.1, by their names, and those that each kind of scaling reads.
ROPE = {"rope_factor": "factor", "rope_original_length": "original_max_position_embeddings", "rope_low_factor": "low_freq_factor",
        "rope_high_factor": "high_freq_factor"}  # fmt: skip
SCALING = {"none": [], "linear": ["rope_factor"], "llama3": [*ROPE]}


@dataclass(frozen=True)
class Format:
    """How a family of checkpoints is laid out."""

    architecture: str
    expresses: dict[str, tuple]  # the values of GPTConfig's keys that it has; keys that are not listed are free
    computable: dict[str, tuple]  # the values of config.json's keys that a GPT has, where there is more than its sizes
    prefix: str  # of every tensor but the head's
    outer: dict[str, str]  # our modules to its modules
    layers: str
    inner: dict[str, tuple[str, ...]]  # the same within a block; several share the rows of ours, in this order
    transposed: bool  # whether linear layers within blocks are kept input x output


FORMATS = {
    "gpt2": Format(
        "GPT2LMHeadModel",
        {"norm": ("layernorm",), "positions": ("learned",), "activation": ("gelu", "relu2"), "qk_norm": (False,), "logit_softcap": (None,)},
        {"activation_function": tuple(GELU), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
         "add_cross_attention": (False,)},
        "transformer.",
        {"embedding": "wte", "positions": "wpe", "norm": "ln_f", "head": "lm_head"},
        "h",
        {"attention_norm": ("ln_1",), "attention.qkv": ("attn.c_attn",), "attention.out": ("attn.c_proj",),
         "mlp_norm": ("ln_2",), "mlp.up": ("mlp.c_fc",), "mlp.down": ("mlp.c_proj",)},
        transposed=True,
    ),
    "llama": Format(
        "LlamaForCausalLM",
        {"norm": ("rmsnorm",), "positions": ("rope",), "activation": ("swiglu",), "qk_norm": (False,), "logit_softcap": (None,)},
        {"hidden_act": ("silu",), "rope_type": ("default", "linear", "llama3"), "partial_rotary_factor": (1.0,)},
        "model.",
        {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"},
        "layers",
        {"attention_norm": ("input_layernorm",), "attention.out": ("self_attn.o_proj",), "mlp_norm": ("post_attention_layernorm",),
         "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "mlp.up": ("mlp.up_proj",), "mlp.gate": ("mlp.gate_proj",), "mlp.down": ("mlp.down_proj",)},
        transposed=False,
    ),
}  # fmt: skip


# Shapes


def override(key: str, value: Any) -> str:
    """A key of GPTConfig with its value, as a person would type it."""
    return f"model.{key}={value if isinstance(value, str) else json.dumps(value)}"


def choose_format(config: GPTConfig, format: str = "auto") -> str:
    """The format, gpt2 or llama, that expresses a shape. Raises ValueError naming the keys that none does, or not the one asked for."""
    objections = {}
    for name, candidate in FORMATS.items():
        values = asdict(config) | {"num_kv_heads": config.kv_heads}
        expresses = candidate.expresses | ({"num_kv_heads": (config.num_heads,)} if name == "gpt2" else {})
        objections[name] = [override(key, values[key]) for key, allowed in expresses.items() if values[key] not in allowed]
    closest = min(objections, key=lambda name: len(objections[name])) if format == "auto" else format
    if objections[closest]:
        other = next((name for name in FORMATS if not objections[name]), None)
        remedy = f"use format={other}" if other else "use format=plain, or train a shape that transformers has: model=gpt2_124m, llama_150m"
        raise ValueError(f"format={format}: {closest} cannot express {', '.join(objections[closest])}; {remedy}")
    return closest


def to_config(config: GPTConfig, format: str) -> dict[str, Any]:
    """The config.json of a shape, but for its special tokens."""
    common = {
        "architectures": [FORMATS[format].architecture], "model_type": format, "torch_dtype": "float32", "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip
    if format == "gpt2":
        return common | {
            "n_layer": config.num_layers, "n_head": config.num_heads, "n_embd": config.width, "n_inner": config.hidden_width,
            "n_positions": config.max_length, "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new" if config.activation == "gelu" else config.activation,
            "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        }  # fmt: skip
    scaling = {ROPE[key]: getattr(config, key) for key in SCALING[config.rope_scaling]}
    scaling["rope_type"] = config.rope_scaling if scaling else "default"
    return common | ({"rope_scaling": scaling} if len(scaling) > 1 else {}) | {
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width, "hidden_size": config.width, "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.max_length, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "attention_bias": config.bias, "mlp_bias": config.bias, "attention_dropout": config.dropout,
        "rope_parameters": scaling | {"rope_theta": config.rope_base}, "rope_theta": config.rope_base,  # of transformers 5, and 4
    }  # fmt: skip


def from_config(theirs: dict[str, Any]) -> GPTConfig:
    """The shape that a config.json describes, without dropout. Raises ValueError for what a GPT cannot be, KeyError for what is missing."""
    if theirs["model_type"] not in FORMATS:
        raise ValueError(f"model_type={theirs['model_type']} is not among {', '.join(FORMATS)}; choose a model of theirs")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # of transformers 5, and 4, which had rope_theta outside
    theirs = theirs | rope
    theirs["rope_type"] = theirs.get("rope_type") or theirs.get("type", "default")
    for key, allowed in FORMATS[theirs["model_type"]].computable.items():
        if theirs.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key}={theirs[key]} is not what a GPT computes ({', '.join(map(str, allowed))}); choose another model")
    if theirs["model_type"] == "gpt2":
        return GPTConfig(
            theirs["vocab_size"], theirs["n_positions"], theirs["n_layer"], theirs["n_head"], theirs["n_embd"], mlp_width=theirs.get("n_inner"),
            bias=True, norm_eps=theirs.get("layer_norm_epsilon", 1e-5), activation=GELU[theirs.get("activation_function", "gelu_new")],
            tied=theirs.get("tie_word_embeddings", True), init="gpt2",
        )  # fmt: skip
    scaling = theirs["rope_type"].replace("default", "none")
    config = GPTConfig(
        theirs["vocab_size"], theirs["max_position_embeddings"], theirs["num_hidden_layers"], theirs["num_attention_heads"], theirs["hidden_size"],
        num_kv_heads=theirs.get("num_key_value_heads"), mlp_width=theirs["intermediate_size"],
        bias=theirs.get("attention_bias", False) or theirs.get("mlp_bias", False), norm="rmsnorm", norm_eps=theirs.get("rms_norm_eps", 1e-6),
        positions="rope", rope_base=theirs.get("rope_theta", 10000.0), rope_scaling=scaling,
        activation="swiglu", tied=theirs.get("tie_word_embeddings", False), init="gpt2", **{key: theirs[ROPE[key]] for key in SCALING[scaling]},
    )  # fmt: skip
    if theirs.get("head_dim") not in (None, config.head_width):
        raise ValueError(f"head_dim={theirs['head_dim']} is not the width over the heads, {config.head_width}; choose another model")
    return config


# Weights


def their_names(name: str, format: Format) -> tuple[str, ...]:
    """What a format calls, without its prefix, the tensors that share the rows of ours."""
    *module, kind = name.split(".")
    if module[0] != "blocks":
        return (f"{format.outer[module[0]]}.{kind}",)
    return tuple(f"{format.layers}.{module[1]}.{theirs}.{kind}" for theirs in format.inner[".".join(module[2:])])


def to_tensors(model: GPT, format: Format) -> dict[str, Tensor]:
    """A model's weights by their names, in fp32, without the vocabulary's padding. GPT-2 has biases everywhere: where we have none, zeros."""
    config, tensors = model.config, {}
    kv = config.kv_heads * config.head_width
    for name, parameter in model.named_parameters():
        rows, theirs = parameter.detach().float().cpu(), their_names(name, format)
        if name in ("embedding.weight", "head.weight"):
            rows = rows[: config.vocab_size]
        for their, part in zip(theirs, rows.split([config.width, kv, kv] if len(theirs) == 3 else [len(rows)]), strict=True):
            their = their if name == "head.weight" else format.prefix + their
            tensors[their] = part.T if format.transposed and part.ndim == 2 and name not in TABLES else part
            if format.transposed and not config.bias and name not in TABLES:
                tensors[their.removesuffix("weight") + "bias"] = torch.zeros(len(part))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_tensors(tensors: dict[str, Tensor], config: GPTConfig, theirs: dict[str, Any]) -> dict[str, Tensor]:
    """Our state dict, in fp32, out of a checkpoint's tensors and config.json. Raises ValueError for a tensor that is missing, of another
    shape, or that a GPT has no place for."""
    format, state = FORMATS[theirs["model_type"]], {}
    buffers = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "lm_head.weight" if config.tied else "\0")
    tensors = {name.removeprefix(format.prefix): tensor for name, tensor in tensors.items() if not name.endswith(buffers)}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    for name, shape in shapes.items():
        declared = theirs.get("attention_bias" if ".attention." in name else "mlp_bias", format.transposed)
        if name.endswith(".bias") and not declared:  # of Llama, which has biases in attention, in the MLP, in both or in neither
            state[name] = torch.zeros(shape)
            continue
        parts = [tensors.pop(their, None) for their in their_names(name, format)]
        if any(part is None for part in parts):
            raise ValueError(f"{' or '.join(their_names(name, format))} is missing; the folder is incomplete, fetch it again")
        tensor = torch.cat([part.float() for part in parts if part is not None])
        if format.transposed and tensor.ndim == 2 and name not in TABLES:
            tensor = tensor.T.contiguous()
        if name in ("embedding.weight", "head.weight") and len(tensor) == config.vocab_size:
            tensor = torch.cat([tensor, torch.zeros(shape[0] - len(tensor), config.width)])
        if tensor.shape != shape:
            raise ValueError(f"{their_names(name, format)[0]} does not have the shape that config.json says; fetch the folder again")
        state[name] = tensor
    if tensors:
        raise ValueError(f"{min(tensors)} has no place in a GPT; choose another model")
    return state


# Folders


def read_shape(folder: Path) -> tuple[GPTConfig, dict[str, Any]]:
    """The shape of a folder's model, and its config.json. Raises ValueError where a GPT cannot have that shape."""
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text())
        return from_config(theirs), theirs
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a folder that save_pretrained or model.export wrote") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_state(folder: Path, config: GPTConfig, theirs: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a folder as our state dict. Raises ValueError where they are missing, damaged, pickled or of another shape."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    if missing := [file for file in files if not (folder / file).exists()]:
        raise ValueError(f"{folder} has no {missing[0]}; save_pretrained of transformers writes it, from pickled weights (*.bin) too, which are "
                         "not read here: they can run code")  # fmt: skip
    try:
        return from_tensors({name: tensor for file in files for name, tensor in load_file(folder / file).items()}, config, theirs)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None


def from_hf(name_or_dir: str | Path) -> GPT:
    """The GPT, in fp32 and without dropout, of a Hugging Face folder or hub name. Raises ValueError where there is none, where a GPT
    cannot compute what it does, and for weights that are missing, damaged or pickled."""
    folder = find_folder(name_or_dir, WEIGHTS)
    config, theirs = read_shape(folder)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(read_state(folder, config, theirs), assign=True)
    return model


def start_from(model: GPT, name_or_dir: str, tokenizer: Tokenizer) -> None:
    """Copies the weights of a Hugging Face model into ours. Raises ValueError, beside what `from_hf` does, where the shapes differ,
    naming the keys, or the vocabularies."""
    folder = find_folder(name_or_dir, WEIGHTS)
    config, theirs = read_shape(folder)
    own = read_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    if model.config.vocab_size != config.vocab_size or (own and own.token_bytes != tokenizer.token_bytes):
        raise ValueError(f"init.hf={name_or_dir} has a vocabulary of {config.vocab_size:,} entries, and the tokenizer {tokenizer.name} another, "
                         f"of {tokenizer.vocab_size:,}; choose the tokenizer that it was trained with"
                         + (", tokenizer=hf" if own else ""))  # fmt: skip
    ours, wanted = ({**asdict(shape), "num_kv_heads": shape.kv_heads, "mlp_width": shape.hidden_width} for shape in (model.config, config))
    unused = TRAINING | {"vocab_size"} | {*ROPE} - {*SCALING[config.rope_scaling]}
    unused |= {"rope_base", "rope_scaling"} if config.positions == "learned" else {"max_length"}
    if differing := [key for key in wanted if key not in unused and wanted[key] != ours[key]]:
        has, remedy = (" ".join(override(key, shape[key]) for key in differing) for shape in (ours, wanted))
        raise ValueError(f"init.hf={name_or_dir} has another shape than {has}; set {remedy}")
    load_weights(model, read_state(folder, config, theirs))
