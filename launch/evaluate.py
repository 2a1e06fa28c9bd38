"""The loss of a model on a whole corpus: python -m launch.evaluate run=DIR [step=S] [data=text
data.path=FILES ...]

DIR is a run, an export, or a Hugging Face folder: GPT-2 or Llama weights in safetensors, with a
tokenizer.json."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import MISSING
from torch import Tensor

from conf.key import STEPS, key
from conf.schema import Config
from conf.text import DataConfig
from data import Validation, prepare
from model import GPT
from model.gpt import evaluating
from model.logits import IGNORED
from model.processes import Layout
from model.sharding import all_sum, compute_device, reshard
from model.trained import is_run, open_trained

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
    """Loss in nats per token, perplexity and bits per byte of each validation set, by
    `val/[<set>/]loss` and so on; the first set's go by `val/loss`. Batches of `sequences` run under
    `context()`, each on one process of a layout. None where `stop()` came true meanwhile."""
    layout = layout or Layout()
    row: dict[str, float] = {}
    total: float | None = None
    with evaluating(model):
        for name, validation in sets.items():
            total = total_loss(model, validation.batches(sequences), context, stop, layout)
            if total is None:
                break
            prefix = prefix_of(name, sets)
            loss = total / validation.num_tokens
            row[prefix + "loss"] = loss
            # exp(700) is about the largest number that a float holds.
            row[prefix + "perplexity"] = math.exp(min(loss, 700.0))
            # Per byte of the text, so that models with other tokenizers compare.
            row[prefix + "bits_per_byte"] = total / math.log(2) / validation.num_bytes
    # FSDP gathers for a forward, and the next step expects shards.
    reshard(model)
    if total is None:
        return None
    return row


def prefix_of(name: str, sets: Iterable[str]) -> str:
    """Returns how the figures of a validation set begin: the first set's are those of the run."""
    if name == next(iter(sets)):
        return "val/"
    return f"val/{name}/"


def total_loss(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    context: Callable[[], AbstractContextManager],
    stop: Callable[[], bool],
    layout: Layout,
) -> float | None:
    """Returns the loss in nats summed over the counted targets of all batches and processes; None
    where `stop()` came true meanwhile."""
    # In fp64, since millions of tokens add up; on the device, so that no batch waits for the host.
    device = compute_device(model.embedding.weight)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for turn in batched(batches, layout.world):
        if layout.any_rank(stop()):
            return None
        # Of the last turn some processes have no batch; with FSDP they must run a forward all the
        # same, and its targets count nothing.
        tokens_BxT, targets_BxT = turn[0]
        if layout.rank < len(turn):
            tokens_BxT, targets_BxT = turn[layout.rank]
        else:
            targets_BxT = torch.full_like(targets_BxT, IGNORED)
        with context():
            total += model.loss(tokens_BxT.to(device), targets_BxT.to(device))[0]
    all_sum(model, total)
    return total.item()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` consecutive items."""
    iterator = iter(items)
    while turn := list(islice(iterator, size)):
        yield turn


@dataclass
class Options:
    """Prints the full loss of a model on each validation set of a corpus, by default the run's own.

    python -m launch.evaluate run=runs/NAME
    python -m launch.evaluate run=runs/NAME data=text data.path=FILES
    """

    run: str = key(MISSING, "run folder, export or Hugging Face folder", path=True)
    step: int | None = key(None, "step of the checkpoint; default the newest", low=0, high=STEPS)
    length: int | None = key(
        None,
        "tokens per sequence; default those of the training, else at most 1024",
        low=1,
        high=2**24,
    )
    sequences: int = key(16, "sequences per forward", low=1, high=2**20)
    device: str = key("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    precision: str = key("auto", "as in training", choices=("auto", "bf16", "fp32"))


def main(arguments: list[str]) -> None:
    """Prints the full loss of a run's model on each validation set of a corpus; default the run's
    own corpus."""
    from conf.cli import parse, user_errors
    from launch.run.folder import load_config
    from model.checkpoint import checkpoint_path
    from model.device import autocast, choose_device, choose_precision

    with user_errors():
        options, overrides = parse(Options, arguments, others=("data",))
        run, own = Path(options.run), None
        if is_run(run):
            checkpoint_path(run, options.step)  # a folder of none says so
            own = load_config(run)
        trained = open_trained(run, options.step)
        device = choose_device(options.device)
        dtype = choose_precision(options.precision, device)
        corpus = prepare(chosen_data(options.run, own, overrides), trained.tokenizer)
        # The loss of a token depends on how many it sees before it, so by default on as many as in
        # the training.
        trained_at = trained.length
        if own:
            trained_at = own.batch.length
        length = options.length or trained_at or min(1024, trained.model.config.max_length)
        sets = {
            name: Validation(tokens, length, corpus.tokenizer)
            for name, tokens in corpus.validation.items()
        }
        row = evaluate(
            trained.model.to(device), sets, options.sequences, lambda: autocast(device, dtype)
        )
        assert row is not None
        print(f"{trained.path}, {length} tokens per sequence, {str(dtype).removeprefix('torch.')}")
        for line in described(row, sets):
            print(line)


def chosen_data(run: str, own: Config | None, overrides: list[str]) -> DataConfig:
    """Returns the corpus that overrides name, else the run's. Raises ValueError where there is
    neither."""
    from launch.config import compose

    # Another corpus is named as a whole: nothing of the run's own is left then.
    if overrides:
        return compose(overrides).data
    if own is None:
        raise ValueError(
            f"run={run} is a Hugging Face folder, which names no corpus; add data=stdlib or"
            " data=text data.path=FILES"
        )
    return own.data


def described(row: dict[str, float], sets: dict[str, Validation]) -> Iterator[str]:
    """Yields what was found on each validation set, in a line."""
    for name, validation in sets.items():
        prefix = prefix_of(name, sets)
        loss = row[prefix + "loss"]
        perplexity = row[prefix + "perplexity"]
        bits = row[prefix + "bits_per_byte"]
        yield (
            f"{name}: loss {loss:.4f}, perplexity {perplexity:.2f}, {bits:.4f} bits per byte"
            f" over {validation.num_tokens:,} tokens"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
