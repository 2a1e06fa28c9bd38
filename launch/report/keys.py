"""Keys of the configuration in which runs differ."""

import json
from typing import Any


def differing(several: list[dict[str, Any]]) -> list[str]:
    """Returns the keys whose values are not the same in all; those of parents, in all that have
    one."""
    # A dictionary keeps the order of the configuration, which a set would not.
    names = dict.fromkeys(name for settings in several for name in settings)
    found = []
    for name in names:
        # A run without a parent differs from the others in other keys.
        holders = [
            settings for settings in several if name in settings or not name.startswith("parent.")
        ]
        if len({frozen(settings.get(name)) for settings in holders}) > 1:
            found.append(name)
    return found


def frozen(value: Any) -> str:
    """Returns a value as text that can be a key of a dictionary."""
    return json.dumps(value, sort_keys=True)


def shown(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
