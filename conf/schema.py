"""Every key of a run: its type, default, range and meaning. The YAML files beside this one only
choose values.

Each key is declared once, by `key(default, meaning, ...)`:

    choices    the values a string may take
    low, high  the closed range of a number; `above` is an open lower end
    path       a file or folder, where ~ is the home folder
    text       any text as it stands, control characters and brackets included
    empty      an empty text means something; elsewhere it is refused, as what an unset shell
               variable leaves
    positional the arguments of a command that are no key=value
    read_when  (other key, values): the key matters only while the other key has one of these
    values; otherwise it
               is accepted, noted, and left out of the run's name and identity
    place      says where something lies: a run that is resumed may find the same thing, by its
               checksum, elsewhere
    mutable    may differ when a run is resumed, so it is no part of the identity either; (other
               key, values): only then
"""

import math
import os
import re
import unicodedata
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(dict[str, Any]):
    """The parts that an axis of the gradient rule may take, by name; each registers itself when
    `optim` is imported."""

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that adds a class or function under a name."""

        def add(part: T) -> T:
            self[name] = part
            return part

        return add


PATHS = Registry()  # optim.path of every rule that moves the weights
COTANGENT_PATHS = Registry()  # those of them that keep the clean cotangent r
DIRECTIONS = Registry()
METRICS = Registry()
WEIGHTINGS = Registry()
COMBINATIONS = Registry()
MOVED = ("optim.path", PATHS)
ADAM = ("optim.base", ("adamw", "muon"))
STEPS = 2**31 - 1  # more than any run has
TINY = 2.0**-126  # smaller numbers are 0, or nearly so, in the fp32 that all weights have


def key(default: Any, meaning: str, **rules: Any) -> Any:
    """Returns a dataclass field with its meaning and the rules that `check_value` enforces."""
    metadata = {"meaning": meaning, **rules}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_value(name: str, value: Any, rules: Any) -> None:
    """Raises ValueError unless the value, and whatever a list or mapping holds, keeps to the rules
    of its key."""
    if isinstance(value, (list, tuple, dict)):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        for item in inside:
            check_value(name, item, rules)
        return
    if isinstance(value, str):
        check_text(name, value, rules)
    if "choices" in rules and value not in rules["choices"]:
        raise ValueError(f"{name}={value} is unknown; choose one of {', '.join(rules['choices'])}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        check_number(name, value, rules)


def check_text(name: str, text: str, rules: Any) -> None:
    """Raises ValueError for a text that is empty, or that a shell, a terminal or a file would take
    for something else."""
    if not text.strip(" ") and not rules.get("empty"):
        raise ValueError(
            f"{name}={text} is empty, as an unset shell variable is; give a value, or leave"
            f" {name} out"
        )
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            raise ValueError(f"{name}={text!a} is no UTF-8; write it in UTF-8")
        if kind == "Cc" and not rules.get("text"):
            raise ValueError(
                f"{name}={text!a} has the control character {character!a} in it; leave it out"
            )
    if rules.get("path"):
        expand(name, text)


def check_number(name: str, number: float, rules: Any) -> None:
    """Raises ValueError for a number that is out of range, or none that fp32 can hold."""
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{name}={number} is not finite; give a number")
    low, high, above = (
        rules.get("low", -math.inf),
        rules.get("high", math.inf),
        rules.get("above", -math.inf),
    )
    if not (low <= number <= high and number > above):
        bounds = (
            [f"at least {low}"] * (low > -math.inf)
            + [f"above {above}"] * (above > -math.inf)
            + [f"at most {high}"] * (high < math.inf)
        )
        raise ValueError(f"{name}={number} is out of range; it must be {' and '.join(bounds)}")
    if 0 < abs(number) < TINY:
        raise ValueError(
            f"{name}={number} is out of range; it is 0 in fp32, whose smallest number is {TINY:.3g}"
        )


def expand(name: str, path: str) -> str:
    """Returns a path with ~ and ~user as their home folders. Raises ValueError that names the key
    where there is none."""
    own = path.split("/")[0] == "~"
    expanded = os.path.expanduser(path)
    # An empty HOME would make ~/x the root's /x.
    if not expanded.startswith("~") and not (own and os.environ.get("HOME") == ""):
        return expanded
    if own:
        raise ValueError(
            f"{name}={path}: no home folder is known; set HOME, or give {name} a path without ~"
        )
    raise ValueError(f"{name}={path}: no user has this name; write ./{path} for a file that has it")


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
class TokenizerConfig:
    name: str = key(
        "bytes",
        "bytes: 256 + end of text; bpe: trained on the corpus; gpt2: tiktoken's own; hf: of a"
        " Hugging Face folder",
        choices=("bytes", "bpe", "gpt2", "hf"),
    )
    vocab_size: int = key(
        4096,
        "entries of a trained bpe, end of text included",
        low=258,
        high=2**20,
        read_when=("tokenizer.name", ("bpe",)),
    )
    train_megabytes: float = key(
        100.0,
        "text the bpe is trained on, from the start of each training source",
        above=0.0,
        high=1e9,
        read_when=("tokenizer.name", ("bpe",)),
    )
    path: str | None = key(
        None,
        "hf: folder or hub name, default init.hf; gpt2: its ranks or their folder, default fetched"
        " once",
        mutable=("tokenizer.name", ("gpt2",)),
        read_when=("tokenizer.name", ("gpt2", "hf")),
        path=True,
        place=True,
    )


@dataclass
class SourceConfig:
    """One entry of data.sources: file, glob or list of them, and its share of the training
    sequences."""

    path: Any
    weight: float = 1.0


@dataclass
class DataConfig:
    """Where text comes from, and what of it is held out."""

    name: str = key("stdlib", "name of the corpus, used in the run's name")
    source: str = key(
        "stdlib", "where text comes from", choices=("stdlib", "text", "tokens", "hub")
    )
    path: Any = key(
        None,
        "file, folder, glob or list of .txt, .jsonl, .parquet; tokens: of .bin; hub: a dataset's"
        " name, or a folder",
        path=True,
        place=True,
        read_when=("data.source", ("text", "tokens", "hub")),
    )
    sources: Any = key(
        None,
        "several weighted sources, name: {path, weight}; instead of data.path",
        place=True,
        read_when=("data.source", ("text", "tokens")),
    )
    config: str | None = key(
        None, "configuration of the dataset, as 'en' of C4", read_when=("data.source", ("hub",))
    )
    split: str = key(
        "train",
        "split of the dataset that is trained on; several as 'a+b'",
        read_when=("data.source", ("hub",)),
    )
    revision: str | None = key(
        None,
        "branch, tag or commit of the dataset; default what main is at first",
        read_when=("data.source", ("hub",)),
    )
    documents: int | None = key(
        None,
        "train on the first so many rows of the split only",
        low=1,
        high=10**12,
        read_when=("data.source", ("hub",)),
    )
    field: str = key(
        "text",
        "field of rows (.jsonl, .parquet, hub) that holds the text",
        read_when=("data.source", ("text", "hub")),
    )
    separator: str | None = key(
        None,
        "line that ends a document in .txt files; default: a file is a document",
        read_when=("data.source", ("text",)),
        text=True,
    )
    validation: Any = key(
        None,
        "validation sets, name: file, glob or list; hub: a split, or name: split; default:"
        " held out",
        read_when=("data.source", ("text", "tokens", "hub")),
        path=True,
        place=True,
    )
    validation_fraction: float = key(
        0.05,
        "share of the text that is held out where no validation set is given",
        above=0.0,
        high=0.5,
    )
    validation_split: str = key(
        "documents",
        "hold out random documents, or the tail of the text (as nanoGPT does, and data=tokens)",
        choices=("documents", "tail"),
        read_when=("data.source", ("stdlib", "text")),
    )
    cache: str = key(
        "~/.cache/flatgpt",
        "folder of prepared shards and trained tokenizers",
        mutable=True,
        path=True,
    )
    workers: int | None = key(
        None, "processes that prepare text; default one per core", low=1, high=2**12, mutable=True
    )
    bad_rows: str = key(
        "error",
        "rows that cannot be read (null, no UTF-8, no JSON): stop and name the row, or skip and"
        " count them",
        choices=("error", "skip"),
        mutable=True,
        read_when=("data.source", ("text", "hub")),
    )
    verify_days: float = key(
        7.0,
        "days after which the content of shards is verified again, at a start; 0: at every start",
        low=0.0,
        high=1e6,
        mutable=True,
    )


@dataclass
class BatchConfig:
    sequences: int = key(16, "sequences per step, over all devices", low=1, high=2**20)
    micro: int | None = key(
        None,
        "sequences per forward per device; must divide batch.sequences; default all",
        low=1,
        high=2**20,
    )
    length: int = key(256, "tokens per sequence T", low=1, high=2**24)


@dataclass
class RuleConfig:
    """The axes of the gradient rule; path=none is the plain gradient and reads no other axis."""

    path: str = key(
        "none",
        "what is evaluated at the moved point; none: the weights are not moved",
        choices=ChainMap(PATHS, {"none": None}),
    )
    direction: str = key(
        "gradient", "what the weights move along", read_when=MOVED, choices=DIRECTIONS
    )
    metric: str = key(
        "euclidean",
        "how the direction is scaled",
        read_when=MOVED,
        choices=METRICS,
    )
    scope: str = key(
        "batch",
        "who shares one perturbation",
        read_when=MOVED,
        choices=("batch", "replica", "micro_batch"),
    )
    weights: str = key(
        "uniform",
        "weights of the instances in the ascent loss",
        read_when=MOVED,
        choices=WEIGHTINGS,
    )
    combine: str = key(
        "replace",
        "what is done with the clean and the moved gradient",
        read_when=MOVED,
        choices=COMBINATIONS,
    )
    rho: float = key(0.05, "radius of the perturbation", low=0.0, high=1e6, read_when=MOVED)
    start: float = key(
        0,
        "first perturbed step; below 1 a fraction of the horizon",
        low=0,
        high=STEPS,
        read_when=MOVED,
    )
    stop: float | None = key(
        None,
        "first step no longer perturbed; up to 1 a fraction of the horizon; default never",
        low=0,
        high=STEPS,
        read_when=MOVED,
    )
    period: int = key(1, "perturb every k-th step", low=1, high=STEPS, read_when=MOVED)
    ascent_fraction: float = key(
        1.0,
        "share of the batch (or group) the ascent gradient is taken on",
        above=0.0,
        high=1.0,
        read_when=MOVED,
    )
    parameters: str = key(
        "all",
        "which are perturbed: all, no_embeddings, no_norms, head, or a pattern of names as *.mlp.*",
        read_when=MOVED,
    )
    angle: float = key(
        45.0,
        "degrees between the logit (0) and the functional (90) path",
        low=0.0,
        high=90.0,
        read_when=("optim.path", ("angle",)),
    )
    angle_norm: str = key(
        "max",
        "scale of the two angle terms",
        choices=("max", "paper"),
        read_when=("optim.path", ("angle",)),
    )
    second_moment: str = key(
        "with_gradient",
        "Adam's v as this step would leave it, or as it stands",
        read_when=("optim.metric", ("adam",)),
        choices=("with_gradient", "before"),
    )
    metric_power: float = key(
        0.5,
        "power of v in the Adam metric",
        above=0.0,
        high=10.0,
        read_when=("optim.metric", ("adam",)),
    )
    metric_eps: float | None = key(
        None,
        "epsilon of the Adam metric; default Adam's own",
        low=0.0,
        high=1e6,
        read_when=("optim.metric", ("adam",)),
    )
    metric_norm: str = key(
        "l2",
        "norm that sets the radius: |d|, |q| or sqrt(q.d)",
        read_when=("optim.metric", ("adam",)),
        choices=("l2", "raw", "dual"),
    )
    adaptive_floor: float = key(
        0.01,
        "added to |w| in the adaptive metric",
        low=0.0,
        high=1e6,
        read_when=("optim.metric", ("adaptive",)),
    )
    friendly_sigma: float = key(
        1.0,
        "share of the gradient's average that is removed",
        low=0.0,
        high=1e3,
        read_when=("optim.direction", ("friendly",)),
    )
    friendly_decay: float = key(
        0.9,
        "decay of that average",
        low=0.0,
        high=0.999999,
        read_when=("optim.direction", ("friendly",)),
    )
    alpha: float = key(
        0.7,
        "strength of the reused (LookSAM) or removed (GSAM) part",
        low=0.0,
        high=1e6,
        read_when=("optim.combine", ("reuse", "orthogonal")),
    )
    delta_sigma: float = key(
        0.15,
        "standard deviation of delta-SAM's probes, in units of rms(w)",
        above=0.0,
        high=1e3,
        read_when=("optim.weights", ("delta",)),
    )
    delta_power: float = key(
        1.0,
        "power of the curvature in delta-SAM's weights",
        low=0.0,
        high=1e2,
        read_when=("optim.weights", ("delta",)),
    )
    delta_probe: str = key(
        "central",
        "second difference along one probe, or mixed along two",
        read_when=("optim.weights", ("delta",)),
        choices=("central", "mixed"),
    )
    delta_descent: str = key(
        "plain",
        "the loss at the moved point: the plain mean, or weighted as the ascent's",
        choices=("plain", "reweighted"),
        read_when=("optim.weights", ("delta",)),
    )
    cotangent: str = key(
        "auto",
        "keep the clean cotangent, or rebuild it chunk by chunk",
        read_when=("optim.path", COTANGENT_PATHS),
        choices=("auto", "store", "rebuild"),
    )
    cotangent_share: float = key(
        0.5,
        "share of free memory that cotangent=auto may fill",
        above=0.0,
        high=1.0,
        mutable=True,
        read_when=("optim.cotangent", ("auto",)),
    )
    compute: str = key(
        "precision",
        "precision of the rule's passes: the run's own, or IEEE fp32",
        read_when=MOVED,
        choices=("precision", "fp32"),
    )


@dataclass
class OptimConfig(RuleConfig):
    """The base optimiser, the gradient rule, and when the rule acts."""

    name: str = key("adamw", "name of the method, used in the run's name")
    base: str = key(
        "adamw",
        "base optimiser that steps on the rule's gradient; muon: torch's, for the blocks' matrices,"
        " beside AdamW",
        choices=("adamw", "sgd", "muon"),
    )
    lr: float = key(1e-3, "peak learning rate", above=0.0, high=1e6)
    momentum: float = key(
        0.9, "momentum of SGD", low=0.0, high=0.999999, read_when=("optim.base", ("sgd",))
    )
    muon_momentum: float = key(
        0.95,
        "momentum of Muon, Nesterov's",
        low=0.0,
        high=0.999999,
        read_when=("optim.base", ("muon",)),
    )
    beta1: float = key(0.9, "decay of the first moment", low=0.0, high=0.999999, read_when=ADAM)
    beta2: float = key(0.95, "decay of the second moment", low=0.0, high=0.999999, read_when=ADAM)
    eps: float = key(1e-8, "Adam's epsilon", above=0.0, high=1e6, read_when=ADAM)
    weight_decay: float = key(
        0.1, "decay of matrices only: decoupled, SGD's in the gradient", low=0.0, high=1e6
    )
    clip: float | None = key(
        1.0, "clip the final gradient at this global norm; null: never", above=0.0, high=1e30
    )
    rho_schedule: str = key(
        "constant",
        "radius from start to stop; warmup: rises from 0; cosine: falls to 0; lr: as the learning"
        " rate",
        read_when=MOVED,
        choices=("constant", "warmup", "cosine", "lr"),
    )
    rho_warmup: float = key(
        0.1,
        "share of the perturbed steps in which the radius warms up",
        above=0.0,
        high=1.0,
        read_when=("optim.rho_schedule", ("warmup",)),
    )
    num_groups: int = key(
        1,
        "groups of the global batch that are perturbed apart",
        low=1,
        high=2**20,
        read_when=("optim.scope", ("micro_batch",)),
    )
    compute_matched: bool = key(
        False,
        "shorten the run until its FLOPs equal AdamW's over the full schedule",
        read_when=MOVED,
    )
    diagnostics_every: int | None = key(
        None,
        "logged steps between diagnostics that cost passes: fidelity, parts of SAM's change; never"
        " by default",
        low=1,
        high=STEPS,
        mutable=True,
        read_when=MOVED,
    )


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
    name: str = key("pretrain", "what the run learns", choices=("pretrain",))


@dataclass
class EvaluationConfig:
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


@dataclass
class LauncherConfig:
    """How a sweep gets onto machines, `hydra.launcher`; the names are joblib's and submitit's."""

    _target_: str = "hydra_plugins.flatgpt.SweepLauncher"
    scheduler: str = key(
        "local", "hydra/launcher sets it; all below n_jobs is for slurm", choices=("local", "slurm")
    )
    n_jobs: int | None = key(
        None,
        "local: runs at a time; default as many as have GPUs of their own, else 1",
        low=1,
        high=2**12,
    )
    array_parallelism: int = key(256, "runs at a time", low=1, high=10**6)
    nodes: int = key(1, "nodes of a run", low=1, high=10**5)
    gpus_per_node: int | None = key(None, "GPUs of a run on each node", low=1, high=2**10)
    tasks_per_node: int | None = key(
        None, "processes of a run on each node; default one per GPU, else 1", low=1, high=2**12
    )
    cpus_per_task: int | None = key(None, "cores of a process", low=1, high=2**12)
    mem_gb: float | None = key(None, "memory on each node", above=0.0, high=1e6)
    timeout_min: int = key(60, "time limit, in minutes", low=1, high=10**7)
    signal_delay_s: int = key(
        120,
        "seconds before the time limit at which a run is told to save; less than timeout_min",
        low=1,
        high=10**8,
    )
    max_num_timeout: int = key(
        3,
        "how often a run goes on in another job after a time-out: told to save in the last fifth,"
        " or the last 10 minutes where these are more, of its time",
        low=0,
        high=10**6,
    )
    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that the nodes need")
    setup: list[str] = key([], "shell commands before the run, such as module load cuda")
    additional_parameters: dict[str, Any] = key(
        {}, "further options of sbatch, such as {exclude: node7}"
    )

    @property
    def tasks(self) -> int:
        """Processes of a run on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass
