"""Hugging Face in and out: GPT-2 and Llama checkpoints, folders of config.json, safetensors and
tokenizer.json.

A format says what it can express of a GPTConfig and what it calls each of our tensors; both
directions read the same table. Neither needs transformers, and neither unpickles anything.
model/export.py writes a whole folder, data/hf_tokenizer.py does the tokenizers.

A folder may come from anywhere, so nothing in it is believed: its settings are typed and bounded as
our own keys are, its tensors are read only once their names, shapes and types fit, and whatever
does not fit is named."""

import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf.schema import KEYS, check_value, type_name
from conf.schema import key as declare
from data import Tokenizer
from data.files import open_regular
from data.hf_tokenizer import FILES, LARGEST_VOCABULARY, find_folder, read_settings, read_tokenizer
from model.gpt import GPT, GPTConfig, rotary_frequencies
from model.sharding import load_weights

TABLES = ("embedding.weight", "positions.weight", "head.weight")
HEAD = "lm_head.weight"
# the types of safetensors that weights may have; integers and 8 bits are quantised
FLOATS = (
    "F64",
    "F32",
    "F16",
    "BF16",
)
WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", *FILES)
# keys of GPTConfig that a trained model's logits do not depend on
TRAINING = {
    "dropout",
    "z_loss",
    "init",
}
# their names of activations to ours; theirs of "gelu" is another
GELU = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu2": "relu2",
}

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
    # the numbers of a shape in config.json, to GPTConfig's; those of REQUIRED have no default
    keys: dict[str, str]
    # the values of GPTConfig's keys that it has; keys that are not listed are free
    expresses: dict[str, tuple]
    # the values of config.json's keys that a GPT has, where there is more than its sizes
    computable: dict[str, tuple]
    prefix: str  # of every tensor but the head's
    outer: dict[str, str]  # our modules to its modules
    layers: str
    # the same within a block; several share the rows of ours, in this order
    inner: dict[str, tuple[str, ...]]
    transposed: bool  # whether linear layers within blocks are kept input x output
    buffers: str  # names of what older versions kept beside the weights, a regular expression


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
    ),
}

# keys of GPTConfig that every config.json must have
REQUIRED = (
    "vocab_size",
    "max_length",
    "num_layers",
    "num_heads",
    "width",
)
# what is read of rope_parameters
ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    *ROPE.values(),
)


@dataclass
class Vocabulary:
    """The number that a folder has and our configuration does not: it comes from the tokenizer."""

    vocab_size: int = declare(1, "rows of the embedding", low=1, high=LARGEST_VOCABULARY)


[VOCABULARY] = fields(Vocabulary)


