"""What is done to a model between building it and training it: compilation, activation
checkpointing, sharding, in this order."""

import os
import shutil
import sys

import torch
from torch import nn

from model.gpt import GPT
from model.processes import Layout
from model.sharding import sharded_modules


def parallelize(
    model: GPT, compile: str, checkpoint_activations: bool, device: torch.device
) -> None:
    """Changes the model in place; its parameters keep their names.

    compile     none; block: each block on its own, so that L blocks share one compilation; whole:
                the body as one graph;
                auto: block on CUDA, none on CPUs, where compiling was not found to pay
                (tests/benchmarks/results/cpu.md)
    checkpoint_activations     a block keeps its input only and runs its forward again in the
                               backward

    Without a C++ compiler on a CPU the model stays eager, with a notice."""
    model.checkpoint_activations = checkpoint_activations
    if compile == "auto":
        compile = "block" if device.type == "cuda" else "none"
    if compile != "none" and device.type == "cpu" and not has_compiler():
        print(
            f"note: compile={compile}, but there is no C++ compiler here; running eagerly",
            file=sys.stderr,
        )
        compile = "none"
    if compile == "block":
        for block in model.blocks:
            block.compile()
    elif compile == "whole":
        model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]


def shard(
    model: GPT,
    layout: Layout,
    reshard_after_forward: bool,
    compute: torch.dtype | None = None,
    cpu_offload: bool = False,
) -> None:
    """Shards the model by FSDP2 over the shards of a layout: the linear maps of each block on their
    own and the rest as the root, so that one block at a time is gathered. Among replicas (HSDP) the
    sums of gradients are added up once each replica has its own. The last of all changes to the
    model; weights on the meta device stay there, to be materialised (on the CPU with `cpu_offload`)
    and drawn shard by shard.

    reshard_after_forward=False    keeps gathered blocks for the backward: less communication, more
                                   memory
    compute                        the dtype of a caller's autocast, in which blocks are gathered
                                   then: autocast would cast exactly these
                                   weights to it. Gradients are reduced in fp32. The root, gathered
                                   once a forward, stays in fp32 as under
                                   autocast: norms, whose perturbation bf16 would round away, and
                                   tables, whose gradients are sums over
                                   tokens. So a sharded run computes what one process does. IEEE
                                   fp32 passes need None
    cpu_offload                    keeps shards, their gradients and so the optimiser's state on the
                                   CPU"""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    offload = (
        CPUOffloadPolicy(pin_memory=layout.mesh.device_type == "cuda")
        if cpu_offload
        else OffloadPolicy()
    )
    policy = MixedPrecisionPolicy(
        compute, torch.float32 if compute else None, cast_forward_inputs=False
    )
    norms = nn.ModuleList(
        module
        for block in model.blocks
        for module in block.modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    )
    for block in model.blocks:
        fully_shard(
            block,
            mesh=layout.mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=set(norms.parameters()),
        )
    model.norms_of_blocks = norms  # for the root to find them: it does not look into blocks
    fully_shard(model, mesh=layout.mesh, offload_policy=offload)
    del model.norms_of_blocks
    register_fsdp_forward_method(model, "lazy_logits")
    model.layout = layout
    if layout.replicas is not None:
        for module in sharded_modules(model):
            module.set_all_reduce_hook(layout.sum_over_replicas)


def has_compiler() -> bool:
    """Whether inductor would find a C++ compiler."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
