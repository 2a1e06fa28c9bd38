"""The plain gradient of a step, and what every gradient rule shares: micro-batches, groups of them,
and the report of a step."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.logits import Cotangent
from model.processes import Layout
from model.sharding import all_sum, compute_device, sharded_modules
from optim.adapter import Adapter, as_groups, is_counted, refuse_unshifted

Batch = tuple[Any, Tensor]  # tokens_BxT (or what the adapter takes), targets_BxT


@dataclass
class RuleResult:
    """What a rule reports of a step.

    loss              mean loss in nats per counted token at the weights; None where the rule never
                      looked there
    perturbed_loss    the same at the moved point; None where the rule did not compute it: the
                      functional path takes the derivative by the
                      logits at the clean weights and never compares those of the moved point with
                      targets, so it has none
    tokens            counted targets of the batch
    metrics           what else is logged of this step
    forwards, backwards, head_products     passes through the body, and matrix products with the
                                           head, in units of the whole batch
    perturbed         whether the weights were moved
    finite            false: the ascent was not finite, nothing was moved, and every p.grad is None,
                      so that a step changes nothing
                      (LookSAM may have let go of its g_v, and takes plain steps until it has
                      another)"""

    loss: Tensor | None = None
    perturbed_loss: Tensor | None = None
    tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    forwards: float = 0.0
    backwards: float = 0.0
    head_products: float = 0.0
    finite: bool = True
    perturbed: bool = False

    def count(
        self, share: float, forwards: int = 0, backwards: float = 0, head_products: float = 0
    ) -> None:
        """Adds passes over a share of the batch."""
        self.forwards += share * forwards
        self.backwards += share * backwards
        self.head_products += share * head_products

    def log(self, weight: float, metrics: dict[str, Any]) -> None:
        """Adds metrics of a group, to be averaged over the groups by their weights."""
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0) + weight * value


@dataclass
class Micro:
    """A micro-batch on its way through the passes of a step."""

    inputs: Any
    targets: Tensor
    counted_B: Tensor  # counted targets of each instance
    tokens: int  # and of all of them, over all processes
    share: float  # of the instances of the batch
    ascends: float = (
        1.0  # the share of its instances, over all processes, on which the ascent gradient is taken
    )
    chosen_B: Tensor | None = None  # which of this process's, where its pass takes others along
    cotangent: Cotangent = field(init=False)  # r at the clean weights
    spent: Cotangent = field(init=False)  # r at the moved weights, spent at the clean ones
    offsets_B: Tensor | None = None  # of delta-SAM's probes
    centres_B: Tensor | None = (
        None  # and losses between them, where the clean pass rounds more than they do
    )
    weights_B: Tensor | None = None  # of delta-SAM


class Gradient:
    """The plain gradient of the mean loss over all counted tokens of a step, g = sum_n dl_n/dw / N.

    Micro-batching never changes it: each micro-batch's summed loss is divided by the N of the whole
    step."""

    def __init__(self, model: GPT | Adapter | nn.Module) -> None:
        self.model: Any = model if isinstance(model, (GPT, Adapter)) else Adapter(model)
        self.module: nn.Module = (
            self.model.module if isinstance(self.model, Adapter) else self.model
        )
        # a tied one once
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"no weight of {type(self.module).__name__} is trained; set requires_grad of some"
                " before the rule is made"
            )
        for owner in sharded_modules(
            self.module
        ):  # gradients are sums here, each loss is divided by the N of all
            owner.set_gradient_divide_factor(1.0)
            owner.set_force_sum_reduction_for_comms(True)
        self.step, self.rho, self.looked = 0, 0.0, False
        self.say: Callable[[str], None] = partial(print, file=sys.stderr)
        self.device = compute_device(next(iter(self.parameters.values())))
        self.layout: Layout = getattr(self.module, "layout", Layout())

    def gradient(
        self, batches: Sequence[Any], logged: bool = True, diagnose: bool = False
    ) -> RuleResult:
        """Leaves g in p.grad, which must be empty, and returns what the step was. `batches` are the
        micro-batches of the step; the caller's autocast holds. `logged=False` spares the
        metrics."""
        result = RuleResult()
        self.plain(
            [micro for group in self.groups(batches, result) for micro in group], result, logged
        )
        self.add_up(result)
        return result

    def groups(self, batches: Sequence[Any], result: RuleResult) -> list[list[Micro]]:
        """Returns the micro-batches of every element of `batches` (see `optim.adapter.as_groups`).
        Raises ValueError for none, for gradients that are there already, for targets that are not
        shifted, and where a parameter is trained that was frozen when the rule was made: nobody
        would tell its gradients of two passes apart."""
        groups = as_groups(batches, self.module)
        instances = sum(len(targets) for group in groups for _, targets in group)
        counted = self.model.counted if isinstance(self.model, Adapter) else is_counted
        if not instances:
            raise ValueError(
                "batches hold no instance; give at least one micro-batch (inputs, targets)"
            )
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and name not in self.parameters:
                raise ValueError(
                    f"{name} was frozen when the rule was made; make another one after the"
                    " parameters are chosen"
                )
            if parameter.grad is not None and name in self.parameters:
                raise ValueError(
                    f"{name}.grad is not empty, and would be added to; call"
                    " optimizer.zero_grad(set_to_none=True) first"
                )

        if not self.looked:  # once: it waits for the device
            self.looked = True
            refuse_unshifted(*next(micro for group in groups for micro in group), self.module)

        def make(inputs: Any, targets: Tensor) -> Micro:
            counted_B = counted(targets).reshape(len(targets), -1).sum(1)
            return Micro(inputs, targets, counted_B, 0, len(targets) / instances)

        micros = [[make(inputs, targets) for inputs, targets in group] for group in groups]
        result.tokens = self.count_tokens([micro for group in micros for micro in group])
        return micros

    def count_tokens(
        self, micros: list[Micro], add: Callable[[Tensor], Tensor] | None = None
    ) -> int:
        """Notes how many targets each micro-batch counts over all processes, or those that `add`
        adds up; returns their sum."""
        counts_K = torch.stack([micro.counted_B.sum() for micro in micros])
        counts = (add(counts_K) if add else all_sum(self.module, counts_K)).tolist()
        for micro, tokens in zip(micros, counts, strict=True):
            micro.tokens = tokens
        return sum(counts)

    def add_up(self, result: RuleResult) -> None:
        """Makes the losses of this process's part of the batch those of the whole batch."""
        losses = [loss for loss in (result.loss, result.perturbed_loss) if loss is not None]
        if losses:
            totals = all_sum(self.module, torch.stack(losses)).unbind()
            result.perturbed_loss = (
                result.perturbed_loss if result.perturbed_loss is None else totals[-1]
            )
            result.loss = result.loss if result.loss is None else totals[0]

    def plain(self, group: list[Micro], result: RuleResult, logged: bool = False) -> None:
        """Adds the plain gradient of some micro-batches to p.grad, and their loss to the result."""
        for micro in group:
            logits = self.model.lazy_logits(micro.inputs)
            self.look(logits, micro, result, logged)
            loss, _ = logits.cross_entropy_and_cotangent(micro.targets, 1 / max(1, result.tokens))
            self.backward(loss, micro is group[-1])
            result.count(micro.share, forwards=1, backwards=1, head_products=3)
            result.loss = plus(result.loss, loss)

    def backward(self, value: Tensor, last: bool) -> None:
        """Adds the gradient of a micro-batch, the `last` of its pass or not, to p.grad. Where
        gradients are added up over the processes at the last one only, each process keeps its own
        whole sum of them until then, and p.grad is none."""
        if self.layout.sync == "last":
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        value.backward()
        if self.layout.mesh is not None:
            # The gradient of a cast that an earlier micro-batch made would come after FSDP has
            # added up those of its block.
            torch.clear_autocast_cache()

    def look(self, logits: Any, micro: Micro, result: RuleResult, logged: bool) -> None:
        """Logs statistics of the first logits of a step."""
        if logged and "logits/entropy" not in result.metrics:
            statistics, share = logits.statistics()
            result.metrics |= {f"logits/{name}": value for name, value in statistics.items()}
            result.count(micro.share * share, head_products=1)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for the next step to be the same; the plain gradient
        remembers nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""


