"""A run that is killed, preempted or refused by the disk, and started again, is the run that
nothing happened to."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conf.exit_codes import EXIT_PREEMPTED
from launch.run.preemption import SIGNALS
from tests.runs import (
    ROOT,
    STEPS,
    Server,
    assert_same_run,
    assert_same_tensors,
    content,
    rows,
    tensors,
)
from tests.test_wandb import read_wandb


@pytest.fixture(scope="module")
def server():
    """Forks runs."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def start(server, tiny, tmp_path):
    """Starts the run of tmp_path/run, or of another folder."""

    def start(*overrides: str, dir=tmp_path / "run", **limits):
        return server.start(*tiny, f"dir={dir}", *overrides, output=tmp_path / "output", **limits)

    return start


def reached(run) -> int:
    """The step of the last row."""
    file = run / "metrics.jsonl"
    return (
        max((json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]), default=-1)
        if file.exists()
        else -1
    )


def newest(run) -> int:
    """The step of the newest checkpoint."""
    return max(
        (int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")),
        default=-1,
    )


# Killed


def test_killed_at_any_moment(start, tmp_path, reference):
    run, moments, hits = tmp_path / "run", random.Random(0), 0
    for _ in range(8):
        process = start()
        target, delay = max(0, newest(run)) + moments.randint(0, 6), moments.uniform(0, 0.02)
        process.until(
            lambda process=process, target=target: (
                "parameters" in process.said() and reached(run) >= min(target, STEPS - 1)
            )
        )
        time.sleep(delay)
        process.kill()
        hits += process.wait() == -signal.SIGKILL
    assert hits >= 6, f"{hits} of 8 kills met a run that was under way"
    assert start().wait() == 0
    assert_same_run(run, reference)


def test_killed_before_the_first_checkpoint(start, tmp_path, reference):
    run = tmp_path / "run"
    process = start("checkpoint.every=100")
    assert process.until(lambda: reached(run) >= 1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert newest(run) == -1
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tok')  # cut off in the middle of a line
    process = start()
    assert process.wait() == 0
    assert "taking over from process" in process.said()
    assert_same_run(run, reference)


def test_killed_inside_a_save(start, tmp_path, reference):
    run, hits = tmp_path / "run", 0
    for _ in range(4):
        process = start()
        assert process.until(lambda: any((run / "checkpoints").glob(".step_*.partial")))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        left = list((run / "checkpoints").glob(".step_*.partial"))
        hits += len(left)
        for path in left:
            (path / "torn").write_bytes(b"torn")
    assert hits > 0
    assert start().wait() == 0
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_run(run, reference)


def test_killed_between_the_last_checkpoint_and_the_summary(start, tmp_path, reference):
    run = tmp_path / "run"
    process = start("evaluation.baselines=true", "evaluation.sample=60")  # both take their time
    assert process.until(lambda: newest(run) == STEPS)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    before = {
        name: entry
        for name, entry in content(run / "checkpoints").items()
        if name.startswith(f"step_{STEPS:08d}")
    }
    assert before
    assert start().wait() == 0
    assert before.items() <= content(run / "checkpoints").items()  # nor was it written again
    assert_same_run(run, reference)


def test_command_of_a_user_is_killed_preempted_and_goes_on(tiny, tmp_path, reference):
    """As above, with nothing of these tests between the shell and train.py."""
    run, command = (
        tmp_path / "run",
        [sys.executable, str(ROOT / "train.py"), *tiny, f"dir={tmp_path}/run"],
    )
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, EXIT_PREEMPTED)):
        before = newest(run)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            while newest(run) <= before and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(number)
            output, _ = process.communicate()
            assert process.returncode == code, output
    stopped = newest(run)
    assert f"SIGTERM: saved step {stopped}; the same command goes on from there" in output.decode()
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"resumed from {run}/checkpoints/step_{stopped:08d}\n" in process.stdout
    assert_same_run(run, reference)


RULES = {
    "stale_sam": ["tracking.every=3"],
    "look_sam": ["optim.period=5", "optim.start=3"],
    "functional_sam": ["optim.rho_schedule=cosine"],
}


@pytest.mark.parametrize("name", RULES)
def test_run_of_a_rule_that_is_killed(start, tmp_path, name):
    """With a memory, or a point in time, that a checkpoint has to hold."""
    run, undisturbed, rule = (
        tmp_path / "run",
        tmp_path / "undisturbed",
        [f"optim={name}", *RULES[name], "batch.micro=2", "precision=fp32"],
    )
    assert start(*rule, dir=undisturbed).wait() == 0
    for number, step in ((signal.SIGKILL, 5), (signal.SIGTERM, 11), (signal.SIGKILL, 19)):
        process = start(*rule)
        assert process.until(lambda step=step: reached(run) >= step)
        process.kill(number)
        assert process.wait() == (-number if number == signal.SIGKILL else EXIT_PREEMPTED)
    assert start(*rule).wait() == 0
    assert_same_tensors(tensors(run), tensors(undisturbed))
    assert rows(run) == rows(undisturbed) and len(rows(run)) > 10
    assert "rule/step" in tensors(run) and tensors(run)["rule/step"] == STEPS


# Asked to stop


