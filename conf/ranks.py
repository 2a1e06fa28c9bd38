"""Which of how many processes this is, as torchrun or Slurm says in the environment."""

import os
import sys

from conf.schema import ParallelConfig


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes: torchrun's, else those of a Slurm
    step of several tasks, else (0, 1).

    A shell of `srun --pty` has the variables of a step of several tasks, too, but what is typed
    there is started once."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world in os.environ:
            if rank == "SLURM_PROCID" and typed_in_a_task():
                break
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def typed_in_a_task() -> bool:
    """Returns whether this process was started in an interactive shell of Slurm's: it has a
    terminal, and is not the task itself."""
    has_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    return has_terminal and os.environ.get("SLURM_TASK_PID") != str(os.getpid())


def num_processes(parallel: ParallelConfig) -> int:
    """Returns how many processes a run has, or the one that is planned for."""
    alone = parallel.name == "single"
    return parallel.processes or (1 if alone else rank_and_world()[1])