class Index(TypedDict):
    """What is read of model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]


# Shapes


def override(key: str, value: Any) -> str:
    """A key of GPTConfig with its value, as a person would type it."""
    return f"model.{key}={value if isinstance(value, str) else json.dumps(value)}"


def choose_format(config: GPTConfig, format: str = "auto") -> str:
    """The format, gpt2 or llama, that expresses a shape. Raises ValueError naming the keys that
    none does, or not the one asked for."""
    objections = {}
    for name, candidate in FORMATS.items():
        values = asdict(config) | {"num_kv_heads": config.kv_heads}
        expresses = candidate.expresses | (
            {"num_kv_heads": (config.num_heads,)} if name == "gpt2" else {}
        )
        objections[name] = [
            override(key, values[key])
            for key, allowed in expresses.items()
            if values[key] not in allowed
        ]
    closest = (
        min(objections, key=lambda name: len(objections[name])) if format == "auto" else format
    )
    if objections[closest]:
        other = next((name for name in FORMATS if not objections[name]), None)
        remedy = (
            f"use format={other}"
            if other
            else (
                "use format=plain, or train a shape that transformers has: model=gpt2_124m,"
                " llama_150m"
            )
        )
        raise ValueError(
            f"format={format}: {closest} cannot express {', '.join(objections[closest])}; {remedy}"
        )
    return closest


def to_config(config: GPTConfig, format: str) -> dict[str, Any]:
    """The config.json of a shape, but for its special tokens."""
    common = {
        "architectures": [FORMATS[format].architecture],
        "model_type": format,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }
    if format == "gpt2":
        return common | {
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
    scaling = {ROPE[key]: getattr(config, key) for key in SCALING[config.rope_scaling]}
    scaling["rope_type"] = config.rope_scaling if scaling else "default"
    return (
        common
        | ({"rope_scaling": scaling} if len(scaling) > 1 else {})
        | {
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
            "rope_parameters": scaling | {"rope_theta": config.rope_base},
            "rope_theta": config.rope_base,  # of transformers 5, and 4
        }
    )


def from_config(theirs: dict[str, Any]) -> GPTConfig:
    """Returns the shape that a config.json describes, without dropout. Raises ValueError, naming
    the key, for what a GPT cannot be."""
    kind = theirs.get("model_type")
    if kind not in [*FORMATS]:
        raise ValueError(
            f"model_type={show(kind)} is not among {', '.join(FORMATS)}; choose a model of theirs"
        )
    format = FORMATS[kind]
    # The rotary keys of transformers 4, which had rope_theta outside, and of 5, which goes by the
    # older name where both are there.
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={show(rope)} is of the wrong type; it must be an object")
    theirs = theirs | {key: rope[key] for key in ROPE_KEYS if key in rope}
    theirs["rope_type"] = theirs.get("rope_type") or theirs.get("type", "default")
    for key, allowed in format.computable.items():
        if theirs.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{key}={show(theirs[key])} is not what a GPT computes"
                f" ({', '.join(map(show, allowed))}); choose another model"
            )

    fixed: dict[str, Any]
    shape: dict[str, Any] = {
        ours: value
        for key, ours in format.keys.items()
        if (value := stated(theirs, key, ours)) is not None
    }
    if kind == "gpt2":
        fixed = {
            "norm_eps": 1e-5,
            "tied": True,
            "bias": True,
            "activation": GELU[theirs.get("activation_function", "gelu_new")],
        }
    else:
        scaling = theirs["rope_type"].replace("default", "none")
        fixed = {
            "norm_eps": 1e-6,
            "tied": False,
            "norm": "rmsnorm",
            "positions": "rope",
            "activation": "swiglu",
            "rope_scaling": scaling,
        }
        shape["bias"] = any(stated(theirs, key, "bias") for key in ("attention_bias", "mlp_bias"))
        for ours in SCALING[scaling]:
            if (value := stated(theirs, ROPE[ours], ours)) is None:
                raise ValueError(
                    f"{ROPE[ours]} is missing, which rope_type={scaling} needs; fetch the folder"
                    " again"
                )
            shape[ours] = value
    try:
        config = GPTConfig(**fixed | {"init": "gpt2"} | shape)
    except ValueError as error:
        # A GPTConfig names its own keys.
        names = {ours: key for key, ours in format.keys.items()} | ROPE
        raise ValueError(
            re.sub(r"model\.(\w+)", lambda found: names.get(found[1], found[0]), str(error))
        ) from None
    if theirs.get("head_dim") not in (None, config.head_width):
        raise ValueError(
            f"head_dim={show(theirs['head_dim'])} is not the width over the heads,"
            f" {config.head_width}; choose another model"
        )
    return config


def stated(theirs: dict[str, Any], key: str, ours: str) -> Any:
    """Returns the value of a key in config.json, or None where it says nothing, and the default
    holds. Raises ValueError, naming the key, where it lacks one that has no default, and for a
    value that the key `ours` of a model cannot have."""
    value = theirs.get(key)
    if value is None and ours in REQUIRED:
        raise ValueError(f"{key} is missing; fetch the folder again")
    if value is None:
        return None
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
    text = value if isinstance(value, str) and value and value.isprintable() else json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


# Weights


def their_names(name: str, format: Format) -> tuple[str, ...]:
    """What a format calls, without its prefix, the tensors that share the rows of ours."""
    *module, kind = name.split(".")
    if module[0] != "blocks":
        return (f"{format.outer[module[0]]}.{kind}",)
    return tuple(
        f"{format.layers}.{module[1]}.{theirs}.{kind}"
        for theirs in format.inner[".".join(module[2:])]
    )


def to_tensors(model: GPT, format: Format) -> dict[str, Tensor]:
    """A model's weights by their names, in fp32, without the vocabulary's padding. GPT-2 has biases
    everywhere: where we have none, zeros."""
    config, tensors = model.config, {}
    kv = config.kv_heads * config.head_width
    for name, parameter in model.named_parameters():
        rows, theirs = parameter.detach().float().cpu(), their_names(name, format)
        if name in ("embedding.weight", "head.weight"):
            rows = rows[: config.vocab_size]
        for their, part in zip(
            theirs,
            rows.split([config.width, kv, kv] if len(theirs) == 3 else [len(rows)]),
            strict=True,
        ):
            their = their if name == "head.weight" else format.prefix + their
            tensors[their] = (
                part.T if format.transposed and part.ndim == 2 and name not in TABLES else part
            )
            if format.transposed and not config.bias and name not in TABLES:
                tensors[their.removesuffix("weight") + "bias"] = torch.zeros(len(part))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


class StoredTensor(NamedTuple):
    """A tensor in a file that is open."""

    file: Any
    name: str

    @property
    def shape(self) -> list[int]:
        """Returns its sizes, which cost no reading."""
        return self.file.get_slice(self.name).get_shape()

    def read(self) -> Tensor:
        """Returns it in fp32. Raises ValueError for integers, which are quantised weights or none,
        and for numbers that are not finite."""
        kind = self.file.get_slice(self.name).get_dtype()
        if kind not in FLOATS:
            raise ValueError(
                f"{self.name} holds {kind}, and weights are {', '.join(FLOATS)}; choose a model"
                " that is not quantised"
            )
        tensor = self.file.get_tensor(self.name).float()
        if not tensor.isfinite().all():
            raise ValueError(
                f"{self.name} holds numbers that are not finite; fetch the folder again, or choose"
                " another model"
            )
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of a folder's weights: model.safetensors where it is there, as transformers
    does, else those that its index names. Raises ValueError where there are none, and for an index
    that names files elsewhere."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not os.path.exists(files[0]) and os.path.exists(index):
        names = sorted(set(read_settings(index, Index)["weight_map"].values()))
        for name in names:
            # A link may lead elsewhere, as those of the hub's cache do; a name may not.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{index}: weight_map names {show(name)}, which is no .safetensors file of the"
                    " folder; fetch it again"
                )
        files = [folder / name for name in names]
        if not files:
            raise ValueError(f"{index}: weight_map names no file; fetch it again")
        if missing := [name for name in names if not os.path.exists(folder / name)]:
            raise ValueError(
                f"{folder} has no {show(missing[0])}, which its index names; fetch it again"
            )
    elif not os.path.exists(files[0]):
        raise ValueError(
            f"{folder} has no {files[0].name}; save_pretrained of transformers writes it, from"
            " pickled weights (*.bin) too, which are not read here: they can run code"
        )
    return files


def open_weights(folder: Path, prefix: str) -> dict[str, StoredTensor]:
    """Returns the tensors of a folder, which are not read yet, by their names without a prefix.
    Raises ValueError for files that cannot be read, and for a name that is there twice."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        # A pipe would keep the library waiting, and a Git LFS pointer would be called a damaged
        # header.
        open_regular(path).close()
        try:
            file = safe_open(path, "pt")
            names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is cut off or damaged ({error}); fetch it again") from None
        for name in names:
            if (short := name.removeprefix(prefix)) in found:
                raise ValueError(
                    f"{path} holds {name}, which the folder has twice; fetch it again, without"
                    " files of another model in it"
                )
            found[short] = StoredTensor(file, name)
    return found


