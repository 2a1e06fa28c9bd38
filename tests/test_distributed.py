"""Several processes give what one gives: gloo processes under torchrun, FSDP2 and HSDP, for every rule (identities 21, 30 and 31).

What they send each other is what the algorithm needs: calls and bytes of every rule beside a formula.

A model of L blocks has B numbers in the linear maps of its blocks and R in the rest, the root, each padded to equal shards. A step of f forward
and b backward passes over K micro-batches

    gathers           the root for every forward that a backward follows, once for all micro-batches of a pass without; a block for every
                      forward and every backward:              4 R (K b + f - b) + s B K (f + b) bytes, s bytes a number of the compute dtype
    reduces           every gradient in fp32, of every micro-batch (of the last of each pass):   4 (R + B) K b  (4 (R + B) b) bytes
    over replicas     the same for its shard, but for the ascent of scope=replica

and, once a step, the functional path with cotangent=rebuild and the logit path gather the clean head: s V D.
"""

import os
import signal
import subprocess
import sys
import time
from math import prod

import pytest
import torch

from model import GPT
from tests.ranks import BF16, DEEP, REPLICA, RULES
from tests.runs import ROOT, rows, torchrun

KINDS = ("fsdp 1", "fsdp 2", "fsdp 4", "hsdp 4")
CASES = [f"{kind}: {name}" for kind in KINDS for name in [*RULES, *(f"{name}, by replica" for name in REPLICA if kind == "hsdp 4")]]


@pytest.mark.parametrize("case", CASES)
def test_processes_agree_with_one(found, case):
    fp32 = found[case]
    assert fp32["loss"] < 1e-5 and fp32["gradient"] < 1e-6 and fp32["weights"] < 1e-4, fp32
    assert fp32["metrics"] < 1e-3 and fp32["replicas"] == 0, fp32  # replicas are the same bit for bit
    assert case.startswith(("fsdp 1", "fsdp 4")) or fp32["sync"] < 1e-6, fp32
    if fp64 := found.get(f"{case}, fp64"):
        assert fp64["loss"] < 1e-13 and fp64["gradient"] < 1e-12 and fp64["weights"] < 1e-10 and fp64["sync"] < 1e-13, fp64


@pytest.mark.parametrize("rule", BF16)
def test_bf16_is_that_of_one_process_under_autocast(found, rule):
    bf16 = found[f"fsdp 2: {rule}, bf16"]  # rounding turns the move, and rules with one part further
    assert bf16["loss"] < 2e-3 and bf16["gradient"] < (5e-3 if rule == "adamw" else 5e-2) and bf16["metrics"] < 5e-2, bf16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replicas_perturbed_apart_hold_the_same_after_50_steps(found, precision):
    assert found["wandering"][precision] == 0


K, L = 2, DEEP.num_layers
COPIES = {"fsdp 4": 4, "hsdp 4": 2}  # the processes that share one copy
PASSES = {"adamw": (1, 1), "sam": (2, 2), "functional store": (2, 2), "functional rebuild": (2, 2), "logit": (3, 2), "angle": (3, 3),
          "preconditioned": (2, 2), "msam": (2, 2), "delta": (4, 2), "momentum": (1, 1), "functional along momentum": (2, 1),
          "stale": (1, 1), "gsam": (2, 2)}  # fmt: skip
CLEAN_HEAD = ("functional rebuild", "logit", "angle", "preconditioned functional", "functional along momentum")


