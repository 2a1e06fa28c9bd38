"""Runs of several processes that survive: killed, stopped, mistaken or diverging ones end together,
with one line, and go on bit for bit.

Two processes are started as srun would, by Slurm's variables alone, with nobody beside them who
would end the one when the other dies; and once by torchrun, which starts them again."""

import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, Server, Started, assert_same_run, torchrun

JOBS = itertools.count(1000 * (os.getpid() % 700))
LOST, MISTAKE = 4, 2


@pytest.fixture(scope="module")
def nodes():
    """Two programs that start processes."""
    servers = [Server(), Server()]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def overrides(tiny):
    """A run on two processes."""
    return [*tiny, "parallel=fsdp", "batch.micro=1"]


def start(
    nodes: list[Server], folder: Path, *overrides: str, second: tuple[str, ...] = ()
) -> list[Started]:
    """Both processes of a step of Slurm's; the second may be given more."""
    job = {
        "SLURM_JOB_ID": str(next(JOBS)),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
    }
    ranks = ("0", "1")
    return [
        node.start(
            *overrides,
            f"dir={folder}",
            *(second if rank == "1" else ()),
            output=folder.with_name(f"{folder.name}.{rank}.txt"),
            variables={**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
        )
        for node, rank in zip(nodes, ranks, strict=True)
    ]


def ends(processes: list[Started]) -> list[int]:
    """The exit codes; nothing ended by an exception that nobody caught."""
    codes = [process.wait() for process in processes]
    assert not any("Traceback" in process.said() for process in processes), [
        process.said() for process in processes
    ]
    return codes


def errors(process: Started) -> list[str]:
    return [line for line in process.said().splitlines() if line.startswith("error: ")]


def saved(folder: Path, step: int):
    """Whether the run has got as far as this checkpoint."""
    return lambda: (folder / f"checkpoints/step_{step:08d}").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, nodes, overrides):
    """The folder of the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    processes = start(nodes, folder, *overrides)
    assert ends(processes) == [0, 0], processes[0].said()
    assert not (folder / "heartbeat").exists() and not (folder / "logs").exists()
    return folder


def test_killed_processes_are_named_and_the_run_goes_on_bit_for_bit(
    tmp_path, nodes, overrides, undisturbed
):
    """One mid-step, the main one during an evaluation, both at once."""
    folder = tmp_path / "run"

    processes = start(nodes, folder, *overrides)
    assert processes[1].until(saved(folder, 8))
    processes[1].kill()
    assert ends(processes) == [LOST, -signal.SIGKILL]
    (said,) = errors(processes[0])
    assert (
        f"rank 1 ({os.uname().nodename}, process {processes[1].pid}, " in said
        and "ended without a word" in said
    )

    # it does little else
    processes = start(nodes, folder, *overrides, "evaluation.every=1", "evaluation.tokens=null")

    def evaluating() -> bool:
        beat = folder / "heartbeat/rank_0.json"
        seen = json.loads(beat.read_text()) if beat.exists() else {"phase": "", "step": 0, "pid": 0}
        return (
            seen["phase"] == "evaluating" and seen["step"] > 8 and seen["pid"] == processes[0].pid
        )

    assert processes[0].until(evaluating)
    processes[0].kill()
    assert ends(processes) == [-signal.SIGKILL, LOST]
    (said,) = errors(processes[1])
    assert (
        f"rank 0 ({os.uname().nodename}, process {processes[0].pid}, evaluating at step " in said
        and "ended without a word" in said
    )

    processes = start(nodes, folder, *overrides)
    assert processes[0].until(saved(folder, 24))
    for process in processes:
        process.kill()
    assert ends(processes) == [-signal.SIGKILL] * 2

    processes = start(nodes, folder, *overrides)
    assert ends(processes) == [0, 0] and "resumed from" in processes[0].said()
    assert (
        "taking over from process" in processes[0].said() and "watching" not in processes[0].said()
    )
    assert_same_run(folder, undisturbed)


def test_killed_in_the_middle_of_a_save(tmp_path, nodes, overrides, undisturbed):
    """By the kernel, with half of a file written: first one process, then both. Nothing but that
    checkpoint is lost."""
    folder = tmp_path / "run"
    weights = undisturbed / "checkpoints/step_00000032/model-00002-of-00002.safetensors"
    for killed, step in (((1,), 4), ((0, 1), 12)):
        processes = start(nodes, folder, *overrides)
        assert processes[0].until(saved(folder, step))
        for rank in killed:  # files of optimiser state are twice as large
            resource.prlimit(
                processes[rank].pid, resource.RLIMIT_FSIZE, (weights.stat().st_size + 100,) * 2
            )
        codes = [process.wait() for process in processes]
        assert codes == [-signal.SIGXFSZ if rank in killed else LOST for rank in (0, 1)], [
            process.said() for process in processes
        ]
        assert not saved(folder, step + 8)()
        newest = max(folder.glob("checkpoints/step_*"))
    assert list(folder.glob("checkpoints/.step_*.partial"))
    processes = start(nodes, folder, *overrides)
    assert ends(processes) == [0, 0] and f"resumed from {newest}\n" in processes[0].said()
    assert not list(folder.glob("checkpoints/.*"))
    assert_same_run(folder, undisturbed)


def test_a_process_that_nobody_joins_says_so(tmp_path, nodes, overrides):
    job = {"SLURM_JOB_ID": str(next(JOBS)), "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    alone = nodes[0].start(
        *overrides,
        f"dir={tmp_path}/run",
        "parallel.timeout=0.02",
        output=tmp_path / "out.txt",
        variables=job,
    )
    assert ends([alone]) == [LOST]
    assert "rank 0 of 2 has been meeting the other processes for 0.02 minutes" in errors(alone)[0]


def test_a_process_that_dies_before_they_have_met_is_named(tmp_path, nodes, overrides):
    """Killed, or by a mistake that the others did not make: seconds later, not after
    parallel.timeout."""
    processes = start(nodes, tmp_path / "run", *overrides, second=("device=cuda",))
    assert ends(processes) == [MISTAKE, MISTAKE]
    (said,) = errors(processes[1])
    assert errors(processes[0]) == [] and said.startswith(
        "error: rank 1: device=cuda, but torch sees no CUDA device"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run.0.txt", "run.1.txt"}

    three = [*overrides, "batch.sequences=3", f"dir={tmp_path}/runs/run"]
    job = {"SLURM_JOB_ID": str(next(JOBS)), "SLURM_STEP_NUM_TASKS": "3"}
    alone, lost = (
        node.start(*three, output=tmp_path / f"{rank}.txt", variables={**job, "SLURM_PROCID": rank})
        for node, rank in zip(nodes, ("0", "1"), strict=True)
    )
    assert alone.until(lambda: list(tmp_path.glob(".run.meeting_*/rank_1.json")))
    lost.kill()
    assert ends([alone, lost]) == [LOST, -signal.SIGKILL]
    (said,) = errors(alone)
    named = (
        rf"rank 1 \({os.uname().nodename}, process {lost.pid}, (starting|meeting the other"
        r" processes) at step 0\) ended without a word"
    )
    assert re.search(named, said), said
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.0.txt",
        "run.1.txt",
        "0.txt",
        "1.txt",
    }


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named(tmp_path, nodes, overrides, stopped):
    """It holds its connections open, and no collective fails."""
    folder = tmp_path / "run"
    processes = start(nodes, folder, *overrides, "parallel.timeout=0.05")
    other, hung = processes[1 - stopped], processes[stopped]
    assert hung.until(saved(folder, 4))
    hung.kill(signal.SIGSTOP)
    try:
        assert other.wait() == LOST
        (said,) = errors(other)
        assert (
            f"rank {stopped} ({os.uname().nodename}, process {hung.pid}, " in said
            and "shows no sign of life" in said
        )
        stacks = (folder / f"logs/stacks_rank{1 - stopped}.txt").read_text()
        assert "train.py" in stacks and "watchdog.py" in stacks  # of all threads
    finally:
        hung.kill()
    hung.wait()


def test_torchrun_starts_a_killed_worker_again(tmp_path, nodes, overrides, undisturbed):
    """From the last checkpoint. Then a signal reaches agent and workers alike, as from a scheduler:
    the run is saved all the same."""
    folder = tmp_path / "run"
    agent = torchrun(2, "--max-restarts=1", str(ROOT / "train.py"), *overrides, f"dir={folder}")
    for step, number in ((8, signal.SIGKILL), (20, signal.SIGTERM)):
        end = time.monotonic() + 90
        while not saved(folder, step)():
            assert agent.poll() is None and time.monotonic() < end, agent.communicate(timeout=20)[
                0
            ][-6000:]
            time.sleep(0.001)
        workers = [
            int(pid)
            for pid in subprocess.run(
                ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True
            ).stdout.split()
        ]
        for pid in [workers[1]] if number == signal.SIGKILL else [agent.pid, *workers]:
            os.kill(pid, number)
    said, _ = agent.communicate(timeout=60)
    assert "error: rank 1 (" in said and ": saved step" in said, said[-4000:]
    assert "resumed from" in said
    processes = start(nodes, folder, *overrides)
    assert ends(processes) == [0, 0]
    assert_same_run(folder, undisturbed)


def test_a_mistake_of_one_process_ends_both_with_one_line(tmp_path, nodes, overrides):
    (tmp_path / "file").touch()
    processes = start(nodes, tmp_path / "run", *overrides, second=(f"data.cache={tmp_path}/file",))
    assert ends(processes) == [MISTAKE, MISTAKE]
    assert errors(processes[0]) == [] and len(errors(processes[1])) == 1
    assert f"error: rank 1: data.cache={tmp_path}/file cannot be made" in processes[1].said()
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_all_is_said_once(tmp_path, nodes, overrides, undisturbed):
    """Found by the main process alone, or by each of them."""
    for folder, key in (
        (undisturbed, "seed=1"),
        (tmp_path / "run", f"init.run={undisturbed}/nowhere"),
    ):
        processes = start(nodes, folder, *overrides, key)
        assert ends(processes) == [MISTAKE, MISTAKE]
        assert len(errors(processes[0])) == 1 and errors(processes[1]) == [], processes[1].said()


def test_processes_that_do_not_hold_the_same_stop(tmp_path, nodes, overrides):
    """Both values, with their ranks; the weights of replicas among them."""
    keys = ("parallel=hsdp", "parallel.replicas=2")
    processes = start(
        nodes, tmp_path / "run", *overrides, *keys, second=("seed=1", "optim.lr=3e-3")
    )
    assert ends(processes) == [MISTAKE, MISTAKE]
    (said,) = errors(processes[0])
    assert errors(processes[1]) == []
    assert "seed is 0 on rank 0, 1 on rank 1" in said and "optim.lr is " in said
    assert "the weights, optimizer and rule of shard 0 is " in said


HANG = """
import sys, time
from pathlib import Path
from launch.run.watchdog import Watchdog
from model.processes import Layout

