"""The jobs of a sweep: runs as they were asked for, and what has become of them.

A sweep is a folder, in which its runs lie, with one file of its own, jobs.json. What started a run
leaves in the run's folder

    logs/rank_<r>.log    what each of its processes printed, start after start, each begun by a line
                         "$ <command>"
    logs/exit_code       how the last start ended; not there while it runs, or where nobody was left
                         to write it
    logs/waiting         there while a sweep on this machine has yet to start it
    submission.sh        the script that Slurm was given
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from conf.exit_codes import EXIT_PREEMPTED
from conf.launcher import LauncherConfig
from conf.overrides import quoted
from data.files import DamagedFile, read_bytes, read_json, write_atomically
from launch.run.folder import read_summary
from launch.run.lock import is_in_use
from launch.run.snapshot import ROOT

LARGEST_LOG = 2**30  # bytes
# seconds that the processes of a run have to end by themselves once one of them ended out of order
PATIENCE = 10.0
SAVED = r"\w.*: saved step \d"  # the line of a run that stopped in order


@dataclass
class Job:
    """A run of a sweep."""

    run: Path  # its folder; in jobs.json relative to the sweep's, which may move
    overrides: list[str]  # all but dir
    cwd: str  # where the command was given, which relative paths refer to
    steps: int
    processes: int
    launcher: LauncherConfig
    job_id: str | None = None  # Slurm's, of the last submission
    scheduler_log: str | None = None  # what Slurm itself had to say

    @property
    def command(self) -> list[str]:
        """Returns the command that starts the run."""
        return [
            sys.executable,
            str(ROOT / "train.py"),
            *self.overrides,
            quoted("dir", str(self.run)),
        ]

    def log(self, rank: int = 0) -> Path:
        """Returns the file of what a process of the run printed."""
        return self.run / "logs" / f"rank_{rank}.log"

    @property
    def exit_code(self) -> Path:
        """Returns the file of the exit code of the last start."""
        return self.run / "logs" / "exit_code"

    @property
    def waiting(self) -> Path:
        """Returns the file whose presence means that the run is about to be started."""
        return self.run / "logs" / "waiting"

    def expect(self) -> None:
        """Notes that the run is about to be started. What came of its last start is known until
        this one has begun."""
        self.waiting.parent.mkdir(parents=True, exist_ok=True)
        self.waiting.touch()

    def start(self, rank: int, variables: dict[str, str]) -> subprocess.Popen:
        """Starts a process of the run. It is out of reach of signals to this one's group, and gets
        those that are passed on."""
        self.log(rank).parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **variables}
        # An id of W&B's is that of one run, and a sweep starts many.
        environment.pop("WANDB_RUN_ID", None)
        with self.log(rank).open("a") as file:
            before = file.tell()
            file.write(f"$ {shlex.join(self.command)}\n")
            file.flush()
            try:
                process = subprocess.Popen(
                    self.command,
                    cwd=self.cwd,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError:
                # No process was started, so that what the last start said is still the last word.
                file.truncate(before)
                raise
        # The run is at work from here on: what became of the start before is forgotten.
        if rank == 0:
            self.exit_code.unlink(missing_ok=True)
            self.waiting.unlink(missing_ok=True)
        return process

    def lost(self, rank: int, code: int) -> None:
        """Notes in the log of a process that a signal ended it, of which it cannot have said
        anything."""
        if code < 0:
            with contextlib.suppress(OSError), self.log(rank).open("a") as file:
                file.write(
                    f"error: rank {rank} was ended by {signal.Signals(-code).name}; the same"
                    " command goes on from the last checkpoint\n"
                )

    def ended(self, code: int) -> None:
        """Notes how the run's process ended."""
        with contextlib.suppress(OSError):  # a full disk ends no sweep
            self.exit_code.write_text(f"{code}\n")

    @property
    def stopped(self) -> bool:
        """Returns whether the last start ended in order before the run was done: it saved. Where
        what would have noted its end was killed, its log says so."""
        try:
            return read_bytes(self.exit_code) == f"{EXIT_PREEMPTED}\n".encode()
        except FileNotFoundError:
            return self.log().exists() and any(
                re.match(SAVED, line) for line in last_start(self.log())
            )
        except DamagedFile:
            return False

    @property
    def begun(self) -> bool:
        """Returns whether it was ever started."""
        logs = [self.exit_code, self.log(), *self.scheduler_logs]
        return any(log.exists() for log in logs)

    @property
    def scheduler_logs(self) -> list[Path]:
        """Returns the log of Slurm's, if it had anything to say."""
        return [Path(self.scheduler_log)] if self.scheduler_log else []


