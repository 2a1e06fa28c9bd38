"""Writes the table of all keys into conf/README.md: python -m launch.reference

The table is read off the schema and the choices that config.yaml makes; tests/test_readme.py fails
where it is out of date."""

import json
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import optim  # noqa: F401  its directions are choices of optim.direction
from conf.key import type_name
from conf.keys import KEYS, lookup, when_read
from conf.launcher import LauncherConfig
from conf.schema import Config

CONF = Path(__file__).resolve().parent.parent / "conf"
BEGIN = "<!-- written by python -m launch.reference -->"
END = "<!-- end of the table -->"
HEAD = ["key", "type or choices", "default", "meaning", "read", "may change on resume"]
LARGE = 1000  # a bound above it keeps nonsense out, and tells a reader nothing


def main() -> None:
    """Writes the table into conf/README.md, between its two marks."""
    readme = CONF / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(text: str) -> str:
    """Returns a text with the table of today between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """Returns the table of all keys in Markdown, a row for each."""
    defaults = {name: lookup(Config(), name) for name in KEYS} | chosen_values()
    rows = [HEAD, ["---"] * len(HEAD)]
    for name, entry in KEYS.items():
        rows.append(row(name, entry, defaults[name], when_read(entry) or "always"))
    for entry in fields(LauncherConfig):
        if entry.metadata:
            default = getattr(LauncherConfig(), entry.name)
            rows.append(row(f"hydra.launcher.{entry.name}", entry, default, "by a sweep"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def chosen_values() -> dict[str, Any]:
    """Returns what the groups chosen in config.yaml set, by dotted name."""
    composed = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for entry in composed["defaults"]:
        # Beside the groups there are "schema", no experiment, overrides, and what is optional.
        if not isinstance(entry, dict):
            continue
        ((group, choice),) = entry.items()
        file = CONF / group / f"{choice}.yaml"
        if not file.is_file():
            continue
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        found |= {f"{group}.{key}": value for key, value in (values or {}).items()}
    return found


def row(name: str, entry: Field, default: Any, read: str) -> list[str]:
    """Returns the cells of a key."""
    # In Markdown a bar would end the cell, and stars and angle brackets would be marks.
    meaning = re.sub(r"([|*<>])", r"\\\1", entry.metadata["meaning"])
    value = default
    if not isinstance(default, str):
        value = json.dumps(default)
    return [f"`{name}`", kind(entry), f"`{value}`", meaning, read, may_change(entry)]


def may_change(entry: Field) -> str:
    """Returns whether a key may change when a run is resumed."""
    mutable = entry.metadata.get("mutable", False)
    if isinstance(mutable, tuple):
        other, values = mutable
        return f"with {other}={' or '.join(values)}"
    if entry.metadata.get("place"):
        return "its place"
    return "yes" if mutable else ""


def kind(entry: Field) -> str:
    """Returns the choices of a key, or its type and range."""
    rules = entry.metadata
    if "choices" in rules:
        return ", ".join(f"`{choice}`" for choice in rules["choices"])
    name = type_name(entry).replace(" | None", " or null").replace("Any", "any")
    parts = [name]
    if "above" in rules:
        parts.append(f"above {rules['above']:g}")
    if "low" in rules:
        parts.append(f"at least {rules['low']:g}")
    if rules.get("high", LARGE + 1) <= LARGE:
        parts.append(f"at most {rules['high']:g}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
