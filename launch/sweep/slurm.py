"""hydra/launcher=slurm: the runs of a sweep as an array of Slurm jobs, by submitit."""

import contextlib
import io
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from conf.exit_codes import EXIT_PREEMPTED, IN_ORDER
from conf.launcher import LauncherConfig
from data.files import read_json, write_atomically
from launch.run.snapshot import ROOT
from launch.sweep.jobs import PATIENCE, Job

ASKED = signal.SIGUSR2  # to save and be requeued: submitit's choice, as NCCL may use USR1
POLL = 0.2  # seconds between looks at the process and its signals
LOOK = 2.0  # seconds between looks at the other tasks, for which a file server is asked
# Until Python can note a signal it is ignored: it would end the task, and what ends by itself is
# not requeued.
PYTHON = f"""bash -c 'trap "" TERM USR2; exec "$@"' bash {shlex.quote(sys.executable)}"""
# A task may end long after the others, rank 0 above all: neither is a run to be killed then, nor
# its requeue.
SRUN = ["--kill-on-bad-exit=0", "--wait=0"]


def submit(jobs: list[Job], folder: Path) -> None:
    """Submits jobs of a sweep's folder, all with the settings of the first, as one array, and notes
    their ids in the jobs.

    Raises ValueError without submitit or sbatch, and where Slurm refuses; then nothing is left of
    it."""
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "hydra/launcher=slurm needs submitit; pip install -c constraints.txt -e '.[slurm]'"
        ) from None
    if shutil.which("sbatch") is None:
        raise ValueError(
            "hydra/launcher=slurm, but there is no sbatch here; start the sweep on a login node, or"
            " use hydra/launcher=local"
        )
    settings, files = jobs[0].launcher, folder / ".submitit"
    executor = submitit.AutoExecutor(
        files / "%j",
        cluster="slurm",
        slurm_max_num_timeout=settings.max_num_timeout,
        slurm_python=PYTHON,
    )
    executor.update_parameters(**parameters(settings, folder.name))
    try:
        # What sbatch says is the error's text, too.
        with contextlib.redirect_stderr(io.StringIO()):
            handles = executor.submit_array([Task(job) for job in jobs])
    except submitit.core.utils.FailedJobError as error:
        remove_unsent(files)
        raise ValueError(f"Slurm refuses: {error}") from None
    for job, handle in zip(jobs, handles, strict=True):
        job.job_id, job.scheduler_log = handle.job_id, str(handle.paths.stdout)
        # An array has one script for all its jobs.
        array = job.job_id.split("_")[0]
        script = submitit.core.utils.JobPaths(executor.folder, array).submission_file
        job.run.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(script, job.run / "submission.sh")


