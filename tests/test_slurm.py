"""Sweeps on a real Slurm: what is submitted, preempted, timed out, failed, and asked for twice."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from launch.jobs import read_jobs
from tests.runs import ROOT, assert_same_tensors, rows, tensors
from tests.slurm import Slurm, missing
from tests.sweeps import fare, sweep

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: no {missing()}")
STEPS = 300
LONG = [f"schedule.steps={STEPS}", "checkpoint.every=100", "evaluation.every=150", "hydra/launcher=slurm",
        "hydra.launcher.setup=['export OMP_NUM_THREADS=1']"]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The cluster, in the environment of these tests."""
    pytest.importorskip("submitit")
    dir = tmp_path_factory.mktemp("slurm")
    for parent in dir.parents[:2]:
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


@pytest.fixture(scope="module")
def long_run(slurm, home, tiny):
    """A run of two processes without end, whose job has a minute; submitted first, for it takes longest."""
    code, said = sweep(*tiny, *LONG, "schedule.steps=1000000", "schedule.warmup_steps=0", "evaluation.every=1000000", "parallel=fsdp",
                       "hydra.sweep.dir=long", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=1",
                       "hydra.launcher.signal_delay_s=5", "hydra.launcher.max_num_timeout=1")  # fmt: skip
    assert code == 0, said
    (job,) = read_jobs(home / "long")
    return job


@pytest.fixture(scope="module")
def grid(slurm, home, tiny, long_run):
    """A finished grid of two methods and two seeds, asked for twice, and what was said."""
    command = [*tiny, *LONG, "optim=adamw,sam", "seed=0,1", "hydra.sweep.dir=grid", "hydra.launcher.array_parallelism=3"]
    first, again = sweep(*command), sweep(*command)
    mine = {job.job_id for job in read_jobs(home / "grid")}
    slurm.until(lambda: not mine & slurm.queued().keys(), 240)
    return read_jobs(home / "grid"), first, again


@pytest.fixture(scope="module")
def pair(slurm, home, tiny, grid):
    """Two runs: one as in the grid, preempted on its way; the other without its data."""
    code, said = sweep(*tiny, *LONG, f"data.path={tiny_path(tiny)},later.txt", "optim=adamw", "hydra.sweep.dir=pair")
    assert code == 0, said
    preempted, failing = read_jobs(home / "pair")
    slurm.until(lambda: (preempted.run / "metrics.jsonl").exists() and len(rows(preempted.run)) > 3, 240)
    slurm.call("scancel", "--signal=USR2", preempted.job_id)
    return preempted, failing


def tiny_path(tiny):
    return next(entry for entry in tiny if entry.startswith("data.path=")).removeprefix("data.path=")


def test_a_grid_asked_for_twice_runs_once(slurm, home, grid):
    jobs, (code, first), (code_again, again) = grid
    assert (code, code_again) == (0, 0)
    assert "4 new" in first and "submitted 4 runs" in first
    assert "submitted" not in again and sum(map(int, re.findall(r"(\d) (?:waiting|running|done)", again))) == 4
    assert len({job.job_id for job in jobs}) == 4 and len({job.job_id.split("_")[0] for job in jobs}) == 1  # an array
    assert fare(home / "grid").endswith("4 done, 0 running, 0 waiting, 0 failed\n")


def test_the_folder_of_a_run_has_all_that_is_known_of_it(grid):
    for job in grid[0]:
        starts = json.loads((job.run / "code/environment.json").read_text())
        assert len(starts) == 1 and starts[0]["variables"]["SLURM_ARRAY_JOB_ID"] == job.job_id.split("_")[0]
        assert "validation loss" in job.log().read_text()
        assert "#SBATCH --array=0-3%3" in (job.run / "submission.sh").read_text()
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json"} <= {path.name for path in job.run.iterdir()}


def test_a_preempted_run_goes_on_and_ends_bit_for_bit_as_an_undisturbed_one(slurm, grid, pair):
    undisturbed, preempted = grid[0][0], pair[0]
    assert undisturbed.run.name == preempted.run.name
    slurm.until(lambda: (preempted.run / "summary.json").exists(), 240)
    said = preempted.log().read_text()
    assert said.count("received SIGUSR2") == 1 and said.count("resumed from") == 1
    assert_same_tensors(tensors(preempted.run, STEPS), tensors(undisturbed.run, STEPS))
    assert rows(preempted.run) == rows(undisturbed.run)


def test_a_failed_run_is_reported_and_resubmitted_alone(slurm, home, tiny, pair):
    done, failed = pair
    slurm.until(lambda: not {done.job_id, failed.job_id} & slurm.queued().keys(), 240)
    said = fare(home / "pair")
    assert said.endswith("1 done, 0 running, 0 waiting, 1 failed\n")
    assert re.search(rf"^failed +{failed.run.name}\n +error: data.path=later.txt.*\n +{failed.log()}$", said, re.M)
    shutil.copy(tiny_path(tiny), home / "later.txt")
    before = slurm.queued()
    fare(home / "pair", "resubmit=true")
    after = {job.run: job.job_id for job in read_jobs(home / "pair")}
    assert after[done.run] == done.job_id and after[failed.run] != failed.job_id
    assert slurm.queued().keys() - before.keys() == {after[failed.run]}
    slurm.until(lambda: (failed.run / "summary.json").exists(), 240)


