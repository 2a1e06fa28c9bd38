"""The time and peak memory of a step of every gradient rule, beside AdamW's and, with --peer,
beside SAM as davda54/sam has it.

    python tests/benchmarks/sharpness.py [--vocab 256 50304] [--length 256] [--micros 1] [--rules
    sam functional_sam ...]
                                         [--peer DIR_OF_DAVDA54_SAM] [--rounds 7]

6 layers x 384, 6 heads, 3072 tokens a step (12 sequences of 256), cut into micro-batches. Precision
as train.py takes it. Each contestant is a process of its own, and they take turns step by step, so
that the ratio of medians holds while the machine's speed drifts. The baseline is optim=adamw, never
a rule of radius 0. The ratio of FLOPs, as a run logs them, is what the time can be held against.
Memory: the largest sum of live tensor bytes of a step, counted tensor by tensor in a further step;
its difference from AdamW's is given in copies of the parameters, and in MiB."""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
import weakref
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.config import compose
from model import GPT, GPTConfig
from model.device import autocast, choose_precision, keep_freed_memory
from optim import Schedule, SharpnessAware, build_optimizer, build_rule, forward_flops
from optim.rule.perturbation import moved
from optim.rule.tensors import norm

TOKENS, LAYERS, HEADS, WIDTH = 3072, 6, 6, 384
WARM_UP = 4  # rounds that are not counted: malloc's memory grows in the first steps
RULES = {
    "adamw": "optim=adamw",
    "sam": "optim=sam",
    "functional_sam store": "optim=functional_sam optim.cotangent=store",
    "functional_sam rebuild": "optim=functional_sam optim.cotangent=rebuild",
    "logit_sam": "optim=logit_sam",
    "angle_sam": "optim=angle_sam optim.cotangent=store",
    "preconditioned_sam": "optim=preconditioned_sam",
    "preconditioned_functional_sam": "optim=preconditioned_functional_sam optim.cotangent=store",
    "asam": "optim=asam",
    "msam": "optim=msam optim.num_groups=4",
    "delta_sam": "optim=delta_sam",
    "momentum_sam": "optim=momentum_sam",
    "stale_sam": "optim=stale_sam",
    "friendly_sam": "optim=friendly_sam",
    "look_sam": "optim=look_sam",
    "gsam": "optim=gsam",
}


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, as long as they live."""

    def __init__(self, known: list[torch.Tensor], counted: list[torch.Tensor]) -> None:
        super().__init__()
        # what is there for every rule
        self.seen = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0
        for tensor in counted:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.seen:
            self.seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.seen.pop(key)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out


class Step:
    """A model, its optimiser and a rule, stepping over the same random tokens as train.py would."""

    def __init__(self, name: str, vocab: int, length: int, micros: int, peer: str | None) -> None:
        keep_freed_memory()
        tokens = torch.randint(
            0, vocab, (TOKENS // length, length + 1), generator=torch.Generator().manual_seed(0)
        )
        size = len(tokens) // micros
        halves = (tokens[:, :-1].contiguous().split(size), tokens[:, 1:].contiguous().split(size))
        self.micros = list(zip(*halves, strict=True))
        self.model = GPT(GPTConfig(vocab, length, LAYERS, HEADS, WIDTH))
        self.flops: list[float] = []  # per token, of every step
        self.of_forward = forward_flops(self.model.config, length)
        self.device, self.dtype = torch.device("cpu"), choose_precision("auto", torch.device("cpu"))
        self.peer: Any = None
        if name == "davda54 SAM":
            spec = importlib.util.spec_from_file_location("davda54", Path(str(peer)) / "sam.py")
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.peer = module.SAM(
                self.model.parameters(),
                torch.optim.AdamW,
                rho=0.05,
                lr=1e-3,
                weight_decay=0.1,
                fused=True,
            )
            self.optimizer: Any = self.peer.base_optimizer
        else:
            config = compose(RULES[name].split()).optim
            self.optimizer = build_optimizer(self.model, config)
            schedule = Schedule(
                10**6, 0, config.lr, stop=10**6, period=config.period, rho=config.rho
            )
            self.rule = build_rule(self.model, self.optimizer, config, schedule)
            self.rule.rho = config.rho
            if name == "msam" and micros % config.num_groups:
                size = size // config.num_groups
                self.micros = [
                    micro
                    for pair in self.micros
                    for micro in zip(*(half.split(size) for half in pair), strict=True)
                ]

    def __call__(self) -> None:
        """One step."""
        with autocast(self.device, self.dtype):
            if self.peer is None:
                result = self.rule.gradient(self.micros, logged=False)
                self.flops.append(
                    self.of_forward.of(result.forwards, result.backwards, result.head_products)
                )
            else:
                self.passes()
                self.peer.first_step(zero_grad=True)
                self.passes()
                self.flops.append(self.of_forward.of(2, 2, 6))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.peer is None:
            self.optimizer.step()
        else:
            self.peer.second_step()
        self.optimizer.zero_grad(set_to_none=True)

    def passes(self) -> None:
        """The plain gradient in p.grad."""
        for inputs, targets in self.micros:
            self.model.loss(inputs, targets, 1 / TOKENS)[0].backward()

    def memory(self) -> float:
        """Peak of live bytes in one step, beside weights and optimiser, what the rule keeps between
        steps among them."""
        owners = [self.optimizer.state.values(), self.peer.state.values() if self.peer else ()]
        kept = [
            tensor
            for states in owners
            for state in states
            for tensor in state.values()
            if isinstance(tensor, torch.Tensor)
        ]
        known = [
            *self.model.parameters(),
            *kept,
            *(tensor for micro in self.micros for tensor in micro),
        ]
        of_rule = (
            []
            if self.peer
            else [tensor for name, tensor in self.rule.state_dict().items() if "/" in name]
        )
        if self.peer is None and isinstance(self.rule, SharpnessAware):
            # Stored cotangents keep their memory from one step to the next.
            buffers = self.rule.cotangents.buffers.values()
            of_rule += [tensor for tensor in buffers if tensor is not None]
        live = Live(known, of_rule)
        del of_rule, kept, known
        with live:
            self()
        return live.peak


def contestant(name: str, vocab: int, length: int, micros: int, peer: str | None) -> None:
    """A process that answers every line on stdin: a step with its seconds, memory with a step's
    bytes, flops with their mean so far."""
    step = Step(name, vocab, length, micros, peer)

    def seconds() -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    answers = {"step": seconds, "memory": step.memory, "flops": lambda: statistics.mean(step.flops)}
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


def ask(child: subprocess.Popen, what: str) -> float:
    """The answer of a contestant."""
    assert child.stdin and child.stdout
    child.stdin.write(f"{what}\n")
    return float(child.stdout.readline())


def compare(names: list[str], arguments: argparse.Namespace, vocab: int) -> list[str]:
    """The rows of a table: the contestants take turns, one step each, a rule of period k k
    steps."""
    children = {}
    for name in names:
        command = [
            sys.executable,
            __file__,
            "--contestant",
            name,
            "--vocab",
            str(vocab),
            "--length",
            str(arguments.length),
            "--micros",
            str(arguments.micros),
            *(["--peer", arguments.peer] if arguments.peer else []),
        ]
        children[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds + WARM_UP):
        for name, child in children.items():
            k = 5 if name == "look_sam" else 1
            seconds[name].append(sum(ask(child, "step") for _ in range(k)) / k)
    flops = {name: ask(child, "flops") for name, child in children.items()}
    peaks = {name: ask(child, "memory") for name, child in children.items()}
    for child in children.values():
        child.communicate()
    copy = 4 * sum(
        p.numel()
        for p in GPT(GPTConfig(vocab, arguments.length, LAYERS, HEADS, WIDTH)).parameters()
    )
    rows = []
    for name in names:
        own, base = (seconds[one][WARM_UP:] for one in (name, "adamw"))
        ratios = sorted(one / other for one, other in zip(own, base, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        above = peaks[name] - peaks["adamw"]
        rows.append(
            f"| {name} | {1000 * statistics.median(own):.0f} ms | {statistics.median(ratios):.2f}"
            f" ({low:.2f}-{high:.2f}) | {flops[name] / flops['adamw']:.2f} | {above / copy:.2f}"
            f" copies, {above / 2**20:.0f} MiB |"
        )
    return rows


def perturbation(vocab: int, length: int, rounds: int) -> str:
    """Norm, perturbation and restore of all weights, beside AdamW's own step with its fused and its
    foreach kernels."""
    weights = list(GPT(GPTConfig(vocab, length, LAYERS, HEADS, WIDTH)).parameters())
    fused, foreach = (
        torch.optim.AdamW(weights, foreach=not kernel, fused=kernel) for kernel in (True, False)
    )
    gradients = [torch.randn_like(w) for w in weights]
    for w, gradient in zip(weights, gradients, strict=True):
        w.grad = gradient

    def perturb() -> None:
        with moved(weights, gradients, 0.05 / norm(gradients).item()):
            pass

    seconds: dict[str, list[float]] = {"perturb": [], "fused": [], "foreach": []}
    for _ in range(rounds + WARM_UP):
        for name, action in (
            ("perturb", perturb),
            ("fused", fused.step),
            ("foreach", foreach.step),
        ):
            began = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - began)
    ours, *theirs = (statistics.median(found[WARM_UP:]) for found in seconds.values())
    return (
        f"norm, perturbation and restore: {ours / theirs[0]:.2f} of AdamW's fused step,"
        f" {ours / theirs[1]:.2f} of its foreach step"
    )


def main() -> None:
    """Prints a table in Markdown for every vocabulary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[256, 50304])
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--micros", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--peer", help="a checkout of davda54/sam")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        return contestant(
            arguments.contestant,
            arguments.vocab[0],
            arguments.length,
            arguments.micros,
            arguments.peer,
        )
    keep_freed_memory()
    names = [
        "adamw",
        *(rule for rule in arguments.rules if rule != "adamw"),
        *(["davda54 SAM"] if arguments.peer else []),
    ]
    precision = str(choose_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    print(
        f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, {precision}, "
        f"length {arguments.length}, {arguments.micros} micro-batches"
    )
    for vocab in arguments.vocab:
        print(
            f"\n| vocabulary {vocab} | step | ratio to AdamW (quartiles) | of FLOPs | memory above"
            " AdamW's peak |\n|---|---|---|---|---|"
        )
        print("\n".join(compare(names, arguments, vocab)), flush=True)
        print(f"\n{perturbation(vocab, arguments.length, arguments.rounds)}", flush=True)


if __name__ == "__main__":
    main()
