"""Prepares a model that was built for training: compilation, activation checkpointing, sharding, in
this order."""

import os
import shutil
import sys
from typing import Any

import torch
from torch import nn

from model.device import missing_for_kernels
from model.gpt import GPT
from model.processes import Layout
from model.sharding import sharded_modules


def parallelize(
    model: GPT, compile: str, checkpoint_activations: bool, device: torch.device
) -> None:
    """Changes the model in place; its parameters keep their names. Without a compiler the model
    stays eager, with a notice.

    Args:
        model: before it is sharded
        compile: none; block: each block on its own, so that L blocks share one compilation; whole:
            the body as one graph; auto: block on CUDA, none on CPUs, where compiling was not found
            to pay (tests/benchmarks/results/cpu.md)
        checkpoint_activations: a block keeps its input only and runs its forward again in the
            backward
        device: where the model will run
    """
    model.checkpoint_activations = checkpoint_activations
    if compile == "auto":
        compile = "block" if device.type == "cuda" else "none"
    missing = missing_for_compilation(device)
    if compile != "none" and missing:
        print(
            f"note: compile={compile}, but there is no {', no '.join(missing)} here; running"
            " eagerly",
            file=sys.stderr,
        )
        compile = "none"
    options = compile_options(model, device) if compile != "none" else {}
    if compile == "block":
        for block in model.blocks:
            block.compile(**options)
    elif compile == "whole":
        # The loop over chunks of the head stays outside of the graph.
        model.hidden = torch.compile(model.hidden, **options)  # type: ignore[method-assign]


def compile_options(model: GPT, device: torch.device) -> dict[str, Any]:
    """Returns the arguments of torch.compile for a model on a kind of device."""
    if device.type != "cuda" or model.config.dropout == 0:
        return {}
    from torch._inductor import config

    # By default torch 2.13 draws a dropout mask by one of two functions, whichever suits the shape
    # of a kernel: the backward may draw another mask than the forward (pytorch issue 198333), and a
    # moved pass another than the clean one. Aligned with eager there is one function.
    if not hasattr(config, "align_random_eager"):
        return {}
    return {"options": {"align_random_eager": True}}


def shard(
    model: GPT,
    layout: Layout,
    reshard_after_forward: bool,
    compute: torch.dtype | None = None,
    cpu_offload: bool = False,
) -> None:
    """Shards the model by FSDP2 over the shards of a layout: the linear maps of each block on their
    own and the rest as the root, so that one block at a time is gathered. Among replicas (HSDP) the
    sums of gradients are added up once each replica has its own.

    It is the last of all changes to the model. Weights on the meta device stay there, to be
    materialised (on the CPU with `cpu_offload`) and drawn shard by shard.

    Args:
        model: what is sharded
        layout: the processes; it becomes the model's
        reshard_after_forward: False keeps gathered blocks for the backward: less communication,
            more memory
        compute: the dtype of a caller's autocast, in which blocks are gathered then (see
            `shard_blocks`); passes in IEEE fp32 need None
        cpu_offload: keeps shards, their gradients and so the optimiser's state on the CPU
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    offload = offload_policy(layout, cpu_offload)
    norms = norms_of_blocks(model)
    shard_blocks(model, layout, norms, reshard_after_forward, compute, offload)
    model.norms_of_blocks = norms  # for the root to find them: it does not look into blocks
    fully_shard(model, mesh=layout.mesh, offload_policy=offload)
    del model.norms_of_blocks
    register_fsdp_forward_method(model, "lazy_logits")
    model.layout = layout
    if layout.replicas is not None:
        for module in sharded_modules(model):
            module.set_all_reduce_hook(layout.sum_over_replicas)


def shard_blocks(
    model: GPT,
    layout: Layout,
    norms: nn.ModuleList,
    reshard_after_forward: bool,
    compute: torch.dtype | None,
    offload: Any,
) -> None:
    """Shards the linear maps of each block.

    Autocast would cast exactly these weights to its dtype, so they are gathered in it, while
    gradients are reduced in fp32. The root, gathered once a forward, stays in fp32 as under
    autocast: norms, whose perturbation bf16 would round away, and tables, whose gradients are sums
    over tokens. So a sharded run computes what one process does."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gradients are added up in fp32 in any case: sums over processes in bf16 would lose small ones.
    reduce = torch.float32 if compute else None
    precision = MixedPrecisionPolicy(compute, reduce, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(
            block,
            mesh=layout.mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=precision,
            offload_policy=offload,
            ignored_params=set(norms.parameters()),
        )


def norms_of_blocks(model: GPT) -> nn.ModuleList:
    """Returns the norms of all blocks, those of q and k among them."""
    norms = nn.ModuleList()
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                norms.append(module)
    return norms


def offload_policy(layout: Layout, cpu_offload: bool) -> Any:
    """Returns where FSDP2 keeps shards: where they are computed with, or on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if not cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=layout.mesh.device_type == "cuda")


def missing_for_compilation(device: torch.device) -> list[str]:
    """Returns what torch.compile needs for a kind of device and this machine lacks."""
    if device.type == "cuda":
        return missing_for_kernels()
    if has_compiler():
        return []
    return ["C++ compiler"]


def has_compiler() -> bool:
    """Returns whether inductor would find a C++ compiler."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
