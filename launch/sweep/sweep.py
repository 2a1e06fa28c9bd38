"""A sweep: from combinations of overrides to runs, those that there are to start, and their start.

    python train.py -m optim=adamw,sam optim.rho=0.02,0.05 seed=0,1,2 hydra/launcher=local|slurm
    [print_only=true] [hydra.sweep.dir=DIR]

Runs are told apart by their identity: combinations that differ in nothing that the run reads are
one run. So the same command again starts what is new, goes on with what stopped or failed, and
leaves alone what is done, running or waiting."""

import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

from omegaconf import DictConfig, flag_override

from conf.exit_codes import EXIT_USER_ERROR
from conf.key import check_value
from conf.launcher import LauncherConfig
from conf.output import harmless_output
from conf.overrides import quoted
from conf.ranks import rank_and_world
from conf.schema import Config
from data.files import remove_temporary
from launch.config import check
from launch.plan.plan import ASSUMED_MFU, Plan, human_hours, make_plan
from launch.run.identity import run_name
from launch.run.lock import RunLock, is_in_use
from launch.sweep.jobs import Job, queue, read_jobs, reason, state, write_jobs
from launch.sweep.local import run_all
from launch.sweep.slurm import submit

DEVICES = ("A100", "H100")  # of the estimate of hours
STATES = ("done", "running", "waiting", "to resume", "new")  # in the order of the sums
STARTED = ("to resume", "new")  # what a sweep starts
Combination = tuple[list[str], DictConfig]


@dataclass
class Planned:
    """A run of the sweep, before anybody knows whether there is something to start."""

    job: Job
    config: Config
    plan: Plan


@harmless_output()
def sweep(combinations: list[Combination], launcher: LauncherConfig, folder: Path) -> int:
    """Starts the runs of the combinations whose folders lie in `folder`; returns the exit code.
    Prints what there is to do first.

    Raises ValueError for a mistake; one in a combination is printed with those of the others,
    before anything is started."""
    check_launcher(launcher, folder)
    if not combinations:
        raise ValueError(
            "the sweep has no combinations, for a list or range of values is empty; give each swept"
            " key at least one value"
        )
    runs, mistakes = plan_runs(combinations, launcher, real(folder))
    for line in dict.fromkeys(mistakes):
        print(f"error: {line}", file=sys.stderr)
    if mistakes:
        return EXIT_USER_ERROR
    # Looking takes no lock and writes nothing: another sweep may be at work on the same runs.
    if any(planned.config.print_only for planned in runs):
        print(describe(runs, combinations, states(runs, folder, is_in_use(folder)), folder))
        return 0
    # The states are read once nobody else can change them.
    with hold(folder):
        remove_temporary(folder, ["jobs.json"])
        found = states(runs, folder)
        print(describe(runs, combinations, found, folder), flush=True)
        return start(
            [planned.job for planned in runs if found[planned.job.run] in STARTED],
            folder,
        )


def real(folder: Path) -> Path:
    """Returns the absolute path of a folder without links, by which jobs.json knows it. Links that
    lead back to themselves stay."""
    return Path(os.path.realpath(folder))


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps other processes from starting runs of the sweep in `folder`. Raises ValueError where
    one does, or the folder cannot be written."""
    with ExitStack() as stack:
        try:
            stack.enter_context(RunLock(folder))
        except ValueError as error:
            raise ValueError(f"hydra.sweep.{error}") from None
        yield


def start(jobs: list[Job], folder: Path) -> int:
    """Starts jobs of the sweep in `folder`, which this process holds, those for Slurm first;
    returns the exit code. Notes in the folder what was submitted at once: Slurm may refuse the
    next."""
    # An array of Slurm's has one set of options, so each launcher has an array of its own.
    local = [job for job in jobs if job.launcher.scheduler == "local"]
    for _, alike in groupby(
        (job for job in jobs if job.launcher.scheduler == "slurm"), key=lambda job: job.launcher
    ):
        array = list(alike)
        submit(array, folder)
        note(array, folder)
        print(
            f"submitted {len(array)} runs; python -m launch.status"
            f" {shlex.quote(str(folder))} tells how they fare",
            flush=True,
        )
    # Noted before they are started: a run that was never come to is known as one that waits.
    if not local:
        return 0
    for job in local:
        job.expect()
    note(local, folder)
    return run_all(local, local[0].launcher.n_jobs)


def note(jobs: list[Job], folder: Path) -> None:
    """Puts jobs into the folder's jobs.json, in the place of earlier ones of the same runs."""
    known = {job.run: job for job in read_jobs(real(folder))}
    write_jobs(real(folder), (known | {job.run: job for job in jobs}).values())


def check_launcher(launcher: LauncherConfig, folder: Path) -> None:
    """Raises ValueError where the settings, or the sweep's folder, cannot be meant."""
    check_value("hydra.sweep.dir", str(real(folder)), {})
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"hydra.sweep.dir={folder} is no folder; name another")
    for entry in fields(launcher):
        check_value(f"hydra.launcher.{entry.name}", getattr(launcher, entry.name), entry.metadata)
    if launcher.gpus_per_node and launcher.tasks != launcher.gpus_per_node:
        raise ValueError(
            f"hydra.launcher.tasks_per_node={launcher.tasks_per_node} with"
            f" hydra.launcher.gpus_per_node={launcher.gpus_per_node}; leave tasks_per_node out,"
            " there is one process per GPU"
        )
    if launcher.scheduler == "slurm" and launcher.signal_delay_s >= 60 * launcher.timeout_min:
        raise ValueError(
            f"hydra.launcher.signal_delay_s={launcher.signal_delay_s} leaves nothing of"
            f" hydra.launcher.timeout_min={launcher.timeout_min} to train in; shorten the one or"
            " raise the other"
        )
    if rank_and_world()[1] > 1:
        raise ValueError(
            "a sweep is started once and starts its own processes; leave torchrun or srun away, and"
            " set parallel.processes (local) or hydra.launcher.gpus_per_node (slurm)"
        )


