"""The pages on W&B: what they plot is what runs log, and they reach W&B or a file."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train as training
from conf.keys import KEYS
from launch import dashboard
from launch.config import compose
from launch.report.meanings import MEANINGS
from tests.runs import ROOT, rows
from tests.wandb_server import Server

CUDA_ONLY = {"perf/mfu", "perf/memory_gib"}
pytestmark = pytest.mark.usefixtures("no_wandb_account")
TITLES = ["Validation loss", "Radius and learning rate", "Stability", "Sharpness", "Throughput"]


def ask(folder: Path, *arguments: str, **environment: str) -> str:
    """Returns what `python -m launch.dashboard` prints."""
    command = [sys.executable, "-m", "launch.dashboard", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def values(found: Any, name: str) -> list[Any]:
    """Returns everything under a key, however deep."""
    if isinstance(found, list):
        return [value for entry in found for value in values(entry, name)]
    if not isinstance(found, dict):
        return []
    return [
        value
        for key, entry in found.items()
        for value in ([entry] if key == name else values(entry, name))
    ]


def plotted(specification: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Returns (figures of rows and summaries, keys of the configuration) that the panels show."""
    panels = values(specification, "config")
    names = {metric for metrics in values(panels, "metrics") for metric in metrics}
    names |= {name for axis in ("xAxis", "yAxis", "accessor") for name in values(panels, axis)}
    keys = {
        name.removeprefix("config:").replace(".value", "")
        for name in names
        if ".value" in name or name.startswith("config:")
    }
    figures = {
        name.removeprefix("summary:")
        for name in names
        if ".value" not in name and not name.startswith("config:")
    }
    return figures, {key.removesuffix(".value") for key in keys}


def test_panels_show_what_runs_log(tmp_path, tiny):
    overrides = [
        f"dir={tmp_path}/run",
        "optim=sam",
        "schedule.steps=2",
        "optim.diagnostics_every=1",
        "precision=fp32",
    ]
    assert training.main(compose([*tiny, *overrides])) == 0
    logged = {
        name for row in rows(tmp_path / "run") for name, value in row.items() if value is not None
    }
    logged |= {
        name for line in (tmp_path / "run/metrics.jsonl").open() for name in json.loads(line)
    }
    assert {
        name for name in logged if name.startswith("sharpness/")
    } < MEANINGS.keys()  # so has the report a caption for each
    logged |= json.loads((tmp_path / "run/summary.json").read_text()).keys()
    specification = dashboard.specification(*dashboard.build("me", "p"))
    for page in ("workspace", "report"):
        figures, keys = plotted(specification[page])
        assert figures - CUDA_ONLY <= logged, figures - CUDA_ONLY - logged
        assert keys <= KEYS.keys()
        assert {
            "val/loss",
            "val/loss_at_equal_flops",
            "step",
            "flops",
            "tokens",
            "seconds",
            "perf/tokens_per_second",
        } <= figures
        assert {"model.name", "optim.name", "optim.rho", "optim.lr"} <= keys
    headings = [
        block for block in specification["report"]["spec"]["blocks"] if block["type"] == "heading"
    ]
    assert [block["children"][0]["text"] for block in headings] == TITLES
    assert [
        section["name"] for section in values(specification["workspace"], "sections")[0]
    ] == TITLES


def test_panels_of_a_report_lie_two_in_a_row():
    report = dashboard.specification(*dashboard.build("me", "p"))["report"]
    for block in (block for block in report["spec"]["blocks"] if block["type"] == "panel-grid"):
        places = [(layout["x"], layout["y"]) for layout in values(block, "layout")]
        assert len(set(places)) == len(places) > 2
        assert all(x in (0, 12) and y % 8 == 0 for x, y in places)


def test_a_report_and_a_workspace_reach_the_server(tmp_path):
    """In both, runs that differ by more than their seeds are groups of their own in every table,
    and no panel groups them otherwise."""
    setting = [
        {"section": "config", "name": name}
        for name in ("model.value.name", "optim.value.name", "optim.value.lr", "optim.value.rho")
    ]
    with Server() as server:
        output = ask(tmp_path, "project=mine", **server.environment)
    report, workspace = server.views
    assert server.projects == ["mine"]
    assert (report["type"], workspace["type"]) == ("runs", "project-view")
    for view, page in ((report, "report"), (workspace, "workspace")):
        assert (view["entityName"], view["projectName"], view["displayName"]) == (
            "local",
            "mine",
            dashboard.NAME,
        )
        expected = dashboard.specification(*dashboard.build("local", "mine"))[page]
        stored = json.loads(view["spec"])
        assert plotted(stored) == plotted(expected)
        assert values(stored, "grouping") == [setting] * (len(TITLES) if page == "report" else 1)
        assert values(stored, "groupBy") == [] and not any(values(stored, "aggregate"))
        assert all(values(stored, "useRunsTableGroupingInPanels"))
    assert [line.split(": ")[0] for line in output.splitlines()] == ["report", "workspace"]
    assert f"{server.url}/local/mine" in output
    assert os.listdir(tmp_path) == []


class Refusing(Server):
    """A server that lets nobody list projects."""

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        return {} if operation == "GetProjects" else super().answer(operation, asked)


def test_what_the_server_refuses_goes_into_a_file(tmp_path):
    with Refusing() as server:
        output = ask(tmp_path, "entity=me", "project=p", "out=pages.json", **server.environment)
    assert (
        output.startswith("W&B: ")
        and output.endswith("; pages.json holds what would be created\n")
        and output.count("\n") == 1
    )
    written = json.loads((tmp_path / "pages.json").read_text())
    assert (written["workspace"]["entity"], written["report"]["project"]["name"]) == ("me", "p")
    assert server.views == []


def test_without_a_key_or_offline_nobody_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        dashboard.main(["offline=false"])
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        dashboard.main(["offline=true", "project=p", "out=other.json"])
    assert server.asked == []
    assert (
        capsys.readouterr().out
        == "W&B: no key found (`wandb login` stores one); dashboard.json holds what would be"
        " created\n"
        "W&B: offline; other.json holds what would be created\n"
    )
    default, other = (
        json.loads((tmp_path / name).read_text()) for name in ("dashboard.json", "other.json")
    )
    assert (default["workspace"]["project"], other["workspace"]["project"]) == ("flatgpt", "p")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out in (".", "nowhere/pages.json", "/proc/pages.json"):
        with pytest.raises(SystemExit) as stopped:
            dashboard.main(["offline=true", f"out={out}"])
        error = capsys.readouterr().err
        assert (
            stopped.value.code == 2
            and error.startswith(f"error: out={out} cannot be written")
            and error.count("\n") == 1
        )
    assert list(tmp_path.iterdir()) == []


def test_missing_library_and_wrong_option_are_one_line(monkeypatch, capsys):
    imported = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("wandb_workspaces"):
            raise ImportError(name)
        return imported(name, *arguments)

    for argument, expected in (
        ("projekt=p", "did you mean project=?"),
        ("project=p", "pip install -e '.[report]'"),
    ):
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(SystemExit) as stopped:
            dashboard.main([argument])
        monkeypatch.undo()
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and error.count("\n") == 1
