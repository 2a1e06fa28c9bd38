"""The plan's memory beside what is allocated, and a few steps of every method."""

import os
import subprocess
import sys

import pytest

from tests.gpu.conftest import DEVICE
from tests.runs import ROOT

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
}


@pytest.mark.needs_cuda
@pytest.mark.parametrize("rule", ["adamw", "sam", "functional_sam store"])
def test_the_memory_plan_is_within_a_tenth(rule, record_property):
    command = [sys.executable, str(ROOT / "tests/benchmarks/gpu.py"), "memory", "--rules", rule]
    process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    record_property("table", process.stdout.splitlines())
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]


def test_smoke(tmp_path, record_property):
    """A few steps of every method as a sweep, and the table."""
    few = ["schedule.steps=6", "batch.sequences=4"] if DEVICE == "cpu" else []
    process = subprocess.run(
        [str(ROOT / "launch/smoke.sh"), f"device={DEVICE}", *few],
        cwd=tmp_path,
        env={**ENVIRONMENT, "FOLDER": str(tmp_path / "smoke")},
        capture_output=True,
        text=True,
    )
    record_property("table", process.stdout.splitlines()[-30:])
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-2000:]
