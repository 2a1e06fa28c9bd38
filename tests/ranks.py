"""What 1, 2 and 4 processes find out together, run by the fixture `found`: every rule, sharded,
beside one process.

    python tests/ranks.py FOLDER

Each entry of FOLDER/1.json, 2.json and 4.json is one comparison: the largest relative difference of
losses, of first- and second-step gradients by tensor, and of weights after some steps, in fp32, on
two processes in fp64 and for some rules in bf16 too; or what they sent each other; or what four
make of a mistake that one of them alone makes. The weights are cut unevenly over shards, and the
processes count different numbers of targets."""

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from conf.rule import OptimConfig
from launch.checkpoint.replicated import refuse_divergence
from model import GPT, GPTConfig
from model.device import seed_everything
from model.parallelize import shard
from model.processes import Layout
from model.sharding import full_norm, is_sharded, local
from optim import Gradient, SharpnessAware, build_optimizer
from optim.adamw import state_tensors

STEPS = 10
TIED = GPTConfig(40, 8, 1, 3, 18)
UNTIED = GPTConfig(
    40,
    8,
    1,
    3,
    18,
    norm="rmsnorm",
    positions="rope",
    activation="swiglu",
    tied=False,
    logit_softcap=20.0,
    z_loss=1e-3,
)
DEEP = GPTConfig(41, 8, 2, 3, 21, bias=True, qk_norm=True)
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
    "msam, preconditioned functional every second step": {
        "path": "functional",
        "metric": "adam",
        "scope": "micro_batch",
        "period": 2,
    },
    "delta": {"weights": "delta"},
    "momentum": {"direction": "momentum", "rho": 0.5},
    "functional along momentum": {
        "path": "functional",
        "direction": "momentum",
        "rho": 0.5,
        "cotangent": "rebuild",
    },  # looks, and moves then
    "stale": {"direction": "stale"},
    "friendly": {"direction": "friendly"},
    "friendly in groups": {"direction": "friendly", "scope": "micro_batch"},
    "random": {"direction": "random"},
    "look": {"combine": "reuse", "period": 2},
    "gsam": {"combine": "orthogonal"},
    "head only": {"parameters": "head"},
    "on a part": {"ascent_fraction": 0.3},
    "functional on a part": {"path": "functional", "ascent_fraction": 0.6, "cotangent": "rebuild"},
    "delta on a part": {"weights": "delta", "ascent_fraction": 0.7},
    "msam on a part": {"scope": "micro_batch", "ascent_fraction": 0.4},
}
REPLICA = (
    "sam",
    "functional rebuild",
    "logit",
    "angle",
    "preconditioned",
    "delta",
    "friendly",
    "gsam",
    "on a part",
)
BF16 = ("adamw", "sam", "functional rebuild")
SHARDING = {
    "bf16": {"compute": torch.bfloat16},
    "last": {},
    "kept": {"reshard_after_forward": False},
}
# compared where every process has a whole copy
COPIES = (
    "adamw",
    "sam",
    "functional rebuild",
    "sam, by replica",
)
RECOMPUTED = ("sam", "functional rebuild")  # compared with activation checkpointing
BAD = (
    ("adamw", "first"),
    ("sam", "first"),
    ("functional rebuild", "moved"),
    ("sam, by replica", "first"),
    ("friendly, by replica", "moved"),
)

# of a process's own tokens
UNLIKE = {
    f"logits/{name}"
    for name in ("entropy", "log_normaliser", "largest", "hidden_norm", "weight_norm")
}
HIDDEN = {"sharpness/curvature", "sharpness/gap"}  # differences that rounding to bf16 hides


def axes_of(name: str) -> dict[str, Any]:
    """Of a rule, with another scope after "by"."""
    rule, _, scope = name.partition(", by ")
    return RULES[rule] | ({"scope": scope} if scope else {})


def make(
    shape: GPTConfig,
    dtype: torch.dtype,
    axes: dict[str, Any],
    layout: Layout,
    recomputed: bool = False,
    **sharding: Any,
) -> tuple[GPT, torch.optim.Optimizer, Gradient]:
    """A model, sharded where the layout says so, its optimiser and its rule, in a process seeded as
    those of a run are."""
    seed_everything(3, layout.rank, deterministic=False)
    with torch.device("meta"):
        model = GPT(shape).to(dtype)
    model.checkpoint_activations = recomputed
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


