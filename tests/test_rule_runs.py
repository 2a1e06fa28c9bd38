"""Runs of the sharpness-aware rules: they train, resume, branch, skip what is not finite, count
what they cost, and log what is so."""

import copy
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

import train as training
from conf.exit_codes import EXIT_PREEMPTED
from conf.launcher import LauncherConfig
from conf.overrides import groups
from conf.schema import Config
from launch.config import compose
from launch.config.checks import check_contradictions
from launch.plan.plan import make_plan
from launch.report.record import read_run
from launch.run.liveness import Liveness
from launch.run.lock import RunLock
from launch.run.opening import OpenRun
from launch.status import line_of
from launch.sweep.jobs import Job
from model import GPT, GPTConfig
from model.processes import Layout
from optim import Schedule, SharpnessAware, passes
from optim.gradient import Gradient, named_gradients
from optim.rule.axes import needs_gradient
from tests.runs import ROOT, assert_same_tensors, rows, tensors
from tests.test_train import Crash, after_step, assert_unharmed, crash, terminate

STEPS = 7
SHORT = [
    f"schedule.steps={STEPS}",
    "batch.micro=2",
    "evaluation.every=4",
    "evaluation.tokens=128",
    "checkpoint.every=3",
    "optim.lr=0.003",
    "precision=fp32",
]
PRESETS = {name: [f"optim={name}"] for name in groups()["optim"]}
PRESETS["msam"] += ["optim.num_groups=2"]
VARIANTS = PRESETS | {
    "rebuilt": [
        "optim=functional_sam",
        "optim.cotangent=rebuild",
        "optim.rho_schedule=warmup",
        "optim.rho_warmup=0.5",
    ],
    "bf16": ["optim=preconditioned_functional_sam", "precision=bf16"],
    "every third, from 1 to 6": [
        "optim=sam",
        "optim.start=1",
        "optim.stop=6",
        "optim.period=3",
        "tracking.every=2",
    ],
    "looking from 1 to 6": [
        "optim=look_sam",
        "optim.period=2",
        "optim.start=1",
        "optim.stop=6",
        "optim.rho_schedule=cosine",
    ],
    "stale now and then": ["optim=stale_sam", "optim.period=2", "tracking.every=4"],
    "rows between": [
        "optim=sam",
        "optim.period=4",
        "tracking.every=3",
        "optim.diagnostics_every=1",
    ],  # of steps 0, 4 and 6
    "friendly groups": [
        "optim=friendly_sam",
        "optim.scope=micro_batch",
        "optim.num_groups=4",
        "batch.micro=1",
        "optim.start=0.3",
    ],
    "random": [
        "optim=sam",
        "optim.direction=random",
        "optim.parameters=no_embeddings",
        "optim.rho_schedule=lr",
        "optim.diagnostics_every=2",
    ],
    "part of the batch": ["optim=sam", "optim.ascent_fraction=0.4"],
    "on sgd": ["optim=momentum_sam", "optim.base=sgd", "optim.lr=0.1"],
    "on muon": ["optim=sam", "optim.base=muon"],
    "momentum of muon": ["optim=momentum_sam", "optim.base=muon", "optim.rho=0.5"],
}
ONE_PASS = ("momentum_sam", "stale_sam")


@pytest.fixture
def compose_run(tiny, tmp_path):
    """The configuration of a run in a folder of tmp_path; Hydra, which takes its time, composes
    each method once."""

    def compose_run(*overrides: str, name: str = "run") -> Config:
        choices = tuple(
            override
            for override in overrides
            if override.startswith(("optim=", "optim.num_groups="))
        )
        settings = copy.deepcopy(composed((*tiny, *SHORT, *choices)))
        for key, value in (
            override.split("=")
            for override in [f"dir={tmp_path / name}", *overrides]
            if override not in choices
        ):
            *sections, entry = key.split(".")
            section = functools.reduce(getattr, sections, settings)
            assert hasattr(section, entry)
            setattr(section, entry, yaml.safe_load(value))
        check_contradictions(settings)
        return settings

    return compose_run


@functools.cache
def composed(overrides: tuple[str, ...]) -> Config:
    """As the command line would have it."""
    return compose(list(overrides))


@pytest.fixture
def start(compose_run, tmp_path):
    """Trains in this process to the end; returns the run folder."""

    def start(*overrides: str, name: str = "run") -> Path:
        assert training.main(compose_run(*overrides, name=name)) == 0
        return tmp_path / name

    return start


def built(settings: Config, folder: Path) -> training.Run:
    """Returns a run with its data and its model, before any step; no folder is made."""
    layout = Layout()
    opened = OpenRun("run", folder, layout, Liveness(layout), RunLock(folder))
    return training.Run(settings, make_plan(settings), opened)


def row_of(run: Path, step: int) -> dict[str, Any]:
    """The row of a step."""
    (found,) = [row for row in rows(run) if row["step"] == step]
    return found


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text()) | {"seconds": 0}


def assert_same(one: Path, other: Path, steps: int = STEPS) -> None:
    """Bit for bit the same weights, optimiser, rule, random state, rows and summary."""
    assert_same_tensors(tensors(one, steps), tensors(other, steps))
    assert rows(one) == rows(other)
    assert summary(one) == summary(other)


def killed_and_resumed(settings: Config) -> None:
    """Trains in two starts: a kill after step 5 takes it back to step 3."""
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 5, crash)
        with pytest.raises(Crash):
            training.main(settings)
    assert training.main(settings) == 0


