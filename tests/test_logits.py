"""The lazy loss is the dense one: in value, in every gradient, for every chunk size, and without
tokens x vocabulary."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig, chunked_head
from model.logits import IGNORED, LazyLogits
from optim.adapter import DenseLogits, cross_entropy, is_counted

N, D, V = 37, 16, 101
PADDED = 128


def place(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, W with padded rows, and targets of which some are not counted."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (1, N), generator=generator)
    targets[:, ::5] = IGNORED
    return h, weight, targets


def dense_loss(h, weight, targets, softcap=None, z_loss=0.0):
    z = F.linear(h, weight)[0, :, :V]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    counted = targets[0] != IGNORED
    return (
        F.cross_entropy(z, targets[0], ignore_index=IGNORED, reduction="sum")
        + z_loss * (z.logsumexp(1).square() * counted).sum()
    )


@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 3.0}, {"z_loss": 0.1}, {"softcap": 2.0, "z_loss": 0.3}]
)
@pytest.mark.parametrize(
    ("chunk", "block"), [(2**20, 2**20), (PADDED * 10, PADDED * 3), (PADDED, PADDED)]
)
def test_value_and_gradients_are_those_of_the_dense_loss(monkeypatch, settings, chunk, block):
    monkeypatch.setitem(chunked_head.CHUNK_ELEMENTS, "cpu", chunk)
    monkeypatch.setitem(chunked_head.BLOCK_ELEMENTS, "cpu", block)
    h, weight, targets = place()
    total, count = LazyLogits(h, weight, V, **settings).cross_entropy(targets, scale=0.25)
    found = torch.autograd.grad(total, (h, weight))
    expected = dense_loss(h, weight, targets, **settings) * 0.25
    assert count == (targets != IGNORED).sum()
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (h, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_instance_weights_enter_the_gradient_alone():
    """Of lazy and of dense logits alike: loss and r are without them, as Functional-SAM on top of
    weighted instances needs r."""
    h, weight, _ = place()
    h = h.detach()[:, :36].view(4, 9, D).requires_grad_()
    targets = place()[2][:, :36].view(4, 9)

    def mean_losses(which: slice, losses_b: torch.Tensor) -> torch.Tensor:
        return losses_b

    both = {
        "lazy": LazyLogits(h, weight, V),
        "dense": DenseLogits(LazyLogits(h, weight, V).dense(), cross_entropy, is_counted),
    }
    found = {}
    for name, logits in both.items():
        total, kept = logits.cross_entropy_and_cotangent(
            targets, 0.5, keep_r=True, weighting=mean_losses
        )
        plain_total, plain = logits.cross_entropy_and_cotangent(targets, 0.5, keep_r=True)
        assert torch.equal(total, plain_total) and torch.equal(kept.r_NxV, plain.r_NxV)
        gradients = torch.autograd.grad(total, (h, weight), retain_graph=True)
        assert not torch.allclose(gradients[0], torch.autograd.grad(plain_total, h)[0])
        found[name] = [total, kept.weights_B, kept.r_NxV.view(36, -1)[:, :V], *gradients]
    for ours, theirs in zip(found["lazy"], found["dense"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_the_gradient_is_scaled_by_what_follows_the_loss():
    h, weight, targets = place()
    once = torch.autograd.grad(LazyLogits(h, weight, V).cross_entropy(targets)[0], (h, weight))
    thrice = torch.autograd.grad(
        3 * LazyLogits(h, weight, V).cross_entropy(targets)[0], (h, weight)
    )
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-14, atol=0)


def test_labels_that_are_not_counted_change_nothing():
    h, weight, targets = place()
    targets[:] = IGNORED
    total, count = LazyLogits(h, weight, V).cross_entropy(targets)
    assert total == 0 and count == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, (h, weight)))


def test_what_stands_at_uncounted_positions_changes_nothing():
    h, weight, targets = place()
    other = h.detach().where(targets[..., None] != IGNORED, 50.0).requires_grad_()
    found = []
    for hidden in (h, other):
        total, _ = LazyLogits(hidden, weight, V, z_loss=0.1).cross_entropy(targets)
        found.append([total, *torch.autograd.grad(total, (hidden, weight))])
    assert all(map(torch.equal, *found))
    assert not found[0][1][targets == IGNORED].any()


def test_gradients_agree_with_finite_differences():
    h, weight, targets = place()
    h, targets = h[:, :6].detach().requires_grad_(), targets[:, :6]
    assert torch.autograd.gradcheck(
        lambda *at: LazyLogits(*at, V, softcap=3.0, z_loss=0.1).cross_entropy(targets)[0],
        (h, weight),
        fast_mode=True,
    )


def test_padded_rows_change_nothing_and_get_no_gradient():
    h, weight, targets = place()
    first = LazyLogits(h, weight, V).cross_entropy(targets)[0]
    with torch.no_grad():
        weight[V:] = 1e6
    second = LazyLogits(h, weight, V)
    assert torch.equal(first, second.cross_entropy(targets)[0])
    assert second.dense().shape == (1, N, V)
    dh, dW = torch.autograd.grad(second.cross_entropy(targets)[0], (h, weight))
    assert not dW[V:].any() and dh.abs().max() < 1e3


def test_no_graph_means_no_gradients():
    h, weight, targets = place()
    with torch.no_grad():
        total, _ = LazyLogits(h, weight, V).cross_entropy(targets)
    torch.testing.assert_close(total, dense_loss(h, weight, targets).detach(), rtol=1e-13, atol=0)


def test_bf16_autocast_keeps_loss_and_gradient():
    h, weight, targets = place(torch.float32)
    exact = LazyLogits(h, weight, V).cross_entropy(targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = LazyLogits(h, weight, V).cross_entropy(targets)[0]
    assert rounded.dtype == torch.float32
    # it did round
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2) and rounded != exact
    for a, b in zip(
        torch.autograd.grad(exact, (h, weight)),
        torch.autograd.grad(rounded, (h, weight)),
        strict=True,
    ):
        assert b.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_bf16_autocast_keeps_the_models_gradient():
    model = GPT(GPTConfig(V, max_length=32, num_layers=2, num_heads=2, width=64))
    tokens = torch.randint(0, V, (4, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        found.append(
            (
                total,
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]
                ),
            )
        )
    (exact, theirs), (rounded, ours) = found
    assert rounded.item() == pytest.approx(exact.item(), rel=5e-3) and rounded != exact
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.999


def test_bf16_losses_are_summed_in_fp32(monkeypatch):
    """Equal logits lose log V nats a token; a sum in bf16 would stop growing at 256 of them."""
    monkeypatch.setitem(chunked_head.CHUNK_ELEMENTS, "cpu", PADDED)
    h, weight = (
        torch.zeros(1, 1000, D, dtype=torch.bfloat16),
        torch.zeros(PADDED, D, dtype=torch.bfloat16),
    )
    total, _ = LazyLogits(h, weight, V).cross_entropy(torch.zeros(1, 1000, dtype=torch.long))
    assert total.dtype == torch.float32 and total.item() == pytest.approx(
        1000 * math.log(V), rel=1e-4
    )


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_tensor_of_tokens_by_vocabulary_is_ever_made(monkeypatch):
    monkeypatch.setitem(chunked_head.CHUNK_ELEMENTS, "cpu", 2**14)
    monkeypatch.setitem(chunked_head.BLOCK_ELEMENTS, "cpu", 2**12)
    model = GPT(GPTConfig(vocab_size=2000, max_length=128, num_layers=1, num_heads=1, width=8))
    tokens = torch.randint(0, 2000, (4, 129))
    with Largest() as largest:
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert largest.elements < 4 * 128 * 2000 / 8
    with Largest() as largest:
        model(tokens[:, :-1])
    assert largest.elements >= 4 * 128 * 2000  # so that the measure can fail


@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0, "z_loss": 0.3}])
def test_second_derivatives_are_those_of_the_dense_loss(settings):
    h, weight, targets = place()
    v = [
        torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=tensor.dtype)
        for tensor in (h, weight)
    ]

    def hessian_product(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradient = torch.autograd.grad(loss, (h, weight), create_graph=True)
        return torch.autograd.grad(
            sum((g * u).sum() for g, u in zip(gradient, v, strict=True)), (h, weight)
        )

    ours = hessian_product(
        LazyLogits(h, weight, V, **settings).cross_entropy(targets, scale=0.5)[0] * 3
    )
    for a, b in zip(
        ours, hessian_product(dense_loss(h, weight, targets, **settings) * 1.5), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_second_derivatives_under_torch_func():
    h, weight, targets = place()

    def lazy(weight: torch.Tensor) -> torch.Tensor:
        return LazyLogits(h.detach(), weight, V).cross_entropy(targets)[0]

    def dense(weight: torch.Tensor) -> torch.Tensor:
        return dense_loss(h.detach(), weight, targets)

    w, u = weight.detach(), torch.ones_like(weight)
    ours, theirs = (
        torch.func.grad(lambda w, f=f: (torch.func.grad(f)(w) * u).sum())(w) for f in (lazy, dense)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
