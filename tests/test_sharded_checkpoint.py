"""Checkpoints of several processes: each writes its own shards, any number of them reads, and what
is refused or killed costs no other."""

import json
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from launch.checkpoint import step_folder
from launch.checkpoint.saver import Saver, copied
from model import load
from model.checkpoint import TENSORS, open_checkpoint
from model.export import to_hf
from model.processes import Layout
from tests.checkpoint_ranks import SHAPE, TOKENIZER, Trained
from tests.runs import ROOT, assert_same_tensors, tensors, torchrun

KINDS = ("fsdp", "hsdp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one process, and what four made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    trained, saver = Trained(Layout(), 3), Saver(folder / "single", Layout())
    for _ in range(3):
        trained.step()
    trained.begin_save(saver, 3)
    assert saver.wait() is None
    process = torchrun(4, str(ROOT / "tests/checkpoint_ranks.py"), str(folder))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out[-3000:]
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    """What each of the four found out."""
    return json.loads((folder / "found.json").read_text())


def at(run: Path, step: int) -> Path:
    return run / f"checkpoints/step_{step:08d}"


@pytest.mark.parametrize("source", ["single", *KINDS])
@pytest.mark.parametrize("target", KINDS)
def test_any_mesh_loads_any_bit_for_bit(outcome, source, target):
    """Weights, optimiser, rule and random state; those of the moment of the save, though all of
    them were changed right after."""
    assert [process[f"{source} to {target}"] for process in outcome] == [[]] * 4


def test_a_save_is_written_while_training_goes_on(tmp_path, monkeypatch):
    """The disk is slower than a step, which changes every weight: what is written in the end is of
    the moment when the save began."""
    trained, saver, may_write, write = (
        Trained(Layout(), 3),
        Saver(tmp_path, Layout()),
        threading.Event(),
        step_folder.write,
    )

    def slow(*arguments):
        assert may_write.wait(30)
        return write(*arguments)

    monkeypatch.setattr(step_folder, "write", slow)
    trained.step()
    then = trained.whole()
    trained.begin_save(saver, 1)
    assert not saver.done and not at(tmp_path, 1).exists()
    trained.step()
    may_write.set()
    assert saver.wait() is None
    now = trained.whole()
    assert all(
        not now[name].equal(value) for name, value in then.items() if name.startswith("model/")
    )
    trained.take(tmp_path)
    assert_same_tensors(trained.whole(), then)


def test_the_place_of_a_copy_is_used_again_where_it_fits_only():
    place = copied(torch.ones(3), None)
    assert copied(torch.arange(3.0), place) is place and place.values.tolist() == [0, 1, 2]
    for other in (torch.full((3,), 1 / 3, dtype=torch.float64), torch.ones(4)):
        values = copied(other, place).values
        assert values.dtype == other.dtype and torch.equal(values, other)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_loads_and_saves_what_several_saved(folder, outcome, kind, tmp_path):
    assert [process[f"{kind} saved 5"] for process in outcome] == [None] * 4
    trained = Trained(Layout(), 8)
    assert trained.take(folder / kind).step == 5
    assert_same_tensors(
        {
            name: value
            for name, value in tensors(folder / kind, 5).items()
            if not name.startswith("random")
        },
        {name: value for name, value in trained.whole().items() if name != "random"},
    )
    saver = Saver(tmp_path, Layout())
    trained.begin_save(saver, 6)
    assert saver.wait() is None
    assert sorted(path.name for path in at(tmp_path, 6).iterdir()) == sorted(
        path.name for path in at(folder / "single", 3).iterdir()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_writes_its_own_shards_once(folder, kind):
    """In safetensors and JSON, and of what is sharded no file holds all; what each writes is what
    it holds."""
    path, sizes, numbers = at(folder / kind, 5), Counter(), Counter()
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    shapes = {
        f"{group}/{name}": value.shape
        for group in TENSORS
        for name, value in open_checkpoint(path).tensors[group].items()
    }
    for file in path.glob("*.safetensors"):
        group, process = file.name.split("-")[:2]
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                shape = opened.get_slice(name).get_shape()
                numbers[f"{group}/{name}"] += torch.Size(shape).numel()
                if group != "random" and shape:
                    sizes[process] += torch.Size(shape).numel()
                    assert shape[0] <= -(
                        -shapes[f"{group}/{name}"][0] // (4 if kind == "fsdp" else 2)
                    ), (file, name)
    assert numbers == {name: shape.numel() for name, shape in shapes.items()}
    assert list(sizes) and set(sizes) == (
        {"00001", "00002", "00003", "00004"} if kind == "fsdp" else {"00001", "00002"}
    )


def test_every_type_and_cut_is_found_again(outcome):
    assert [process["kinds"] for process in outcome] == [[]] * 4


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_files(folder):
    """Whoever has torch can read a checkpoint without us."""
    path = at(folder / "fsdp", 5)
    ours = {
        name: value[...]
        for group in ("model", "optimizer")
        for name, value in open_checkpoint(path).tensors[group].items()
        if value.shape
    }
    theirs = {name: torch.zeros_like(value) for name, value in ours.items()}
    dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert_same_tensors(theirs, ours)


def test_damage_in_one_part_has_all_fall_back_together(outcome, folder):
    path, damage = (
        at(folder / "fsdp", 9),
        "model-00003-of-00004.safetensors does not match its size or checksum",
    )
    said = f"checkpoint {path} is damaged ({damage}); trying the one before it"
    assert [process["damage"] for process in outcome] == [[5, [said]], [5, []], [5, []], [5, []]]


def test_a_disk_that_refuses_one_process_costs_that_checkpoint_only(outcome):
    for process in outcome:
        (first, one), (second, two), (third, three) = process["refused"]
        assert (first, third) == (None, None) and "File too large" in second
        assert (one, two, three) == (
            ["step_00000001"],
            ["step_00000001"],
            ["step_00000001", "step_00000003"],
        )


def test_a_folder_that_is_not_shared_is_no_checkpoint(outcome, folder):
    assert all(
        "the run folder must be one that all nodes share" in process["apart"] for process in outcome
    )
    assert not list((folder / "here/checkpoints").iterdir())


def test_an_export_is_the_same_however_many_processes_saved(folder, tmp_path):
    for kind in ("single", *KINDS):
        model = load(folder / kind, 3)
        assert model.config == SHAPE
        to_hf(model, TOKENIZER, tmp_path / kind)
    for kind in KINDS:
        assert_same_tensors(
            load_file(tmp_path / kind / "model.safetensors"),
            load_file(tmp_path / "single/model.safetensors"),
        )
        for path in (tmp_path / kind).glob("*.json"):
            assert path.read_bytes() == (tmp_path / "single" / path.name).read_bytes()
