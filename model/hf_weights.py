"""Weights in Hugging Face folders: safetensors files, read as our state dict.

A folder may come from anywhere, so its tensors are read only once their names, shapes and types
fit, nothing is unpickled, and whatever does not fit is named."""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import open_regular
from data.hf_folder import read_settings
from model.config import GPTConfig
from model.gpt import GPT
from model.hf_config import show
from model.hf_formats import HEAD, Format
from model.rotary import rotary_frequencies

# The types of safetensors that weights may have; integers and 8 bits are quantised.
FLOATS = ("F64", "F32", "F16", "BF16")
# Endings of files of weights by which a message tells a user what his folder has instead.
OTHER_WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack")


class Index(TypedDict):
    """The part of model.safetensors.index.json that is read: the file of each tensor."""

    weight_map: dict[str, str]


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


Stored = dict[str, StoredTensor]  # the tensors of a folder, by their names without the prefix


# Files


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of a folder's weights: model.safetensors where it is there, as transformers
    does, else those that its index names. Raises ValueError where there are none, and for an index
    that names files elsewhere."""
    file = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if os.path.exists(file):
        return [file]
    if os.path.exists(index):
        return indexed_files(folder, index)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_WEIGHTS)
    others = [name for name in others if name != file.name]  # a link to nothing
    if any(re.search(r"-of-\d+\.safetensors$", name) for name in others):
        raise ValueError(
            f"{folder} has files of weights such as {show(others[0])}, and no {index.name}, which"
            " names them all; fetch it too"
        )
    if others:
        raise ValueError(
            f"{folder} has {show(others[0])}, and no {file.name}, which alone is read here;"
            " from_pretrained and save_pretrained of transformers write it"
        )
    raise ValueError(
        f"{folder} has no {file.name}; save_pretrained of transformers writes it, from pickled"
        " weights (*.bin) too, which are not read here: they can run code"
    )


def indexed_files(folder: Path, index: Path) -> list[Path]:
    """Returns the files that the index of a folder names."""
    names = sorted(set(read_settings(index, Index)["weight_map"].values()))
    for name in names:
        # A link may lead elsewhere, as those of the hub's cache do; a name may not.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map names {show(name)}, which is no .safetensors file of the"
                " folder; fetch it again"
            )
    if not names:
        raise ValueError(f"{index}: weight_map names no file; fetch it again")
    for name in names:
        if not os.path.exists(folder / name):
            raise ValueError(f"{folder} has no {show(name)}, which its index names; fetch it again")
    return [folder / name for name in names]


def open_weights(folder: Path, prefix: str) -> Stored:
    """Returns the tensors of a folder, which are not read yet, by their names without a prefix.
    Raises ValueError for files that cannot be read, and for a name that is there twice."""
    found: Stored = {}
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


# Tensors beside a model's own, or in their place


def settle_head(tensors: Stored, config: GPTConfig, embedding: str) -> GPTConfig:
    """Returns the shape of a model by its weights: where config.json says that the head is the
    embedding, and the file has another head, that head is kept, as transformers does. Takes a head
    that is the embedding out of `tensors`."""
    if not config.tied or HEAD not in tensors:
        return config
    head = tensors.pop(HEAD)
    if embedding not in tensors:
        tensors[embedding] = head
        return config
    other = tensors[embedding]
    if head.shape == other.shape and torch.equal(head.read(), other.read()):
        return config
    tensors[HEAD] = head
    note(
        f"{HEAD} differs from {other.name}, though config.json says tie_word_embeddings=true: the"
        " head is kept, untied"
    )
    return replace(config, tied=False)


def drop_buffers(tensors: Stored, config: GPTConfig, format: Format) -> None:
    """Takes out what older versions of transformers kept beside the weights, masks and rotary
    frequencies, and notes where it is not what a GPT computes: like transformers of today, we
    compute it anew."""
    for name in [name for name in tensors if re.fullmatch(format.buffers, name)]:
        stored = tensors.pop(name)
        if not is_computed(stored, name, config):
            note(
                f"{stored.name} is not what config.json gives, which is used, as transformers does"
            )


def is_computed(stored: StoredTensor, name: str, config: GPTConfig) -> bool:
    """Returns whether a buffer holds what a GPT of this shape computes."""
    if name.endswith("masked_bias"):
        return True  # the number that stood for minus infinity
    # Frequencies are compared roughly: a model in bf16 has saved them in bf16, too.
    values = stored.file.get_tensor(stored.name).float()
    if name.endswith("inv_freq"):
        expected = rotary_frequencies(config, torch.device("cpu"))
        return values.shape == expected.shape and torch.allclose(values, expected, rtol=1e-2)
    return values.ndim >= 2 and torch.equal(values, torch.ones_like(values).tril())


def note(text: str) -> None:
    """Says on stderr what a user should know, and need not act on."""
    print(f"note: {text}", file=sys.stderr)


# Checks


def check_sizes(tensors: Stored, config: GPTConfig, format: Format) -> None:
    """Raises ValueError, naming the keys, where a shape has other sizes than the tensors, before a
    model of that shape is built: of the shape of a damaged config.json it might take for ever."""
    keys = {ours: f"{key}={getattr(config, ours)}" for key, ours in format.keys.items()}
    width = {keys["width"]: config.width}
    sizes = {
        "embedding.weight": {keys["vocab_size"]: config.vocab_size} | width,
        "blocks.0.mlp.up.weight": {keys["mlp_width"]: config.hidden_width} | width,
    }
    if config.positions == "learned":
        sizes["positions.weight"] = {keys["max_length"]: config.max_length} | width
    # Sorted, since GPT-2 keeps its matrices transposed; `read_tensor` looks at the order.
    for name, wanted in sizes.items():
        [their] = format.names_of(name)
        stored = require(tensors, their)
        if sorted(stored.shape) != sorted(wanted.values()):
            raise ValueError(mismatch(stored.name, stored.shape, wanted))
    [last] = format.names_of(f"blocks.{config.num_layers - 1}.attention_norm.weight")
    require(tensors, last, f" though config.json says {keys['num_layers']}")


def require(tensors: Stored, name: str, why: str = "") -> StoredTensor:
    """Returns a tensor of a folder. Raises ValueError where it is missing."""
    if name not in tensors:
        for other in tensors:
            if other.endswith(f".{name}"):
                raise ValueError(
                    f"{name} is missing, and {tensors[other].name} is there: those are the weights"
                    " of a wrapper (torch.compile, DDP, peft); save the model within it"
                )
        raise ValueError(f"{name} is missing{why}; the folder is incomplete, fetch it again")
    return tensors[name]


def mismatch(name: str, found: Iterable[Any], wanted: Iterable[Any]) -> str:
    """Returns the message on a tensor of another shape than config.json gives."""
    found, wanted = (" x ".join(map(str, shape)) for shape in (found, wanted))
    return (
        f"{name} does not have the shape that config.json says ({found}, not {wanted}); fetch the"
        " folder again"
    )


# Our tensors of theirs, and theirs of ours


def read_state(
    folder: Path, config: GPTConfig, theirs: dict[str, Any], format: Format, tensors: Stored
) -> dict[str, Tensor]:
    """Returns a folder's weights as our state dict, in fp32.

    Args:
        folder: named in messages
        config: the shape of the model
        theirs: the folder's config.json
        format: of the folder
        tensors: of the folder

    Raises:
        ValueError: a tensor is missing, of another shape or type, not finite, or one that a GPT has
            no place for
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    state = {}
    # Whatever is left in the end is part of a model that a GPT is not.
    left = set(tensors)
    try:
        for name, shape in shapes.items():
            if name.endswith(".bias") and not has_bias(name, theirs, format):
                state[name] = torch.zeros(shape)
                continue
            names = format.names_of(name)
            if not left.issuperset(names):
                raise ValueError(missing(names))
            left.difference_update(names)
            parts = [tensors[their] for their in names]
            state[name] = read_tensor(name, shape, parts, config, format)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None
    if left:
        raise ValueError(
            f"{folder}: {min(left)} has no place in a GPT; choose another model, or leave it out"
            " (from_pretrained and save_pretrained of transformers do)"
        )
    return state


