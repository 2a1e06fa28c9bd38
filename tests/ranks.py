"""What several processes find out together, run under torchrun by test_distributed.py: every rule, sharded, beside one process.

    torchrun --nproc-per-node N tests/ranks.py OUT.json

Each entry of the file is one comparison: the largest relative difference of losses, of first-step gradients by tensor, and of weights
after some steps, in fp32 and, on two processes, in fp64 too. The batch is cut unevenly over shards: no dimension is a multiple of the
number of processes, and the processes count different numbers of targets.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from conf.schema import OptimConfig
from model import GPT, GPTConfig
from model.parallelize import shard
from model.sharding import Layout, is_sharded
from optim import Gradient, SharpnessAware, build_optimizer

STEPS = {2: 10, 4: 3}  # by the number of processes: four on two cores wait for each other
TIED = GPTConfig(40, 8, 1, 3, 18)
UNTIED = GPTConfig(40, 8, 1, 3, 18, norm="rmsnorm", positions="rope", activation="swiglu", tied=False, logit_softcap=20.0, z_loss=1e-3)
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
    "stale": {"direction": "stale"},
    "friendly": {"direction": "friendly"},
    "friendly in groups": {"direction": "friendly", "scope": "micro_batch"},
    "random": {"direction": "random"},
    "look": {"combine": "reuse", "period": 2},
    "gsam": {"combine": "orthogonal"},
    "head only": {"parameters": "head"},
}
REPLICA = ("sam", "functional rebuild", "logit", "angle", "preconditioned", "delta", "friendly", "gsam")


def make(shape: GPTConfig, dtype: torch.dtype, axes: dict[str, Any], layout: Layout) -> tuple[GPT, torch.optim.Optimizer, Gradient]:
    """A model, sharded where the layout says so, its optimiser and its rule."""
    torch.manual_seed(3)
    with torch.device("meta"):
        model = GPT(shape).to(dtype)
    if layout.mesh is not None:
        shard(model, layout, reshard_after_forward=True)
    model.to_empty(device="cpu")
    model.init_weights(0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, eps=1e-6))
    return model, optimizer, SharpnessAware(model, optimizer, **axes) if axes else Gradient(model)


def full(tensor: Any) -> torch.Tensor:
    """The whole of a tensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def difference(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 difference of tensors by name; a bias of keys has no gradient but rounding, and there is none here."""
    return max(float((one - others[name]).norm() / others[name].norm().clamp_min(1e-12)) for name, one in ones.items())


def compare(shape: GPTConfig, axes: dict[str, Any], layout: Layout, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """One process on the whole batch beside all processes on their parts of it."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = make(shape, dtype, axes, layout), make(shape, dtype, reference_axes(axes), Layout())
    found = {"loss": 0.0, "gradient": 0.0, "weights": 0.0, "metrics": 0.0}
    for step in range(steps):
        tokens_BxT = torch.randint(0, 40, (8, 8), generator=generator)
        targets_BxT = torch.randint(0, 40, (8, 8), generator=generator)
        targets_BxT[0, :5] = targets_BxT[3] = targets_BxT[5, 2:] = -100
        micros = list(zip(tokens_BxT.split(4), targets_BxT.split(4), strict=True))
        part = 4 // layout.world
        mine = [tuple(half[layout.rank * part : (layout.rank + 1) * part] for half in micro) for micro in micros]
        whole: Any = micros
        if axes.get("scope") == "replica":  # a group is what a replica has of the batch
            size = 4 // 2
            whole = [[tuple(half[r * size : (r + 1) * size] for half in micro) for micro in micros] for r in range(2)]
        results = [rule.gradient(batches) for (_, _, rule), batches in ((ours, mine), (theirs, whole))]
        assert results[0].tokens == results[1].tokens
        for name in ("loss", "perturbed_loss"):
            one, other = (getattr(result, name) for result in results)
            assert (one is None) == (other is None)
            if other is not None:
                found["loss"] = max(found["loss"], abs(float(one) - float(other)) / abs(float(other)))
        if step == 0:
            gradients = [{name: full(p.grad) for name, p in model.named_parameters()} for model, _, _ in (ours, theirs)]
            found["gradient"] = difference(*gradients)
        for _, optimizer, _ in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert layout.mesh is None or all(isinstance(p, DTensor) for p in ours[0].parameters())  # nothing stays gathered
    weights = [{name: full(p.detach()) for name, p in model.named_parameters()} for model, _, _ in (ours, theirs)]
    found["weights"] = difference(*weights)
    return found


def reference_axes(axes: dict[str, Any]) -> dict[str, Any]:
    """The axes that mean the same on one process: replicas are groups."""
    return axes | {"scope": "micro_batch"} if axes.get("scope") == "replica" else axes


def main(out: str) -> None:
    """Compares everything and writes what came of it."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    layouts = {"fsdp": Layout(rank, world, init_device_mesh("cpu", (world,)))}
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        layouts["hsdp"] = Layout(rank, world, mesh["shard"], mesh["replica"].get_group())
    found: dict[str, dict[str, float]] = {}
    for kind, layout in layouts.items():
        cases = dict(RULES)
        if kind == "hsdp":
            cases |= {f"{name}, by replica": RULES[name] | {"scope": "replica"} for name in REPLICA}
        for name, axes in cases.items():
            shape = UNTIED if len(found) % 3 == 2 else TIED
            found[f"{kind} {world}: {name}"] = compare(shape, axes, layout, torch.float32, STEPS[world])
            if world == 2:
                found[f"{kind} {world}: {name}, fp64"] = compare(TIED if shape is UNTIED else UNTIED, axes, layout, torch.float64, 2)
    if rank == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
