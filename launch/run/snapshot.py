"""What ran and where: the code of a run, and the environment of each of its starts, in `<run
folder>/code/`."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from data.files import read_json, write_atomically

ROOT = Path(__file__).resolve().parents[2]  # the repository
FOLDERS = ("conf", "data", "launch", "model", "optim")
PACKAGES = (
    "torch",
    "numpy",
    "datasets",
    "tiktoken",
    "tokenizers",
    "safetensors",
    "hydra-core",
    "omegaconf",
    "wandb",
    "transformers",
    "peft",
)
# prefixes; the environment at large holds keys
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "SLURM_",
)
SECRETS = ("JWT", "KEY", "TOKEN", "SECRET", "PASSWORD")  # SLURM_JWT is one


def snapshot_code(dir: Path, root: Path = ROOT) -> None:
    """Adds to `<dir>/code/` what this start of a run is made of; called on every start.

    start_<n>/          the code of the n-th start, unless an earlier one had the same:
        revision.txt    git revision, or "not a git checkout"
        diff.patch      what the working tree has beyond it, with untracked .py files and configs;
                        `git apply` restores it
    environment.json    a list with an entry per start: the folder of its code, revision, versions,
                        devices, scheduler, command line, time

    Where git cannot tell, the .py and .yaml files themselves are copied instead of the patch. A
    problem is one line on stderr: it never stops a run."""
    code = dir / "code"
    try:
        code.mkdir(parents=True, exist_ok=True)
        # The code: revision and patch, or the files themselves.
        try:
            revision, patch = _ask_git(root)
            files = {"diff.patch": patch}
        except (OSError, subprocess.SubprocessError):
            revision, files = "not a git checkout", _sources(root)
        # The start: what it ran on, and which of the folders has its code.
        environments = code / "environment.json"
        starts = read_json(environments, list[dict[str, Any]], absent=[])
        folder = _keep(
            code, f"start_{len(starts) + 1}", files | {"revision.txt": f"{revision}\n".encode()}
        )
        entry = {"code": folder, "revision": revision, **_environment()}
        write_atomically(environments, json.dumps([*starts, entry], indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"the snapshot in {code} is incomplete: {error}", file=sys.stderr)


def _ask_git(root: Path) -> tuple[str, bytes]:
    """Returns (revision, patch of the working tree against it)."""
    # Jobs of a sweep ask at the same time: none may lock or rewrite the index.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str, input: bytes | None = None) -> bytes:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, input=input, env=environment, capture_output=True, check=True, timeout=10
        ).stdout

    revision, top, index = (
        git("rev-parse", "HEAD", "--show-toplevel", "--git-path", "index").decode().splitlines()
    )
    if Path(top) != root.resolve():
        raise FileNotFoundError(f"{root} lies in the git checkout of something else, {top}")
    untracked = git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "conf/*.yaml")
    with tempfile.TemporaryDirectory() as folder:
        if untracked:  # announced in a copy of the index, so that the diff below shows them
            environment["GIT_INDEX_FILE"] = shutil.copy(root / index, folder)
            git(
                "add",
                "--intent-to-add",
                "--pathspec-from-file=-",
                "--pathspec-file-nul",
                input=untracked,
            )
        # Spelled out against settings of the user that `git apply` would not understand.
        options = "--binary --no-color --no-ext-diff --no-textconv --src-prefix=a/ --dst-prefix=b/"
        patch = git("diff", "HEAD", *options.split())
    return revision, patch


def _sources(root: Path) -> dict[str, bytes]:
    """Returns the content of every source, by its path in the repository."""
    sources = [
        path
        for folder in FOLDERS
        for pattern in ("*.py", "*.yaml")
        for path in (root / folder).rglob(pattern)
    ]
    return _read([root / "train.py", *sources], root)


def _read(paths: Iterable[Path], root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}


def _keep(code: Path, name: str, files: dict[str, bytes]) -> str:
    """Writes files into a new folder of this name unless another one holds just them; returns the
    folder's name."""
    # Most starts of a run have the same code, which is kept once.
    for folder in sorted(code.glob("start_*")):
        if _read(folder.rglob("*"), folder) == files:
            return folder.name
    for path, content in files.items():
        target = code / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return name


def _environment() -> dict[str, Any]:
    # late: a task of a sweep on Slurm imports this module, and starts a process that needs torch
    import torch

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "devices": [
            torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())
        ],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not any(word in name for word in SECRETS)
        },
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
