"""Sweeps on this machine: what is one run, what is left alone, and how one stops, fails and goes
on."""

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from conf.launcher import LauncherConfig
from launch import status
from launch.config import compose
from launch.plan.plan import human_hours, make_plan
from launch.sweep import local
from launch.sweep.jobs import Job, last_start, queue, quoted, read_jobs, reason, state, write_jobs
from launch.sweep.local import process_group, run_all, visible, visible_devices
from tests.runs import ROOT
from tests.sweeps import fare, sweep


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where a sweep is started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_job(run: Path, **settings) -> Job:
    """A job nobody has started."""
    return Job(run, ["seed=1"], str(run.parent), 32, 1, LauncherConfig(), **settings)


def test_combinations_that_differ_in_nothing_read_are_one_run(home, tiny):
    code, said = sweep(
        *tiny, "optim=adamw,sam", "optim.rho=0.02,0.05", "seed=0,1", "print_only=true"
    )
    assert code == 0
    assert "6 runs in runs/sweep, of 8 combinations" in said and "6 new" in said
    assert (
        len(re.findall(r"^new .*-adamw-", said, re.M)) == 2
        and len(re.findall(r"^new .*-sam-0.0[25]-", said, re.M)) == 4
    )
    assert "note:" not in said  # that AdamW reads no radius is what the sweep is about
    assert re.search(
        r"GPU-hours of those to start: under a second of A100s or under a second of H100s", said
    )
    assert list(home.iterdir()) == []


def test_duplicates_are_one_run_and_an_empty_list_is_a_mistake(home, tiny):
    for twice in ("seed=0,0", "optim.lr=1e-3,0.001", "optim=sam,sam", "seed=0,00"):
        code, said = sweep(*tiny, twice, "print_only=true")
        assert (
            code == 0 and "1 runs in runs/sweep, of 2 combinations" in said and "1 new" in said
        ), said
    code, said = sweep(*tiny, "seed=range(0,0)")
    assert (
        code == 2
        and said.startswith("error: seed=range(0,0) has no values")
        and said.count("\n") == 1
    ), said


def test_a_folder_that_cannot_be_written_is_one_line(home, tiny):
    (home / "file").touch()
    code, said = sweep(*tiny, "seed=0,1", "hydra.sweep.dir=file/grid")
    assert code == 2 and re.search(
        r"^error: hydra.sweep.dir=file/grid cannot be a run folder \(Not a directory\); name one",
        said,
        re.M,
    ), said
    assert "Traceback" not in said
    code, said = sweep(*tiny, "seed=0,1", "hydra.sweep.dir=file/grid", "print_only=true")
    assert code == 2 and re.fullmatch(
        r"error: .*file/grid/jobs.json cannot be read \(Not a directory\)\n", said
    ), said
    assert [path.name for path in home.iterdir()] == ["file"]


def test_every_combination_is_composed_once(home, tiny, monkeypatch):
    composed, load = [], ConfigLoaderImpl.load_sweep_config
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "load_sweep_config",
        lambda *given: composed.append(given[2]) or load(*given),
    )
    assert sweep(*tiny, "seed=0,1", "optim=adamw,sam", "print_only=true")[0] == 0
    assert sorted(overrides[-3:-1] for overrides in composed) == [
        [f"seed={seed}", f"optim={rule}"] for seed in (0, 1) for rule in ("adamw", "sam")
    ]


def test_every_mistake_is_a_line_and_nothing_is_started(home, tiny):
    code, said = sweep(*tiny, "batch.micro=3,4", "schedule.warmup_steps=0,5000")
    assert code == 2
    lines = said.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert (
        "batch.micro=3; choose a divisor" in lines[0]
        and "schedule.warmup_steps=5000 reaches beyond" in lines[1]
    )
    for arguments, remedy in {
        ("seed=0,1", "dir=here"): "here is the folder of 2 runs of the sweep; leave dir out",
        ("seed=0,1", "plan_only=true"): "print_only=true prints the runs of a sweep",
        (
            "seed=0,1",
            "hydra.launcher.n_jobs=0",
        ): "hydra.launcher.n_jobs=0 is out of range; it must be at least 1",
        ("parallel.processes=2",): "parallel=single with 2 processes",
        (
            "hydra/launcher=slurm",
            "parallel.processes=2",
        ): "hydra.launcher gives a run 1 nodes x 1 tasks",
        (
            "hydra/launcher=slurm",
            "hydra.launcher.tasks_per_node=2",
            "hydra.launcher.gpus_per_node=4",
        ): "leave tasks_per_node out",
        (
            "hydra/launcher=slurm",
            "hydra.launcher.timeout_min=2",
        ): "hydra.launcher.signal_delay_s=120 leaves nothing of hydra.launcher.timeout_min=2",
    }.items():
        code, said = sweep(*tiny, *arguments)
        assert code == 2 and len(said.splitlines()) == 1 and remedy in said, said
    assert not list(home.rglob("jobs.json"))


