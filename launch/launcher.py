"""What Hydra calls for `python train.py -m`. The work is in launch/sweep.py."""

import sys
from collections.abc import Sequence
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
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Starts what there is to start; returns where all of that went well, and exits with a code where it did not."""
        from launch.sweep import sweep  # Hydra imports every launcher on every start

        combinations = [(list(overrides), self.loader.load_sweep_config(self.config, list(overrides))) for overrides in job_overrides]
        settings: Any = OmegaConf.to_object(self.config.hydra.launcher)
        if code := sweep(combinations, settings, Path(self.config.hydra.sweep.dir)):
            raise SystemExit(code)
        return []


def register() -> None:
    """Makes the launcher known to Hydra, by the name that its `_target_` has: hydra_plugins may or may not exist beside it."""
    Plugins.instance().register(SweepLauncher)
    package: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.flatgpt = sys.modules[__name__]