def missing(names: tuple[str, ...]) -> str:
    """Returns the message on tensors that a folder lacks, in part or all."""
    if names == (HEAD,):
        return (
            f"{HEAD} is missing, and config.json does not say tie_word_embeddings=true; fetch the"
            " folder again, or say it there where the head is the embedding"
        )
    return f"{' or '.join(names)} is missing; the folder is incomplete, fetch it again"


def has_bias(name: str, theirs: dict[str, Any], format: Format) -> bool:
    """Returns whether a folder has a bias of ours. Llama has biases in attention, in the MLP, in
    both or in neither."""
    key = "attention_bias" if ".attention." in name else "mlp_bias"
    return theirs.get(key, format.transposed)


def read_tensor(
    name: str, shape: torch.Size, parts: list[StoredTensor], config: GPTConfig, format: Format
) -> Tensor:
    """Returns one tensor of ours, out of those of theirs that share its rows. Raises ValueError
    where they have another shape."""
    # Their tables have as many rows as the vocabulary; ours are padded with zeros.
    is_padded = name in ("embedding.weight", "head.weight")
    wanted = [config.vocab_size, config.width] if is_padded else list(shape)
    if format.is_transposed(name):
        wanted.reverse()
    rows = rows_of_parts(len(parts), wanted[0], config)
    sizes = [part.shape for part in parts]
    for part, found, num_rows in zip(parts, sizes, rows, strict=True):
        if found != [num_rows, *wanted[1:]]:
            raise ValueError(mismatch(part.name, found, [num_rows, *wanted[1:]]))
    tensor = torch.cat([part.read() for part in parts])
    if format.is_transposed(name) and tensor.ndim == 2:
        tensor = tensor.T.contiguous()
    if is_padded:
        tensor = torch.cat([tensor, torch.zeros(shape[0] - len(tensor), config.width)])
    return tensor


def rows_of_parts(num_parts: int, num_rows: int, config: GPTConfig) -> list[int]:
    """Returns how the rows of a tensor of ours are shared: by q, k and v, or not at all."""
    kv = config.kv_heads * config.head_width
    if num_parts == 3:
        return [config.width, kv, kv]
    return [num_rows]


def to_tensors(model: GPT, format: Format) -> dict[str, Tensor]:
    """Returns a model's weights by their names, in fp32, without the vocabulary's padding. GPT-2
    has biases everywhere: where we have none, zeros."""
    config = model.config
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().float().cpu()
        if name in ("embedding.weight", "head.weight"):
            tensor = tensor[: config.vocab_size]
        names = format.names_of(name)
        parts = tensor.split(rows_of_parts(len(names), len(tensor), config))
        for their, part in zip(names, parts, strict=True):
            if name != "head.weight":
                their = format.prefix + their
            is_turned = format.is_transposed(name) and part.ndim == 2
            tensors[their] = part.T if is_turned else part
            if format.is_transposed(name) and not config.bias:
                tensors[their.removesuffix("weight") + "bias"] = torch.zeros(len(part))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
