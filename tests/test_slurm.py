"""Sweeps on a real Slurm: what is submitted, preempted, timed out, failed, refused, and asked for
twice.

The jobs of all tests run side by side: fixtures submit them one after the other, and disturb those
that are to be disturbed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest

from conf.launcher import LauncherConfig
from launch.sweep.jobs import Job, read_jobs, write_jobs
from tests.runs import ROOT, assert_same_tensors, rows, tensors
from tests.slurm import Slurm, missing
from tests.sweeps import fare, sweep

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: no {missing()}")
STEPS = 400
LONG = [
    f"schedule.steps={STEPS}",
    "checkpoint.every=100",
    "evaluation.every=200",
    "hydra/launcher=slurm",
    "hydra.launcher.setup=['export OMP_NUM_THREADS=1']",
]
ENDLESS = [
    "schedule.steps=1000000",
    "schedule.warmup_steps=0",
    "evaluation.every=1000000",
    "tracking.every=1",
]

EARLY = f"""
import os, signal, sys
if sys.orig_argv[1:2] == ['{ROOT}/train.py'] and os.environ['SLURM_PROCID'] == '1':
    os.kill(os.getpid(), signal.SIGKILL)
"""

SLOW = f"""
import atexit, os, signal, sys, time
if sys.orig_argv[1:2] == ['{ROOT}/train.py'] and os.environ['SLURM_PROCID'] == '0':
    atexit.register(time.sleep, 8)  # more than Slurm gives what it ends
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The cluster, in the environment of these tests."""
    pytest.importorskip("submitit")
    dir = tmp_path_factory.mktemp("slurm")
    for parent in takewhile(lambda folder: not folder.stat().st_mode & 0o001, dir.parents):
        parent.chmod(0o755)  # munge wants its socket within everybody's reach
    cluster = Slurm(dir)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment[name])
        yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def home(slurm, tmp_path_factory):
    """Where the sweeps are started, and their folders lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("home"))
        yield folder


def submitted(home: Path, folder: str, *arguments: str) -> list[Job]:
    """The jobs of a sweep, into a folder of that name, that was not refused."""
    code, said = sweep(*arguments, f"hydra.sweep.dir={folder}")
    assert code == 0, said
    return read_jobs(home / folder)


def under_way(run: Path, beyond: int = 3) -> bool:
    """Whether a run has logged more rows than that."""
    return (run / "metrics.jsonl").exists() and len(rows(run)) > beyond


@pytest.fixture(scope="module")
def jobs(slurm, home, tiny):
    """Runs side by side, by what becomes of them. Most are disturbed as soon as they are under way,
    for they are soon done.

    preempted    told to save
    failing      has no data
    two          of two tasks, told to save; its first process ends late, as it may where it waits
                 for W&B
    way          has to make way for another partition, and is told to save from its job's first
                 moment until it starts
    long         without end, in a job of a minute, told to save: in a job this short that counts as
                 a time-out"""
    (slow := home / "slow").mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    (path,) = (entry.removeprefix("data.path=") for entry in tiny if entry.startswith("data.path="))
    found = dict[str, Job]()
    (found["long"],) = submitted(
        home,
        "long",
        *tiny,
        *LONG,
        *ENDLESS,
        "hydra.launcher.timeout_min=1",
        "hydra.launcher.signal_delay_s=8",
        "hydra.launcher.max_num_timeout=1",
    )
    slurm.until(lambda: under_way(found["long"].run), 240)  # alone: it has little time
    slurm.call("scancel", "--signal=USR2", found["long"].job_id)
    (found["way"],) = submitted(
        home, "way", *tiny, *LONG, "seed=1", "hydra.launcher.partition=spare"
    )

    def has_started() -> bool:
        if (
            not (begun := found["way"].log().exists())
            and slurm.queued().get(found["way"].job_id) == "RUNNING"
        ):
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # scancel tries again and again where the job is not to be told now
                subprocess.run(
                    ["scancel", "--signal=USR2", found["way"].job_id],
                    timeout=1,
                    capture_output=True,
                )
        return begun

    slurm.until(has_started, 240)
    slurm.until(lambda: under_way(found["way"].run), 240)
    slurm.call(
        "sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    (found["two"],) = submitted(
        home,
        "two",
        *tiny,
        *LONG,
        "parallel=fsdp",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.cpus_per_task=2",
        f"hydra.launcher.setup=['export OMP_NUM_THREADS=1 PYTHONPATH={slow}']",
    )
    found["preempted"], found["failing"] = submitted(
        home, "pair", *tiny, *LONG, f"data.path={path},later.txt"
    )
    undisturbed = {"two", "preempted"}

    def all_disturbed() -> bool:
        for name in [name for name in undisturbed if under_way(found[name].run)]:
            slurm.call("scancel", "--signal=USR2", found[name].job_id)
            undisturbed.remove(name)
        return not undisturbed

    slurm.until(all_disturbed, 240)
    return found


