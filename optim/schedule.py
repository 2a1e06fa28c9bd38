"""How long a run is, and its learning rate at every step."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from conf.key import STEPS
from conf.rule import OptimConfig
from conf.schema import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """The horizon of a run, its learning rate and its radius, in units of optimiser steps.

    With progress p = (s - warmup) / (steps - warmup) and f = final, the rate of step s = 0, 1, ...
    as a fraction of the peak is

        warm-up    start + (1 - start) s / warmup             while s < warmup
        cosine     f + (1 - f) (1 + cos(pi p)) / 2
        linear     1 - (1 - f) p
        wsd        1 until p = 1 - decay_steps / (steps - warmup), then linearly to f   (warm-up,
                   stable, decay)
        constant   1

    A rule that moves the weights does so from step `first` to before `stop`, every `period`-th
    step. Its radius, with p = (s - first) / (stop - first), is as a fraction of rho

        constant   1
        warmup     min(1, p / rho_warmup)
        cosine     (1 + cos(pi p)) / 2
        lr         the learning rate's fraction
    """

    steps: int
    warmup: int
    peak: float
    shape: str = "cosine"
    start: float = 0.0
    final: float = 0.1
    decay_steps: int = 0
    first: int = 0
    stop: int = 0
    period: int = 1
    rho: float = 0.0
    rho_shape: str = "constant"
    rho_warmup: float = 0.1

    def lr(self, step: int) -> float:
        """Returns the learning rate of the update from `step` to `step + 1`."""
        return self.peak * self.fraction(step)

    def radius(self, step: int) -> float:
        """Returns the radius of the perturbation in the same update."""
        # Of the span that moves the weights, not of the run: a late rule warms up when it begins.
        progress = max(0, step - self.first) / max(1, self.stop - self.first)
        fractions = {
            "constant": 1.0,
            "warmup": min(1.0, progress / self.rho_warmup),
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }
        if self.rho_shape == "lr":
            return self.rho * self.fraction(step)
        return self.rho * fractions[self.rho_shape]

    def moves(self, step: int) -> bool:
        """Returns whether the rule moves the weights in the same update."""
        return step in range(self.first, self.stop, self.period)

    @property
    def perturbed_steps(self) -> int:
        """The number of steps that move the weights."""
        return len(range(self.first, self.stop, self.period))

    def fraction(self, step: int) -> float:
        """Returns the learning rate as a fraction of the peak."""
        if step < self.warmup:
            return self.start + (1 - self.start) * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.shape == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        if self.shape == "linear":
            return 1 - (1 - self.final) * progress
        if self.shape == "wsd":
            # The last factor is 0 until the decay begins, and rises to 1 at the end.
            return 1 - (1 - self.final) * max(0.0, 1 - (self.steps - step) / self.decay_steps)
        return 1.0


def build_schedule(
    config: ScheduleConfig,
    optim: OptimConfig,
    tokens_per_step: int,
    num_parameters: int,
    perturbed_cost: float = 1.0,
) -> Schedule:
    """Returns the schedule of a run of `num_parameters` counted parameters. A horizon in tokens is
    rounded up to whole steps. With optim.compute_matched it is the longest one whose FLOPs do not
    exceed those of the plain gradient over the full horizon, where a perturbed step costs
    `perturbed_cost` plain ones; what rows measure (logit statistics, diagnostics) is not counted
    there.

    Raises ValueError where the horizon is longer than any, or the warm-up, the decay or the first
    perturbed step lies beyond the horizon."""
    steps = horizon(config, tokens_per_step, num_parameters)
    if optim.path != "none" and optim.compute_matched:
        steps = matched(steps, optim, perturbed_cost)
    return make_schedule(steps, config, optim)


def horizon(config: ScheduleConfig, tokens_per_step: int, num_parameters: int) -> int:
    """Returns the steps of a full run. Raises ValueError for more than any run has."""
    if config.name == "chinchilla":
        given = f"tokens_per_parameter={config.tokens_per_parameter:g}"
        steps = math.ceil(config.tokens_per_parameter * num_parameters / tokens_per_step)
    elif config.tokens is not None:
        given = f"tokens={config.tokens:g}"
        steps = math.ceil(config.tokens / tokens_per_step)
    else:
        assert config.steps is not None
        return config.steps
    if steps > STEPS:
        raise ValueError(
            f"schedule.{given} makes {steps:.3g} steps of {tokens_per_step:,} tokens, where"
            f" {STEPS:,} are the most; lower it"
        )
    return steps


def matched(steps: int, optim: OptimConfig, perturbed_cost: float) -> int:
    """Returns the longest horizon whose cost does not exceed that of `steps` plain ones."""

    def cost(horizon: int) -> float:
        return horizon + (perturbed_cost - 1) * len(range(*span(optim, horizon), optim.period))

    # A little more than the budget, so that rounding does not cost a step of an exact match.
    budget = steps * (1 + 1e-12)
    # The cost rises with the horizon but for the rounding of the first and last perturbed step,
    # which a few horizons make up for.
    near = bisect_right(range(1, steps + 1), budget, key=cost) + math.ceil(4 * perturbed_cost)
    return next((steps for steps in range(min(steps, near), 0, -1) if cost(steps) <= budget), 1)


def span(optim: OptimConfig, steps: int) -> tuple[int, int]:
    """Returns the first perturbed step and the first no longer perturbed, of a horizon."""
    # From 1 on a number is a step, below it a fraction of the horizon; a stop of 1 is all of it.
    first = optim.start if optim.start >= 1 else optim.start * steps
    if optim.stop is None:
        stop: float = steps
    else:
        stop = optim.stop if optim.stop > 1 else optim.stop * steps
    return round(first), min(steps, round(stop))


def make_schedule(steps: int, config: ScheduleConfig, optim: OptimConfig) -> Schedule:
    """Returns the schedule over a horizon."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup * steps)
    decay_steps = 0
    if config.shape == "wsd":
        decay_steps = max(1, round(config.decay * steps))
    check_phases(steps, warmup, decay_steps, config)
    plain = Schedule(steps, warmup, optim.lr, config.shape, config.start, config.final, decay_steps)
    if optim.path == "none":
        return plain
    first, stop = span(optim, steps)
    if first >= steps:
        raise ValueError(
            f"optim.start={optim.start:g} lies beyond the horizon of {steps} steps: the rule would"
            " never act; start earlier"
        )
    if first >= stop:
        raise ValueError(
            f"optim.stop={optim.stop:g} is not after optim.start={optim.start:g}: the rule would"
            " never act; stop later"
        )
    return replace(
        plain,
        first=first,
        stop=stop,
        period=optim.period,
        rho=optim.rho,
        rho_shape=optim.rho_schedule,
        rho_warmup=optim.rho_warmup,
    )


def check_phases(steps: int, warmup: int, decay_steps: int, config: ScheduleConfig) -> None:
    """Raises ValueError where the warm-up and the decay do not fit into the horizon."""
    if warmup >= steps:
        given = f"schedule.warmup_steps={warmup}"
        if config.warmup_steps is None:
            given = f"schedule.warmup={config.warmup:g}"
        raise ValueError(
            f"{given} reaches beyond the horizon of {steps} steps; shorten the warm-up or lengthen"
            " the run"
        )
    if warmup + decay_steps > steps:
        raise ValueError(
            f"schedule.decay={config.decay:g} overlaps the warm-up of {warmup} steps in {steps};"
            " lower schedule.decay or the warm-up"
        )
