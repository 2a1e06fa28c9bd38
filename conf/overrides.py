"""From words as they were typed to overrides that Hydra takes, and from its errors to one line for
a person.

Hydra's grammar gives a meaning to many characters. Where a key is text a value is put into quotes,
so that it arrives as it stands; the grammar stays for numbers, lists, mappings and sweeps."""

import difflib
import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    Quote,
    QuotedString,
    RangeSweep,
)
from hydra.errors import HydraException

from conf.key import check_value, expand, type_name
from conf.keys import KEYS, meaning
from conf.launcher import LauncherConfig

CONF = str(Path(__file__).resolve().parent)
SWEEP_DIR = "hydra.sweep.dir"
MOST_RUNS = 10_000  # of a sweep; a mistake in a range may ask for any number
HELP = ("-h", "--help", "help=true")

LAUNCHER_KEYS: dict[str, Any] = {
    f"hydra.launcher.{entry.name}": entry for entry in fields(LauncherConfig) if entry.metadata
}
SETTABLE = KEYS | LAUNCHER_KEYS  # every key that a user may set, by its dotted name

QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")
BRACKETED = re.compile(r"\[.*\]|\{.*\}", re.S)
FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|str)\s*\(.*\)", re.S)
INTERPOLATION = re.compile(r"\$\{[^}]*\}")
STRUCTURE = re.compile(r"[][{}(),:=]")
# A word between the structure of lists and mappings; those with another character than these are no
# part of Hydra's grammar.
WORD = re.compile(r"""[^][{}(),:='"]+""")
PART = re.compile("|".join(pattern.pattern for pattern in (QUOTED, INTERPOLATION, STRUCTURE, WORD)))
FOREIGN = re.compile(r"[^A-Za-z0-9_/\\.+$%*@?|\s-]")


def asks_for_help(arguments: Iterable[str]) -> bool:
    """Whether one of the words of a command line asks for help."""
    return any(argument.lower() in HELP for argument in arguments)


def groups() -> dict[str, list[str]]:
    """Returns the groups of conf/ and their choices."""
    files = sorted(Path(CONF).glob("*/*.yaml"))
    return {
        group: [file.stem for file in files if file.parent.name == group]
        for group in sorted({file.parent.name for file in files})
    }


# What is typed


def quoted(name: str, value: str) -> str:
    """Returns an override that holds any text."""
    return f"{name}={QuotedString(value, Quote.single).with_quotes()}"


def for_hydra(override: str, sweep: bool) -> str:
    """Returns an override in Hydra's grammar: text in quotes, each value of a `sweep` in its
    own."""
    name, equals, value = override.partition("=")
    # A sweep has one launcher, so that its keys take a comma for a comma.
    several = sweep and not name.startswith("hydra.")
    if (
        not equals
        or not value.strip(" ")
        or takes_numbers(name)
        or (several and FUNCTION.fullmatch(value))
    ):
        return override
    values = split(value) if several else [value]
    return f"{name}=" + ",".join(in_quotes(name, one) for one in values)


def in_quotes(name: str, value: str) -> str:
    """Returns one value of a key with quotes around its texts, unless it has them."""
    if name == SWEEP_DIR and QUOTED.fullmatch(value):
        expand(name, value[1:-1])  # for its errors: Hydra expands it, and has none
    if not value or QUOTED.fullmatch(value) or value.lower() == "null":
        return value
    # A key of a single text takes brackets for text only where it says so.
    rules = text_rules(name)
    if rules is not None and ("text" in rules or not BRACKETED.fullmatch(value)):
        return quoted_text(name, value, rules)
    entry = SETTABLE.get(name)
    if (
        entry is not None
        and entry.type == list[str]
        and BRACKETED.fullmatch(value)
        and value != "[]"
    ):
        return f"[{','.join(in_quotes(f'{name}[]', text) for text in split(value[1:-1]))}]"
    return quote_foreign(value)


def takes_numbers(name: str) -> bool:
    """Whether a key is a number or a bool, of which every other character is a mistake."""
    entry = SETTABLE.get(name)
    return entry is not None and bool(
        re.fullmatch(r"(int|float|bool)( \| None)?", type_name(entry))
    )


def text_rules(name: str) -> Any:
    """Returns the rules of a key that takes a text of one's own; None for every other key."""
    if name == SWEEP_DIR:
        return {"path": True}
    if name.endswith("[]"):
        return {}
    entry = SETTABLE.get(name)
    if entry is None or "choices" in entry.metadata:
        return None
    is_text = entry.type in (str, str | None) or (entry.type is Any and "path" in entry.metadata)
    if is_text:
        return entry.metadata
    return None


