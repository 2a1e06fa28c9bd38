"""Every key of a run: its type, default, range and meaning. The YAML files beside this one only
choose values. conf/key.py says how a key is declared, conf/rule.py has the keys of the rule."""

from dataclasses import dataclass, field

from conf.key import STEPS, key
from conf.rule import OptimConfig
from conf.text import DataConfig, TokenizerConfig


@dataclass
class ModelConfig:
    """The shape of the decoder and its switches."""

    name: str = key("tiny", "name of the shape, used in the run's name")
    num_layers: int = key(2, "transformer blocks", low=1, high=1000)
    num_heads: int = key(2, "attention heads; must divide the width", low=1, high=2**16)
    width: int = key(64, "residual width D", low=1, high=2**20)
    num_kv_heads: int | None = key(
        None,
        "heads of keys and values; fewer than num_heads: grouped-query attention",
        low=1,
        high=2**16,
    )
    mlp_width: int | None = key(
        None, "hidden width of the MLP; default 4 D, for swiglu 8/3 D", low=1, high=2**24
    )
    max_length: int = key(1024, "longest sequence the learned positions cover", low=1, high=2**24)
    bias: bool = key(False, "biases in linear layers and LayerNorm (GPT-2: true, NanoDO: false)")
    norm: str = key("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_eps: float = key(1e-6, "its epsilon (NanoDO 1e-6, GPT-2 1e-5)", above=0.0, high=1.0)
    positions: str = key("learned", "position encoding", choices=("learned", "rope"))
    rope_base: float = key(
        10000.0,
        "base of the rotary angles",
        above=0.0,
        high=1e12,
        read_when=("model.positions", ("rope",)),
    )
    rope_scaling: str = key(
        "none",
        "slows all rotary angles, or as Llama 3.1 the slow ones, for longer sequences",
        choices=("none", "linear", "llama3"),
        read_when=("model.positions", ("rope",)),
    )
    rope_factor: float = key(
        1.0,
        "how many times slower (Llama 3.1: 8, 3.2: 32)",
        low=1.0,
        high=1e6,
        read_when=("model.rope_scaling", ("linear", "llama3")),
    )
    rope_original_length: int = key(
        8192,
        "longest sequence before the scaling",
        low=1,
        high=2**24,
        read_when=("model.rope_scaling", ("llama3",)),
    )
    rope_low_factor: float = key(
        1.0,
        "angles of fewer turns over that length are slowed in full",
        above=0.0,
        high=1e6,
        read_when=("model.rope_scaling", ("llama3",)),
    )
    rope_high_factor: float = key(
        4.0,
        "angles of more turns over it are kept, those between slowed in part",
        above=0.0,
        high=1e6,
        read_when=("model.rope_scaling", ("llama3",)),
    )
    activation: str = key("gelu", "non-linearity of the MLP", choices=("gelu", "swiglu", "relu2"))
    qk_norm: bool = key(False, "RMSNorm of every head's queries and keys")
    tied: bool = key(True, "the head is the token embedding")
    dropout: float = key(
        0.0, "probability, on embeddings, attention and both outputs of a block", low=0.0, high=0.99
    )
    logit_softcap: float | None = key(None, "logits become c tanh(logits / c)", above=0.0, high=1e6)
    z_loss: float = key(
        0.0, "weight of logsumexp(logits)^2 in the training loss", low=0.0, high=1e3
    )
    init: str = key("nanodo", "initialisation", choices=("nanodo", "gpt2"))


@dataclass
class BatchConfig:
    """The sequences of a step, and how they are parted."""

    sequences: int = key(16, "sequences per step, over all devices", low=1, high=2**20)
    micro: int | None = key(
        None,
        "sequences per forward per device; must divide batch.sequences; default all",
        low=1,
        high=2**20,
    )
    length: int = key(256, "tokens per sequence T", low=1, high=2**24)


@dataclass
class ScheduleConfig:
    """The horizon, and the learning rate over it."""

    name: str = key(
        "fixed",
        "horizon: a number of steps or tokens, or tokens per parameter",
        choices=("fixed", "chinchilla"),
    )
    steps: int | None = key(
        None, "optimiser steps", low=1, high=STEPS, read_when=("schedule.tokens", (None,))
    )
    tokens: float | None = key(
        None,
        "training tokens, instead of schedule.steps",
        above=0.0,
        high=1e18,
        read_when=("schedule.name", ("fixed",)),
    )
    tokens_per_parameter: float = key(
        20.0,
        "training tokens per parameter",
        above=0.0,
        high=1e9,
        read_when=("schedule.name", ("chinchilla",)),
    )
    parameters: str = key(
        "non_embedding",
        "which parameters are counted",
        choices=("non_embedding", "all"),
        read_when=("schedule.name", ("chinchilla",)),
    )
    shape: str = key(
        "cosine", "learning rate after the warm-up", choices=("cosine", "linear", "wsd", "constant")
    )
    warmup: float = key(
        0.05,
        "warm-up as a fraction of the horizon",
        low=0.0,
        high=1.0,
        read_when=("schedule.warmup_steps", (None,)),
    )
    warmup_steps: int | None = key(
        None, "warm-up in steps, instead of the fraction", low=0, high=STEPS
    )
    start: float = key(0.0, "learning rate at step 0 as a fraction of the peak", low=0.0, high=1.0)
    final: float = key(
        0.1,
        "learning rate at the end as a fraction of the peak",
        low=0.0,
        high=1.0,
        read_when=("schedule.shape", ("cosine", "linear", "wsd")),
    )
    decay: float = key(
        0.2,
        "share of the horizon in which wsd decays, linearly",
        above=0.0,
        high=1.0,
        read_when=("schedule.shape", ("wsd",)),
    )


@dataclass
class ParallelConfig:
    """How a run is spread over processes. It may be another on resume: a run's identity does not
    depend on it."""

    name: str = key(
        "single",
        "one process; fsdp: shards over all of them; hsdp: replicas of such shards",
        choices=("single", "fsdp", "hsdp"),
        mutable=True,
    )
    replicas: int = key(
        1,
        "copies of the sharded model; divides the number of processes",
        low=1,
        high=2**20,
        mutable=True,
        read_when=("parallel.name", ("hsdp",)),
    )
    processes: int | None = key(
        None,
        "their number: for plan_only=true and local sweeps any, else what torchrun or Slurm"
        " started, the default",
        low=1,
        high=2**20,
        mutable=True,
    )
    reshard_after_forward: bool = key(
        True,
        "let go of a block's weights between forward and backward; false: faster, more memory",
        mutable=True,
        read_when=("parallel.name", ("fsdp", "hsdp")),
    )
    sync: str = key(
        "every",
        "micro-batches that end in a sum of gradients over processes; last: less traffic, more"
        " memory",
        choices=("every", "last"),
        mutable=True,
        read_when=("parallel.name", ("fsdp", "hsdp")),
    )
    cpu_offload: bool = key(
        False,
        "keep weights, gradients and optimiser in the host's memory: slower, and room on the"
        " device",
        mutable=True,
        read_when=("parallel.name", ("fsdp", "hsdp")),
    )
    timeout: float = key(
        10.0,
        "minutes without progress after which several processes end and name the one that hangs",
        above=0.0,
        high=1e6,
        mutable=True,
        read_when=("parallel.name", ("fsdp", "hsdp")),
    )


@dataclass
class TaskConfig:
    """The task of a run."""

    name: str = key("pretrain", "what the run learns", choices=("pretrain",))


@dataclass
class EvaluationConfig:
    """When and on how much text a run is evaluated."""

    every: int | None = key(
        None,
        "steps between evaluations; default a tenth of the horizon",
        low=1,
        high=STEPS,
        mutable=True,
    )
    tokens: int | None = key(
        2**17,
        "tokens of each validation set, spread evenly over it; null: all",
        low=1,
        high=10**12,
        mutable=True,
    )
    baselines: bool = key(
        True, "print the unigram's and the bigram's loss beside the final one", mutable=True
    )
    sample: int = key(
        128, "tokens of the sample printed at the end; 0: none", low=0, high=2**20, mutable=True
    )


@dataclass
class CheckpointConfig:
    """When a run saves, and which checkpoints it keeps."""

    every: int | None = key(
        None,
        "steps between checkpoints; default a tenth of the horizon",
        low=1,
        high=STEPS,
        mutable=True,
    )
    keep: int = key(2, "newest checkpoints kept", low=1, high=STEPS, mutable=True)
    milestones: list[int] = key(
        [], "steps whose checkpoints are always made and kept", low=0, high=STEPS, mutable=True
    )


@dataclass
class TrackingConfig:
    """Where the rows of a run go beside its own files."""

    mode: str = key(
        "auto",
        "W&B; auto: as its own settings ask (WANDB_MODE), online where it has a key, else off",
        choices=("auto", "online", "offline", "off"),
        mutable=True,
    )
    every: int | None = key(
        None,
        "steps between logged rows; default 1 below 1000 steps, else 10",
        low=1,
        high=STEPS,
        mutable=True,
    )
    project: str | None = key(
        None, "W&B project; default WANDB_PROJECT, else flatgpt", mutable=True
    )
    entity: str | None = key(None, "W&B entity; default WANDB_ENTITY, else your own", mutable=True)
    group: str | None = key(
        None,
        "W&B group; default WANDB_RUN_GROUP, else the name of the sweep, else model and data",
        mutable=True,
    )
    tags: list[str] = key(
        [],
        "W&B tags beside method and model, default WANDB_TAGS; launch.report chooses settings by"
        " runs with role=tune and reports those with role=report",
        mutable=True,
    )
    timeout: float = key(
        5.0,
        "seconds to wait for W&B before going on offline",
        above=0.0,
        high=86400.0,
        mutable=True,
    )


@dataclass
class InitConfig:
    """The weights that a run starts from, where it does not draw them."""

    run: str | None = key(None, "start from a checkpoint of this run folder", path=True, place=True)
    step: int | None = key(None, "its step; default the newest", low=0, high=STEPS)
    optimizer: bool = key(
        False, "take over the optimiser's state, the step and the data order too: the run branches"
    )
    hf: str | None = key(
        None,
        "start from the weights of a Hugging Face folder or hub name, GPT-2 or Llama",
        path=True,
        place=True,
    )


@dataclass
class Config:
    """A whole run."""

    dir: str | None = key(None, "run folder; default runs/<name>", mutable=True, path=True)
    seed: int = key(0, "seed of initialisation, data order and dropout", low=0, high=STEPS)
    device: str = key(
        "auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"), mutable=True
    )
    precision: str = key(
        "auto",
        "bf16: autocast over fp32 weights; auto: bf16 on CUDA and on CPUs with bf16 instructions",
        choices=("auto", "bf16", "fp32"),
    )
    activation_checkpointing: bool = key(
        False,
        "blocks keep their input only and run again in the backward: less memory, a third more"
        " time",
        mutable=True,
    )
    compile: str = key(
        "auto",
        "torch.compile: each block, the whole body, or none; auto: block on CUDA, none on CPUs",
        choices=("auto", "none", "block", "whole"),
    )
    deterministic: bool = key(False, "deterministic kernels only, at some cost in speed")
    profile: bool = key(
        False, "write a trace of steps 5 to 8 of this start into the run folder", mutable=True
    )
    minutes: float | None = key(
        None,
        "save and stop after so many minutes, as a preempted run does",
        above=0.0,
        high=1e7,
        mutable=True,
    )
    max_skipped: int = key(
        10, "stop after so many non-finite steps in a row", low=1, high=STEPS, mutable=True
    )
    plan_only: bool = key(False, "print everything derived and exit", mutable=True)
    device_memory: float | None = key(
        None,
        "GiB of a device, for plan_only=true; default this machine's, else those of common ones",
        above=0.0,
        high=1e6,
        mutable=True,
    )
    print_only: bool = key(
        False, "of a sweep: print every run with its GPU-hours and exit", mutable=True
    )
    help: bool = key(False, "print this table and exit", mutable=True)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    init: InitConfig = field(default_factory=InitConfig)
