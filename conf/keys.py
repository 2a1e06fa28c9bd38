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
