"""One key of the configuration: how it is declared, checked and described.

Each key is declared once, by `key(default, meaning, ...)`:

    choices    the values a string may take
    low, high  the closed range of a number; `above` is an open lower end
    path       a file or folder, where ~ is the home folder
    text       any text as it stands, control characters and brackets included
    empty      an empty text means something; elsewhere it is refused, as what an unset shell
               variable leaves
    positional the arguments of a command that are no key=value
    read_when  (other key, values): the key matters only while the other key has one of these
               values; otherwise it is accepted, noted, and left out of the run's name and identity
    place      says where something lies: a run that is resumed may find the same thing, by its
               checksum, elsewhere
    mutable    may differ when a run is resumed, so it is no part of the identity either;
               (other key, values): only then
"""

import math
import os
import re
import unicodedata
from dataclasses import Field, field
from typing import Any

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
        inside = [*value]
        if isinstance(value, dict):
            inside += value.values()
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
        # Cs: half a surrogate pair, as Python makes of bytes that are no UTF-8. Cc: control.
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
    low = rules.get("low", -math.inf)
    high = rules.get("high", math.inf)
    above = rules.get("above", -math.inf)
    if not (low <= number <= high and number > above):
        # Only the bounds that a key has are said.
        words = {"low": f"at least {low}", "above": f"above {above}", "high": f"at most {high}"}
        bounds = [word for bound, word in words.items() if bound in rules]
        raise ValueError(f"{name}={number} is out of range; it must be {' and '.join(bounds)}")
    if 0 < abs(number) < TINY:
        raise ValueError(
            f"{name}={number} is out of range; it is 0 in fp32, whose smallest number is {TINY:.3g}"
        )


def expand(name: str, path: str) -> str:
    """Returns a path with ~ and ~user as their home folders. Raises ValueError that names the key
    where there is none."""
    # ~ is the user's own home, ~NAME that of another.
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


def type_name(entry: Field) -> str:
    """The type of a key, as a person writes it."""
    return re.sub(r"<class '(\w+)'>|typing\.", r"\1", str(entry.type))
