"""The product against what was recorded of it (tests/gates/record.py): names, keys, plans, the
numbers of every rule, and an old run."""

import json
import math
import shutil
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.gates.record import MAKERS, machine, train
from tests.runs import ROOT, Server, bits, rows, tensors

GATES = ROOT / "tests/gates"


def recorded(name: str) -> dict[str, Any]:
    return json.loads((GATES / f"{name}.json").read_text())


def made(name: str) -> dict[str, Any]:
    return json.loads(json.dumps(MAKERS[name]()))


@pytest.mark.parametrize("name", ["names", "keys", "plans"])
def test_what_a_user_sees_is_what_was_recorded(name):
    assert made(name) == recorded(name), f"where this is meant: python tests/gates/record.py {name}"


@pytest.mark.parametrize("name", ["metrics_1", "metrics_2"])
def test_the_numbers_of_every_rule_are_those_recorded(name):
    """Bit for bit on the kind of machine that they were recorded on; on others, which sum in
    another order, nearly."""
    found, known = made(name), recorded(name)
    if found["machine"] == known["machine"]:
        assert found == known, f"where this is meant: python tests/gates/record.py {name}"
    for rule in known.keys() - {"machine"}:
        assert_close(found[rule]["last"], known[rule]["last"])


def assert_close(row: dict[str, Any], known: dict[str, Any]) -> None:
    """Figures of 20 steps in fp32 that differ by rounding only."""
    assert row.keys() == known.keys()
    for figure, value in known.items():
        if isinstance(value, float):
            assert math.isclose(row[figure], value, rel_tol=1e-2, abs_tol=1e-4), figure
        else:
            assert row[figure] == value, figure


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """tests/gates/old_run was made by 13fda05 and stopped after step 8 of 12; old_run_ended is how
    that version ended it."""
    run, ended = tmp_path / "run", GATES / "old_run_ended"
    shutil.copytree(GATES / "old_run", run)
    overrides = [
        "model=tiny",
        "model.num_layers=1",
        "model.width=16",
        "model.num_heads=2",
        "model.max_length=32",
        "model.dropout=0.1",
        "batch.length=32",
        "batch.sequences=4",
        "batch.micro=2",
        "schedule.steps=12",
        "optim=preconditioned_functional_sam",
        "optim.cotangent=rebuild",
        "data=text",
        "data.path=tests/gates/licence.txt",
        "data.validation_split=tail",
        "data.name=licence",
        "device=cpu",
        "precision=fp32",
        "compile=none",
        "tracking.mode=off",
        "tracking.every=1",
        "evaluation.every=4",
        "evaluation.tokens=512",
        "evaluation.baselines=false",
        "evaluation.sample=0",
        f"dir={run}",
        f"data.cache={tmp_path}/cache",
    ]
    server = Server()
    try:
        train([server], overrides, tmp_path)
    finally:
        server.close()
    same = recorded("metrics_1")["machine"] == machine()
    found = tensors(run, 12)
    for group in ("model", "optimizer"):
        for name, tensor in load_file(ended / f"{group}.safetensors").items():
            if same:
                assert bits(found[f"{group}/{name}"]) == bits(tensor), name
            assert (found[f"{group}/{name}"] - tensor).abs().max() < 1e-3, name
    assert len(rows(run)) == 13
    for row, known in zip(rows(run), rows(ended), strict=True):
        known.pop("flops")  # that version did not count the padded rows of the head
        assert_close({figure: row[figure] for figure in known}, known)
