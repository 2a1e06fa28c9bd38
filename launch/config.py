"""From the command line to a checked `Config`.

A user's mistake, whether Hydra finds it or we do, ends before anything is built: exit code 2 and one line that names the
key, the value and the remedy.
"""

import difflib
import errno
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from conf.schema import KEYS, Config, DataConfig, LauncherConfig, RuleConfig, SourceConfig, SweeperConfig, check_value, lookup, meaning, type_name
from launch.launcher import register
from launch.process import num_processes, rank_and_world
from optim import check_axes

CONF = str(Path(__file__).resolve().parent.parent / "conf")
EXIT_USER_ERROR = 2
T = TypeVar("T")

ConfigStore.instance().store(name="schema", node=Config)
for scheduler in ("local", "slurm"):
    ConfigStore.instance().store(group="hydra/launcher", name=scheduler, node=LauncherConfig(scheduler=scheduler))
ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=SweeperConfig)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
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
    full, forbidden = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EACCES, errno.EPERM, errno.EROFS)
    remedy = "make room there" if error.errno in full else "name a place that can be written" if error.errno in forbidden else "mend that"
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; {remedy}, and give the same command again"


def fail(line: str) -> None:
    """Ends the process as a user's mistake."""
    if rank_and_world()[0] == 0:  # the others would say the same
        print(f"error: {line}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def main(run: Callable[[Config], int]) -> None:
    """Calls `run` with the configuration that the command line asks for; exits with what it returns."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us, instead of printing a traceback of its own
    register()

    @hydra.main(version_base="1.3", config_path=CONF, config_name="config")
    def job(composed: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        with user_errors():  # here too: Hydra would print a line of its own about an exception that it sees
            config = check(composed, list(HydraConfig.get().overrides.task))
            code = run(config)
        if code:
            sys.exit(code)

    flags = any(argument.startswith("-") for argument in sys.argv[1:])  # -m, --cfg and their like are Hydra's own business
    with user_errors():
        if flags:
            for argument in sys.argv[1:]:
                if argument.startswith("-") and "=" in argument and (plain := argument.lstrip("-")).partition("=")[0] in (*KEYS, *groups()):
                    raise ValueError(f"{argument}: keys take no dashes; write {plain}")
            check_overrides([argument for argument in sys.argv[1:] if argument[:1] in "+~" or ("=" in argument and not argument.startswith("-"))])
            job()
        else:
            config = compose(sys.argv[1:])
            if config.print_only:
                raise ValueError("print_only=true is for sweeps, python train.py -m ...; use plan_only=true for one run")
            sys.exit(run(config))


def compose(overrides: list[str]) -> Config:
    """The checked configuration of a list of overrides, without Hydra's application around it.

    Raises a HydraException, an OmegaConfBaseException or a ValueError for a user's mistake (see `user_errors`)."""
    check_overrides(overrides)
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return check(hydra.compose("config", overrides), overrides)


def parse(options: type[T], arguments: list[str], others: tuple[str, ...] = ()) -> tuple[T, list[str]]:
    """The key=value arguments of a tool as its typed `options`, and those whose first part is among `others`. Raises ValueError for
    an argument that is neither, a missing one, a wrong type or a value out of range."""
    entries = {entry.name: entry for entry in fields(options)}  # type: ignore[arg-type]
    parsed, rest = OmegaConf.structured(options), []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and re.split("[.@]", name)[0] in others:
            rest.append(argument)
            continue
        if not equals or name not in entries:
            near = difflib.get_close_matches(name, entries, 1)
            raise ValueError(f"{argument}: no such option; " + (f"did you mean {near[0]}=? " if near else "") + f"it takes {', '.join(entries)}")
        try:
            parsed[name] = None if value == "null" and entries[name].type is not str else value
        except OmegaConfBaseException:
            raise ValueError(wrong_type(entries[name], argument)) from None
    for name, entry in entries.items():
        if OmegaConf.is_missing(parsed, name):
            raise ValueError(f"{name} is missing; give {name}=..., {entry.metadata['meaning']}")
        check_value(name, parsed[name], entry.metadata)
    typed: Any = OmegaConf.to_object(parsed)
    return typed, rest


def check_overrides(overrides: list[str]) -> None:
    """Raises ValueError for an override that is malformed, of neither key nor group, or by `+` or `~`: Hydra would drop a key of the
    schema without a word. A number for a bool, which OmegaConf would take, is refused as well."""
    choices = groups()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise ValueError(f"{text} is malformed; write key=value, and quotes around a value with any of , = : ( ) [ ] {{ }} in it") from None
        name, value = override.key_or_group, override.value()
        if name.startswith(("hydra.", "hydra/")):
            continue
        if override.type != OverrideType.CHANGE:
            raise ValueError(f"{text}: keys are neither added nor taken away; write {name}=VALUE")
        if override.package or not (name in choices or any(f"{name}.".startswith(f"{key}.") for key in KEYS)):
            raise ValueError(no_such_key(name, text))
        if name in choices and (value is None or isinstance(value, (int, float))):
            raise ValueError(f"{text}: no such choice; choose one of {', '.join(choices[name])}")
        if name in KEYS and KEYS[name].type in (bool, bool | None) and isinstance(value, (int, float)) and not isinstance(value, bool):
            raise ValueError(wrong_type(KEYS[name], text))


def check(composed: DictConfig, overrides: list[str]) -> Config:
    """The typed configuration of a composed one. Raises ValueError for a value out of range or a contradiction, and notes once
    which of the given keys the chosen method does not read."""
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    name_files(config.data)
    if config.tokenizer.name == "hf" and config.tokenizer.path is None:
        config.tokenizer.path = config.init.hf
    for name, entry in KEYS.items():
        check_value(name, lookup(config, name), entry.metadata)
    check_contradictions(config)
    if "optim.path=none" in overrides and config.optim.name != "adamw":
        raise ValueError(f"optim.path=none is the plain gradient, and the run would be called {config.optim.name}; use optim=adamw")
    given = [re.split("[=@]", override.lstrip("+~"))[0] for override in overrides]
    if idle := [name for name in given if name in KEYS and not is_read(config, name)]:
        print(f"note: not read by this run, so left out of its name and identity: {', '.join(idle)}", file=sys.stderr)
    return config


def name_files(data: DataConfig) -> None:
    """Types data.sources and data.validation, in place. Raises ValueError for anything that is not name: {path, weight}, name: files."""
    try:
        given = sorted((data.sources if data.sources is not None else {}).items())
        entries = {str(name): OmegaConf.merge(OmegaConf.structured(SourceConfig), entry) for name, entry in given}
        data.sources = {name: OmegaConf.to_object(entry) for name, entry in entries.items()}
    except (AttributeError, TypeError, ValueError, OmegaConfBaseException):
        raise ValueError(f"data.sources={data.sources} is malformed; write data.sources='{{NAME: {{path: FILES, weight: 1.0}}}}'") from None
    if data.source == "hub" and isinstance(data.validation, str):
        data.validation = {"validation": data.validation}
    if not isinstance(data.validation, (dict, type(None))):
        raise ValueError(f"data.validation={data.validation} is malformed; write data.validation='{{NAME: FILES}}'")
    data.validation = {str(name): files for name, files in (data.validation or {}).items()}


def check_contradictions(config: Config) -> None:
    """Raises ValueError for keys that are each in order but cannot hold together."""
    batch, model, schedule, data = config.batch, config.model, config.schedule, config.data
    if model.width % model.num_heads:
        raise ValueError(f"model.width={model.width} is not divisible by model.num_heads={model.num_heads}; choose a divisor of the width")
    parallel, started, world = config.parallel, rank_and_world()[1], num_processes(config.parallel)
    if parallel.processes not in (None, started) and not (config.plan_only and started == 1):
        raise ValueError(f"parallel.processes={world}, but {started} {'was' if started == 1 else 'were'} started; "
                         f"use torchrun --nproc-per-node {world}, or plan_only=true")  # fmt: skip
    if parallel.name == "single" and world > 1:
        raise ValueError(f"parallel=single with {world} processes: each would train the same run; use parallel=fsdp or hsdp")
    if parallel.name == "hsdp" and world > 1 and world % parallel.replicas:  # one process may be a sweep's, which trains nothing itself
        raise ValueError(f"parallel.replicas={parallel.replicas} does not divide {world} processes; choose a divisor")
    if batch.sequences % (batch.micro or 1):
        raise ValueError(f"batch.sequences={batch.sequences} is not divisible by batch.micro={batch.micro}; choose a divisor of batch.sequences")
    if batch.sequences % ((batch.micro or 1) * world):
        raise ValueError(
            f"batch.sequences={batch.sequences} is not divisible by batch.micro={batch.micro or 1} x {world} processes; choose a multiple"
        )
    if batch.length > model.max_length:
        raise ValueError(f"batch.length={batch.length} exceeds model.max_length={model.max_length}; shorten the one or raise the other")
    if schedule.name == "fixed" and schedule.steps is None and schedule.tokens is None:
        raise ValueError("schedule.steps=null leaves no horizon; set schedule.steps or schedule.tokens")
    if data.source in ("text", "tokens") and (data.path is None) == (not data.sources):
        raise ValueError(f"data.path={data.path} with {len(data.sources)} data.sources; data={data.source} needs one of the two: "
                         "data.path=FILES or data.sources")  # fmt: skip
    if data.source == "hub" and not (isinstance(data.path, str) and data.path):
        raise ValueError(f"data.path={data.path} names no dataset; data=hub needs its name on the hub, as in data.path=allenai/c4, or a folder")
    check_rule(config)
    files_of = {} if data.path is None else {"data.path": data.path}
    files_of |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    files_of |= {f"data.validation.{name}": files for name, files in data.validation.items()}
    for name, files in files_of.items():
        if not files or not all(isinstance(file, str) and file for file in (files if isinstance(files, list) else [files])):
            raise ValueError(f"{name}={files} names no files; give a file, a glob or a list of them")
    for name, source in data.sources.items():
        check_value(f"data.sources.{name}.weight", source.weight, {"above": 0.0})
    names = [(name, lookup(config, name)) for name in ("model.name", "optim.name", "data.name")]
    for name, value in names + [("data.sources", name) for name in data.sources] + [("data.validation", name) for name in data.validation]:
        if not re.fullmatch(r"\w[\w.+-]*", str(value)):
            raise ValueError(f"{name}={value} goes into a folder's name; use letters, digits and _ . + - only, the first a letter or digit")
    if config.init.run is not None and config.init.hf is not None:
        raise ValueError(f"init.hf={config.init.hf} and init.run={config.init.run} both give the weights to start from; set one of the two")
    if config.init.run is None and config.init.step is not None:
        raise ValueError(f"init.step={config.init.step} needs a run to take it from; set init.run=DIR")
    if config.init.run is None and config.init.optimizer:
        raise ValueError("init.optimizer=true needs a run to take it from; set init.run=DIR")


def check_rule(config: Config) -> None:
    """Raises ValueError where the axes of the rule, its base optimiser and the batch do not fit each other."""
    optim, batch = config.optim, config.batch
    if optim.base == "muon" and config.parallel.name != "single":
        raise ValueError(f"optim.base=muon orthogonalises whole matrices, which parallel={config.parallel.name} keeps in shards; use parallel=single")
    if optim.path == "none":
        return
    try:
        check_axes(optim)
    except ValueError as error:
        raise ValueError(re.sub(rf"\b({'|'.join(entry.name for entry in fields(RuleConfig))})=", r"optim.\1=", str(error))) from None
    for name, value, whole in (("start", optim.start, optim.start >= 1), ("stop", optim.stop or 0, (optim.stop or 0) > 1)):
        if whole and value % 1:
            raise ValueError(f"optim.{name}={value:g} is no whole step; give one, or a fraction of the horizon below 1")
    if optim.scope == "replica" and (config.parallel.name != "hsdp" or config.parallel.replicas == 1):
        raise ValueError(f"optim.scope=replica needs replicas, which parallel={config.parallel.name} does not have; use parallel=hsdp with "
                         "parallel.replicas, or optim.scope=batch or micro_batch")  # fmt: skip
    if optim.metric == "adam" and optim.base != "adamw":
        raise ValueError(f"optim.metric=adam needs Adam's second moment, which optim.base={optim.base} does not keep of every weight; "
                         "use optim.base=adamw or optim.metric=euclidean")  # fmt: skip
    if optim.combine == "reuse" and optim.period == 1:
        raise ValueError("optim.combine=reuse is about the steps between perturbed ones, and optim.period=1 leaves none; set optim.period=2 or more, "
                         "or optim.combine=replace")  # fmt: skip
    if optim.direction == "momentum" and optim.base == "sgd" and optim.momentum == 0:
        raise ValueError("optim.direction=momentum needs a momentum, and optim.momentum=0; raise it")
    if is_read(config, "optim.num_groups"):
        if optim.num_groups == 1:
            raise ValueError(f"optim.num_groups=1 makes the whole batch one group, so optim.scope={optim.scope} means nothing; set 2 or more, "
                             "or optim.scope=batch")  # fmt: skip
        size, world = batch.micro or 1, num_processes(config.parallel)
        if batch.sequences % optim.num_groups or batch.sequences // optim.num_groups % (size * world):
            raise ValueError(f"optim.num_groups={optim.num_groups}: {batch.sequences} batch.sequences / {optim.num_groups} groups must be "
                             f"a multiple of batch.micro={size}{f' x {world} processes' if world > 1 else ''}; choose another number of groups "
                             "or another batch.micro")  # fmt: skip
    if optim.compute_matched and is_read(config, "optim.cotangent") and optim.cotangent == "auto":
        raise ValueError("optim.compute_matched=true needs to know the cost of a step, and optim.cotangent=auto decides it on the machine; "
                         "use optim.cotangent=store or rebuild")  # fmt: skip


def is_read(config: Config, name: str) -> bool:
    """Whether a run of this configuration reads the key, given its `read_when` and that of the key named there."""
    condition = KEYS[name].metadata.get("read_when")
    return condition is None or (lookup(config, condition[0]) in condition[1] and is_read(config, condition[0]))


def num_groups(config: Config) -> int:
    """Groups of the batch that are perturbed apart."""
    return config.optim.num_groups if is_read(config, "optim.num_groups") else 1


def micro_sequences(config: Config) -> int:
    """Sequences per forward on each process: batch.micro, else all of a group."""
    return config.batch.micro or config.batch.sequences // (num_groups(config) * num_processes(config.parallel))


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf: the key, the value and the remedy."""
    text, cause = (" ".join(str(part).split()) for part in (error, error.__cause__ or error))
    full_key = match[1] if (match := re.search(r"full_key: (\S+)", text + " " + cause)) else ""
    if match := re.search(r"Could not find '([^']*)/([^'/]*)'(?: Available options in \S+ (.*?) Config search path)?", text):
        return f"{match[1]}={match[2]}: no such choice; choose one of {(match[3] or '').replace(' ', ', ')}"
    if (match := re.match(r"Error merging override (([^=]*)=.*)", text)) and match[2] in KEYS:
        return wrong_type(KEYS[match[2]], match[1])
    if match := re.search(r"Could not override '([^']*)'", text):
        return no_such_key(match[1], match[1])
    if re.search(r"Key '[^']*' (not in|is not in struct)", text):
        return no_such_key(full_key, full_key)
    reason = text.split(" full_key")[0].split(" See https")[0]
    return (f"{full_key}: " if full_key else "") + f"{reason}; overrides are written key=value, and python train.py help=true lists all"


def no_such_key(name: str, text: str) -> str:
    near = [known for known in KEYS if known.endswith(f".{name}")] or difflib.get_close_matches(name, [*KEYS, *groups()], 1)
    return f"{text}: no such key; " + (f"did you mean {' or '.join(near)}? " if near else "") + "python train.py help=true lists all"


def wrong_type(entry: Any, text: str) -> str:
    return f"{text} has the wrong type; give {text.split('=')[0]}=<{type_name(entry)}>, {meaning(entry)}"


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and their choices."""
    files = sorted(Path(CONF).glob("*/*.yaml"))
    return {group: [file.stem for file in files if file.parent.name == group] for group in sorted({file.parent.name for file in files})}


def table() -> str:
    """Every group and every key: type, default, meaning."""
    choices, defaults = groups(), compose([])
    values = {name: lookup(defaults, name) for name in KEYS}
    shown = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    rows = [(name, type_name(entry), shown[name], meaning(entry)) for name, entry in KEYS.items()]
    rows += [(f"hydra.launcher.{entry.name}", type_name(entry), json.dumps(getattr(LauncherConfig(), entry.name)), meaning(entry))
             for entry in fields(LauncherConfig) if entry.metadata]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        [
            "Groups: choices",
            *(
                textwrap.fill(f"{group:{widths[0]}}  {' | '.join(names)}", 150, subsequent_indent=" " * (widths[0] + 2), break_on_hyphens=False)
                for group, names in choices.items()
            ),
        ]
        + ["", "Keys: type, default (another choice of a group may set another), meaning"]
        + [f"{name:{widths[0]}}  {kind:{widths[1]}}  {default:{widths[2]}}  {text}" for name, kind, default, text in rows]
    )
