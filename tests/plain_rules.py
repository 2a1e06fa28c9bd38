"""Every gradient rule and AdamW once more, from the equations alone: float64, the whole batch at
once, dense logits, torch.func.

Weights, gradients and moments are flat vectors of all P numbers; nothing is changed in place,
accumulated or kept lazy. Symbols: t weights, F logits before soft-cap and z-loss, J = dF/dt, L the
mean loss over the N counted tokens, r = dL/dF, g = J^T r, e the perturbation. Shapes: P weights, N
tokens, V vocabulary, B sequences, T time."""

import copy
import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp

from model import GPT

IGNORED = -100


class MicroBatch(NamedTuple):
    """Tokens, their targets, and the state of the random generator that draws their dropout masks,
    where there are any."""

    tokens_BxT: Tensor
    targets_BxT: Tensor
    state: Tensor | None = None


class PlainModel:
    """A copy of a GPT as functions of flat weights."""

    def __init__(self, model: GPT) -> None:
        self.softcap, self.z_loss = model.config.logit_softcap, model.config.z_loss
        self.model = copy.deepcopy(model)
        self.model.config = replace(model.config, logit_softcap=None)  # the cap belongs to the loss
        self.parameters = dict(self.model.named_parameters())

    def flat(self, tensors: dict[str, Tensor]) -> Tensor:
        """One vector of the tensors by name, in the model's order."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.parameters])

    def split(self, t_P: Tensor) -> dict[str, Tensor]:
        """The inverse of `flat`."""
        parts = t_P.split([p.numel() for p in self.parameters.values()])
        return {
            name: part.view(p.shape)
            for part, (name, p) in zip(parts, self.parameters.items(), strict=True)
        }

    def where(self, chosen) -> Tensor:
        """1 for the weights of the parameters whose (name, parameter) are chosen, else 0."""
        return self.flat(
            {
                name: torch.full_like(p, float(chosen(name, p)))
                for name, p in self.parameters.items()
            }
        )

    def perturbed(self, pattern: str) -> Tensor:
        """1 where `pattern` allows to move the weights, else 0."""
        head = "embedding.weight" if self.model.config.tied else "head.weight"
        chosen = {
            "all": lambda name: True,
            "no_embeddings": lambda name: name not in ("embedding.weight", "positions.weight"),
            "no_norms": lambda name: "norm" not in name,
            "head": lambda name: name == head,
        }.get(pattern, lambda name: fnmatchcase(name, pattern))
        return self.where(lambda name, p: chosen(name))

    def real(self) -> Tensor:
        """1 for all weights but those of rows past the vocabulary, which are there for the hardware
        alone."""
        real_P = self.where(lambda name, p: True)
        for name, rows in self.split(real_P).items():
            if name in ("embedding.weight", "head.weight"):
                rows[self.model.config.vocab_size :] = 0
        return real_P


class Loss:
    """The mean loss over the counted tokens of some micro-batches; `w_B` weighs the sequences."""

    def __init__(self, plain: PlainModel, micro: list[MicroBatch]) -> None:
        self.plain = plain
        if all(m.state is None for m in micro):
            micro = [
                MicroBatch(
                    torch.cat([m.tokens_BxT for m in micro]),
                    torch.cat([m.targets_BxT for m in micro]),
                )
            ]
        self.micro = micro  # dropout masks are drawn by the micro-batch
        self.tokens_BxT = torch.cat([m.tokens_BxT for m in micro])
        self.targets_BxT = torch.cat([m.targets_BxT for m in micro])
        self.counted_BxT = (self.targets_BxT != IGNORED).double()
        self.tokens = int(self.counted_BxT.sum())

    def first(self, share: float) -> "Loss":
        """The loss of the first share of the sequences, at least one."""
        assert share == 1 or self.micro[0].state is None
        n = max(1, round(share * len(self.tokens_BxT)))
        return (
            self
            if share == 1
            else Loss(self.plain, [MicroBatch(self.tokens_BxT[:n], self.targets_BxT[:n])])
        )

    def F(self, t: Tensor) -> Tensor:
        """Logits B x T x V."""
        theta, logits = self.plain.split(t), []
        with torch.random.fork_rng():
            for tokens_BxT, _, state in self.micro:
                if state is not None:
                    torch.set_rng_state(state)
                logits.append(functional_call(self.plain.model, theta, tokens_BxT))
        return torch.cat(logits)

    def token_losses(self, F: Tensor) -> Tensor:
        """l_BxT, 0 where the target is not counted."""
        z = (
            F
            if self.plain.softcap is None
            else self.plain.softcap * torch.tanh(F / self.plain.softcap)
        )
        lse = z.logsumexp(-1)
        target = z.gather(-1, self.targets_BxT.clamp_min(0)[..., None])[..., 0]
        return (lse - target + self.plain.z_loss * lse**2) * self.counted_BxT

    def of_logits(self, F: Tensor, w_B: Tensor | None = None) -> Tensor:
        """L = sum_i w_i sum_n l_in / N."""
        losses_B = self.token_losses(F).sum(1)
        return (losses_B if w_B is None else losses_B * w_B).sum() / max(1, self.tokens)

    def at(self, t: Tensor) -> float:
        """L(t)."""
        return self.of_logits(self.F(t)).item()

    def r(self, t: Tensor, w_B: Tensor | None = None) -> Tensor:
        """dL/dF at t."""
        return grad(self.of_logits)(self.F(t), w_B)

    def pull(self, t: Tensor, r: Tensor) -> Tensor:
        """J(t)^T r."""
        return vjp(self.F, t)[1](r)[0]

    def g(self, t: Tensor, w_B: Tensor | None = None) -> Tensor:
        """dL/dt = J(t)^T r(t)."""
        return grad(lambda t: self.of_logits(self.F(t), w_B))(t)

    def sequence_losses(self, t: Tensor) -> Tensor:
        """l_i, the mean over the n_i counted tokens of sequence i."""
        return self.token_losses(self.F(t)).sum(1) / self.counted_BxT.sum(1).clamp_min(1)


@dataclass
class AdamW:
    """m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, t -= lr (m / (1-b1^k) / (sqrt(v / (1-b2^k)) +
    eps) + decay t), decay 0 for vectors."""

    lr: float
    decay: Tensor
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    steps: int = 0

    def __post_init__(self) -> None:
        self.m = self.v = torch.zeros_like(self.decay)

    def step(self, t: Tensor, g: Tensor) -> Tensor:
        """The weights after a step."""
        self.steps += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m, v = self.m / (1 - self.beta1**self.steps), self.v / (1 - self.beta2**self.steps)
        return t - self.lr * (m / (v.sqrt() + self.eps) + self.decay * t)


@dataclass
class Axes:
    """The axes of a rule and their defaults."""

    path: str = "full"
    direction: str = "gradient"
    metric: str = "euclidean"
    scope: str = "batch"
    weights: str = "uniform"
    combine: str = "replace"
    rho: float = 0.05
    start: int = 0
    stop: int | None = None
    period: int = 1
    ascent_fraction: float = 1.0
    parameters: str = "all"
    angle: float = 45.0
    angle_norm: str = "max"
    second_moment: str = "with_gradient"
    metric_power: float = 0.5
    metric_eps: float | None = None
    metric_norm: str = "l2"
    adaptive_floor: float = 0.01
    friendly_sigma: float = 1.0
    friendly_decay: float = 0.9
    alpha: float = 0.7
    delta_sigma: float = 0.15
    delta_power: float = 1.0
    delta_probe: str = "central"
    delta_descent: str = "plain"


class PlainResult(NamedTuple):
    """The rule's gradient, the plain one, and the mean losses at the weights and at the moved
    point."""

    gradient: Tensor
    clean: Tensor
    loss: float
    perturbed_loss: float | None


class PlainRule:
    """A rule with its memory: the EMA of the ascent gradient, which starts at 0, the last rule
    gradient, LookSAM's g_v, and the step."""

    def __init__(self, plain: PlainModel, axes: Axes) -> None:
        self.plain, self.axes, self.step = plain, axes, 0
        self.mask, self.matrix = (
            plain.perturbed(axes.parameters),
            plain.where(lambda name, p: p.ndim >= 2),
        )
        self.noisy = self.mask * plain.real()  # what noise moves
        self.ema = self.last = torch.zeros_like(self.mask)
        self.g_v: Tensor | None = None

    def gradient(
        self, t: Tensor, groups: list[list[MicroBatch]], adam: AdamW, *noise: Tensor
    ) -> PlainResult:
        """The gradient of one step. `noise`: standard normal numbers for delta-SAM's probes (z, or
        z and z'), or the random direction."""
        a, everything = self.axes, [m for group in groups for m in group]
        whole = Loss(self.plain, everything)
        inside = a.start <= self.step and (a.stop is None or self.step < a.stop)
        g, perturbed_loss = whole.g(t), None
        ascent = g
        if inside and (self.step - a.start) % a.period == 0:
            parts = [
                Loss(self.plain, group)
                for group in ([everything] if a.scope == "batch" else groups)
            ]
            moved = [
                (part.tokens, self.moved(t, part, adam, *noise)) for part in parts if part.tokens
            ]
            ascent, result, perturbed_loss = (
                sum(n / whole.tokens * values[i] for n, values in moved) for i in range(3)
            )
            result = self.combined(g, result)
        elif inside and a.combine == "reuse" and self.g_v is not None:
            result = g + a.alpha * g.norm() / self.g_v.norm() * self.g_v
        else:
            result = g
        self.ema, self.last = a.friendly_decay * self.ema + (1 - a.friendly_decay) * ascent, result
        self.step += 1
        return PlainResult(result, g, whole.at(t), perturbed_loss)

    def moved(
        self, t: Tensor, loss: Loss, adam: AdamW, *noise: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Of one group: the gradient of its ascent loss, what the path makes of the moved point,
        and the loss there."""
        a, some = self.axes, loss.first(self.axes.ascent_fraction)
        w_B = self.delta_weights(t, some, *noise) if a.weights == "delta" else None
        g = some.g(t, w_B)
        t_moved = t + self.perturbation(t, g, adam, *noise)
        return (
            g,
            self.along_path(t, t_moved, loss, w_B if a.delta_descent == "reweighted" else None),
            loss.at(t_moved),
        )

    def perturbation(self, t: Tensor, g: Tensor, adam: AdamW, *noise: Tensor) -> Tensor:
        """e = rho P q / n."""
        d, n = self.scaled(t, self.mask * self.direction(g, adam, *noise), g, adam)
        return self.axes.rho * d / n if n > 0 else torch.zeros_like(t)

    def direction(self, g: Tensor, adam: AdamW, *noise: Tensor) -> Tensor:
        """q."""
        choices = {
            "gradient": lambda: g,
            "momentum": lambda: -adam.m,
            "stale": lambda: self.last,
            "friendly": lambda: g - self.axes.friendly_sigma * self.ema,
            "random": lambda: self.noisy * noise[0],
        }
        return choices[self.axes.direction]()

    def scaled(self, t: Tensor, q: Tensor, g: Tensor, adam: AdamW) -> tuple[Tensor, Tensor]:
        """d = P q, and the norm n that is to be rho."""
        a = self.axes
        if a.metric == "euclidean":
            return q, q.norm()
        if a.metric == "adaptive":
            T = self.matrix * (t.abs() + a.adaptive_floor) + (1 - self.matrix)
            return T**2 * q, (T * q).norm()
        if a.second_moment == "with_gradient":
            v = (adam.beta2 * adam.v + (1 - adam.beta2) * g**2) / (
                1 - adam.beta2 ** (adam.steps + 1)
            )
        elif adam.steps:
            v = adam.v / (1 - adam.beta2**adam.steps)
        else:
            return q, q.norm()
        d = q / (v**a.metric_power + (adam.eps if a.metric_eps is None else a.metric_eps))
        return d, {"l2": d.norm(), "raw": q.norm(), "dual": (q @ d).sqrt()}[a.metric_norm]

    def along_path(
        self, t: Tensor, t_moved: Tensor, loss: Loss, w_B: Tensor | None = None
    ) -> Tensor:
        """The methods' table, column by column of `path`."""
        a = self.axes
        if a.path == "full":
            return loss.g(t_moved, w_B)
        if a.path == "functional":
            return loss.pull(t_moved, loss.r(t, w_B))
        if a.path == "logit":
            return loss.pull(t, loss.r(t_moved, w_B))
        assert a.path == "angle"
        cos, sin = math.cos(math.radians(a.angle)), math.sin(math.radians(a.angle))
        c = 1 / max(cos, sin) if a.angle_norm == "max" else math.sqrt(2)
        alpha, beta = c * cos, c * sin
        r, r_moved = loss.r(t, w_B), loss.r(t_moved, w_B)
        return loss.pull(t, (1 - alpha - beta) * r + alpha * r_moved) + beta * loss.pull(t_moved, r)

    def combined(self, g: Tensor, moved: Tensor) -> Tensor:
        """replace, reuse (LookSAM) or orthogonal (GSAM)."""
        if self.axes.combine == "reuse":
            self.g_v = moved - (moved @ g) / (g @ g) * g
        if self.axes.combine == "orthogonal":
            return moved - self.axes.alpha * (g - (g @ moved) / (moved @ moved) * moved)
        return moved

    def delta_weights(self, t: Tensor, loss: Loss, *noise: Tensor) -> Tensor:
        """w_i = c_i^p N / sum_j n_j c_j^p, c_i the second difference of l_i along z, or z and z', ~
        N(0, sigma^2 rms(t)^2)."""
        a, at, n_B = self.axes, loss.sequence_losses, loss.counted_BxT.sum(1)
        rms = ((self.noisy * t) ** 2).sum().sqrt() / self.noisy.sum().sqrt()
        z = [a.delta_sigma * rms * self.noisy * numbers for numbers in noise]
        if a.delta_probe == "central":
            c_B = (at(t + z[0]) + at(t - z[0]) - 2 * at(t)).abs() / (z[0] @ z[0])
        else:
            c_B = (at(t + z[0] + z[1]) - at(t + z[0]) - at(t + z[1]) + at(t)).abs()
        c_B = torch.where(n_B > 0, c_B**a.delta_power, 0.0)
        return c_B * loss.tokens / (n_B * c_B).sum()
