"""The snapshot in a run folder is enough to rebuild the code that ran, holds no secrets, and never
stops a run."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch.run.snapshot import PACKAGES, ROOT, snapshot_code


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path):
    """A small repository with one commit."""
    root = tmp_path / "repository"
    (root / "conf").mkdir(parents=True)
    (root / "train.py").write_text("print(1)\n")
    (root / "conf" / "config.yaml").write_text("a: 1\n")
    (root / ".gitignore").write_text("ignored.py\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def test_revision_and_patch_rebuild_the_code(checkout, tmp_path):
    (checkout / "train.py").write_text("print(2)\n")
    (checkout / "method.py").write_text("new = True\n")
    (checkout / "conf" / "new method.yaml").write_text("b: 2\n")
    (checkout / "ignored.py").write_text("secret = 1\n")
    (checkout / "notes.txt").write_text("not code\n")
    # a setting of the user's that `git apply` does not expect
    git(checkout, "config", "diff.noprefix", "true")
    before = git(checkout, "status", "--porcelain")
    snapshot_code(tmp_path / "run", checkout)
    assert git(checkout, "status", "--porcelain") == before  # the index is as it was

    code = tmp_path / "run" / "code" / "start_1"
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(checkout), str(clone))
    git(clone, "checkout", "--quiet", (code / "revision.txt").read_text().strip())
    git(clone, "apply", str(code / "diff.patch"))
    for name in ("train.py", "method.py", "conf/new method.yaml", "conf/config.yaml"):
        assert (clone / name).read_text() == (checkout / name).read_text()
    assert not (clone / "ignored.py").exists()
    assert not (clone / "notes.txt").exists()


def test_clean_checkout_has_an_empty_patch(checkout, tmp_path):
    snapshot_code(tmp_path / "run", checkout)
    assert (tmp_path / "run/code/start_1/diff.patch").read_bytes() == b""
    assert (tmp_path / "run/code/start_1/revision.txt").read_text() == git(
        checkout, "rev-parse", "HEAD"
    )


@pytest.mark.parametrize("checked_out", [True, False])
def test_each_start_keeps_the_code_that_it_ran(checked_out, checkout, tmp_path):
    """The second start finds the first one's code, the third other code, the fourth the first one's
    again."""
    code = tmp_path / "run" / "code"
    if not checked_out:
        (checkout / ".git").rename(tmp_path / "git")
    for text in ("print(1)\n", "print(1)\n", "print(3)\n", "print(1)\n"):
        (checkout / "train.py").write_text(text)
        snapshot_code(tmp_path / "run", checkout)
    assert [start["code"] for start in json.loads((code / "environment.json").read_text())] == [
        "start_1",
        "start_1",
        "start_3",
        "start_1",
    ]
    assert {path.name for path in code.iterdir()} == {"environment.json", "start_1", "start_3"}
    kept = [
        (code / f"start_{number}" / ("diff.patch" if checked_out else "train.py")).read_text()
        for number in (1, 3)
    ]
    assert ("print(3)" in kept[0], "print(3)" in kept[1]) == (False, True)


@pytest.mark.parametrize("reason", ["no checkout", "checkout of something else", "no git"])
def test_sources_are_copied_where_git_cannot_tell(reason, checkout, tmp_path, monkeypatch):
    root = checkout
    if reason == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        root = (checkout if reason == "checkout of something else" else tmp_path) / "copy"
        (root / "conf").mkdir(parents=True)
        (root / "train.py").write_text("print(1)\n")
        (root / "conf/config.yaml").write_text("a: 1\n")
    snapshot_code(tmp_path / "run", root)
    code = tmp_path / "run" / "code" / "start_1"
    assert (code / "revision.txt").read_text() == "not a git checkout\n"
    assert (code / "train.py").read_text() == "print(1)\n"
    assert (code / "conf/config.yaml").read_text() == "a: 1\n"
    assert not (code / "diff.patch").exists()


def test_copy_of_this_repository_holds_its_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    snapshot_code(tmp_path)
    for name in ("train.py", "launch/run/snapshot.py", "conf/schema.py", "conf/config.yaml"):
        assert (tmp_path / "code/start_1" / name).read_bytes() == (ROOT / name).read_bytes()


def test_each_start_adds_its_environment_without_secrets(checkout, tmp_path, monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "17",
        "SLURM_JWT": "hush",
        "WANDB_API_KEY": "hush",
        "OMP_NUM_THREADS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    snapshot_code(tmp_path / "run", checkout)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    snapshot_code(tmp_path / "run", checkout)
    text = (tmp_path / "run/code/environment.json").read_text()
    starts = json.loads(text)
    assert [start["variables"]["SLURM_JOB_ID"] for start in starts] == ["17", "18"]
    assert starts[0]["variables"]["OMP_NUM_THREADS"] == "3"
    assert "hush" not in text
    assert starts[0]["packages"].keys() == set(PACKAGES)
    assert starts[0]["packages"]["torch"]
    assert starts[0]["cpu_count"] == os.cpu_count()


def test_problems_are_one_line_and_no_error(checkout, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    snapshot_code(tmp_path / "file", checkout)
    (tmp_path / "run/code").mkdir(parents=True)
    (tmp_path / "run/code/environment.json").write_text('[{"cut": ')
    snapshot_code(tmp_path / "run", checkout)
    assert capsys.readouterr().err.count("snapshot") == 2
