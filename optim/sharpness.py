"""Gradient rules: ways to produce the gradient that the base optimiser steps on.

batches -> rule.gradient -> p.grad -> clip -> base optimiser
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.gpt import GPT
from model.logits import IGNORED

Batch = tuple[Tensor, Tensor]  # tokens_BxT, targets_BxT


@dataclass
class RuleResult:
    """What a rule reports of a step: mean losses in nats per counted token (at the weights, and at the moved point where the
    rule looks there), the number of counted tokens, the passes over the batch it took, and what else it logs."""

    loss: Tensor
    perturbed_loss: Tensor | None
    tokens: int
    forwards: float = 1.0
    backwards: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)


class Gradient:
    """The plain gradient of the mean loss over all counted tokens of a step, g = sum_n dl_n/dw / N.

    Micro-batching never changes it: each micro-batch's summed loss is divided by the N of the whole step."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    def gradient(self, batches: Sequence[Batch]) -> RuleResult:
        """Leaves g in p.grad and returns what the step was. `batches` are the micro-batches of the step; the caller's autocast
        holds, and p.grad must be empty."""
        tokens = sum(int((targets != IGNORED).sum()) for _, targets in batches)
        total = torch.zeros((), dtype=torch.float64)
        for inputs_BxT, targets_BxT in batches:
            loss, _ = self.model.loss(inputs_BxT, targets_BxT, scale=1 / max(1, tokens))
            loss.backward()
            total = total.to(loss.device) + loss.detach()
        return RuleResult(loss=total, perturbed_loss=None, tokens=tokens)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next step to be the same; the plain gradient remembers nothing."""
        return {}
