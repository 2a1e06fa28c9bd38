"""How the clean cotangent r comes to the moved point (optim.cotangent).

store      tokens x vocabulary in the compute dtype
rebuild    h and a log-normaliser per token, for one more product with the head
auto       store, while `cotangent_share` of the free memory allows; decided once"""

import os
from pathlib import Path

import torch
from torch import Tensor

from conf.rule import RuleConfig
from model.logits import compute_dtype
from model.sharding import all_min, gathered, local
from optim.adapter import Adapter
from optim.gradient import Gradient, MicroBatch


class CotangentStorage:
    """The way of the clean cotangents of a rule, and the memory that they are stored in.

    stores     True, or False to rebuild them, or None as long as cotangent=auto has not decided
    buffers    of each micro-batch of a group: fresh memory of this size would be paid for page by
               page"""

    def __init__(self, axes: RuleConfig, rule: Gradient) -> None:
        self.axes = axes
        self.rule = rule
        self.stores: bool | None = {"store": True, "rebuild": False}.get(axes.cotangent)
        self.buffers: dict[int, Tensor | None] = {}

    def decide(self, group: list[MicroBatch]) -> bool:
        """Returns whether the cotangents of a group are stored."""
        if self.stores is not None:
            return self.stores
        # Dense logits give r anyway.
        dense = isinstance(self.rule.model, Adapter)
        needed = 0
        if not dense:
            needed = self.size(group)
        # All processes take the same way, by the one with the least room.
        free = all_min(self.rule.module, free_memory(self.rule.device))
        self.stores = dense or needed <= self.axes.cotangent_share * free
        if not dense:
            self.rule.say(
                f"cotangent=auto takes {'store' if self.stores else 'rebuild'}:"
                f" {needed / 2**20:,.0f} MiB to store, {free / 2**20:,.0f} MiB free, of which a"
                f" share of {self.axes.cotangent_share:g} may be filled"
            )
        return self.stores

    def clean_head(self, clean_weights: dict[str, Tensor]) -> Tensor | None:
        """Returns the unembedding W(t) in the compute dtype, whole on every process, given the
        clean weights of what moved, by name; None where the model has no such tensor."""
        head: Tensor | None = getattr(self.rule.module, "unembedding", None)
        if head is None:
            return None
        # A head that moved is at t~ by now; its clean weights are in the copy for the way back.
        shard_vxD = local(head)
        for name, weights in clean_weights.items():
            if self.rule.parameters[name] is head:
                shard_vxD = weights
        shard_vxD = shard_vxD.to(self.rule.device)
        return gathered(shard_vxD.to(compute_dtype(shard_vxD)), head)

    def size(self, group: list[MicroBatch]) -> int:
        """Returns the bytes of r of a group."""
        head = self.rule.model.unembedding
        tokens = sum(micro.targets.numel() for micro in group)
        return tokens * head.shape[0] * compute_dtype(head).itemsize


def free_memory(device: torch.device) -> int:
    """Returns the bytes that a process may still take on a device: what is free there and what
    torch holds unused; on CPUs within the cgroup's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    # Pages that hold files count as taken by sysconf, though they are given up when asked for.
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    limit = read("/sys/fs/cgroup/memory.max").strip()
    used = read("/sys/fs/cgroup/memory.current").strip()
    # The limit is "max" where there is none, and the files are missing outside of a cgroup.
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return free


def read(path: str) -> str:
    """Returns the text of a file, empty where there is none."""
    return Path(path).read_text() if Path(path).exists() else ""
