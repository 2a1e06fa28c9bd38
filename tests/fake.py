"""Processes that do not exist: torch's fake process group, whose collectives give every process
back what it gave."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.processes import Layout


@contextmanager
def fake_processes(world: int, replicas: int = 1, rank: int = 0) -> Iterator[Layout]:
    """The layout of one of so many processes, of which there is no other."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh = init_device_mesh(
            "cpu", (replicas, world // replicas), mesh_dim_names=("replica", "shard")
        )
        yield Layout(
            rank, world, mesh["shard"], mesh["replica"].get_group() if replicas > 1 else None
        )
    finally:
        torch.distributed.destroy_process_group()
