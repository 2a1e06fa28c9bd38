"""Several processes give what one gives: gloo processes, FSDP2, replicas and both (HSDP), for every
rule (identities 21, 30 and 31).

What they send each other is what the algorithm needs: calls and bytes of every rule beside a
formula.

A model of L blocks has B numbers in the linear maps of its blocks and R in the rest, the root, each
padded to equal shards. A step of f forward and b backward passes over K micro-batches

    gathers           the root for every forward that a backward follows, once for all micro-batches
                      of a pass without; a block for every forward and every backward:
                      4 R (K b + f - b) + s B K (f + b) bytes, s bytes a number of the compute dtype
    reduces           every gradient in fp32, of every micro-batch (of the last of each pass):
                      4 (R + B) K b  (4 (R + B) b) bytes
    over replicas     the same for its shard, but for the ascent of scope=replica

and, once a step, the functional path with cotangent=rebuild and the logit path gather the clean
head: s V D."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from math import prod

import pytest
import torch

import train
from launch.checkpoint.checkpoints import Checkpoints
from launch.checkpoint.saver import Saver
from launch.config import compose
from launch.plan.plan import make_plan
from model import GPT
from model.parallelize import has_compiler
from tests.ranks import BAD, BF16, DEEP, RECOMPUTED, RULES, cases_of
from tests.runs import ROOT, rows, torchrun

KINDS = ("fsdp 1", "fsdp 2", "replicas 2", "fsdp 4", "hsdp 4")
CASES = [f"{kind}: {name}" for kind in KINDS for name in cases_of(kind.split()[0])]
CASES += [f"fsdp 2: {name}, fp64" for name in RULES] + [
    f"fsdp 2: {name}, recomputed" for name in RECOMPUTED
]


@pytest.mark.parametrize("case", CASES)
def test_processes_agree_with_one(found, case):
    entry = found[case]
    if case.endswith((", fp64", ", recomputed")):
        assert (
            entry["loss"] < 1e-13
            and entry["gradient, every"] < 1e-13
            and entry["gradient, last"] < 1e-12
            and entry["weights"] < 1e-12
        ), entry
    else:  # the second gradient is taken after a step that turns rounding into more of it
        assert (
            entry["loss"] < 1e-5
            and entry["gradient, every"] < 1e-6
            and entry["gradient, last"] < 2e-5
            and entry["weights"] < 1e-4
        ), entry
    # replicas are the same bit for bit, in optimiser and rule too
    assert entry["metrics"] < 1e-3 and entry["replicas"] == 0, entry


@pytest.mark.parametrize("gathered", ["bf16", "bf16 of fp32"])
@pytest.mark.parametrize("rule", BF16)
def test_bf16_is_that_of_one_process_under_autocast(found, rule, gathered):
    """Blocks are gathered in bf16, or in fp32, as passes in IEEE fp32 need them, and cast."""
    # rounding turns the move, and rules with one part further
    bf16 = found[f"fsdp 2: {rule}, {gathered}"]
    assert (
        bf16["loss"] < 2e-3
        and bf16["gradient, every"] < (5e-3 if rule == "adamw" else 5e-2)
        and bf16["metrics"] < 5e-2
    ), bf16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replicas_perturbed_apart_hold_the_same_after_50_steps(found, precision):
    assert found["wandering"][precision] == 0


@pytest.mark.parametrize(("rule", "bad"), BAD)
def test_processes_skip_a_step_together(found, rule, bad):
    """Where one of four computes numbers that are none, in the first pass of the second step or in
    the moved one, no weight, moment or memory changes on any of them; an ascent along such numbers
    is not taken."""
    entry = {
        "finite": [True, bad != "first" or rule == "adamw", True],
        "taken": [True, False, True],
        "same": [False, True, False],
        "replicas": 0,
    }
    assert found["skipped"][f"{rule}, {bad}"] == [entry] * 4


@pytest.mark.parametrize("what", ["weight", "optimizer", "rule"])
def test_a_replica_that_holds_another_bit_is_refused(found, what):
    assert [process["nothing"] for process in found["diverged"]] == [""] * 4
    (said,) = {process[what] for process in found["diverged"]}
    place = (
        r"the weights, optimizer and rule of shard 1 is (\d+) on rank 1, (\d+) on rank 3\. Give all"
        r" of them the same command"
    )
    one, other = map(
        int, re.match(f"the processes do not hold the same any more: {place}", said).groups()
    )
    assert abs(one - other) == 1


def test_a_run_compares_its_processes_at_the_start_and_before_every_save(
    tmp_path, tiny, monkeypatch
):
    done = []
    for owner, name in ((Checkpoints, "refuse_disagreement"), (Saver, "begin")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *arguments, name=name, original=original: (
                done.append(name),
                original(*arguments),
            )[1],
        )
    assert train.main(compose([*tiny, "schedule.steps=8", f"dir={tmp_path}/run"])) == 0
    assert done == ["refuse_disagreement"] + 2 * ["refuse_disagreement", "begin"]


K, L = 2, DEEP.num_layers
PASSES = {
    "adamw": (1, 1),
    "sam": (2, 2),
    "functional store": (2, 2),
    "functional rebuild": (2, 2),
    "logit": (3, 2),
    "angle": (3, 3),
    "preconditioned": (2, 2),
    "msam": (2, 2),
    "delta": (4, 2),
    "momentum": (1, 1),
    "functional along momentum": (2, 1),
    "stale": (1, 1),
    "gsam": (2, 2),
}
# the others cut micro-batches, each as its places tell
WHOLE = [rule for rule in RULES if "ascent_fraction" not in RULES[rule]]
CLEAN_HEAD = (
    "functional rebuild",
    "logit",
    "angle",
    "preconditioned functional",
    "functional along momentum",
)


def sizes() -> tuple[int, int, int]:
    """B, R and V D: numbers in linear maps of blocks, in the rest, and in the head, with the
    padding of two shards."""
    with torch.device("meta"):
        model = GPT(DEEP)
    padded = {
        name: -(-p.shape[0] // 2) * 2 * prod(p.shape[1:]) for name, p in model.named_parameters()
    }
    linear = [name for name in padded if name.startswith("blocks.") and "norm" not in name]
    return (
        sum(padded[name] for name in linear),
        sum(padded.values()) - sum(padded[name] for name in linear),
        padded["embedding.weight"],
    )


def expected(
    kind: str,
    rule: str,
    f: int,
    b: int,
    s: int = 4,
    last: bool = False,
    kept: bool = False,
    ascent: int = 0,
) -> dict[str, tuple[int, int]]:
    """Calls and bytes by kind; `ascent` backward passes stay within their replica."""
    (B, R, VD), heads = sizes(), rule in CLEAN_HEAD
    roots, blocks = K * b + f - b, (K * b + f - b if kept else K * (f + b))
    times = 1 if last else K
    found = {
        "gather": (roots + L * blocks + heads, 4 * R * roots + s * B * blocks + s * VD * heads),
        "reduce_scatter": ((L + 1) * times * b, 4 * (R + B) * times * b),
    }
    if kind == "hsdp 4":
        found["over_replicas"] = (
            (L + 1) * times * (b - ascent),
            4 * (R + B) // 2 * times * (b - ascent),
        )
    return found


def seen(entry: dict) -> dict[str, tuple[int, int]]:
    """What was counted, without sums of a few numbers."""
    return {
        kind: (entry["calls"][kind], entry["bytes"][kind])
        for kind in ("gather", "reduce_scatter", "over_replicas")
        if kind in entry["calls"]
    }


@pytest.mark.parametrize(
    ("kind", "rule"), [("fsdp 2", rule) for rule in WHOLE] + [("hsdp 4", rule) for rule in BF16]
)
def test_a_step_sends_what_its_passes_need(found, kind, rule):
    entry = found[f"{kind}: {rule}, sent"]
    f, b = entry["forwards"], entry["backwards"]
    assert (f, b) == PASSES.get(rule, (f, b))
    assert seen(entry) == expected(kind, rule, f, b)


def test_sam_sends_twice_what_adamw_sends(found):
    once, twice, groups = (found[f"fsdp 2: {rule}, sent"] for rule in ("adamw", "sam", "msam"))
    for which in ("calls", "bytes"):
        for what in ("gather", "reduce_scatter"):
            assert twice[which][what] == groups[which][what] == 2 * once[which][what]
    scalars = [
        (entry["calls"]["all_reduce"], entry["bytes"]["all_reduce"])
        for entry in (once, twice, groups)
    ]
    # tokens and losses in 8 bytes, |g| in 4 for each move
    assert scalars == [
        (2, 8 * K + 8),
        (3, 8 * K + 16 + 4),
        (4, 8 * K + 16 + 4 * K),
    ]


@pytest.mark.parametrize("rule", BF16)
@pytest.mark.parametrize(
    ("way", "keys"), [("bf16", {"s": 2}), ("last", {"last": True}), ("kept", {"kept": True})]
)
def test_what_spares_traffic(found, rule, way, keys):
    """bf16 halves what blocks are gathered in; parallel.sync=last reduces once a pass;
    reshard_after_forward=false gathers blocks once."""
    assert seen(found[f"fsdp 2: {rule}, sent, {way}"]) == expected(
        "fsdp 2", rule, *PASSES[rule], **keys
    )


@pytest.mark.parametrize("rule", ["sam", "functional rebuild"])
def test_a_replica_ascends_on_its_own(found, rule):
    f, b = PASSES[rule]
    assert seen(found[f"hsdp 4: {rule}, by replica, sent"]) == expected(
        "hsdp 4", rule, f, b, ascent=1
    )


def run(world: int, *overrides: str) -> str:
    """A finished run of train.py on so many processes; what it printed."""
    process = (
        torchrun(world, str(ROOT / "train.py"), *overrides)
        if world
        else subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope="module")
def overrides(tiny):
    """A run of a few steps that does not depend on the number of processes."""
    return [
        *tiny,
        "model.dropout=0",
        "precision=fp32",
        "optim.eps=1e-6",
        "batch.sequences=8",
        "batch.micro=2",
        "schedule.steps=12",
        "optim=friendly_sam",
        "optim.ascent_fraction=0.4",
        "evaluation.every=4",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, overrides):
    """The same run on one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(0, *overrides, f"dir={folder}")
    return folder


