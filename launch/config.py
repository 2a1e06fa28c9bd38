"""From the command line to a checked `Config`.

A user's mistake, whether Hydra finds it or we do, ends before anything is built: exit code 2 and one line that names the
key, the value and the remedy.
"""

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Config, SourceConfig, default_of, lookup, walk

CONF = str(Path(__file__).resolve().parent.parent / "conf")
KEYS = dict(walk())
EXIT_USER_ERROR = 2
T = TypeVar("T")

ConfigStore.instance().store(name="schema", node=Config)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and exit code 2."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except ValueError as error:
        if os.environ.get("FLATGPT_TRACEBACK"):
            raise
        fail(" ".join(str(error).split()))


def fail(line: str) -> None:
    """Ends the process as a user's mistake."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def main(run: Callable[[Config], int]) -> None:
    """Calls `run` with the configuration that the command line asks for; exits with what it returns."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us, instead of printing a traceback of its own

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
            job()
        else:
            sys.exit(run(compose(sys.argv[1:])))


def compose(overrides: list[str]) -> Config:
    """The checked configuration of a list of overrides, without Hydra's application around it.

    Raises a HydraException, an OmegaConfBaseException or a ValueError for a user's mistake (see `user_errors`)."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return check(hydra.compose("config", overrides), overrides)


def parse(options: type[T], arguments: list[str]) -> tuple[T, list[str]]:
    """The key=value arguments of a tool as its typed `options`, and those that are not its own. Raises ValueError for a missing key
    or a value out of range."""
    entries = {entry.name: entry for entry in fields(options)}  # type: ignore[arg-type]
    given, rest = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in entries:
            given[name] = value if entries[name].type is str else OmegaConf.from_dotlist([argument])[name]
        else:
            rest.append(argument)
    parsed: Any = OmegaConf.merge(OmegaConf.structured(options), given)
    for name, entry in entries.items():
        if OmegaConf.is_missing(parsed, name):
            raise ValueError(f"{name} is missing; give {name}=..., {entry.metadata['meaning']}")
        check_value(name, parsed[name], entry.metadata)
    typed: T = OmegaConf.to_object(parsed)  # type: ignore[assignment]
    return typed, rest


def check(composed: DictConfig, overrides: list[str]) -> Config:
    """The typed configuration of a composed one. Raises ValueError for a value out of range or a contradiction, and notes once
    which of the given keys the chosen method does not read."""
    if unknown := [name for name in leaves(OmegaConf.to_container(composed)) if not any(f"{name}.".startswith(f"{known}.") for known in KEYS)]:
        raise ValueError(f"{unknown[0]}: no such key; python train.py help=true lists all")
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    config.data.sources, config.data.validation = named_sources(config.data.sources), config.data.validation or {}
    for name, entry in KEYS.items():
        check_value(name, lookup(config, name), entry.metadata)
    check_contradictions(config)
    given = [re.split("[=@]", override.lstrip("+~"))[0] for override in overrides]
    if idle := [name for name in given if name in KEYS and not is_read(config, name)]:
        print(f"note: not read by this run, so left out of its name and identity: {', '.join(idle)}", file=sys.stderr)
    return config


def named_sources(sources: Any) -> dict[str, SourceConfig]:
    """data.sources with its entries typed. Raises ValueError for anything that is not name: {path, weight}."""
    try:
        return {name: SourceConfig(**entry) for name, entry in (sources or {}).items()}
    except (AttributeError, TypeError):
        raise ValueError(f"data.sources={sources} is malformed; write data.sources='{{NAME: {{path: FILES, weight: 1.0}}}}'") from None


def leaves(plain: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of everything in nested dictionaries that is no dictionary."""
    for name, value in plain.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]