@pytest.fixture(scope="module")
def grid(slurm, home, tiny, jobs):
    """A grid of two seeds, asked for twice, and what was said."""
    command = [
        *tiny,
        *LONG,
        "seed=0,1",
        "hydra.sweep.dir=grid",
        "hydra.launcher.array_parallelism=1",
    ]
    first, again = sweep(*command), sweep(*command)
    return read_jobs(home / "grid"), first, again


def ended(slurm: Slurm, *jobs: Job) -> None:
    """Waits until Slurm has done with jobs."""
    slurm.until(lambda: not {job.job_id for job in jobs} & slurm.queued().keys(), 240)


def assert_went_on(slurm: Slurm, job: Job, undisturbed: Job, name: str) -> None:
    """The run was told once to save while it trained, by a signal of that name, and ended bit for
    bit as the other."""
    assert undisturbed.run.name == job.run.name
    ended(slurm, job, undisturbed)
    said = job.log().read_text()
    assert said.count(f"{name}: saved step") == 1 and said.count("resumed from") == 1, said
    assert_same_tensors(tensors(job.run, STEPS), tensors(undisturbed.run, STEPS))
    assert rows(job.run) == rows(undisturbed.run)


def test_the_script_for_many_nodes_puts_its_job_back_unless_it_is_cancelled(
    slurm, home, tiny, grid
):
    """One of its processes is killed; then it is asked to save as before its time limit; then it is
    cancelled, and saves as well."""
    run, log = home / "script" / "run", home / "script.log"
    keys = [*tiny, *ENDLESS, "parallel=fsdp", "checkpoint.every=20", f"dir={run}"]
    options = [
        "--nodes=1",
        "--ntasks-per-node=2",
        "--gpus-per-node=0",
        "--cpus-per-task=2",
        f"--chdir={ROOT}",
        f"--output={log}",
        f"--export=ALL,OMP_NUM_THREADS=1,PATH={Path(sys.executable).parent}:{os.environ['PATH']}",
    ]
    job = slurm.call(
        "sbatch", "--parsable", *options, str(ROOT / "launch/many_nodes.sbatch"), *keys
    ).strip()
    slurm.until(lambda: list(run.glob("checkpoints/step_*")), 240)
    os.kill(json.loads((run / "heartbeat/rank_1.json").read_text())["pid"], signal.SIGKILL)
    before = len(rows(run))
    slurm.until(
        lambda: log.read_text().count("resumed from") == 1 and under_way(run, before + 3), 240
    )
    slurm.call("scancel", "--signal=USR1", job)
    before = len(rows(run))
    slurm.until(
        lambda: log.read_text().count("resumed from") == 2 and under_way(run, before + 3), 240
    )
    slurm.call("scancel", job)
    slurm.until(lambda: job not in slurm.queued(), 60)
    said = log.read_text()
    assert (
        said.count("SIGUSR1: saved step") == 1
        and said.count("SIGTERM: saved step") == 1
        and said.count("resumed from") == 2
    ), said
    assert [row["step"] for row in rows(run)] == list(range(len(rows(run))))
    assert "JobState=CANCELLED" in slurm.call("scontrol", "show", "job", job)


