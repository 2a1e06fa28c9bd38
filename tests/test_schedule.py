"""Horizons and learning rates against their formulas."""

import math

import pytest

from conf.rule import OptimConfig
from conf.schema import ScheduleConfig
from optim import build_schedule

OPTIM = OptimConfig(lr=2.0)


def build(
    num_parameters: int = 1000, tokens_per_step: int = 10, optim: OptimConfig = OPTIM, **keys
):
    return build_schedule(ScheduleConfig(**keys), optim, tokens_per_step, num_parameters)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_every_shape_is_its_formula(shape):
    schedule = build(steps=100, warmup_steps=10, start=0.2, final=0.1, shape=shape, decay=0.3)
    for step in range(101):
        p = (step - 10) / 90
        expected = {
            "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2,
            "linear": 1 - 0.9 * p,
            "wsd": 1.0 if step <= 70 else 1 - 0.9 * (step - 70) / 30,
            "constant": 1.0,
        }[shape]
        expected = 0.2 + 0.8 * step / 10 if step < 10 else expected
        assert schedule.lr(step) == pytest.approx(2 * expected, rel=1e-12), step
    assert schedule.lr(0) == pytest.approx(0.4) and schedule.lr(10) == 2.0
    assert schedule.lr(100) == pytest.approx(2.0 if shape == "constant" else 0.2)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_a_decay_to_the_peak_is_constant(shape):
    schedule = build(steps=100, final=1.0, shape=shape)
    assert [schedule.lr(step) for step in range(101)] == [
        build(steps=100, shape="constant").lr(step) for step in range(101)
    ]


def test_horizons():
    assert build(steps=100).steps == 100
    assert build(steps=None, tokens=991.0).steps == 100  # rounded up
    assert build(name="chinchilla", tokens_per_parameter=20.0).steps == 2000
    assert build(name="chinchilla", tokens_per_parameter=0.5, num_parameters=1001).steps == 51


def test_warmup_is_a_fraction_unless_given_in_steps():
    assert build(steps=1000).warmup == 50
    assert build(steps=1000, warmup=0.2).warmup == 200
    assert build(steps=1000, warmup=0.2, warmup_steps=7).warmup == 7
    assert build(steps=1).warmup == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"steps": 10, "warmup_steps": 10},
            "schedule.warmup_steps=10 reaches beyond the horizon of 10 steps",
        ),
        ({"steps": 10, "warmup": 1.0}, "beyond the horizon of 10 steps"),
        (
            {"steps": 10, "warmup_steps": 8, "shape": "wsd", "decay": 0.5},
            "schedule.decay=0.5 overlaps the warm-up of 8 steps",
        ),
    ],
)
def test_what_does_not_fit_the_horizon_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        build(**keys)


@pytest.mark.parametrize("start", [100, 250])
def test_a_rule_that_would_never_act_is_refused(start):
    with pytest.raises(
        ValueError, match=f"optim.start={start} lies beyond the horizon of 100 steps"
    ):
        build(steps=100, optim=OptimConfig(path="full", start=start))
    build(steps=100, optim=OptimConfig(path="none", start=start))  # not read
    build(steps=100, optim=OptimConfig(path="full", start=0.99))


# When a rule acts, and how far it looks


def rule(**keys) -> OptimConfig:
    return OptimConfig(lr=2.0, path="full", rho=0.5, **keys)


@pytest.mark.parametrize(
    ("keys", "first", "stop"),
    [
        ({}, 0, 100),
        ({"start": 7}, 7, 100),
        ({"start": 1}, 1, 100),
        ({"start": 0.25}, 25, 100),
        ({"start": 0.999}, 100, 100),
        ({"stop": 30}, 0, 30),
        ({"stop": 0.3}, 0, 30),
        ({"stop": 1}, 0, 100),  # all of it
        ({"stop": 250}, 0, 100),
        ({"start": 0.2, "stop": 0.7}, 20, 70),
        ({"start": 20, "stop": 0.7}, 20, 70),
    ],
)
def test_start_and_stop_are_steps_or_fractions(keys, first, stop):
    if first == stop:
        with pytest.raises(ValueError, match="beyond the horizon"):
            build(steps=100, optim=rule(**keys))
        return
    schedule = build(steps=100, optim=rule(**keys))
    assert (schedule.first, schedule.stop) == (first, stop)
    for period in (1, 2, 7, 1000):
        acting = [
            step for step in range(100) if first <= step < stop and (step - first) % period == 0
        ]
        assert build(steps=100, optim=rule(period=period, **keys)).perturbed_steps == len(acting)


@pytest.mark.parametrize(
    "keys",
    [
        {"start": 50, "stop": 50},
        {"start": 50, "stop": 0.3},
        {"start": 0.5, "stop": 0.5},
        {"stop": 0},
        {"stop": 0.001},
    ],
)
def test_a_stop_before_the_start_is_refused(keys):
    with pytest.raises(
        ValueError,
        match=(
            f"optim.stop={keys['stop']:g} is not after optim.start={keys.get('start', 0):g}.*stop"
            " later"
        ),
    ):
        build(steps=100, optim=rule(**keys))


@pytest.mark.parametrize("shape", ["constant", "warmup", "cosine", "lr"])
def test_every_radius_is_its_formula(shape):
    schedule = build(
        steps=100,
        warmup_steps=10,
        shape="linear",
        optim=rule(rho_schedule=shape, rho_warmup=0.25, start=20, stop=0.6),
    )
    for step in range(20, 60):
        p = (step - 20) / 40
        expected = {
            "constant": 1.0,
            "warmup": min(1, p / 0.25),
            "cosine": (1 + math.cos(math.pi * p)) / 2,
            "lr": schedule.lr(step) / 2,
        }[shape]
        assert schedule.radius(step) == pytest.approx(0.5 * expected, rel=1e-12, abs=1e-15), step
    assert schedule.radius(20) == pytest.approx(
        {"warmup": 0.0, "lr": 0.5 * (1 - 0.9 * 10 / 90)}.get(shape, 0.5)
    )


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"start": 0.3},
        {"start": 31},
        {"period": 3},
        {"stop": 0.4, "period": 2},
        {"start": 0.3, "stop": 0.7, "period": 5},
        {"start": 0.1, "stop": 50},
    ],
)
@pytest.mark.parametrize("cost", [1.0, 1.76, 2.0, 2.33, 2.5, 3.3])
def test_a_matched_horizon_is_the_longest_that_can_be_paid_for(keys, cost):
    def spent(steps: int) -> float:
        first = round(keys.get("start", 0) * (steps if keys.get("start", 0) < 1 else 1))
        stop = (
            min(steps, round(keys["stop"] * (steps if keys["stop"] <= 1 else 1)))
            if "stop" in keys
            else steps
        )
        return steps + (cost - 1) * len(range(first, stop, keys.get("period", 1)))

    found = build_schedule(
        ScheduleConfig(steps=172), rule(compute_matched=True, **keys), 10, 1000, cost
    ).steps
    assert found == max(steps for steps in range(1, 173) if spent(steps) <= 172 * (1 + 1e-9))