def read_jobs(folder: Path) -> list[Job]:
    """Returns the jobs of a sweep's folder, none where there is no jobs.json. Raises
    DamagedFile."""
    jobs = read_json(folder / "jobs.json", list[Job], absent=[])
    return [replace(job, run=folder / job.run) for job in jobs]


def write_jobs(folder: Path, jobs: Iterable[Job]) -> None:
    """Writes the jobs.json of a sweep's folder."""
    entries = [
        asdict(job)
        | {"run": str(job.run.relative_to(folder) if job.run.is_relative_to(folder) else job.run)}
        for job in jobs
    ]
    write_atomically(folder / "jobs.json", json.dumps(entries, indent=1) + "\n")


def queue(jobs: Iterable[Job]) -> set[str]:
    """Returns the ids of this user's jobs that Slurm has not done with. Raises ValueError where it
    must be asked and does not answer."""
    # Slurm is not asked about runs that are done, or were never its own: it may not be here.
    if not any(job.job_id and not (job.run / "summary.json").exists() for job in jobs):
        return set()
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]
    try:
        return set(
            subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=60
            ).stdout.split()
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"squeue does not say which jobs are waiting ({error}); call this where Slurm can be"
            " asked"
        ) from None


def state(job: Job, queued: set[str], sweeping: bool = False) -> str:
    """Returns done, running, waiting or, with nothing left that would start it, new (it never was),
    stopped or failed. `sweeping` says that a process is at work on the local jobs."""
    try:
        if read_summary(job.run) is not None:
            return "done"
    except DamagedFile:
        return "failed"
    if is_in_use(job.run):
        return "running"
    # Without an exit code nobody has noted an end, so the local sweep has yet to come to it.
    expected = job.waiting.exists() or not job.exit_code.exists()
    if job.job_id in queued or (sweeping and job.launcher.scheduler == "local" and expected):
        return "waiting"
    if not job.begun:
        return "new"
    return "stopped" if job.stopped else "failed"


def reason(job: Job) -> tuple[str, Path]:
    """Returns why a run ended: the last line that says so since it was last started, and the log
    that has it; or that its summary is damaged."""
    try:
        read_summary(job.run)
    except DamagedFile as error:
        return str(error), job.run / "summary.json"
    logs = [*sorted(job.log().parent.glob("rank_*.log")), *job.scheduler_logs]
    found = [(last_start(log), log) for log in logs if log.exists()]
    # Slurm calls it an error, too, that it ends a job which has saved.
    failed = (r"(slurmstepd\S*: )?error: ", r"[\w.]+(Error|Exception|Interrupt)\b", "")
    # Looked for in this order over all logs: an error that we print says most, then the last line
    # of a traceback, then whatever came last.
    patterns = failed
    if job.stopped:
        patterns = (r"error: ", SAVED, "")
    for pattern in patterns:
        for lines, log in found:
            matching = [line for line in lines if re.match(pattern, line)]
            if matching:
                return matching[-1], log
    return "it has printed nothing", job.log()


def last_start(log: Path) -> list[str]:
    """Returns the lines of a log since the last start, a run's or its task's on Slurm, but for
    empty ones."""
    try:
        text = read_bytes(log, LARGEST_LOG).decode(errors="replace")
    except DamagedFile as error:
        text = f"error: {error}"
    lines = [line.strip() for line in text.splitlines()]
    first = max(
        (
            number
            for number, line in enumerate(lines)
            if line.startswith("$ ") or "Starting with JobEnvironment(" in line
        ),
        default=-1,
    )
    return [line for line in lines[first + 1 :] if line]
