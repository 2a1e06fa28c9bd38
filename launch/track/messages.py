"""What a run says of itself at its beginning and at its end."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from conf.schema import Config
from data import Validation, training_sample, unigram_bigram
from data.tokenizer import Tokenizer
from launch.plan.plan import Plan
from launch.run.build import RunData
from launch.run.folder import read_rows
from launch.run.opening import OpenRun
from launch.track.progress import Progress
from launch.track.tracker import loss_at_flops
from model import GPT, load
from model.device import autocast, choose_precision
from model.sample import Sampling, decode_stream, generate
from optim.adamw import describe_groups


def announcement(
    settings: Config,
    plan: Plan,
    opened: OpenRun,
    optimizer: Optimizer,
    device_and_precision: str,
    start_note: str,
) -> list[str]:
    """Returns what is said before the first step.

    Args:
        settings: the run
        plan: its horizon and shape
        opened: its name and its processes
        optimizer: whose groups of parameters are listed
        device_and_precision: device and precision
        start_note: where the run goes on from; empty where it begins
    """
    lines = [
        f"{opened.name}: {plan.num_parameters:,} parameters, {plan.num_non_embedding:,} without"
        f" embeddings; {plan.schedule.steps:,} steps of {plan.tokens_per_step:,} tokens on"
        f" {opened.layout.world} x {device_and_precision}",
        describe_groups(optimizer),
    ]
    if start_note:
        lines.append(start_note)
    length, longest = settings.batch.length, plan.model.max_length
    if 4 * length <= longest:
        lines.append(
            f"note: batch.length={length} is far below model.max_length={longest}: no sequence is"
            f" longer, so positions from {length} on stay untrained; model.max_length={length}"
            " fits"
        )
    return lines


def final_figures(
    opened: OpenRun, settings: Config, plan: Plan, progress: Progress, data: RunData
) -> dict[str, Any]:
    """Returns what summary.json holds of a run that is done."""
    # The FLOPs of AdamW over the same steps, at which methods are compared.
    adamw = plan.flops_per_step * plan.schedule.steps
    # A run that is matched to AdamW's FLOPs ends at that budget.
    budget = float(adamw)
    if settings.optim.compute_matched:
        budget = math.inf
    rows = read_rows(opened.folder / "metrics.jsonl")
    figures = {
        "name": opened.name,
        "step": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "seconds": progress.seconds,
        "parameters": plan.num_parameters,
        "non_embedding": plan.num_non_embedding,
        "skipped": progress.skipped,
        "perturbed_steps": progress.perturbed,
        **progress.validation,
        "val/loss_at_equal_flops": loss_at_flops(rows, budget),
    }
    # The losses of counts of tokens and of pairs of tokens, which any model should beat.
    if settings.evaluation.baselines:
        counted = training_sample(data.corpus.train, data.corpus.weights)
        first, vocabulary = next(iter(data.sets.values())), data.corpus.tokenizer.vocab_size
        unigram, bigram = unigram_bigram(counted, first, vocabulary)
        figures |= {"baseline/unigram": unigram, "baseline/bigram": bigram}
    return figures


def last_words(
    folder: Path, settings: Config, figures: dict[str, Any], data: RunData, device: torch.device
) -> Iterator[str]:
    """Yields what is said of a run that is done: its loss, a sample of what it has learned, and
    what to try with it."""
    yield (
        f"validation loss {figures['val/loss']:.4f} nats per token,"
        f" {figures['val/bits_per_byte']:.4f} bits per byte, after {figures['tokens']:,} tokens in"
        f" {figures['seconds']:.0f} s"
    )
    if "baseline/bigram" in figures:
        bigram, unigram = figures["baseline/bigram"], figures["baseline/unigram"]
        yield f"beside it: bigram {bigram:.4f}, unigram {unigram:.4f}"
    if num_tokens := settings.evaluation.sample:
        with autocast(device, choose_precision(settings.precision, device)):
            # The model that others will load, and free of compilation.
            model = load(folder).to(device)
            yield f"a sample:\n{sample(model, data.corpus.tokenizer, num_tokens, settings.seed)}"
    # Both commands can be pasted into a shell.
    prompt = shlex.quote(opening(data.corpus.tokenizer, next(iter(data.sets.values()))))
    run = shlex.quote(f"run={folder}")
    yield (
        f"run folder: {folder}\ntry next:\n    python -m model.sample {run}"
        f" prompt={prompt}\n    python -m launch.evaluate {run}"
    )


def sample(model: GPT, tokenizer: Tokenizer, num_tokens: int, seed: int) -> str:
    """Returns a text that the model makes up, indented, and without what a terminal would obey."""
    sampling = Sampling(temperature=0.8, seed=seed)
    tokens = generate(model, tokenizer.prompt(""), num_tokens, sampling)
    text = "".join(decode_stream(tokens, tokenizer.decode_bytes))
    # A model of bytes may write the control characters of a terminal.
    text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "\n".join(f"    {line}" for line in text.splitlines())


def opening(tokenizer: Tokenizer, validation: Validation) -> str:
    """Returns how the text of a validation set begins: a prompt that fits the corpus."""
    ids = validation.source.read(0, 64)
    text = tokenizer.decode(ids[~np.isin(ids, [tokenizer.eot, *tokenizer.bos])])
    words = "".join(c if c.isprintable() and c != "\ufffd" else " " for c in text).split()
    # The first word may be cut.
    return " ".join(words[1:3] or words)[:40]
