"""The help of the commands: purpose, keys with type, default and meaning, examples. All of it is
read off the schema and docstrings."""

import inspect
import json
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from typing import Any

from omegaconf import MISSING

from conf.key import type_name
from conf.keys import KEYS, lookup, meaning
from conf.launcher import LauncherConfig
from conf.overrides import LAUNCHER_KEYS, groups
from conf.schema import Config

RUN = """Trains a decoder-only language model, and goes on with a run that stopped.

    python train.py [KEY=VALUE ...]                                one run
    python train.py -m KEY=A,B ... [hydra/launcher=local|slurm]    a sweep

    python train.py experiment=quickstart
    python train.py optim=functional_sam optim.rho=0.05 model=nanodo_24m \\
        data=text data.path='books/*.txt' tokenizer=bpe

-h, --help, help=true           this text
-m                              a sweep over values with commas between them,
                                range(START,STOP[,STEP]) or choice(A,B)
--cfg job [--resolve]           the configuration as YAML, and nothing else
-sc install=bash                tab completion, also for zsh and fish:
                                eval "$(python train.py -sc install=bash)"
--hydra-help                    Hydra's own options
A text is taken as it stands; null is none. Lists are [A,B], mappings {NAME: VALUE}, and the shell
wants quotes around most of that."""

WIDTH = 150  # of the lines of groups; a key's meaning is one line of any length


def run_help(defaults: Config) -> str:
    """Returns the help of train.py: every group and every key."""
    rows = key_rows(KEYS, defaults)
    rows += [
        row(name, entry, getattr(LauncherConfig(), entry.name))
        for name, entry in LAUNCHER_KEYS.items()
    ]
    width = max(len(name) for name, *_ in rows)
    return "\n".join(
        [
            RUN,
            "",
            "Groups: choices",
            *group_lines(groups(), width),
            "",
            "Keys: type, default (another choice of a group may set another), meaning",
            *aligned(rows),
        ]
    )


def command_help(options: Any, defaults: Config, others: Iterable[str] = ()) -> str:
    """Returns the help of a command from its dataclass, and of the groups of a run's keys that it
    takes as well."""
    rows = [
        row(entry.metadata.get("positional", entry.name), entry, default_of(entry))
        for entry in fields(options)
    ]
    rows.append(("help", "bool", "false", "print this and exit, as -h and --help do"))
    lines = [inspect.cleandoc(options.__doc__), "", "Keys: type, default, meaning", *aligned(rows)]
    # Groups of a run's keys follow, each with its choices.
    for group in others:
        known = [name for name in KEYS if name.startswith(f"{group}.")]
        lines += [
            "",
            *group_lines({group: groups()[group]}, len(group)),
            *aligned(key_rows(known, defaults)),
        ]
    return "\n".join(lines)


def default_of(entry: Any) -> Any:
    """Returns the default of a field, MISSING where there is none."""
    if entry.default_factory is not NO_DEFAULT:
        return entry.default_factory()
    if entry.default is NO_DEFAULT:
        return MISSING
    return entry.default


def row(name: str, entry: Any, default: Any) -> tuple[str, str, str, str]:
    """Returns the four columns of a key."""
    if default == MISSING or "positional" in entry.metadata:
        shown = "needed"
    elif isinstance(default, str) and default:
        shown = default
    else:
        shown = json.dumps(default)
    return name, type_name(entry), shown, meaning(entry)


def key_rows(names: Iterable[str], defaults: Config) -> list[tuple[str, str, str, str]]:
    """Returns the columns of keys of a run."""
    return [row(name, KEYS[name], lookup(defaults, name)) for name in names]


def aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Returns rows as lines whose first three columns are as wide as their widest entries."""
    widths = [max(len(columns[place]) for columns in rows) for place in range(3)]
    return [
        f"{name:{widths[0]}}  {kind:{widths[1]}}  {default:{widths[2]}}  {text}"
        for name, kind, default, text in rows
    ]


def group_lines(choices: dict[str, list[str]], width: int) -> list[str]:
    """Returns groups with their choices, as lines that are no longer than WIDTH."""
    indent = " " * (width + 2)
    return [
        textwrap.fill(
            f"{group:{width}}  {' | '.join(names)}",
            WIDTH,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        for group, names in choices.items()
    ]
