"""What follows from a configuration before anything is built: sizes, steps, FLOPs, memory, hours."""

from dataclasses import dataclass, fields

import torch

from conf.schema import Config, ModelConfig, OptimConfig
from data.hf_tokenizer import vocabulary
from launch.config import is_read
from launch.process import PEAK_FLOPS, choose_device, choose_precision, rank_and_world
from model import GPT, GPTConfig
from model.logits import CHUNK_ELEMENTS
from optim import ForwardFlops, Schedule, build_schedule, forward_flops, passes
from optim.axes import choose

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


def gpt_config(config: ModelConfig, vocab_size: int) -> GPTConfig:
    """The shape that the model group asks for."""
    names = {entry.name for entry in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in names})


def make_plan(config: Config) -> Plan:
    """The plan of a configuration. Raises ValueError for a schedule that does not fit its horizon."""
    shape = gpt_config(config.model, vocabulary(config.tokenizer))
    with torch.device("meta"):
        model = GPT(shape)
    tokens_per_step = config.batch.sequences * config.batch.length
    counted = model.num_parameters(embedding=config.schedule.parameters == "all")
    forward, optim = forward_flops(shape, config.batch.length), config.optim
    plain = forward.of(1, 1, 3)
    perturbed = plain
    if optim.path != "none":
        refuse_nothing_to_move(model, optim)
        perturbed = forward.of(*passes(optim, store=optim.cotangent != "rebuild", instances=config.batch.sequences // num_groups(config)))
    schedule = build_schedule(config.schedule, optim, tokens_per_step, counted, perturbed / plain)
    tenth = max(1, schedule.steps // 10)
    return Plan(
        model=shape,
        schedule=schedule,
        num_parameters=model.num_parameters(),
        num_non_embedding=model.num_parameters(embedding=False),
        tokens_per_step=tokens_per_step,
        micro=config.batch.micro or config.batch.sequences // (num_groups(config) * rank_and_world()[1]),
        num_groups=num_groups(config),
        forward=forward,
        flops_per_step=plain * tokens_per_step,
        flops_per_perturbed_step=perturbed * tokens_per_step,
        evaluation_every=config.evaluation.every or tenth,
        checkpoint_every=config.checkpoint.every or tenth,
        tracking_every=config.tracking.every or (1 if schedule.steps < 1000 else 10),
    )


def refuse_nothing_to_move(model: GPT, optim: OptimConfig) -> None:
    """Raises ValueError where no parameter has one of the names that are to be moved."""
    try:
        choose(model, dict(model.named_parameters()), optim.parameters)
    except ValueError as error:
        raise ValueError(f"optim.{error}") from None


def memory_estimate(config: Config, plan: Plan) -> dict[str, float]:
    """Bytes that live at the peak of a step. Activations count what autograd keeps of a block per token, in units of D:
    two norms' inputs in fp32, their outputs, q, k, v, the attention's output and both sides of the GELU in compute precision."""
    device = choose_device(config.device)
    size = choose_precision(config.precision, device).itemsize
    shape, tokens = plan.model, plan.micro * config.batch.length
    D, M = shape.width, shape.hidden_width
    per_token = shape.num_layers * (2 * 4 * D + size * (2 * D + 4 * D + 2 * M))
    chunk = min(tokens * shape.vocab_size, CHUNK_ELEMENTS[device.type])
    stored = is_read(config, "optim.cotangent") and config.optim.cotangent != "rebuild"
    held = config.batch.sequences // num_groups(config) * config.batch.length * (shape.vocab_size if stored else D)
    cotangent = float(held * size) if config.optim.path in ("functional", "angle", "logit") else 0.0
    rows = {
        "weights": 4.0 * plan.num_parameters,
        "gradients": 4.0 * plan.num_parameters,
        "Adam's moments": 8.0 * plan.num_parameters,
        "copies of the rule": 4.0 * plan.num_parameters * copies(config),
        "cotangent": cotangent,
        "activations": float(tokens * per_token),
        "head: logits of a chunk, gradients": chunk * (4 + 2 * size) + (4.0 + size) * shape.vocab_size * D + tokens * D * size,
    }
    return {part: size for part, size in rows.items() if size}


def num_groups(config: Config) -> int:
    """Groups of the batch that are perturbed apart."""
    return config.optim.num_groups if is_read(config, "optim.num_groups") else 1


def copies(config: Config) -> int:
    """Copies of the parameters that a rule holds: the weights it restores, the gradient of earlier groups, and what it remembers."""
    optim = config.optim
    if optim.path == "none":
        return 0
    return 1 + (num_groups(config) > 1) + (optim.direction in ("stale", "friendly")) + (optim.combine != "replace")


def describe(config: Config, plan: Plan, name: str) -> str:
    """Everything derived, as a person reads it."""
    schedule, shape = plan.schedule, plan.model
    tokens, counted = schedule.steps * plan.tokens_per_step, config.schedule.parameters
    memory = memory_estimate(config, plan)
    moved = schedule.perturbed_steps
    flops = plan.flops_per_step * (schedule.steps - moved) + plan.flops_per_perturbed_step * moved
    rows = [
        ("name", name),
        ("model", f"{shape.num_layers} layers x {shape.width}, {shape.num_heads} heads, vocabulary {shape.vocab_size:,}"),
        ("parameters", f"{plan.num_parameters:,}, of which {plan.num_non_embedding:,} without embeddings"),
        ("tokens per step", f"{plan.tokens_per_step:,} = {config.batch.sequences} sequences x {config.batch.length}, "
                            f"in {config.batch.sequences // plan.micro} micro-batches of {plan.micro}"),
        ("steps", f"{schedule.steps:,}, of which {schedule.warmup:,} warm-up"
                  + (f"; {config.schedule.tokens_per_parameter:g} tokens per parameter, {counted.replace('_', '-')} ones counted"
                     if config.schedule.name == "chinchilla" else "")),
        ("tokens", f"{tokens:,}"),
        ("tokens per parameter", f"{tokens / plan.num_non_embedding:.2f} without embeddings, {tokens / plan.num_parameters:.2f} with"),
        ("evaluation", f"every {plan.evaluation_every:,} steps; rows every {plan.tracking_every:,}; checkpoints every {plan.checkpoint_every:,}"),
        ("FLOPs", f"{flops:.3e} in all, {plan.flops_per_step:.3e} a {'plain ' * bool(moved)}step (forward and backward, the head counted exactly)"),
        *([("perturbed steps", f"{moved:,}, each {plan.flops_per_perturbed_step / plan.flops_per_step:.2f} plain ones in FLOPs")] if moved else []),
        ("memory, about", f"{human(sum(memory.values()))} = " + " + ".join(f"{human(size)} {part}" for part, size in memory.items())),
        ("checkpoint", human(12.0 * plan.num_parameters)),
    ]  # fmt: skip
    for device in ("A100", "H100", "H200"):
        hours = flops / (PEAK_FLOPS[device] * ASSUMED_MFU) / 3600
        shown = f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"
        rows.append((f"hours on one {device}", f"{shown} at an assumed {ASSUMED_MFU:.0%} of its dense bf16 peak"))
    return "\n".join(f"{label:22}{text}" for label, text in rows)


def human(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
