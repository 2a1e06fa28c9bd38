"""A checkpoint is there whole or not at all, what is damaged is known to be, and nothing that is
read can run code."""

import ast
import json
import os
import pickle
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from data.tokenizer import bytes_tokenizer
from launch.checkpoint import step_folder
from launch.checkpoint.step_folder import save, use_newest
from launch.run.folder import remove_partial_checkpoints
from model import checkpoint_path
from model.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    Part,
    checkpoints,
    checksum,
    describe,
    open_checkpoint,
    open_tensors,
    save_parts,
)
from tests.runs import ROOT, assert_same_tensors, content

FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "tokenizer.json",
    "state.json",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Those of a run after some steps; its rule remembers nothing."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(6, 4, generator=generator)
    return {
        "model": {"weight": weight.T, "norm": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"weight.exp_avg": weight * 0.1, "weight.step": torch.tensor(float(step))},
        "random": {"cpu": generator.get_state()},
        "rule": {},
    }


def as_it_is(found: Checkpoint) -> Checkpoint:
    return found


def saved(run: Path, *at: int, keep: int = 9, milestones: tuple[int, ...] = ()) -> Path:
    for step in at:
        parts = {
            file: {
                name: Part(value.contiguous(), (0,) * value.ndim) for name, value in group.items()
            }
            for file, group in tensors(step).items()
        }
        path = save(
            run,
            parts,
            {"step": step, "loss": 1 / 3, "nan": float("nan")},
            bytes_tokenizer(),
            keep,
            list(milestones),
        )
    return path


def kept(run: Path) -> list[int]:
    return list(checkpoints(run))


def assert_is(found: Checkpoint | None, step: int) -> None:
    assert found and found.step == found.state["step"] == step
    assert found.state["loss"] == 1 / 3 and found.state["nan"] != found.state["nan"]
    for name, group in tensors(step).items():
        assert_same_tensors(
            {key: stored[...] for key, stored in found.tensors[name].items()}, group
        )