def test_without_submitit_the_error_says_what_to_install(home, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, said = sweep(*tiny, "hydra/launcher=slurm")
    assert code == 2 and said.endswith(
        "error: hydra/launcher=slurm needs submitit; pip install -c constraints.txt -e '.[slurm]'\n"
    )


def test_a_sweep_runs_each_apart_reports_failures_and_goes_on_with_them_alone(home, tiny):
    """One of the two, which run at the same time, lacks its data. How many processes a run has
    makes it no other one."""
    (path,) = (entry.removeprefix("data.path=") for entry in tiny if entry.startswith("data.path="))
    command = [
        *tiny,
        f"data.path={path},'it\\'s later.txt'",
        "parallel=fsdp,single",
        "seed=3",
        "hydra.sweep.dir=runs/grid",
    ]
    plan = make_plan(compose([*tiny, "seed=3"]))
    one, two = (
        " or ".join(
            f"{human_hours(runs * plan.hours(device), '.3g')} of {device}s"
            for device in ("A100", "H100")
        )
        for runs in (1, 2)
    )
    code, said = sweep(*command, "hydra.launcher.n_jobs=2")
    assert code == 1 and f"GPU-hours of those to start: {two}," in said
    done, failed = read_jobs(home / "runs/grid")
    assert re.findall(r"^(started|done|failed) ", said, re.M)[:2] == ["started", "started"]
    assert f"failed: {failed.run.name}: error: data.path=it's later.txt" in said
    assert (done.exit_code.read_text(), failed.exit_code.read_text()) == ("0\n", "2\n")
    assert "validation loss" in done.log().read_text()
    assert (
        json.loads((done.run / "code/environment.json").read_text())[0]["command"][2:]
        == done.command[2:]
    )
    assert "group: grid" in (done.run / "config.yaml").read_text()
    assert re.search(
        rf"^done +{done.run.name}\nfailed +{failed.run.name}\n +error: data.path=.*\n"
        rf" +{failed.log()}\n1 done, .*1 failed$",
        fare(home / "runs/grid"),
        re.M,
    )
    code, said = sweep(*command, "print_only=true")
    assert f"GPU-hours of those to start: {one}," in said and re.search(
        rf"^new .*{failed.run.name}.*\n +error: data.path=it's later.txt", said, re.M
    )

    Path("it's later.txt").write_text(Path(path).read_text())
    before = (done.run / "metrics.jsonl").stat().st_mtime_ns
    fare(home / "runs/grid", "resubmit=true")
    assert fare(home / "runs/grid").endswith("2 done, 0 running, 0 waiting, 0 stopped, 0 failed\n")
    assert (done.run / "metrics.jsonl").stat().st_mtime_ns == before
    code, said = sweep(*command)
    assert code == 0 and "2 done\n" in said and "started" not in said


def test_a_run_that_stops_by_itself_has_not_failed(home, tiny):
    code, said = sweep(*tiny, "minutes=1e-6")
    (job,) = read_jobs(home / "runs/sweep")
    assert (
        code == 75
        and f"stopped {job.run.name}\n" in said
        and said.endswith("stopped: 1 runs saved; the same command goes on\n")
    ), said
    said = fare(home / "runs/sweep")
    assert re.search(
        rf"^stopped +{job.run.name}\n +time limit: saved step 0; .*\n +{job.log()}\n.* 1 stopped, 0"
        r" failed$",
        said,
        re.M,
    ), said
    assert re.search(r"^to resume .*\n1 to resume$", sweep(*tiny, "print_only=true")[1], re.M)


def test_ctrl_c_reaches_the_runs_which_save_and_the_same_command_goes_on(home, tiny):
    """While they run the status says so, and another sweep of the folder is refused."""
    command = [
        *tiny,
        "schedule.steps=300",
        "evaluation.every=300",
        "parallel=fsdp",
        "parallel.processes=2",
        "seed=0,1",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = home / "runs/sweep"
    end = time.monotonic() + 120
    while (
        not list(folder.glob("*/metrics.jsonl"))
        or "running" not in (said := fare(folder))
        or " left" not in said
    ):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)
    assert re.search(
        r"^running +\S+  step \d+ of 300, 00:0\d:\d\d left\nwaiting +\S+\n0 done, 1 running, 1"
        r" waiting, 0 stopped, 0 failed$",
        said,
        re.M,
    ), said
    assert re.search(
        r"^running .*seed=0\nwaiting .*seed=1$", sweep(*command, "print_only=true")[1], re.M
    )
    with pytest.raises(ValueError, match="runs/sweep is in use by process"):
        fare(folder, "resubmit=true")
    code, refusal = sweep(*command)
    assert code == 2 and "runs/sweep is in use by process" in refusal.splitlines()[-1]
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and said.endswith(
        "stopped by SIGINT; the same command goes on\n"
    )
    first, second = read_jobs(folder)
    assert (
        first.exit_code.read_text() == "75\n"
        and "received SIGINT" in first.log(0).read_text()
        and "received SIGINT" in first.log(1).read_text()
    )
    assert not second.log().exists()
    assert re.search(
        r"^to resume .*seed=0\nnew .*seed=1$", sweep(*command, "print_only=true")[1], re.M
    )


def test_a_sweep_whose_project_was_moved_starts_from_where_one_is(home, tiny, monkeypatch, capfd):
    (home / "before").mkdir()
    monkeypatch.chdir(home / "before")
    command = [entry for entry in tiny if not entry.startswith("data.path=")] + [
        "data.path=corpus.txt",
        "schedule.steps=2",
    ]
    assert sweep(*command)[0] == 1
    (home / "before").rename(home / "after")
    monkeypatch.chdir(home / "after")
    (path,) = (entry.removeprefix("data.path=") for entry in tiny if entry.startswith("data.path="))
    assert re.search(
        r"^failed .*\n +error: data.path=corpus.txt", fare(home / "after/runs/sweep"), re.M
    )
    Path("corpus.txt").write_text(Path(path).read_text())
    assert "1 failed" in fare(home / "after/runs/sweep", "resubmit=true")
    assert (
        f"note: {home}/before is gone, where the runs were started; they start from {home}/after"
        in capfd.readouterr().err
    )
    assert fare(home / "after/runs/sweep").endswith(
        "1 done, 0 running, 0 waiting, 0 stopped, 0 failed\n"
    )


def test_a_failure_is_known_until_its_rerun_has_begun(home, capfd):
    """The run of the one cannot be started. That of the other is never reached."""
    one, other = (a_job(home / name) for name in ("one", "other"))
    for job, code, ending in ((one, 1, "failed"), (other, 75, "stopped")):
        job.expect()
        job.log().write_text("$ first\nerror: no room\n")
        job.ended(code)
        job.expect()
        assert state(job, set(), sweeping=True) == "waiting" and state(job, set()) == ending
    one.cwd = "/nowhere"
    assert run_all([one], 1) == 1
    assert (
        "error: one cannot be started: No such file or directory: /nowhere\nfailed: one: error: no"
        " room" in capfd.readouterr().err
    )
    assert [state(job, set()) for job in (one, other)] == ["failed", "stopped"] and reason(one)[
        0
    ] == reason(other)[0] == "error: no room"


LOST = """
import os, signal, sys, time
if sys.orig_argv[1:2] == ['{root}/train.py'] and os.environ.get('RANK') == '1':
    {how}
"""


@pytest.mark.parametrize(
    ("how", "reported"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "error: rank 1 was ended by SIGKILL; the same command goes on from the last checkpoint",
        ),
        (
            "os.write(2, b'error: a node without a GPU\\n'); os._exit(1)",
            "error: a node without a GPU",
        ),
    ],
)
def test_a_process_that_dies_before_the_others_have_met_it_ends_the_run(
    home, tiny, monkeypatch, how, reported
):
    """The others would wait for it for parallel.timeout, ten minutes."""
    monkeypatch.setattr(local, "PATIENCE", 1.0)
    (home / "sitecustomize.py").write_text(LOST.format(root=ROOT, how=how))
    monkeypatch.setenv("PYTHONPATH", str(home))
    began = time.monotonic()
    code, said = sweep(*tiny, "parallel=fsdp", "parallel.processes=2", "schedule.steps=2")
    assert code == 1 and time.monotonic() - began < 120
    (job,) = read_jobs(home / "runs/sweep")
    assert f"failed: {job.run.name}: {reported}; see {job.log(1)}" in said, said
    assert f"failed   {job.run.name}\n         {reported}\n" in fare(home / "runs/sweep")