def whole(tensors: dict[str, Tensor | None], layout: Layout) -> dict[str, Tensor]:
    """The full tensors, on the main process only; in one message of each process, where DTensors
    would send one for each tensor."""
    shards: list[Any] = [
        {name: local(tensor).clone() for name, tensor in tensors.items() if tensor is not None}
    ]
    if layout.mesh is not None:
        mine, shards = shards[0], [None] * layout.world
        dist.gather_object(mine, shards if layout.main else None)
        shards = shards[: layout.mesh.size()] if layout.main else [{}]  # of the first replica
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def gradients(model: GPT, layout: Layout) -> dict[str, Tensor]:
    """Every p.grad as a full tensor."""
    return whole({name: p.grad for name, p in model.named_parameters()}, layout)


@torch.no_grad()
def difference(ones: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest relative L2 difference of tensors by name; a bias of keys has no gradient but
    rounding, and there is none here."""
    assert ones.keys() == others.keys()
    return max(
        float((one - others[name]).norm() / others[name].norm().clamp_min(1e-12))
        for name, one in ones.items()
    )


def compare(
    shape: GPTConfig,
    axes: dict[str, Any],
    layout: Layout,
    dtype: torch.dtype,
    steps: int,
    **sharding: Any,
) -> dict[str, float]:
    """All processes on their parts of the batch beside the main one on the whole of it. Gradients
    are added up over the processes at every micro-batch, or in every second step at the last of a
    pass; from the fourth step on a batch without groups comes in one."""
    generator, layout = torch.Generator().manual_seed(1), replace(layout)
    model, optimizer, rule = make(shape, dtype, axes, layout, **sharding)
    theirs = make(shape, dtype, reference_axes(axes), Layout()) if layout.main else None
    found = dict.fromkeys(("loss", "metrics", "weights"), 0.0)
    for step in range(steps):
        micros, layout.sync = batch(generator), ("every", "last")[step % 2]
        if axes.get("scope") == "replica" and step == 1:
            for _, targets_BxT in micros:
                targets_BxT[2:] = -100  # one replica counts none
        if step >= 3 and axes.get("scope") != "micro_batch":
            micros = [
                (torch.cat(tokens), torch.cat(targets))
                for tokens, targets in [zip(*micros, strict=True)]
            ]
        with torch.autocast("cpu", torch.bfloat16, enabled="compute" in sharding):
            result, expected = (
                rule.gradient(part(micros, layout.rank, layout.world), logged=step < 2),
                None,
            )
            if (
                theirs
            ):  # where replicas are perturbed apart, a group is what a replica has of the batch
                parts = (
                    [part(micros, r, 2) for r in range(2)]
                    if axes.get("scope") == "replica"
                    else micros
                )
                expected = theirs[2].gradient(parts, logged=step < 2)
        ours = gradients(model, layout) if step < 2 else {}
        if expected and theirs:
            assert result.tokens == expected.tokens
            spent = [(seen.forwards, seen.backwards) for seen in (result, expected)]
            # a part of the batch is the same part on any processes
            assert axes.get("scope") == "replica" or math.dist(*spent) < 1e-9, spent
            found |= (
                {f"gradient, {layout.sync}": difference(ours, gradients(theirs[0], Layout()))}
                if ours
                else {}
            )
            for name in ("loss", "perturbed_loss"):
                one, other = getattr(result, name), getattr(expected, name)
                assert (one is None) == (other is None)
                found["loss"] = max(
                    found["loss"],
                    0.0 if one is None else abs(float(one) - float(other)) / abs(float(other)),
                )
            for name in (
                expected.metrics.keys() - UNLIKE - (HIDDEN if "compute" in sharding else set())
            ):
                one, other = (float(seen.metrics[name]) for seen in (result, expected))
                found["metrics"] = max(found["metrics"], abs(one - other) / max(abs(other), 1e-3))
        for stepping in (optimizer, *([theirs[1]] if theirs else [])):
            stepping.step()
            stepping.zero_grad()
        # nothing stays gathered
        assert all(is_sharded(p) and p.dtype == dtype for p in model.parameters())
    weights = whole(dict(model.named_parameters()), layout)
    if theirs:
        found["weights"] = difference(weights, whole(dict(theirs[0].named_parameters()), Layout()))
    return found | {"replicas": apart(model, optimizer, rule, layout)}


def wandering(layout: Layout, steps: int, **sharding: Any) -> float:
    """How many bytes replicas do not hold alike after so many steps of SAM, each perturbed on its
    own."""
    generator = torch.Generator().manual_seed(1)
    model, optimizer, rule = make(
        TIED, torch.float32, axes_of("sam, by replica"), layout, **sharding
    )
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled="compute" in sharding):
            rule.gradient(part(batch(generator)[:1], layout.rank, layout.world), logged=False)
        optimizer.step()
        optimizer.zero_grad()
    return apart(model, optimizer, rule, layout)


def held(model: GPT, optimizer: torch.optim.Optimizer, rule: Gradient) -> list[Tensor]:
    """What this process holds of weights, optimiser and rule, but for the number of its step."""
    memory = [tensor for name, tensor in rule.state_dict().items() if "/" in name]
    return [
        local(tensor)
        for tensor in (*model.parameters(), *state_tensors(model, optimizer).values(), *memory)
    ]


def apart(model: GPT, optimizer: torch.optim.Optimizer, rule: Gradient, layout: Layout) -> float:
    """How many bytes of these are not those of the first replica, over all processes."""
    ours = torch.cat(
        [tensor.reshape(-1).view(torch.uint8) for tensor in held(model, optimizer, rule)]
    )
    first = ours.clone()
    if layout.replicas is not None:
        dist.broadcast(first, group=layout.replicas, group_src=0)
    number = (ours != first).sum()
    dist.all_reduce(number)
    return float(number)


def reference_axes(axes: dict[str, Any]) -> dict[str, Any]:
    """The axes that mean the same on one process: replicas are groups."""
    return axes | {"scope": "micro_batch"} if axes.get("scope") == "replica" else axes


def skipped(name: str, bad: str, layout: Layout) -> dict[str, Any]:
    """What this process makes of three steps, in the second of which the last one alone computes
    numbers that are none, in the first pass or in the moved one: whether the rule found it finite,
    whether the step was taken by the criterion of train.py, and whether all is as before."""
    generator, now = torch.Generator().manual_seed(1), {"step": 0, "forwards": 0}
    state = model, optimizer, rule = make(
        TIED, torch.float32, axes_of(name), layout, reshard_after_forward=True
    )

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        now["forwards"] += 1
        first = now["forwards"] <= 2  # of the micro-batches
        return output * math.nan if now["step"] == 1 and first == (bad == "first") else output

    if layout.rank == layout.world - 1:
        model.blocks[0].register_forward_hook(spoil)
    found: dict[str, Any] = {"finite": [], "taken": [], "same": []}
    for step in range(3):
        now |= {"step": step, "forwards": 0}
        before = [tensor.clone() for tensor in held(*state)]
        result = rule.gradient(part(batch(generator), layout.rank, layout.world), logged=False)
        norm = full_norm(clip_grad_norm_(model.parameters(), 1.0)) if result.finite else math.nan
        seen = result.perturbed_loss if result.loss is None else result.loss
        if taken := seen is not None and math.isfinite(seen.item()) and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        found["finite"].append(result.finite)
        found["taken"].append(taken)
        found["same"].append(
            len(before) == len(held(*state)) and all(map(torch.equal, before, held(*state)))
        )
    return found | {"replicas": apart(*state, layout)}


def diverged(layout: Layout) -> dict[str, str]:
    """What this process says where the last one holds another bit than its replica, of a weight, of
    the optimiser or of the rule."""
    state = model, optimizer, rule = make(
        TIED, torch.float32, RULES["friendly"], layout, reshard_after_forward=True
    )
    rule.gradient(
        part(batch(torch.Generator().manual_seed(1)), layout.rank, layout.world), logged=False
    )
    optimizer.step()
    found, tensors = {}, held(*state)
    for what, place in {
        "nothing": 0,
        "weight": 0,
        "optimizer": len([*model.parameters()]),
        "rule": -1,
    }.items():
        number, bit = (
            tensors[place].view(-1)[:1].view(torch.int32),
            what != "nothing" and layout.rank == layout.world - 1,
        )
        number ^= bit
        try:
            refuse_divergence(layout, {}, *state)
            found[what] = ""
        except ValueError as error:
            found[what] = str(error)
        number ^= bit
    return found


COLLECTIVES = {
    "_allgather_base_": "gather",
    "all_gather_into_tensor": "gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allgather_": "objects",
}


class Collectives(TorchDispatchMode):
    """Counts what a process sends and receives, by kind and group: `calls`, and the `bytes` of the
    whole tensors, gathered or yet to be reduced."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.calls, self.bytes, self.layout = Counter(), Counter(), layout

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the collectives it takes come back here
        out, (space, name) = func(*args, **(kwargs or {})), func._schema.name.split("::")
        if space == "c10d" or (space == "_c10d_functional" and name in COLLECTIVES):
            kind = COLLECTIVES[name]
            tensors = {
                "gather": [args[0] if space == "c10d" else out],
                "reduce_scatter": [args[1]],
                "all_reduce": args[0],
                "objects": args[1],
            }[kind]
            if (
                kind == "all_reduce"
                and self.layout.replicas
                and dist.ProcessGroup.unbox(args[1]).group_name == self.layout.replicas.group_name
            ):
                kind = "over_replicas"
            self.calls[kind] += 1
            self.bytes[kind] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return out


def sent(axes: dict[str, Any], layout: Layout, **sharding: Any) -> dict[str, Any]:
    """What a process sends in a step of a rule, with the passes that it counts; of two
    micro-batches, no metrics logged."""
    generator = torch.Generator().manual_seed(1)
    _, optimizer, rule = make(DEEP, torch.float32, axes, layout, **sharding)
    for _ in range(
        1 + (axes.get("direction") in ("momentum", "stale"))
    ):  # they move from the second step on
        mine = part(batch(generator), layout.rank, layout.world)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled="compute" in sharding),
            Collectives(layout) as seen,
        ):
            result = rule.gradient(mine, logged=False)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "calls": seen.calls,
        "bytes": seen.bytes,
        "forwards": result.forwards,
        "backwards": result.backwards,
    }