def assert_same_curve(ours: list[dict], theirs: list[dict]) -> None:
    """Losses to 1e-5, and the same steps and tokens."""
    assert [(row["step"], row["tokens"]) for row in ours] == [
        (row["step"], row["tokens"]) for row in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        for key in ("train/loss", "val/loss", "sharpness/perturbed_loss", "grad/norm"):
            if other.get(key) is None:
                assert one.get(key) is None
            else:
                assert one[key] == pytest.approx(
                    other[key], rel=1e-4 if key == "grad/norm" else 1e-5
                )


def test_a_run_goes_on_on_other_numbers_of_processes(tmp_path, overrides, whole):
    """4 save, 2 go on with everything on the CPU, 4 finish as 2 replicas of 2, with a signal to one
    process each time but the last."""
    folder = tmp_path / "run"
    for world, until, *keys in (
        (4, 3, "parallel=fsdp", "parallel.sync=last"),
        (2, 6, "parallel=fsdp", "parallel.cpu_offload=true"),
        (4, 13, "parallel=hsdp", "parallel.reshard_after_forward=false"),
    ):
        process = torchrun(
            world, str(ROOT / "train.py"), *overrides, f"dir={folder}", *keys, "checkpoint.every=2"
        )
        end = time.monotonic() + 200
        if until < 12:
            while (
                not (folder / "metrics.jsonl").exists()
                or len((folder / "metrics.jsonl").read_text().splitlines()) < until
            ):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            workers = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            ).stdout.split()
            os.kill(int(workers[-1]), signal.SIGUSR1)
        out, _ = process.communicate(timeout=200)
        assert (folder / "summary.json").exists() == (until > 12), out[-3000:]
        assert process.returncode == 0 or until < 12, out[-3000:]
        assert until > 12 or ("received SIGUSR1" in out and ": saved step" in out), out[-3000:]
    assert_same_curve(rows(folder), rows(whole))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_blocks_in_shards_give_what_eager_ones_give(tmp_path, overrides, whole):
    keys = [
        "parallel=fsdp",
        "compile=block",
        "activation_checkpointing=true",
        f"dir={tmp_path}/run",
    ]
    assert "running eagerly" not in run(2, *overrides, *keys)
    assert_same_curve(rows(tmp_path / "run"), rows(whole))


