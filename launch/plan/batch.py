"""How the global batch is parted into groups and micro-batches."""

import torch
from torch import Tensor

from conf.keys import is_read
from conf.ranks import num_processes
from conf.schema import Config
from model.processes import Layout


def num_groups(config: Config) -> int:
    """Returns the number of groups of the batch that are perturbed apart."""
    if is_read(config, "optim.num_groups"):
        return config.optim.num_groups
    return 1


def micro_sequences(config: Config) -> int:
    """Returns the sequences per forward on each process: batch.micro, else all of a group."""
    return config.batch.micro or config.batch.sequences // (
        num_groups(config) * num_processes(config.parallel)
    )


def part_of(
    batch: tuple[Tensor, Tensor], micro: int, num_groups: int, layout: Layout, device: torch.device
) -> list[list[tuple[Tensor, ...]]]:
    """Returns this process's part of the global batch: groups that are perturbed apart, of
    micro-batches of (inputs, targets).

    Args:
        batch: inputs and targets of the whole step, B x T each
        micro: sequences of a micro-batch
        num_groups: how many groups there are; micro-batches divide by it
        layout: the processes
        device: where the part is needed
    """
    inputs_BxT, targets_BxT = batch
    # Process r takes the micro-batches r, r + world, ...: every group has as many on each process.
    mine = slice(layout.rank, None, layout.world)
    pairs = zip(inputs_BxT.split(micro)[mine], targets_BxT.split(micro)[mine], strict=True)
    micros = [
        tuple(tokens_bxT.to(device, non_blocking=True) for tokens_bxT in pair) for pair in pairs
    ]
    size = len(micros) // num_groups
    return [micros[first : first + size] for first in range(0, len(micros), size)]