def flip(file: Path, position: int | None = None) -> None:
    """Changes one bit, in the middle if nothing is said."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "flipped in the head": lambda file: flip(file, 9),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


# Written and read


def test_what_is_saved_is_loaded(tmp_path):
    path = saved(tmp_path, 7)
    assert path == tmp_path / "checkpoints/step_00000007"
    assert_is(open_checkpoint(path), 7)
    assert_is(use_newest(tmp_path, as_it_is), 7)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)


def test_no_checkpoint_is_none(tmp_path):
    assert use_newest(tmp_path, as_it_is) is None


def test_newest_and_milestones_are_kept(tmp_path):
    saved(tmp_path, 0, 4, 8, 10, 12, 16, 20, keep=2, milestones=(0, 10, 99))
    assert kept(tmp_path) == [0, 10, 16, 20]
    saved(tmp_path, 24, keep=1, milestones=())  # keys that may change on resume
    assert kept(tmp_path) == [24]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_ones_push_nothing_out(tmp_path, keep):
    """A run that goes on from step 8, since 12 and 16 are damaged, must not be left with those
    two."""
    saved(tmp_path, 8, 12, 16)
    for step in (12, 16):
        flip(tmp_path / f"checkpoints/step_{step:08d}/model.safetensors")
    saved(tmp_path, 9, 10, keep=keep)
    assert_is(use_newest(tmp_path, as_it_is, warn=lambda _: None), 10)
    saved(tmp_path, 12, keep=keep)
    assert_is(use_newest(tmp_path, as_it_is, warn=lambda _: None), 12)
    saved(tmp_path, 16, 20, keep=keep)
    assert kept(tmp_path) == [16, 20][-keep:]


# Crashes


class Crash(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


# functions in C that change a disk, or begin to
CHANGES = {
    "serialize_file",
    "open",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "rmdir",
}


def crash_at(call: int | None, log: list[str]):
    """A profile function that raises instead of letting the given call happen."""

    def profile(frame, event, function):
        if event == "c_call" and function.__name__ in CHANGES:
            if len(log) == call:
                sys.setprofile(None)
                raise Crash
            log.append(function.__name__)

    return profile


def crashed_save(run: Path, call: int | None, step: int, keep: int) -> list[str]:
    """Saves until the given call; returns the names of those before it."""
    log: list[str] = []
    sys.setprofile(crash_at(call, log))
    try:
        saved(run, step, keep=keep)
    except Crash:
        pass
    finally:
        sys.setprofile(None)
    return log


@pytest.mark.parametrize("keep", [1, 2])
def test_crash_anywhere_in_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, keep):
    template = tmp_path / "template"
    saved(template, 4, 8, keep=keep)
    shutil.copytree(template, tmp_path / "whole")
    calls = crashed_save(tmp_path / "whole", None, 12, keep)
    assert set(calls) == CHANGES
    outcomes = []
    for call in range(len(calls)):
        run = tmp_path / f"crash{call}"
        shutil.copytree(template, run)
        assert crashed_save(run, call, 12, keep) == calls[:call]
        found = use_newest(run, as_it_is, warn=pytest.fail)  # the newest is never a damaged one
        assert found
        assert_is(found, found.step)
        outcomes.append(found.step)
        remove_partial_checkpoints(run)
        assert kept(run)[-1] == found.step
        saved(run, 12, 16, keep=keep)
        assert kept(run) == [12, 16][-keep:]
    assert set(outcomes) == {8, 12} and outcomes == sorted(outcomes)


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        step_folder,
        "fsync",
        lambda path: synced.append((path.name, (tmp_path / "checkpoints/step_00000007").exists())),
    )
    saved(tmp_path, 7)
    assert set(synced) >= {(name, False) for name in [*FILES, ".step_00000007.partial"]}
    assert synced[-1] == ("checkpoints", True)


def test_what_else_lies_among_them_is_no_checkpoint(tmp_path):
    saved(tmp_path, 4)
    shutil.copytree(
        tmp_path / "checkpoints/step_00000004", tmp_path / "checkpoints/step_00000008.bak"
    )
    assert kept(tmp_path) == [4] and checkpoint_path(tmp_path).name == "step_00000004"


def test_partial_ones_are_ignored_and_removed(tmp_path):
    saved(tmp_path, 4)
    shutil.copytree(
        tmp_path / "checkpoints/step_00000004", tmp_path / "checkpoints/.step_00000008.partial"
    )
    assert_is(use_newest(tmp_path, as_it_is), 4)
    remove_partial_checkpoints(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    remove_partial_checkpoints(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("writer", ["save_parts", "write_json"])
def test_refusing_disk_is_an_oserror_and_leaves_the_others(tmp_path, monkeypatch, error, writer):
    saved(tmp_path, 4, 8)
    before = content(tmp_path)

    def refuse(path, content):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(step_folder, writer, refuse)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 12, keep=1)
    assert content(tmp_path) == before


# Damage


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_known_and_the_one_before_is_used(tmp_path, name, damage):
    newest = saved(tmp_path, 4, 8)
    DAMAGES[damage](newest / name)
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(newest)
    said: list[str] = []
    assert_is(use_newest(tmp_path, as_it_is, warn=said.append), 4)
    assert (
        len(said) == 1
        and f"checkpoint {newest} is damaged" in said[0]
        and "trying the one before it" in said[0]
    )


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "7", '"x"', "{}", '{"checksum": 1}', "\0\0\0\0", "\ud800"]
)
def test_state_that_is_none_is_damage(tmp_path, text):
    newest = saved(tmp_path, 4, 8)
    (newest / "state.json").write_text(text, errors="surrogatepass")
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(newest)


def test_every_value_of_the_state_counts(tmp_path):
    newest = saved(tmp_path, 8)
    state = json.loads((newest / "state.json").read_text())
    for key, value in {"step": 9, "loss": 1 / 3 + 1e-16, "extra": 1, "files": {}}.items():
        (newest / "state.json").write_text(json.dumps(state | {key: value}))
        with pytest.raises(DamagedCheckpoint, match=r"state\.json does not match its checksum"):
            open_checkpoint(newest)
    (newest / "state.json").write_text(json.dumps(state))
    assert_is(open_checkpoint(newest), 8)


def test_all_damaged_is_one_error_and_removes_nothing(tmp_path):
    for step in (4, 8):
        flip(saved(tmp_path, step) / "model.safetensors")
    before, said = content(tmp_path), []
    with pytest.raises(
        ValueError,
        match=f"dir={tmp_path}: all 2 checkpoints are damaged; move the folder away to start again",
    ):
        use_newest(tmp_path, as_it_is, warn=said.append)
    assert len(said) == 2
    assert content(tmp_path) == before


# No code


class Bomb:
    """Leaves a marker where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_file_that_was_not_saved_is_not_read(tmp_path):
    path = saved(tmp_path, 4)
    (path / "rule.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    assert_is(open_checkpoint(path), 4)
    assert not (tmp_path / "marker").exists()


def test_a_tensor_whose_parts_are_not_all_there_is_damage(tmp_path):
    """What a file too few would leave in the gap are the numbers of unwritten memory."""
    whole = torch.arange(24.0).view(6, 4)
    files = [tmp_path / "first.safetensors", tmp_path / "last.safetensors"]
    save_parts(files[0], {"w": Part(whole[:2], (0, 0))})
    save_parts(files[1], {"w": Part(whole[4:], (4, 0))})
    stored = open_tensors(files)["w"]
    assert stored.shape == whole.shape
    assert torch.equal(stored[slice(4, 6), slice(1, 3)], whole[4:6, 1:3])
    for region in (..., (slice(1, 3), slice(0, 4))):
        with pytest.raises(DamagedCheckpoint, match="the parts of w are not all there"):
            stored[region]


@pytest.mark.parametrize(
    "make",
    [
        lambda bomb, file: file.write_bytes(pickle.dumps(bomb)),
        lambda bomb, file: torch.save({"weight": bomb}, file),
    ],
)
def test_pickle_with_a_right_checksum_is_damage(tmp_path, make):
    """Whoever can write model.safetensors can write its checksum too."""
    path = saved(tmp_path, 4)
    make(Bomb(tmp_path / "marker"), path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    del state["checksum"]
    state["files"]["model.safetensors"] = describe(path / "model.safetensors")
    (path / "state.json").write_text(json.dumps(state | {"checksum": checksum(state)}))
    with pytest.raises(DamagedCheckpoint, match="SafetensorError"):
        open_checkpoint(path)
    assert not (tmp_path / "marker").exists()


def test_no_source_file_unpickles_or_runs_text():
    """Where it could: imports of picklers, eval and exec, and the loaders that may unpickle or
    build objects."""
    modules = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
        "runpy",
        "code",
    }
    functions = {"eval", "exec", "compile", "__import__", "execfile"}
    attributes = {
        "torch": {"load", "hub", "jit"},
        "yaml": {"load", "unsafe_load", "full_load", "load_all"},
        "np": {"load"},
        "numpy": {"load"},
    }
    found, folders = [], ("conf", "data", "launch", "model", "optim")
    for file in [
        ROOT / "train.py",
        *(file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))),
    ]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else []
            )
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            guilty = (
                any(name.split(".")[0] in modules for name in [*([] if source else names), source])
                or any(name in attributes.get(source, ()) for name in names)
                or (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in functions
                )
                or (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.attr in attributes.get(node.value.id, ())
                )
                or (
                    isinstance(node, ast.keyword)
                    and node.arg in ("allow_pickle", "trust_remote_code", "weights_only")
                    and getattr(node.value, "value", None) is not (node.arg == "weights_only")
                )
            )
            if guilty:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_those_who_may_read_a_folder_may_read_its_tensors(tmp_path, folder, file):
    (tmp_path / "step").mkdir()
    (tmp_path / "step").chmod(folder)
    save_parts(tmp_path / "step/model.safetensors", {"x": Part(torch.zeros(2), (0,))})
    assert stat.S_IMODE((tmp_path / "step/model.safetensors").stat().st_mode) == file
