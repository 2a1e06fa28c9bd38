"""What several tests share: a cache of prepared data, and a way to train as a user does."""

import argparse
import inspect
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from tests.runs import ROOT, TINY

# threads that wait for a busy core spin: ten times slower beside other work
os.environ.setdefault("OMP_NUM_THREADS", "1")

GPU = Path(__file__).parent / "gpu"


def pytest_configure(config):
    """Hides devices from all tests but those of tests/gpu, which are called by themselves: a run
    with device=auto must be the same on a laptop and on a GPU node."""
    paths = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if not all(path == GPU or GPU in path.parents for path in paths):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


LONGEST = ("test_distributed", "test_gates", "test_slurm", "test_survival", "test_wandb", "test_hf")


def pytest_collection_modifyitems(items):
    """Where several workers share the files, the longest ones begin first, so that no worker is
    left alone with one at the end."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of prepared data, one for the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def no_wandb_account(tmp_path_factory):
    """Neither W&B settings nor a key of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("no_account")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder / "wandb-settings"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


@pytest.fixture
def train(tmp_path, cache):
    """Runs `python train.py OVERRIDES` in tmp_path and returns the completed process."""

    def run(*overrides: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"data.cache={cache}",
            "tracking.mode=off",
            *overrides,
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, cache):
    """Overrides of a run of less than a second, all but its folder."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(
        "".join(
            Path(module.__file__).read_text() for module in (argparse, inspect, subprocess, typing)
        )
    )
    return [
        *TINY,
        "data=text",
        f"data.path={path}",
        "data.validation_split=tail",
        f"data.cache={cache}",
    ]


@pytest.fixture(scope="session")
def reference(tmp_path_factory, tiny):
    """The folder of such a run that nothing disturbed; a milestone lies off the interval of its
    checkpoints."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    overrides = [*tiny, f"dir={folder}", "checkpoint.milestones=[10]"]
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides], check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What 1, 2 and 4 processes found out (tests/ranks.py)."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(ROOT / "tests/ranks.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    return {
        name: entry
        for file in folder.glob("*.json")
        for name, entry in json.loads(file.read_text()).items()
    }
