"""From the command line to a checked `Config`, and to the options of the other commands.

A user's mistake, whether Hydra finds it or we do, ends before anything is built: exit code 2 and
one line that names the key, the value and the remedy. launch/overrides.py reads what is typed,
launch/usage.py writes the help."""

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
import msgspec
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from conf.schema import (
    KEYS,
    Config,
    DataConfig,
    LauncherConfig,
    RuleConfig,
    SourceConfig,
    SweeperConfig,
    check_value,
    expand,
    lookup,
)
from data.files import read_yaml
from launch.console import end_quietly
from launch.launcher import register
from launch.overrides import (
    CONF,
    HELP,
    asks_for_help,
    check_overrides,
    explain,
    for_hydra,
    groups,
    no_such_option,
    wrong_type,
)
from launch.process import num_processes, rank_and_world
from launch.usage import command_help, default_of, run_help
from optim import check_axes

EXIT_USER_ERROR = 2
T = TypeVar("T")

ConfigStore.instance().store(name="schema", node=Config)
for scheduler in ("local", "slurm"):
    ConfigStore.instance().store(
        group="hydra/launcher", name=scheduler, node=LauncherConfig(scheduler=scheduler)
    )
ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=SweeperConfig)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and exit code 2, and Ctrl-C into exit code
    130. Ends quietly where nobody reads on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal lacks is shown as an escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        end_quietly(sys.stdout)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except (ValueError, YAMLError) as error:
        if os.environ.get("FLATGPT_TRACEBACK"):
            raise
        fail(" ".join(str(error).split()))
    except OSError as error:
        if os.environ.get("FLATGPT_TRACEBACK"):
            raise
        fail(refused(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def refused(error: OSError) -> str:
    """What to say where the system refuses: the file, why, and the remedy."""
    full, forbidden = (
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        (errno.EACCES, errno.EPERM, errno.EROFS),
    )
    remedy = (
        "make room there"
        if error.errno in full
        else "name a place that can be written"
        if error.errno in forbidden
        else "mend that"
    )
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; {remedy}, and give the same command again"


def fail(line: str) -> NoReturn:
    """Ends the process as a user's mistake."""
    if rank_and_world()[0] == 0:  # the others would say the same
        print(f"error: {line}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def main(run: Callable[[Config], int]) -> None:
    """Calls `run` with the configuration that the command line asks for; exits with what it
    returns."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us, instead of printing a traceback of its own
    register()

    @hydra.main(version_base="1.3", config_path=CONF, config_name="config")
    def job(composed: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        with (
            user_errors()
        ):  # here too: Hydra would print a line of its own about an exception that it sees
            config = check(composed, list(HydraConfig.get().overrides.task))
            code = run(config)
        if code:
            sys.exit(code)

    arguments = sys.argv[1:]
    with user_errors():
        if asks_for_help(arguments):
            print(run_help(defaults()))
            sys.exit(0)
        if any(argument.startswith("-") for argument in arguments):
            sys.argv[1:] = for_hydra_application(arguments)
            job()
        else:
            config = compose(arguments)
            if config.print_only:
                raise ValueError(
                    "print_only=true is for sweeps, python train.py -m ...; use plan_only=true for"
                    " one run"
                )
            sys.exit(run(config))


def for_hydra_application(arguments: list[str]) -> list[str]:
    """Returns a command line with options as Hydra's application takes it: options first, and
    checked overrides in its grammar."""
    from hydra._internal.utils import get_args_parser

    if hasattr(argparse.ArgumentParser, "_check_help"):
        # Python 3.14 refuses help that is no string, as Hydra's of --shell-completion is.
        vars_of_parser: Any = argparse.ArgumentParser
        vars_of_parser._check_help = lambda _parser, _action: None
    parser = get_args_parser()
    known = [option for action in parser._actions for option in action.option_strings]

    def refuse(message: str) -> NoReturn:
        unknown = next(
            (
                text
                for text in arguments
                if text.startswith("-") and text.partition("=")[0] not in known
            ),
            None,
        )
        raise ValueError(
            no_such_option(unknown, known) if unknown else f"{message}; --help lists what there is"
        )

    vars(parser)["error"] = refuse
    given = parser.parse_intermixed_args(arguments)
    if given.shell_completion or given.hydra_help:
        return arguments
    check_overrides(given.overrides, given.multirun)
    options = [argument for argument in arguments if argument not in given.overrides]
    return [*options, *(for_hydra(override, given.multirun) for override in given.overrides)]


def compose(overrides: list[str]) -> Config:
    """The checked configuration of a list of overrides, without Hydra's application around it.

    Raises a HydraException, an OmegaConfBaseException or a ValueError for a user's mistake (see
    `user_errors`)."""
    check_overrides(overrides)
    return check(composed(overrides), overrides)


def composed(overrides: list[str]) -> DictConfig:
    """Returns what Hydra makes of overrides."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("config", [for_hydra(override, False) for override in overrides])


def defaults() -> Config:
    """Returns the configuration of no overrides, unchecked: help works where nothing else does."""
    typed: Any = OmegaConf.to_object(composed([]))
    return typed


def parse(
    options: type[T], arguments: list[str], others: tuple[str, ...] = ()
) -> tuple[T, list[str]]:
    """Reads the arguments of a command.

    Prints its help and exits where that is asked for, or where nothing is given.

    Args:
        options: dataclass of the command's keys; its docstring says what the command is for, with
        examples
        arguments: words of the command line
        others: first parts of the overrides of a run that the command takes as well

    Returns:
        the typed options, and the overrides of `others`

    Raises:
        ValueError: an argument is neither, or missing, or has a wrong type or a value out of range
    """
    offer_help(options, arguments, others)
    entries: dict[str, Any] = {entry.name: entry for entry in fields(options)}  # type: ignore[arg-type]
    positional = next(
        (name for name, entry in entries.items() if "positional" in entry.metadata), None
    )
    given, rest = dict[str, Any](), list[str]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if positional and not argument.startswith("-") and (not equals or Path(argument).is_dir()):
            given.setdefault(positional, []).append(argument)
        elif equals and re.split("[.@]", name)[0] in others:
            rest.append(argument)
        elif equals and name in entries and name != positional:
            given[name] = typed(entries[name], value, argument)
        else:
            known = [f"{entry}=" for entry in entries if entry != positional]
            raise ValueError(f"{no_such_option(argument, [*known, *HELP])}: {', '.join(known)}")
    for name, entry in entries.items():
        if name not in given and default_of(entry) == MISSING:
            raise ValueError(f"{name} is missing; give {name}=..., {entry.metadata['meaning']}")
        if name in given and given[name] is not None:
            check_value(entry.metadata.get("positional", name), given[name], entry.metadata)
            if "path" in entry.metadata:
                given[name] = expanded(name, given[name])
    return options(**given), rest


def offer_help(options: Any, arguments: list[str], others: tuple[str, ...] = ()) -> None:
    """Prints what a command takes, and exits, where that is asked for or nothing is given."""
    if not arguments or asks_for_help(arguments):
        print(command_help(options, defaults(), others))
        # A script whose variables are unset has not done what it was for.
        sys.exit(0 if arguments else EXIT_USER_ERROR)


def typed(entry: Any, value: str, argument: str) -> Any:
    """Returns the value of an option: text as it stands, anything else by its type. Raises
    ValueError for one of another type."""
    if entry.type is str or (entry.type == str | None and value.lower() != "null"):
        return value
    try:
        if "bool" in str(entry.type) and value.lower() not in ("true", "false", "null"):
            raise ValueError
        return msgspec.convert(value, entry.type, strict=False)
    except ValueError:
        raise ValueError(wrong_type(entry, argument)) from None


def expanded(name: str, value: Any) -> Any:
    """Returns a path, or a list or mapping of paths, with ~ as the home folder."""
    if isinstance(value, str):
        return expand(name, value)
    if isinstance(value, list):
        return [expanded(name, item) for item in value]
    if isinstance(value, dict):
        return {key: expanded(f"{name}.{key}", item) for key, item in value.items()}
    return value


def check(composed: DictConfig, overrides: list[str]) -> Config:
    """The typed configuration of a composed one. Raises ValueError for a value out of range or a
    contradiction, and notes once which of the given keys the chosen method does not read."""
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    name_files(config.data)
    if config.tokenizer.name == "hf" and config.tokenizer.path is None:
        config.tokenizer.path = config.init.hf
    for name, entry in KEYS.items():
        value = lookup(config, name)
        check_value(name, value, entry.metadata)
        # A default is expanded where it is used: who reads the run may have another home.
        if "path" in entry.metadata and value != entry.default:
            *section, last = name.split(".")
            vars(lookup(config, ".".join(section)) if section else config)[last] = expanded(
                name, value
            )
    for name, source in config.data.sources.items():
        check_value(f"data.sources.{name}.path", source.path, {})
        source.path = expanded(f"data.sources.{name}.path", source.path)
    check_names(config)
    check_given_names(overrides)
    check_contradictions(config)
    given = [re.split("[=@]", override.lstrip("+~"))[0] for override in overrides]
    if idle := [name for name in given if name in KEYS and not is_read(config, name)]:
        print(
            f"note: not read by this run, so left out of its name and identity: {', '.join(idle)}",
            file=sys.stderr,
        )
    return config


def name_files(data: DataConfig) -> None:
    """Types data.sources and data.validation, in place. Raises ValueError for anything that is not
    name: {path, weight}, name: files."""
    try:
        given = sorted((data.sources if data.sources is not None else {}).items())
        entries = {
            str(name): OmegaConf.merge(OmegaConf.structured(SourceConfig), entry)
            for name, entry in given
        }
        data.sources = {name: OmegaConf.to_object(entry) for name, entry in entries.items()}
    except (AttributeError, TypeError, ValueError, OmegaConfBaseException):
        raise ValueError(
            f"data.sources={data.sources} is malformed; write data.sources='{{NAME: {{path: FILES,"
            " weight: 1.0}}'"
        ) from None
    if data.source == "hub" and isinstance(data.validation, str):
        data.validation = {"validation": data.validation}
    if not isinstance(data.validation, (dict, type(None))):
        raise ValueError(
            f"data.validation={data.validation} is malformed; write data.validation='{{NAME:"
            " FILES}'"
        )
    data.validation = {str(name): files for name, files in (data.validation or {}).items()}


def check_names(config: Config) -> None:
    """Raises ValueError where a run would be called by the name of a choice that it is not: a
    report takes it for that."""
    moves, claims = config.optim.path != "none", claimed("optim", config.optim.name, "path")
    if moves and claims == "none":
        method = "sam" if config.optim.path == "full" else f"{config.optim.path}_sam"
        raise ValueError(
            f"optim.path={config.optim.path} moves the weights, and the run would be called"
            f" {config.optim.name}; use optim={method}"
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
    given = dict(override.partition("=")[::2] for override in overrides)
    name = given.get("optim.name", "").strip(" '\"")
    if name and name in groups()["optim"] and name != given.get("optim", "").strip(" '\""):
        raise ValueError(
            f"optim.name={name} is the name of a method, and the run need not be that; use"
            f" optim={name}, or another name"
        )


def claimed(group: str, name: str, key: str) -> Any:
    """Returns what the choice of a group says of a key; None where there is no such choice, or it
    does not say."""
    return read_yaml(Path(CONF) / group / f"{name}.yaml", dict, {}).get(key)


def check_contradictions(config: Config) -> None:
    """Raises ValueError for keys that are each in order but cannot hold together."""
    batch, model, schedule, data = config.batch, config.model, config.schedule, config.data
    if model.width % model.num_heads:
        raise ValueError(
            f"model.width={model.width} is not divisible by model.num_heads={model.num_heads};"
            " choose a divisor of the width"
        )
    parallel, started, world = config.parallel, rank_and_world()[1], num_processes(config.parallel)
    if parallel.processes not in (None, started) and not (config.plan_only and started == 1):
        raise ValueError(
            f"parallel.processes={world}, but {started} {'was' if started == 1 else 'were'}"
            f" started; use torchrun --nproc-per-node {world}, or plan_only=true"
        )
    if parallel.name == "single" and world > 1:
        raise ValueError(
            f"parallel=single with {world} processes: each would train the same run; use"
            " parallel=fsdp or hsdp"
        )
    if (
        parallel.name == "hsdp" and world > 1 and world % parallel.replicas
    ):  # one process may be a sweep's, which trains nothing itself
        raise ValueError(
            f"parallel.replicas={parallel.replicas} does not divide {world} processes; choose a"
            " divisor"
        )
    if batch.sequences % (batch.micro or 1):
        raise ValueError(
            f"batch.sequences={batch.sequences} is not divisible by batch.micro={batch.micro};"
            " choose a divisor of batch.sequences"
        )
    if batch.sequences % ((batch.micro or 1) * world):
        raise ValueError(
            f"batch.sequences={batch.sequences} is not divisible by batch.micro={batch.micro or 1}"
            f" x {world} processes; choose a multiple"
        )
    if batch.length > model.max_length:
        raise ValueError(
            f"batch.length={batch.length} exceeds model.max_length={model.max_length}; shorten the"
            " one or raise the other"
        )
    if schedule.name == "fixed" and schedule.steps is None and schedule.tokens is None:
        raise ValueError(
            "schedule.steps=null leaves no horizon; set schedule.steps or schedule.tokens"
        )
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
    check_rule(config)
    files_of = {} if data.path is None else {"data.path": data.path}
    files_of |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    files_of |= {f"data.validation.{name}": files for name, files in data.validation.items()}
    for name, files in files_of.items():
        if not files or not all(
            isinstance(file, str) for file in (files if isinstance(files, list) else [files])
        ):
            raise ValueError(
                f"{name}={files} names no files; give a file, a glob or a list of them"
            )
    for name, source in data.sources.items():
        check_value(f"data.sources.{name}.weight", source.weight, {"above": 0.0, "high": 1e9})
    names = [(name, lookup(config, name)) for name in ("model.name", "optim.name", "data.name")]
    for name, value in (
        names
        + [("data.sources", name) for name in data.sources]
        + [("data.validation", name) for name in data.validation]
    ):
        if not re.fullmatch(r"\w[\w.+-]*", str(value)):
            raise ValueError(
                f"{name}={value} goes into a folder's name; use letters, digits and _ . + - only,"
                " the first a letter or digit"
            )
    if config.init.run is not None and config.init.hf is not None:
        raise ValueError(
            f"init.hf={config.init.hf} and init.run={config.init.run} both give the weights to"
            " start from; set one of the two"
        )
    if config.init.run is None and config.init.step is not None:
        raise ValueError(
            f"init.step={config.init.step} needs a run to take it from; set init.run=DIR"
        )
    if config.init.run is None and config.init.optimizer:
        raise ValueError("init.optimizer=true needs a run to take it from; set init.run=DIR")


def check_rule(config: Config) -> None:
    """Raises ValueError where the axes of the rule, its base optimiser and the batch do not fit
    each other."""
    optim, batch = config.optim, config.batch
    if optim.base == "muon" and config.parallel.name != "single":
        raise ValueError(
            f"optim.base=muon orthogonalises whole matrices, which parallel={config.parallel.name}"
            " keeps in shards; use parallel=single"
        )
    if optim.path == "none":
        return
    try:
        check_axes(optim)
    except ValueError as error:
        raise ValueError(
            re.sub(
                rf"\b({'|'.join(entry.name for entry in fields(RuleConfig))})=",
                r"optim.\1=",
                str(error),
            )
        ) from None
    for name, value, whole in (
        ("start", optim.start, optim.start >= 1),
        ("stop", optim.stop or 0, (optim.stop or 0) > 1),
    ):
        if whole and value % 1:
            raise ValueError(
                f"optim.{name}={value:g} is no whole step; give one, or a fraction of the horizon"
                " below 1"
            )
    if optim.scope == "replica" and (
        config.parallel.name != "hsdp" or config.parallel.replicas == 1
    ):
        raise ValueError(
            f"optim.scope=replica needs replicas, which parallel={config.parallel.name} does not"
            " have; use parallel=hsdp with parallel.replicas, or optim.scope=batch or micro_batch"
        )
    if optim.metric == "adam" and optim.base != "adamw":
        raise ValueError(
            f"optim.metric=adam needs Adam's second moment, which optim.base={optim.base} does not"
            " keep of every weight; use optim.base=adamw or optim.metric=euclidean"
        )
    if optim.combine == "reuse" and optim.period == 1:
        raise ValueError(
            "optim.combine=reuse is about the steps between perturbed ones, and optim.period=1"
            " leaves none; set optim.period=2 or more, or optim.combine=replace"
        )
    if optim.direction == "momentum" and optim.base == "sgd" and optim.momentum == 0:
        raise ValueError(
            "optim.direction=momentum needs a momentum, and optim.momentum=0; raise it"
        )
    if is_read(config, "optim.num_groups"):
        if optim.num_groups == 1:
            raise ValueError(
                f"optim.num_groups=1 makes the whole batch one group, so optim.scope={optim.scope}"
                " means nothing; set 2 or more, or optim.scope=batch"
            )
        size, world = batch.micro or 1, num_processes(config.parallel)
        if batch.sequences % optim.num_groups or batch.sequences // optim.num_groups % (
            size * world
        ):
            raise ValueError(
                f"optim.num_groups={optim.num_groups}: {batch.sequences} batch.sequences /"
                f" {optim.num_groups} groups must be a multiple of"
                f" batch.micro={size}{f' x {world} processes' if world > 1 else ''}; choose another"
                " number of groups or another batch.micro"
            )
    if optim.compute_matched and is_read(config, "optim.cotangent") and optim.cotangent == "auto":
        raise ValueError(
            "optim.compute_matched=true needs to know the cost of a step, and optim.cotangent=auto"
            " decides it on the machine; use optim.cotangent=store or rebuild"
        )


def is_read(config: Config, name: str) -> bool:
    """Whether a run of this configuration reads the key, given its `read_when` and that of the key
    named there."""
    condition = KEYS[name].metadata.get("read_when")
    return condition is None or (
        lookup(config, condition[0]) in condition[1] and is_read(config, condition[0])
    )


def num_groups(config: Config) -> int:
    """Groups of the batch that are perturbed apart."""
    return config.optim.num_groups if is_read(config, "optim.num_groups") else 1


def micro_sequences(config: Config) -> int:
    """Sequences per forward on each process: batch.micro, else all of a group."""
    return config.batch.micro or config.batch.sequences // (
        num_groups(config) * num_processes(config.parallel)
    )