class SweeperConfig:
    """How Hydra makes combinations of values."""

    _target_: str = "hydra_plugins.flatgpt.GridSweeper"
    params: dict[str, str] | None = None


def walk(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """(dotted name, field) of every key, depth first, of a config or of its class."""
    for entry in fields(section):
        if "meaning" in entry.metadata:
            yield prefix + entry.name, entry
        else:
            yield from walk(entry.type, f"{prefix}{entry.name}.")


def lookup(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        config = getattr(config, part) if is_dataclass(config) else config[part]
    return config


KEYS = dict(walk())


def type_name(entry: Field) -> str:
    """The type of a key, as a person writes it."""
    return re.sub(r"<class '(\w+)'>|typing\.", r"\1", str(entry.type))


def meaning(entry: Field) -> str:
    """The meaning of a key with its choices and when it is read."""
    rules = entry.metadata
    text = rules["meaning"]
    if "choices" in rules:
        text += f" [{' | '.join(rules['choices'])}]"
    if "read_when" in rules:
        other, values = rules["read_when"]
        idle = [
            choice for choice in KEYS[other].metadata.get("choices", ()) if choice not in values
        ]
        shown = [
            f"{other}={'null' if value is None else value}"
            for value in (idle if 0 < len(idle) < len(values) else values)
        ]
        text += f" ({'unless' if 0 < len(idle) < len(values) else 'with'} {' or '.join(shown)})"
    return text


def is_read(config: Config, name: str) -> bool:
    """Whether a run of this configuration reads the key, given its `read_when` and that of the key
    named there."""
    condition = KEYS[name].metadata.get("read_when")
    return condition is None or (
        lookup(config, condition[0]) in condition[1] and is_read(config, condition[0])
    )