# Every preset trains, and goes on where it stopped


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_and_resumed_is_undisturbed(compose_run, tmp_path, name, capsys):
    settings = compose_run(*VARIANTS[name], name="undisturbed")
    optim, schedule = settings.optim, make_plan(settings).schedule
    assert training.main(settings) == 0
    killed_and_resumed(replace(settings, dir=str(tmp_path / "run")))
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert_same(run, undisturbed)
    assert f"resumed from {run}/checkpoints/step_00000003\n" in capsys.readouterr().out
    assert row_of(run, STEPS)["val/loss"] < row_of(run, 0)["val/loss"] - 0.1

    state = {tensor.split("/")[1] for tensor in tensors(run, STEPS) if tensor.startswith("rule/")}
    held = {
        "step": optim.path != "none",
        "seed": optim.path != "none",
        "direction": optim.direction in ("stale", "friendly"),
        "combine": optim.combine == "reuse",
        "stores": optim.path in ("functional", "angle") or optim.diagnostics_every is not None,
    }
    assert state == {name for name, whether in held.items() if whether}

    first, stop = schedule.first, schedule.stop if optim.path != "none" else 0
    active = [
        step for step in range(STEPS) if first <= step < stop and (step - first) % optim.period == 0
    ]
    # those two have nothing to go by at first
    moved = [step for step in active if step > 0 or optim.direction not in ("momentum", "stale")]
    assert schedule.perturbed_steps == len(active) and summary(run)["perturbed_steps"] == len(moved)
    one_pass, moved_loss = (
        not needs_gradient(optim) and optim.path == "full",
        optim.path not in ("none", "functional"),
    )
    check_rows(rows(run)[1:], schedule, active, moved, one_pass, moved_loss)

    if optim.diagnostics_every is None:  # what was spent is what was planned
        if optim.cotangent == "auto":
            settings = replace(settings, optim=replace(optim, cotangent="store"))
        plan, last = make_plan(settings), row_of(run, STEPS)
        planned = plan.flops_per_step * (STEPS - len(active)) + plan.flops_per_perturbed_step * len(
            active
        )
        logged = sum("optim/lr" in row for row in rows(run))
        assert last["flops"] == planned + logged * cost_of_statistics(settings)
        if active:
            cost = passes(
                settings.optim,
                settings.optim.cotangent == "store",
                settings.batch.sequences // plan.num_groups,
            )
            plain = STEPS - len(active)
            assert (last["forwards"], last["backwards"]) == (
                plain + cost.forwards * len(active),
                plain + cost.backwards * len(active),
            )


def cost_of_statistics(settings: Config) -> int:
    """FLOPs of the logits that a row's statistics are made of: of the first micro-batch, which is a
    measurement and no part of the plan."""
    plan = make_plan(settings)
    return plan.forward.head * plan.tokens_per_step * plan.micro // settings.batch.sequences


def check_rows(
    logged: list[dict[str, Any]],
    schedule: Schedule,
    active: list[int],
    moved: list[int],
    one_pass: bool,
    moved_loss: bool,
) -> None:
    """What is logged of each step; train/loss is the clean loss, which a rule of one pass knows
    only of the steps that move nothing."""
    seen = 0  # steps that the rows so far are about
    for row in logged:
        if "optim/lr" not in row:  # an evaluation alone
            continue
        # the last that was to move the weights
        step = max({*range(seen, row["step"])} & {*active}, default=row["step"] - 1)
        assert row.get("sharpness/rho") == (schedule.radius(step) if step in active else None)
        assert ("sharpness/realised_radius" in row) == (step in moved)
        assert (row["train/loss"] is None) == (
            one_pass and set(range(seen, row["step"])) <= set(moved)
        )
        if step in moved:
            shares = sum(row[f"sharpness/share_{kind}"] for kind in ("embedding", "body", "head"))
            assert shares == pytest.approx(1.0 if schedule.radius(step) else 0.0, abs=1e-6)
            assert ("sharpness/perturbed_loss" in row) == moved_loss
        if "sharpness/gap" in row and seen == row["step"] - 1 and row["train/loss"] is not None:
            assert row["sharpness/gap"] == pytest.approx(
                row["sharpness/perturbed_loss"] - row["train/loss"], abs=1e-6
            )
        seen = row["step"]


@pytest.mark.parametrize("stored", [True, False])
def test_what_cotangent_auto_took_is_kept(compose_run, tmp_path, monkeypatch, capsys, stored):
    """Whatever memory is free when the run goes on."""
    settings, asked = (
        compose_run("optim=functional_sam", "optim.cotangent_share=0.4", name="undisturbed"),
        iter([stored, stored, not stored]),
    )
    # r in fp32, the vocabulary padded to a multiple of 64
    needed = 4 * settings.batch.sequences * settings.batch.length * 320
    monkeypatch.setattr(
        "optim.rule.cotangents.free_memory",
        lambda device: needed / 0.4 + (1 if next(asked) else -1),
    )
    assert training.main(settings) == 0
    killed_and_resumed(replace(settings, dir=str(tmp_path / "run")))
    assert_same(tmp_path / "run", tmp_path / "undisturbed")
    assert bool(tensors(tmp_path / "run", STEPS)["rule/stores"]) == stored
    assert (
        capsys.readouterr().out.count(f"cotangent=auto takes {'store' if stored else 'rebuild'}: ")
        == 2
    )


# Identities


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_radius_zero_is_adamw_to_the_bit(start, precision):
    """All passes are run, and nothing moves; the clip and the dropout masks are those of the plain
    step."""
    plain = start("optim=adamw", f"precision={precision}", name="plain")
    assert summary(plain)["perturbed_steps"] == 0
    for name in ("sam", "functional_sam"):
        run = start(f"optim={name}", "optim.rho=0", f"precision={precision}", name=name)
        assert (
            summary(run)["perturbed_steps"] == STEPS and row_of(run, STEPS)["forwards"] == 2 * STEPS
        )
        ours, theirs = tensors(run, STEPS), tensors(plain, STEPS)
        assert_same_tensors({tensor: ours[tensor] for tensor in theirs}, theirs)
        found, expected = (
            [
                [row.get(key) for key in ("train/loss", "grad/norm", "val/loss")]
                for row in rows(folder)
            ]
            for folder in (run, plain)
        )
        assert found == expected
    if precision == "fp32":
        rebuilt = start(
            "optim=functional_sam",
            "optim.rho=0",
            "optim.cotangent=rebuild",
            "precision=fp32",
            name="rebuilt",
        )
        # r is rounded in another order
        assert row_of(rebuilt, STEPS)["val/loss"] == pytest.approx(
            row_of(plain, STEPS)["val/loss"], abs=1e-5
        )
        moving = start("optim=sam", "optim.rho=0.001", "precision=fp32", name="moving")
        # so that the above can fail
        assert row_of(moving, STEPS)["val/loss"] != row_of(plain, STEPS)["val/loss"]