def settle_head(tensors: dict[str, StoredTensor], config: GPTConfig, embedding: str) -> GPTConfig:
    """Returns the shape of a model by its weights: where config.json says that the head is the
    embedding, and the file has another head, that head is kept, as transformers does. Takes a head
    that is the embedding out of `tensors`."""
    if not config.tied or HEAD not in tensors:
        return config
    head = tensors.pop(HEAD)
    if embedding not in tensors:
        tensors[embedding] = head
    elif head.shape != tensors[embedding].shape or not torch.equal(
        head.read(), tensors[embedding].read()
    ):
        tensors[HEAD] = head
        note(
            f"{HEAD} differs from {tensors[embedding].name}, though config.json says"
            " tie_word_embeddings=true: the head is kept, untied"
        )
        return replace(config, tied=False)
    return config


def drop_buffers(tensors: dict[str, StoredTensor], config: GPTConfig, format: Format) -> None:
    """Takes out what older versions of transformers kept beside the weights, masks and rotary
    frequencies, and notes where it is not what a GPT computes: like transformers of today, we
    compute it anew."""
    for name in [name for name in tensors if re.fullmatch(format.buffers, name)]:
        stored = tensors.pop(name)
        if name.endswith("masked_bias"):
            continue
        values = stored.file.get_tensor(stored.name).float()
        if name.endswith("inv_freq"):
            expected = rotary_frequencies(config, torch.device("cpu"))
            same = values.shape == expected.shape and torch.allclose(values, expected, rtol=1e-2)
        else:
            same = values.ndim >= 2 and torch.equal(values, torch.ones_like(values).tril())
        if not same:
            note(
                f"{stored.name} is not what config.json gives, which is used, as transformers does"
            )