def layouts_of(rank: int, world: int) -> dict[str, Layout]:
    """How so many processes may share the work."""
    layouts = {"fsdp": Layout(rank, world, init_device_mesh("cpu", (world,)))}
    if world > 1:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard"))
        layouts["hsdp" if world > 2 else "replicas"] = Layout(
            rank, world, mesh["shard"], mesh["replica"].get_group()
        )
    return layouts


def find_out(rank: int, world: int, folder: Path) -> None:
    """Compares everything, as one of so many processes, of which the first writes what came of
    it."""
    patience = timedelta(minutes=2)  # with others that do something else
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{world}.store",
        rank=rank,
        world_size=world,
        timeout=patience,
    )
    found: dict[str, Any] = {}
    for kind, layout in layouts_of(rank, world).items():
        for turn, name in enumerate(cases_of(kind)):
            shape, other = (UNTIED, TIED) if turn % 3 == 2 else (TIED, UNTIED)
            case, axes = f"{kind} {world}: {name}", axes_of(name)
            found[case] = compare(
                shape, axes, layout, torch.float32, STEPS, reshard_after_forward=world < 4
            )
            if (kind, world) == ("fsdp", 2):
                found[f"{case}, fp64"] = compare(other, axes, layout, torch.float64, 2)
            if (kind, world) == ("fsdp", 2) or (kind == "hsdp" and name.split(",")[0] in BF16):
                found[f"{case}, sent"] = sent(axes, layout)
            if (kind, world) == ("fsdp", 2) and name in BF16:
                found[f"{case}, bf16"] = compare(
                    DEEP,
                    axes,
                    layout,
                    torch.float32,
                    2,
                    compute=torch.bfloat16,
                    cpu_offload=name == "sam",
                )
                found[f"{case}, bf16 of fp32"] = compare(
                    DEEP, axes, layout, torch.float32, 2, compute=None
                )
                for way, sharding in SHARDING.items():
                    found[f"{case}, sent, {way}"] = sent(
                        axes, replace(layout, sync="last" if way == "last" else "every"), **sharding
                    )
            if (kind, world) == ("fsdp", 2) and name in RECOMPUTED:
                found[f"{case}, recomputed"] = compare(
                    DEEP, axes, layout, torch.float64, 2, recomputed=True
                )
        if kind == "hsdp":
            found["wandering"] = {
                "fp32": wandering(layout, 50),
                "bf16": wandering(layout, 50, compute=torch.bfloat16),
            }
            found["skipped"] = {
                f"{name}, {bad}": layout.all_gather(skipped(name, bad, layout)) for name, bad in BAD
            }
            found["diverged"] = layout.all_gather(diverged(layout))
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def cases_of(kind: str) -> tuple[str, ...]:
    """The rules that are compared, each beside one process."""
    return (
        COPIES
        if kind == "replicas"
        else (*RULES, *(f"{name}, by replica" for name in REPLICA if kind == "hsdp"))
    )


if __name__ == "__main__":
    # Makes torch import what it imports late: the processes are forks of this one, which must not
    # have started a thread.
    make(TIED, torch.float32, {}, Layout())
    for number in (1, 2, 4):
        torch.multiprocessing.start_processes(
            find_out, (number, Path(sys.argv[1])), nprocs=number, start_method="fork"
        )
