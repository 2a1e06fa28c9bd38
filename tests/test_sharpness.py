"""The plain gradient: the mean over all counted tokens, however they are cut into micro-batches."""

import pytest
import torch

from model import GPT, GPTConfig
from optim import Gradient

V, T = 57, 12


def model_and_batch() -> tuple[GPT, torch.Tensor, torch.Tensor]:
    model = GPT(
        GPTConfig(V, T, 2, 2, 16, activation="swiglu", positions="rope", norm="rmsnorm")
    ).double()
    tokens = torch.randint(0, V, (4, T + 1), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = targets[2, 1] = -100
    targets[3] = -100  # a sequence without a counted token
    return model, tokens[:, :-1], targets


def gradients(model: GPT) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batching_changes_nothing(micro):
    model, tokens, targets = model_and_batch()
    total, count = model.loss(tokens, targets)
    (total / count).backward()
    expected = gradients(model)
    result = Gradient(model).gradient(
        list(zip(tokens.split(micro), targets.split(micro), strict=True))
    )
    assert result.tokens == count
    torch.testing.assert_close(result.loss.item(), (total / count).item(), rtol=1e-14, atol=0)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-16)


def test_the_mean_of_micro_batch_means_would_differ():
    """So that the test above can fail: the micro-batches count different numbers of tokens."""
    model, tokens, targets = model_and_batch()
    means = [model.loss(tokens[i : i + 1], targets[i : i + 1]) for i in range(3)]
    wrong = sum(total / count for total, count in means) / 3
    assert abs(wrong.item() - Gradient(model).gradient([(tokens, targets)]).loss.item()) > 1e-3


def test_a_sequence_without_counted_tokens_may_hold_anything():
    model, tokens, targets = model_and_batch()
    Gradient(model).gradient([(tokens, targets)])
    expected = gradients(model)
    tokens[3] = (tokens[3] + 1) % V
    Gradient(model).gradient([(tokens, targets)])
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-16)


def test_a_step_without_counted_tokens_has_no_gradient():
    model, tokens, targets = model_and_batch()
    result = Gradient(model).gradient([(tokens, torch.full_like(targets, -100))])
    assert (result.loss, result.tokens) == (0, 0)
    assert all(not g.any() for g in gradients(model))


def test_it_agrees_with_finite_differences():
    model, tokens, targets = model_and_batch()
    Gradient(model).gradient([(tokens, targets)])
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            torch._foreach_add_(parameters, direction, alpha=step)
            total, count = model.loss(tokens, targets)
            losses.append(total / count)
    assert ((losses[0] - losses[1]) / 2e-5).item() == pytest.approx(slope.item(), rel=1e-7)
