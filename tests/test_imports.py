"""What is imported when, and which way imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "wandb",
    "datasets",
    "pyarrow",
    "pandas",
    "transformers",
    "peft",
    "tokenizers",
    "matplotlib",
    "submitit",
)
# Who may import whom. The commands of data and model read their options through launch.config,
# inside `main`.
ALLOWED = {
    "conf": {"conf"},
    "data": {"conf", "data"},
    "model": {"conf", "data", "model"},
    "optim": {"conf", "data", "model", "optim"},
    "launch": {"conf", "data", "model", "optim", "launch"},
}


def test_a_plain_run_imports_nothing_that_it_does_not_use(tmp_path, cache):
    """Each of these costs up to seconds of every start."""
    overrides = [
        "model=tiny",
        "schedule.steps=1",
        "batch.sequences=1",
        "evaluation.tokens=256",
        f"dir={tmp_path}/run",
        f"data.cache={cache}",
        "tracking=none",
    ]
    script = f"""
import sys
import train
from launch import config
sys.argv[1:] = {overrides}
try:
    config.main(train.main)
finally:
    print("imported", [name for name in {HEAVY} if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "imported []", found.stdout[-500:] + found.stderr[-500:]


def top_level_imports(path: Path) -> set[str]:
    """First parts of what a module imports outside its functions."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    for path in files:
        commands = {"launch"} if path.name in ("prepare.py", "export.py", "sample.py") else set()
        imported = top_level_imports(path)
        assert imported & {*ALLOWED, "train"} <= ALLOWED[package] | commands, path
        if package != "launch":
            assert not imported & {"hydra", "wandb"}, path


def test_the_packages_ship_their_configuration():
    """Packages are listed by hand in pyproject.toml, so a new one can be forgotten."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    with_code = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert set(settings["packages"]) == with_code
    shipped = {
        path
        for pattern in settings["package-data"]["conf"]
        for path in (ROOT / "conf").glob(pattern)
    }
    assert shipped == set((ROOT / "conf").rglob("*.yaml"))
