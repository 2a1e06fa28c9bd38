"""The tests of devices without one: they are skipped with the reason, and hold on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def gpu_tests(tmp_path, *arguments, **environment):
    """Runs some of tests/gpu, and returns what pytest printed and the lines that were recorded."""
    results = tmp_path / "results.jsonl"
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**os.environ, "FLATGPT_TEST_RESULTS": str(results), **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    lines = results.read_text().splitlines() if results.exists() else []
    return process.stdout, [json.loads(line) for line in lines]


def test_devices_are_hidden_from_all_other_tests():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_they_are_skipped_with_the_reason(tmp_path):
    said, lines = gpu_tests(tmp_path, "tests/gpu", CUDA_VISIBLE_DEVICES="-1")
    assert "torch sees no CUDA device" in said and "passed" not in said
    assert not lines


def test_they_hold_on_a_cpu(tmp_path):
    """All but what takes minutes there, or asks for CUDA; each leaves its line."""
    said, lines = gpu_tests(
        tmp_path,
        "tests/gpu/test_gpu_rules.py",
        "tests/gpu/test_gpu_runs.py",
        "-k",
        "not killed and not shards and not doctor",
        FLATGPT_TEST_DEVICE="cpu",
    )
    assert "failed" not in said
    passed = [line for line in lines if line["outcome"] == "passed"]
    assert len(passed) > 40
    assert all("error" in line for line in passed if "fp32" in line["check"])
