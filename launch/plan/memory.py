"""Plans the memory of one device at the fullest moment of a step, from shapes alone; python
train.py plan_only=true prints it.

Counted are the bytes of tensors, as torch.cuda.max_memory_allocated counts them; the context of
CUDA, NCCL's buffers and what the allocator holds without using it come on top.

A step has a few moments of which one is the fullest (`moments`), and each is a table of named
tensors (memory_table.py): what the layers keep (memory_layers.py), what passes over them need
(memory_passes.py), and what a gradient rule keeps, which is here."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from conf.ranks import num_processes
from conf.rule import OptimConfig
from conf.schema import Config
from launch.plan.batch import micro_sequences, num_groups
from launch.plan.memory_layers import Block, Head
from launch.plan.memory_passes import Passes, parameter_counts
from launch.plan.memory_table import Moment, Table, by_part, larger, tensor, total
from model.config import GPTConfig
from model.device import choose_precision
from optim.rule.axes import Copies, copies, needs_gradient, takes_ieee_passes
from optim.rule.descent import Terms, terms_of

COPIES = "copies of the rule"
MEMORY = "memory of the rule"


def planned_device(config: Config) -> str:
    """Returns the kind of device that a configuration is for, here or elsewhere."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def planned_precision(config: Config) -> torch.dtype:
    """Returns the precision there: a CUDA device that is elsewhere is taken to multiply bf16."""
    device = planned_device(config)
    if device == "cuda" and not torch.cuda.is_available() and config.precision == "auto":
        return torch.bfloat16
    return choose_precision(config.precision, torch.device(device))


def num_shards(config: Config) -> int | None:
    """Returns how many processes share one copy of the model; None without FSDP."""
    if config.parallel.name == "single":
        return None
    # With HSDP each replica is a copy of the model, which its processes share.
    world = num_processes(config.parallel)
    if config.parallel.name == "hsdp":
        return world // config.parallel.replicas
    return world


def passes_of(config: Config, shape: GPTConfig, exact: bool = False) -> Passes:
    """Returns the passes of a configuration, or those that it takes in IEEE fp32 (`exact`)."""
    optim, device = config.optim, planned_device(config)
    moves = optim.path != "none"
    # Bytes of a number in the passes. optim.compute is of rules that move the weights.
    size = planned_precision(config).itemsize
    if exact or (moves and optim.compute == "fp32"):
        size = 4
    shards, micro = num_shards(config), micro_sequences(config)
    head = Head(
        width=shape.width,
        V=shape.padded_vocab_size,
        softcap=shape.logit_softcap is not None,
        tokens=micro * config.batch.length,
        device=device,
        size=size,
    )
    # Sequences of all processes and groups in one forward each.
    sequences = num_processes(config.parallel) * num_groups(config) * micro
    return Passes(
        shape=shape,
        counts=parameter_counts(shape, optim.parameters if moves else "all", shards or 1),
        block=Block(shape, config.batch.length, device, size),
        head=head,
        micros=config.batch.sequences // sequences,
        checkpointing=config.activation_checkpointing,
        parallel=config.parallel,
        shards=shards,
        gathered_size=4 if takes_ieee_passes(optim) else size,
    )


def moments(config: Config, shape: GPTConfig, logged: bool) -> Iterator[Moment]:
    """Yields the moments of a step that may be its fullest, with what lives then;
    optim.cotangent=auto counts as store.

    forward    activations and the head; on a logged row the logits that it describes
    backward   a block with the activations of those before it; at the end all gradients, and the
               embedding's own beside the head's
    probe      delta-SAM's noise and the clean weights beside a forward that keeps nothing
    move       the gradient, the direction, its metric's copy and the clean weights
    look       on a logged row: the move beside the clean weights and the gradients
    step       the gradients, and what stays

    Args:
        config: of the run
        shape: of its model
        logged: whether the step logs a row
    """
    passes = passes_of(config, shape)
    always = weights_and_optimiser(config, passes)
    if config.optim.path != "none":
        yield from PerturbedStep(config, passes, always, logged).moments()
        return
    yield from passes.moments(always, 0, logged, passes.head.tensors())
    yield "step", always + tensor("gradients", "all", passes.gradients)


