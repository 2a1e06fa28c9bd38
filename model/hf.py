"""GPTs in and out of Hugging Face folders: config.json, safetensors and tokenizer.json of GPT-2 and
Llama checkpoints.

    hf_formats.py    what a format can express, and what it calls our tensors
    hf_config.py     config.json
    hf_weights.py    safetensors

model/export.py writes a whole folder, data/hf_tokenizer.py does the tokenizers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from data import Tokenizer
from data.hf_folder import FILES, find_folder, read_settings, read_tokenizer
from model.config import GPTConfig
from model.gpt import GPT
from model.hf_config import from_config
from model.hf_formats import FORMATS, ROPE, SCALING, TRAINING, Format, override
from model.hf_weights import (
    Stored,
    check_sizes,
    drop_buffers,
    open_weights,
    read_state,
    settle_head,
)
from model.sharding import load_weights

ADAPTER = "adapter_config.json"
WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", *FILES, ADAPTER)


class Folder(NamedTuple):
    """A Hugging Face folder whose weights are not read yet."""

    path: Path
    config: GPTConfig
    theirs: dict[str, Any]  # its config.json
    tensors: Stored

    @property
    def format(self) -> Format:
        """Returns how it is laid out."""
        return FORMATS[self.theirs["model_type"]]

    def read_state(self) -> dict[str, Tensor]:
        """Returns its weights as our state dict; see `model.hf_weights.read_state`."""
        return read_state(self.path, self.config, self.theirs, self.format, self.tensors)


def open_folder(name_or_dir: str | Path) -> Folder:
    """Opens a Hugging Face folder or hub name. Raises ValueError where a GPT cannot have its shape,
    and where its weights are missing, pickled or of another one."""
    folder = find_folder(name_or_dir, WEIGHTS)
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder / ADAPTER}: the folder holds an adapter, which changes the logits of a model"
            " and is not applied here; in peft, merge_and_unload() and save_pretrained write a"
            " whole model"
        )
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
    # The headers of the files tell names and shapes: no model is built before these fit.
    try:
        drop_buffers(tensors, config, format)
        config = settle_head(tensors, config, *format.names_of("embedding.weight"))
        check_sizes(tensors, config, format)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None
    return Folder(folder, config, theirs, tensors)


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
    """Returns the GPT of a Hugging Face folder or hub name: in fp32, without dropout and in
    evaluation mode.

    Args:
        name_or_dir: a folder, or a name on the hub, whose files are fetched

    Raises:
        ValueError: there is none, a GPT cannot compute what it does, or its weights are missing,
            damaged, quantised or pickled
    """
    folder = open_folder(name_or_dir)
    state = folder.read_state()
    with torch.device("meta"):
        model = GPT(folder.config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def start_from(model: GPT, name_or_dir: str, tokenizer: Tokenizer) -> None:
    """Copies the weights of a Hugging Face model into ours.

    Args:
        model: what is changed; sharded or not
        name_or_dir: a folder or a hub name
        tokenizer: of the run

    Raises:
        ValueError: as `from_hf`, and where the shapes differ, naming the keys, or the vocabularies
    """
    folder = open_folder(name_or_dir)
    check_vocabulary(model.config, folder, name_or_dir, tokenizer)
    check_shape(model.config, folder.config, name_or_dir)
    load_weights(model, folder.read_state())


def check_vocabulary(
    ours: GPTConfig, folder: Folder, name_or_dir: str, tokenizer: Tokenizer
) -> None:
    """Raises ValueError where a folder has another vocabulary than a run."""
    # A folder of weights alone has sizes to compare, and no tokens.
    has_tokenizer = (folder.path / "tokenizer.json").exists()
    same_tokens = True
    if has_tokenizer:
        own = read_tokenizer(folder.path)
        same_tokens = own.token_bytes == tokenizer.token_bytes
        if same_tokens:
            check_rows(f"init.hf={name_or_dir}", folder.config, own)
    if not same_tokens or ours.vocab_size != folder.config.vocab_size:
        raise ValueError(
            f"init.hf={name_or_dir} has a vocabulary of {folder.config.vocab_size:,} entries, and"
            f" the tokenizer {tokenizer.name} another, of {tokenizer.vocab_size:,}; choose the"
            " tokenizer that it was trained with" + (", tokenizer=hf" if has_tokenizer else "")
        )


def check_shape(ours: GPTConfig, wanted: GPTConfig, name_or_dir: str) -> None:
    """Raises ValueError, with the keys to set, where the logits of two shapes differ."""
    # Keys that the logits of the wanted shape do not depend on may differ: those of training, of
    # positions of the other kind, and of a scaling that it does not have.
    unused = TRAINING | {"vocab_size"} | {*ROPE} - {*SCALING[wanted.rope_scaling]}
    if wanted.positions == "learned":
        unused |= {"rope_base", "rope_scaling"}
    else:
        unused |= {"max_length"}
    here, there = full_shape(ours), full_shape(wanted)
    differing = [key for key in there if key not in unused and there[key] != here[key]]
    if differing:
        has = " ".join(override(key, here[key]) for key in differing)
        remedy = " ".join(override(key, there[key]) for key in differing)
        raise ValueError(f"init.hf={name_or_dir} has another shape than {has}; set {remedy}")


def full_shape(config: GPTConfig) -> dict[str, Any]:
    """Returns a shape with its defaults filled in."""
    return {**asdict(config), "num_kv_heads": config.kv_heads, "mlp_width": config.hidden_width}