def test_a_failed_run_is_reported_and_resubmitted_alone(slurm, home, jobs, grid):
    done, failed = jobs["preempted"], jobs["failing"]
    ended(slurm, done, failed)
    said = fare(home / "pair")
    assert said.endswith("1 done, 0 running, 0 waiting, 0 stopped, 1 failed\n")
    assert re.search(
        rf"^failed +{failed.run.name}\n +error: data.path=later.txt.*\n +{failed.log()}$",
        said,
        re.M,
    )
    before = slurm.queued()
    fare(home / "pair", "resubmit=true")
    after = {job.run: job.job_id for job in read_jobs(home / "pair")}
    assert after[done.run] == done.job_id and after[failed.run] != failed.job_id
    assert slurm.queued().keys() - before.keys() == {after[failed.run]}
    slurm.call("scancel", after[failed.run])


def test_slurms_refusal_is_one_line_and_leaves_nothing(slurm, home, tiny, monkeypatch):
    code, said = sweep(*tiny, *LONG, "hydra.sweep.dir=none", "hydra.launcher.partition=nowhere")
    assert (
        code == 2
        and re.search(r"^error: Slurm refuses: .*invalid partition", said, re.M)
        and said.count("nowhere") == 1
    ), said
    assert not (home / "none").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    code, said = sweep(*tiny, *LONG, "hydra.sweep.dir=none")
    assert code == 2 and "there is no sbatch here" in said


def test_each_run_is_resubmitted_as_it_was_started_and_what_was_submitted_before_a_refusal_is_known(
    slurm, home, monkeypatch
):
    monkeypatch.setattr("launch.sweep.slurm.ROOT", Path("/home/me/my code"))
    folder, held = (
        home / "mixed",
        LauncherConfig(scheduler="slurm", additional_parameters={"hold": True}),
    )
    local = Job(folder / "local", ["optim=nonsense"], str(home), STEPS, 1, LauncherConfig())
    accepted, refused = (
        replace(local, run=folder / name, launcher=launcher)
        for name, launcher in {
            "accepted": held,
            "refused": replace(held, partition="nowhere"),
        }.items()
    )
    folder.mkdir()
    write_jobs(folder, [local, accepted, refused])
    with pytest.raises(ValueError, match="Slurm refuses"):
        fare(folder, "resubmit=true")
    local, accepted, refused = read_jobs(folder)
    assert accepted.job_id in slurm.queued()
    assert (
        (local.job_id, refused.job_id) == (None, None)
        and not local.run.exists()
        and not refused.run.exists()
    )
    write_jobs(folder, [local, accepted])
    fare(folder, "resubmit=true")
    assert local.exit_code.read_text() == "2\n" and read_jobs(folder) == [local, accepted]
    (export,) = (
        line
        for line in (accepted.run / "submission.sh").read_text().splitlines()
        if line.startswith("export PYTHONPATH=")
    )
    found = subprocess.run(
        ["bash", "-c", f"PYTHONPATH=theirs; {export}; echo $PYTHONPATH"],
        capture_output=True,
        text=True,
    )
    assert found.stdout == "/home/me/my code:theirs\n", found
    slurm.call("scancel", accepted.job_id)


