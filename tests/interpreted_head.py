"""The kernel of the head for GPUs, by Triton's interpreter on a CPU, against eager fp64.
TRITON_INTERPRET=1 must be set before Triton is imported, so tests/test_fused_head.py runs this in a
process of its own."""

import pytest
import torch

from model import chunked_head
from model.chunked_head import HeadConfig, Labels
from model.fused_head import rows_of_logits

# vocabulary, with its padding, soft-cap, z-loss
HEADS = [
    (257, 384, None, 0.0),
    (257, 384, 30.0, 1e-4),
    (5000, 5120, None, 1e-4),
    (5000, 5120, 15.0, 0.0),
    (50257, 50304, None, 0.0),
]
ROWS = 7


def problem(vocab_size, padded, softcap, z_loss, dtype):
    """Logits with something in the padding, labels of which one is not counted, and a head."""
    generator = torch.Generator().manual_seed(0)
    z = 5 * torch.randn(ROWS, padded, generator=generator)
    targets = torch.randint(vocab_size, (ROWS,), generator=generator)
    factor = torch.rand(ROWS, generator=generator)
    targets[2] = -100
    factor[2] = 0
    return z.to(dtype), Labels(targets, factor), HeadConfig(vocab_size, softcap, z_loss)


def in_fp64(z, labels, head):
    """Returns losses, log-normalisers and cotangents by the eager operations in fp64."""
    exact = z.double()
    wide = Labels(labels.targets_N, labels.factor_N.double())
    losses_N, lse_N = chunked_head.turn_into_cotangent(exact, wide, head)
    return losses_N, lse_N, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_the_kernel_computes_what_eager_operations_do(head, dtype):
    z, labels, head = problem(*head, dtype)
    losses, lse, cotangent = in_fp64(z, labels, head)
    # Of a cotangent of at most 1, as the dtype rounds it.
    tolerance = {"rtol": 0, "atol": max(2e-6, torch.finfo(dtype).eps / 2), "check_dtype": False}

    one = z.clone()
    found = rows_of_logits(one, labels, head, True)
    torch.testing.assert_close(found.losses_N, losses.float(), rtol=5e-7, atol=2e-6)
    torch.testing.assert_close(found.lse_N, lse.float(), rtol=5e-7, atol=2e-6)
    torch.testing.assert_close(one, cotangent, **tolerance)
    assert not one[:, head.vocab_size :].any() and not one[2].any()

    looked_at = z.clone()
    only = rows_of_logits(looked_at, labels, head, False)
    assert torch.equal(only.losses_N, found.losses_N) and torch.equal(looked_at, z)

    rebuilt = z.clone()
    rows_of_logits(rebuilt, labels, head, True, lse.float())
    torch.testing.assert_close(rebuilt, cotangent, **tolerance)


def test_large_logits_overflow_nowhere():
    z, labels, head = problem(257, 384, None, 0.0, torch.float32)
    z *= 1e4
    losses, _, cotangent = in_fp64(z, labels, head)
    found = rows_of_logits(z, labels, head, True)
    torch.testing.assert_close(found.losses_N, losses.float(), rtol=5e-7, atol=0)
    torch.testing.assert_close(z, cotangent.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    """The rule finds by the loss that a step is not finite."""
    z, labels, head = problem(257, 384, None, 0.0, torch.float32)
    z[1, 5] = bad
    found = rows_of_logits(z, labels, head, True)
    assert found.losses_N[1].isnan()
    assert found.losses_N[[0, 2, 3]].isfinite().all()


def test_a_row_of_another_place_is_read_there():
    """A chunk may be part of a larger tensor."""
    z, labels, head = problem(257, 384, None, 0.0, torch.float32)
    wide = torch.zeros(ROWS, 512)
    wide[:, :384] = z
    found = rows_of_logits(wide[:, :384], labels, head, True)
    torch.testing.assert_close(found, rows_of_logits(z, labels, head, True), rtol=0, atol=0)
    assert torch.equal(wide[:, :384], z) and not wide[:, 384:].any()


def test_targets_may_be_a_column_of_a_larger_tensor():
    """The kernel reads them by their place in memory, one after the other."""
    z, labels, head = problem(257, 384, None, 0.0, torch.float32)
    targets = torch.stack([labels.targets_N, labels.targets_N.flip(0)], 1)[:, 0]
    factor = torch.stack([labels.factor_N, labels.factor_N.flip(0)], 1)[:, 0]
    assert targets.stride() == factor.stride() == (2,)
    strided = z.clone()
    found = rows_of_logits(strided, Labels(targets, factor), head, True)
    torch.testing.assert_close(found, rows_of_logits(z, labels, head, True), rtol=0, atol=0)
    assert torch.equal(strided, z)


@pytest.mark.parametrize("target", [257, 383, 384, 10**6, -1])
def test_a_target_outside_of_the_vocabulary_makes_the_loss_nan(target):
    """Eager operations raise; a kernel cannot, and would read the padding, or the next row."""
    z, labels, head = problem(257, 384, 30.0, 1e-4, torch.float32)
    labels.targets_N[1] = target
    found = rows_of_logits(z, labels, head, True)
    assert found.losses_N[1].isnan()
    assert found.losses_N[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("softcap, z_loss", [(None, 0.0), (30.0, 1e-4)])
def test_every_path_through_the_head_goes_by_the_kernel(softcap, z_loss, monkeypatch):
    """Losses, a stored and a rebuilt cotangent, and weights of instances."""
    generator = torch.Generator().manual_seed(0)
    head = HeadConfig(257, softcap, z_loss)
    h, W = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (12, 384))
    targets = torch.randint(257, (12,), generator=generator)

    def all_paths(dtype):
        labels = Labels(targets, torch.full((12,), 0.1, dtype=dtype))
        here = chunked_head.Point(h.to(dtype), W.to(dtype))
        there = chunked_head.Point(here.h_NxD.flip(0), here.weight_VxD.flip(0))
        r_NxV = torch.empty(12, 384, dtype=dtype)
        weights = chunked_head.InstanceWeights.of(
            targets.view(3, 4), lambda which, means: means / means.sum(), labels
        )
        of_rows = chunked_head.losses(here, labels, head)
        stored = chunked_head.losses(here, labels, head, r_NxV)
        _, weighted = chunked_head.losses_and_gradients(here, there, labels, head, weights=weights)
        rebuilt = chunked_head.rebuilt_products(here, there, labels, head, of_rows.lse_N)
        return [*of_rows, *stored, r_NxV, *weighted, *rebuilt]

    exact = all_paths(torch.float64)

    def refuse(*_):
        raise AssertionError("eager operations on logits that a kernel takes")

    monkeypatch.setattr(chunked_head, "is_fused", lambda z: True)
    monkeypatch.setattr(chunked_head, "capped_logits", refuse)
    found = all_paths(torch.float32)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
