"""What Hydra calls for `python train.py -m`. The work is in launch/sweep.py."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SweepLauncher(Launcher):
    """hydra/launcher=local and hydra/launcher=slurm."""

    __module__ = "hydra_plugins.flatgpt"  # Hydra accepts no launcher of another package

    def __init__(self, **settings: Any) -> None:
        """Hydra hands over the settings one by one; `setup` gets them whole."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra calls before `launch`, with its own configuration of the sweep."""
        loader, self.config = hydra_context.config_loader, config
        compose: Any = loader.load_sweep_config

        @cache
        def composed(*overrides: str) -> DictConfig:
            return compose(config, list(overrides))

        # Hydra composes every combination before the launch, to see that it can be; what comes out is used here again.
        vars(loader)["load_sweep_config"] = lambda master_config, sweep_overrides: composed(*sweep_overrides)
        self.composed = composed

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Starts what there is to start; returns where all of that went well, and exits with a code where it did not."""
        from launch.sweep import sweep  # Hydra imports every launcher on every start

        combinations = [(list(overrides), self.composed(*overrides)) for overrides in job_overrides]
        settings: Any = OmegaConf.to_object(self.config.hydra.launcher)
        if code := sweep(combinations, settings, Path(self.config.hydra.sweep.dir)):
            raise SystemExit(code)
        return []


def register() -> None:
    """Makes the launcher known to Hydra, by the name that its `_target_` has: hydra_plugins may or may not exist beside it."""
    Plugins.instance().register(SweepLauncher)
    package: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.flatgpt = sys.modules[__name__]
