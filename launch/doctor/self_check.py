"""Gradients of a small GPT on a device against the same gradients on the CPU in float64."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from conf.rule import OptimConfig
from launch.doctor.finding import Finding
from model import GPT, GPTConfig
from model.device import autocast, choose_precision, ieee_products
from optim import Gradient, SharpnessAware, build_optimizer

# The axes of the rules that are tried: no perturbation, and the three that the product is for.
RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sam": {"path": "full", "rho": 0.05},
    "functional_sam": {"path": "functional", "rho": 0.05, "cotangent": "rebuild"},
    "preconditioned_sam": {"path": "full", "rho": 0.05, "metric": "adam"},
}
SHAPE = GPTConfig(vocab_size=257, max_length=64, num_layers=2, num_heads=4, width=64)
# The largest relative error of a gradient in fp32: a hundred roundings of 6e-8.
LARGEST_FP32_ERROR = 1e-5
# How many times the error of bf16 on the CPU a device may show in bf16: its sums have other orders.
LARGEST_BF16_RATIO = 3.0

Batches = list[tuple[Tensor, Tensor]]
Gradients = dict[str, Tensor]


def check_gradients(device: torch.device) -> Iterator[Finding]:
    """Yields whether the gradients of four rules on a device are those of the CPU: in fp32 to
    LARGEST_FP32_ERROR, in bf16 as well as bf16 allows."""
    reference = reference_problem()
    began = time.monotonic()
    errors = {name: error(reference, axes, device, torch.float32) for name, axes in RULES.items()}
    worst = max(errors, key=lambda name: errors[name])
    seconds = time.monotonic() - began
    yield judged(
        f"{device} fp32",
        errors[worst],
        LARGEST_FP32_ERROR,
        f"gradients of {', '.join(RULES)} are the CPU's in fp64 to {errors[worst]:.1e} ({worst}),"
        f" {seconds:.1f} s",
    )
    if choose_precision("auto", device) != torch.bfloat16:
        yield Finding("note", f"{device} bf16", "no bf16 instructions; precision=auto is fp32")
        return
    expected = error(reference, RULES["adamw"], torch.device("cpu"), torch.bfloat16)
    found = error(reference, RULES["adamw"], device, torch.bfloat16)
    yield judged(
        f"{device} bf16",
        found,
        LARGEST_BF16_RATIO * expected,
        f"the gradient is the CPU's in fp64 to {found:.1e}, the CPU's own in bf16 to"
        f" {expected:.1e}",
    )


def judged(subject: str, error: float, largest: float, found: str) -> Finding:
    """Returns the finding on an error that may be at most `largest`; one that is no number
    failed."""
    if error <= largest:
        return Finding("ok", subject, found)
    return Finding(
        "failed",
        subject,
        f"{found}, more than {largest:.1e}",
        "numbers of runs on this device cannot be trusted: try another build or driver, and report"
        " this line",
    )


def reference_problem() -> tuple[GPT, torch.optim.Optimizer, Batches]:
    """Returns a small GPT in float64 on the CPU, AdamW with moments of a few steps, and a batch of
    two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    tokens_BxT = torch.randint(SHAPE.vocab_size, (4, SHAPE.max_length + 1), generator=generator)
    inputs, targets = tokens_BxT[:, :-1].split(2), tokens_BxT[:, 1:].split(2)
    batches = [(x.contiguous(), y.contiguous()) for x, y in zip(inputs, targets, strict=True)]
    model = GPT(SHAPE).double()
    optimizer = build_optimizer(model, OptimConfig())
    rule = Gradient(model)
    for _ in range(3):
        rule.gradient(batches)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, batches


def error(
    reference: tuple[GPT, torch.optim.Optimizer, Batches],
    axes: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Returns the relative error |g - g64| / |g64| of a rule's gradient g on a device.

    Args:
        reference: the model, optimiser and batch in float64, from which g64 is taken too
        axes: those of the rule; none for the plain gradient
        device: where g is taken
        dtype: float32, or bfloat16 for autocast over float32 weights
    """
    model, optimizer, batches = reference
    exact = gradient(axes, model, optimizer, batches)
    other = deepcopy(model).to(device, torch.float32)
    other_optimizer = build_optimizer(other, OptimConfig())
    # Moments are cast to the dtype of their weights.
    other_optimizer.load_state_dict(optimizer.state_dict())
    moved = [(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    with ieee_products(), autocast(device, dtype):
        found = gradient(axes, other, other_optimizer, moved)
    return distance(found, exact)


def gradient(
    axes: dict[str, Any], model: GPT, optimizer: torch.optim.Optimizer, batches: Batches
) -> Gradients:
    """Returns a rule's gradient in float64 on the CPU, by the names of the parameters. It is that
    of a second step at the same weights, which knows of a first one what the rule remembers."""
    rule = SharpnessAware(model, optimizer, **axes) if axes else Gradient(model)
    for _ in range(2):
        optimizer.zero_grad()
        rule.gradient(batches)
    found = {
        key: parameter.grad.to("cpu", torch.float64)
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    optimizer.zero_grad()
    return found


def distance(found: Gradients, exact: Gradients) -> float:
    """Returns |found - exact| / |exact| over all parameters together."""
    difference = sum((found[name] - exact[name]).square().sum() for name in exact)
    size = sum(gradient.square().sum() for gradient in exact.values())
    return float((torch.as_tensor(difference) / torch.as_tensor(size)).sqrt())


def check_compiler(device: torch.device) -> Finding:
    """Returns whether torch.compile makes a kernel for a device that computes what eager does."""
    subject = f"{device} compile"

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x) * x.sum(-1, keepdim=True)

    x = torch.linspace(-2, 2, 4096, device=device).reshape(64, 64)
    compiled: Callable[[Tensor], Tensor] = torch.compile(function)
    began = time.monotonic()
    try:
        found = compiled(x)
    except Exception as problem:  # whatever a toolchain can raise
        line = str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)
        return Finding("warning", subject, line, "compile=none runs without it, slower on CUDA")
    seconds = time.monotonic() - began
    if not torch.allclose(found, function(x), rtol=1e-4, atol=1e-5):
        return Finding(
            "failed", subject, "a compiled function computes something else", "set compile=none"
        )
    return Finding("ok", subject, f"a first kernel in {seconds:.1f} s")