def plan_runs(
    combinations: list[Combination], launcher: LauncherConfig, folder: Path
) -> tuple[list[Planned], list[str]]:
    """Returns every run once, in the order of the combinations, and a line for each mistake in
    one."""
    runs, mistakes = dict[str, Planned](), list[str]()
    for overrides, composed in combinations:
        try:
            planned = plan_run(overrides, composed, launcher, folder)
        except ValueError as error:
            mistakes.append(" ".join(str(error).split()))
            continue
        runs.setdefault(run_name(planned.config), planned)
    shared = [planned.job.run for planned in runs.values()]
    mistakes += [
        f"dir={run} is the folder of {shared.count(run)} runs of the sweep; leave dir out, and each"
        " gets its own"
        for run in shared
        if shared.count(run) > 1
    ]
    return list(runs.values()), mistakes


def plan_run(
    overrides: list[str], composed: DictConfig, launcher: LauncherConfig, folder: Path
) -> Planned:
    """Returns the run of a combination. Raises ValueError for a mistake in it."""
    if composed.plan_only:
        raise ValueError(
            "plan_only=true is for one run; print_only=true prints the runs of a sweep"
        )
    # On Slurm the launcher says how many processes a run has, here its own key does.
    given, world = composed.parallel.processes, launcher.nodes * launcher.tasks
    if launcher.scheduler == "slurm" and given not in (None, world):
        raise ValueError(
            f"parallel.processes={given}, but hydra.launcher gives a run {launcher.nodes} nodes x"
            f" {launcher.tasks} tasks; leave it out"
        )
    # Each combination was composed for itself, so that it may be changed.
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
        composed.plan_only = True  # this process is none of the run's
        composed.parallel.processes = world if launcher.scheduler == "slurm" else given or 1
    config = check(composed, [])
    plan, name = make_plan(config), run_name(config)
    run = real(Path(config.dir)) if config.dir else folder / name
    # The job's command says dir by itself, and a run of a sweep is one run.
    kept = [text for text in overrides if text.split("=")[0] not in ("dir", "print_only")]
    # On W&B the runs of a sweep are a group, unless the user names one.
    group = [quoted("tracking.group", folder.name)]
    if config.tracking.group or os.environ.get("WANDB_RUN_GROUP"):
        group = []
    job = Job(
        run,
        [*kept, *group],
        str(Path.cwd()),
        plan.schedule.steps,
        config.parallel.processes or 1,
        launcher,
    )
    return Planned(job, config, plan)


def states(runs: list[Planned], folder: Path, sweeping: bool = False) -> dict[Path, str]:
    """Returns what has become of each run so far: done, running, waiting, to resume or new.
    `sweeping` says that another process is at work on them."""
    known = {job.run: job for job in read_jobs(real(folder))}
    jobs = [known.get(planned.job.run, planned.job) for planned in runs]
    queued = queue(jobs)
    found = {job.run: state(job, queued, sweeping) for job in jobs}
    ended = {
        run: "to resume" if (run / "checkpoints").exists() else "new"
        for run, kind in found.items()
        if kind in ("new", "stopped", "failed")
    }
    return found | ended


def describe_run(planned: Planned, kind: str, overrides: str) -> list[str]:
    """Returns the line of a run in a state, with the overrides that tell it apart, and the reason
    where it failed before and is to be started."""
    job = planned.job
    hours = human_hours(planned.plan.hours(DEVICES[-1]), ".3g")
    lines = [f"{kind:10}{hours:>14}  {job.run.name}  {overrides}"]
    if kind in STARTED and job.log().exists() and not job.stopped:
        lines.append(f"{'':26}{reason(job)[0]}")
    return lines


def describe(
    runs: list[Planned], combinations: list[Combination], found: dict[Path, str], folder: Path
) -> str:
    """Returns a line for every run, its state, hours and what tells it apart, the reason where one
    to start failed before, and the sums."""
    first = f"{len(runs)} runs in {folder}"
    if len(runs) < len(combinations):
        first += (
            f", of {len(combinations)} combinations: the others differ in nothing that a run reads"
        )
    lines = [first, f"{'state':10}{DEVICES[-1] + ' hours':>14}  run"]
    # A run is told from the others by the overrides that not all of them have.
    texts: list[set[str]] = [set(overrides) for overrides, _ in combinations]
    varying = texts[0].union(*texts) - texts[0].intersection(*texts)
    for planned in runs:
        own = " ".join(text for text in planned.job.overrides if text in varying)
        lines += describe_run(planned, found[planned.job.run], own)
    counts = Counter(found.values())
    lines.append(", ".join(f"{counts[kind]} {kind}" for kind in STATES if counts[kind]))
    to_start = [planned.plan for planned in runs if found[planned.job.run] in STARTED]
    hours = " or ".join(
        f"{human_hours(sum(plan.hours(device) for plan in to_start), '.3g')} of {device}s"
        for device in DEVICES
    )
    lines.append(
        f"GPU-hours of those to start: {hours}, at an assumed {ASSUMED_MFU:.0%} of their peak"
    )
    return "\n".join(lines)
