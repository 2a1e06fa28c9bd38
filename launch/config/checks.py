"""Keys that are each in order but cannot hold together: one check for each section."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from conf.key import check_value
from conf.keys import is_read, lookup
from conf.overrides import CONF, groups
from conf.ranks import num_processes, rank_and_world
from conf.rule import OptimConfig, RuleConfig
from conf.schema import Config
from conf.text import DataConfig
from data.files import read_yaml
from optim import check_axes


def check_names(config: Config) -> None:
    """Raises ValueError where a run would be called by the name of a choice that it is not: a
    report takes it for that."""
    # A name of one's own claims nothing; that of a file in conf/optim claims the path in it.
    moves, claims = config.optim.path != "none", claimed("optim", config.optim.name, "path")
    if moves and claims == "none":
        method = f"{config.optim.path}_sam"
        if config.optim.path == "full":
            method = "sam"
        raise ValueError(
            f"optim.path={config.optim.path} moves the weights, and the run would be called"
            f" {config.optim.name}; use optim={method}, or a file of your own in conf/optim with"
            " a name: in it"
        )
    if not moves and claims is None and (axes := axes_of_method(config.optim.name)):
        raise ValueError(
            f"conf/optim/{config.optim.name}.yaml sets {', '.join(axes)} but no path, so it would"
            " train by the plain gradient; give it path: full, or another"
        )
    if not moves and claims not in ("none", None):
        raise ValueError(
            "optim.path=none is the plain gradient, and the run would be called"
            f" {config.optim.name}; use optim=adamw"
        )
    source = config.data.source
    if claimed("data", config.data.name, "source") not in (source, None):
        raise ValueError(
            f"data.source={source} is another corpus, and the run would be called"
            f" {config.data.name}; use data={source}"
        )


def check_given_names(overrides: list[str]) -> None:
    """Raises ValueError where optim.name is given as that of a method which was not chosen: a
    report takes the run for that."""
    # Seen in the words that were typed: once composed, nothing tells who set the name.
    given = dict(override.partition("=")[::2] for override in overrides)
    name = given.get("optim.name", "").strip(" '\"")
    if name and name in groups()["optim"] and name != given.get("optim", "").strip(" '\""):
        raise ValueError(
            f"optim.name={name} is the name of a method, and the run need not be that; use"
            f" optim={name}, or another name"
        )


def axes_of_method(name: str) -> list[str]:
    """Returns the keys of the gradient rule that a file of conf/optim sets."""
    method = read_yaml(Path(CONF) / "optim" / f"{name}.yaml", dict, {})
    return [entry.name for entry in fields(RuleConfig) if entry.name in method]


def claimed(group: str, name: str, key: str) -> Any:
    """Returns what the choice of a group says of a key; None where there is no such choice, or it
    does not say."""
    return read_yaml(Path(CONF) / group / f"{name}.yaml", dict, {}).get(key)


def check_contradictions(config: Config) -> None:
    """Raises ValueError for keys that are each in order but cannot hold together."""
    check_model(config)
    check_parallel(config)
    check_batch(config)
    check_horizon(config)
    check_data(config)
    check_rule(config)
    check_folder_names(config)
    check_init(config)
    check_tracking(config)


def check_model(config: Config) -> None:
    """Raises ValueError where heads do not share the width of the model equally."""
    model = config.model
    if model.width % model.num_heads:
        raise ValueError(
            f"model.width={model.width} is not divisible by model.num_heads={model.num_heads};"
            " choose a divisor of the width"
        )


def check_parallel(config: Config) -> None:
    """Raises ValueError where the processes that were started are not those that were asked for."""
    parallel, started = config.parallel, rank_and_world()[1]
    world = num_processes(parallel)
    # A plan for many processes is printed by one.
    is_planned = config.plan_only and started == 1
    if parallel.processes not in (None, started) and not is_planned:
        verb = "were"
        if started == 1:
            verb = "was"
        raise ValueError(
            f"parallel.processes={world}, but {started} {verb} started; use torchrun"
            f" --nproc-per-node {world}, or plan_only=true"
        )
    if parallel.name == "single" and world > 1:
        raise ValueError(
            f"parallel=single with {world} processes: each would train the same run; use"
            " parallel=fsdp or hsdp"
        )
    # A single process may be that of a sweep, which trains nothing itself.
    if parallel.name == "hsdp" and world > 1 and world % parallel.replicas:
        raise ValueError(
            f"parallel.replicas={parallel.replicas} does not divide {world} processes; choose a"
            " divisor"
        )


def check_batch(config: Config) -> None:
    """Raises ValueError for a batch that cannot be parted, and for sequences that are longer than
    the model reads."""
    batch, world = config.batch, num_processes(config.parallel)
    micro, longest = batch.micro or 1, config.model.max_length
    if batch.sequences % micro:
        raise ValueError(
            f"batch.sequences={batch.sequences} is not divisible by batch.micro={batch.micro};"
            " choose a divisor of batch.sequences"
        )
    if batch.sequences % (micro * world):
        raise ValueError(
            f"batch.sequences={batch.sequences} is not divisible by batch.micro={micro} x {world}"
            " processes; choose a multiple"
        )
    if batch.length > longest:
        raise ValueError(
            f"batch.length={batch.length} exceeds model.max_length={longest}; shorten the one or"
            " raise the other"
        )


def check_horizon(config: Config) -> None:
    """Raises ValueError where nothing says how long the run is."""
    schedule = config.schedule
    if schedule.name == "fixed" and schedule.steps is None and schedule.tokens is None:
        raise ValueError(
            "schedule.steps=null leaves no horizon; set schedule.steps or schedule.tokens"
        )


def check_data(config: Config) -> None:
    """Raises ValueError where the text to train on is not named, or named twice."""
    data = config.data
    check_one_text(data)
    check_file_lists(data)
    for name, source in data.sources.items():
        check_value(f"data.sources.{name}.weight", source.weight, {"above": 0.0, "high": 1e9})


def check_one_text(data: DataConfig) -> None:
    """Raises ValueError unless exactly one key names the text to train on."""
    if data.source in ("text", "tokens") and (data.path is None) == (not data.sources):
        raise ValueError(
            f"data.path={data.path} with {len(data.sources)} data.sources; data={data.source} needs"
            " one of the two: data.path=FILES or data.sources"
        )
    if data.source == "hub" and not (isinstance(data.path, str) and data.path):
        raise ValueError(
            f"data.path={data.path} names no dataset; data=hub needs its name on the hub, as in"
            " data.path=allenai/c4, or a folder"
        )


def check_file_lists(data: DataConfig) -> None:
    """Raises ValueError for a key of files that names none."""
    named = {"data.path": data.path}
    if data.path is None:
        named = {}
    named |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    named |= {f"data.validation.{name}": files for name, files in data.validation.items()}
    for name, files in named.items():
        # YAML makes a number or a mapping of what was meant as a name.
        listed = files if isinstance(files, list) else [files]
        if not files or not all(isinstance(file, str) for file in listed):
            raise ValueError(
                f"{name}={files} names no files; give a file, a glob or a list of them"
            )


def check_folder_names(config: Config) -> None:
    """Raises ValueError for a name that a folder cannot have."""
    # Three names become part of the run folder's; those of sources and validation sets are of
    # folders in the cache.
    names = [(name, lookup(config, name)) for name in ("model.name", "optim.name", "data.name")]
    names += [("data.sources", name) for name in config.data.sources]
    names += [("data.validation", name) for name in config.data.validation]
    for name, value in names:
        if not re.fullmatch(r"\w[\w.+-]*", str(value)):
            raise ValueError(
                f"{name}={value} goes into a folder's name; use letters, digits and _ . + - only,"
                " the first a letter or digit"
            )


def check_init(config: Config) -> None:
    """Raises ValueError where it is not one place that the weights come from."""
    init = config.init
    if init.run is not None and init.hf is not None:
        raise ValueError(
            f"init.hf={init.hf} and init.run={init.run} both give the weights to start from; set"
            " one of the two"
        )
    if init.run is None and init.step is not None:
        raise ValueError(f"init.step={init.step} needs a run to take it from; set init.run=DIR")
    if init.run is None and init.optimizer:
        raise ValueError("init.optimizer=true needs a run to take it from; set init.run=DIR")


def check_rule(config: Config) -> None:
    """Raises ValueError where the axes of the rule, its base optimiser and the batch do not fit
    each other."""
    optim, parallel = config.optim, config.parallel
    if optim.base == "muon" and parallel.name != "single":
        raise ValueError(
            f"optim.base=muon orthogonalises whole matrices, which parallel={parallel.name}"
            " keeps in shards; use parallel=single"
        )
    # The plain gradient has no axes that could contradict each other.
    if optim.path == "none":
        return
    try:
        # Written for one's own loops, where the axes are arguments; here they are keys.
        check_axes(optim)
    except ValueError as error:
        axes = "|".join(entry.name for entry in fields(RuleConfig))
        raise ValueError(re.sub(rf"\b({axes})=", r"optim.\1=", str(error))) from None
    check_window(optim)
    check_base(optim)
    if optim.scope == "replica" and (parallel.name != "hsdp" or parallel.replicas == 1):
        raise ValueError(
            f"optim.scope=replica needs replicas, which parallel={parallel.name} does not have;"
            " use parallel=hsdp with parallel.replicas, or optim.scope=batch or micro_batch"
        )
    if is_read(config, "optim.num_groups"):
        check_groups(config)
    if optim.compute_matched and is_read(config, "optim.cotangent") and optim.cotangent == "auto":
        raise ValueError(
            "optim.compute_matched=true needs to know the cost of a step, and optim.cotangent=auto"
            " decides it on the machine; use optim.cotangent=store or rebuild"
        )


def check_window(optim: OptimConfig) -> None:
    """Raises ValueError where the perturbed steps begin or end within a step, and where the period
    leaves nothing to reuse."""
    # Up to 1 a stop, and below 1 a start, is a fraction of the horizon; beyond, a step.
    stop = optim.stop or 0.0
    for name, value, is_step in (
        ("start", optim.start, optim.start >= 1),
        ("stop", stop, stop > 1),
    ):
        if is_step and value % 1:
            raise ValueError(
                f"optim.{name}={value:g} is no whole step; give one, or a fraction of the horizon"
                " below 1"
            )
    if optim.combine == "reuse" and optim.period == 1:
        raise ValueError(
            "optim.combine=reuse is about the steps between perturbed ones, and optim.period=1"
            " leaves none; set optim.period=2 or more, or optim.combine=replace"
        )


def check_base(optim: OptimConfig) -> None:
    """Raises ValueError where the rule needs what the base optimiser does not keep."""
    if optim.metric == "adam" and optim.base != "adamw":
        raise ValueError(
            f"optim.metric=adam needs Adam's second moment, which optim.base={optim.base} does not"
            " keep of every weight; use optim.base=adamw or optim.metric=euclidean"
        )
    if optim.direction == "momentum" and optim.base == "sgd" and optim.momentum == 0:
        raise ValueError(
            "optim.direction=momentum needs a momentum, and optim.momentum=0; raise it"
        )


def check_groups(config: Config) -> None:
    """Raises ValueError where the batch cannot be parted into groups of whole micro-batches."""
    optim, batch, world = config.optim, config.batch, num_processes(config.parallel)
    if optim.num_groups == 1:
        raise ValueError(
            f"optim.num_groups=1 makes the whole batch one group, so optim.scope={optim.scope}"
            " means nothing; set 2 or more, or optim.scope=batch"
        )
    # A group is whole micro-batches, as many on every process.
    micro = batch.micro or 1
    if batch.sequences % (optim.num_groups * micro * world):
        of_processes = ""
        if world > 1:
            of_processes = f" x {world} processes"
        raise ValueError(
            f"optim.num_groups={optim.num_groups}: {batch.sequences} batch.sequences /"
            f" {optim.num_groups} groups must be a multiple of"
            f" batch.micro={micro}{of_processes}; choose another number of groups or another"
            " batch.micro"
        )


def check_tracking(config: Config) -> None:
    """Raises ValueError for a name that W&B refuses: the run would go on without its pages."""
    tracking = config.tracking
    # Without a name there is nothing to ask, and W&B's library takes a second to load.
    if tracking.mode == "off" or not (tracking.project or tracking.tags):
        return
    import wandb

    settings = {"project": tracking.project, "run_tags": tracking.tags}
    for name, value in settings.items():
        try:
            wandb.Settings(**{name: value})  # type: ignore[arg-type]
        except Exception as error:
            # Pydantic puts the name of the setting before the reason, on lines of their own.
            list_faults = getattr(error, "errors", list)
            faults = [fault["msg"].removeprefix("Value error, ") for fault in list_faults()]
            reason = "; ".join(faults) or str(error)
            given = value
            if isinstance(value, list):
                given = ",".join(value)
            raise ValueError(
                f"tracking.{name.removeprefix('run_')}={given} is refused by W&B ({reason});"
                " choose another"
            ) from None
