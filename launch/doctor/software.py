"""The versions of Python and of the packages that the project asks for."""

import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launch.doctor.finding import Finding

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# What each extra of pyproject.toml is needed for.
EXTRAS = {
    "hf": "init.hf, exports and their checks",
    "slurm": "hydra/launcher=slurm",
    "report": "launch.report",
}


def software() -> Iterator[Finding]:
    """Yields the findings on Python, the required packages and the extras."""
    yield python(sys.version_info[:3])
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    yield packages(project["dependencies"])
    for extra, purpose in EXTRAS.items():
        missing, wrong = compare(project["optional-dependencies"][extra])
        if missing or wrong:
            yield Finding(
                "note",
                f"extra {extra}",
                f"{', '.join(missing + wrong)}: {purpose} cannot work",
                f"pip install -c constraints.txt -e '.[{extra}]'",
            )


def python(version: tuple[int, ...]) -> Finding:
    """Returns the finding on a version of Python."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("failed", "python", text, "3.11 or newer is needed: make PYTHON=python3.11")
    if version >= (3, 14):
        return Finding("note", "python", f"{text} is untried; 3.11 to 3.13 are tried")
    return Finding("ok", "python", text)


def packages(requirements: list[str]) -> Finding:
    """Returns the finding on the packages that every run needs."""
    missing, wrong = compare(requirements)
    if missing or wrong:
        return Finding(
            "failed",
            "packages",
            ", ".join([*(f"{name} is missing" for name in missing), *wrong]),
            "make .venv installs what constraints.txt pins",
        )
    shown = ("torch", "numpy", "datasets", "tiktoken", "wandb", "hydra-core")
    return Finding("ok", "packages", ", ".join(f"{n} {metadata.version(n)}" for n in shown))


def compare(requirements: list[str]) -> tuple[list[str], list[str]]:
    """Returns the packages of a list of requirements that are missing, and those of another
    version, each with what it is and what is asked for."""
    # packaging comes with hydra-core, which a bare machine may lack.
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return ["packaging"], []
    missing, wrong = [], []
    for requirement in map(Requirement, requirements):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    return missing, wrong
