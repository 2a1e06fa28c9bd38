"""What several tests share: a cache of prepared data, and a way to train as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for a busy core spin: ten times slower beside other work
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of prepared data, one for the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(tmp_path, cache):
    """Runs `python train.py OVERRIDES` in tmp_path and returns the completed process."""

    def run(*overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "train.py"), f"data.cache={cache}", "tracking.mode=off", *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run
