"""What the weights move along: the direction q of every parameter, and the metric that scales it to
d = P q.

A direction of your own is a class with `__call__` under `@direction("name")`; optim.direction=name
then selects it:

    @direction("sign")
    class Sign(Direction):
        def __call__(self, name, parameter, gradient):
            return gradient.sign()
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conf.schema import DIRECTIONS, RuleConfig
from model.randomness import named_generator
from model.sharding import local, shard_of, sharded_as
from optim.perturbation import blocks, dot, norm


class Direction:
    """The gradient itself: q = g (Foret et al. 2021, 2010.01412), and the base of the other
    directions.

    needs_gradient    whether q is made of the clean gradient of this step; without, the clean pass
                      is spared
    sign              of the move: +1, or -1 where q points downhill
    seed              of noise, on every process that of the first; torch's when the rule was made
    rows              of a parameter, by name, without the padding of a vocabulary, where it has
                      some
    state             tensors by name that the next step depends on; a checkpoint keeps them"""

    needs_gradient = True
    sign = 1.0

    def __init__(self, axes: RuleConfig, optimizer: Optimizer) -> None:
        self.axes, self.optimizer, self.step, self.seed = axes, optimizer, 0, torch.initial_seed()
        self.state: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        """q of one parameter, given its clean gradient where `needs_gradient`; None leaves the
        parameter where it is."""
        return gradient

    def noise(self, name: str, parameter: Tensor, kind: str = "") -> Tensor:
        """Standard normal numbers of this step for a parameter, 0 where it is padding; another
        `kind` has others."""
        return noise(parameter, self.seed, self.step, kind + name, self.rows.get(name))

    def saw(self, gradients: dict[str, Tensor]) -> None:
        """Is told the clean gradient of the step, by name, after q was made; over all groups of a
        step, each weighted by its tokens."""

    def gave(self, gradients: dict[str, Tensor]) -> None:
        """Is told the gradient that the rule hands on, by name, unclipped. Neither is called with
        gradients that are not finite."""


def direction(name: str) -> Callable[[type[Direction]], type[Direction]]:
    """Registers a direction as optim.direction=name."""

    def register(cls: type[Direction]) -> type[Direction]:
        DIRECTIONS[name] = cls
        return cls

    return register


direction("gradient")(Direction)


@direction("momentum")
class Momentum(Direction):
    """q = -m, the first moment of the base optimiser, read only (Momentum-SAM, 2401.12033): m
    points uphill, and the step will go along -m, so that the gradient is taken ahead of it. No move
    before there is an m."""

    needs_gradient = False
    sign = -1.0

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        state = self.optimizer.state.get(parameter, {})
        return state.get("exp_avg", state.get("momentum_buffer"))


@direction("stale")
class Stale(Direction):
    """q = the gradient that the rule handed on in the last step (AsyncSAM). No move in the first
    step."""

    needs_gradient = False

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        return self.state.get(name)

    def gave(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if name in self.state:
                self.state[name].copy_(gradient)
            else:
                self.state[name] = gradient.clone()


@direction("friendly")
class Friendly(Direction):
    """q = g - sigma E with E <- decay E + (1 - decay) g after q was made, E = 0 at first (Friendly
    SAM, 2403.12350): what the gradients of late have in common is taken out of the ascent."""

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        assert gradient is not None
        return (
            gradient.sub(self.state[name], alpha=self.axes.friendly_sigma)
            if name in self.state
            else gradient
        )

    def saw(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if name not in self.state:
                self.state[name] = torch.zeros_like(gradient)
            self.state[name].lerp_(gradient, 1 - self.axes.friendly_decay)


@direction("random")
class Random(Direction):
    """q ~ N(0, I): a control that knows nothing of the loss. The draw is a function of the seed,
    the step and the name, and leaves the random stream of the run alone."""

    needs_gradient = False

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        return self.noise(name, parameter)


def noise(like: Tensor, seed: int, step: int, name: str, rows: int | None = None) -> Tensor:
    """Standard normal numbers in the shape of a parameter, block by block from generators of their
    own, seeded by (seed, step, name, block); of a sharded one this process's part. Past so many
    `rows` they are 0: padding that no loss sees would take its share of a radius. On CPUs, where a
    generator works in one thread, several draw at once."""
    full = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    drawn = [block for (block,) in blocks(full)]

    def draw(i: int) -> None:
        drawn[i].normal_(generator=named_generator(seed, f"{step}/{name}/{i}", like.device))

    if len(drawn) == 1:
        draw(0)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(draw, range(len(drawn))))
    if rows is not None:
        full[rows:] = 0
    return sharded_as(shard_of(full, like), like)


def scaled(
    axes: RuleConfig,
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    q: list[Tensor],
    gradients: list[Tensor | None],
) -> list[Tensor]:
    """d = P q of every parameter, in new tensors; for the euclidean metric q itself.

    adam        d = q / (v^ power + eps), v^ bias-corrected. second_moment=with_gradient takes v' =
                b2 v + (1 - b2) g^2, as this
                step would leave it, corrected for step + 1; before takes v as it stands, and P = 1
                before there is a v. v is only read.
    adaptive    d = T^2 q, T = |w| + floor for matrices and 1 for vectors (ASAM, 2102.11600)"""
    if axes.metric == "euclidean":
        return q
    if axes.metric == "adaptive":
        return [
            d if w.ndim < 2 else w.detach().abs().add_(axes.adaptive_floor).square_().mul_(d)
            for w, d in zip(parameters, q, strict=True)
        ]
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    return [
        adam(axes, settings[w], optimizer.state.get(w, {}), d, g)
        for w, d, g in zip(parameters, q, gradients, strict=True)
    ]


def adam(
    axes: RuleConfig,
    group: dict[str, Any],
    state: dict[str, Any],
    q: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """q / (v^ power + eps) for one parameter, in a new tensor."""
    b2, eps, v, step = (
        group["betas"][1],
        axes.metric_eps,
        state.get("exp_avg_sq"),
        float(state.get("step", 0)),
    )
    eps = group["eps"] if eps is None else eps
    ahead = axes.second_moment == "with_gradient"
    if v is None and not ahead:
        return q
    if ahead and gradient is None:  # nothing came of this parameter in this step
        if v is None:
            return torch.zeros_like(q)
        gradient = torch.zeros_like(q)
    correction = 1 - b2 ** (step + ahead)
    d = torch.empty_like(q)
    tensors = [d, q] + [gradient] * ahead + [v] * (v is not None)
    for out, along, *rest in blocks(*map(local, tensors)):
        if ahead:
            torch.mul(rest[0], rest[0], out=out).mul_((1 - b2) / correction)
            if v is not None:
                out.add_(rest[1], alpha=b2 / correction)
        else:
            torch.div(rest[0], correction, out=out)
        out = out.sqrt_() if axes.metric_power == 0.5 else out.pow_(axes.metric_power)
        never = out == 0 if eps == 0 else None  # had a gradient: does not move
        torch.div(along, out.add_(eps), out=out)
        if never is not None:
            out.masked_fill_(never, 0)
    return d


def length(axes: RuleConfig, d: list[Tensor], q: list[Tensor]) -> Tensor:
    """n(d), which the radius is measured by: |d|, |q| or sqrt(q.d); |T q| = sqrt(q.d) for the
    adaptive metric."""
    kind = {"euclidean": "l2", "adaptive": "dual", "adam": axes.metric_norm}[axes.metric]
    return dot(q, d).sqrt() if kind == "dual" else norm(d if kind == "l2" else q)
