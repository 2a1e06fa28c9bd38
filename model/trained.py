"""A trained model with its tokenizer, wherever it lies: in a run, an export, or any Hugging Face
folder."""

import os
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from conf.key import check_value
from conf.keys import KEYS
from data import Tokenizer
from data.hf_folder import read_settings, read_tokenizer
from model.checkpoint import checkpoint_path, load
from model.config import GPTConfig
from model.export import LENGTH
from model.gpt import GPT
from model.hf import ADAPTER, check_rows, from_hf
from model.hf_weights import mismatch, open_weights, require


class Trained(NamedTuple):
    """A trained model with its tokenizer."""

    path: Path
    model: GPT
    tokenizer: Tokenizer
    length: int | None  # tokens of the sequences it was trained on, where the folder tells


def is_run(folder: Path) -> bool:
    """Returns whether a folder is read as a run: an export has a configuration of its own."""
    marks = ("config.json", "gpt.json", ADAPTER)
    return not any(os.path.lexists(folder / name) for name in marks)


def open_trained(folder: Path, step: int | None) -> Trained:
    """Returns what a run's checkpoint, an export or a Hugging Face folder holds; the length of a
    run is in its configuration. Raises ValueError for a folder that is none of them, or cannot be
    used."""
    if is_run(folder):
        path = checkpoint_path(folder, step)
        return Trained(path, load(folder, step), Tokenizer.load(path), None)
    if step is not None:
        raise ValueError(
            f"step={step} is of runs, and run={folder} is a Hugging Face folder, which has one set"
            " of weights; leave step out"
        )
    is_plain = os.path.lexists(folder / "gpt.json")
    is_theirs = os.path.lexists(folder / "config.json")
    # gpt.json is of our own format; config.json is of transformers'.
    model = from_plain(folder) if is_plain and not is_theirs else from_hf(folder)
    tokenizer = read_tokenizer(folder)
    check_rows(f"run={folder}", model.config, tokenizer)
    return Trained(folder, model, tokenizer, training_length(folder, model.config))


def training_length(folder: Path, config: GPTConfig) -> int | None:
    """Returns the length of the sequences that an export was trained on, if its weights tell."""
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            length = (file.metadata() or {}).get(LENGTH, "")
    except (OSError, SafetensorError):
        return None  # of weights in several files
    if length.isdecimal() and 0 < int(length) <= config.max_length:
        return int(length)
    return None


def from_plain(folder: Path) -> GPT:
    """Returns the GPT of an export with format=plain, in evaluation mode. Raises ValueError where
    it is damaged."""
    path = folder / "gpt.json"
    # The file may be damaged or made by hand: its values are checked as those of a run are.
    config = read_settings(path, GPTConfig)
    for entry in fields(GPTConfig):
        if f"model.{entry.name}" in KEYS and (value := getattr(config, entry.name)) is not None:
            check_value(f"{path}: {entry.name}", value, KEYS[f"model.{entry.name}"].metadata)
    try:
        state = read_plain(folder, config)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_plain(folder: Path, config: GPTConfig) -> dict[str, torch.Tensor]:
    """Returns the state dict of an export with format=plain. Raises ValueError for a tensor that is
    missing, of another shape or not wanted."""
    tensors = open_weights(folder, "")
    # Before a model of that shape is built: of a damaged gpt.json it might take for ever.
    require(
        tensors,
        f"blocks.{config.num_layers - 1}.attention_norm.weight",
        f" though gpt.json says num_layers={config.num_layers}",
    )
    table = require(tensors, "embedding.weight").shape
    if table[-1] != config.width or not 0 < config.vocab_size <= table[0]:
        raise ValueError(mismatch("embedding.weight", table, [config.vocab_size, config.width]))
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    for name, shape in shapes.items():
        if require(tensors, name).shape != shape:
            raise ValueError(mismatch(name, tensors[name].shape, shape))
    if left := tensors.keys() - shapes.keys():
        raise ValueError(f"{min(left)} has no place in a GPT of gpt.json; export it again")
    return {name: tensors[name].read() for name in shapes}
