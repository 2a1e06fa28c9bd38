"""The keys of a sweep: `hydra.launcher.*`."""

from dataclasses import dataclass
from typing import Any

from conf.key import key


@dataclass
class LauncherConfig:
    """How a sweep gets onto machines, `hydra.launcher`; the names are joblib's and submitit's."""

    _target_: str = "hydra_plugins.flatgpt.SweepLauncher"
    scheduler: str = key(
        "local", "hydra/launcher sets it; all below n_jobs is for slurm", choices=("local", "slurm")
    )
    n_jobs: int | None = key(
        None,
        "local: runs at a time; default as many as have GPUs of their own, else 1",
        low=1,
        high=2**12,
    )
    array_parallelism: int = key(256, "runs at a time", low=1, high=10**6)
    nodes: int = key(1, "nodes of a run", low=1, high=10**5)
    gpus_per_node: int | None = key(None, "GPUs of a run on each node", low=1, high=2**10)
    tasks_per_node: int | None = key(
        None, "processes of a run on each node; default one per GPU, else 1", low=1, high=2**12
    )
    cpus_per_task: int | None = key(None, "cores of a process", low=1, high=2**12)
    mem_gb: float | None = key(None, "memory on each node", above=0.0, high=1e6)
    timeout_min: int = key(60, "time limit, in minutes", low=1, high=10**7)
    signal_delay_s: int = key(
        120,
        "seconds before the time limit at which a run is told to save; less than timeout_min",
        low=1,
        high=10**8,
    )
    max_num_timeout: int = key(
        3,
        "how often a run goes on in another job after a time-out: told to save in the last fifth,"
        " or the last 10 minutes where these are more, of its time",
        low=0,
        high=10**6,
    )
    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that the nodes need")
    setup: list[str] = key([], "shell commands before the run, such as module load cuda")
    additional_parameters: dict[str, Any] = key(
        {}, "further options of sbatch, such as {exclude: node7}"
    )

    @property
    def tasks(self) -> int:
        """Processes of a run on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass
class SweeperConfig:
    """How Hydra makes combinations of values."""

    _target_: str = "hydra_plugins.flatgpt.GridSweeper"
    params: dict[str, str] | None = None