def sizes(shards: int) -> tuple[int, int, int]:
    """B, R and V D: numbers in linear maps of blocks, in the rest, and in the head, with the padding of their shards."""
    with torch.device("meta"):
        model = GPT(DEEP)
    padded = {name: -(-p.shape[0] // shards) * shards * prod(p.shape[1:]) for name, p in model.named_parameters()}
    linear = [name for name in padded if name.startswith("blocks.") and "norm" not in name]
    return sum(padded[name] for name in linear), sum(padded.values()) - sum(padded[name] for name in linear), padded["embedding.weight"]


def expected(kind: str, rule: str, f: int, b: int, s: int = 4, last: bool = False, kept: bool = False, ascent: int = 0) -> dict[str, tuple[int, int]]:
    """Calls and bytes by kind; `ascent` backward passes stay within their replica."""
    (B, R, VD), heads = sizes(COPIES[kind]), rule in CLEAN_HEAD
    roots, blocks = K * b + f - b, (K * b + f - b if kept else K * (f + b))
    times = 1 if last else K
    found = {
        "gather": (roots + L * blocks + heads, 4 * R * roots + s * B * blocks + s * VD * heads),
        "reduce_scatter": ((L + 1) * times * b, 4 * (R + B) * times * b),
    }
    if kind == "hsdp 4":
        found["over_replicas"] = (L + 1) * times * (b - ascent), 4 * (R + B) // COPIES[kind] * times * (b - ascent)
    return found


def seen(entry: dict) -> dict[str, tuple[int, int]]:
    """What was counted, without sums of a few numbers."""
    return {kind: (entry["calls"][kind], entry["bytes"][kind]) for kind in ("gather", "reduce_scatter", "over_replicas") if kind in entry["calls"]}


@pytest.mark.parametrize(("kind", "rule"), [("fsdp 4", rule) for rule in RULES] + [("hsdp 4", rule) for rule in BF16])
def test_a_step_sends_what_its_passes_need(found, kind, rule):
    entry = found[f"{kind}: {rule}, sent"]
    f, b = entry["forwards"], entry["backwards"]
    assert (f, b) == PASSES.get(rule, (f, b))
    assert seen(entry) == expected(kind, rule, f, b)


def test_sam_sends_twice_what_adamw_sends(found):
    once, twice, groups = (found[f"fsdp 4: {rule}, sent"] for rule in ("adamw", "sam", "msam"))
    for which in ("calls", "bytes"):
        for what in ("gather", "reduce_scatter"):
            assert twice[which][what] == groups[which][what] == 2 * once[which][what]
    scalars = [(entry["calls"]["all_reduce"], entry["bytes"]["all_reduce"]) for entry in (once, twice, groups)]
    assert scalars == [(2, 8 * K + 8), (3, 8 * K + 16 + 4), (4, 8 * K + 16 + 4 * K)]  # tokens and losses in 8 bytes, |g| in 4 for each move


@pytest.mark.parametrize("rule", BF16)
@pytest.mark.parametrize(("way", "keys"), [("bf16", {"s": 2}), ("last", {"last": True}), ("kept", {"kept": True})])
def test_what_spares_traffic(found, rule, way, keys):
    """bf16 halves what blocks are gathered in; parallel.sync=last reduces once a pass; reshard_after_forward=false gathers blocks once."""
    assert seen(found[f"fsdp 4: {rule}, sent, {way}"]) == expected("fsdp 4", rule, *PASSES[rule], **keys)


@pytest.mark.parametrize("rule", ["sam", "functional rebuild"])
def test_a_replica_ascends_on_its_own(found, rule):
    f, b = PASSES[rule]
    assert seen(found[f"hsdp 4: {rule}, by replica, sent"]) == expected("hsdp 4", rule, f, b, ascent=1)


def run(world: int, *overrides: str) -> str:
    """A finished run of train.py on so many processes; what it printed."""
    process = torchrun(world, str(ROOT / "train.py"), *overrides) if world else subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope="module")
def overrides(tiny):
    """A run of a few steps that does not depend on the number of processes."""
    return [*tiny, "model.dropout=0", "precision=fp32", "optim.eps=1e-6", "batch.sequences=8", "batch.micro=2", "schedule.steps=12",
            "optim=friendly_sam", "evaluation.every=4"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, overrides):
    """The same run on one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(0, *overrides, f"dir={folder}")
    return folder


def assert_same_curve(ours: list[dict], theirs: list[dict]) -> None:
    """Losses to 1e-5, and the same steps and tokens."""
    assert [(row["step"], row["tokens"]) for row in ours] == [(row["step"], row["tokens"]) for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for key in ("train/loss", "val/loss", "sharpness/perturbed_loss", "grad/norm"):
            if other.get(key) is None:
                assert one.get(key) is None
            else:
                assert one[key] == pytest.approx(other[key], rel=1e-4 if key == "grad/norm" else 1e-5)


def test_a_run_goes_on_on_other_numbers_of_processes(tmp_path, overrides, whole):
    """4 save, 2 go on with everything on the CPU, 4 finish as 2 replicas of 2, with a signal to one process each time but the last."""
    folder = tmp_path / "run"
    for world, until, *keys in (
        (4, 3, "parallel=fsdp", "parallel.sync=last"),
        (2, 6, "parallel=fsdp", "parallel.cpu_offload=true"),
        (4, 13, "parallel=hsdp", "parallel.reshard_after_forward=false"),
    ):
        process = torchrun(world, str(ROOT / "train.py"), *overrides, f"dir={folder}", *keys, "checkpoint.every=2")
        end = time.monotonic() + 200
        if until < 12:
            while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < until:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[-1]), signal.SIGUSR1)
        out, _ = process.communicate(timeout=200)
        assert (folder / "summary.json").exists() == (until > 12), out[-3000:]
        assert process.returncode == 0 or until < 12, out[-3000:]
        assert until > 12 or ("received SIGUSR1" in out and ": saved step" in out), out[-3000:]
    assert_same_curve(rows(folder), rows(whole))


def test_one_process_may_be_sharded(tmp_path, overrides, whole):
    run(0, *overrides, "parallel=fsdp", f"dir={tmp_path}/run")
    assert_same_curve(rows(tmp_path / "run"), rows(whole))
