"""Saves checkpoints while the run goes on: the next step waits for a copy of the state, and a
thread writes the copy."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.checkpoint import step_folder
from model.checkpoint import Part
from model.processes import Layout
from model.sharding import local, region_of


class Saver:
    """The checkpoints of a run, at most one of which is being written. The copy lies in the host's
    memory, pinned where the state is on CUDA, and its place is kept for the next one. Threads of
    several processes agree over `layout.saving`."""

    def __init__(self, run: Path, layout: Layout) -> None:
        self.run, self.layout = run, layout
        self.copies: dict[str, dict[str, Part]] = {}
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.under_way: Future | None = None
        self.step = -1  # of the save that was begun last

    def begin(
        self,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        tokenizer: Any,
        keep: int,
        milestones: list[int],
    ) -> None:
        """Copies what this process saves of the state and has a thread write it by
        `step_folder.save`; the save before must have been waited for. The tensors may change as
        soon as this returns."""
        assert self.under_way is None
        # The copies of the save before are written over, so that no memory is allocated anew.
        kept, self.copies, self.step = self.copies, {}, state["step"]
        for file, group in tensors.items():
            places = kept.pop(file, {})
            self.copies[file] = {
                name: copied(tensor, places.pop(name, None)) for name, tensor in group.items()
            }
        # Copies from CUDA to pinned memory are asynchronous, and the next step changes the source.
        if any(local(tensor).is_cuda for group in tensors.values() for tensor in group.values()):
            torch.cuda.current_stream().synchronize()
        self.under_way = self.thread.submit(
            step_folder.save, self.run, self.copies, state, tokenizer, keep, milestones, self.layout
        )

    @property
    def done(self) -> bool:
        """Returns whether a save was begun, is over, and has not been waited for."""
        return self.under_way is not None and self.under_way.done()

    def wait(self) -> str | None:
        """Waits for the save under way, if there is one; returns what the disk said where it
        refused, on all processes the same. Raises RuntimeError where another process was lost."""
        # Forgotten first, so that what raises is not met again at the next wait.
        save, self.under_way = self.under_way, None
        try:
            if save:
                save.result()
        except OSError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Lets the save under way come to its end."""
        self.thread.shutdown()


def copied(tensor: Tensor, place: Part | None) -> Part:
    """Returns a copy of what this process holds of a tensor, where the last one was kept if that
    still fits."""
    shard = local(tensor)
    if place is None or (place.values.shape, place.values.dtype) != (shard.shape, shard.dtype):
        place = Part(
            torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda),
            tuple(side.start for side in region_of(tensor)),
        )
    place.values.copy_(shard, non_blocking=True)
    return place
