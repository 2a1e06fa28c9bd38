"""Where the tests of devices run, and what they find: one JSON line a check."""

import json
import os
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch

from launch.doctor import self_check
from model.device import ieee_products
from optim.rule import directions

# FLATGPT_TEST_DEVICE=cpu rehearses, on a machine without a device, what does not ask for CUDA.
DEVICE = os.environ.get("FLATGPT_TEST_DEVICE", "cuda")
RESULTS = Path(os.environ.get("FLATGPT_TEST_RESULTS", "runs/test_gpu.jsonl"))


def pytest_collection_modifyitems(items):
    """Skips with the reason what cannot run here."""
    here = Path(__file__).parent
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    reason = (
        "devices are hidden from the other tests; make test-gpu runs these"
        if hidden
        else "torch sees no CUDA device"
    )
    for item in items:
        if here not in item.path.parents or torch.cuda.is_available():
            continue
        if DEVICE == "cuda" or item.get_closest_marker("needs_cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Writes the outcome of a check with its figures as soon as it is over, so that a run that is
    cut off leaves what it found."""
    report = yield
    if report.when == "call" and Path(__file__).parent in item.path.parents:
        line = {
            "check": item.name,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "date": datetime.now().isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            **dict(item.user_properties),
        }
        if report.failed:
            line["error"] = str(call.excinfo.value)[:2000]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return report


@pytest.fixture(scope="session")
def device():
    """The device that is tested."""
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def problem():
    """A small GPT in float64 on the CPU, its AdamW and a batch."""
    return self_check.reference_problem()


@pytest.fixture
def same_noise(monkeypatch):
    """Draws noise on the CPU in fp32, whatever the device: the generators of devices differ."""
    draw = directions.noise

    def noise(like, seed, step, name, rows=None):
        on_cpu = torch.empty(like.shape, dtype=torch.float32)
        return draw(on_cpu, seed, step, name, rows).to(like)

    monkeypatch.setattr(directions, "noise", noise)


@pytest.fixture
def ieee():
    """Keeps TF32 off."""
    with ieee_products():
        yield


def synchronize(device):
    """Waits for a device, and returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
