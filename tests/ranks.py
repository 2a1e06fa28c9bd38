"""What several processes find out together, run under torchrun by the fixture `found`: every rule, sharded, beside one process.

    torchrun --nproc-per-node N tests/ranks.py OUT.json

Each entry of the file is one comparison: the largest relative difference of losses, of first-step gradients by tensor, and of weights
after some steps, in fp32, and on two processes in fp64 and for some rules in bf16 too; on four what they sent each other. The weights are
cut unevenly over shards: no dimension is a multiple of the number of processes, and the processes count different numbers of targets.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import OptimConfig
from model import GPT, GPTConfig
from model.parallelize import shard
from model.sharding import Layout, is_sharded, local
from optim import Gradient, SharpnessAware, build_optimizer

STEPS = 10
TIED = GPTConfig(40, 8, 1, 3, 18)
UNTIED = GPTConfig(40, 8, 1, 3, 18, norm="rmsnorm", positions="rope", activation="swiglu", tied=False, logit_softcap=20.0, z_loss=1e-3)
DEEP = GPTConfig(40, 8, 2, 3, 18, bias=True, qk_norm=True)
RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sam": {"path": "full"},
    "functional store": {"path": "functional", "cotangent": "store"},
    "functional rebuild": {"path": "functional", "cotangent": "rebuild"},
    "logit": {"path": "logit"},
    "angle": {"path": "angle", "angle": 30.0, "cotangent": "rebuild"},
    "preconditioned": {"metric": "adam"},
    "preconditioned functional": {"path": "functional", "metric": "adam", "cotangent": "rebuild"},
    "asam": {"metric": "adaptive", "rho": 0.2},
    "msam": {"scope": "micro_batch"},
    "msam, preconditioned functional every second step": {"path": "functional", "metric": "adam", "scope": "micro_batch", "period": 2},
    "delta": {"weights": "delta"},
    "momentum": {"direction": "momentum", "rho": 0.5},
    "functional along momentum": {"path": "functional", "direction": "momentum", "rho": 0.5, "cotangent": "rebuild"},  # looks, and moves then
    "stale": {"direction": "stale"},
    "friendly": {"direction": "friendly"},
    "friendly in groups": {"direction": "friendly", "scope": "micro_batch"},
    "random": {"direction": "random"},
    "look": {"combine": "reuse", "period": 2},
    "gsam": {"combine": "orthogonal"},
    "head only": {"parameters": "head"},
}
REPLICA = ("sam", "functional rebuild", "logit", "angle", "preconditioned", "delta", "friendly", "gsam")
BF16 = ("adamw", "sam", "functional rebuild")
SHARDING = {"bf16": {"compute": torch.bfloat16}, "last": {}, "kept": {"reshard_after_forward": False}}


UNLIKE = {f"logits/{name}" for name in ("entropy", "log_normaliser", "largest", "hidden_norm", "weight_norm")}  # of a process's own tokens
HIDDEN = {"sharpness/curvature", "sharpness/gap"}  # differences that rounding to bf16 hides


def make(shape: GPTConfig, dtype: torch.dtype, axes: dict[str, Any], layout: Layout, **sharding: Any) -> tuple[GPT, torch.optim.Optimizer, Gradient]:
    """A model, sharded where the layout says so, its optimiser and its rule."""
    torch.manual_seed(3)
    with torch.device("meta"):
        model = GPT(shape).to(dtype)
    if layout.mesh is not None:
        shard(model, layout, **({"reshard_after_forward": True} | sharding))
    model.to_empty(device="cpu")
    model.init_weights(0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, eps=1e-6))
    return model, optimizer, SharpnessAware(model, optimizer, **axes) if axes else Gradient(model)


def batch(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Two micro-batches of four sequences, which count different numbers of targets."""
    tokens_BxT, targets_BxT = torch.randint(0, 40, (2, 8, 8), generator=generator)
    targets_BxT[0, :5] = targets_BxT[3] = targets_BxT[5, 2:] = -100
    return list(zip(tokens_BxT.split(4), targets_BxT.split(4), strict=True))


def part(micros: list[tuple[Tensor, Tensor]], index: int, parts: int) -> list[Any]:
    """One of so many equal parts of every micro-batch."""
    return [tuple(half.chunk(parts)[index] for half in micro) for micro in micros]


