"""Which of how many processes this is, as torchrun or Slurm says in the environment."""

import os
import re
import sys

from conf.schema import ParallelConfig


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes: torchrun's, else those of a Slurm
    step of several tasks, else (0, 1).

    A shell of `srun --pty` has the variables of a step of several tasks, too, but what is typed
    there is started once. Raises ValueError where the variables name no process."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if os.environ.get(rank) and os.environ.get(world):
            if rank == "SLURM_PROCID" and typed_in_a_task():
                break
            return checked(rank, world)
    return 0, 1


def checked(rank: str, world: str) -> tuple[int, int]:
    """Returns the numbers in two variables. Raises ValueError where they are no process's."""
    given = os.environ[rank], os.environ[world]
    numbers = [int(text) for text in given if re.fullmatch(r"\d{1,9}", text)]
    if len(numbers) < 2 or numbers[0] >= numbers[1]:
        raise ValueError(
            f"{rank}={given[0]} and {world}={given[1]} name no process of a run; unset both, or"
            " start the processes by torchrun or srun"
        )
    return numbers[0], numbers[1]


def typed_in_a_task() -> bool:
    """Returns whether this process was started in an interactive shell of Slurm's: it has a
    terminal, and is not the task itself."""
    # srun gives a task's program the number of the task's process; a shell passes it on.
    has_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    return has_terminal and os.environ.get("SLURM_TASK_PID") != str(os.getpid())


def num_processes(parallel: ParallelConfig) -> int:
    """Returns how many processes a run has, or the one that is planned for."""
    if parallel.name == "single":
        return parallel.processes or 1
    return parallel.processes or rank_and_world()[1]