def test_a_cancelled_run_has_stopped_and_one_that_lost_a_process_early_has_failed(
    slurm, home, tiny, jobs
):
    """The one had saved. Of the other one task's process ended before it had met that of the other,
    which would wait for ten minutes."""
    (early := home / "early").mkdir()
    (early / "sitecustomize.py").write_text(EARLY)
    (cancelled,) = submitted(home, "cancelled", *tiny, *LONG, *ENDLESS)
    (lost,) = submitted(
        home,
        "lost",
        *tiny,
        *LONG,
        "parallel=fsdp",
        "hydra.launcher.tasks_per_node=2",
        f"hydra.launcher.setup=['export OMP_NUM_THREADS=1 PYTHONPATH={early}']",
    )
    slurm.until(lambda: under_way(cancelled.run), 240)
    slurm.call("scancel", cancelled.job_id)
    ended(slurm, cancelled, lost)
    said = fare(home / "cancelled")
    assert re.search(
        rf"^stopped +{cancelled.run.name}\n +SIGTERM: saved step \d+; .*\n +{cancelled.log()}$",
        said,
        re.M,
    ), said
    said = fare(home / "lost")
    assert re.search(
        rf"^failed +{lost.run.name}\n +error: rank 1 was ended by SIGKILL; .*\n +{lost.log(1)}$",
        said,
        re.M,
    ), said
    assert lost.exit_code.read_text() == "-9\n"


def test_a_grid_asked_for_twice_runs_once(slurm, home, grid):
    jobs, (code, first), (code_again, again) = grid
    assert (code, code_again) == (0, 0)
    assert "2 new" in first and "submitted 2 runs" in first
    assert (
        "submitted" not in again
        and sum(map(int, re.findall(r"(\d) (?:waiting|running|done)", again))) == 2
    )
    # an array
    assert (
        len({job.job_id for job in jobs}) == 2
        and len({job.job_id.split("_")[0] for job in jobs}) == 1
    )
    ended(slurm, *jobs)
    assert fare(home / "grid").endswith("2 done, 0 running, 0 waiting, 0 stopped, 0 failed\n")


def test_the_folder_of_a_run_has_all_that_is_known_of_it(grid):
    for job in grid[0]:
        starts = json.loads((job.run / "code/environment.json").read_text())
        assert (
            len(starts) == 1
            and starts[0]["variables"]["SLURM_ARRAY_JOB_ID"] == job.job_id.split("_")[0]
        )
        assert "validation loss" in job.log().read_text()
        assert "#SBATCH --array=0-1%1" in (job.run / "submission.sh").read_text()
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json"} <= {
            path.name for path in job.run.iterdir()
        }


def test_a_preempted_run_goes_on_and_ends_bit_for_bit_as_an_undisturbed_one(slurm, jobs, grid):
    assert_went_on(slurm, jobs["preempted"], grid[0][0], "SIGUSR2")


def test_a_run_makes_way_for_a_partition_that_goes_first(slurm, jobs, grid):
    """Slurm sends TERM, lets the run save for the seconds of grace, kills what is left of the job
    and puts it back."""
    assert_went_on(slurm, jobs["way"], grid[0][1], "SIGTERM")


def test_two_tasks_train_one_run_and_are_put_back_together(slurm, jobs):
    """That Slurm ends all tasks with the first one is not so for a run."""
    ended(slurm, job := jobs["two"])
    said = job.log(0).read_text()
    assert (
        said.count("SIGUSR2: saved step") == 1
        and said.count("resumed from") == 1
        and "validation loss" in said
    ), said
    assert f"{STEPS} steps of 128 tokens on 2 x cpu" in said
    assert job.log(1).read_text().startswith("$ ")
    assert re.search("^srun .*--cpus-per-task=2 ", (job.run / "submission.sh").read_text(), re.M)


def test_a_run_that_met_its_time_limit_is_started_again_as_often_as_is_set(slurm, home, jobs):
    """The first start we tell to save; the second one Slurm."""
    ended(slurm, job := jobs["long"])
    _, first, second = re.split(r"^\$ ", job.log().read_text(), flags=re.M)
    assert "SIGUSR2: saved step" in first and "resumed from" in second, (first, second)
    said = fare(home / "long")
    assert (
        said.endswith("1 stopped, 0 failed\n")
        and "error: Job not requeued because: timed-out too many times." in said
    ), said
