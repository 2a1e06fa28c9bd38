"""How the runs of a sweep fare: python -m launch.status DIR [resubmit=true].

DIR is the folder of a sweep. A run is done, running or waiting, or it has ended without being done, and nothing is left that would start
it again: it stopped, having saved, or it failed. `resubmit=true` starts those two again, and no others, as they were started before.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from conf.schema import key
from data.files import DamagedFile
from launch.config import parse, user_errors
from launch.folder import read_rows
from launch.jobs import Job, queue, read_jobs, reason, state
from launch.lock import RunLock, is_in_use

STATES = ("done", "running", "waiting", "stopped", "failed")


@dataclass
class Options:
    resubmit: bool = key(False, "start again what stopped or failed")


def main(arguments: list[str]) -> int:
    """Prints the runs of a sweep by state; returns the exit code. Raises ValueError for a folder that is none of a sweep."""
    named = [argument for argument in arguments if "=" not in argument]
    if len(named) != 1:
        raise ValueError(f"{len(named)} folders; name that of one sweep, python -m launch.status DIR")
    options, _ = parse(Options, [argument for argument in arguments if "=" in argument])
    folder = Path(named[0]).resolve()
    if not (folder / "jobs.json").exists():
        raise ValueError(f"{named[0]} holds no jobs.json; name the folder of a sweep, hydra.sweep.dir")
    with RunLock(folder) if options.resubmit else nullcontext():  # a sweep at work might start what seems to have ended
        jobs = read_jobs(folder)
        queued, sweeping = queue(jobs), not options.resubmit and is_in_use(folder)
        found = {job.run: state(job, queued, sweeping) for job in jobs}
        for kind in STATES:
            for job in jobs:
                if found[job.run] == kind:
                    print(f"{kind:9}{job.run.name}{details(job, kind)}")
        print(", ".join(f"{list(found.values()).count(kind)} {kind}" for kind in STATES), flush=True)
        ended = [job for job in jobs if found[job.run] in ("stopped", "failed")]
        if options.resubmit and ended:
            from launch.sweep import start

            return start(ended, folder)
    return 0


def details(job: Job, kind: str) -> str:
    """What there is to say about a run in a state: how far it is, or why it ended."""
    if kind == "running":
        return progress(job)
    if kind == "waiting":
        return f"  job {job.job_id}" if job.job_id else ""
    if kind in ("stopped", "failed"):
        line, log = reason(job)
        return f"\n         {line}\n         {log}"
    return ""


def progress(job: Job) -> str:
    """How far a run is by its last row, and how long it will take at the speed of its last rows."""
    metrics = job.run / "metrics.jsonl"
    try:
        rows = read_rows(metrics)[-20:]
    except DamagedFile as error:
        return f"  {error}"
    if not rows:
        return "  starting"
    first, last = rows[0], rows[-1]
    said = f"  step {last['step']:,} of {job.steps:,}"
    if last["step"] > first["step"]:
        left = (job.steps - last["step"]) * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        said += f", {time.strftime('%H:%M:%S', time.gmtime(left)) if left < 86400 else f'{left / 86400:.1f} days'} left"
    return said


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(sys.argv[1:]))
