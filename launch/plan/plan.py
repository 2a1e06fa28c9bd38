"""What follows from a configuration before anything is built: sizes, steps, FLOPs, memory,
hours."""

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch

from conf.keys import is_read
from conf.ranks import num_processes
from conf.rule import OptimConfig
from conf.schema import Config, ModelConfig
from data.choose_tokenizer import vocabulary
from launch.plan.batch import micro_sequences, num_groups
from launch.plan.memory import estimate, planned_device, planned_precision
from model import GPT, GPTConfig
from model.device import PEAK_FLOPS
from optim import ForwardFlops, Schedule, build_schedule, forward_flops, passes
from optim.rule.parameters import choose

# GiB that torch sees
DEVICES = {
    "A100 40 GB": 39,
    "A100 80 GB": 79,
    "H100 80 GB": 79,
    "H200 141 GB": 139,
}

# of a device; the rest is for CUDA's context, NCCL's buffers and what the allocator cannot use
USABLE = 0.93

MOST_MEMORY = 2.0**46  # bytes, 64 TiB: no device has as much

ASSUMED_MFU = 0.4  # of the dense bf16 peak, for the estimate of hours


@dataclass(frozen=True)
class Plan:
    """Everything derived from a configuration."""

    model: GPTConfig
    schedule: Schedule
    num_parameters: int
    num_non_embedding: int
    tokens_per_step: int
    micro: int  # sequences per forward per device
    num_groups: int  # groups of the batch that are perturbed apart
    forward: ForwardFlops  # of a token
    flops_per_step: float  # of a plain step
    flops_per_perturbed_step: float
    evaluation_every: int
    checkpoint_every: int
    tracking_every: int

    @property
    def flops(self) -> float:
        """Returns the FLOPs of all steps."""
        moved = self.schedule.perturbed_steps
        return (
            self.flops_per_step * (self.schedule.steps - moved)
            + self.flops_per_perturbed_step * moved
        )

    def hours(self, device: str) -> float:
        """Returns the hours on one device of PEAK_FLOPS; several share them as if they cost each
        other nothing."""
        return self.flops / (PEAK_FLOPS[device] * ASSUMED_MFU) / 3600


def gpt_config(config: ModelConfig, vocab_size: int) -> GPTConfig:
    """Returns the shape that the model group asks for."""
    names = {entry.name for entry in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in names})