def test_signals_save_and_exit_with_75(start, tmp_path, reference):
    run, at = tmp_path / "run", []
    for number in SIGNALS:
        process = start()
        assert process.until(lambda: reached(run) >= (at[-1] if at else 0) + 2)
        process.kill(number)
        assert process.wait() == EXIT_PREEMPTED
        at.append(newest(run))
        said = process.said()
        assert (
            f"received {number.name}: saving after this step, then exiting with code 75; a second"
            " signal exits at once\n" in said
        )
        assert f"{number.name}: saved step {at[-1]}; the same command goes on from there\n" in said
        if len(at) > 1:
            assert f"resumed from {run}/checkpoints/step_{at[-2]:08d}\n" in said
    assert at == sorted(set(at)) and at[-1] < STEPS
    assert start().wait() == 0
    assert_same_run(run, reference)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_second_signal_exits_at_once(start, tmp_path, second):
    """Here while a large checkpoint is being saved; nothing but that is lost."""
    large = ["model.width=512", "model.num_layers=2", "checkpoint.every=2", "schedule.steps=9"]
    process, run = start(*large), tmp_path / "run"
    assert process.until(lambda: newest(run) == 2)
    process.kill(signal.SIGUSR1)
    assert process.until(lambda: "received SIGUSR1" in process.said())
    process.kill(second)
    assert process.wait() == 128 + second
    assert newest(run) == 2 and not (run / "summary.json").exists()
    process = start(*large, "minutes=1e-6")
    assert process.wait() == EXIT_PREEMPTED
    assert f"resumed from {run}/checkpoints/step_00000002\n" in process.said()


def test_signal_during_an_evaluation(start, tmp_path):
    """An evaluation that takes longer than all steps, interrupted: its row waits for the next
    start, and is logged once."""
    long = ["evaluation.tokens=null", "evaluation.every=16"]
    reference, run, left = tmp_path / "reference", tmp_path / "run", []
    assert start(*long, dir=reference).wait() == 0
    for target in (-1, 15, STEPS - 1):
        process = start(*long)
        assert process.until(
            lambda target=target: (
                (run / "code/environment.json").exists() and reached(run) >= target
            )
        )
        time.sleep(0.02)
        process.kill(signal.SIGTERM)
        assert process.wait() == EXIT_PREEMPTED, process.said()
        left.append((newest(run), reached(run)))
    assert left == [(0, -1), (16, 15), (STEPS, STEPS - 1)]
    assert not (run / "summary.json").exists()
    assert start(*long).wait() == 0
    assert_same_run(run, reference)


# A full disk


@pytest.fixture
def stopped(start, tmp_path):
    """A run that was preempted on its way: the step it stands at."""
    process, run = start(), tmp_path / "run"
    assert process.until(lambda: newest(run) >= 8)
    process.kill(signal.SIGTERM)
    assert process.wait() == EXIT_PREEMPTED
    return newest(run)


def test_refused_saves_are_warnings_but_for_the_last(start, tmp_path, reference, stopped):
    run, limit = tmp_path / "run", 90_000  # less than the weights take, more than the rows
    before = content(run / "checkpoints")
    process = start(file_size=limit)
    assert process.wait() == 2
    said = process.said()
    steps = range(stopped // 4 * 4 + 4, STEPS, 4)
    assert [f"warning: step {step} could not be saved (" in said for step in steps] == [True] * len(
        steps
    )
    refused = [line for line in said.splitlines() if "could not be saved" in line]
    assert len(refused) == len(steps) + 1 and all("File too large" in line for line in refused)
    assert (
        f"error: step {STEPS} could not be saved (" in said
        and "goes on from the checkpoint before" in said
    )
    assert "Traceback" not in said
    assert content(run / "checkpoints") == before and not (run / "summary.json").exists()
    process = start(file_size=limit)  # asked to stop, it needs its checkpoint too
    assert process.until(lambda: "warning: step" in process.said())
    process.kill(signal.SIGTERM)
    assert process.wait() == 2
    assert content(run / "checkpoints") == before
    assert start().wait() == 0
    assert_same_run(run, reference)


def test_full_disk(start, tmp_path, reference, stopped):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("only root can mount a small disk")
    try:
        run = shutil.copytree(tmp_path / "run", disk / "run")
        # less than a checkpoint is left
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 150_000))
        before = content(run / "checkpoints")
        process = start(dir=run)
        assert process.wait() == 2
        said = process.said()
        assert (
            f"warning: step {STEPS - 4} could not be saved (" in said
            and f"error: step {STEPS} could not be saved (" in said
        )
        assert "No space left on device" in said and "Traceback" not in said
        assert content(run / "checkpoints") == before and reached(run) == STEPS
        (disk / "ballast").unlink()
        process = start(dir=run)
        assert process.wait() == 0
        assert f"resumed from {run}/checkpoints/step_{stopped:08d}\n" in process.said()
        assert_same_run(run, reference)
    finally:
        subprocess.run(["umount", disk], check=True)


# W&B


def test_wandb_run_goes_on_under_its_id(start, tmp_path, reference):
    run = tmp_path / "run"
    process = start("tracking.mode=offline", "tracking.project=mine")
    assert process.until(lambda: reached(run) >= 9)
    process.kill(signal.SIGUSR1)
    assert process.wait() == EXIT_PREEMPTED
    assert start("tracking.mode=offline").wait() == 0
    starts = read_wandb(run)
    assert [row["step"] for start in starts for row in start.rows] == list(range(STEPS + 1))
    assert len({start.run.run_id for start in starts}) == 1 and len(starts) == 2
    assert [start.preempting for start in starts] == [True, False]
    assert_same_run(run, reference)
