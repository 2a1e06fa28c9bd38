"""The plain gradient of a step, and what every gradient rule shares: one object for a step, its
micro-batches in groups, and its report."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.logits import Cotangent, InstanceWeighting
from model.processes import Layout
from model.sharding import all_sum, compute_device, sharded_modules
from optim.adapter import Adapter, as_groups, is_counted, refuse_unshifted
from optim.rule.conditions import set_random_state


@dataclass
class RuleResult:
    """Reports a step.

    loss              mean loss in nats per counted token at the weights; None where the rule never
                      looked there
    perturbed_loss    the same at the moved point; None where the rule did not compute it, as on
                      the functional path, which never compares the logits there with targets
    tokens            counted targets of the batch
    metrics           what else is logged of this step
    forwards, backwards, head_products
                      passes through the body, and matrix products with the head, in units of the
                      whole batch
    perturbed         whether the weights were moved
    finite            false: the ascent was not finite, nothing was moved, and every p.grad is None,
                      so that a step changes nothing (LookSAM may have let go of its g_v, and
                      takes plain steps until it has another)"""

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

    def log(self, token_share: float, metrics: dict[str, Any]) -> None:
        """Adds metrics of a group, to be averaged over the groups by their tokens."""
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0) + token_share * value


@dataclass
class MicroBatch:
    """A micro-batch on its way through the passes of a step."""

    inputs: Any
    targets: Tensor
    counted_B: Tensor  # counted targets of each instance
    tokens: int  # counted targets of all instances, over all processes
    share: float  # of the instances of the batch

    # Of rules that move the weights:
    # The share of its instances, over all processes, on which the ascent gradient is taken.
    ascends: float = 1.0
    chosen_B: Tensor | None = None  # which of this process's, where its pass takes others along
    # Gives the weights of its instances in the ascent loss; None where all weigh the same.
    weighting: InstanceWeighting | None = None
    # The weights that it gave, of mean 1 over all counted tokens.
    weights_B: Tensor | None = None
    cotangent: Cotangent | None = None  # r at the clean weights


@dataclass
class Step:
    """One step of a rule.

    number       counted from 0
    groups       of micro-batches, each moved apart from the others
    result       what is reported
    logged       whether metrics are wanted
    diagnosed    and those that cost passes
    clean        g by parameter, added up over the groups, for what reads it at the end of the step;
                 None where the rule is to remember nothing of the step"""

    number: int
    groups: list[list[MicroBatch]]
    result: RuleResult
    logged: bool = True
    diagnosed: bool = False
    clean: dict[str, Tensor] | None = field(default_factory=dict)

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """All micro-batches of the step."""
        return [micro for group in self.groups for micro in group]


class Gradient:
    """The plain gradient of the mean loss over all counted tokens of a step, g = sum_n dl_n/dw / N.

    Micro-batching never changes it: each micro-batch's summed loss is divided by the N of the whole
    step."""

    def __init__(self, model: GPT | Adapter | nn.Module) -> None:
        self.model: Any = model if isinstance(model, (GPT, Adapter)) else Adapter(model)
        self.module: nn.Module = (
            self.model.module if isinstance(self.model, Adapter) else self.model
        )
        # A tied one is there once.
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"no weight of {type(self.module).__name__} is trained; set requires_grad of some"
                " before the rule is made"
            )
        # Gradients are sums here: each loss is divided by the N of all.
        for owner in sharded_modules(self.module):
            owner.set_gradient_divide_factor(1.0)
            owner.set_force_sum_reduction_for_comms(True)
        self.step = 0
        self.rho = 0.0
        self.checked = False  # that targets are shifted
        self.say: Callable[[str], None] = partial(print, file=sys.stderr)
        self.device = compute_device(next(iter(self.parameters.values())))
        self.layout: Layout = getattr(self.module, "layout", Layout())

    def gradient(
        self, batches: Sequence[Any], logged: bool = True, diagnose: bool = False
    ) -> RuleResult:
        """Leaves g in p.grad, which must be empty, and returns what the step was.

        Args:
            batches: the micro-batches of the step; the caller's autocast holds
            logged: whether metrics are wanted
            diagnose: and those that cost passes, of which the plain gradient has none
        """
        step = self.begin(batches, logged, diagnose)
        self.plain(step.micro_batches, step)
        self.sum_losses(step.result)
        return step.result

    def begin(self, batches: Sequence[Any], logged: bool, diagnose: bool) -> Step:
        """Returns a step over batches (see `optim.adapter.as_groups`), its tokens counted. Raises
        ValueError for batches without an instance, for gradients that are there already, and for
        targets that are not shifted."""
        groups = as_groups(batches, self.module)
        instances = sum(len(targets) for group in groups for _, targets in group)
        if not instances:
            raise ValueError(
                "batches hold no instance; give at least one micro-batch (inputs, targets)"
            )
        self.check_parameters()
        if not self.checked:
            # Once, as it waits for the device.
            self.checked = True
            refuse_unshifted(*next(micro for group in groups for micro in group), self.module)
        counted = self.model.counted if isinstance(self.model, Adapter) else is_counted

        def make(inputs: Any, targets: Tensor) -> MicroBatch:
            counted_B = counted(targets).reshape(len(targets), -1).sum(1)
            return MicroBatch(inputs, targets, counted_B, 0, len(targets) / instances)

        made = [[make(inputs, targets) for inputs, targets in group] for group in groups]
        step = Step(self.step, made, RuleResult(), logged, diagnose)
        step.result.tokens = self.count_tokens(step.micro_batches)
        return step

    def check_parameters(self) -> None:
        """Raises ValueError for gradients that are there already, and where a parameter is trained
        that was frozen when the rule was made: gradients of two passes could not be told apart."""
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

    def count_tokens(
        self, micros: list[MicroBatch], add: Callable[[Tensor], Tensor] | None = None
    ) -> int:
        """Notes how many targets each micro-batch counts over all processes, or those that `add`
        sums over; returns their sum."""
        counts_K = torch.stack([micro.counted_B.sum() for micro in micros])
        counts = (add(counts_K) if add else all_sum(self.module, counts_K)).tolist()
        for micro, tokens in zip(micros, counts, strict=True):
            micro.tokens = tokens
        return sum(counts)

    def sum_losses(self, result: RuleResult) -> None:
        """Makes the losses of this process's part of the batch those of the whole batch."""
        losses = [loss for loss in (result.loss, result.perturbed_loss) if loss is not None]
        if not losses:
            return
        totals = all_sum(self.module, torch.stack(losses)).unbind()
        if result.perturbed_loss is not None:
            result.perturbed_loss = totals[-1]
        if result.loss is not None:
            result.loss = totals[0]

    def plain(self, group: list[MicroBatch], step: Step) -> None:
        """Adds the plain gradient of some micro-batches to p.grad, and their loss to the result."""
        result = step.result
        for micro in group:
            logits = self.forward(micro, step)
            loss, _ = logits.cross_entropy_and_cotangent(micro.targets, 1 / max(1, result.tokens))
            self.backward(loss, micro is group[-1])
            result.count(micro.share, backwards=1, head_products=3)
            result.loss = add_loss(result.loss, loss)

    def forward(self, micro: MicroBatch, step: Step) -> Any:
        """Returns the lazy logits of a micro-batch, and logs statistics of the first of a step."""
        logits = self.model.lazy_logits(micro.inputs)
        result = step.result
        if step.logged and "logits/entropy" not in result.metrics:
            statistics, share = logits.statistics()
            result.metrics |= {f"logits/{name}": value for name, value in statistics.items()}
            result.count(micro.share * share, head_products=1)
        result.count(micro.share, forwards=1)
        return logits

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

    def instance_losses(
        self, group: list[MicroBatch], step: Step, random: dict[str, Tensor]
    ) -> list[Tensor]:
        """Returns the mean loss of every instance of a group, from one forward that replays a
        random state."""
        set_random_state(random)
        for micro in group:
            step.result.count(micro.share, forwards=1, head_products=1)
        with torch.no_grad():
            return [
                self.model.lazy_logits(micro.inputs).instance_losses(micro.targets)
                for micro in group
            ]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what the next step depends on; the plain gradient remembers nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""


def add_loss(total: Tensor | None, loss: Tensor) -> Tensor:
    """Returns a running sum of losses, in double precision."""
    loss = loss.detach().double()
    return loss if total is None else total + loss


def named_gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns every p.grad that there is, by name."""
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def take_gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns every p.grad that there is, by name, and leaves none in the parameters."""
    taken = named_gradients(parameters)
    for p in parameters.values():
        p.grad = None
    return taken