def make_plan(config: Config) -> Plan:
    """Returns the plan of a configuration. Raises ValueError for a schedule that does not fit its
    horizon."""
    # A model on the meta device has names and shapes, and takes no memory.
    shape = gpt_config(config.model, vocabulary(config.tokenizer))
    with torch.device("meta"):
        model = GPT(shape)

    # What a step costs, and by that how many there are: a horizon may be a number of tokens per
    # parameter, or the FLOPs of AdamW.
    tokens_per_step = config.batch.sequences * config.batch.length
    counted = model.num_parameters(embedding=config.schedule.parameters == "all")
    forward, optim = forward_flops(shape, config.batch.length), config.optim
    plain = forward.of(1, 1, 3)
    perturbed = plain
    if optim.path != "none":
        refuse_nothing_to_move(model, optim)
        perturbed = perturbed_flops(config, forward)
    schedule = build_schedule(config.schedule, optim, tokens_per_step, counted, perturbed / plain)

    tenth = max(1, schedule.steps // 10)
    plan = Plan(
        model=shape,
        schedule=schedule,
        num_parameters=model.num_parameters(),
        num_non_embedding=model.num_parameters(embedding=False),
        tokens_per_step=tokens_per_step,
        micro=micro_sequences(config),
        num_groups=num_groups(config),
        forward=forward,
        flops_per_step=plain * tokens_per_step,
        flops_per_perturbed_step=perturbed * tokens_per_step,
        evaluation_every=config.evaluation.every or tenth,
        checkpoint_every=config.checkpoint.every or tenth,
        tracking_every=config.tracking.every or rows_every(schedule.steps),
    )
    refuse_more_than(MOST_MEMORY, "any device", config, plan)
    return plan


def rows_every(steps: int) -> int:
    """Returns the steps between logged rows: a long run writes fewer."""
    return 1 if steps < 1000 else 10


def perturbed_flops(config: Config, forward: ForwardFlops) -> float:
    """Returns the FLOPs of a token in a step that moves the weights."""
    optim = config.optim
    groups = num_groups(config)
    if optim.scope == "replica":
        groups = config.parallel.replicas
    cost = passes(
        optim,
        store=optim.cotangent != "rebuild",
        instances=config.batch.sequences // groups,
        rough=planned_precision(config) != torch.float32 and optim.compute == "precision",
    )
    return forward.of(*cost)


def refuse_more_than(size: float, whose: str, config: Config, plan: Plan) -> None:
    """Raises ValueError where a step of a process needs more than `size` bytes by the least that it
    can need: weights and gradients, the residuals that every layer keeps, and the tokens of a
    batch. That needs no look at the model, and refuses nothing that fits."""
    # In bytes: 4 for a weight and 4 for its gradient, in shards where there are some; 4 for each
    # number of the residual stream that a layer keeps; 8 for a token id.
    world, shape = num_processes(config.parallel), plan.model
    shards = {"single": 1, "fsdp": world, "hsdp": max(1, world // config.parallel.replicas)}[
        config.parallel.name
    ]
    residuals = 4 * shape.num_layers * shape.width * plan.micro * config.batch.length
    least = 8 * plan.num_parameters / shards + residuals + 8 * plan.tokens_per_step
    if least > size:
        raise ValueError(
            f"{plan.num_parameters:,} parameters and batches of {plan.tokens_per_step:,} tokens,"
            f" {plan.micro} sequences at a time, need at least {human(least)} a process, where"
            f" {whose} has {human(size)}; lower model.*, batch.length or batch.micro, or take more"
            " processes with parallel=fsdp"
        )


def refuse_too_large_for_machine(config: Config, plan: Plan) -> None:
    """Raises ValueError where this machine cannot hold a step, whatever else it does."""
    # With cpu_offload weights and gradients lie in the host's memory, as they do without a GPU.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on_gpu = planned_device(config) == "cuda" and torch.cuda.is_available()
    if on_gpu and not config.parallel.cpu_offload:
        size = torch.cuda.get_device_properties().total_memory
    refuse_more_than(size, "this machine", config, plan)


def refuse_nothing_to_move(model: GPT, optim: OptimConfig) -> None:
    """Raises ValueError where no parameter has one of the names that are to be moved."""
    try:
        choose(model, dict(model.named_parameters()), optim.parameters)
    except ValueError as error:
        raise ValueError(f"optim.{error}") from None


def devices(config: Config) -> dict[str, float]:
    """Returns the bytes of the devices that a run may have to fit on, by name: what
    config.device_memory says, this machine's, or common ones."""
    if config.device_memory is not None:
        return {f"{config.device_memory:g} GiB": config.device_memory * 2**30}
    if planned_device(config) == "cpu":
        return {}
    if torch.cuda.is_available():
        return {torch.cuda.get_device_name(): torch.cuda.get_device_properties().total_memory}
    return {name: size * 2**30 for name, size in DEVICES.items()}


def remedy(config: Config, shape: GPTConfig, size: float) -> str:
    """Returns "yes" where a step fits on a device of `size` bytes, else the first change of keys
    that makes it fit, found by trying."""
    for change in changes(config):
        if estimate(changed(config, change), shape).total > USABLE * size:
            continue
        keys = " ".join(f"{name}={str(value).lower()}" for name, value in change.items())
        # The first change that is tried is none.
        return f"with {keys}" if keys else "yes"
    return "no change of keys tried makes it fit"


def changes(config: Config) -> Iterator[dict[str, Any]]:
    """Changes of keys that spend less memory, the cheapest in time first: none, then each of three
    alone, then together, then more processes, with everything else spared as well."""
    world, sequences, groups = (
        num_processes(config.parallel),
        config.batch.sequences,
        num_groups(config),
    )
    # Nothing, then each thing alone: r rebuilt instead of stored (one more head product), smaller
    # micro-batches, the forward of each block run again (a third more time).
    yield {}
    spared: dict[str, Any] = {}
    if is_read(config, "optim.cotangent") and config.optim.cotangent != "rebuild":
        yield (spared := {"optim.cotangent": "rebuild"})
    smaller = [
        micro
        for micro in range(micro_sequences(config) - 1, 0, -1)
        if sequences % (micro * world * groups) == 0
    ]
    yield from ({"batch.micro": micro} for micro in smaller)
    if not config.activation_checkpointing:
        yield {"activation_checkpointing": True}
        spared = spared | {"activation_checkpointing": True}
    yield from (spared | {"batch.micro": micro} for micro in smaller)

    # All together, and at last more processes, by powers of two, that share weights and optimiser.
    least = dict(spared)
    if smaller:
        least["batch.micro"] = 1
    sharded: dict[str, Any] = {}
    if config.parallel.name == "single":
        sharded["parallel"] = "fsdp"
    for extra in ({}, least):
        micro = extra.get("batch.micro", config.batch.micro or 1)
        more = [
            world * 2**k for k in range(1, 13) if sequences % (micro * world * 2**k * groups) == 0
        ]
        yield from (extra | sharded | {"parallel.processes": processes} for processes in more)


def changed(config: Config, change: dict[str, Any]) -> Config:
    """Returns a copy of a configuration with other values."""
    other = deepcopy(config)
    for name, value in change.items():
        # A group is chosen by its name.
        key = {"parallel": "parallel.name"}.get(name, name)
        *sections, last = key.split(".")
        section: Any = other
        for part in sections:
            section = getattr(section, part)
        setattr(section, last, value)
    return other


def human_hours(hours: float, form: str) -> str:
    """Returns hours in a format, or words where a number of hours says nothing to a reader."""
    return format(hours, form) if hours >= 1 / 3600 else "under a second"


def human(size: float) -> str:
    """Returns bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
