"""The scripts of launch/: they pass shellcheck, and each starts what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config import compose
from launch.plan.plan import make_plan
from tests.runs import ROOT, rows

SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
GRIDS = ("fixed_length", "chinchilla")


def script(
    name: str, *arguments: str, cwd: Path, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a script of launch/ with the Python of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", str(ROOT / "launch" / name), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
    )


def test_scripts_are_these():
    assert [path.name for path in SCRIPTS] == [
        "chinchilla.sh",
        "fixed_length.sh",
        "many_nodes.sbatch",
        "one_node.sh",
        "smoke.sh",
    ]
    for path in SCRIPTS:
        assert os.access(path, os.X_OK)
        lines = path.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ") and len(lines) < 60


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    found = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", path], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_examples_in_the_scripts_compose():
    """Every command in their comments: its keys exist, and what it says of a run can be planned."""
    text = "\n".join(path.read_text() for path in SCRIPTS)
    commands = re.findall(
        r"^#\s+(?:[A-Z]+=\S+ )*(?:sbatch .*?)?launch/(\w+)\.\w+ (.*?)(?: {2,}.*)?$", text, re.M
    )
    assert {name for name, _ in commands} == {path.stem for path in SCRIPTS}
    for name, text in commands:
        given = [
            word
            for word in text.split()
            if re.match(r"[a-z_.]+=\w", word) and not word.startswith(("hydra.", "print_only"))
        ]
        grid = ["experiment=functional_sam_c4"] if name in GRIDS else []
        processes = ["plan_only=true", "parallel.processes=8"] if "parallel=fsdp" in given else []
        assert make_plan(compose([*grid, *given, *processes])).schedule.steps > 0


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_prints_the_runs_it_would_start(tmp_path, name):
    """Every method at every radius, but AdamW once: it has none."""
    done = script(
        f"{name}.sh",
        "print_only=true",
        cwd=tmp_path,
        LAUNCHER="local",
        SIZES="nanodo_118m",
        RADII="0.05,0.1",
        SEEDS="0",
    )
    assert done.returncode == 0, done.stderr
    runs = re.findall(r"^new +[\d.e+-]+ +(nanodo_118m-(\w+)-\S+)", done.stdout, re.M)
    perturbed = ("sam", "functional_sam", "preconditioned_sam", "preconditioned_functional_sam")
    assert [method for _, method in runs] == [
        "adamw",
        *(method for method in perturbed for _radius in range(2)),
    ]
    horizon = {"fixed_length": "10000steps", "chinchilla": "20tpp"}[name]
    assert all(f"-c4-{horizon}-s0-" in run for run, _ in runs)
    assert f"runs/{name}" in done.stdout
    assert os.listdir(tmp_path) in ([], ["runs"])


@pytest.mark.parametrize("name", GRIDS)
def test_defaults_of_a_grid_are_those_of_the_paper(name):
    text = (ROOT / f"launch/{name}.sh").read_text()
    defaults = dict(re.findall(r"\$\{(\w+):-([\w.,]+)\}", text))
    sizes = [
        make_plan(compose(["experiment=functional_sam_c4", f"model={size}"]))
        for size in defaults["SIZES"].split(",")
    ]
    assert [plan.num_non_embedding / 1e6 for plan in sizes] == pytest.approx(
        [23.9, 42.5, 117.9, 1208.0], rel=0.003
    )
    assert {(plan.tokens_per_step, plan.model.vocab_size) for plan in sizes} == {(256 * 512, 32768)}
    assert defaults["METHODS"].split(",")[0] == "adamw" and len(defaults["METHODS"].split(",")) == 5
    assert all(float(radius) > 0 for radius in defaults["RADII"].split(","))
    assert defaults["SEEDS"] == "0,1,2"


def test_setting_of_the_paper():
    settings = compose(["experiment=functional_sam_c4", "optim=functional_sam"])
    optim, schedule = settings.optim, settings.schedule
    assert (optim.name, optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (
        "functional_sam",
        0.9,
        0.98,
        1e-9,
        0.1,
    )
    assert (schedule.warmup_steps, schedule.start, schedule.final, schedule.shape) == (
        1000,
        0.1,
        0.1,
        "cosine",
    )


def test_one_node_trains_on_two_processes(tmp_path, tiny):
    done = script(
        "one_node.sh",
        *tiny,
        "parallel=fsdp",
        "schedule.steps=3",
        "dir=run",
        cwd=tmp_path,
        PROCESSES="2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 x cpu" in done.stdout
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


def test_smoke_test_ends_in_a_table(tmp_path, tiny):
    """Of the methods by their loss, with the time of a step beside AdamW's."""
    done = script(
        "smoke.sh", *tiny, "schedule.steps=3", cwd=tmp_path, METHODS="adamw,sam", FOLDER="mine"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head, *lines = done.stdout.rstrip().split("\n\n")[-1].splitlines()
    assert head.split() == ["method", "val", "loss", "step", "time", "GPU", "memory"]
    table = {method: (float(loss), time) for method, loss, time, _memory in map(str.split, lines)}
    runs = {
        path.parent.name.split("-")[1]: json.loads(path.read_text())
        for path in (tmp_path / "mine").glob("*/summary.json")
    }
    assert {method: loss for method, (loss, _) in table.items()} == {
        method: round(run["val/loss"], 4) for method, run in runs.items()
    }
    assert list(table.values()) == sorted(table.values()) and len(table) == 2
    assert table["adamw"][1] == "1.00x" and {run["step"] for run in runs.values()} == {3}
