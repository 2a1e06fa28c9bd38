"""What Hydra makes of the YAML files of conf/ and of overrides, before anything is checked."""

from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.launcher import LauncherConfig, SweeperConfig
from conf.overrides import CONF, for_hydra
from conf.schema import Config
from conf.text import DataConfig, SourceConfig

ConfigStore.instance().store(name="schema", node=Config)

for scheduler in ("local", "slurm"):
    ConfigStore.instance().store(
        group="hydra/launcher", name=scheduler, node=LauncherConfig(scheduler=scheduler)
    )

ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=SweeperConfig)


def composed(overrides: list[str]) -> DictConfig:
    """Returns what Hydra makes of overrides."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("config", [for_hydra(override, False) for override in overrides])


def defaults() -> Config:
    """Returns the configuration of no overrides, unchecked: help works where nothing else does."""
    typed: Any = OmegaConf.to_object(composed([]))
    return typed


def name_files(data: DataConfig) -> None:
    """Types data.sources and data.validation, in place. Raises ValueError for anything that is not
    name: {path, weight}, name: files."""
    try:
        given = sorted((data.sources if data.sources is not None else {}).items())
        entries = {
            str(name): OmegaConf.merge(OmegaConf.structured(SourceConfig), entry)
            for name, entry in given
        }
        data.sources = {name: OmegaConf.to_object(entry) for name, entry in entries.items()}
    except (AttributeError, TypeError, ValueError, OmegaConfBaseException):
        raise ValueError(
            f"data.sources={data.sources} is malformed; write data.sources='{{NAME: {{path: FILES,"
            " weight: 1.0}}'"
        ) from None
    # A dataset has one validation split as a rule, which needs no name.
    if data.source == "hub" and isinstance(data.validation, str):
        data.validation = {"validation": data.validation}
    if not isinstance(data.validation, (dict, type(None))):
        raise ValueError(
            f"data.validation={data.validation} is malformed; write data.validation='{{NAME:"
            " FILES}'"
        )
    data.validation = {str(name): files for name, files in (data.validation or {}).items()}
