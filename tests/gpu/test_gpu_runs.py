"""Whole runs on a device: killed and resumed, on several processes, and while they save."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from data.tokenizer import bytes_tokenizer
from launch.checkpoint.saver import Saver
from model.processes import Layout
from tests.gpu.conftest import DEVICE, synchronize
from tests.runs import ROOT, STEPS, TINY, assert_same_run, rows, torchrun

RUN = [*(override for override in TINY if override != "device=cpu"), f"device={DEVICE}"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Overrides of a corpus of this project's own text, with its cache."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.txt").write_text("".join(p.read_text() for p in ROOT.glob("*/README.md")))
    return [
        "data=text",
        f"data.path={folder}/words.txt",
        "data.validation_split=tail",
        f"data.cache={folder}/cache",
    ]


def train(*overrides):
    """Starts train.py."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Waits for a run, and returns what it printed."""
    out = process.communicate(timeout=400)[0]
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.mark.parametrize("rule", ["adamw", "sam", "functional_sam"])
def test_a_killed_run_resumes_bit_for_bit(rule, words, tmp_path):
    command = [*RUN, *words, f"optim={rule}", "deterministic=true"]
    finish(train(*command, f"dir={tmp_path}/whole"))
    killed = train(*command, f"dir={tmp_path}/killed")
    while not (tmp_path / "killed" / "checkpoints" / "step_00000008").exists():
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finish(train(*command, f"dir={tmp_path}/killed"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("rule", ["adamw", "sam", "functional_sam"])
def test_shards_give_what_one_process_gives(rule, words, tmp_path, record_property):
    """NCCL with one process, and with as many as there are devices."""
    command = [*RUN, *words, f"optim={rule}", "precision=fp32", "model.dropout=0"]
    finish(train(*command, f"dir={tmp_path}/one"))
    expected = rows(tmp_path / "one")
    count = torch.cuda.device_count() if DEVICE == "cuda" else 2
    for world in sorted({1, count}):
        folder = tmp_path / f"shards-{world}"
        started = torchrun(
            world, str(ROOT / "train.py"), *command, "parallel=fsdp", f"dir={folder}"
        )
        finish(started)
        found = rows(folder)
        worst = max(
            abs(a["train/loss"] - b["train/loss"]) / b["train/loss"]
            for a, b in zip(found, expected, strict=True)
            if "train/loss" in b
        )
        record_property(f"worst_loss_on_{world}", worst)
        assert worst <= 1e-5


def test_a_checkpoint_holds_what_the_step_left_though_the_next_has_begun(
    tmp_path, device, record_property
):
    """Weights are overwritten as soon as the copy has begun, as the next step would."""
    layout = Layout()
    saver = Saver(tmp_path, layout)
    weights = {f"w{i}": torch.full((2048, 2048), float(i), device=device) for i in range(12)}
    began = synchronize(device)
    saver.begin({"model": weights}, {"step": STEPS}, bytes_tokenizer(), 2, [])
    returned = time.perf_counter()
    for weight in weights.values():
        weight.mul_(-1.0).sub_(1000.0)
    assert saver.wait() is None
    record_property("mebibytes", 12 * 2048 * 2048 * 4 / 2**20)
    record_property("seconds_of_the_copy", round(returned - began, 4))
    record_property("seconds_until_saved", round(time.perf_counter() - began, 4))
    saver.close()
    for i in range(12):
        values = saver.copies["model"][f"w{i}"].values
        assert values.device.type == "cpu" and bool((values == i).all())


def test_the_doctor_finds_nothing_wrong(record_property):
    process = subprocess.run(
        [sys.executable, "-m", "launch.doctor"], cwd=ROOT, capture_output=True, text=True
    )
    record_property("table", process.stdout.splitlines())
    assert process.returncode == 0, process.stdout
