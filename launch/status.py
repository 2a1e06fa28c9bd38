"""Shows how runs fare: python -m launch.status DIR [resubmit=true].

DIR is the folder of a sweep, or holds run folders, or is one. A run is done, running or waiting, or
it has ended without being done, and nothing is left that would start it again: it stopped, having
saved, or it failed. Of a sweep, `resubmit=true` starts those two again, as they were started
before, with those that were never started, and no others."""

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from conf.cli import parse, user_errors
from conf.key import key
from data.files import DamagedFile
from launch.report.record import find_runs, read_run
from launch.run.folder import harm, read_rows
from launch.run.lock import is_in_use
from launch.sweep.jobs import Job, queue, read_jobs, reason, state

STATES = ("done", "running", "waiting", "stopped", "failed")
# A record's state that is none of these counts as failed.
OF_RECORDS = {
    "finished": "done",
    "running": "running",
    "waiting": "waiting",
    "stopped": "stopped",
}


@dataclass
class Options:
    """Says how the runs of a folder fare: done, running, waiting, stopped or failed, and why.

    python -m launch.status runs/radii
    python -m launch.status runs/radii resubmit=true
    """

    folders: list[str] = key(
        [],
        "folder of a sweep (hydra.sweep.dir), or one of run folders",
        positional="DIR",
        path=True,
    )
    resubmit: bool = key(False, "start again what stopped or failed, and what was never started")


@dataclass
class Line:
    """A run as it is shown: done, running, waiting, stopped or failed, and what there is to say
    about that."""

    state: str
    name: str
    details: str


def main(arguments: list[str]) -> int:
    """Prints the runs of a folder by state; returns the exit code. Raises ValueError for a folder
    without runs."""
    options, _ = parse(Options, arguments)
    if len(options.folders) != 1:
        raise ValueError(f"{len(options.folders)} folders; name one, python -m launch.status DIR")
    folder = Path(os.path.realpath(options.folders[0]))
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(
            f"{options.folders[0]} is no folder; name the folder of a sweep, or of runs"
        )
    # Only this changes anything; to look takes no lock.
    if options.resubmit:
        return resubmit(folder)
    # The runs of a sweep, of which jobs.json tells, and those that were started by themselves.
    jobs = read_jobs(folder)
    found = states(jobs, sweeping=is_in_use(folder))
    lines = [line_of(job, found[job.run]) for job in jobs] + plain_runs(folder, jobs)
    if not lines:
        raise ValueError(
            f"{options.folders[0]} holds no runs; name the folder of a sweep (hydra.sweep.dir) or"
            " one of run folders"
        )
    show(lines)
    return 0


def resubmit(folder: Path) -> int:
    """Starts again the runs of a sweep that ended without being done; returns the exit code."""
    from launch.sweep.sweep import hold, start

    if not (folder / "jobs.json").exists():
        raise ValueError(
            f"{folder} holds no jobs.json, so no sweep made it; start its runs by their own"
            " commands"
        )
    # A sweep at work might start what seems to have ended.
    with hold(folder):
        jobs = read_jobs(folder)
        found = states(jobs)
        show([line_of(job, found[job.run]) for job in jobs])
        ended = [job for job in jobs if found[job.run] in ("new", "stopped", "failed")]
        # A project may have been moved since: a process cannot start in a folder that is gone.
        gone = {job.cwd for job in ended if not Path(job.cwd).is_dir()}
        for job in ended:
            if job.cwd in gone:
                job.cwd = str(Path.cwd())
        if gone:
            print(
                f"note: {', '.join(sorted(gone))} is gone, where the runs were started; they start"
                f" from {Path.cwd()}, to which relative paths refer",
                file=sys.stderr,
            )
        if not ended:
            return 0
        return start(ended, folder)


def states(jobs: list[Job], sweeping: bool = False) -> dict[Path, str]:
    """Returns what has become of each job, by its run folder."""
    queued = queue(jobs)
    return {job.run: state(job, queued, sweeping) for job in jobs}


def show(lines: list[Line]) -> None:
    """Prints runs by state, and how many there are of each."""
    for kind in STATES:
        for line in lines:
            if line.state == kind:
                print(f"{kind:9}{line.name}{line.details}")
    counts = Counter(line.state for line in lines)
    print(", ".join(f"{counts[kind]} {kind}" for kind in STATES), flush=True)


def line_of(job: Job, kind: str) -> Line:
    """Returns what there is to say about a job: how far it is, or why it ended, and what rounding
    does to its rule, if it does."""
    warning = harm(job.run / "metrics.jsonl")
    if warning:
        warning = f"\n         warning: {warning}"
    if kind == "running":
        return Line(kind, job.run.name, progress(job.run, job.steps) + warning)
    if kind == "waiting":
        # Runs on this machine have no number of Slurm's.
        number = f"  job {job.job_id}" if job.job_id else ""
        return Line(kind, job.run.name, number)
    if kind == "new":
        return Line("waiting", job.run.name, "  not started; resubmit=true starts it")
    if kind in ("stopped", "failed"):
        line, log = reason(job)
        return Line(kind, job.run.name, f"\n         {line}\n         {log}")
    return Line(kind, job.run.name, warning)


def plain_runs(folder: Path, jobs: list[Job]) -> list[Line]:
    """Returns the runs in and below a folder that are no jobs of its sweep."""
    known = {os.path.realpath(job.run) for job in jobs}
    lines = []
    for run in find_runs([folder]):
        if os.path.realpath(run) in known:
            continue
        # As the report reads it, so that both say the same of a run.
        record = read_run(run)
        kind = OF_RECORDS.get(record.state, "failed")
        name = run.name
        if run != folder:
            name = str(run.relative_to(folder))
        said = "".join(
            f"\n         {line}"
            for line in (record.reason, record.harm and f"warning: {record.harm}")
            if line
        )
        if kind == "running":
            said = progress(run, None)
        lines.append(Line(kind, name, said))
    return lines


def progress(run: Path, steps: int | None) -> str:
    """Returns how far a run is by its last row and, where its number of steps is known, how long it
    will take at the speed of its last rows."""
    metrics = run / "metrics.jsonl"
    try:
        rows = read_rows(metrics)[-20:]
    except DamagedFile as error:
        return f"  {error}"
    if not rows:
        return "  starting"
    # Only a job says how many steps a run has.
    first = rows[0]
    last = rows[-1]
    if steps is None:
        return f"  step {last['step']:,}"
    said = f"  step {last['step']:,} of {steps:,}"
    if last["step"] > first["step"]:
        pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        said += f", {duration(pace * (steps - last['step']))} left"
    return said


def duration(seconds: float) -> str:
    """Returns seconds as a person reads them."""
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} days"
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(sys.argv[1:]))
