"""Every size of the ladder over 8, 64 and 512 processes that do not exist: it composes, is built
and sharded without memory, and each process holds its share."""

from math import prod

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from launch.config import compose
from launch.plan.memory_passes import parameter_counts
from launch.plan.plan import changed, make_plan
from model import GPT
from model.parallelize import shard
from tests.fake import fake_processes
from tests.runs import ROOT

SIZES = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))
# processes, replicas among them, and the one that is looked at
LAYOUTS = [
    (8, 1, 0),
    (64, 1, 63),
    (512, 1, 0),
    (512, 8, 511),
]


def rows(size: int, shards: int, shard: int) -> int:
    """Rows of a tensor in a shard: equal ones but for the last ones, which may be empty."""
    share = -(-size // shards)
    return min(share, max(0, size - shard * share))


@pytest.mark.parametrize("size", SIZES)
def test_every_process_holds_its_share(size):
    composed = compose(
        [
            f"model={size}",
            "parallel=hsdp",
            "parallel.processes=512",
            "plan_only=true",
            "batch.sequences=512",
            "device=cpu",
        ]
    )
    for world, replicas, rank in LAYOUTS:
        shards = world // replicas
        plan = make_plan(
            changed(composed, {"parallel.processes": world, "parallel.replicas": replicas})
        )
        assert plan.micro == 512 // world
        with torch.device("meta"):
            model = GPT(plan.model)
        whole = {name: p.shape for name, p in model.named_parameters()}
        with fake_processes(world, replicas, rank) as layout:
            shard(model, layout, reshard_after_forward=True, compute=torch.bfloat16)
        assert isinstance(model, FSDPModule) and all(
            isinstance(block, FSDPModule) for block in model.blocks
        )
        for name, parameter in model.named_parameters():
            first, *rest = whole[name]
            assert parameter.is_meta and parameter.shape == whole[name]
            assert tuple(parameter.to_local().shape) == (rows(first, shards, rank % shards), *rest)
            assert sum(rows(first, shards, other) for other in range(shards)) == first
        if rank == 0:  # no process holds more
            numbers = sum(p.to_local().numel() for p in model.parameters())
            assert numbers == parameter_counts(plan.model, "all", shards).shard
            assert numbers >= sum(map(prod, whole.values())) / shards
