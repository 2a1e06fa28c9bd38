"""The head and the attention alone: time and memory beside what else could be done, in one
interleaved run.

    python tests/benchmarks/kernels.py [--rounds 9]

Head, at 3072 tokens of width 384: ours (loss and both gradients, chunk by chunk) beside torch's
dense cross-entropy under the same precision, and beside the head's three matrix products as the
limit. Attention, forward and backward at 12 x 6 heads x 64 and as many tokens for every length:
ours on short sequences beside torch's fused kernel. Memory is what the process's largest resident
set gains, in a process of its own."""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from train_step import high_water

from model.device import autocast, choose_precision
from model.gpt import short_attention
from model.logits import LazyLogits

N, D = 3072, 384
CPU = torch.device("cpu")
DTYPE = choose_precision("auto", CPU)
Case = Callable[[], object]


def head_cases(vocab: int) -> dict[str, Case]:
    """Loss and gradients by h and W, three ways; the products do nothing else."""
    torch.manual_seed(0)
    h_NxD, weight_VxD = (
        torch.randn(N, D, requires_grad=True),
        (torch.randn(vocab, D) * 0.05).requires_grad_(),
    )
    targets_N = torch.randint(vocab, (N,))

    def gradients(loss: torch.Tensor) -> object:
        return torch.autograd.grad(loss, (h_NxD, weight_VxD))

    def ours() -> object:
        with autocast(CPU, DTYPE):
            return gradients(LazyLogits(h_NxD, weight_VxD, vocab).cross_entropy(targets_N)[0])

    def dense() -> object:
        with autocast(CPU, DTYPE):
            logits_NxV = F.linear(h_NxD, weight_VxD)
        return gradients(F.cross_entropy(logits_NxV.float(), targets_N, reduction="sum"))

    def products() -> object:
        h, weight = h_NxD.detach().to(DTYPE), weight_VxD.detach().to(DTYPE)
        r_NxV = h @ weight.T
        return r_NxV @ weight, r_NxV.T @ h

    return {"ours": ours, "dense": dense, "three products": products}


def attention_cases(length: int) -> dict[str, Case]:
    """Forward and backward of causal attention on the same number of tokens, two ways."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(N // length, 6, length, 64, dtype=DTYPE, requires_grad=True) for _ in range(3)
    )
    gradient = torch.randn_like(q)

    def case(y: Callable[[], torch.Tensor]) -> Case:
        return lambda: torch.autograd.grad(y(), (q, k, v), gradient)

    fused = case(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return {"ours": case(lambda: short_attention(q, k, v)), "fused": fused}


def medians(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Median ms of each case; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, run in cases.items():
            began = time.perf_counter()
            run()
            if round_ > 1:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def memory(name: str, vocab: int) -> float:
    """MiB a head case needs at most beyond its inputs, in a process of its own."""
    child = subprocess.run(
        [sys.executable, __file__, "--memory", name, str(vocab)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(child.stdout)


def main() -> None:
    """Prints two tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        run, before = head_cases(int(arguments.memory[1]))[arguments.memory[0]], high_water()
        run()
        return print(high_water() - before)
    print(
        f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" {str(DTYPE).removeprefix('torch.')}\n"
    )
    print(
        "| vocabulary | ours | dense | three products | dense / ours | ours / three products"
        " |\n|---|---|---|---|---|---|"
    )
    for vocab in (4096, 32768, 50304):
        cases = head_cases(vocab)
        found = medians(cases, arguments.rounds)
        cells = " | ".join(f"{found[name]:.0f} ms, {memory(name, vocab):.0f} MiB" for name in cases)
        print(
            f"| {vocab} | {cells} | {found['dense'] / found['ours']:.2f} |"
            f" {found['ours'] / found['three products']:.2f} |",
            flush=True,
        )
    print("\n| length | short_attention | fused | fused / short_attention |\n|---|---|---|---|")
    for length in (64, 128, 256, 512, 1024):
        found = medians(attention_cases(length), arguments.rounds)
        print(
            f"| {length} | {found['ours']:.1f} ms | {found['fused']:.1f} ms |"
            f" {found['fused'] / found['ours']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
