"""The time and peak memory of a training step, beside nanoGPT's where a checkout of it is given.

    python tests/benchmarks/train_step.py [--vocab 256 50304] [--peer DIR_OF_NANOGPT] [--rounds 7]

6 layers x 384, 6 heads, length 256, batch 12. Ours: bf16 autocast where the CPU has bf16
instructions; nanoGPT: fp32, its only CPU mode. Each is a process of its own, as its own train.py
would set it up, and they take turns step by step, so that the ratio of medians holds while the
machine's speed drifts. Peak memory is the largest resident set less what it was before the model
was built."""

import argparse
import contextlib
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from conf.rule import OptimConfig
from model import GPT, GPTConfig
from model.device import autocast, choose_precision, keep_freed_memory
from optim import Gradient, build_optimizer

B, T = 12, 256
LAYERS, HEADS, WIDTH = 6, 6, 384


def batch(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random tokens for everyone."""
    tokens = torch.randint(0, vocab, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def our_step(vocab: int) -> Callable[[], Any]:
    """One step as train.py takes it."""
    model = GPT(GPTConfig(vocab, T, LAYERS, HEADS, WIDTH))
    optimizer, rule = build_optimizer(model, OptimConfig()), Gradient(model)
    device, inputs = torch.device("cpu"), [batch(vocab)]
    dtype = choose_precision("auto", device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            rule.gradient(inputs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def nanogpt_step(vocab: int, folder: str) -> Callable[[], Any]:
    """One step as nanoGPT's train.py takes it on a CPU."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    assert spec and spec.loader
    nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    shape = {
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "block_size": T,
        "vocab_size": vocab,
        "dropout": 0.0,
        "bias": False,
    }
    with contextlib.redirect_stdout(None):
        model = nanogpt.GPT(nanogpt.GPTConfig(**shape))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    tokens, targets = batch(vocab)

    def step() -> None:
        _, loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def contestant(which: str, vocab: int, peer: str | None) -> None:
    """A process that takes a step for every line on stdin, and answers with its seconds and the
    memory it needed so far, in MiB."""
    before = high_water()
    if peer is None or which == "ours":
        keep_freed_memory()  # as train.py does
        step = our_step(vocab)
    else:
        step = nanogpt_step(vocab, peer)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, high_water() - before, flush=True)


def high_water() -> float:
    """Largest resident set of this process so far, MiB. (ru_maxrss would begin with the
    parent's.)"""
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def compare(vocab: int, peer: str | None, rounds: int) -> str:
    """A row of the table: the contestants take turns, one step each."""
    answers: dict[str, list[tuple[float, float]]] = {"ours": []} | ({"nanoGPT": []} if peer else {})
    children = {}
    for name in answers:
        command = [
            sys.executable,
            __file__,
            "--contestant",
            name,
            "--vocab",
            str(vocab),
            *(["--peer", peer] if peer else []),
        ]
        children[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    for _ in range(rounds + 2):
        for name, child in children.items():
            assert child.stdin and child.stdout
            child.stdin.write("step\n")
            seconds, memory = map(float, child.stdout.readline().split())
            answers[name].append((seconds, memory))
    for child in children.values():
        child.communicate()
    # the first two warm up
    times = {
        name: statistics.median(seconds for seconds, _ in found[2:])
        for name, found in answers.items()
    }
    memory = {name: found[-1][1] for name, found in answers.items()}
    cells = [
        f"{vocab}",
        *(f"{1000 * times[name]:.0f} ms, {memory[name]:.0f} MiB" for name in answers),
    ]
    if peer:
        cells += [
            f"{times['nanoGPT'] / times['ours']:.2f} x",
            f"{memory['ours'] / memory['nanoGPT']:.2f}",
        ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[256, 50304])
    parser.add_argument(
        "--peer", help="a checkout of nanoGPT; without it only our own step is timed"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        return contestant(arguments.contestant, arguments.vocab[0], arguments.peer)
    precision = str(choose_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    print(
        f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, ours in {precision}\n"
    )
    heads = [
        "vocabulary",
        "ours",
        *(["nanoGPT", "speed, nanoGPT / ours", "memory, ours / nanoGPT"] if arguments.peer else []),
    ]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for vocab in arguments.vocab:
        print(compare(vocab, arguments.peer, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
