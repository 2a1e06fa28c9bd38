"""All keys by their dotted names, and which of them a run reads."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from conf.schema import Config


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


def is_read(config: Config, name: str) -> bool:
    """Whether a run of this configuration reads the key, given its `read_when` and that of the key
    named there."""
    condition = KEYS[name].metadata.get("read_when")
    return condition is None or (
        lookup(config, condition[0]) in condition[1] and is_read(config, condition[0])
    )


def meaning(entry: Field) -> str:
    """The meaning of a key with its choices and when it is read."""
    text = entry.metadata["meaning"]
    if "choices" in entry.metadata:
        text += f" [{' | '.join(entry.metadata['choices'])}]"
    condition = when_read(entry)
    if condition:
        text += f" ({condition})"
    return text


def when_read(entry: Field) -> str:
    """When a key is read, as "with KEY=VALUE" or "unless KEY=VALUE"; empty for always."""
    if "read_when" not in entry.metadata:
        return ""
    other, values = entry.metadata["read_when"]
    choices = KEYS[other].metadata.get("choices", ())
    idle = [choice for choice in choices if choice not in values]
    # The shorter of the two lists is said.
    word = "with"
    listed = values
    if 0 < len(idle) < len(values):
        word = "unless"
        listed = idle
    shown = [f"{other}={'null' if value is None else value}" for value in listed]
    return f"{word} {' or '.join(shown)}"
