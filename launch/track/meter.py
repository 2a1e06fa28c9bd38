"""How far a run has come, and how fast."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from launch.plan.plan import Plan
from model.device import peak_flops


@dataclass
class Progress:
    """How far a run has come: with weights, optimiser and random state, all that the next step
    depends on."""

    step: int = 0
    tokens: int = 0  # counted targets trained on
    flops: int = 0  # of every pass, and of what rows measure: logit statistics, diagnostics
    forwards: float = 0.0  # passes over a step's batch
    backwards: float = 0.0
    seconds: float = 0.0  # spent in steps, over all starts
    perturbed: int = 0  # steps that moved the weights
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0  # since the last row
    loss_tokens: int = 0
    logged: int = -1  # step of the last row
    evaluated: int = -1  # step of the last evaluation
    validation: dict[str, float] = field(default_factory=dict)  # what it found
    # what the rule found in the step that the next row tells of
    measured: dict[str, float] = field(default_factory=dict)
    # of this step, not logged yet: it waits for the step's evaluation
    row: dict[str, Any] = field(default_factory=dict)


class Interval:
    """What goes by from one row to the next, evaluations and saves left out: the speeds of a row
    are taken over it."""

    def __init__(self, progress: Progress, waited: float) -> None:
        self.began, self.first, self.waited = time.perf_counter(), replace(progress), waited

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def speeds(
        self,
        progress: Progress,
        waited: float,
        plan: Plan,
        recomputes: bool,
        device: torch.device,
        world: int,
    ) -> dict[str, float]:
        """Returns the speeds of a row: tokens a second over all processes and the share of time
        spent waiting for data; on GPUs their memory and, where their peak is known, the shares of
        all devices' peak that AdamW's passes would need (mfu) and that was executed, recomputed
        blocks included (hardware_mfu).

        Args:
            progress: how far the run has come
            waited: seconds of waiting for data so far
            plan: what a step costs
            recomputes: whether the backward runs the forward of each block again
            device: of this process
            world: the number of processes, each with a device of its own
        """
        seconds = time.perf_counter() - self.began
        found = {
            "perf/tokens_per_second": (progress.tokens - self.first.tokens) / seconds,
            "perf/data_wait": (waited - self.waited) / seconds,
        }
        if device.type == "cuda":
            found["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak := peak_flops(device):
            useful = plan.flops_per_step * (progress.step - self.first.step)
            recomputed = (
                recomputes * (plan.forward.body + plan.forward.attention) * plan.tokens_per_step
            )
            executed = (
                progress.flops
                - self.first.flops
                + recomputed * (progress.backwards - self.first.backwards)
            )
            available = seconds * peak * world
            found |= {"perf/mfu": useful / available, "perf/hardware_mfu": executed / available}
        return found