layout = Layout(int(sys.argv[1]), 2)
with Watchdog(Path(sys.argv[2]), layout, minutes=0.02) as watchdog:  # 1.2 s
    Path(sys.argv[2], sys.argv[1]).touch()
    while not Path(sys.argv[2], str(1 - layout.rank)).exists():
        time.sleep(0.01)
    with watchdog.heartbeats():
        watchdog.liveness.report_phase("preparing data", timeout_factor=float("inf"))
        time.sleep(4)  # the one prepares, the other waits
        watchdog.liveness.report_phase("training", 7)
        if layout.main:
            watchdog.liveness.report_phase("training", 8)
        time.sleep(60)
"""


def test_a_process_that_lives_but_does_not_get_on_is_named(tmp_path):
    """The one that the other has overtaken; and what may take long is let be."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HANG), rank, str(tmp_path)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [LOST, LOST], said
    # of the one that found it first
    (line,) = [line for text in said for line in text.splitlines()]
    assert (
        f"rank 1 ({os.uname().nodename}, process {processes[1].pid}, training at step 7) has not"
        " got on" in line
    )
    assert len(list((tmp_path / "logs").iterdir())) == 2


PAIRS = """
import ctypes, os, resource, socket, sys, time
from pathlib import Path
from launch.run import watchdog
from launch.run.preemption import Preemption
from model.processes import Layout

def run(kind, folder, rank):
    watchdog.BEAT, watchdog.FAR, watchdog.FAR_AT_FIRST = 0.25, 8, 6
    if kind in ("elsewhere", "full disk", "meeting"):
        socket.gethostname = lambda: f"host{rank}"
    if kind == "container":
        os.getpid = lambda: 2**22 + 1  # a number that no process has here
    layout = Layout(rank, 2)
    if kind == "meeting":
        os.environ["SLURM_JOB_ID"] = "7"
        with watchdog.Watchdog(folder / "run", layout, minutes=10) as watching:
            watching.liveness.report_phase("meeting the other processes")
            while watching.idle < 2 * watchdog.BEAT:
                time.sleep(0.01)
            Path(folder, f"ready{rank}").touch()
            time.sleep(1000)
    with watchdog.Watchdog(folder, layout, minutes=10) as watching, Preemption():
        Path(folder, f"there{rank}").touch()
        while not Path(folder, f"there{1 - rank}").exists():
            time.sleep(0.01)
        with watching.heartbeats():
            watching.liveness.report_phase("training", 7)
            while watching.idle < 2 * watchdog.BEAT:  # both have shown as much
                time.sleep(0.01)
            Path(folder, f"ready{rank}").touch()
            if kind in ("here", "elsewhere"):
                libc = ctypes.CDLL(None)
                mutex = ctypes.create_string_buffer(64)  # zeros: nobody holds it
                libc.pthread_mutex_lock(mutex)
                # In the kernel for ever, whatever the signal, as a wait for a CUDA stream is.
                libc.pthread_mutex_lock(mutex)
            if kind == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            while not Path(folder, "go").exists():
                if watching.idle > 2 * watchdog.FAR * watchdog.BEAT:
                    Path(folder, f"waited{rank}").touch()
                if kind == "container":
                    sum(range(10**6))  # at work
                else:
                    time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

ranks = {}
for folder in map(Path, sys.argv[1:]):
    for rank in (0, 1):
        if (pid := os.fork()) == 0:
            os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT), 2)
            run(folder.name, folder, rank)
            sys.exit()
        Path(folder, f"pid{rank}").write_text(str(pid))
        ranks[pid] = folder / f"code{rank}"
while ranks:
    pid, status = os.wait()
    partial = ranks[pid].with_suffix(".partial")
    partial.write_text(str(os.waitstatus_to_exitcode(status)))
    partial.replace(ranks.pop(pid))
"""


