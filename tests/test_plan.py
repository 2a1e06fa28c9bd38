"""What is derived from a configuration; what a user sees of it is tested in test_config.py."""

import math
from dataclasses import asdict

import pytest

from launch.config import compose
from launch.plan.description import describe, describe_memory
from launch.plan.memory import estimate
from launch.plan.plan import gpt_config, human, make_plan
from model.gpt import GPTConfig

SMALL = ["model=tiny", "device=cpu", "batch.length=64", "batch.sequences=8"]


def rows(*overrides: str) -> dict[str, str]:
    composed = compose([*SMALL, *overrides])
    return {
        line[:22].strip(): line[22:]
        for line in describe(composed, make_plan(composed), "name").splitlines()
    }


@pytest.mark.parametrize("optim", ["adamw", "preconditioned_functional_sam", "gsam", "delta_sam"])
def test_the_tensors_of_the_fullest_moment_add_up_to_its_memory(optim):
    composed = compose([*SMALL, f"optim={optim}"])
    plan = make_plan(composed)
    fullest = estimate(composed, plan.model)
    title, *lines = describe_memory(composed, plan).splitlines()
    assert title == f"Tensors in the {fullest.moment}:" and len(lines) == len(fullest.table) > 10
    total = 0
    for row, line in zip(sorted(fullest.table, key=lambda row: -row.bytes), lines, strict=True):
        sides, size = row.shape.removesuffix(" B").rsplit(", ", 1)
        numbers = math.prod(int(side.replace(",", "")) for side in sides.split(" x "))
        assert numbers * int(size) == row.bytes and human(row.bytes) in line and row.name in line
        total += row.bytes
    assert total == fullest.total == sum(fullest.parts.values())
    assert human(total) in rows(f"optim={optim}")["memory, about"]


def test_the_shape_is_the_model_group():
    shape = [
        "model.num_kv_heads=1",
        "model.mlp_width=96",
        "model.norm=rmsnorm",
        "model.positions=rope",
        "model.activation=swiglu",
        "model.tied=false",
        "model.dropout=0.1",
        "model.logit_softcap=30.0",
        "model.z_loss=1e-4",
        "model.max_length=77",
    ]
    composed = compose([*SMALL, *shape])
    found = asdict(gpt_config(composed.model, vocab_size=11))
    assert found.pop("vocab_size") == 11
    assert found.items() <= asdict(composed.model).items()
    plain = asdict(GPTConfig(11, 1, 1, 1, 1))
    assert all(
        found[key.split("=")[0].removeprefix("model.")]
        != plain[key.split("=")[0].removeprefix("model.")]
        for key in shape
    )


def test_a_step_costs_a_forward_and_a_backward_of_twice_that():
    """Per token and forward 24 D^2 L + 4 T D L + 2 D V, at D = 64, L = 2, T = 64, V = 320 rows for
    257 ids."""
    plan = make_plan(compose([*SMALL, "schedule.steps=10"]))
    assert plan.tokens_per_step == 512
    assert plan.flops_per_step == 3 * 512 * (24 * 64**2 * 2 + 4 * 64 * 64 * 2 + 2 * 64 * 320)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_micro_batches_change_neither_tokens_nor_flops(micro):
    cut, whole = rows(f"batch.micro={micro}"), rows()
    assert f"in {8 // micro} micro-batches of {micro}" in cut["tokens per step"]
    assert all(
        cut[label] == whole[label]
        for label in ("tokens", "FLOPs", "parameters", "steps", "hours on one H100")
    )


@pytest.mark.parametrize(
    ("overrides", "micro"),
    [
        ([], 8),
        (["optim=msam"], 2),
        (["optim=msam", "optim.num_groups=8"], 1),
        (["optim=msam", "batch.micro=1"], 1),
        (["optim.num_groups=4"], 8),
    ],
)
def test_a_micro_batch_is_a_group_unless_told(overrides, micro):
    composed = compose([*SMALL, *overrides])
    assert make_plan(composed).micro == micro
    assert f"in {8 // micro} micro-batches of {micro}" in rows(*overrides)["tokens per step"]


@pytest.mark.parametrize(("steps", "tenth", "tracked"), [(5, 1, 1), (999, 99, 1), (1000, 100, 10)])
def test_ten_evaluations_and_checkpoints_unless_told(steps, tenth, tracked):
    plan = make_plan(compose([*SMALL, f"schedule.steps={steps}"]))
    assert (plan.evaluation_every, plan.checkpoint_every, plan.tracking_every) == (
        tenth,
        tenth,
        tracked,
    )
    told = make_plan(
        compose(
            [
                *SMALL,
                f"schedule.steps={steps}",
                "evaluation.every=3",
                "checkpoint.every=4",
                "tracking.every=2",
            ]
        )
    )
    assert (told.evaluation_every, told.checkpoint_every, told.tracking_every) == (3, 4, 2)


