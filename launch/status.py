"""How the runs of a sweep fare: python -m launch.status DIR [resubmit=true].

DIR is the folder of a sweep. A run is done, running, waiting, or failed: it ended without being done, and nothing is left that would
start it again. `resubmit=true` starts those again, and no others, as they were started before.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conf.schema import key
from launch.config import parse, user_errors
from launch.jobs import Job, queue, read_jobs, reason, state
from launch.lock import RunLock, is_in_use
from launch.tracking import read_rows


@dataclass
class Options:
    resubmit: bool = key(False, "start the failed runs again")


def main(arguments: list[str]) -> int:
    """Prints the runs of a sweep by state; returns the exit code. Raises ValueError for a folder that is none of a sweep."""
    named = [argument for argument in arguments if "=" not in argument]
    if len(named) != 1:
        raise ValueError(f"{len(named)} folders; name that of one sweep, python -m launch.status DIR")
    options, _ = parse(Options, [argument for argument in arguments if "=" in argument])
    folder = Path(named[0]).resolve()
    jobs = read_jobs(folder)
    if not jobs:
        raise ValueError(f"{named[0]} holds no jobs.json; name the folder of a sweep, hydra.sweep.dir")
    queued, sweeping = queue(jobs), is_in_use(folder)
    by_state = {kind: [job for job in jobs if state(job, queued, sweeping) == kind] for kind in ("done", "running", "waiting", "failed")}
    for kind, some in by_state.items():
        for job in some:
            print(f"{kind:9}{job.run.name}{details(job, kind)}")
    print(", ".join(f"{len(some)} {kind}" for kind, some in by_state.items()))
    if options.resubmit and by_state["failed"]:
        from launch.sweep import start

        with RunLock(folder):
            return start(by_state["failed"], folder)
    return 0


def details(job: Job, kind: str) -> str:
    """What there is to say about a run in a state: how far it is, or why it ended."""
    if kind == "running":
        return progress(job)
    if kind == "waiting":
        return f"  job {job.job_id}" if job.job_id else ""
    if kind == "failed":
        line, log = reason(job)
        return f"\n         {line}\n         {log}"
    return ""


def progress(job: Job) -> str:
    """How far a run is by its last row, and how long it will take at the speed of its last rows."""
    metrics = job.run / "metrics.jsonl"
    rows = read_rows(metrics)[-20:] if metrics.exists() else []
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
