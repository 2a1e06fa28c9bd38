"""What BAR adds to a LoRA step: GPT-2 small with peft's LoRA of rank 8, plain and BAR steps in
turns.

    python tests/benchmarks/bar.py [--rounds 15] [--batch 1 --length 128] [--device cpu]

Random weights from a configuration, nothing is downloaded; AdamW, fp32 factors, fp32 compute on a
CPU and bf16 autocast on a GPU. A round is one step of each, in an order that alternates, on one
model; the ratio is the median over rounds of BAR / plain within the round, with its quartiles. The
last column times `BAR.step` by itself, as a share of the plain step. Needs transformers and peft.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from model.device import keep_freed_memory
from optim import BAR

RANK, LR = 8, 1e-4  # small, so that the shrinking product cannot matter
TARGETS = {
    "attention (12 pairs)": ["c_attn"],
    "all linear (48 pairs)": ["c_attn", "c_proj", "c_fc"],
}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds, with what the device still has to do."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(targets: list[str], arguments: argparse.Namespace) -> str:
    """Cells of a row of the table."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = get_peft_model(
        GPT2LMHeadModel(GPT2Config()),
        LoraConfig(r=RANK, target_modules=targets, fan_in_fan_out=True),
    ).to(device)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, fused=True
    )
    bar = BAR(model, optimizer)
    tokens = torch.randint(
        model.config.vocab_size, (arguments.batch, arguments.length), device=device
    )

    def step(regularise: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if regularise:
            bar.step()
        optimizer.step()

    times: dict[bool, list[float]] = {False: [], True: []}
    alone = []
    for round_ in range(arguments.rounds + 2):
        found = {
            regularise: timed(lambda r=regularise: step(r), device)
            for regularise in ((False, True) if round_ % 2 else (True, False))
        }
        itself = timed(bar.step, device)
        if round_ > 1:  # the first two warm up
            alone.append(itself)
            for regularise, seconds in found.items():
                times[regularise].append(seconds)
    low, middle, high = statistics.quantiles(
        [b / a for a, b in zip(times[False], times[True], strict=True)], n=4
    )
    plain, with_bar, itself = (
        1000 * statistics.median(found) for found in (times[False], times[True], alone)
    )
    return (
        f"{plain:.0f} ms | {with_bar:.0f} ms | {middle:.3f} ({low:.3f} to {high:.3f}) |"
        f" {itself:.2f} ms, {100 * itself / plain:.2f} %"
    )


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    keep_freed_memory()
    print(
        f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" {arguments.device}, batch {arguments.batch} x {arguments.length}\n"
    )
    print(
        "| targets | plain | BAR | BAR / plain (quartiles) | BAR.step by itself"
        " |\n|---|---|---|---|---|"
    )
    for name, targets in TARGETS.items():
        print(f"| {name} | {compare(targets, arguments)} |", flush=True)


if __name__ == "__main__":
    main()