def check_value(name: str, value: Any, rules: Any) -> None:
    """Raises ValueError unless the value keeps to the rules of its key."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{name}={item} is not finite; give a number")
        if "choices" in rules and item not in rules["choices"]:
            raise ValueError(f"{name}={item} is unknown; choose one of {', '.join(rules['choices'])}")
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            low, high, above = rules.get("low", -math.inf), rules.get("high", math.inf), rules.get("above", -math.inf)
            if not (low <= item <= high and item > above):
                bounds = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf) + [f"at most {high}"] * (high < math.inf)
                raise ValueError(f"{name}={item} is out of range; it must be {' and '.join(bounds)}")


def check_contradictions(config: Config) -> None:
    """Raises ValueError for keys that are each in order but cannot hold together."""
    batch, model, schedule, optim, data = config.batch, config.model, config.schedule, config.optim, config.data
    if model.width % model.num_heads:
        raise ValueError(f"model.width={model.width} is not divisible by model.num_heads={model.num_heads}; choose a divisor of the width")
    if batch.sequences % (batch.micro or batch.sequences):
        raise ValueError(f"batch.sequences={batch.sequences} is not divisible by batch.micro={batch.micro}; choose a divisor of batch.sequences")
    if batch.length > model.max_length:
        raise ValueError(f"batch.length={batch.length} exceeds model.max_length={model.max_length}; shorten the one or raise the other")
    if schedule.name == "fixed" and schedule.steps is None and schedule.tokens is None:
        raise ValueError("schedule.steps=null leaves no horizon; set schedule.steps or schedule.tokens")
    if data.source == "text" and (data.path is None) == (not data.sources):
        raise ValueError(
            f"data.path={data.path} with {len(data.sources)} data.sources; data=text needs one of the two: data.path=FILES or data.sources"
        )
    if optim.path != "none":
        raise ValueError(f"optim.path={optim.path} is declared but not yet trained; use optim.path=none")
    for source, entry in data.sources.items():
        check_value(f"data.sources.{source}.weight", entry.weight, {"above": 0.0})
    for name in ("model.name", "optim.name", "data.name"):
        if not re.fullmatch(r"[\w.+-]+", lookup(config, name)):
            raise ValueError(f"{name}={lookup(config, name)} goes into a folder's name; use letters, digits and _ . + - only")
    if config.init.step is not None and config.init.run is None:
        raise ValueError(f"init.step={config.init.step} needs a run to take it from; set init.run=DIR")


def is_read(config: Config, name: str) -> bool:
    """Whether a run of this configuration reads the key, given its `read_when` and that of the key named there."""
    condition = KEYS[name].metadata.get("read_when")
    return condition is None or (lookup(config, condition[0]) in condition[1] and is_read(config, condition[0]))


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf: the key, the value and the remedy."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__ or error).split())
    reason = cause.split(" full_key")[0].split(" See https")[0]
    full_key = match[1] if (match := re.search(r"full_key: (\S+)", cause)) else None
    if match := re.search(r"Could not find '([^']*)/([^'/]*)'", text):
        return f"{match[1]}={match[2]}: no such choice; choose one of {', '.join(groups().get(match[1], []))}"
    if "Could not override" in text or re.search(r"Key '[^']*' (not in|is not in struct)", cause):
        name = full_key or re.search(r"Could not override '([^'@]*)", text)[1]  # type: ignore[index]
        near = difflib.get_close_matches(name, [*KEYS, *groups()], 1)
        return f"{name}: no such key; " + (f"did you mean {near[0]}? " if near else "") + "python train.py help=true lists all"
    if match := re.search(r"Error merging override (\S+)", text):
        return f"{match[1]}: {reason}; python train.py help=true lists the type of every key"
    return (f"{full_key}: " if full_key else "") + f"{reason}; overrides are written key=value, and python train.py help=true lists all"


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and their choices."""
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in sorted(Path(CONF).iterdir()) if folder.is_dir()}


def table() -> str:
    """Every group and every key: type, default, meaning."""
    rows = [
        (name, str(entry.type).removeprefix("<class '").removesuffix("'>"), json.dumps(default_of(entry)), meaning(entry))
        for name, entry in KEYS.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{name:{widths[0]}}  {kind:{widths[1]}}  {default:{widths[2]}}  {text}" for name, kind, default, text in rows]
    choices = [f"{group}={'|'.join(names)}" for group, names in groups().items() if names]
    return "\n".join(["Groups", *choices, "", "Keys: type, default, meaning (a group's choice may set another default)", *lines])


def meaning(entry: Any) -> str:
    """The meaning of a key with its choices and when it is read."""
    rules = entry.metadata
    text = rules["meaning"]
    if "choices" in rules:
        text += f" [{' | '.join(rules['choices'])}]"
    if "read_when" in rules:
        text += f" (with {rules['read_when'][0]}={'|'.join(rules['read_when'][1])})"
    return text