def note(text: str) -> None:
    """Says on stderr what a user should know, and need not act on."""
    print(f"note: {text}", file=sys.stderr)


def read_shape(folder: Path) -> tuple[GPTConfig, dict[str, Any], dict[str, StoredTensor]]:
    """Returns the shape of a folder's model, its config.json, and its tensors, which are not read
    yet. Raises ValueError where a GPT cannot have that shape, and where its weights are missing,
    pickled or of another one."""
    path = folder / "config.json"
    try:
        theirs = read_settings(path, dict[str, Any])
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; name a folder that save_pretrained or model.export wrote"
        ) from None
    try:
        config = from_config(theirs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    format = FORMATS[theirs["model_type"]]
    tensors = open_weights(folder, format.prefix)
    try:
        drop_buffers(tensors, config, format)
        config = settle_head(tensors, config, *their_names("embedding.weight", format))
        check_sizes(tensors, config, format)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None
    return config, theirs, tensors


def check_sizes(tensors: dict[str, StoredTensor], config: GPTConfig, format: Format) -> None:
    """Raises ValueError, naming the keys, where a shape has other sizes than the tensors, before a
    model of that shape is built: of the shape of a damaged config.json it might take for ever."""
    keys = {ours: f"{key}={getattr(config, ours)}" for key, ours in format.keys.items()}
    sizes = {
        "embedding.weight": {keys["vocab_size"]: config.vocab_size, keys["width"]: config.width},
        "blocks.0.mlp.up.weight": {
            keys["mlp_width"]: config.hidden_width,
            keys["width"]: config.width,
        },
    }
    if config.positions == "learned":
        sizes["positions.weight"] = {
            keys["max_length"]: config.max_length,
            keys["width"]: config.width,
        }
    for name, wanted in sizes.items():
        [their] = their_names(name, format)
        stored = require(tensors, their)
        if sorted(stored.shape) != sorted(wanted.values()):
            raise ValueError(mismatch(stored.name, stored.shape, wanted))
    [last] = their_names(f"blocks.{config.num_layers - 1}.attention_norm.weight", format)
    require(tensors, last, f" though config.json says {keys['num_layers']}")


def require(tensors: dict[str, StoredTensor], name: str, why: str = "") -> StoredTensor:
    """Returns a tensor of a folder. Raises ValueError where it is missing."""
    if name not in tensors:
        raise ValueError(f"{name} is missing{why}; the folder is incomplete, fetch it again")
    return tensors[name]


def mismatch(name: str, found: Iterable[Any], wanted: Iterable[Any]) -> str:
    """Returns what is said of a tensor of another shape than config.json gives."""
    found, wanted = (" x ".join(map(str, shape)) for shape in (found, wanted))
    return (
        f"{name} does not have the shape that config.json says ({found}, not {wanted}); fetch the"
        " folder again"
    )


def read_state(
    folder: Path, config: GPTConfig, theirs: dict[str, Any], tensors: dict[str, StoredTensor]
) -> dict[str, Tensor]:
    """Returns a folder's weights as our state dict, in fp32. Raises ValueError for a tensor that is
    missing, of another shape or type, not finite, or that a GPT has no place for."""
    format, left = FORMATS[theirs["model_type"]], set(tensors)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    state = {}
    try:
        for name, shape in shapes.items():
            declared = theirs.get(
                "attention_bias" if ".attention." in name else "mlp_bias", format.transposed
            )
            # Llama has biases in attention, in the MLP, in both or in neither.
            if name.endswith(".bias") and not declared:
                state[name] = torch.zeros(shape)
                continue
            names = their_names(name, format)
            if not left.issuperset(names):
                raise ValueError(
                    f"{' or '.join(names)} is missing; the folder is incomplete, fetch it again"
                )
            left.difference_update(names)
            state[name] = read_tensor(
                name, shape, [tensors[their] for their in names], config, format
            )
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None
    if left:
        raise ValueError(f"{folder}: {min(left)} has no place in a GPT; choose another model")
    return state


def read_tensor(
    name: str, shape: torch.Size, parts: list[StoredTensor], config: GPTConfig, format: Format
) -> Tensor:
    """Returns one tensor of ours, out of those of theirs that share its rows. Raises ValueError
    where they have another shape."""
    padded = name in ("embedding.weight", "head.weight")
    wanted = [config.vocab_size, config.width] if padded else list(shape)
    if format.transposed and name not in TABLES:
        wanted.reverse()
    sizes = [part.shape for part in parts]
    kv = config.kv_heads * config.head_width
    expected = (
        [[rows, *wanted[1:]] for rows in (config.width, kv, kv)] if len(parts) == 3 else [wanted]
    )
    for part, found, size in zip(parts, sizes, expected, strict=True):
        if found != size:
            raise ValueError(mismatch(part.name, found, size))
    tensor = torch.cat([part.read() for part in parts])
    if format.transposed and tensor.ndim == 2 and name not in TABLES:
        tensor = tensor.T.contiguous()
    if padded:
        tensor = torch.cat([tensor, torch.zeros(shape[0] - len(tensor), config.width)])
    return tensor


# Folders


def check_rows(given: str, config: GPTConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a folder's tokenizer has ids that its model has no row for, and that
    a text may use."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{given} has a model of {config.vocab_size:,} rows, and a tokenizer of"
            f" {tokenizer.vocab_size:,} ids; in transformers,"
            " model.resize_token_embeddings(len(tokenizer)) and save_pretrained give it the others"
        )


def from_hf(name_or_dir: str | Path) -> GPT:
    """Returns the GPT, in fp32, without dropout and in evaluation mode, of a Hugging Face folder or
    hub name. Raises ValueError where there is none, where a GPT cannot compute what it does, and
    for weights that are missing, damaged, quantised or pickled."""
    folder = find_folder(name_or_dir, WEIGHTS)
    config, theirs, tensors = read_shape(folder)
    state = read_state(folder, config, theirs, tensors)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def start_from(model: GPT, name_or_dir: str, tokenizer: Tokenizer) -> None:
    """Copies the weights of a Hugging Face model into ours. Raises ValueError, beside what
    `from_hf` does, where the shapes differ, naming the keys, or the vocabularies."""
    folder = find_folder(name_or_dir, WEIGHTS)
    config, theirs, tensors = read_shape(folder)
    own = read_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    if own and own.token_bytes == tokenizer.token_bytes:
        check_rows(f"init.hf={name_or_dir}", config, own)
    if model.config.vocab_size != config.vocab_size or (
        own and own.token_bytes != tokenizer.token_bytes
    ):
        raise ValueError(
            f"init.hf={name_or_dir} has a vocabulary of {config.vocab_size:,} entries, and the"
            f" tokenizer {tokenizer.name} another, of {tokenizer.vocab_size:,}; choose the"
            " tokenizer that it was trained with" + (", tokenizer=hf" if own else "")
        )
    ours, wanted = (
        {**asdict(shape), "num_kv_heads": shape.kv_heads, "mlp_width": shape.hidden_width}
        for shape in (model.config, config)
    )
    unused = TRAINING | {"vocab_size"} | {*ROPE} - {*SCALING[config.rope_scaling]}
    unused |= {"rope_base", "rope_scaling"} if config.positions == "learned" else {"max_length"}
    if differing := [key for key in wanted if key not in unused and wanted[key] != ours[key]]:
        has, remedy = (
            " ".join(override(key, shape[key]) for key in differing) for shape in (ours, wanted)
        )
        raise ValueError(f"init.hf={name_or_dir} has another shape than {has}; set {remedy}")
    load_weights(model, read_state(folder, config, theirs, tensors))