# What it costs


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=sam"],
        ["optim=functional_sam", "optim.cotangent=rebuild"],
        ["optim=momentum_sam"],
        ["optim=logit_sam", "optim.start=0.5"],
        ["optim=look_sam"],
        ["optim=delta_sam", "optim.period=2", "optim.start=3", "optim.stop=0.7"],
        ["optim=sam", "optim.ascent_fraction=0.4"],
    ],
    ids=" ".join,
)
def test_compute_matched_spends_what_adamw_spends(compose_run, tmp_path, overrides):
    """Over the full schedule, less than one step's worth of FLOPs below it."""
    length = ["schedule.steps=21", "evaluation.every=100", "checkpoint.every=100"]
    settings = compose_run(*overrides, *length, "optim.compute_matched=true")
    plan, plain = make_plan(settings), make_plan(compose_run(*length))
    steps, budget = plan.schedule.steps, plain.flops_per_step * 21
    assert (steps == 21) == (overrides == ["optim=momentum_sam"])
    assert training.main(settings) == 0
    spent = row_of(tmp_path / "run", steps)["flops"] - steps * cost_of_statistics(settings)
    assert summary(tmp_path / "run")["step"] == steps
    assert budget - plan.flops_per_perturbed_step < spent <= budget
    assert (
        summary(tmp_path / "run")["val/loss_at_equal_flops"]
        == summary(tmp_path / "run")["val/loss"]
    )


@pytest.mark.parametrize("method", ["adamw", "momentum_sam", "sam"])
def test_summary_tells_the_loss_at_adamws_flops(compose_run, tmp_path, method):
    """SAM has spent them half way, between two evaluations; AdamW and a rule of one pass at the
    end."""
    settings = compose_run(
        f"optim={method}", "schedule.steps=20", "evaluation.every=3", "tracking.every=20"
    )
    assert training.main(settings) == 0
    budget, told = 20 * make_plan(settings).flops_per_step, summary(tmp_path / "run")
    evaluations = [
        (row["flops"], row["val/loss"]) for row in rows(tmp_path / "run") if "val/loss" in row
    ]
    if method != "sam":
        assert told["val/loss_at_equal_flops"] == told["val/loss"] == evaluations[-1][1]
        return
    (f0, l0), (f1, l1) = next(
        pair for pair in pairwise(evaluations) if pair[0][0] < budget <= pair[1][0]
    )
    assert told["val/loss_at_equal_flops"] == pytest.approx(
        l0 + (l1 - l0) * (budget - f0) / (f1 - f0)
    )
    assert l0 > told["val/loss_at_equal_flops"] > l1 > told["val/loss"]


# Late SAM: branches of an AdamW run


def test_late_sam_goes_on_from_adamw(tiny, reference, tmp_path, capsys):
    """From its step, weights, moments, place in the data and dropout masks; the rule's own clock
    starts there."""
    branches = {
        "adamw": ["optim=adamw"],
        "sam": ["optim=sam"],
        "other radius": ["optim=sam", "optim.rho=0.2"],
        "later": ["optim=sam", "optim.start=13", "optim.stop=20", "optim.period=3"],
        "stale": ["optim=stale_sam"],
    }
    for name, overrides in branches.items():
        settings = compose(
            [
                *tiny,
                f"dir={tmp_path / name}",
                f"init.run={reference}",
                "init.step=10",
                "init.optimizer=true",
                *overrides,
            ]
        )
        if name in ("later", "stale"):
            with pytest.MonkeyPatch.context() as patch:
                after_step(patch, 15, terminate)
                assert training.main(settings) == EXIT_PREEMPTED
        assert training.main(settings) == 0
        assert f"branched from {reference}/checkpoints/step_00000010\n" in capsys.readouterr().out
    theirs, runs = (
        {row["step"]: row for row in rows(reference)},
        {name: tmp_path / name for name in branches},
    )
    assert_same_tensors(tensors(runs["adamw"]), tensors(reference))
    for name, run in runs.items():
        ours = {row["step"]: row for row in rows(run)}
        assert sorted(ours) == list(range(10, 33))
        # the clean loss of the same weights on the same batch
        assert ours[11]["train/loss"] == theirs[11]["train/loss"]
        assert ours[10]["val/loss"] is not None and ours[11]["optim/lr"] == theirs[11]["optim/lr"]
        perturbed = {"adamw": [], "later": [13, 16, 19], "stale": list(range(11, 32))}.get(
            name, list(range(10, 32))
        )
        assert [
            step - 1 for step, row in ours.items() if "sharpness/realised_radius" in row
        ] == perturbed
        assert summary(run)["perturbed_steps"] == len(perturbed)
        if name != "adamw":
            assert tensors(run)["rule/step"] == 32
            assert any(ours[step]["val/loss"] != theirs[step]["val/loss"] for step in (24, 32))
        two = make_plan(compose([*tiny, *branches[name], "optim.cotangent=store"]))
        spent = (
            theirs[10]["flops"]
            + 22 * two.flops_per_step
            + (two.flops_per_perturbed_step - two.flops_per_step) * len(perturbed)
        )
        assert ours[32]["flops"] - spent == 22 * two.forward.head * two.tokens_per_step
    assert [rows(runs[name])[1]["grad/norm"] == theirs[11]["grad/norm"] for name in branches] == [
        True,
        False,
        False,
        True,
        True,
    ]