def parameters(settings: LauncherConfig, name: str) -> dict[str, Any]:
    """Returns submitit's parameters of an array, those that are set."""
    # srun does not take over sbatch's number of cores.
    cores = [f"--cpus-per-task={settings.cpus_per_task}"] if settings.cpus_per_task else []
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    wanted = {
        "name": name,
        "timeout_min": settings.timeout_min,
        "nodes": settings.nodes,
        "tasks_per_node": settings.tasks,
        "gpus_per_node": settings.gpus_per_node,
        "cpus_per_task": settings.cpus_per_task,
        "mem_gb": settings.mem_gb,
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_qos": settings.qos,
        "slurm_constraint": settings.constraint,
        "slurm_signal_delay_s": settings.signal_delay_s,
        "slurm_array_parallelism": settings.array_parallelism,
        "slurm_setup": [*settings.setup, path],
        "slurm_srun_args": [*SRUN, *cores],
        "slurm_additional_parameters": {"requeue": True, **settings.additional_parameters},
        "stderr_to_stdout": True,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def remove_unsent(files: Path) -> None:
    """Removes what submitit wrote for an array that Slurm refused; the folders of jobs submitted
    before stay."""
    for left in files.iterdir():
        if left.is_file():
            left.unlink()
    with contextlib.suppress(OSError):
        files.rmdir()


class Task:
    """What submitit calls in every task of a job: a process of the run, with its signals and its
    end.

    Asked by USR2 (before the time limit, or by a scheduler that preempts), the run saves and exits,
    and submitit puts the job back into the queue, with one time-out less where it was one. After
    TERM the run saves, and the job waits to be killed: a scheduler that preempts puts back what it
    killed, not what ended by itself, and what was cancelled stays so."""

    def __init__(self, job: Job) -> None:
        self.job, self.received = job, 0

    def checkpoint(self) -> Any:
        """Returns the call that submitit makes after a requeue: the same once more."""
        import submitit

        return submitit.helpers.DelayedSubmission(Task(self.job))

    def __call__(self) -> None:
        """Runs a process of the run to its end, and ends with its code."""
        rank = int(os.environ["SLURM_PROCID"])
        if rank == 0:
            self.clear_earlier_losses()
        # submitit has set its own handler of USR2, which puts the job back; it is called at the
        # end, once the run has saved.
        requeue: Any = signal.getsignal(ASKED)
        for number in (ASKED, signal.SIGTERM):
            signal.signal(number, self.note)
        code = self.agree(rank, self.wait(self.job.start(rank, {})))
        if rank == 0:
            self.job.ended(code)
        # Ended by itself, a job that was to be killed would not be put back by Slurm.
        while code and self.received == signal.SIGTERM:
            time.sleep(POLL)
        if self.received == ASKED and code == EXIT_PREEMPTED:
            self.put_back(requeue)
        # As a shell tells that a signal ended a process.
        sys.exit(code if code >= 0 else 128 - code)

    def agree(self, rank: int, code: int) -> int:
        """Returns the exit code of the run for that of this task's process: all tasks end by the
        code of the first that ended out of order."""
        # The signal itself ended the process, before its handlers stood or after they were gone:
        # there was nothing to save yet, or all was saved.
        if self.received and code in (-ASKED, -signal.SIGTERM):
            code = EXIT_PREEMPTED
        lost = self.lost()
        if lost.exists():
            return read_json(lost, int)
        if code not in IN_ORDER:
            self.job.lost(rank, code)
            write_atomically(lost, f"{code}\n")
        return code

    def clear_earlier_losses(self) -> None:
        """Removes the files by which tasks of earlier starts said that their process was lost."""
        own = self.lost()
        for other in own.parent.glob("lost_*"):
            if other != own:
                other.unlink(missing_ok=True)

    def lost(self) -> Path:
        """Returns the file by which a task tells the others of this start that its process ended
        out of order, and how."""
        start = f"{os.environ['SLURM_JOB_ID']}_{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        return self.job.log().with_name(f"lost_{start}")

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remembers a signal: USR2, also where TERM came before it."""
        asked = ASKED in (number, self.received)
        self.received = ASKED if asked else number

    def wait(self, process: subprocess.Popen) -> int:
        """Returns the exit code of the process, to which the first signal is passed on: a second
        one would end it unsaved.

        Where that of another task ended out of order, this one is given PATIENCE seconds: it may
        not have met that one yet, and would wait for it."""
        passed_on = False
        lost = self.lost()
        look = time.monotonic() + LOOK
        end = math.inf
        while True:
            try:
                return process.wait(POLL)
            except subprocess.TimeoutExpired:
                if self.received and not passed_on:
                    process.send_signal(self.received)
                    passed_on = True
                # The others' files lie on a file server, which is not asked at every poll.
                now = time.monotonic()
                if now > look and end == math.inf:
                    look = now + LOOK
                    if lost.exists():
                        end = now + PATIENCE
                if now > end:
                    process.kill()

    def put_back(self, requeue: Any) -> None:
        """Has submitit's handler put the job back, on the main process; says in the run's log where
        it refuses."""
        try:
            requeue(ASKED, None)
        except Exception as error:
            # scontrol ends with the job that it puts back, which is no refusal.
            if getattr(error, "returncode", None) != -signal.SIGTERM:
                with self.job.log().open("a") as file:
                    file.write(f"error: {error}\n")
            raise
