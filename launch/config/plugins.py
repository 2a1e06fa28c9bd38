"""What Hydra calls for `python train.py -m`. The work is in launch/sweep/sweep.py."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SweepLauncher(Launcher):
    """hydra/launcher=local and hydra/launcher=slurm."""

    __module__ = "hydra_plugins.flatgpt"  # Hydra accepts no launcher of another package

    def __init__(self, **settings: Any) -> None:
        """Takes the settings, which Hydra hands over one by one; `setup` gets them whole."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Takes Hydra's own configuration of the sweep, before `launch`."""
        self.loader, self.config = hydra_context.config_loader, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Starts what there is to start; returns where all of that went well, and exits with a code
        where it did not."""
        from launch.sweep.sweep import sweep  # Hydra imports every launcher on every start

        # Composed at once, so that a mistake in any of them is found before anything starts.
        combinations = [
            (list(overrides), self.loader.load_sweep_config(self.config, list(overrides)))
            for overrides in job_overrides
        ]
        settings: Any = OmegaConf.to_object(self.config.hydra.launcher)
        if code := sweep(combinations, settings, Path(self.config.hydra.sweep.dir).expanduser()):
            raise SystemExit(code)
        return []


class GridSweeper(Sweeper):
    """hydra/sweeper=grid: every combination, as Hydra's own sweeper has them, but all at once and
    without a file multirun.yaml."""

    __module__ = "hydra_plugins.flatgpt"

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Takes Hydra's own configuration of the sweep, before `sweep`."""
        self.loader = hydra_context.config_loader
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launches the combinations of the arguments."""
        # The parameters of the sweeper's own configuration, then those of the command line.
        parser = OverridesParser.create(config_loader=self.loader)
        overrides = parser.parse_overrides(
            [*(f"{name}={values}" for name, values in self.params.items()), *arguments]
        )
        (combinations,) = BasicSweeper.split_arguments(overrides, None)
        return self.launcher.launch(combinations, initial_job_idx=0)


def register() -> None:
    """Makes launcher and sweeper known to Hydra, by the names that their `_target_` have:
    hydra_plugins may or may not exist beside them."""
    Plugins.instance().register(SweepLauncher)
    Plugins.instance().register(GridSweeper)
    package: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.flatgpt = sys.modules[__name__]