def plus(total: Tensor | None, loss: Tensor) -> Tensor:
    """A running sum of losses, in double precision."""
    loss = loss.detach().double()
    return loss if total is None else total + loss


def named_gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every p.grad that there is, by name."""
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def take_gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, taken out of the parameters."""
    taken = named_gradients(parameters)
    for p in parameters.values():
        p.grad = None
    return taken


def ascending(fraction: float, instances: int) -> int:
    """How many of so many instances ascend: the fraction of them, at least one."""
    return max(1, round(fraction * instances))


def cut(group: list[Micro], fraction: float, sizes_KxP: list[list[int]], place: int) -> list[Micro]:
    """Returns the micro-batches of a group, cut into those on which the ascent gradient is taken
    and those on which it is not: it is taken on the first instances of the group, over
    micro-batches, then processes, then the instances of a process.

    All processes must make the same passes. So where a micro-batch is cut at another instance on
    each process, as many ascend on all of them as on the one with the most, those of them that
    should not with a weight of 0.

    Args:
        group: the micro-batches of this process
        fraction: the share of the group's instances that ascends
        sizes_KxP: the instances of each micro-batch on each process that shares the group
        place: of this process among these
    """
    left = ascending(fraction, sum(map(sum, sizes_KxP)))
    parts = []
    for micro, sizes_P in zip(group, sizes_KxP, strict=True):
        chosen = min(left, sum(sizes_P))
        left -= chosen
        chosen_P = [min(max(0, chosen - sum(sizes_P[:p])), size) for p, size in enumerate(sizes_P)]
        whole = chosen == 0 or min(sizes_P) <= max(chosen_P)
        ends_P = sizes_P if whole else [max(chosen_P)] * len(sizes_P)
        first = part_of(micro, slice(0, ends_P[place]), chosen / max(1, sum(ends_P)))
        if chosen not in (0, sum(ends_P)):
            first.chosen_B = (torch.arange(ends_P[place]) < chosen_P[place]).to(
                first.targets.device
            )
        parts.append(first)
        if ends_P[place] < sizes_P[place]:
            parts.append(part_of(micro, slice(ends_P[place], sizes_P[place]), 0.0))
    return parts


def part_of(micro: Micro, rows: slice, ascends: float) -> Micro:
    """Returns some instances of a micro-batch, a share of which ascends."""
    inputs = (
        {key: value[rows] for key, value in micro.inputs.items()}
        if hasattr(micro.inputs, "items")
        else micro.inputs[rows]
    )
    targets = micro.targets[rows]
    return Micro(
        inputs,
        targets,
        micro.counted_B[rows],
        0,
        micro.share * len(targets) / max(1, len(micro.targets)),
        ascends,
    )
