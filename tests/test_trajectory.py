"""Short runs of `train.main` beside a plain loop: rate, groups, clipping, decay and rows of every
step, from the equations alone.

The loop computes in float64 with tests/plain_rules.py; of the product it takes the first weights
and the batches."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import train as training
from data import Loader, prepare
from launch.config import compose
from launch.plan.plan import make_plan
from model import GPT
from tests.plain_rules import AdamW, Axes, MicroBatch, PlainModel, PlainRule
from tests.runs import tensors

STEPS, WARMUP, PEAK, START, FINAL = 7, 3, 0.05, 0.1, 0.2
DECAY, CLIP, EPS = 0.5, 0.4, 1e-2  # an eps that large lets Adam see the size of gradients
KEYS = [
    "model.dropout=0",
    "precision=fp32",
    "batch.sequences=8",
    "batch.micro=2",
    f"schedule.steps={STEPS}",
    f"schedule.warmup_steps={WARMUP}",
    f"schedule.start={START}",
    f"schedule.final={FINAL}",
    f"optim.lr={PEAK}",
    f"optim.weight_decay={DECAY}",
    f"optim.clip={CLIP}",
    f"optim.eps={EPS}",
    "evaluation.every=7",
    "checkpoint.every=7",
]
RUNS: dict[
    str, tuple[list[str], Axes | None, int, int]
] = {  # overrides, the rule, sequences of a group, steps of a row
    "adamw": (["optim=adamw"], None, 8, 1),
    "adamw, rows of three": (["optim=adamw", "tracking.every=3"], None, 8, 3),
    "sam": (["optim=sam", "optim.rho=0.5"], Axes(rho=0.5), 8, 1),
    "sam on a part": (
        ["optim=sam", "optim.rho=0.5", "optim.ascent_fraction=0.4", "tracking.every=2"],
        Axes(rho=0.5, ascent_fraction=0.4),
        8,
        2,
    ),
    "groups of two micro-batches": (
        ["optim=msam", "optim.rho=0.5", "optim.num_groups=2"],
        Axes(rho=0.5, scope="micro_batch"),
        4,
        1,
    ),
    "groups of one": (
        ["optim=msam", "optim.rho=0.5", "optim.num_groups=4"],
        Axes(rho=0.5, scope="micro_batch"),
        2,
        1,
    ),
    "sgd": (
        ["optim=sam", "optim.rho=0.5", "optim.base=sgd", "optim.momentum=0.8"],
        Axes(rho=0.5),
        8,
        1,
    ),
}


def rate(step: int) -> float:
    """The learning rate of a step, counted from 0: a line from START to 1, then a cosine from 1 to
    FINAL, of the peak."""
    if step < WARMUP:
        return PEAK * (START + (1 - START) * step / WARMUP)
    turned = math.pi * (step - WARMUP) / (STEPS - WARMUP)
    return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(turned)) / 2)


class Sgd(AdamW):
    """b = mu b + g + decay t, t -= lr b."""

    def step(self, t: Tensor, g: Tensor) -> Tensor:
        self.m = 0.8 * self.m + g + self.decay * t
        return t - self.lr * self.m


def plain_loop(
    model: GPT, loader: Loader, axes: Axes | None, sequences: int, sgd: bool
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Returns the weights after all steps, and the loss, rate and gradient norm of every step."""
    plain = PlainModel(model)
    t = plain.flat(dict(model.named_parameters()))
    rule = PlainRule(plain, axes or Axes(stop=0))
    decay = DECAY * plain.where(lambda name, p: p.ndim >= 2)
    base = (Sgd if sgd else AdamW)(PEAK, decay, eps=EPS)
    steps = []
    for step in range(STEPS):
        tokens_BxT, targets_BxT = loader.batch(step)
        parts = zip(tokens_BxT.split(sequences), targets_BxT.split(sequences), strict=True)
        found = rule.gradient(t, [[MicroBatch(*part)] for part in parts], base)
        norm = found.gradient.norm().item()
        base.lr = rate(step)
        t = base.step(t, found.gradient * min(1.0, CLIP / norm))
        steps.append({"train/loss": found.loss, "optim/lr": rate(step), "grad/norm": norm})
    return plain.split(t), steps


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_a_plain_loop_computes(tiny, tmp_path: Path, name: str):
    overrides, axes, sequences, every = RUNS[name]
    settings = compose([*tiny, *KEYS, *overrides, f"dir={tmp_path}/run"])
    corpus = prepare(settings.data, settings.tokenizer)
    loader = Loader(
        corpus.train, corpus.weights, settings.batch.length, settings.batch.sequences, settings.seed
    )
    model = GPT(make_plan(settings).model, settings.seed).double()
    first = {key: p.detach().clone() for key, p in model.named_parameters()}
    expected, steps = plain_loop(model, loader, axes, sequences, "optim.base=sgd" in overrides)
    assert sum(step["grad/norm"] > CLIP for step in steps) > STEPS / 2  # most are clipped
    assert training.main(settings) == 0

    saved = tensors(tmp_path / "run", STEPS)
    for key, weight in expected.items():
        moved = (weight - first[key]).norm()
        assert (saved[f"model/{key}"].double() - weight).norm() < 2e-3 * moved, key

    found: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    ends = [min(end, STEPS) for end in range(every, STEPS + every, every)]
    assert [row["step"] for row in found] == [0, *ends]
    for row, begin in zip(found[1:], [0, *ends], strict=False):
        inside = steps[begin : row["step"]]
        assert row["tokens"] == row["step"] * settings.batch.sequences * settings.batch.length
        assert row["train/loss"] == pytest.approx(
            sum(step["train/loss"] for step in inside) / len(inside), rel=1e-4
        )
        assert row["optim/lr"] == pytest.approx(inside[-1]["optim/lr"], rel=1e-12)
        assert row["grad/norm"] == pytest.approx(inside[-1]["grad/norm"], rel=2e-3)
