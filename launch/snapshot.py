"""What ran and where: the code of a run, and the environment of each of its starts, in `<run folder>/code/`."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent  # the repository
FOLDERS = ("conf", "data", "launch", "model", "optim")
PACKAGES = ("torch", "numpy", "datasets", "tiktoken", "tokenizers", "safetensors", "hydra-core", "omegaconf", "wandb",
            "transformers", "peft")  # fmt: skip
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_")  # prefixes; the environment at large holds keys
SECRETS = ("JWT", "KEY", "TOKEN", "SECRET", "PASSWORD")  # SLURM_JWT is one


def snapshot_code(dir: Path, root: Path = ROOT) -> None:
    """Writes `<dir>/code/`; called on every start of a run.

    revision.txt        git revision, or "not a git checkout"
    diff.patch          what the working tree has beyond it, with untracked .py files and configs; `git apply` restores it
    environment.json    a list with an entry per start: revision, versions, devices, scheduler, command line, time

    Where git cannot tell, the .py and .yaml files themselves are copied instead of the patch. A problem is one line
    on stderr: it never stops a run.
    """
    code = dir / "code"
    try:
        code.mkdir(parents=True, exist_ok=True)
        try:
            revision, patch = _ask_git(root)
        except (OSError, subprocess.SubprocessError):
            revision = "not a git checkout"
            _copy_sources(root, code)
        else:
            (code / "diff.patch").write_bytes(patch)
        (code / "revision.txt").write_text(revision + "\n")
        _append(code / "environment.json", {"revision": revision, **_environment()})
    except (OSError, ValueError) as error:
        print(f"the snapshot in {code} is incomplete: {error}", file=sys.stderr)


def _ask_git(root: Path) -> tuple[str, bytes]:
    """(revision, patch of the working tree against it)."""
    # Jobs of a sweep ask at the same time: none may lock or rewrite the index.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str, input: bytes | None = None) -> bytes:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, input=input, env=environment, capture_output=True, check=True, timeout=10).stdout

    revision, top, index = git("rev-parse", "HEAD", "--show-toplevel", "--git-path", "index").decode().splitlines()
    if Path(top) != root.resolve():
        raise FileNotFoundError(f"{root} lies in the git checkout of something else, {top}")
    untracked = git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "conf/*.yaml")
    with tempfile.TemporaryDirectory() as folder:
        if untracked:  # announced in a copy of the index, so that the diff below shows them
            environment["GIT_INDEX_FILE"] = shutil.copy(root / index, folder)
            git("add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul", input=untracked)
        # Spelled out against settings of the user that `git apply` would not understand.
        options = "--binary --no-color --no-ext-diff --no-textconv --src-prefix=a/ --dst-prefix=b/"
        patch = git("diff", "HEAD", *options.split())
    return revision, patch


def _copy_sources(root: Path, code: Path) -> None:
    sources = [path for folder in FOLDERS for pattern in ("*.py", "*.yaml") for path in (root / folder).rglob(pattern)]
    for source in [root / "train.py", *sources]:
        target = code / source.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _append(path: Path, entry: dict[str, Any]) -> None:
    starts = json.loads(path.read_text()) if path.exists() else []
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([*starts, entry], indent=1) + "\n")
    temporary.replace(path)


def _environment() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "devices": [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: value for name, value in sorted(os.environ.items())
                      if name.startswith(VARIABLES) and not any(word in name for word in SECRETS)},
    }  # fmt: skip


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
