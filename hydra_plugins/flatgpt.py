"""What Hydra calls for `python train.py -m`: it finds launchers in a package of this name only. The work is in launch/sweep.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SweepLauncher(Launcher):
    """hydra/launcher=local and hydra/launcher=slurm."""

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
