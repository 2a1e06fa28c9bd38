"""A plan as a person reads it: what plan_only=true prints."""

from conf.ranks import num_processes
from conf.schema import Config
from launch.plan.memory import estimate, planned_device, planned_precision
from launch.plan.memory_table import lines
from launch.plan.plan import ASSUMED_MFU, Plan, devices, human, human_hours, remedy

Rows = list[tuple[str, str]]  # a label, and what is said


def describe(config: Config, plan: Plan, name: str) -> str:
    """Returns everything that is derived of a run, a line each."""
    rows = [("name", name)]
    rows += about_the_model(plan)
    rows += about_the_horizon(config, plan)
    rows += about_the_passes(plan)
    rows += about_the_memory(config, plan)
    rows += about_the_hours(config, plan)
    return "\n".join(f"{label:22}{text}" for label, text in rows)


def about_the_model(plan: Plan) -> Rows:
    """Returns the shape and size of the model."""
    shape = plan.model
    return [
        (
            "model",
            f"{shape.num_layers} layers x {shape.width}, {shape.num_heads} heads, vocabulary"
            f" {shape.vocab_size:,}",
        ),
        (
            "parameters",
            f"{plan.num_parameters:,}, of which {plan.num_non_embedding:,} without embeddings",
        ),
    ]


def about_the_horizon(config: Config, plan: Plan) -> Rows:
    """Returns what is trained on, and what happens at which steps."""
    batch, schedule, world = config.batch, plan.schedule, num_processes(config.parallel)
    num_micro = batch.sequences // plan.micro
    parted = (
        f"{plan.tokens_per_step:,} = {batch.sequences} sequences x {batch.length}, in {num_micro}"
        f" micro-batches of {plan.micro}"
    )
    if world > 1:
        parted += f", {num_micro // world} on each of {world} processes"
    steps = f"{schedule.steps:,}, of which {schedule.warmup:,} warm-up"
    if config.schedule.name == "chinchilla":
        counted = config.schedule.parameters.replace("_", "-")
        steps += (
            f"; {config.schedule.tokens_per_parameter:g} tokens per parameter, {counted} ones"
            " counted"
        )
    tokens = schedule.steps * plan.tokens_per_step
    return [
        ("tokens per step", parted),
        ("steps", steps),
        ("tokens", f"{tokens:,}"),
        (
            "tokens per parameter",
            f"{tokens / plan.num_non_embedding:.2f} without embeddings,"
            f" {tokens / plan.num_parameters:.2f} with",
        ),
        (
            "evaluation",
            f"every {plan.evaluation_every:,} steps; rows every {plan.tracking_every:,};"
            f" checkpoints every {plan.checkpoint_every:,}",
        ),
    ]


def about_the_passes(plan: Plan) -> Rows:
    """Returns the FLOPs of the run, and of the steps that move the weights."""
    moved = plan.schedule.perturbed_steps
    step = "plain step"
    if not moved:
        step = "step"
    rows = [
        (
            "FLOPs",
            f"{plan.flops:.3e} in all, {plan.flops_per_step:.3e} a {step} (forward and backward,"
            " the head with its padded rows)",
        )
    ]
    if moved:
        ratio = plan.flops_per_perturbed_step / plan.flops_per_step
        rows.append(("perturbed steps", f"{moved:,}, each {ratio:.2f} plain ones in FLOPs"))
    return rows


def about_the_memory(config: Config, plan: Plan) -> Rows:
    """Returns what a process needs at its fullest moment, and the devices that have as much."""
    shape, memory = plan.model, estimate(config, plan.model)
    each = ""
    if num_processes(config.parallel) > 1:
        each = " a process"
    where = f"{planned_device(config)} in {str(planned_precision(config)).removeprefix('torch.')}"
    parts = " + ".join(f"{human(size)} {part}" for part, size in memory.parts.items() if size)
    rows = [
        (
            "memory, about",
            f"{human(memory.total)}{each} on {where}, fullest in the {memory.moment} = {parts}",
        )
    ]
    # On a CPU there is no device to fit on.
    fits = [f"{device}: {remedy(config, shape, size)}" for device, size in devices(config).items()]
    if fits:
        rows.append(("fits on", "; ".join(fits)))
    # Weights and AdamW's two moments, in fp32.
    rows.append(("checkpoint", human(12.0 * plan.num_parameters)))
    return rows


def about_the_hours(config: Config, plan: Plan) -> Rows:
    """Returns how long the run takes on well-known devices."""
    rows, world = [], num_processes(config.parallel)
    for device in ("A100", "H100", "H200"):
        hours = plan.hours(device)
        shared = ""
        if world > 1:
            shared = f", {rounded_hours(hours / world)} on {world} of them,"
        at = f"at an assumed {ASSUMED_MFU:.0%} of its dense bf16 peak"
        rows.append((f"hours on one {device}", f"{rounded_hours(hours)}{shared} {at}"))
    return rows


def rounded_hours(hours: float) -> str:
    """Returns hours with as many digits as an estimate has."""
    return human_hours(hours, ",.2f" if hours >= 0.1 else ".2g")


def describe_memory(config: Config, plan: Plan) -> str:
    """Returns the tensors of the fullest moment of a step, the largest first, as a person reads
    them: they add up to the plan's memory."""
    memory = estimate(config, plan.model)
    return "\n".join([f"Tensors in the {memory.moment}:", *lines(memory.table, human)])
