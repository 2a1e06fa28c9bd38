"""The loss of a model on a whole corpus: python -m launch.evaluate run=DIR [step=S] [data=text data.path=FILES ...]

DIR is a run, or a Hugging Face folder: GPT-2 or Llama weights in safetensors, with a tokenizer.json.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from omegaconf import MISSING

from conf.schema import DataConfig, key
from data import Tokenizer, Validation, prepare
from data.hf_tokenizer import read_tokenizer
from model import GPT, checkpoint_path, load
from model.hf import from_hf
from model.logits import IGNORED
from model.sharding import Layout, all_sum, compute_device, reshard

T = TypeVar("T")


@torch.no_grad()
def evaluate(
    model: GPT,
    sets: dict[str, Validation],
    sequences: int,
    context: Callable[[], AbstractContextManager],
    stop: Callable[[], bool] = lambda: False,
    layout: Layout | None = None,
) -> dict[str, float] | None:
    """Loss in nats per token, perplexity and bits per byte of each validation set, by `val/[<set>/]loss` and so on; the first set's go
    by `val/loss`. Batches of `sequences` run under `context()`, each on one process of a layout. None where `stop()` came true meanwhile."""
    layout = layout or Layout()
    device, was_training = compute_device(model.embedding.weight), model.training
    model.eval()
    row: dict[str, float] = {}
    for name, validation in sets.items():
        total = torch.zeros((), dtype=torch.float64, device=device)
        for turn in batched(validation.batches(sequences), layout.world):
            if layout.agreed(stop()):
                model.train(was_training)
                reshard(model)
                return None
            tokens_BxT, targets_BxT = turn[layout.rank] if layout.rank < len(turn) else (turn[0][0], torch.full_like(turn[0][1], IGNORED))
            with context():
                total += model.loss(tokens_BxT.to(device), targets_BxT.to(device))[0]
        all_sum(model, total)
        loss = total.item() / validation.num_tokens
        prefix = "val/" if name == next(iter(sets)) else f"val/{name}/"
        row[prefix + "loss"] = loss
        row[prefix + "perplexity"] = math.exp(min(loss, 700.0))
        row[prefix + "bits_per_byte"] = total.item() / math.log(2) / validation.num_bytes
    model.train(was_training)
    reshard(model)
    return row


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` consecutive items."""
    iterator = iter(items)
    while turn := list(islice(iterator, size)):
        yield turn


class Trained(NamedTuple):
    """A trained model and what it was trained with; a Hugging Face folder does not tell its corpus."""

    path: Path
    model: GPT
    tokenizer: Tokenizer
    length: int
    data: DataConfig | None


def open_trained(folder: Path, step: int | None) -> Trained:
    """What a run's checkpoint or a Hugging Face folder holds. Raises ValueError for a folder that is neither, or cannot be used."""
    if not (folder / "config.json").exists():
        from launch.folder import load_config

        path, own = checkpoint_path(folder, step), load_config(folder)
        return Trained(path, load(folder, step), Tokenizer.load(path), own.batch.length, own.data)
    if step is not None:
        raise ValueError(f"step={step} is of runs, and run={folder} is a Hugging Face folder, which has one set of weights; leave step out")
    model, tokenizer = from_hf(folder), read_tokenizer(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"run={folder} has a tokenizer of {tokenizer.vocab_size:,} ids and a model of {model.config.vocab_size:,}; fetch it again")
    return Trained(folder, model, tokenizer, min(1024, model.config.max_length), None)


@dataclass
class Options:
    """What `python -m launch.evaluate` takes beside overrides of data."""

    run: str = key(MISSING, "run folder, or Hugging Face folder")
    step: int | None = key(None, "step of the checkpoint; default the newest")
    length: int | None = key(None, "tokens per sequence; default the run's own, of a Hugging Face folder at most 1024", low=1)
    sequences: int = key(16, "sequences per forward", low=1)
    device: str = key("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    precision: str = key("auto", "as in training", choices=("auto", "bf16", "fp32"))


def main(arguments: list[str]) -> None:
    """Prints the full loss of a run's model on each validation set of a corpus; default the run's own corpus."""
    from launch.config import compose, parse, user_errors
    from launch.process import autocast, choose_device, choose_precision

    with user_errors():
        options, overrides = parse(Options, arguments, others=("data",))
        trained = open_trained(Path(options.run), options.step)
        data = compose(overrides).data if overrides else trained.data
        if data is None:
            raise ValueError(f"run={options.run} is a Hugging Face folder, which names no corpus; add data=stdlib or data=text data.path=FILES")
        device = choose_device(options.device)
        dtype = choose_precision(options.precision, device)
        corpus = prepare(data, trained.tokenizer)
        length = options.length or trained.length
        sets = {name: Validation(tokens, length, corpus.tokenizer) for name, tokens in corpus.validation.items()}
        row = evaluate(trained.model.to(device), sets, options.sequences, lambda: autocast(device, dtype))
        assert row is not None
        print(f"{trained.path}, {length} tokens per sequence, {str(dtype).removeprefix('torch.')}")
        for name, validation in sets.items():
            prefix = "val/" if name == next(iter(sets)) else f"val/{name}/"
            loss, perplexity, bits = (row[prefix + part] for part in ("loss", "perplexity", "bits_per_byte"))
            print(f"{name}: loss {loss:.4f}, perplexity {perplexity:.2f}, {bits:.4f} bits per byte over {validation.num_tokens:,} tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
