"""What is done to a model between building it and training it: compilation, activation checkpointing. In this order sharding follows."""

import os
import shutil
import sys

import torch

from model.gpt import GPT


def parallelize(model: GPT, compile: str, checkpoint_activations: bool, device: torch.device) -> None:
    """Changes the model in place; its parameters keep their names.

    compile     none; block: each block on its own, so that L blocks share one compilation; whole: the body as one graph;
                auto: block on CUDA, none on CPUs, where compiling was not found to pay (tests/benchmarks/results/cpu.md)
    checkpoint_activations     a block keeps its input only and runs its forward again in the backward

    Without a C++ compiler on a CPU the model stays eager, with a notice."""
    model.checkpoint_activations = checkpoint_activations
    if compile == "auto":
        compile = "block" if device.type == "cuda" else "none"
    if compile != "none" and device.type == "cpu" and not has_compiler():
        print(f"note: compile={compile}, but there is no C++ compiler here; running eagerly", file=sys.stderr)
        compile = "none"
    if compile == "block":
        for block in model.blocks:
            block.compile()
    elif compile == "whole":
        model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]


def has_compiler() -> bool:
    """Whether inductor would find a C++ compiler."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