def test_late_sam_counts_from_where_it_branched(tiny, reference, tmp_path):
    """S steps of AdamW, then p S perturbed ones with S + 2 p S = T: 10 of 32, then 11. Warm-ups of
    the radius begin there too."""
    keys = [
        *tiny,
        "optim=sam",
        f"dir={tmp_path / 'run'}",
        f"init.run={reference}",
        "init.step=10",
        "init.optimizer=true",
    ]
    for key in ("optim.compute_matched=true", "optim.rho_schedule=warmup"):
        with pytest.raises(
            ValueError,
            match=(
                f"{key} counts from optim.start=0, and init.run moved nothing up to step 10; set"
                " optim.start=10"
            ),
        ):
            training.main(compose([*keys, key]))
    assert (
        training.main(
            compose([*keys, "optim.start=10", "optim.compute_matched=true", "checkpoint.every=4"])
        )
        == 0
    )
    assert (
        summary(tmp_path / "run")["step"] == 21
        and summary(tmp_path / "run")["perturbed_steps"] == 11
    )


# What is logged


def test_utilisation_is_of_the_peak(compose_run, tmp_path, monkeypatch):
    """mfu counts AdamW's passes, hardware_mfu all that were executed, recomputed blocks
    included."""
    settings = compose_run("optim=sam", "activation_checkpointing=true", "schedule.steps=2")
    monkeypatch.setattr("launch.track.meter.peak_flops", lambda device: 1e12)
    assert training.main(settings) == 0
    plan, row = (
        make_plan(settings),
        json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]),
    )
    seconds = plan.tokens_per_step / row["perf/tokens_per_second"]
    assert row["perf/mfu"] == pytest.approx(plan.flops_per_step / seconds / 1e12)
    recomputed = 2 * (plan.forward.body + plan.forward.attention) * plan.tokens_per_step
    executed = plan.flops_per_perturbed_step + cost_of_statistics(settings) + recomputed
    assert row["perf/hardware_mfu"] == pytest.approx(executed / seconds / 1e12)


def independent(
    model: GPT, tokens: Tensor, targets: Tensor, rho: float, path: str, metric: str
) -> dict[str, float]:
    """The figures of the first perturbed step, by autograd over dense logits in double
    precision."""
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    clean = [p.detach().clone() for p in parameters]

    def logits_at(move: list[Tensor]) -> Tensor:
        with torch.no_grad():
            for p, w, e in zip(parameters, clean, move, strict=True):
                p.copy_(w + e)
        return model(tokens)

    def r_of(logits: Tensor) -> Tensor:
        onehot = torch.zeros_like(logits).scatter(-1, targets[..., None], 1.0)
        return ((logits.softmax(-1) - onehot) / targets.numel()).detach()

    def pull(move: list[Tensor], r: Tensor) -> Tensor:
        found = torch.autograd.grad(logits_at(move), parameters, r)
        return torch.cat([part.flatten() for part in found])

    def split(flat: Tensor) -> list[Tensor]:
        return [
            part.view_as(p)
            for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
        ]

    nowhere = [torch.zeros_like(p) for p in parameters]
    z = logits_at(nowhere).detach()
    g = pull(nowhere, r_of(z))
    d = g / (g.abs() + 1e-8) if metric == "adam" else g
    u = d / d.norm()
    e = split(rho * u)
    z_moved = logits_at(e).detach()
    g_func, g_logit = pull(e, r_of(z)), pull(nowhere, r_of(z_moved))
    rule = {"full": pull(e, r_of(z_moved)), "functional": g_func, "logit": g_logit}[path]
    loss, moved = (
        cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in (z, z_moved)
    )
    tables = {"embedding": "embedding", "positions": "embedding", "head": "head"}
    kind = [tables.get(name.split(".")[0], "body") for name, _ in model.named_parameters()]
    log_p = z.log_softmax(-1)
    logits_at(nowhere)

    def cosine(one: Tensor, other: Tensor) -> Tensor:
        return one @ other / (one.norm() * other.norm())

    figures = {
        "train/loss": loss,
        "sharpness/rho": torch.tensor(rho),
        "sharpness/perturbed_loss": moved,
        "sharpness/gap": moved - loss,
        "sharpness/gradient_norm": g.norm(),
        "sharpness/rule_norm": rule.norm(),
        "grad/norm": rule.norm(),
        "sharpness/slope": u @ g,
        "sharpness/rule_slope": u @ rule,
        "sharpness/curvature": u @ (rule - g) / rho,
        "sharpness/cosine": cosine(g, rule),
        "sharpness/realised_radius": torch.tensor(rho),
        "sharpness/realised_cosine": torch.tensor(1.0),
        "sharpness/realised_along": torch.tensor(1.0),
        "sharpness/fidelity": torch.tensor(1.0),
        **{
            f"sharpness/share_{which}": (
                sum(part.square().sum() for part, k in zip(e, kind, strict=True) if k == which)
                / rho**2
            )
            for which in ("embedding", "body", "head")
        },
        "logits/entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "logits/log_normaliser": z.logsumexp(-1).mean(),
        "logits/largest": z.max(),
        "logits/hidden_norm": model.hidden(tokens).square().sum(-1).mean().sqrt(),
        "logits/weight_norm": model.unembedding[:257].norm(),
        "sharpness/delta_func": (g_func - g).norm(),
        "sharpness/delta_logit": (g_logit - g).norm(),
        "sharpness/cosine_func_logit": cosine(g_func - g, g_logit - g),
        "sharpness/cosine_func_gradient": cosine(g_func - g, g),
        "sharpness/cosine_logit_gradient": cosine(g_logit - g, g),
    }
    return {name: torch.as_tensor(value).item() for name, value in figures.items()}