def quoted_text(name: str, text: str, rules: Any) -> str:
    """Returns a text in quotes; one that is any text has no interpolations, which OmegaConf would
    resolve."""
    if name == SWEEP_DIR:
        # Hydra makes this folder before anything of ours runs.
        text = expand(name, text)
    if "text" in rules or not INTERPOLATION.search(text):
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text, Quote.single).with_quotes()


def quote_foreign(value: str) -> str:
    """Returns a value with quotes around its words that Hydra's grammar knows nothing of, as é, ~,
    # or & in a list."""

    def quote(match: re.Match[str]) -> str:
        word = match[0]
        if WORD.fullmatch(word) and FOREIGN.search(word):
            return QuotedString(word.strip(), Quote.single).with_quotes()
        return word

    return PART.sub(quote, value)


def split(value: str) -> list[str]:
    """Returns the parts of a value between commas that lie in no quotes and no brackets."""
    parts = [""]
    # Brackets that are open.
    depth = 0
    for match in re.finditer(f"{QUOTED.pattern}|.", value, re.S):
        text = match[0]
        if text in "[{(":
            depth += 1
        elif text in "]})":
            depth -= 1
        if text == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += text
    return [part.strip() for part in parts]


# What is wrong with it


def check_overrides(overrides: list[str], sweep: bool = False) -> None:
    """Raises ValueError for an override that is malformed, of neither key nor group, by `+` or `~`,
    or with a value that its key cannot have: Hydra would drop a key of the schema without a word,
    and take the last of a list of choices."""
    choices, runs = groups(), 1
    for text in overrides:
        if text.startswith("-"):
            raise ValueError(no_such_option(text, HELP))
        override = parsed(text, sweep)
        name = override.key_or_group
        if not name.startswith(("hydra.", "hydra/")):
            check_name(override, text, choices)
        if override.is_sweep_override() and not sweep:
            raise ValueError(
                f"{text}: several values are a sweep; give one, or start a sweep with python"
                " train.py -m"
            )
        values = values_of(override, text)
        runs *= len(values)
        if runs > MOST_RUNS:
            raise ValueError(
                f"{text} makes a sweep of more than {MOST_RUNS:,} runs; give fewer values"
            )
        for value in values:
            check_choice(name, value, text, choices)


def parsed(text: str, sweep: bool) -> Override:
    """Returns what Hydra makes of an override. Raises ValueError, with the place where it stumbles,
    for a malformed one."""
    words = for_hydra(text, sweep)
    try:
        return OverridesParser.create().parse_override(words)
    except (RecursionError, ValueError):
        # Brackets within brackets, and digits, beyond what a parser takes.
        raise ValueError(f"{text[:60]}... is malformed; no value is as long or as deep") from None
    except HydraException as error:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text} is malformed; write key=value") from None
        if name.startswith(("+", "~")):
            raise ValueError(neither_added(text, name.lstrip("+~"))) from None
        entry = SETTABLE.get(name)
        if entry is None and name not in groups() and not name.startswith("hydra"):
            raise ValueError(no_such_key(name, text)) from None
        remedy = as_text(name, value)
        if entry is not None and takes_numbers(name):
            remedy = f"give {name}=<{typed_as(entry)}>, {meaning(entry)}"
        if re.search(r"\s[\w./]+=", value):
            remedy = "give each KEY=VALUE as a word of its own"
        place = ""
        if found := re.search(r"(?:error at|input|at input):? '(.+?)'(?: |$|\n)", str(error)):
            place = f" at {found[1]}"
        raise ValueError(f"{text} is malformed{place}; {remedy}") from None


def as_text(name: str, value: str) -> str:
    """Returns the remedy for a text that Hydra's grammar takes for something else: quotes for Hydra
    in quotes for the shell."""
    quote = Quote.single if '"' in value else Quote.double
    return (
        f"a text is written {shlex.quote(f'{name}={QuotedString(value, quote).with_quotes()}')},"
        " with both layers of quotes"
    )


def check_name(override: Override, text: str, choices: dict[str, list[str]]) -> None:
    """Raises ValueError for an override of neither key nor group, and for one that adds or takes
    away."""
    name = override.key_or_group
    if override.type != OverrideType.CHANGE:
        raise ValueError(neither_added(text, name))
    if override.package or not (
        name in choices or any(f"{name}.".startswith(f"{known}.") for known in KEYS)
    ):
        raise ValueError(no_such_key(name, text))


def values_of(override: Override, text: str) -> list[Any]:
    """Returns the values of an override, of a sweep those that it visits. Raises ValueError where
    there are none."""
    if not override.is_sweep_override():
        return [override.value()]
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        raise ValueError(
            f"{text} is a range without steps; list the values, or write range(START,STOP,STEP)"
        )
    if isinstance(value, RangeSweep):
        values = steps_of(value, text)
    elif isinstance(value, ChoiceSweep):
        values = [Override._convert_value(item) for item in value.list]
    else:
        assert isinstance(value, Glob)
        values = value.filter(groups().get(override.key_or_group, []))
    if not values:
        raise ValueError(f"{text} has no values, so the sweep has no runs; give one or more")
    return values


