"""Several processes give what one gives: gloo processes under torchrun, FSDP2 and HSDP, for every rule (identities 21, 30 and 31)."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.ranks import BF16, REPLICA, RULES
from tests.runs import ROOT, rows, torchrun

KINDS = ("fsdp 1", "fsdp 2", "fsdp 4", "hsdp 4")
CASES = [f"{kind}: {name}" for kind in KINDS for name in [*RULES, *(f"{name}, by replica" for name in REPLICA if kind == "hsdp 4")]]


@pytest.mark.parametrize("case", CASES)
def test_processes_agree_with_one(found, case):
    fp32 = found[case]
    assert fp32["loss"] < 1e-5 and fp32["gradient"] < 1e-6 and fp32["weights"] < 1e-4, fp32
    assert fp32["metrics"] < 1e-3 and fp32["replicas"] == 0, fp32  # replicas are the same bit for bit
    assert case.startswith(("fsdp 1", "fsdp 4")) or fp32["sync"] < 1e-6, fp32
    if fp64 := found.get(f"{case}, fp64"):
        assert fp64["loss"] < 1e-13 and fp64["gradient"] < 1e-12 and fp64["weights"] < 1e-10 and fp64["sync"] < 1e-13, fp64


@pytest.mark.parametrize("rule", BF16)
def test_bf16_is_that_of_one_process_under_autocast(found, rule):
    bf16 = found[f"fsdp 2: {rule}, bf16"]  # rounding turns the move, and rules with one part further
    assert bf16["loss"] < 2e-3 and bf16["gradient"] < (5e-3 if rule == "adamw" else 5e-2) and bf16["metrics"] < 5e-2, bf16


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
    """4 save, 2 go on with everything on the CPU, 4 finish as 2 replicas of 2, with a signal to one process each time but the last."""
    folder = tmp_path / "run"
    for world, until, *keys in (
        (4, 3, "parallel=fsdp", "parallel.sync=last"),
        (2, 6, "parallel=fsdp", "parallel.cpu_offload=true"),
        (4, 13, "parallel=hsdp", "parallel.reshard_after_forward=false"),
    ):
        process = torchrun(world, str(ROOT / "train.py"), *overrides, f"dir={folder}", *keys, "checkpoint.every=2")
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


def test_one_process_may_be_sharded(tmp_path, overrides, whole):
    run(0, *overrides, "parallel=fsdp", f"dir={tmp_path}/run")
    assert_same_curve(rows(tmp_path / "run"), rows(whole))
