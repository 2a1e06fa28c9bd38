"""The time and peak memory of a training step, beside nanoGPT's where a checkout of it is given.

    python tests/benchmarks/train_step.py [--vocab 256 50304] [--peer DIR_OF_NANOGPT] [--rounds 7]

6 layers x 384, 6 heads, length 256, batch 12. Ours: bf16 autocast where the CPU has bf16 instructions; nanoGPT: fp32, its only CPU
mode. The two take turns in one process, so that the ratio of medians holds while the machine's speed drifts. Peak memory is the
largest resident set of a process of its own, less what it held before the model was built.
"""

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

from conf.schema import OptimConfig
from launch.process import autocast, choose_precision
from model import GPT, GPTConfig
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
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": T, "vocab_size": vocab, "dropout": 0.0, "bias": False}
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


def peak_memory(which: str, vocab: int, peer: str | None) -> float:
    """MiB that three steps need at most beyond the imports, in a process of their own."""
    command = [sys.executable, __file__, "--one", which, "--vocab", str(vocab), *(["--peer", peer] if peer else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def one(which: str, vocab: int, peer: str | None) -> None:
    """The child of `peak_memory`."""
    before = high_water()
    step = our_step(vocab) if peer is None or which == "ours" else nanogpt_step(vocab, peer)
    for _ in range(3):
        step()
    print(high_water() - before)


def high_water() -> float:
    """Largest resident set of this process so far, MiB. (ru_maxrss would begin with the parent's.)"""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def compare(vocab: int, peer: str | None, rounds: int) -> str:
    """A row of the table."""
    steps = {"ours": our_step(vocab)} | ({"nanoGPT": nanogpt_step(vocab, peer)} if peer else {})
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in times.items()}
    memory = {name: peak_memory(name, vocab, peer) for name in steps}
    cells = [f"{vocab}", *(f"{1000 * medians[name]:.0f} ms, {memory[name]:.0f} MiB" for name in steps)]
    if peer:
        cells += [f"{medians['nanoGPT'] / medians['ours']:.2f} x", f"{memory['ours'] / memory['nanoGPT']:.2f}"]
    return " | ".join(["", *cells, ""]).strip()


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[256, 50304])
    parser.add_argument("--peer", help="a checkout of nanoGPT; without it only our own step is timed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments.one, arguments.vocab[0], arguments.peer)
    precision = str(choose_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    print(f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, ours in {precision}\n")  # fmt: skip
    heads = ["vocabulary", "ours", *(["nanoGPT", "speed, nanoGPT / ours", "memory, ours / nanoGPT"] if arguments.peer else [])]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for vocab in arguments.vocab:
        print(compare(vocab, arguments.peer, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
