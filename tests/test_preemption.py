"""The first signal asks for a checkpoint, the second one ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from conf.exit_codes import EXIT_PREEMPTED
from launch.run.preemption import SIGNALS, Preemption

RUN = """
import sys, time
from conf.exit_codes import EXIT_PREEMPTED
from launch.run.preemption import Preemption
with Preemption() as preemption:
    print("running", flush=True)
    while not preemption.requested:
        time.sleep(0.01)
    print(preemption.requested, flush=True)
    time.sleep({"save": 0, "save slowly": 1, "end slowly": 0, "hang": 60}[sys.argv[1]])
if sys.argv[1] == "end slowly":
    print("ending", flush=True)
    time.sleep(1)
sys.exit(EXIT_PREEMPTED)
"""


def start(behaviour: str) -> subprocess.Popen:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, behaviour],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout and run.stdout.readline() == "running\n"
    return run


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_first_signal_lets_the_run_end_by_itself(number):
    run = start("save")
    run.send_signal(number)
    output, errors = run.communicate(timeout=20)
    assert output == f"{number.name}\n"
    assert (
        errors
        == f"received {number.name}: saving after this step, then exiting with code 75; a second"
        " signal exits at once\n"
    )
    assert run.returncode == EXIT_PREEMPTED == 75


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_second_signal_exits_at_once(second):
    run = start("hang")
    run.send_signal(signal.SIGTERM)
    assert run.stdout and run.stdout.readline() == "SIGTERM\n"
    run.send_signal(second)
    run.communicate(timeout=20)
    assert run.returncode == 128 + second


@pytest.mark.parametrize("behaviour", ["save slowly", "end slowly"])
@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "SUBMITIT_EXECUTOR"])
def test_under_a_process_that_passes_them_on_the_echo_of_a_signal_is_the_same_signal(
    monkeypatch, variable, behaviour
):
    monkeypatch.setenv(variable, "1")
    run = start(behaviour)
    run.send_signal(signal.SIGTERM)
    assert run.stdout and run.stdout.readline() == "SIGTERM\n"
    if behaviour == "end slowly":
        assert run.stdout.readline() == "ending\n"
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=20)
    assert run.returncode == EXIT_PREEMPTED


def test_a_second_hangup_is_the_first_one():
    run = start("save slowly")
    run.send_signal(signal.SIGHUP)
    assert run.stdout and run.stdout.readline() == "SIGHUP\n"
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=20)
    assert run.returncode == EXIT_PREEMPTED


def test_under_nohup_a_hangup_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert preemption.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_limit(monkeypatch):
    now = time.monotonic()
    preemption = Preemption(minutes=2)
    assert preemption.requested is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 119)
    assert preemption.requested is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert preemption.requested == "time limit"
    assert Preemption().requested is None


def test_earlier_handlers_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) not in before
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_lost_terminal_does_not_end_the_run(monkeypatch):
    def write(*_):
        raise OSError("the terminal is gone")

    monkeypatch.setattr(os, "write", write)
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested == "SIGTERM"