def whole(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The full tensors."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone() for name, tensor in tensors.items() if tensor is not None}


def gradients(model: GPT) -> dict[str, Tensor]:
    """Every p.grad as a full tensor."""
    return whole({name: p.grad for name, p in model.named_parameters()})


@torch.no_grad()
def difference(ones: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest relative L2 difference of tensors by name; a bias of keys has no gradient but rounding, and there is none here."""
    assert ones.keys() == others.keys()
    return max(float((one - others[name]).norm() / others[name].norm().clamp_min(1e-12)) for name, one in ones.items())


def compare(shape: GPTConfig, axes: dict[str, Any], layout: Layout, dtype: torch.dtype, steps: int, **sharding: Any) -> dict[str, float]:
    """All processes on their parts of the batch beside the main one on the whole of it. After two steps a batch without groups comes in one."""
    generator = torch.Generator().manual_seed(1)
    model, optimizer, rule = make(shape, dtype, axes, layout, **sharding)
    theirs = make(shape, dtype, reference_axes(axes), Layout()) if layout.main else None
    found = dict.fromkeys(("loss", "gradient", "metrics", "weights"), 0.0)
    for step in range(steps):
        micros = batch(generator)
        if axes.get("scope") == "replica" and step == 1:
            for _, targets_BxT in micros:
                targets_BxT[2:] = -100  # one replica counts none
        if step >= 2 and axes.get("scope") != "micro_batch":
            micros = [(torch.cat(tokens), torch.cat(targets)) for tokens, targets in [zip(*micros, strict=True)]]
        with torch.autocast("cpu", torch.bfloat16, enabled="compute" in sharding):
            result, expected = rule.gradient(part(micros, layout.rank, layout.world), logged=step < 2), None
            if theirs:  # where replicas are perturbed apart, a group is what a replica has of the batch
                parts = [part(micros, r, 2) for r in range(2)] if axes.get("scope") == "replica" else micros
                expected = theirs[2].gradient(parts, logged=step < 2)
        first = gradients(model) if step == 0 else {}
        if expected and theirs:
            assert result.tokens == expected.tokens
            found["gradient"] = found["gradient"] if step else difference(first, gradients(theirs[0]))
            for name in ("loss", "perturbed_loss"):
                one, other = getattr(result, name), getattr(expected, name)
                assert (one is None) == (other is None)
                found["loss"] = max(found["loss"], 0.0 if one is None else abs(float(one) - float(other)) / abs(float(other)))
            for name in expected.metrics.keys() - UNLIKE - (HIDDEN if "compute" in sharding else set()):
                one, other = (float(seen.metrics[name]) for seen in (result, expected))
                found["metrics"] = max(found["metrics"], abs(one - other) / max(abs(other), 1e-3))
        for stepping in (optimizer, *([theirs[1]] if theirs else [])):
            stepping.step()
            stepping.zero_grad()
        assert all(is_sharded(p) and p.dtype == dtype for p in model.parameters())  # nothing stays gathered
    weights = whole(dict(model.named_parameters()))
    if theirs:
        found["weights"] = difference(weights, whole(dict(theirs[0].named_parameters())))
    return found | {"replicas": apart(model, layout)}


def synchronised(shape: GPTConfig, axes: dict[str, Any], layout: Layout, dtype: torch.dtype, steps: int) -> float:
    """The largest relative difference of gradients by tensor where they are summed over the processes at the last micro-batch of a pass only."""
    generator = torch.Generator().manual_seed(1)
    every, last = (make(shape, dtype, axes, replace(layout, sync=sync)) for sync in ("every", "last"))
    found = 0.0
    for _ in range(steps):
        mine = part(batch(generator), layout.rank, layout.world)
        for _, _, rule in (every, last):
            rule.gradient(mine, logged=False)
        found = max(found, difference(gradients(last[0]), gradients(every[0])))
        for p, q in zip(every[0].parameters(), last[0].parameters(), strict=True):
            local(q.grad).copy_(local(p.grad))  # the same step for both
        for _, optimizer, _ in (every, last):
            optimizer.step()
            optimizer.zero_grad()
    return found


def wandering(layout: Layout, steps: int, **sharding: Any) -> float:
    """How many shards replicas hold that are not the same bit for bit, after so many steps of SAM, each perturbed on its own."""
    generator = torch.Generator().manual_seed(1)
    model, optimizer, rule = make(TIED, torch.float32, RULES["sam"] | {"scope": "replica"}, layout, **sharding)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled="compute" in sharding):
            rule.gradient(part(batch(generator)[:1], layout.rank, layout.world), logged=False)
        optimizer.step()
        optimizer.zero_grad()
    return apart(model, layout)


def apart(model: GPT, layout: Layout) -> float:
    """How many shards are not, bit for bit, those of the first replica, over all processes."""
    shards = [local(p) for p in model.parameters()]
    copies = [shard.clone() for shard in shards]
    if layout.replicas is not None:
        for copy in copies:
            dist.broadcast(copy, group=layout.replicas, group_src=0)
    number = torch.tensor(sum(not shard.equal(copy) for shard, copy in zip(shards, copies, strict=True)))
    dist.all_reduce(number)
    return float(number)


def reference_axes(axes: dict[str, Any]) -> dict[str, Any]:
    """The axes that mean the same on one process: replicas are groups."""
    return axes | {"scope": "micro_batch"} if axes.get("scope") == "replica" else axes


COLLECTIVES = {"_allgather_base_": "gather", "all_gather_into_tensor": "gather", "_reduce_scatter_base_": "reduce_scatter",
               "allreduce_": "all_reduce", "allgather_": "objects"}  # fmt: skip


class Collectives(TorchDispatchMode):
    """Counts what a process sends and receives, by kind and group: `calls`, and the `bytes` of the whole tensors, gathered or yet to be
    reduced."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.calls, self.bytes, self.layout = Counter(), Counter(), layout

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the collectives it takes come back here
        out, (space, name) = func(*args, **(kwargs or {})), func._schema.name.split("::")
        if space == "c10d" or (space == "_c10d_functional" and name in COLLECTIVES):
            kind = COLLECTIVES[name]
            tensors = {"gather": [args[0] if space == "c10d" else out], "reduce_scatter": [args[1]], "all_reduce": args[0], "objects": args[1]}[kind]
            if kind == "all_reduce" and self.layout.replicas and dist.ProcessGroup.unbox(args[1]).group_name == self.layout.replicas.group_name:
                kind = "over_replicas"
            self.calls[kind] += 1
            self.bytes[kind] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return out


def sent(axes: dict[str, Any], layout: Layout, **sharding: Any) -> dict[str, Any]:
    """What a process sends in a step of a rule, with the passes that it counts; of two micro-batches, no metrics logged."""
    generator = torch.Generator().manual_seed(1)
    _, optimizer, rule = make(DEEP, torch.float32, axes, layout, **sharding)
    for _ in range(1 + (axes.get("direction") in ("momentum", "stale"))):  # they move from the second step on
        mine = part(batch(generator), layout.rank, layout.world)
        with torch.autocast("cpu", torch.bfloat16, enabled="compute" in sharding), Collectives(layout) as seen:
            result = rule.gradient(mine, logged=False)
        optimizer.step()
        optimizer.zero_grad()
    return {"calls": seen.calls, "bytes": seen.bytes, "forwards": result.forwards, "backwards": result.backwards}


def main(out: str) -> None:
    """Compares everything and writes what came of it."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    layouts = {"fsdp": Layout(rank, world, init_device_mesh("cpu", (world,)))}
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        layouts["hsdp"] = Layout(rank, world, mesh["shard"], mesh["replica"].get_group())
    found: dict[str, dict[str, Any]] = {}
    for kind, layout in layouts.items():
        cases = dict(RULES)
        if kind == "hsdp":
            cases |= {f"{name}, by replica": RULES[name] | {"scope": "replica"} for name in REPLICA}
        for turn, (name, axes) in enumerate(cases.items()):
            shape, other = (UNTIED, TIED) if turn % 3 == 2 else (TIED, UNTIED)
            case = f"{kind} {world}: {name}"
            found[case] = compare(shape, axes, layout, torch.float32, STEPS, reshard_after_forward=world < 4)
            if world == 2 or kind == "hsdp":
                found[case]["sync"] = synchronised(shape, axes, layout, torch.float32, 1)
            if world == 2:
                found[f"{case}, fp64"] = compare(other, axes, layout, torch.float64, 2)
                found[f"{case}, fp64"]["sync"] = synchronised(other, axes, layout, torch.float64, 2)
            if world == 2 and name in BF16:
                found[f"{case}, bf16"] = compare(DEEP, axes, layout, torch.float32, 2, compute=torch.bfloat16, cpu_offload=name == "sam")
            if world == 4 and (kind == "fsdp" or name.split(",")[0] in BF16):
                found[f"{case}, sent"] = sent(axes, layout)
            if world == 4 and kind == "fsdp" and name in BF16:
                for way, sharding in SHARDING.items():
                    found[f"{case}, sent, {way}"] = sent(axes, replace(layout, sync="last" if way == "last" else "every"), **sharding)
        if kind == "hsdp":
            found["wandering"] = {"fp32": wandering(layout, 50), "bf16": wandering(layout, 50, compute=torch.bfloat16)}
    if rank == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
