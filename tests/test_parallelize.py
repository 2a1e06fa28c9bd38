"""Compiling changes no number beyond rounding, and a machine without a compiler runs on."""

import pytest
import torch

from model import GPT, GPTConfig
from model.parallelize import has_compiler, parallelize

SHAPE = GPTConfig(40, 16, 2, 2, 16)
CPU = torch.device("cpu")


def gradients(model: GPT) -> list[torch.Tensor]:
    tokens = torch.arange(32).view(2, 16)
    model.zero_grad()
    model.loss(tokens, tokens)[0].backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("compile", ["block", "whole"])
def test_a_compiled_model_has_the_same_gradient_and_names(compile):
    expected, names = gradients(GPT(SHAPE)), list(GPT(SHAPE).state_dict())
    model = GPT(SHAPE)
    parallelize(model, compile, checkpoint_activations=False, device=CPU)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it really compiled


def test_auto_leaves_a_cpu_eager(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: pytest.fail("compiled"))
    monkeypatch.setattr(torch, "compile", lambda function: pytest.fail("compiled"))
    parallelize(GPT(SHAPE), "auto", checkpoint_activations=False, device=CPU)


def test_without_a_compiler_it_stays_eager_with_a_notice(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not has_compiler()
    test_auto_leaves_a_cpu_eager(monkeypatch)
    parallelize(GPT(SHAPE), "block", checkpoint_activations=True, device=CPU)
    assert (
        capsys.readouterr().err
        == "note: compile=block, but there is no C++ compiler here; running eagerly\n"
    )
