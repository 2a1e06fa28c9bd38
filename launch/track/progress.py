"""How far a run has come, and what a checkpoint holds of that."""

from dataclasses import dataclass, field
from typing import Any

from launch.plan.plan import Plan
from launch.run.folder import Counted
from optim import RuleResult


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

    def count_loss(self, result: RuleResult, loss: float) -> None:
        """Counts a step that changed the weights."""
        self.skipped_in_a_row = 0
        if result.loss is not None:
            self.loss_sum += loss * result.tokens
            self.loss_tokens += result.tokens

    def count_skipped(self) -> None:
        """Counts a step that was not finite."""
        self.skipped += 1
        self.skipped_in_a_row += 1

    def count_step(self, result: RuleResult, plan: Plan) -> None:
        """Counts a step, whatever came of it."""
        self.step += 1
        self.tokens += result.tokens
        self.forwards += result.forwards
        self.backwards += result.backwards
        self.perturbed += result.perturbed
        flops = plan.forward.of(result.forwards, result.backwards, result.head_products)
        self.flops += round(flops * plan.tokens_per_step)

    def counts(self) -> dict[str, float]:
        """Returns how far the run has come, as every row says it."""
        names = ("step", "tokens", "flops", "forwards", "backwards", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclass
class State:
    """The plain values of a checkpoint, which state.json holds."""

    step: int
    progress: Progress
    model: dict[str, Any]  # a GPTConfig
    tokenizer: str  # its hash
    data: str  # the fingerprint of the corpus
    identity: dict[str, Any]
    wandb_id: str | None = None
    rows: Counted | None = None  # of metrics.jsonl; None in checkpoints that are older than this
    # The checksum of what the run began from: a checkpoint of init.run, or the weights of init.hf.
    origin: str | None = None


@dataclass
class Start:
    """Where a start of a run begins.

    progress    how far the run has come
    note        what is told of it; nothing of a run from scratch
    origin      the checksum of what the whole run began from, where that was another's weights
    resumed     the state of the run's own checkpoint, where there was one
    """

    progress: Progress = field(default_factory=Progress)
    note: str = ""
    origin: str | None = None
    resumed: State | None = None
