"""Tiny problems in float64 and what the tests of the gradient rules ask of them; `reference`
functions know nothing of `optim`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp

from conf.rule import RuleConfig
from model import GPT, GPTConfig
from optim import Adapter, RuleResult, SharpnessAware

V, T = 23, 5
Batches = list[tuple[Tensor, Tensor]]
CONF = Path(__file__).resolve().parent.parent / "conf" / "optim"
AXES = {entry.name for entry in fields(RuleConfig)}


def presets() -> dict[str, dict[str, Any]]:
    """The axes of every conf/optim/*.yaml that moves the weights."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
    return {
        name: {k: v for k, v in keys.items() if k in AXES}
        for name, keys in found.items()
        if keys["path"] != "none"
    }


def gpt(dropout: float = 0.0, dtype: torch.dtype = torch.float64, **shape: Any) -> GPT:
    """A GPT of one block, its norms and biases no longer at their special first values."""
    model = GPT(
        GPTConfig(
            **(
                {
                    "vocab_size": V,
                    "max_length": T,
                    "num_layers": 1,
                    "num_heads": 2,
                    "width": 8,
                    "dropout": dropout,
                }
                | shape
            )
        )
    )
    return shaken(model).to(dtype)


def mlp() -> nn.Sequential:
    """A classifier of 7 numbers into V classes, not linear in anything."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(
            nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, V)).double()
        )


def shaken(model: Any) -> Any:
    """The same with noise on every weight but those that pad a vocabulary, which are 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
        for name, rows in getattr(model, "unpadded_rows", {}).items():
            model.get_parameter(name)[rows:] = 0
    return model


def token_batches(seed: int = 0, sizes: Sequence[int] = (2, 1, 1), masked: bool = True) -> Batches:
    """Micro-batches of so many sequences, which count unequal numbers of targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (sum(sizes), T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    if masked:
        targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
        targets[:, 0] = tokens[:, 1]  # every sequence counts something
    return list(zip(tokens[:, :-1].split(sizes), targets.split(sizes), strict=True))


def vector_batches(seed: int = 0, sizes: Sequence[int] = (3, 2, 1)) -> Batches:
    """Micro-batches of vectors and their classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(sum(sizes), 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (sum(sizes),), generator=generator)
    return list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))


def whole(batches: Batches) -> tuple[Tensor, Tensor]:
    """One batch of all."""
    return torch.cat([inputs for inputs, _ in batches]), torch.cat(
        [targets for _, targets in batches]
    )


# What the product says


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all numbers."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def weights_of(model: Any) -> Tensor:
    """Every weight as one vector."""
    return flat(list(getattr(model, "module", model).parameters()))


def adamw(model: Any, **keys: Any) -> torch.optim.AdamW:
    """AdamW over all parameters."""
    return torch.optim.AdamW(getattr(model, "module", model).parameters(), **({"lr": 0.01} | keys))


def warm(model: Any, optimizer: torch.optim.Optimizer, batches: Batches, steps: int = 2) -> None:
    """A few steps of the plain gradient, so that the optimiser has moments."""
    from optim import Gradient

    for _ in range(steps):
        Gradient(model).gradient(batches)
        optimizer.step()
        optimizer.zero_grad()


def taken(model: Any) -> Tensor:
    """p.grad as one vector, 0 where there is none; it is cleared."""
    parameters = list(getattr(model, "module", model).parameters())
    found = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    for p in parameters:
        p.grad = None
    return found


def rule_gradient(model: Any, batches: Sequence[Any], optimizer: Any = None, **axes: Any) -> Tensor:
    """The gradient of a fresh rule as one vector; a negative rho moves the other way."""
    return rule_step(model, batches, optimizer, **axes)[0]


def rule_step(
    model: Any, batches: Sequence[Any], optimizer: Any = None, **axes: Any
) -> tuple[Tensor, RuleResult]:
    """The same and the result."""
    rho = axes.pop("rho", 0.05)
    rule = SharpnessAware(model, optimizer or adamw(model), rho=abs(rho), **axes)
    rule.rho = rho
    result = rule.gradient(batches)
    assert result.finite
    return taken(model), result


@contextmanager
def visited(rule: Any) -> Iterator[list[Tensor]]:
    """The weights, as one vector, at every forward through the rule's model."""
    points: list[Tensor] = []
    original = rule.model.lazy_logits

    def noting(inputs: Any) -> Any:
        points.append(weights_of(rule.module))
        return original(inputs)

    rule.model.lazy_logits = noting
    try:
        yield points
    finally:
        del rule.model.lazy_logits  # the attribute of the instance: the method of the class is back


def perturbation(model: Any, batches: Sequence[Any], optimizer: Any = None, **axes: Any) -> Tensor:
    """e, the last point away from its weights that a fresh rule looks at less those; with groups
    that of the last."""
    rule = SharpnessAware(model, optimizer or adamw(model), **axes)
    before = weights_of(rule.module)
    with visited(rule) as points:
        assert rule.gradient(batches).finite
    taken(model)
    moves = [point - before for point in points]
    return next((move for move in reversed(moves) if move.any()), torch.zeros_like(before))


# What calculus says: torch.func, dense logits


class Reference:
    """Logits F(t) before soft-cap and z-loss, the mean loss over the counted targets, and
    derivatives of both, as functions of flat weights."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        losses: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, (self.inputs, self.targets) = model, whole(batches)
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]
        self.counted = self.targets != -100
        self.losses = losses or (
            lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none").view(
                y.shape
            )
        )
        self.t = weights_of(model)
        self.g = self.gradient(self.t)
        self.u = self.g / self.g.norm()

    def logits(self, t: Tensor) -> Tensor:
        parts = t.split([shape.numel() for shape in self.shapes])
        theta = {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        if isinstance(self.model, GPT):
            return functional_call(
                BeforeTheCap(self.model),
                {f"model.{name}": w for name, w in theta.items()},
                self.inputs,
            )
        return functional_call(self.model, theta, self.inputs)

    def of_logits(self, z: Tensor) -> Tensor:
        """L as a function of the logits."""
        if isinstance(self.model, GPT):
            config = self.model.config
            z = (
                z
                if config.logit_softcap is None
                else config.logit_softcap * torch.tanh(z / config.logit_softcap)
            )
            losses = self.losses(z, self.targets) + config.z_loss * z.logsumexp(-1).square()
        else:
            losses = self.losses(z, self.targets)
        return torch.where(self.counted, losses, 0).sum() / self.counted.sum()

    def loss(self, t: Tensor) -> Tensor:
        return self.of_logits(self.logits(t))

    def gradient(self, t: Tensor) -> Tensor:
        return grad(self.loss)(t)

    def r(self, t: Tensor) -> Tensor:
        """dL/dF at t."""
        return grad(self.of_logits)(self.logits(t))

    def pull(self, t: Tensor, r: Tensor) -> Tensor:
        """J(t)^T r."""
        return vjp(self.logits, t)[1](r)[0]

    def H(self, u: Tensor) -> Tensor:
        """The Hessian's product with u."""
        return jvp(grad(self.loss), (self.t,), (u,))[1]

    def functional_H(self, u: Tensor) -> Tensor:
        """That of the part that comes from the curvature of the network: sum_n r_n d2F_n."""
        r = self.r(self.t)
        return jvp(grad(lambda t: (r * self.logits(t)).sum()), (self.t,), (u,))[1]

    def G(self, u: Tensor) -> Tensor:
        """J^T (d2L/dF2) J u."""
        z, Ju = jvp(self.logits, (self.t,), (u,))
        return self.pull(self.t, jvp(grad(self.of_logits), (z,), (Ju,))[1])


class BeforeTheCap(nn.Module):
    """The logits of a GPT before any soft-cap."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BxT: Tensor) -> Tensor:
        return (
            self.model.hidden(tokens_BxT) @ self.model.unembedding[: self.model.config.vocab_size].T
        )


# How numbers are compared


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """The relative error in the Euclidean norm."""
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
    assert error <= tolerance, f"relative error {error:.1e}"


def assert_apart(one: Tensor, other: Tensor, least: float = 1e-4) -> None:
    """So that the test beside it can fail."""
    assert (one - other).norm() > least * other.norm()


def assert_order(errors: Sequence[float], order: int) -> None:
    """Each error belongs to half the radius of the one before and is 2^order times smaller."""
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(0.9 < ratio / 2**order < 1.1 for ratio in ratios), (
        f"errors {errors} shrink by {ratios}, not by {2**order}"
    )


def halved(rho: float, times: int = 3) -> list[float]:
    """rho, rho / 2, rho / 4 ..."""
    return [rho / 2**k for k in range(times)]


PROBLEMS: dict[str, Callable[[], tuple[Any, Batches]]] = {
    "gpt": lambda: (gpt(), token_batches()),
    "untied_rmsnorm_gpt": lambda: (
        gpt(norm="rmsnorm", positions="rope", activation="swiglu", mlp_width=12, tied=False),
        token_batches(),
    ),
    "mlp": lambda: (Adapter(mlp()), vector_batches()),
}