@pytest.fixture
def pairs(tmp_path):
    """Starts two processes of each kind in a folder of its own, which do not meet in a collective
    that would fail; one program forks all."""
    programs = []

    def start(*kinds: str) -> dict[str, Path]:
        folders = {kind: tmp_path / kind for kind in kinds}
        for folder in folders.values():
            folder.mkdir()
        programs.append(
            subprocess.Popen(
                [sys.executable, "-c", PAIRS, *folders.values()], cwd=ROOT, start_new_session=True
            )
        )
        for folder, rank in itertools.product(folders.values(), (0, 1)):
            read(folder / f"ready{rank}")
        return folders

    yield start
    for program in programs:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()


def read(file: Path) -> str:
    """What is in a file, once there is one."""
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, {
            said: said.read_text() for said in file.parent.glob("said*")
        }
        time.sleep(0.05)
    return file.read_text()


def test_a_killed_process_is_named_though_nothing_fails_and_no_signal_is_heard(pairs):
    """As under NCCL, whose collectives wait on: of this host and of another, long before
    parallel.timeout."""
    folders = pairs("here", "elsewhere")
    for folder in folders.values():
        os.kill(int(read(folder / "pid1")), signal.SIGKILL)
        os.kill(int(read(folder / "pid0")), signal.SIGTERM)  # as torchrun does at once
    for folder, host, ending in (
        (folders["here"], os.uname().nodename, "ended without a word"),
        (folders["elsewhere"], "host1", "has shown no sign of life for 2 seconds"),
    ):
        assert read(folder / "code0") == str(LOST)
        (line,) = [
            line for line in read(folder / "said0").splitlines() if line.startswith("error: ")
        ]
        assert line.startswith(
            f"error: rank 1 ({host}, process {read(folder / 'pid1')}, training at step 7)"
            f" {ending}; "
        ), line
        failure = json.loads(read(folder / "heartbeat/failure.json"))
        assert failure == {"by": 0, "code": LOST, "line": line.removeprefix("error: ")}
        assert "watchdog.py" in read(folder / "logs/stacks_rank0.txt")


