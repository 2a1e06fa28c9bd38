"""How long a save holds up training, beside a plain copy of the same tensors and beside a save that
is waited for.

    python tests/benchmarks/checkpoint.py [--layers 8] [--width 512] [--rounds 7]

A model, AdamW's state after a step and a random state. `begin` is all of a save that the loop waits
for; the copy is clone() of every tensor, and copy_() of every tensor to memory that is there. They
take turns, so that the ratios of medians hold while the machine's speed drifts. The first round has
no memory to copy to yet, and is left out. The second table says what writing costs the steps beside
it, which on a CPU have to share its cores."""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conf.rule import OptimConfig
from data.tokenizer import bytes_tokenizer
from launch.checkpoint.resume import tensors_of
from launch.checkpoint.saver import Saver
from model import GPT, GPTConfig
from model.device import choose_device, keep_freed_memory
from model.processes import Layout
from model.sharding import local
from optim import Gradient, build_optimizer


def measured(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds that the loop waits for an action."""
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device, tokenizer = choose_device("auto"), bytes_tokenizer()
    keep_freed_memory()
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, options.layers, 8, options.width)).to(device)
    optimizer, rule = build_optimizer(model, OptimConfig()), Gradient(model)
    tokens_BxT = torch.randint(0, 256, (4, 64), device=device)

    def step() -> None:
        rule.gradient([(tokens_BxT, tokens_BxT.roll(-1, 1))])
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), Layout())

        def state() -> dict[str, dict[str, torch.Tensor]]:
            return tensors_of(model, optimizer, rule, Layout())

        def begin(number: int) -> None:
            saver.begin(state(), {"step": number}, tokenizer, 1, [])

        def waited_for(number: int) -> None:
            begin(number)
            error = saver.wait()
            assert error is None, error

        def copied() -> list[torch.Tensor]:
            return [
                local(tensor).cpu().clone()
                for group in state().values()
                for tensor in group.values()
            ]

        places = copied()
        for number in range(options.rounds + 1):
            if number == 1:
                seconds.clear()
            tensors = [tensor for group in state().values() for tensor in group.values()]
            seconds["clone"].append(measured(copied, device))
            seconds["copy_"].append(
                measured(
                    partial(
                        list,
                        (
                            place.copy_(local(tensor))
                            for place, tensor in zip(places, tensors, strict=True)
                        ),
                    ),
                    device,
                )
            )
            seconds["waited for"].append(measured(partial(waited_for, 2 * number), device))
            seconds["step"] += [measured(step, device) for _ in range(5)]
            seconds["begin"].append(measured(partial(begin, 2 * number + 1), device))
            while not saver.done:
                seconds["step beside"].append(measured(step, device))
            saver.wait()
        saver.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lost = (
        sum(seconds["step beside"]) - len(seconds["step beside"]) * medians["step"]
    ) / options.rounds
    megabytes = sum(place.numel() * place.element_size() for place in places) / 2**20
    print(
        f"{megabytes:.0f} MiB on {device.type}, torch {torch.__version__},"
        f" {torch.get_num_threads()} threads, medians of {options.rounds}\n"
    )
    print(
        "| begin | copy_ | clone | waited for | begin / copy_ | begin / clone | begin / waited for"
        " |\n|---|---|---|---|---|---|---|"
    )
    ratios = " | ".join(
        f"{medians['begin'] / medians[name]:.3f}" for name in ("copy_", "clone", "waited for")
    )
    print(
        "| "
        + " | ".join(
            f"{1000 * medians[name]:.0f} ms" for name in ("begin", "copy_", "clone", "waited for")
        )
        + f" | {ratios} |\n"
    )
    print("| step | step beside a save | longer for a save, in all |\n|---|---|---|")
    print(
        f"| {1000 * medians['step']:.0f} ms | {1000 * medians['step beside']:.0f} ms |"
        f" {1000 * lost:.0f} ms |"
    )


if __name__ == "__main__":
    main()
