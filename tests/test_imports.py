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
# Imports point one way: a package imports itself and those before it. The commands of data and
# model open runs, and import launch for that inside `main`.
PACKAGES = ("conf", "data", "model", "optim", "launch")
# The same of the rooms of launch/. Its commands come last.
ROOMS = ("config", "plan", "run", "track", "checkpoint", "sweep", "report", "doctor")


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


def imported_modules(path: Path) -> set[str]:
    """Returns the modules that a file imports outside its functions, by their dotted names."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    later = {*PACKAGES[PACKAGES.index(package) + 1 :], "train"}
    for path in files:
        imported = {name.partition(".")[0] for name in imported_modules(path)}
        assert not imported & later, path
        if package not in ("conf", "launch"):
            assert "hydra" not in imported, path
        if package != "launch":
            assert "wandb" not in imported, path


@pytest.mark.parametrize("room", ROOMS)
def test_imports_of_the_rooms_of_launch_point_one_way(room):
    files = sorted((ROOT / "launch" / room).rglob("*.py"))
    assert files
    for path in files:
        imported = [name.split(".") for name in imported_modules(path)]
        rooms = {name[1] for name in imported if name[0] == "launch" and len(name) > 1}
        assert rooms <= {*ROOMS[: ROOMS.index(room) + 1]}, path


def test_the_packages_ship_their_configuration():
    """Packages are listed by hand in pyproject.toml, so a new one can be forgotten."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    with_code = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert set(settings["packages"]) == with_code
    shipped = {
        path
        for pattern in settings["package-data"]["conf"]
        for path in (ROOT / "conf").glob(pattern)
    }
    assert shipped == set((ROOT / "conf").rglob("*.yaml"))
