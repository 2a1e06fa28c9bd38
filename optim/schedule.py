"""How long a run is, and its learning rate at every step."""

import math
from dataclasses import dataclass

from conf.schema import OptimConfig, ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """The horizon of a run and its learning rate, in units of optimiser steps.

    With progress p = (s - warmup) / (steps - warmup) and f = final, the rate of step s = 0, 1, ... as a fraction of the peak is

        warm-up    start + (1 - start) s / warmup             while s < warmup
        cosine     f + (1 - f) (1 + cos(pi p)) / 2
        linear     1 - (1 - f) p
        wsd        1 until p = 1 - decay_steps / (steps - warmup), then linearly to f   (warm-up, stable, decay)
        constant   1
    """

    steps: int
    warmup: int
    peak: float
    shape: str = "cosine"
    start: float = 0.0
    final: float = 0.1
    decay_steps: int = 0

    def lr(self, step: int) -> float:
        """Learning rate of the update from `step` to `step + 1`."""
        return self.peak * self.fraction(step)

    def fraction(self, step: int) -> float:
        """Learning rate as a fraction of the peak."""
        if step < self.warmup:
            return self.start + (1 - self.start) * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.shape == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        if self.shape == "linear":
            return 1 - (1 - self.final) * progress
        if self.shape == "wsd":
            return 1 - (1 - self.final) * max(0.0, 1 - (self.steps - step) / self.decay_steps)
        return 1.0


def build_schedule(config: ScheduleConfig, optim: OptimConfig, tokens_per_step: int, num_parameters: int) -> Schedule:
    """The schedule of a run of `num_parameters` counted parameters. A horizon in tokens is rounded up to whole steps.

    Raises ValueError where the warm-up, the decay or the first perturbed step lies beyond the horizon."""
    if config.name == "chinchilla":
        steps = math.ceil(config.tokens_per_parameter * num_parameters / tokens_per_step)
    elif config.tokens is not None:
        steps = math.ceil(config.tokens / tokens_per_step)
    else:
        assert config.steps is not None
        steps = config.steps
    warmup = round(config.warmup * steps) if config.warmup_steps is None else config.warmup_steps
    decay_steps = max(1, round(config.decay * steps)) if config.shape == "wsd" else 0
    if warmup >= steps:
        given = f"schedule.warmup={config.warmup:g}" if config.warmup_steps is None else f"schedule.warmup_steps={warmup}"
        raise ValueError(f"{given} reaches beyond the horizon of {steps} steps; shorten the warm-up or lengthen the run")
    if warmup + decay_steps > steps:
        raise ValueError(f"schedule.decay={config.decay:g} overlaps the warm-up of {warmup} steps in {steps}; lower schedule.decay or the warm-up")
    if optim.path != "none" and (optim.start if optim.start >= 1 else optim.start * steps) >= steps:
        raise ValueError(f"optim.start={optim.start:g} lies beyond the horizon of {steps} steps: the rule would never act; start earlier")
    return Schedule(steps, warmup, optim.lr, config.shape, config.start, config.final, decay_steps)
