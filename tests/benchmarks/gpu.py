"""Everything that is measured on one GPU, in pieces of minutes.

    gpu.py gpt2 [--peer DIR_OF_NANOGPT]      GPT-2 124M, length 1024, beside nanoGPT's compiled step
    gpu.py large                             the 1208M shape, length 2048
    gpu.py rules [--large] [--rules sam ...] gradient rules beside AdamW, 0.5M tokens a step by
                                             accumulation
    gpu.py memory [--rules sam ...]          the plan's memory beside what a step allocates; fails
                                             beyond a tenth
    gpu.py shakespeare --data .../input.txt  shakespeare_char: the best evaluation of 5000 steps

Needs torch and safetensors; `shakespeare` and `memory` also what train.py imports. Steps are bf16,
compiled block by block, with fused AdamW. The utilisation counts forward and backward as
optim/flops.py does, over the dense bf16 peak. --profile prints the kernels that take longest."""

import argparse
import contextlib
import importlib.util
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from conf.rule import OptimConfig
from model import GPT, GPTConfig
from model.device import autocast, peak_flops
from model.parallelize import parallelize
from optim import Gradient, Schedule, build_optimizer, build_rule, forward_flops

CUDA = torch.device("cuda")
SCHEDULE = Schedule(10**6, 0, 1e-3, stop=10**6)
GPT2 = GPTConfig(50257, 1024, 12, 12, 768, bias=False, norm_eps=1e-5, init="gpt2")
LARGE = GPTConfig(32768, 2048, 24, 32, 2048)
RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sam": {"path": "full"},
    "functional_sam store": {"path": "functional", "cotangent": "store"},
    "functional_sam rebuild": {"path": "functional", "cotangent": "rebuild"},
    "preconditioned_sam": {"path": "full", "metric": "adam"},
    "preconditioned_functional_sam": {
        "path": "functional",
        "metric": "adam",
        "cotangent": "rebuild",
    },
    "msam": {"path": "full", "scope": "micro_batch"},
    "delta_sam": {"path": "full", "weights": "delta"},
    "momentum_sam": {"path": "full", "direction": "momentum", "rho": 3.0},
    "stale_sam": {"path": "full", "direction": "stale"},
    "friendly_sam": {"path": "full", "direction": "friendly"},
    "gsam": {"path": "full", "combine": "orthogonal"},
}
Step = Callable[[], Any]