def test_one_process_may_be_sharded(tmp_path, overrides, whole):
    run(0, *overrides, "parallel=fsdp", f"dir={tmp_path}/run")
    assert_same_curve(rows(tmp_path / "run"), rows(whole))


@pytest.mark.parametrize("kind", ["fsdp 2", "fsdp 4", "hsdp 4"])
def test_speeds_are_those_of_all_processes(tmp_path, overrides, kind):
    """Tokens a second are all processes' together, and mfu and hardware_mfu are shares of the peak
    of all of their devices."""
    name, world = kind.split()
    program = tmp_path / "with_a_peak.py"
    program.write_text(
        "import launch.track.meter\nimport train\nfrom launch import config\n"
        "if __name__ == '__main__':\n"
        "    launch.track.meter.peak_flops = lambda device: 1e12\n    config.main(train.main)\n"
    )
    keys = [
        *overrides,
        "optim=sam",
        "schedule.steps=3",
        "tracking.every=3",
        "activation_checkpointing=true",
        f"dir={tmp_path}/run",
    ]
    process = torchrun(
        int(world), str(program), *keys, f"parallel={name}", "optim.ascent_fraction=1"
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    plan = make_plan(compose([*keys, "optim.ascent_fraction=1"]))
    # steps, for each FLOP/s there is
    a_second = row["perf/tokens_per_second"] / int(world) / 1e12 / plan.tokens_per_step
    assert row["tokens"] == 3 * plan.tokens_per_step and row["perf/tokens_per_second"] > row[
        "tokens"
    ] / (3 * row["seconds"])
    assert row["perf/mfu"] == pytest.approx(plan.flops_per_step * a_second, rel=1e-9)
    recomputed = 2 * (plan.forward.body + plan.forward.attention) * plan.tokens_per_step
    assert row["perf/hardware_mfu"] == pytest.approx(
        (row["flops"] / 3 + recomputed) * a_second, rel=1e-9
    )


def test_fidelity_in_bf16_shards_is_that_of_one_process(tmp_path, overrides):
    """On the first micro-batch of all processes, whose blocks IEEE fp32 passes must not find
    rounded."""
    keys = [
        *overrides,
        "optim=sam",
        "optim.ascent_fraction=1",
        "optim.rho=0.01",
        "precision=bf16",
        "schedule.steps=1",
        "optim.diagnostics_every=1",
    ]
    run(0, *keys, "batch.micro=4", f"dir={tmp_path}/one")
    run(2, *keys, "parallel=fsdp", f"dir={tmp_path}/two")
    one, two = (rows(tmp_path / name)[-1]["sharpness/fidelity"] for name in ("one", "two"))
    assert 0.1 < one < 0.97 and two == pytest.approx(one, abs=0.02)