def test_a_process_of_another_host_that_dies_before_they_have_met_is_named(pairs):
    (folder,) = pairs("meeting").values()
    os.kill(int(read(folder / "pid1")), signal.SIGKILL)
    assert read(folder / "code0") == str(LOST)
    (line,) = [line for line in read(folder / "said0").splitlines() if line.startswith("error: ")]
    assert re.search(
        r"rank 1 \(host1, process \d+, meeting the other processes at step 0\) has shown no sign of"
        r" life for 1.5 seconds",
        line,
    ), line
    assert not list(folder.glob(".run*")) and not (folder / "run").exists()


ALONE = """
import sys, time
from pathlib import Path
from launch.run import watchdog
from model.processes import Layout

watchdog.BEAT = 0.2
layout = Layout(0, 2)
with watchdog.Watchdog(Path(sys.argv[1]), layout, minutes=10) as watching:
    watching.liveness.report_phase("meeting the other processes")
    while True:
        time.sleep(0.05)
        if watching.idle > 4:
            Path(sys.argv[1] + ".waited").touch()
"""


def test_a_task_that_dies_while_it_loads_is_named(tmp_path):
    """It cannot have shown itself. While its process is there, whatever it does, and in a container
    of its own, it is waited for."""
    step = {"SLURM_JOB_ID": str(next(JOBS)), "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "node7"}
    loading = subprocess.Popen(["sleep", "1000"], env={**os.environ, **step, "SLURM_PROCID": "1"})
    command = [sys.executable, "-c", ALONE]
    environment = {**os.environ, **step, "SLURM_PROCID": "0"}
    alone = subprocess.Popen(
        [*command, tmp_path / "run"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    contained = subprocess.Popen(
        [*command, tmp_path / "other"],
        cwd=ROOT,
        env={**environment, "SLURM_TASK_PID": str(2**22 + 1)},
    )
    read(tmp_path / "run.waited")
    loading.kill()
    loading.wait()
    assert alone.wait(timeout=60) == LOST
    assert re.fullmatch(
        "error: rank 1 has no process on .*: it ended before it had loaded; .*\n",
        alone.stderr.read(),
    )
    read(tmp_path / "other.waited")
    assert contained.poll() is None
    contained.kill()
    contained.wait()


def test_a_process_that_is_slow_but_alive_is_let_be(pairs):
    """One at work whose number nobody here knows, one suspended for a while, and ones of two hosts
    whose disk is full."""
    folders = pairs("container", "suspended", "full disk")
    suspended = int(read(folders["suspended"] / "pid1"))
    os.kill(suspended, signal.SIGSTOP)
    for folder in folders.values():
        read(folder / "waited0")
    os.kill(suspended, signal.SIGCONT)
    for folder in folders.values():
        (folder / "go").touch()
    for folder, rank in itertools.product(folders.values(), (0, 1)):
        assert read(folder / f"code{rank}") == "0" and read(folder / f"said{rank}") == ""