ABSENT = {  # what a rule does not know without another pass, or without keeping g
    ("full", "euclidean"): set(),
    ("functional", "euclidean"): set(),
    ("logit", "euclidean"): {"sharpness/rule_slope", "sharpness/curvature", "sharpness/cosine"},
    ("full", "adam"): {"sharpness/cosine"},
}


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.parameters=head"],
        ["optim.parameters='*.mlp.*'"],
        ["optim.ascent_fraction=0.5"],
        ["optim.weights=delta"],
    ],
    ids=str,
)
def test_what_a_row_tells_of_g_is_about_g(compose_run, tmp_path, overrides):
    """Where only a part of the weights moves, |g| and |g_rule| are still of all, and their cosine
    is not had for free; where the ascent loss is another than L, nothing of g is."""
    settings = compose_run(
        "optim=sam",
        "model.dropout=0",
        "batch.micro=4",
        "schedule.steps=1",
        "optim.rho=0.3",
        *overrides,
    )
    run = built(settings, tmp_path / "unused")
    g = independent(run.model, *run.data.loader.batch(0), 0.3, "full", "euclidean")[
        "sharpness/gradient_norm"
    ]
    assert training.main(settings) == 0
    row = row_of(tmp_path / "run", 1)
    assert "sharpness/cosine" not in row and row["sharpness/rule_norm"] == pytest.approx(
        row["grad/norm"]
    )
    if "parameters" in overrides[0]:
        assert (
            row["sharpness/gradient_norm"] == pytest.approx(g, rel=1e-4)
            and row["sharpness/slope"] < 0.99 * g
        )
    else:
        assert (
            not {"sharpness/gradient_norm", "sharpness/slope", "sharpness/curvature"} & row.keys()
        )


@pytest.mark.parametrize(("path", "metric"), ABSENT)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_row_is_what_an_independent_computation_finds(compose_run, tmp_path, path, metric, tied):
    settings = compose_run(
        f"optim.path={path}",
        f"optim.metric={metric}",
        f"model.tied={tied}",
        "optim=sam",
        "model.dropout=0",
        "batch.micro=4",
        "schedule.steps=1",
        "optim.rho=0.3",
        "optim.diagnostics_every=1",
    )
    run = built(settings, tmp_path / "unused")
    expected = independent(run.model, *run.data.loader.batch(0), 0.3, path, metric)
    assert training.main(settings) == 0
    row = row_of(tmp_path / "run", 1)
    assert {name for name in row if name.startswith(("sharpness/", "logits/"))} == {
        name for name in expected if name.startswith(("sharpness/", "logits/"))
    } - ABSENT[path, metric]
    for name in expected.keys() & row.keys():
        assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-4), name
    assert sum(
        row[f"sharpness/share_{kind}"] for kind in ("embedding", "body", "head")
    ) == pytest.approx(1, abs=1e-9)
    assert (row["sharpness/share_head"] > 0) == (not tied)
    # there is something to see
    assert abs(expected["sharpness/curvature"]) > 0.05 and expected["sharpness/gap"] > 0.1


@pytest.mark.parametrize(
    "name",
    [
        "sam",
        "sam optim.period=2",
        "functional_sam",
        "momentum_sam",
        "look_sam",
        "msam",
        "delta_sam",
    ],
)
def test_diagnostics_change_no_bit(compose_run, tmp_path, name):
    """They come with every second row, or the next one with a move, cost what they count, and
    nothing else in the run knows of them; nor of how often a row is logged."""
    name, *overrides = name.split()
    settings = compose_run(*PRESETS[name], *overrides)
    found: dict[str, list[dict[str, Any]]] = {}
    for which, every, tracked in (("without", None, 1), ("with", 2, 1), ("seldom", 1, 3)):
        optim, tracking = (
            replace(settings.optim, diagnostics_every=every),
            replace(settings.tracking, every=tracked),
        )
        assert (
            training.main(
                replace(settings, dir=str(tmp_path / which), optim=optim, tracking=tracking)
            )
            == 0
        )
        found[which] = rows(tmp_path / which)[1:]
        ours = {
            tensor: value
            for tensor, value in tensors(tmp_path / which, STEPS).items()
            if tensor != "rule/stores"
        }
        assert_same_tensors(
            ours,
            {
                tensor: value
                for tensor, value in tensors(tmp_path / "without", STEPS).items()
                if tensor != "rule/stores"
            },
        )
    extra = {
        "sharpness/delta_func",
        "sharpness/delta_logit",
        "sharpness/cosine_func_logit",
        "sharpness/cosine_func_gradient",
        "sharpness/cosine_logit_gradient",
        "sharpness/fidelity",
    }
    active = [step for step in range(1, STEPS + 1) if (step - 1) % settings.optim.period == 0]
    diagnosed = sorted(
        {min(later) for row in (2, 4, 6) if (later := [step for step in active if step >= row])}
    )
    assert [row["step"] for row in found["with"] if extra <= row.keys()] == diagnosed
    told = [
        row
        for row, first in ((3, 1), (6, 4), (7, 7))
        if any(first <= step <= row for step in active)
    ]
    assert [
        row["step"] for row in found["seldom"] if extra <= row.keys()
    ] == told  # of the last steps before them that moved
    assert not any(extra & row.keys() for row in found["without"])
    for plain, row in zip(found["without"], found["with"], strict=True):
        with_diagnostics = [step for step in diagnosed if step <= row["step"]]
        # of msam they look at the first group
        cost = {"momentum_sam": (7, 3), "delta_sam": (10, 5), "msam": (3, 2.5)}.get(name, (6, 5))
        # of half of the batch, twice
        fidelity = {"momentum_sam": (2, 2), "delta_sam": (5, 3)}.get(name, (3, 3))
        cost = [sum(parts) for parts in zip(cost, fidelity, strict=True)]
        assert [row[key] - plain[key] for key in ("forwards", "backwards")] == [
            count * len(with_diagnostics) for count in cost
        ]
        assert (row["flops"] > plain["flops"]) == bool(with_diagnostics)
        counts = ("flops", "forwards", "backwards")
        assert {key: row[key] for key in plain if key not in counts} == {
            key: plain[key] for key in plain if key not in counts
        }


def test_diagnostics_know_the_clean_loss_of_a_rule_of_one_pass(start):
    clean = row_of(start("optim=adamw", "schedule.steps=1", name="plain"), 1)["train/loss"]
    run = start(
        "optim=sam",
        "optim.direction=random",
        "optim.rho=2",
        "optim.diagnostics_every=1",
        "schedule.steps=1",
    )
    random = row_of(run, 1)
    assert random["train/loss"] is None and random["sharpness/clean_loss"] == pytest.approx(
        clean, abs=1e-6
    )
    assert (
        random["sharpness/gap"]
        == pytest.approx(random["sharpness/perturbed_loss"] - clean, abs=1e-6)
        and random["sharpness/gap"] != 0
    )


