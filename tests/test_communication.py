"""What processes send each other is what the algorithm needs: counted calls and bytes of every rule beside a formula.

A model of L blocks has B numbers in the linear maps of its blocks and R in the rest, the root, each padded to equal shards. A step of f forward
and b backward passes over K micro-batches

    gathers           the root for every forward that a backward follows, once for all micro-batches of a pass without; a block for every
                      forward and every backward:              4 R (K b + f - b) + s B K (f + b) bytes, s bytes a number of the compute dtype
    reduces           every gradient in fp32, of every micro-batch (of the last of each pass):   4 (R + B) K b  (4 (R + B) b) bytes
    over replicas     the same for its shard, but for the ascent of scope=replica

and, once a step, the functional path with cotangent=rebuild and the logit path gather the clean head: s V D.
"""

from math import prod

import pytest
import torch

from model import GPT
from tests.ranks import BF16, DEEP, RULES

K, L = 2, DEEP.num_layers
KINDS = {"fsdp 4": 4, "hsdp 4": 2}  # and the processes that share one copy
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
    (B, R, VD), heads = sizes(KINDS[kind]), rule in CLEAN_HEAD
    roots, blocks = K * b + f - b, (K * b + f - b if kept else K * (f + b))
    times = 1 if last else K
    found = {
        "gather": (roots + L * blocks + heads, 4 * R * roots + s * B * blocks + s * VD * heads),
        "reduce_scatter": ((L + 1) * times * b, 4 * (R + B) * times * b),
    }
    if kind == "hsdp 4":
        found["over_replicas"] = (L + 1) * times * (b - ascent), 4 * (R + B) // KINDS[kind] * times * (b - ascent)
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