def steps_of(value: RangeSweep, text: str) -> list[Any]:
    """Returns the values of a range, as far as any sweep goes. Raises ValueError where its step is
    0."""
    try:
        return list(islice(value.range(), MOST_RUNS + 1))
    except (ValueError, HydraException):
        raise ValueError(f"{text} takes steps of 0; write range(START,STOP,STEP)") from None


def check_choice(name: str, value: Any, text: str, choices: dict[str, list[str]]) -> None:
    """Raises ValueError for a value that is empty, for control characters in a key of Hydra's, for
    a value of a group that names no single choice, and for a number where a key is a bool, which
    OmegaConf would take."""
    entry = SETTABLE.get(name)
    is_empty = value == "" and not (entry and "empty" in entry.metadata)
    if is_empty or (name.startswith("hydra.") and isinstance(value, str)):
        check_value(name, value, {})
    if name in choices and not isinstance(value, str):
        raise ValueError(f"{text}: no such choice; choose one of {', '.join(choices[name])}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in KEYS and KEYS[name].type in (bool, bool | None) and is_number:
        raise ValueError(wrong_type(KEYS[name], text))


# What is said


def explain(error: Exception) -> str:
    """Returns one line for an error of Hydra or OmegaConf: the key, the value and the remedy."""
    text, cause = (" ".join(str(part).split()) for part in (error, error.__cause__ or error))
    full_key = ""
    if match := re.search(r"full_key: (\S+)", text + " " + cause):
        full_key = match[1]
    if match := re.search(
        r"Could not find '([^']*)/([^'/]*)'(?: Available options in \S+ (.*?) Config search path)?",
        text,
    ):
        return (
            f"{match[1]}={match[2]}: no such choice; choose one of"
            f" {(match[3] or '').replace(' ', ', ')}"
        )
    if (match := re.match(r"Error merging override (([^=]*)=.*)", text)) and match[2] in SETTABLE:
        return wrong_type(SETTABLE[match[2]], match[1])
    if match := re.search(r"Could not override '([^']*)'", text):
        return no_such_key(match[1], match[1])
    if re.search(r"Key '[^']*' (not in|is not in struct)", text):
        return no_such_key(full_key, full_key)
    # What Hydra adds for its own developers is cut off.
    reason = text.split(" full_key")[0].split(" See https")[0]
    if full_key:
        reason = f"{full_key}: {reason}"
    return f"{reason}; overrides are written key=value, and python train.py help=true lists all"


def no_such_key(name: str, text: str) -> str:
    """Returns what is said to a key that nothing has, with the near one."""
    known = [*SETTABLE, SWEEP_DIR, *groups()]
    # A key without its section is understood; else what is spelled alike is meant.
    near = [full for full in KEYS if full.endswith(f".{name}")] or difflib.get_close_matches(
        name, known, 1
    )
    hint = ""
    if near:
        hint = f"did you mean {' or '.join(near)}? "
    return f"{text}: no such key; {hint}python train.py help=true lists all"


def no_such_option(text: str, known: Iterable[str]) -> str:
    """Returns what is said to an option that nothing has, with the near one."""
    name, equals, value = text.lstrip("-").partition("=")
    name = name.replace("-", "_")
    meant = next(
        (full for full in (*KEYS, *groups()) if full == name or full.endswith(f".{name}")), None
    )
    if text.startswith("-") and meant:
        return f"{text}: keys take no dashes; write {meant}={value if equals else 'VALUE'}"
    options = {option.strip("-=").replace("-", "_"): option for option in known}
    if "cfg" in options:  # of train.py, which takes every key as well
        options = {full: f"{full}=" for full in (*KEYS, *groups())} | options
    begun = [full for full in options if name and full.startswith(name)]
    hint = ""
    if near := begun or difflib.get_close_matches(name, options, 1):
        hint = f"did you mean {options[near[0]]}? "
    return f"{text}: no such option; {hint}--help lists all"


def neither_added(text: str, name: str) -> str:
    """Returns what is said to an override by `+` or `~`."""
    return f"{text}: keys are neither added nor taken away; write {name}=VALUE"


def typed_as(entry: Any) -> str:
    """Returns the type of a key in the words that are typed for its values."""
    return type_name(entry).replace(" | None", " or null")


def wrong_type(entry: Any, text: str) -> str:
    """Returns what is said to a value of another type than its key has."""
    name, _, value = text.partition("=")
    said = f"{text} has the wrong type; give {name}=<{typed_as(entry)}>, {meaning(entry)}"
    # Brackets make a list or a mapping, unless they are quoted.
    if entry.type in (str, str | None) and BRACKETED.fullmatch(value):
        said += f"; {as_text(name, value)}"
    return said
