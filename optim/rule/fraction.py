"""An ascent on a part of the batch: micro-batches are cut into instances that ascend and instances
that do not (optim.ascent_fraction)."""

import torch

from optim.gradient import MicroBatch
from optim.rule.scope import Scope


def num_ascending(fraction: float, instances: int) -> int:
    """Returns how many of some instances ascend: the fraction of them, at least one."""
    return max(1, round(fraction * instances))


def cut(group: list[MicroBatch], fraction: float, scope: Scope) -> list[MicroBatch]:
    """Returns the micro-batches of a group, cut into those on which the ascent gradient is taken
    and those on which it is not: it is taken on the first instances of the group, over
    micro-batches, then processes, then the instances of a process.

    All processes must make the same passes. So where a micro-batch is cut at another instance on
    each process, as many ascend on all of them as on the one with the most, those of them that
    should not with a weight of 0.

    Args:
        group: the micro-batches of this process
        fraction: the share of the group's instances that ascends
        scope: the processes that share the group
    """
    sizes_KxP, place = sizes(group, scope)
    left = num_ascending(fraction, sum(map(sum, sizes_KxP)))
    parts = []
    for micro, sizes_P in zip(group, sizes_KxP, strict=True):
        chosen = min(left, sum(sizes_P))
        left -= chosen
        parts += cut_one(micro, chosen, sizes_P, place)
    return parts


def sizes(group: list[MicroBatch], scope: Scope) -> tuple[list[list[int]], int]:
    """Returns the instances of each micro-batch on each of the processes that share one
    perturbation, and the place of this one among them."""
    # Each process fills in its own column, and the sum has them all.
    place, world = scope.place()
    sizes_KxP = group[0].targets.new_zeros(len(group), world, dtype=torch.int64)
    sizes_KxP[:, place] = torch.tensor([len(micro.targets) for micro in group])
    return scope.sum(sizes_KxP).tolist(), place


def cut_one(micro: MicroBatch, chosen: int, sizes_P: list[int], place: int) -> list[MicroBatch]:
    """Returns the one or two parts of a micro-batch of which the first `chosen` instances ascend,
    over the processes."""
    # Instances are chosen process by process, in the order of their ranks.
    chosen_P = [min(max(0, chosen - sum(sizes_P[:p])), size) for p, size in enumerate(sizes_P)]
    whole = chosen == 0 or min(sizes_P) <= max(chosen_P)
    ends_P = sizes_P
    if not whole:
        ends_P = [max(chosen_P)] * len(sizes_P)
    first = part_of(micro, slice(0, ends_P[place]), chosen / max(1, sum(ends_P)))
    # Some of this part ascend and some do not: they are told apart by weights of 1 and 0.
    if chosen not in (0, sum(ends_P)):
        chosen_B = torch.arange(ends_P[place]) < chosen_P[place]
        first.chosen_B = chosen_B.to(first.targets.device)
    if ends_P[place] == sizes_P[place]:
        return [first]
    return [first, part_of(micro, slice(ends_P[place], sizes_P[place]), 0.0)]


def part_of(micro: MicroBatch, rows: slice, ascends: float) -> MicroBatch:
    """Returns some instances of a micro-batch, a share of which ascends."""
    targets = micro.targets[rows]
    share = micro.share * len(targets) / max(1, len(micro.targets))
    if hasattr(micro.inputs, "items"):
        inputs = {key: value[rows] for key, value in micro.inputs.items()}
    else:
        inputs = micro.inputs[rows]
    return MicroBatch(inputs, targets, micro.counted_B[rows], 0, share, ascends)
