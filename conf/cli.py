"""The command line of every command: its options, its help, and a user's mistake as one line.

A mistake ends with exit code 2 and a line that names the key, the value and the remedy."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
from hydra.errors import HydraException
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from conf.composition import defaults
from conf.exit_codes import EXIT_USER_ERROR
from conf.key import check_value, expand
from conf.output import end_quietly, named_stdout, open_output, print_error
from conf.overrides import HELP, asks_for_help, explain, no_such_option, wrong_type
from conf.ranks import rank_and_world
from conf.usage import command_help, default_of

T = TypeVar("T")
# What to do about what the system refuses.
REMEDIES = (
    ((errno.EACCES, errno.EPERM), "get the right to use it, or name another place"),
    ((errno.EROFS,), "name a place that can be written"),
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there"),
    ((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move away what lies there"),
    ((errno.EMFILE, errno.ENFILE), "raise the limit of open files, ulimit -n"),
)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and exit code 2, and Ctrl-C into exit code
    130. Ends quietly where nobody reads on."""
    open_output()
    try:
        with named_stdout():
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
    except RuntimeError as error:
        # The limit of a user's processes (ulimit -u) is no bug of anybody's.
        if str(error) != "can't start new thread":
            raise
        fail("no further thread can be started; raise the limit of processes, ulimit -u")
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)


def refused(error: OSError) -> str:
    """Returns what is said where the system refuses: the file, why, and the remedy."""
    remedy = next((text for numbers, text in REMEDIES if error.errno in numbers), "mend that")
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; {remedy}, and give the same command again"


def fail(line: str) -> NoReturn:
    """Ends the process as a user's mistake."""
    if says_mistakes():
        print_error(f"error: {line}")
    sys.exit(EXIT_USER_ERROR)


def says_mistakes() -> bool:
    """Returns whether this process says what is wrong: the others would say the same."""
    try:
        return rank_and_world()[0] == 0
    except ValueError:  # it is its number that is wrong
        return True


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
    # mypy does not know that a class of a TypeVar is a dataclass.
    declared: Any = options
    entries = {entry.name: entry for entry in fields(declared)}
    given, rest = sorted_out(entries, arguments, others)
    for name, entry in entries.items():
        if name not in given and default_of(entry) == MISSING:
            raise ValueError(f"{name} is missing; give {name}=..., {entry.metadata['meaning']}")
        # null stands for a default of its own, which has no rules.
        if given.get(name) is not None:
            check_value(entry.metadata.get("positional", name), given[name], entry.metadata)
            if "path" in entry.metadata:
                given[name] = expanded(name, given[name])
    return options(**given), rest


def sorted_out(
    entries: dict[str, Any], arguments: list[str], others: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments as values of a command's keys, and the overrides of a run among them.

    Args:
        entries: the keys of the command, as dataclass fields by their names
        arguments: words of the command line
        others: first parts of the overrides that the command takes

    Raises:
        ValueError: an argument is neither, or its value is of another type
    """
    positional = next(
        (name for name, entry in entries.items() if "positional" in entry.metadata), None
    )
    given: dict[str, Any] = {}
    rest: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        # A folder may have = in its name, as those of a sweep have.
        is_place = not argument.startswith("-") and (not equals or Path(argument).is_dir())
        if positional and is_place:
            given.setdefault(positional, []).append(argument)
        elif equals and re.split("[.@]", name)[0] in others:
            rest.append(argument)
        elif equals and name in entries and name != positional:
            given[name] = typed(entries[name], value, argument)
        else:
            known = [f"{entry}=" for entry in entries if entry != positional]
            raise ValueError(f"{no_such_option(argument, [*known, *HELP])}: {', '.join(known)}")
    return given, rest


def offer_help(options: Any, arguments: list[str], others: tuple[str, ...] = ()) -> None:
    """Prints what a command takes, and exits, where that is asked for or nothing is given."""
    if not arguments or asks_for_help(arguments):
        print(command_help(options, defaults(), others))
        # A script whose variables are unset has not done what it was for.
        sys.exit(0 if arguments else EXIT_USER_ERROR)


def typed(entry: Any, value: str, argument: str) -> Any:
    """Returns the value of an option: text as it stands, anything else by its type. Raises
    ValueError for one of another type."""
    # "null" is no value where a key may be without one, and a text where it may not.
    if entry.type is str or (entry.type == str | None and value.lower() != "null"):
        return value
    try:
        # msgspec would take 1 and 0 for bools too.
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