def test_two_tasks_train_one_run(slurm, home, tiny, grid):
    arguments = [*tiny, *LONG, "schedule.steps=20", "parallel=fsdp", "hydra.launcher.tasks_per_node=2",
                 "hydra.launcher.cpus_per_task=2", "hydra.sweep.dir=two"]  # fmt: skip
    code, said = sweep(*arguments)
    assert code == 0, said
    (job,) = read_jobs(home / "two")
    slurm.until(lambda: (job.run / "summary.json").exists(), 240)
    assert "20 steps of 128 tokens on 2 x cpu" in job.log(0).read_text()
    assert job.log(1).read_text().startswith("$ ")
    assert re.search("^srun .*--cpus-per-task=2 ", (job.run / "submission.sh").read_text(), re.M)


def test_a_run_that_met_its_time_limit_is_started_again_as_often_as_is_set(slurm, home, long_run):
    """The signal may come half a minute early, so on a busy machine the run may not have come to its first step."""
    slurm.until(lambda: long_run.job_id not in slurm.queued(), 240)
    assert [long_run.log(rank).read_text().count("$ ") for rank in (0, 1)] == [2, 2]
    assert "error: Job not requeued because: timed-out too many times." in fare(home / "long")


def test_a_run_makes_way_for_a_partition_that_goes_first(slurm, home, tiny, grid, long_run):
    """Slurm sends TERM, lets the run save for the seconds of grace, kills what is left of the job and puts it back."""
    undisturbed = grid[0][1]
    slurm.until(lambda: not slurm.queued(), 240)
    code, said = sweep(*tiny, *LONG, "optim=adamw", "seed=1", "hydra.sweep.dir=way")
    assert code == 0, said
    (job,) = read_jobs(home / "way")
    slurm.until(lambda: (job.run / "metrics.jsonl").exists() and len(rows(job.run)) > 3, 240)
    urgent = slurm.call("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1").strip()
    slurm.until(lambda: urgent not in slurm.queued() and (job.run / "summary.json").exists(), 240)
    said = job.log().read_text()
    assert said.count("received SIGTERM") == 1 and said.count("resumed from") == 1
    assert_same_tensors(tensors(job.run, STEPS), tensors(undisturbed.run, STEPS))
    assert rows(job.run) == rows(undisturbed.run)


def test_slurms_refusal_is_one_line(slurm, home, tiny, monkeypatch):
    code, said = sweep(*tiny, *LONG, "hydra.sweep.dir=none", "hydra.launcher.partition=nowhere")
    assert code == 2 and re.search(r"^error: Slurm refuses: .*invalid partition", said, re.M), said
    monkeypatch.setenv("PATH", "/nowhere")
    code, said = sweep(*tiny, *LONG, "hydra.sweep.dir=none")
    assert code == 2 and "there is no sbatch here" in said


def test_the_script_for_many_nodes_puts_its_job_back_unless_it_is_cancelled(slurm, home, tiny):
    """First it is cancelled, which saves; then, submitted again, it is asked to save as before its time limit."""
    run, log, steps = home / "script" / "run", home / "script.log", 300
    keys = [*tiny, "parallel=fsdp", f"schedule.steps={steps}", "checkpoint.every=1000", "evaluation.every=150", f"dir={run}"]
    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=2", f"--chdir={ROOT}", f"--output={log}",
               f"--export=ALL,OMP_NUM_THREADS=1,PATH={Path(sys.executable).parent}:{os.environ['PATH']}"]  # fmt: skip

    def submit() -> str:
        before = len(rows(run)) if run.exists() else 0
        job = slurm.call("sbatch", "--parsable", *options, str(ROOT / "launch/many_nodes.sbatch"), *keys).strip()
        slurm.until(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) > before + 3, 240)
        return job

    cancelled = submit()
    slurm.call("scancel", cancelled)
    slurm.until(lambda: cancelled not in slurm.queued(), 30)
    assert "SIGTERM: saved step" in log.read_text()
    asked = submit()
    slurm.call("scancel", "--signal=USR1", asked)
    slurm.until(lambda: (run / "summary.json").exists() and asked not in slurm.queued(), 240)
    said = log.read_text()
    assert said.count("SIGUSR1: saved step") == 1 and said.count("resumed from") == 2
    assert [row["step"] for row in rows(run)] == list(range(steps + 1))
    assert "JobState=CANCELLED" in slurm.call("scontrol", "show", "job", cancelled)