def test_console_shows_the_loss_that_there_is(start, capsys):
    for name, shown in (("sam", False), ("stale_sam", True)):
        start(f"optim={name}", name=name)
        line = next(
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith(f"step {STEPS}/{STEPS}")
        )
        assert (
            re.search(r"  loss at the moved weights \d\.\d{4}  val ", line)
            if shown
            else re.search(r"  loss \d\.\d{4}  val ", line)
        ), line


# Passes that are not finite


def poison(monkeypatch, bad: set[int], which: str) -> None:
    """A gradient that is not finite, of the clean pass or of the moved one, in some steps."""
    original = getattr(SharpnessAware, which)

    def poisoned(self, *arguments):
        found = original(self, *arguments)
        if self.direction.step in bad:
            gradients = found.gradients if found else named_gradients(self.parameters)
            for gradient in gradients.values():
                gradient.view(-1)[3] = math.nan
        return found

    monkeypatch.setattr(SharpnessAware, which, poisoned)


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("sam", "take_clean_pass"),
        ("sam", "take_moved_pass"),
        ("friendly_sam", "take_clean_pass"),
        ("friendly_sam", "take_moved_pass"),
        ("stale_sam", "take_moved_pass"),
        ("looking", "take_moved_pass"),
        ("gsam", "take_moved_pass"),
        ("functional_sam", "take_moved_pass"),
        ("msam", "take_clean_pass"),
    ],
)
def test_step_that_is_not_finite_is_skipped(
    compose_run, tmp_path, monkeypatch, capsys, name, which
):
    """Ascent or not: weights, moments and the rule's memory stay clean, and the run goes on,
    resumed in between or not."""
    overrides = ["optim=look_sam", "optim.period=2"] if name == "looking" else PRESETS[name]
    bad = {2, 4}
    settings = compose_run(*overrides, "optim.diagnostics_every=3", name="undisturbed")
    poison(monkeypatch, bad, which)
    with monkeypatch.context() as patch:
        assert_unharmed(patch, bad.__contains__)
        assert training.main(settings) == 0
    out, undisturbed = capsys.readouterr().out, tmp_path / "undisturbed"
    assert [step for step in range(STEPS) if f"skipped batch {step}: loss " in out] == sorted(bad)
    assert out.count("gradient norm nan") == 2
    assert [row["skipped"] for row in rows(undisturbed)[1:]] == [0, 0, 1, 1, 2, 2, 2]
    assert [row["step"] - 1 for row in rows(undisturbed)[1:] if row["grad/norm"] is None] == sorted(
        bad
    )
    assert summary(undisturbed)["skipped"] == 2
    assert all(tensor.isfinite().all() for tensor in tensors(undisturbed, STEPS).values())
    killed_and_resumed(replace(settings, dir=str(tmp_path / "run")))
    assert_same(tmp_path / "run", undisturbed)


def test_move_that_is_not_finite_ends_no_run(start, monkeypatch, capsys):
    """Where nothing was looked at, there is no loss to tell of."""
    original = SharpnessAware.directions

    def along(self, gradients):
        return {
            name: q.mul_(math.inf if self.direction.step == 2 else 1)
            for name, q in original(self, gradients).items()
        }

    monkeypatch.setattr(SharpnessAware, "directions", along)
    run = start("optim=sam", "optim.direction=random")
    assert "skipped batch 2: loss nan, gradient norm nan\n" in capsys.readouterr().out
    assert (
        summary(run)["skipped"] == 1
        and row_of(run, 3)["train/loss"] is None
        and row_of(run, STEPS)["val/loss"] < 5.8
    )


# Precision


def warnings_of(said: str) -> list[str]:
    """The warnings among what a run printed."""
    return [line for line in said.splitlines() if line.startswith("warning: ")]


def test_a_low_cosine_of_the_move_is_no_warning(start, capsys):
    """In bf16 at the default radius the move gains what lies at right angles to it, and the change
    of the gradient is what it ought to be."""
    run = start("optim=sam", "precision=bf16", "optim.diagnostics_every=1", "model.dropout=0.1")
    assert not warnings_of(capsys.readouterr().out)
    for row in rows(run)[1:]:
        assert row["sharpness/realised_cosine"] < 0.9 and row["sharpness/realised_radius"] > 0.055
        assert (
            row["sharpness/realised_along"] == pytest.approx(1, abs=0.1)
            and row["sharpness/fidelity"] > 0.95
        )


