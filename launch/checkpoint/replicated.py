"""What all processes of a run hold alike, and what is said where they do not any more."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from data import Corpus
from launch.track.progress import Progress
from model import GPT
from model.processes import Layout
from model.sharding import local
from optim import Gradient

# Integers as wide as a number of so many bytes.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def replicated(
    settings: dict[str, Any],
    corpus: Corpus,
    progress: Progress,
    optimizer: Optimizer,
    rule: Gradient,
) -> dict[str, Any]:
    """Returns what depends on no process, by name: the settings, the data, the place in the run and
    what follows from it."""
    # Times are a process's own.
    own = ("seconds", "row")
    return {
        **settings,
        "torch": torch.__version__,
        "data": corpus.fingerprint,
        "tokenizer": corpus.tokenizer.hash,
        **{name: value for name, value in asdict(progress).items() if name not in own},
        "learning rates": [group["lr"] for group in optimizer.param_groups],
        "steps of the optimizer": sorted(
            {float(state["step"]) for state in optimizer.state.values() if "step" in state}
        ),
        "steps of the rule": rule.step,
    }


def refuse_divergence(
    layout: Layout, values: dict[str, Any], model: GPT, optimizer: Optimizer, rule: Gradient
) -> None:
    """Raises ValueError, with every difference and its ranks, where processes do not hold the same
    values, or replicas not the same bits of weights, optimiser and rule. Costs one gather of a few
    numbers."""
    if layout.world == 1:
        return
    # Replicas hold the same shards, so the sums of their bits are the same. Where each process has
    # a shard of its own there is nothing to compare it with.
    weights = {}
    if layout.replicas is not None:
        state = [
            tensor
            for state in optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor)
        ]
        held = sum_of_bits([*model.parameters(), *state, *rule.state_dict().values()])
        weights[f"the weights, optimizer and rule of shard {layout.mesh.get_local_rank()}"] = held
    # The values themselves are sent only where their digests differ.
    digest = hashlib.sha256(repr(values).encode()).hexdigest()
    if differences(layout.all_gather({"digest": digest} | weights)):
        found = "; ".join(differences(layout.all_gather(values | weights)))
        raise ValueError(
            f"the processes do not hold the same any more: {found}. Give all of them the same"
            " command and the same code; where that is so, suspect a device. The same command goes"
            " on from the last checkpoint"
        )


def differences(held: list[dict[str, Any]]) -> list[str]:
    """Returns what is not the same among the processes that hold it, as "<name> is <value> on rank
    0, <value> on ranks 1, 2"."""
    found = []
    for name in dict.fromkeys(name for values in held for name in values):
        ranks: dict[str, list[str]] = {}
        for rank, values in enumerate(held):
            if name in values:
                ranks.setdefault(repr(values[name]), []).append(str(rank))
        if len(ranks) > 1:
            found.append(
                f"{name} is "
                + ", ".join(
                    f"{value} on rank{'s' * (len(on) > 1)} {', '.join(on)}"
                    for value, on in ranks.items()
                )
            )
    return found


def sum_of_bits(tensors: Iterable[Tensor]) -> int:
    """Returns one number of all bits that this process holds of some tensors."""
    # As integers of the same width, so that nan and the sign of zero count, and the order of the
    # sum does not.
    return sum(
        int(local(tensor).contiguous().view(BITS[tensor.element_size()]).sum(dtype=torch.int64))
        for tensor in tensors
    )
