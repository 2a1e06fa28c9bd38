"""When a row of metrics.jsonl is due, and what it tells of the steps since the one before."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from launch.plan.plan import Plan
from launch.track.progress import Progress
from model.device import peak_flops
from optim import Schedule


@dataclass
class LogSchedule:
    """Which steps' figures the rows of metrics.jsonl hold.

    With every=10, the row of step 20 tells of the updates from steps 10 to 19. It holds the
    figures of the last of them that moves the weights, which is 18 with optim.period=3; where none
    does, of the last.

    schedule             says which steps move the weights
    every                steps between rows
    diagnostics_every    rows between diagnostics that cost passes; None: there are none
    """

    schedule: Schedule
    every: int
    diagnostics_every: int | None

    def first_of_row(self, step: int) -> int:
        """Returns the first step of the row that tells of the update from `step`."""
        return step // self.every * self.every

    def row(self, step: int) -> int:
        """Returns the step of the row that tells of the update from `step`."""
        return min(self.first_of_row(step) + self.every, self.schedule.steps)

    def is_measured(self, step: int) -> bool:
        """Returns whether a row holds the figures of the update from `step`."""
        last = self.row(step) - 1
        return step == self._last_move(self.first_of_row(step), last, otherwise=last)

    def is_diagnosed(self, step: int) -> bool:
        """Returns whether the diagnostics of the update from `step` are due: in the first row with
        a move since a multiple of `diagnostics_every` rows."""
        every = self.diagnostics_every
        # They look at a move that a row measures.
        if not every or not self.schedule.moves(step) or not self.is_measured(step):
            return False
        # Due where a multiple of `every` rows lies between the row with the last move and this one:
        # with stretches of plain steps the row itself may be no multiple.
        first = self.first_of_row(step)
        before = self._last_move(0, first - 1, otherwise=-self.every)
        rows, rows_before = first // self.every + 1, before // self.every + 1
        return rows // every > rows_before // every

    def _last_move(self, first: int, last: int, otherwise: int) -> int:
        """Returns the last step of a range that moves the weights."""
        steps = range(last, first - 1, -1)
        return next((step for step in steps if self.schedule.moves(step)), otherwise)


class Meter:
    """Measures what goes by from one row to the next, evaluations and saves left out.

    plan          what a step costs
    device        of this process
    world         the number of processes, each with a device of its own
    recomputes    whether the backward runs the forward of each block again
    """

    def __init__(self, plan: Plan, device: torch.device, world: int, recomputes: bool) -> None:
        self.plan, self.device, self.world, self.recomputes = plan, device, world, recomputes

    def begin(self, progress: Progress, waited: float) -> None:
        """Begins a row, after `waited` seconds of waiting for data."""
        self.began, self.first, self.waited = time.perf_counter(), replace(progress), waited

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock."""
        # The row seems to begin later by what the pause took.
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def row(self, progress: Progress, waited: float, lr: float, norm: float) -> dict[str, Any]:
        """Returns what the row of a step tells, with means and speeds since the row before, and
        begins the next.

        Args:
            progress: how far the run has come; its sums begin anew
            waited: seconds of waiting for data so far
            lr: learning rate of the step
            norm: of its gradient, before it was clipped
        """
        # A mean over tokens, for batches may count different numbers of them. There is none where
        # all steps were skipped, or the rule takes no pass at the clean weights.
        mean = None
        if progress.loss_tokens:
            mean = progress.loss_sum / progress.loss_tokens
        row = {
            "train/loss": mean,
            "optim/lr": lr,
            "grad/norm": norm,
            "skipped": progress.skipped,
            **progress.measured,
            **self.speeds(progress, waited),
        }
        progress.loss_sum, progress.loss_tokens, progress.measured = 0.0, 0, {}
        self.begin(progress, waited)
        return row

    def speeds(self, progress: Progress, waited: float) -> dict[str, float]:
        """Returns tokens a second over all processes and the share of time spent waiting for data;
        on GPUs their memory and, where their peak is known, the shares of all devices' peak that
        AdamW's passes would need (mfu) and that was executed, recomputed blocks included
        (hardware_mfu)."""
        seconds = time.perf_counter() - self.began
        found = {
            "perf/tokens_per_second": (progress.tokens - self.first.tokens) / seconds,
            "perf/data_wait": (waited - self.waited) / seconds,
        }
        if self.device.type == "cuda":
            found["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak := peak_flops(self.device):
            # Both are shares of what all devices could have done in that time.
            available = seconds * peak * self.world
            useful = self.plan.flops_per_step * (progress.step - self.first.step)
            executed = float(progress.flops - self.first.flops)
            # With activation checkpointing each backward runs the forward of the blocks again.
            if self.recomputes:
                blocks = self.plan.forward.body + self.plan.forward.attention
                backwards = progress.backwards - self.first.backwards
                executed += blocks * self.plan.tokens_per_step * backwards
            found |= {"perf/mfu": useful / available, "perf/hardware_mfu": executed / available}
        return found