@pytest.mark.parametrize(
    ("overrides", "figure"),
    [
        (["precision=bf16", "optim.rho=0.001", "optim.diagnostics_every=1"], "sharpness/fidelity"),
        (
            ["precision=fp32", "optim.rho=0.00000001"],
            "sharpness/realised_along",
        ),  # below the spacing of most weights in fp32
        (
            ["precision=fp32", "optim.rho=0.00000001", "optim.metric=adaptive"],
            "sharpness/realised_along",
        ),
    ],
    ids=["fidelity", "along", "along, adaptive"],
)
def test_what_rounding_harms_is_warned_of_once(start, capsys, overrides, figure):
    """In the console of the run, and where sweeps and reports look."""
    run = start("optim=sam", *overrides)
    (warning,) = warnings_of(capsys.readouterr().out)
    assert f"({figure})" in warning and "(optim.rho)" in warning
    # fp32 is no remedy for fp32
    assert ("(optim.compute=fp32)" in warning) == ("precision=bf16" in overrides)
    measured = [row[figure] for row in rows(run)[1:]]
    assert max(measured) < 0.9
    if figure == "sharpness/fidelity":
        assert f"cosine of {measured[0]:.2f} " in warning
    harm = read_run(run).harm
    assert f": {harm}; " in warning
    job = Job(run, [], "", STEPS, 1, LauncherConfig())
    assert line_of(job, "done").details == f"\n         warning: {harm}" and line_of(
        job, "running"
    ).details.endswith(line_of(job, "done").details)


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16", "optim.compute=fp32"],
        ["precision=fp32", "optim=asam"],
        ["precision=fp32"],
    ],
    ids=str,
)
def test_an_exact_move_is_all_there(start, capsys, overrides):
    for row in rows(start("optim=sam", *overrides, "optim.diagnostics_every=1"))[1:]:
        for figure in (
            "sharpness/realised_along",
            "sharpness/realised_cosine",
            "sharpness/fidelity",
        ):
            assert row[figure] == pytest.approx(1, abs=1e-4)
    assert not warnings_of(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["sam", "functional_sam", "logit_sam", "msam", "preconditioned_sam"]
)
def test_fidelity_is_the_cosine_of_two_changes_of_the_gradient(compose_run, tmp_path, name):
    """Of the first micro-batch, each taken by a rule of its own on a copy of the model, in bf16 and
    in fp32, with the same dropout masks."""
    settings = compose_run(
        f"optim={name}",
        *PRESETS[name][1:],
        "precision=bf16",
        "schedule.steps=1",
        "optim.diagnostics_every=1",
        "optim.rho=0.02",
    )
    run = built(settings, tmp_path / "unused")
    micro = tuple(half[:2] for half in run.data.loader.batch(0))
    changes = []
    for dtype in (torch.bfloat16, torch.float32):
        found = []
        for rule in (Gradient(run.model), run.rule):
            rule.rho, rule.step = 0.02, 0
            run.model.zero_grad()
            torch.manual_seed(settings.seed)
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                rule.gradient([micro], logged=False)
            found.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
        changes.append(found[1] - found[0])
    assert training.main(settings) == 0
    expected = torch.cosine_similarity(*changes, dim=0).item()
    assert 0.3 < expected < 0.99
    assert row_of(tmp_path / "run", 1)["sharpness/fidelity"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_look_ups_are_not_rounded(tied):
    """What autocast casts are the operands of matrix products, biases among them; embeddings,
    positions and norms are used as they are. A tied embedding is the head's operand."""
    model = GPT(GPTConfig(57, 16, 1, 2, 16, bias=True, tied=tied))
    rule = SharpnessAware(model, torch.optim.AdamW(model.parameters()), rho=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = {}

    def note(*arguments: Any) -> None:
        for name, p in model.named_parameters():
            exact = (
                "norm" in name
                or name == "positions.weight"
                or (name == "embedding.weight" and not tied)
            )
            now, then = (
                (p.detach(), before[name])
                if exact
                else (p.detach().bfloat16().float(), before[name].bfloat16().float())
            )
            seen[name] = (now - then, p.detach() - before[name])

    rule.take_moved_pass = lambda *arguments: (
        note(),
        SharpnessAware.take_moved_pass(rule, *arguments),
    )
    tokens = torch.randint(0, 57, (2, 17))
    with torch.autocast("cpu", torch.bfloat16):
        metrics = rule.gradient([(tokens[:, :-1], tokens[:, 1:])]).metrics
    rounded, exact = (
        torch.cat([pair[i].flatten() for pair in seen.values()]).double() for i in range(2)
    )
    assert metrics["sharpness/realised_radius"] == pytest.approx(rounded.norm().item(), rel=1e-6)
    assert metrics["sharpness/realised_cosine"] == pytest.approx(
        (rounded @ exact / rounded.norm() / exact.norm()).item(), rel=1e-6
    )
    assert metrics["sharpness/realised_along"] == pytest.approx(
        (rounded @ exact / exact.norm() / 0.05).item(), rel=1e-5
    )


@pytest.mark.parametrize("vocab_size", [64, 257])
@pytest.mark.parametrize("tied", [True, False])
def test_noise_leaves_the_padding_of_a_vocabulary_alone(vocab_size, tied):
    """So that all of a random move is seen, and delta-SAM's probes are as large as asked for."""
    model = GPT(GPTConfig(vocab_size, 16, 1, 2, 16, tied=tied))
    tables = ["embedding.weight"] if tied else ["embedding.weight", "head.weight"]
    tokens = torch.randint(0, vocab_size, (4, 17))
    points: list[dict[str, Tensor]] = []
    original = model.lazy_logits

    def lazy_logits(inputs: Tensor) -> Any:
        points.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return original(inputs)

    model.lazy_logits = lazy_logits
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for axes, sigma in (({"direction": "random"}, None), ({"weights": "delta"}, 0.15)):
        points.clear()
        SharpnessAware(model, torch.optim.AdamW(model.parameters()), rho=0.3, **axes).gradient(
            [(tokens[:, :-1], tokens[:, 1:])]
        )
        model.zero_grad()
        moves = {name: points[0][name] - before[name] for name in before}
        assert not any(moves[name][vocab_size:].any() for name in tables)
        real = torch.cat(
            [
                (move[:vocab_size] if name in tables else move).flatten()
                for name, move in moves.items()
            ]
        )
        weights = torch.cat([p.flatten() for p in before.values()])
        size = 0.3 if sigma is None else sigma * weights.norm()
        assert real.norm().item() == pytest.approx(float(size), rel=1e-5 if sigma is None else 0.03)


@pytest.mark.parametrize("probe", ["central", "mixed"])
def test_probes_of_a_bf16_run_are_in_fp32(probe):
    """delta-SAM's weights are then those of a run in fp32, from one more forward; the rest of the
    step keeps its precision."""
    model = GPT(GPTConfig(57, 16, 2, 2, 32))
    tokens = torch.randint(0, 57, (4, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        rule = SharpnessAware(
            model, torch.optim.AdamW(model.parameters()), weights="delta", delta_probe=probe
        )
        rule.direction.seed = 5
        weights, precisions, original = [], [], model.hidden

        def hidden(
            inputs: Tensor, caches: Any = None, precisions=precisions, original=original
        ) -> Tensor:
            precisions.append(torch.is_autocast_enabled("cpu"))
            return original(inputs, caches)

        model.hidden = hidden
        rule.take_moved_pass = lambda ascent, *rest, weights=weights, rule=rule: (
            weights.append(ascent.group[0].weights_B),
            SharpnessAware.take_moved_pass(rule, ascent, *rest),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = rule.gradient([(tokens[:, :-1], tokens[:, 1:])], logged=False)
        del model.hidden
        model.zero_grad()
        found[dtype] = weights[0]
        rough = dtype == torch.bfloat16
        assert (result.forwards, result.backwards, result.head_products) == passes(
            rule.axes, True, 4, rough
        )
        probes = (2 if probe == "central" else 3) + rough
        assert precisions == [False] * probes + [rough] * 2
    torch.testing.assert_close(found[torch.bfloat16], found[torch.float32], rtol=1e-3, atol=1e-4)


def test_compute_fp32_takes_the_passes_out_of_autocast(compose_run, monkeypatch):
    """Those of the rule only; the plain steps and the evaluation keep the precision of the run. Nor
    is TF32 allowed in them."""
    seen, allowed = [], []
    original = GPT.hidden

    def hidden(self, tokens, caches=None):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        allowed.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return original(self, tokens, caches)

    monkeypatch.setattr(GPT, "hidden", hidden)
    settings = compose_run(
        "optim=functional_sam",
        "precision=bf16",
        "optim.compute=fp32",
        "optim.period=2",
        "schedule.steps=2",
        "evaluation.every=9",
    )
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert training.main(settings) == 0
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert allowed == [("high", True) if autocast else ("highest", False) for _, autocast in seen]
    steps = [autocast for trained, autocast in seen if trained]
    assert steps == [False] * 4 + [True] * 2 and all(
        autocast for trained, autocast in seen if not trained
    )


# Base optimisers


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(compose_run, tmp_path, tied):
    """Of each base optimiser; Muon has the matrices of the body."""
    for base in ("adamw", "sgd", "muon"):
        settings = compose_run(f"optim.base={base}", f"model.tied={tied}", "model.bias=true")
        run = built(settings, tmp_path / "unused")
        groups = run.optimizer.param_groups
        assert sorted(name for group in groups for name in group["names"]) == sorted(
            name for name, _ in run.model.named_parameters()
        )
        assert {id(p) for group in groups for p in group["params"]} == {
            id(p) for p in run.model.parameters()
        }
        assert sum(len(group["params"]) for group in groups) == len(list(run.model.parameters()))
        if base == "muon":
            body = {
                name
                for name, p in run.model.named_parameters()
                if name.startswith("blocks.") and p.ndim == 2
            }
            assert set(groups[0]["names"]) == body and len(body) == 4


# plan_only


@pytest.mark.parametrize("name", PRESETS)
def test_plan_of_every_preset(compose_run, capsys, tmp_path, name):
    """Perturbed steps with their cost, and the copies that the rule holds; and nothing is built."""
    assert (
        training.main(
            compose_run(
                *PRESETS[name], "plan_only=true", "schedule.steps=100", "optim.cotangent=rebuild"
            )
        )
        == 0
    )
    printed = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
    settings = compose_run(*PRESETS[name], "schedule.steps=100", "optim.cotangent=rebuild")
    plan = make_plan(settings)
    moved = 0 if name == "adamw" else 20 if name == "look_sam" else 100
    if name == "adamw":
        assert (
            "perturbed steps" not in printed
            and "copies of the rule" not in printed["memory, about"]
        )
    else:
        ratio = plan.flops_per_perturbed_step / plan.flops_per_step
        assert printed["perturbed steps"] == f"{moved}, each {ratio:.2f} plain ones in FLOPs"
        passes_of = {
            "momentum_sam": 1,
            "stale_sam": 1,
            "logit_sam": 7 / 3,
            "angle_sam": 10 / 3,
            "delta_sam": 8 / 3,
        }.get(name, 2)
        assert ratio == pytest.approx(passes_of, abs=0.35) and (passes_of in (1, 2)) <= (
            ratio == pytest.approx(passes_of, abs=1e-9)
        )
    total = plan.flops_per_step * (100 - moved) + plan.flops_per_perturbed_step * moved
    assert printed["FLOPs"].startswith(f"{total:.3e} in all, {plan.flops_per_step:.3e} a ")
    assert not list(tmp_path.glob("*"))


def test_plan_shows_the_matched_horizon(compose_run, capsys):
    def steps(*overrides: str) -> int:
        assert (
            training.main(
                compose_run(
                    *overrides, "plan_only=true", "schedule.steps=100", "optim.compute_matched=true"
                )
            )
            == 0
        )
        printed = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
        return int(printed["steps"].split(",")[0])

    assert steps("optim=sam") == 50 and steps("optim=momentum_sam") == 100
    assert steps("optim=sam", "optim.start=60") == 80 and steps("optim=sam", "optim.period=4") == 80
    assert (
        steps("optim=functional_sam", "optim.cotangent=store")
        > 50
        > steps("optim=logit_sam")
        >= 100 * 3 // 7
    )


# A method of one's own


def test_a_method_of_ones_own(tmp_path, tiny):
    """The example of the README, as it stands there, added to a copy of the project."""
    section = re.search(
        r"^## Add your own method$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S
    )[1]
    (code,), (content,) = (
        re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
        for language in ("python", "yaml")
    )
    (name,) = re.findall(r"`conf/optim/(\w+)\.yaml`", section)
    assert len(code.splitlines()) < 20 and f"optim={name}" in section
    project = shutil.copytree(
        ROOT,
        tmp_path / "project",
        ignore=shutil.ignore_patterns(".*", "runs", "tests", "local", "__pycache__"),
    )
    with (project / "optim/rule/directions.py").open("a") as file:
        file.write(f"\n\n{code}")
    (project / f"conf/optim/{name}.yaml").write_text(content)
    command = [sys.executable, "train.py", *tiny, *SHORT, f"optim={name}", "dir=mine"]
    process = subprocess.run(
        command,
        cwd=project,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert "not read" not in process.stderr
    last = row_of(project / "mine", STEPS)
    assert summary(project / "mine")["perturbed_steps"] == STEPS and last[
        "sharpness/realised_radius"
    ] == pytest.approx(0.05, rel=1e-4)
    # it went along something else than the gradient
    assert last["sharpness/slope"] < last["sharpness/gradient_norm"] * 0.99
