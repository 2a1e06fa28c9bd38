"""What makes two runs the same run: their canonical configuration, its name, and the folder that
belongs to it."""

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.keys import KEYS, is_read, lookup
from conf.schema import Config, ScheduleConfig
from data.files import DamagedFile, write_atomically
from launch.run.folder import load_config
from model.checkpoint import PLACES, checkpoints, without_places


def canonical(config: Config) -> dict[str, Any]:
    """Returns every key that the run reads and that may not change on resume (those are marked
    `mutable` in conf/schema.py)."""
    # What a key that is not read is set to makes no difference, so it makes no other run.
    plain = asdict(config)
    return {
        name: lookup(plain, name)
        for name in KEYS
        if not is_mutable(config, name) and is_read(config, name)
    }


def as_read(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts, with None for what the run does not read: a radius
    that nobody uses is none."""
    plain = asdict(config)
    for name in KEYS:
        # Keys of the top level are always read, so this one lies in a section.
        if not is_read(config, name):
            section, last = name.rsplit(".", 1)
            lookup(plain, section)[last] = None
    return plain


def is_mutable(config: Config, name: str) -> bool:
    """Returns whether a key may differ between two starts of a run."""
    rule = KEYS[name].metadata.get("mutable", False)
    if isinstance(rule, bool):
        return rule
    # (other key, values): only while that key has one of these values.
    key, values = rule
    return lookup(config, key) in values


def run_name(config: Config) -> str:
    """Returns model-method[-rho]-data-horizon-s<seed>-<8 hex of the canonical configuration>."""
    digest = hashlib.sha256(json.dumps(sorted(canonical(config).items())).encode()).hexdigest()[:8]
    # For people the parts that differ most often; the digest for what they leave out.
    method = [config.optim.name]
    if is_read(config, "optim.rho"):
        method.append(f"{config.optim.rho:g}")
    parts = [config.model.name, *method, config.data.name, horizon(config.schedule)]
    return "-".join([*parts, f"s{config.seed}", digest])


def horizon(schedule: ScheduleConfig) -> str:
    """Returns how long a run is, as its name tells it."""
    if schedule.name == "chinchilla":
        return f"{schedule.tokens_per_parameter:g}tpp"
    if schedule.tokens is None:
        return f"{schedule.steps}steps"
    return f"{schedule.tokens:g}tokens"


def refuse_another(run: Path, config: Config) -> None:
    """Raises ValueError, with a diff of keys, where the folder holds a run of another identity.

    The name of a run is made of paths too, but what it resumes on is known by checksums. So another
    path passes here where a checkpoint will tell whether the same thing lies there
    (`resume` of launch/checkpoint, and its `refuse_other_places` of a run that is finished), and
    where nothing was trained on it yet."""
    # A link that leads nowhere counts as well: what it led to was a run's.
    if os.path.lexists(run / "config.yaml"):
        try:
            theirs, ours = canonical(load_config(run)), canonical(config)
        except DamagedFile as error:
            # Without it the checkpoints still tell whether they are this run's.
            what = str(error).removesuffix("; remove it")
            raise DamagedFile(f"{what}; remove it, and the same command writes it anew") from None
        # Paths pass where a checkpoint will tell, or nothing was trained yet. A run that is done
        # and has no checkpoints is known by its paths alone.
        passing = PLACES if checkpoints(run) or not (run / "summary.json").exists() else ()
        changed = [
            name
            for name in KEYS
            if compared(name, theirs, passing) != compared(name, ours, passing)
        ]
        # A key that only one of the two reads differs, too.
        if changed:
            unlike = {
                name: (theirs.get(name, "unread"), ours.get(name, "unread")) for name in changed
            }
            raise another(run, unlike)


def another(run: Path, changed: dict[str, tuple[Any, Any]]) -> ValueError:
    """Returns the error of a folder that holds another run: each key that differs, with (value
    there, value here)."""
    diff = ", ".join(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in changed.items())
    return ValueError(
        f"dir={run} holds another run ({diff}); choose another dir, or leave dir out to have one"
        " named"
    )


def compared(name: str, identity: dict[str, Any], passing: Collection[str]) -> Any:
    """Returns the value of a key, without the paths in it where they pass."""
    value = identity.get(name)
    if name in passing:
        return without_places(value)
    return value


def claim(run: Path, config: Config) -> None:
    """Writes the run's config.yaml. Raises ValueError as `refuse_another` does."""
    refuse_another(run, config)
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
