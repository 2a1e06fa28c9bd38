"""Where the processes of a run meet, and what random numbers they draw."""

import io
import os
import pty
import subprocess
import sys

import pytest
import torch

import train
from conf.cli import user_errors
from conf.ranks import rank_and_world
from launch.config import compose
from launch.run.process_group import first_host, meeting_point
from model.device import peak_flops, seed_everything
from tests.runs import ROOT


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", None),
    ],
)
def test_the_peak_of_a_device_is_its_own_or_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


FIRST = {
    "gpu7": "gpu7",
    "gpu7,login1": "gpu7",
    "gpu[003-005,7],login1": "gpu003",
    "gpu[12,14-15]": "gpu12",
    "a1,gpu[3-4]": "a1",
    "rack[0-1]_blade[3-4]": "rack0_blade3",
    "r[2]n[08-09],r3n[1-2]": "r2n08",
}


@pytest.mark.parametrize("nodes", FIRST)
def test_the_first_host_is_slurms_own_word_or_a_librarys(tmp_path, monkeypatch, nodes):
    """Slurm's command needs its configuration, which may be missing, as in a container."""
    first_host.cache_clear()
    pytest.importorskip("submitit")
    assert first_host(nodes) == FIRST[nodes]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "told\\nother\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    first_host.cache_clear()
    assert first_host(nodes) == ("told" if "[" in nodes else FIRST[nodes])


@pytest.mark.parametrize("nodes", ["n[1", "n[a-b]", "n[3-1]"])
def test_a_list_of_nodes_that_is_none_is_named(nodes):
    first_host.cache_clear()
    with pytest.raises(ValueError, match=r"NODELIST=n\[.*says which node .* set MASTER_ADDR to it"):
        first_host(nodes)


def test_an_empty_list_of_nodes_is_none():
    empty = {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}
    assert meeting_point(empty)["MASTER_ADDR"] == "localhost"
    assert meeting_point(empty | {"SLURM_JOB_NODELIST": "a1,a2"})["MASTER_ADDR"] == "a1"


@pytest.mark.parametrize(
    ("rank", "world"), [("abc", "4"), ("0", "four"), ("5", "2"), ("-1", "2"), ("0", "0")]
)
@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
)
def test_variables_that_name_no_process_are_said_to(names, rank, world, monkeypatch, capsys):
    for name, value in zip(names, (rank, world), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end, user_errors():
        compose(["model=tiny"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {names[0]}={rank} and {names[1]}={world} name no process of a run; unset both, or"
        " start the processes by torchrun or srun\n"
    )


def test_empty_variables_are_unset_ones(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert rank_and_world() == (0, 1)


def test_where_nobody_can_tell_the_first_host_the_line_says_what_to_set(monkeypatch):
    first_host.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    with pytest.raises(
        ValueError,
        match=(
            r"SLURM_STEP_NODELIST=gpu\[1-2\], and neither scontrol nor submitit .* set MASTER_ADDR"
        ),
    ):
        meeting_point({"SLURM_STEP_NODELIST": "gpu[1-2]"})
    assert (
        meeting_point({"SLURM_STEP_NODELIST": "gpu[1-2]", "MASTER_ADDR": "gpu1"})["MASTER_ADDR"]
        == "gpu1"
    )


# What is typed in a shell of `srun --pty --ntasks=4`


TASK = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_ID": "7",
    "SLURM_TASK_PID": "1",
}


def test_what_is_typed_in_a_shell_of_several_tasks_is_one_process():
    """Without a terminal it is one of the tasks, as what such a shell is replaced by."""
    master, slave = pty.openpty()
    for script, stdin, expected in (
        ("", slave, (0, 1)),
        ("", subprocess.DEVNULL, (0, 4)),
        ("os.environ['SLURM_TASK_PID'] = str(os.getpid())", slave, (0, 4)),
    ):
        command = (
            f"import os\n{script}\nfrom conf.ranks import rank_and_world\nprint(rank_and_world())"
        )
        done = subprocess.run(
            [sys.executable, "-c", command],
            stdin=stdin,
            env={**os.environ, **TASK},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"{expected}\n", done.stderr
    os.close(slave)
    os.close(master)


def test_only_a_run_needs_to_know_whether_a_shell_of_several_tasks_is_one(
    tiny, tmp_path, monkeypatch, capsys
):
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    compose(tiny)  # as data.prepare, launch.evaluate and others do
    assert train.main(compose([*tiny, "plan_only=true"])) == 0
    assert " on each of " not in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="interactive shell of several Slurm tasks, unset SLURM_STEP_NUM_TASKS"
    ):
        train.main(compose([*tiny, f"dir={tmp_path}/run"]))
    assert not (tmp_path / "run").exists()


def test_steps_and_jobs_on_a_node_meet_apart():
    """On the first node of the step, which need not be that of the job."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[1-4]",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[3-4]",
    }
    assert meeting_point(job)["MASTER_ADDR"] == "gpu3" and meeting_point(job) == meeting_point(
        dict(job)
    )
    ports = {
        int(meeting_point(job | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)})["MASTER_PORT"])
        for j in range(4711, 5211)
        for s in range(16)
    }
    # where Linux begins to give ports to whoever asks
    assert len(ports) == 500 * 16 and min(ports) >= 1024 and max(ports) < 32768


def test_every_process_draws_numbers_of_its_own():
    """Those of the main process are of the seed itself. Two seeds that share their lower 32 bits
    would draw the same on a CPU."""
    drawn = {}
    with torch.random.fork_rng():
        for seed in (0, 7):
            for rank in range(64):
                seed_everything(seed, rank, deterministic=False)
                drawn[seed, rank] = torch.rand(4), torch.initial_seed()
            assert torch.equal(
                drawn[seed, 0][0], torch.rand(4, generator=torch.Generator().manual_seed(seed))
            )
    assert (
        len({tuple(numbers.tolist()) for numbers, _ in drawn.values()})
        == len({seed for _, seed in drawn.values()})
        == 128
    )