def weights_and_optimiser(config: Config, passes: Passes) -> Table:
    """Returns what stays on the device over all steps, whatever the rule."""
    numbers = passes.gradients
    table = tensor("weights", "parameters", numbers)
    base = config.optim.base
    if base == "adamw":
        table += tensor("optimiser", "exp_avg and exp_avg_sq", 2, numbers)
    if base == "muon":
        # One moment a matrix, and AdamW's two of everything else.
        matrices = passes.shape.num_layers * passes.counts.block
        table += tensor("optimiser", "momentum, exp_avg and exp_avg_sq", 2 * numbers - matrices)
    if base == "sgd" and config.optim.momentum > 0:
        table += tensor("optimiser", "momentum", numbers)
    return table


@dataclass(frozen=True)
class PerturbedStep:
    """A step of a rule that moves the weights, pass by pass. P are the numbers of this process's
    parameters, moved those that are perturbed, and tokens those of a group."""

    config: Config
    passes: Passes
    always: Table  # weights and optimiser
    logged: bool

    def moments(self) -> Iterator[Moment]:
        """Yields its moments in the order of the step."""
        yield from self.probe()
        yield from self.clean_pass()
        yield from self.move()
        yield from self.moved_passes()
        yield from self.look()
        yield from self.logit_pass()
        yield "step", self.before + tensor("gradients", "all", self.P)

    # The configuration

    @property
    def optim(self) -> OptimConfig:
        """Returns the rule's axes."""
        return self.config.optim

    @property
    def terms(self) -> Terms:
        """Returns the products that the path is a sum of."""
        return terms_of(self.optim)

    @property
    def copies(self) -> Copies:
        """Returns the tensors that the parts of the rule keep, as they declare them."""
        return copies(self.optim)

    @property
    def stores(self) -> bool:
        """Returns whether r is kept whole."""
        return bool(self.terms.functional) and self.optim.cotangent != "rebuild"

    @property
    def rebuilds(self) -> bool:
        """Returns whether r is computed once more."""
        return bool(self.terms.functional) and not self.stores

    @property
    def keeps_h(self) -> bool:
        """Returns whether the clean hidden states are kept for the moved point."""
        return self.rebuilds or self.terms.logit != 0

    @property
    def is_grouped(self) -> bool:
        """Returns whether several groups are perturbed one after another."""
        return num_groups(self.config) > 1

    # Numbers

    @property
    def P(self) -> int:
        """Returns the numbers of this process's parameters that lie on its device."""
        return self.passes.gradients

    @property
    def moved(self) -> int:
        """Returns the numbers of those that are perturbed."""
        if self.config.parallel.cpu_offload:
            return 0
        return self.passes.counts.moved

    @property
    def tokens(self) -> int:
        """Returns the tokens of a group on this process."""
        return self.passes.micros * self.passes.tokens

    @property
    def known(self) -> int:
        """Returns the numbers of gradients that the passes at the moved point find: those of the
        groups before, or the clean one that the path is a sum of."""
        if self.is_grouped or self.terms.clean != 0:
            return self.P
        return 0

    # Tensors that stay over some of the moments

    @property
    def staying(self) -> Table:
        """Returns what stays over the whole step."""
        head = self.passes.head
        table = list(self.always)
        table += tensor(MEMORY, "direction", self.copies.direction_memory * self.moved)
        if self.stores:
            table += tensor("cotangents", "r", self.tokens, head.V, size=head.size)
        return table

    @property
    def before(self) -> Table:
        """Returns the same with what the combination remembers, as LookSAM's g_v, until there is
        another."""
        return self.staying + tensor(MEMORY, "g_v", self.copies.combination_memory * self.P)

    @property
    def of_other_groups(self) -> Table:
        """Returns the gradients of the groups before."""
        if not self.is_grouped:
            return []
        return tensor("gradients", "of the groups before", self.P)

    @property
    def h(self) -> Table:
        """Returns the clean hidden states of a group."""
        D, s = self.passes.shape.width, self.passes.head.size
        return tensor("cotangents", "h", self.tokens, D, size=s)

    @property
    def kept(self) -> Table:
        """Returns what the clean pass keeps for the moved point, beside r."""
        return self.h if self.keeps_h else []

    @property
    def clean(self) -> Table:
        """Returns the clean weights, and g where it is combined with the moved gradient."""
        table = tensor(COPIES, "clean weights", self.moved)
        if self.copies.combines_g:
            table += tensor(COPIES, "g", self.P)
        return table

    @property
    def clean_head(self) -> Table:
        """Returns the clean W where it is a tensor of its own: cast, or gathered."""
        head = self.passes.head
        is_copied = head.size == 2 or self.passes.shards is not None
        if not (self.keeps_h and is_copied):
            return []
        return tensor("head", "clean W", head.V, head.width, size=head.size)

    # The moments

    def probe(self) -> Iterator[Moment]:
        """Yields delta-SAM's passes between probes, in IEEE fp32."""
        # The clean weights are a copy while the noise is added to the model's own.
        if not self.copies.noise:
            return
        live = self.before + self.of_other_groups
        live += tensor(COPIES, "noise", self.copies.noise, self.moved)
        live += tensor(COPIES, "clean weights", self.moved)
        exact = passes_of(self.config, self.passes.shape, exact=True)
        yield "probe", exact.forward(live, gradients=False)

    def clean_pass(self) -> Iterator[Moment]:
        """Yields the pass that takes g at the clean weights; only the first group's is logged."""
        if not needs_gradient(self.optim):
            return
        live = self.before + self.kept
        # A stored r counts as a cotangent already.
        head = self.passes.head.tensors(stored=self.stores)
        yield from self.passes.moments(live, 0, self.logged, head)
        yield from self.passes.moments(live + self.of_other_groups, 0, False, head)

    def move(self) -> Iterator[Moment]:
        """Yields the moment where the move is made and added to the weights."""
        # g is what the direction is made of; with a random direction there may be none.
        table = self.staying + self.kept + self.passes.casts + self.of_other_groups
        if needs_gradient(self.optim):
            table += tensor("gradients", "g", self.P)
        table += tensor(COPIES, "direction", self.copies.direction * self.moved)
        table += tensor(COPIES, "direction in its metric", self.copies.metric * self.moved)
        yield "move", table + tensor(COPIES, "clean weights", self.moved)

    def moved_passes(self) -> Iterator[Moment]:
        """Yields the passes at the moved point."""
        passes, terms = self.passes, self.terms
        live = self.staying + self.clean + self.kept + self.clean_head
        if terms.full or terms.functional:
            # The logit term's, summed over the micro-batches until its own pass.
            beside = live
            if terms.logit:
                beside = live + tensor("head", "dW of r~", passes.head.V, passes.head.width)
            # A logged row describes the first logits of a step, which may be these.
            is_first = self.logged and not needs_gradient(self.optim)
            head = passes.head.tensors(stored=self.stores, rebuilt=self.rebuilds)
            yield from passes.moments(beside, self.known, is_first, head)
        if terms.logit:
            gradients = tensor("gradients", "added up so far", self.known)
            yield "forward", passes.forward(live + gradients, gradients=True)

    def look(self) -> Iterator[Moment]:
        """Yields the moment where a logged row measures the move: the move itself, or one weight at
        a time as the passes round it; on CPUs blocks of a weight, which are nothing."""
        if not self.logged:
            return
        move: Table = []
        if not self.is_grouped and not self.terms.logit:
            move = tensor(COPIES, "move", self.moved)
        rounded: Table = []
        if self.passes.head.device == "cuda" and not self.config.parallel.cpu_offload:
            rounded = tensor(COPIES, "a weight and its roundings", 5, self.passes.counts.largest)
        gradients = tensor("gradients", "all", self.P)
        yield "look", self.staying + self.clean + gradients + larger(move, rounded)

    def logit_pass(self) -> Iterator[Moment]:
        """Yields the pass of the logit path: r~ times the clean W, and times the clean h."""
        if not self.terms.logit:
            return
        head = self.passes.head
        products = self.h + tensor("head", "dW of r~", head.V, head.width)
        # A functional term has left its gradients by now.
        known = self.known
        if self.terms.functional:
            known = self.P
        yield from self.passes.moments(self.staying + products, known, False, [])


@dataclass(frozen=True)
class Estimate:
    """The fullest moment of a step: its name, and the tensors that live then."""

    moment: str
    table: Table

    @property
    def parts(self) -> dict[str, int]:
        """Returns the bytes of each part."""
        return by_part(self.table)

    @property
    def total(self) -> int:
        """Returns the bytes of all tensors."""
        return total(self.table)


def estimate(config: Config, shape: GPTConfig, logged: bool = True) -> Estimate:
    """Returns the fullest moment of a perturbed step, on one of the run's processes.

    Args:
        config: of the run
        shape: of its model
        logged: whether the step logs a row
    """
    # Cheap enough to try them all: the tables are made of numbers, and nothing is allocated.
    found = [Estimate(*moment) for moment in moments(config, shape, logged)]
    return max(found, key=lambda estimate: estimate.total)