def test_runs_that_were_never_started_wait(home, tiny):
    write_jobs(home, [replace(a_job(home / "one"), overrides=[*tiny, "schedule.steps=2"])])
    assert (
        fare(home)
        == "waiting  one  not started; resubmit=true starts it\n0 done, 0 running, 1 waiting, 0"
        " stopped, 0 failed\n"
    )
    fare(home, "resubmit=true")
    assert fare(home).startswith("done     one\n")


def test_status_lists_plain_run_folders_too(home, tiny, reference):
    for name in ("runs/done", "runs/group/stopped", "runs/group/damaged"):
        shutil.copytree(reference, home / name)
    (home / "runs/group/stopped/summary.json").unlink()
    (home / "runs/group/damaged/summary.json").write_text("[")
    write_jobs(home / "runs", [replace(a_job(home / "runs/one"), overrides=tiny)])
    said = fare(home / "runs")
    assert re.fullmatch(
        "done     done\nwaiting  one  not .*\nstopped  group/stopped\n +ended before its"
        " end, .*\nfailed   group/damaged\n +.*summary.json is damaged.*\n1 done, 0 running, 1"
        " waiting, 1 stopped, 1 failed\n",
        said,
    ), said
    assert fare(home / "runs/done").startswith("done     done\n1 done, ")
    with pytest.raises(
        ValueError,
        match="holds no jobs\\.json, so no sweep made it; start its runs by their own commands",
    ):
        fare(home / "runs/done", "resubmit=true")
    (home / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no runs"):
        fare(home / "empty")


def test_a_sweep_goes_on_when_nobody_reads_what_it_says(home, tiny):
    command = [sys.executable, str(ROOT / "train.py"), "-m", *tiny, "schedule.steps=2", "seed=0,1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=200) == 0 and process.stderr.read() == ""
    assert fare(home / "runs/sweep").startswith("done")


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    devices = visible_devices()
    assert [visible(devices, slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == [
        "4,5",
        "6,7",
        "4,5",
    ]
    assert [visible(devices, slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(5)] == [
        "4",
        "5",
        "6",
        "7",
        "4",
    ]
    assert visible([], 1, 2) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []


def test_processes_of_a_run_share_a_port_and_differ_in_rank():
    one, other = process_group(2)
    assert (
        (one["RANK"], other["RANK"]) == ("0", "1")
        and one["WORLD_SIZE"] == "2"
        and one["MASTER_PORT"] == other["MASTER_PORT"]
    )
    assert process_group(1) == [{}]


def test_jobs_of_a_folder_that_was_moved_are_found(tmp_path):
    write_jobs(tmp_path, [a_job(tmp_path / "inside"), a_job(Path("/elsewhere/run"))])
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert [job.run for job in read_jobs(moved)] == [moved / "inside", Path("/elsewhere/run")]


def test_the_runs_of_a_sweep_share_no_id_of_wandbs(tmp_path, monkeypatch):
    class Asked(Job):
        @property
        def command(self):
            return [sys.executable, "-c", "import os; print(os.environ.get('WANDB_RUN_ID'))"]

    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    job = Asked(**vars(a_job(tmp_path)))
    assert job.start(0, {}).wait() == 0
    assert last_start(job.log()) == ["None"]


def test_a_run_ends_its_wait_or_fails(tmp_path):
    job = a_job(tmp_path / "run", job_id="7_1")
    assert state(job, {"7_1"}) == "waiting"
    assert state(job, {"7_0"}, sweeping=True) == "waiting"
    assert state(job, {"7_0"}) == "new"
    job.log().parent.mkdir(parents=True)
    job.ended(3)
    assert state(job, set(), sweeping=True) == "failed"
    job.ended(75)
    assert state(job, set(), sweeping=True) == "stopped"
    (job.run / "summary.json").write_text(
        '{"step": 1, "tokens": 1, "flops": 1, "seconds": 1.0, "val/loss": null}'
    )
    assert state(job, {"7_1"}) == "done"


def test_the_reason_is_that_of_the_last_start(tmp_path):
    job = a_job(tmp_path)
    job.log(1).parent.mkdir()
    job.log(0).write_text("$ first\nerror: an old one\n$ second\nstep 1\n\n")
    assert last_start(job.log(0)) == ["step 1"]
    assert reason(job) == ("step 1", job.log(0))
    job.scheduler_log = str(tmp_path / "slurm.log")
    Path(job.scheduler_log).write_text(
        "slurmstepd: error: *** STEP 1.0 CANCELLED DUE TO JOB REQUEUE ***\nINFO - Starting with"
        " JobEnvironment(7)\n"
    )
    assert reason(job)[0] == "step 1"
    job.log(1).write_text(
        "$ second\nTraceback (most recent call last):\ntorch.OutOfMemoryError: no room\nbye\n"
    )
    assert reason(job) == ("torch.OutOfMemoryError: no room", job.log(1))
    with open(job.scheduler_log, "a") as file:
        file.write("slurmstepd: error: *** STEP 1.0 CANCELLED DUE TO TIME LIMIT ***\n")
    assert reason(job)[0] == "slurmstepd: error: *** STEP 1.0 CANCELLED DUE TO TIME LIMIT ***"
    stopped = a_job(tmp_path / "stopped")
    stopped.expect()
    stopped.log().write_text(
        "$ first\nConnectionError: W&B\nSIGUSR2: saved step 3; the same command goes on from"
        " there\nstep 3/8\n"
    )
    stopped.ended(75)
    assert reason(stopped)[0] == "SIGUSR2: saved step 3; the same command goes on from there"


def test_what_slurm_cancelled_after_it_had_saved_has_stopped(tmp_path):
    """Whether or not its task was left the time to note how it ended; what Slurm says of it is with
    the name of a node."""
    job = a_job(tmp_path / "run", job_id="7", scheduler_log=str(tmp_path / "7.out"))
    job.log().parent.mkdir(parents=True)
    job.log().write_text("$ first\nSIGTERM: saved step 3; the same command goes on from there\n")
    Path(job.scheduler_log).write_text(
        "slurmstepd-node7: error: *** STEP 7.0 ON node7 CANCELLED AT 2026-11-20T10:00:00 ***\n"
    )
    for note in (False, True):
        if note:
            job.ended(75)
        assert (state(job, set()), reason(job)[0]) == (
            "stopped",
            "SIGTERM: saved step 3; the same command goes on from there",
        )
    job.log().write_text(
        "$ first\nSIGTERM: saved step 3; the same command goes on from there\n$ second\nstep 4\n"
    )
    job.ended(1)
    assert (state(job, set()), reason(job)[0]) == (
        "failed",
        Path(job.scheduler_log).read_text().strip(),
    )


def test_where_slurm_cannot_be_asked_nothing_is_taken_for_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue([a_job(tmp_path)]) == set()
    with pytest.raises(ValueError, match="squeue does not say which jobs are waiting"):
        queue([a_job(tmp_path, job_id="7")])


def test_slurm_is_asked_for_this_user_by_number(tmp_path, monkeypatch):
    """In a container the user may have no name."""
    monkeypatch.setattr(pwd, "getpwuid", None)
    (tmp_path / "squeue").write_text('#!/bin/sh\necho "$@" | grep -o "user=[0-9]*"\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert queue([a_job(tmp_path, job_id="7")]) == {f"user={os.getuid()}"}


@pytest.mark.parametrize("kind", ["file", "loop"])
def test_a_folder_of_a_sweep_that_is_none_is_one_line(home, tiny, kind, capsys):
    folder = home / "radii"
    if kind == "file":
        folder.write_text("precious")
    else:
        folder.symlink_to(folder)
    code, said = sweep(*tiny, "seed=0,1", "print_only=true", f"hydra.sweep.dir={folder}")
    assert (code, said) == (2, f"error: hydra.sweep.dir={folder} is no folder; name another\n")
    with pytest.raises(ValueError, match="radii is no folder; name the folder of a sweep"):
        status.main([str(folder)])
    assert os.path.lexists(folder)


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_home_that_nobody_has_is_named(home, tiny, quote):
    folder = f"{quote}~nobody-has-this/radii{quote}"
    code, said = sweep(*tiny, "seed=0,1", "print_only=true", f"hydra.sweep.dir={folder}")
    assert code == 2 and "hydra.sweep.dir=~nobody-has-this/radii: no user has this name" in said
    assert said.count("\n") == 1 and list(home.iterdir()) == []


def test_status_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no folder; name the folder of a sweep"):
        status.main([str(tmp_path / "file")])


def test_any_text_survives_in_an_override():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in ("plain", "a b", "it's", "{x: [1, 2]}", "a=b,c", "$HOME", "tail\\"):
        assert OverridesParser.create().parse_override(quoted("dir", text)).value() == text
