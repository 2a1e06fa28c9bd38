"""Several processes give what one gives: gloo processes under torchrun, FSDP2 and HSDP, for every rule (identities 21, 30 and 31)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import REPLICA, RULES
from tests.runs import ROOT, assert_same_tensors, rows, tensors

KINDS = {"fsdp 2": 2, "fsdp 4": 4, "hsdp 4": 4}
CASES = [f"{kind}: {name}" for kind in KINDS for name in [*RULES, *(f"{name}, by replica" for name in REPLICA if kind == "hsdp 4")]]


def torchrun(world: int, *arguments: str, cwd: Path = ROOT, **options: object) -> subprocess.Popen:
    """N processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What 2 and 4 processes found out."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    for world in (2, 4):
        process = torchrun(world, str(ROOT / "tests/ranks.py"), str(folder / f"{world}.json"))
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out[-3000:]
        results |= json.loads((folder / f"{world}.json").read_text())
    return results


@pytest.mark.parametrize("case", CASES)
def test_processes_agree_with_one(found, case):
    fp32 = found[case]
    assert fp32["loss"] < 1e-5 and fp32["gradient"] < 2e-6 and fp32["weights"] < 1e-4, fp32
    if fp64 := found.get(f"{case}, fp64"):
        assert fp64["loss"] < 1e-13 and fp64["gradient"] < 1e-12 and fp64["weights"] < 1e-10, fp64


def run(world: int, *overrides: str) -> str:
    """A finished run of train.py on so many processes; what it printed."""
    process = torchrun(world, str(ROOT / "train.py"), *overrides) if world else subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope="module")
def overrides(tiny):
    """A run of a few steps that does not depend on the number of processes."""
    return [*tiny, "model.dropout=0", "precision=fp32", "optim.eps=1e-6", "batch.sequences=8", "batch.micro=2", "schedule.steps=12",
            "optim=friendly_sam", "evaluation.every=4"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, overrides):
    """The same run on one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(0, *overrides, f"dir={folder}")
    return folder


def assert_same_curve(ours: list[dict], theirs: list[dict]) -> None:
    """Losses to 1e-5, and the same steps and tokens."""
    assert [(row["step"], row["tokens"]) for row in ours] == [(row["step"], row["tokens"]) for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for key in ("train/loss", "val/loss", "sharpness/perturbed_loss", "grad/norm"):
            if other.get(key) is None:
                assert one.get(key) is None
            else:
                assert one[key] == pytest.approx(other[key], rel=1e-4 if key == "grad/norm" else 1e-5)


def test_a_run_goes_on_on_other_numbers_of_processes(tmp_path, overrides, whole):
    """4 save, 2 go on, 4 again, 2 replicas of 1 finish, with a signal to one process each time but the last."""
    folder = tmp_path / "run"
    for world, parallel, until in ((4, "fsdp", 3), (2, "fsdp", 6), (2, "hsdp", 13)):
        process = torchrun(world, str(ROOT / "train.py"), *overrides, f"dir={folder}", f"parallel={parallel}", "checkpoint.every=2")
        end = time.monotonic() + 200
        if until < 12:
            while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < until:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[-1]), signal.SIGUSR1)
        out, _ = process.communicate(timeout=200)
        assert (folder / "summary.json").exists() == (until > 12), out[-3000:]
        assert process.returncode == 0 or until < 12, out[-3000:]
        assert until > 12 or ("received SIGUSR1" in out and ": saved step" in out), out[-3000:]
    assert_same_curve(rows(folder), rows(whole))


def test_as_many_processes_resume_bit_for_bit(tmp_path, overrides):
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    run(2, *overrides, "model.dropout=0.1", "parallel=fsdp", f"dir={undisturbed}", "schedule.steps=8")
    process = torchrun(
        2, str(ROOT / "train.py"), *overrides, "model.dropout=0.1", "parallel=fsdp", f"dir={resumed}", "schedule.steps=8", "checkpoint.every=3"
    )
    while not list(resumed.glob("checkpoints/step_*3")):
        assert process.poll() is None
        time.sleep(0.005)
    for worker in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(worker), signal.SIGKILL)
    process.communicate(timeout=100)
    run(2, *overrides, "model.dropout=0.1", "parallel=fsdp", f"dir={resumed}", "schedule.steps=8", "checkpoint.every=3")
    assert_same_tensors(tensors(undisturbed, 8), tensors(resumed, 8))
    assert rows(undisturbed) == rows(resumed)


def test_one_process_may_be_sharded(tmp_path, overrides, whole):
    run(0, *overrides, "parallel=fsdp", f"dir={tmp_path}/run")
    assert_same_curve(rows(tmp_path / "run"), rows(whole))