@pytest.mark.parametrize(
    ("counted", "count"), [("non_embedding", 98_624), ("all", 98_624 + (257 + 1024) * 64)]
)
def test_chinchilla_counts_the_parameters_it_says(counted, count):
    """tiny: 12 L D^2 + 5 D without embeddings; the horizon is rounded up to whole steps."""
    plan = make_plan(compose([*SMALL, "schedule=chinchilla", f"schedule.parameters={counted}"]))
    assert 0 <= plan.schedule.steps * plan.tokens_per_step - 20 * count < plan.tokens_per_step


def test_hours_follow_from_flops_and_the_device():
    """Devices differ as their peaks do, and a small model takes a visible fraction of an hour, not
    0.00."""
    small, large = (
        rows("schedule.steps=10"),
        rows("model=gpt2_1558m", "schedule.tokens=3e10", "batch.length=1024"),
    )
    assert small["hours on one A100"].startswith("under a second at an assumed 40%")
    assert float(rows("schedule.steps=10000000")["hours on one A100"].split()[0]) > 0
    hours = {
        device: float(large[f"hours on one {device}"].split()[0].replace(",", ""))
        for device in ("A100", "H100", "H200")
    }
    assert hours["A100"] / hours["H100"] == pytest.approx(989 / 312, rel=1e-3)
    assert hours["H100"] == hours["H200"]
    flops = float(large["FLOPs"].split()[0])
    assert hours["H100"] == pytest.approx(flops / (0.4 * 989e12) / 3600, rel=1e-3)


def test_processes_share_batch_and_hours():
    one = rows("schedule.steps=10000000", "parallel=fsdp")
    four = rows(
        "schedule.steps=10000000",
        "parallel=fsdp",
        "parallel.processes=4",
        "plan_only=true",
        "batch.micro=1",
    )
    assert "in 8 micro-batches of 1, 2 on each of 4 processes" in four["tokens per step"]
    assert "processes" not in one["tokens per step"] and "a process on" in four["memory, about"]
    whole, shared, _ = four["hours on one A100"].split(", ")
    assert whole == one["hours on one A100"].split()[0]
    assert shared.endswith(" on 4 of them") and float(shared.split()[0]) == pytest.approx(
        float(whole) / 4, rel=0.05
    )


@pytest.mark.parametrize(
    ("launched", "overrides", "said"),
    [
        (
            {},
            ["parallel=fsdp", "parallel.processes=4"],
            "but 1 was started; use torchrun --nproc-per-node 4, or plan_only=true",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            ["parallel=fsdp", "parallel.processes=4", "plan_only=true"],
            "but 2 were started",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["parallel=fsdp", "parallel.processes=2"], None),
        (
            {},
            ["parallel=fsdp", "parallel.processes=16", "plan_only=true"],
            "batch.sequences=8 is not divisible",
        ),
        ({}, ["parallel.processes=4", "plan_only=true"], "parallel=single with 4 processes"),
        (
            {},
            ["parallel=hsdp", "parallel.processes=4", "plan_only=true", "parallel.replicas=3"],
            "does not divide 4 processes",
        ),
    ],
)
def test_a_plan_may_be_for_any_number_of_processes_a_run_not(
    monkeypatch, launched, overrides, said
):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    if said is None:
        assert compose([*SMALL, *overrides]).parallel.processes == 2
        return
    with pytest.raises(ValueError, match=said):
        compose([*SMALL, *overrides])


def test_what_fits_is_said_of_common_devices_or_the_one_that_is_named():
    assert (
        rows("device=cuda")["fits on"]
        == "A100 40 GB: yes; A100 80 GB: yes; H100 80 GB: yes; H200 141 GB: yes"
    )
    assert rows("device=cuda", "device_memory=0.005")["fits on"].startswith(
        "0.005 GiB: with batch.micro="
    )
    assert (
        "in bfloat16" in rows("device=cuda")["memory, about"]
        and "on cpu in float32" in rows("precision=fp32")["memory, about"]
    )
    assert "fits on" not in rows()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 B"),
        (1023, "1023.0 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_bytes_are_written_for_people(size, text):
    assert human(size) == text
