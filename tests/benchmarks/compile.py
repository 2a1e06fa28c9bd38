"""Eager, block-wise and whole compilation on this CPU: python tests/benchmarks/compile.py [--rounds
9]

6 layers x 384, length 256, batch 12, vocabulary 256: steps take turns in one process; the first two
of each, which compile, are not counted."""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from train_step import HEADS, LAYERS, WIDTH, T, batch

from conf.rule import OptimConfig
from model import GPT, GPTConfig
from model.device import autocast, choose_precision, keep_freed_memory
from model.parallelize import parallelize
from optim import Gradient, build_optimizer

CPU = torch.device("cpu")


def build(compile: str) -> Callable[[], Any]:
    """A step of a model of its own."""
    model = GPT(GPTConfig(256, T, LAYERS, HEADS, WIDTH))
    optimizer, rule, batches = build_optimizer(model, OptimConfig()), Gradient(model), [batch(256)]
    parallelize(model, compile, checkpoint_activations=False, device=CPU)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(CPU, choose_precision("auto", CPU)):
            rule.gradient(batches)
        optimizer.step()

    return step


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    steps = {compile: build(compile) for compile in ("none", "block", "whole")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found[2:]) for name, found in times.items()}
    print(
        f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" {torch.cpu.get_capabilities().get('cpu_name', 'CPU')}\n"
    )
    print("| compile | first step | step | eager / it |\n|---|---|---|---|")
    for name, median in medians.items():
        print(
            f"| {name} | {times[name][0]:.1f} s | {1000 * median:.0f} ms |"
            f" {medians['none'] / median:.2f} |"
        )


if __name__ == "__main__":
    main()