def tokens(shape: GPTConfig, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random tokens for everyone."""
    batch = torch.randint(
        0,
        shape.vocab_size,
        (sequences, shape.max_length + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(CUDA)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def our_step(shape: GPTConfig, sequences: int, checkpoint_activations: bool = False) -> Step:
    """One step as train.py takes it, without reading anything back."""
    with CUDA:
        model = GPT(shape)
    parallelize(model, "block", checkpoint_activations, CUDA)
    optimizer, rule, batches = (
        build_optimizer(model, OptimConfig()),
        Gradient(model),
        [tokens(shape, sequences)],
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(CUDA, torch.bfloat16):
            rule.gradient(batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def rules(shape: GPTConfig, micro: int, names: list[str], rounds: int = 5) -> None:
    """A table of rules, one model after the other, AdamW's step before and after each; rho and lr
    change from step to step, and after the first steps a recompilation is an error."""
    micros = 2**19 // shape.max_length // micro
    inputs, targets = tokens(shape, micro * micros)
    batches = list(zip(inputs.split(micro), targets.split(micro), strict=True))
    with CUDA:
        model = GPT(shape)
    parallelize(model, "block", False, CUDA)
    print(f"{micros} micro-batches of {micro} x {shape.max_length}\n")
    print("| rule | step | ratio to AdamW | peak memory | above AdamW's |\n|---|---|---|---|---|")
    plain_peak = 0
    for name in ["adamw", *(name for name in names if name != "adamw")]:
        times: dict[str, list[float]] = {"adamw": [], name: []}
        config = OptimConfig(**RULES[name])
        optimizer = build_optimizer(model, config)
        contestants = {
            "adamw": build_rule(model, optimizer, OptimConfig(), SCHEDULE),
            name: build_rule(model, optimizer, config, SCHEDULE),
        }
        for round_ in range(rounds + 1):
            for contestant, rule in contestants.items():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                began, rule.rho = time.perf_counter(), config.rho * (1 + 0.1 * round_)
                for group in optimizer.param_groups:
                    group["lr"] = 1e-4 / (1 + round_)
                with autocast(CUDA, torch.bfloat16):
                    rule.gradient(batches, logged=False)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                if round_:
                    times[contestant].append(time.perf_counter() - began)
            torch._dynamo.config.error_on_recompile = True
        peak = torch.cuda.max_memory_allocated()
        plain_peak = plain_peak or peak
        step, plain = (statistics.median(times[key]) for key in (name, "adamw"))
        print(
            f"| {name} | {1000 * step:.0f} ms | {step / plain:.3f} | {peak / 2**30:.2f} GiB |"
            f" {(peak - plain_peak) / 2**30:.2f} GiB |",
            flush=True,
        )
        del optimizer, contestants, rule


def memory(names: list[str]) -> None:
    """The plan's peak beside torch.cuda.max_memory_allocated for a logged step of GPT-2 124M, in
    bf16 and fp32, with activations kept and computed again, eager and compiled. Exits with 1 where
    an eager one differs by more than a tenth; compiled blocks may need less."""
    from launch.config import compose
    from launch.plan.memory import estimate
    from launch.plan.plan import make_plan

    shape = [
        "model=gpt2_124m",
        "tokenizer=bpe",
        "tokenizer.vocab_size=50257",
        "batch.length=1024",
        "batch.sequences=16",
        "device=cuda",
    ]
    print(
        "| rule | precision | checkpointing | compile | plan | measured | plan / measured"
        " |\n|---|---|---|---|---|---|---|"
    )
    wrong = []
    for name, precision, checkpointing, compiled in itertools.product(
        names, ("bf16", "fp32"), (False, True), ("none", "block")
    ):
        settings = compose(
            [
                *shape,
                f"precision={precision}",
                f"activation_checkpointing={checkpointing}",
                f"compile={compiled}",
                "batch.micro=4",
                *(f"optim.{key}={value}" for key, value in RULES[name].items()),
                *["optim.num_groups=2"] * (name == "msam"),
            ]
        )
        plan = make_plan(settings)
        torch._dynamo.reset()
        torch._dynamo.config.error_on_recompile = False
        with CUDA:
            model = GPT(plan.model)
        parallelize(model, settings.compile, settings.activation_checkpointing, CUDA)
        optimizer = build_optimizer(model, settings.optim)
        rule = build_rule(model, optimizer, settings.optim, plan.schedule)
        micros = [part.split(plan.micro) for part in tokens(plan.model, settings.batch.sequences)]
        batches = list(zip(*micros, strict=True))
        size = len(batches) // plan.num_groups
        for step in range(3):
            torch.cuda.reset_peak_memory_stats()
            with autocast(CUDA, torch.bfloat16 if precision == "bf16" else torch.float32):
                rule.gradient(
                    [batches[first : first + size] for first in range(0, len(batches), size)],
                    logged=step == 2,
                )
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        planned, measured = estimate(settings, plan.model).total, torch.cuda.max_memory_allocated()
        found = f"{planned / 2**30:.2f} GiB | {measured / 2**30:.2f} GiB | {planned / measured:.3f}"
        print(f"| {name} | {precision} | {checkpointing} | {compiled} | {found} |", flush=True)
        if compiled == "none" and abs(planned / measured - 1) > 0.1:
            wrong.append(f"{name} in {precision}")
        del model, optimizer, rule, micros, batches
        torch.cuda.empty_cache()
    if wrong:
        sys.exit(f"off by more than a tenth: {', '.join(wrong)}")


def nanogpt_step(folder: str, sequences: int) -> Step:
    """One step as nanoGPT's train.py takes it, compiled, at its own padded vocabulary."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    assert spec and spec.loader
    nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    shape = {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "vocab_size": 50304,
        "dropout": 0.0,
        "bias": False,
    }
    with contextlib.redirect_stdout(None):
        model = nanogpt.GPT(nanogpt.GPTConfig(**shape)).to(CUDA)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
    compiled, (inputs, targets) = torch.compile(model), tokens(GPT2, sequences)

    def step() -> None:
        with autocast(CUDA, torch.bfloat16):
            _, loss = compiled(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(steps: dict[str, Step], rounds: int = 15) -> dict[str, float]:
    """Median seconds of a step; the contestants take turns, five steps each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(5):
                step()
            torch.cuda.synchronize()
            if round_ > 1:
                times[name].append((time.perf_counter() - began) / 5)
    return {name: statistics.median(found) for name, found in times.items()}


def report(name: str, shape: GPTConfig, sequences: int, elapsed: float) -> None:
    """One line of figures."""
    num_tokens = sequences * shape.max_length
    flops, peak = 3 * forward_flops(shape, shape.max_length).total * num_tokens, peak_flops(CUDA)
    utilisation = f", {flops / elapsed / peak:.1%} of the dense bf16 peak" if peak else ""
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{name}: {1000 * elapsed:.1f} ms, {num_tokens / elapsed:,.0f} tokens/s{utilisation}; peak"
        f" memory so far {memory:.1f} GiB"
    )


def profile(step: Step) -> None:
    """The kernels that take longest."""
    with torch.profiler.profile() as found:
        for _ in range(5):
            step()
    print(
        found.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70
        )
    )


def shakespeare(data: str) -> None:
    """The best and the last evaluation of nanoGPT's GPU settings."""
    from launch.run.folder import read_rows

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "experiment=shakespeare_char",
            f"data.path={data}",
            f"data.cache={folder}/cache",
            f"dir={folder}/run",
            "tracking=none",
        ]
        subprocess.run(
            [sys.executable, "train.py", *overrides], cwd=Path(__file__).parents[2], check=True
        )
        losses = [
            row["val/loss"]
            for row in read_rows(Path(folder, "run", "metrics.jsonl"))
            if "val/loss" in row
        ]
    print(f"shakespeare_char: best evaluation {min(losses):.4f}, last {losses[-1]:.4f}")


def main() -> None:
    """Runs one piece."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("piece", choices=("gpt2", "large", "rules", "memory", "shakespeare"))
    parser.add_argument("--peer", help="a checkout of nanoGPT")
    parser.add_argument("--data", help="tinyshakespeare/input.txt")
    parser.add_argument("--sequences", type=int, help="sequences per step")
    parser.add_argument(
        "--large", action="store_true", help="rules: the 1208M shape instead of GPT-2's"
    )
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    print(
        f"{date.today()}, torch {torch.__version__}, {torch.cuda.get_device_name()}:"
        f" {' '.join(sys.argv[1:])}"
    )
    if arguments.piece == "shakespeare":
        return shakespeare(arguments.data)
    if arguments.piece == "memory":
        return memory(arguments.rules)
    if arguments.piece == "rules":
        return rules(
            *(
                (LARGE, arguments.sequences or 8)
                if arguments.large
                else (GPT2, arguments.sequences or 32)
            ),
            arguments.rules,
        )
    shape, sequences = (
        (GPT2, arguments.sequences or 32)
        if arguments.piece == "gpt2"
        else (LARGE, arguments.sequences or 8)
    )
    steps = {"ours": our_step(shape, sequences)}
    if arguments.peer and arguments.piece == "gpt2":
        steps["nanoGPT"] = nanogpt_step(arguments.peer, sequences)
    found = seconds(steps)
    for name, elapsed in found.items():
        report(name, shape, sequences, elapsed)
    if "nanoGPT" in found:
        print(f"nanoGPT / ours: {found['nanoGPT'] / found['ours']:.2f}")
    if arguments.profile:
        profile(steps["ours"])


if __name__ == "__main__":
    main()
