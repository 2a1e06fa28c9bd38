"""Directions: q of every parameter, along which the weights move.

A direction of your own is a class with `__call__` under `@direction("name")`; optim.direction=name
then selects it:

    @direction("sign")
    class Sign(Direction):
        copies = 1  # q is a tensor of its own beside the gradient, which the memory plan counts

        def __call__(self, name, parameter, gradient):
            return gradient.sign()
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conf.rule import DIRECTIONS, RuleConfig
from model.randomness import named_generator
from model.sharding import shard_of, sharded_as
from optim.rule.tensors import blocks

direction = DIRECTIONS.register


@direction("gradient")
class Direction:
    """q = g, the gradient itself (SAM, 2010.01412), and the base of the other directions.

    needs_gradient    whether q is made of the clean gradient of this step; without, the clean pass
                      is spared
    copies            of the moved parameters that making q takes
    memory            copies of the moved parameters that `state` holds from step to step
    sign              of the move: +1, or -1 where it goes against what `__call__` returns
    step              its number, counted from 0
    seed              of noise, on every process that of the first; torch's when the rule was made
    rows              of a parameter, by name, without the padding of a vocabulary, where it has
                      some
    state             tensors by name that the next step depends on; a checkpoint keeps them"""

    needs_gradient = True
    copies = 0
    memory = 0
    sign = 1.0

    def __init__(self, axes: RuleConfig, optimizer: Optimizer) -> None:
        self.axes = axes
        self.optimizer = optimizer
        self.step = 0
        self.seed = torch.initial_seed()
        self.state: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    @classmethod
    def check(cls, name: str, group: dict[str, Any]) -> None:
        """Raises ValueError where the optimiser's group of a parameter lacks what q reads."""

    @classmethod
    def observes_gradient(cls) -> bool:
        """Returns whether the clean gradient is handed to `observe_gradient`."""
        return cls.observe_gradient is not Direction.observe_gradient

    @classmethod
    def observes_update(cls) -> bool:
        """Returns whether the rule's gradient is handed to `observe_update`."""
        return cls.observe_update is not Direction.observe_update

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        """Returns q of one parameter, a tensor like it, given its clean gradient where
        `needs_gradient`, which stays as it is; None leaves the parameter where it is."""
        return gradient

    def noise(self, name: str, parameter: Tensor, kind: str = "") -> Tensor:
        """Returns standard normal numbers of this step for a parameter, 0 where it is padding;
        another `kind` has others."""
        return noise(parameter, self.seed, self.step, kind + name, self.rows.get(name))

    def observe_gradient(self, gradients: dict[str, Tensor]) -> None:
        """Receives the clean gradient of the step, by name, after q was made: over all groups of
        the step, each weighted by its tokens. It is always finite."""

    def observe_update(self, gradients: dict[str, Tensor]) -> None:
        """Receives the gradient that the rule hands on, by name, unclipped and finite."""


def q_of(
    direction: Direction, name: str, parameter: Tensor, gradient: Tensor | None
) -> Tensor | None:
    """Returns q of one parameter by a direction. Raises ValueError for a q that is unlike its
    parameter, and for a gradient that was changed: the step goes on with it."""
    version = None if gradient is None else gradient._version
    q: Any = direction(name, parameter, gradient)
    title = f"direction={direction.axes.direction} of {name}"
    if gradient is not None and gradient._version != version:
        raise ValueError(f"{title} changed the gradient in place; return a tensor of its own")
    if q is None:
        return None
    if not isinstance(q, Tensor):
        raise ValueError(f"{title} returned {type(q).__name__}; return a tensor, or None")
    if q.shape != parameter.shape:
        raise ValueError(
            f"{title} has shape {list(q.shape)}; return a tensor like the parameter, of"
            f" {list(parameter.shape)}"
        )
    return q


@direction("momentum")
class Momentum(Direction):
    """q = m, the first moment of the base optimiser, read only, and a move along -m (Momentum-SAM,
    2401.12033).

    m points uphill, and the step will go along -m, so that the gradient is taken ahead of it.
    Nothing moves before there is an m."""

    needs_gradient = False
    sign = -1.0

    @classmethod
    def check(cls, name: str, group: dict[str, Any]) -> None:
        if not (group.get("betas") or group.get("momentum")):
            raise ValueError(
                f"direction=momentum needs a momentum of {name}, which the optimiser does not keep;"
                " use AdamW or SGD with momentum"
            )

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        # Adam's first moment, or the buffer of SGD and Muon; both point uphill.
        state = self.optimizer.state.get(parameter, {})
        return state.get("exp_avg", state.get("momentum_buffer"))


@direction("stale")
class Stale(Direction):
    """q = the gradient that the rule handed on in the last step (AsyncSAM). Nothing moves in the
    first step."""

    needs_gradient = False
    memory = 1

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        return self.state.get(name)

    def observe_update(self, gradients: dict[str, Tensor]) -> None:
        # A copy: p.grad is clipped after this, and emptied before the next step.
        for name, gradient in gradients.items():
            if name in self.state:
                self.state[name].copy_(gradient)
            else:
                self.state[name] = gradient.clone()


@direction("friendly")
class Friendly(Direction):
    """q = g - sigma E, E <- decay E + (1 - decay) g after q was made, E = 0 at first (Friendly SAM,
    2403.12350): what the gradients of late have in common is taken out of the ascent."""

    copies = 1
    memory = 1

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        assert gradient is not None
        # E = 0 at first: the first direction is g.
        if name not in self.state:
            return gradient
        return gradient.sub(self.state[name], alpha=self.axes.friendly_sigma)

    def observe_gradient(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if name not in self.state:
                self.state[name] = torch.zeros_like(gradient)
            self.state[name].lerp_(gradient, 1 - self.axes.friendly_decay)


@direction("random")
class Random(Direction):
    """q ~ N(0, I): a control that knows nothing of the loss. The draw is a function of the seed,
    the step and the name, and leaves the random stream of the run alone."""

    needs_gradient = False
    copies = 1

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        return self.noise(name, parameter)


def noise(like: Tensor, seed: int, step: int, name: str, rows: int | None = None) -> Tensor:
    """Returns standard normal numbers in the shape of a parameter, of a sharded one this process's
    part. Every block of them has a generator of its own, seeded by (seed, step, name, block). Rows
    from `rows` on are 0: padding that no loss sees would take its share of a radius. On CPUs,
    where a generator works in one thread, several draw at once."""
    # Every process draws the whole tensor and cuts its part: numbers do not depend on the shards.
    full = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    drawn = [block for (block,) in blocks(full)]

    def draw(i: int) -> None:
        drawn[i].normal_(generator=named_generator(seed, f"{step}/{name}/{i}", like.device))

    # Which thread draws a block changes nothing: every block has a generator of its own.
    if len(drawn) == 1:
        draw(0)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(draw, range(len(drawn))))
    if rows is not None:
        full[rows:] = 0
    return sharded_as(shard_of(full, like), like)
