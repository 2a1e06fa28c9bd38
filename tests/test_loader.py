import time

import numpy as np
import pytest
import torch

from data.loader import IGNORED, PERIOD, Loader, Prefetcher, Validation, mix, permute, shares
from tests.test_shards import make_tokens, numbered

N, T = 1003, 16
W = (N - T) // T


@pytest.fixture
def counting(tmp_path):
    """A stream whose token i is i, over several shards."""
    return make_tokens(tmp_path / "counting", np.arange(N), [100, 1, 500])


def starts(loader: Loader, steps: range) -> np.ndarray:
    """The first token of every sequence of the steps."""
    return np.concatenate([loader.batch(step)[0][:, 0].numpy() for step in steps])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_permutes(size):
    images = [permute(np.arange(size), size, mix(key)).tolist() for key in range(20)]
    assert all(sorted(image) == list(range(size)) for image in images)
    if size > 10:
        assert len({tuple(image) for image in images}) == 20
    keys = mix(np.arange(size) % 2)
    both = permute(np.arange(size), size, keys)  # elementwise keys
    assert [images[index % 2][index] for index in range(size)] == both.tolist()


def test_permute_has_no_visible_order():
    size = 10000
    image = permute(np.arange(size), size, mix(7))
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
    firsts = [int(permute(np.array([0]), 8, mix(key))[0]) for key in range(4000)]
    assert np.bincount(firsts, minlength=8) == pytest.approx(500, abs=110)
    assert permute(np.array([5]), 10**12, mix(1))[0] < 10**12  # costs neither memory nor time


def test_windows_are_those_of_the_token_stream(counting):
    loader = Loader({"text": counting}, None, T, 7, seed=1)
    for step in (0, 3, 1000):
        tokens, targets = loader.batch(step)
        assert (
            tokens.shape == targets.shape == (7, T) and tokens.dtype == targets.dtype == torch.int64
        )
        assert tokens.is_contiguous() and targets.is_contiguous()
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(T)) and torch.equal(
            targets, tokens + 1
        )


def test_an_epoch_repeats_nothing_and_the_next_is_another(counting):
    loader = Loader({"text": counting}, None, T, W, seed=0)  # a step is an epoch
    epochs = [starts(loader, range(step, step + 1)) for step in range(12)]
    assert len({tuple(epoch) for epoch in epochs}) == 12
    offsets = []
    for epoch in epochs:
        assert len(set(epoch.tolist())) == W
        # one stride from one offset: no token is an input twice
        assert len(set((epoch % T).tolist())) == 1
        assert epoch.tolist() != sorted(epoch.tolist())
        offsets.append(int(epoch.min()))
    assert all(0 <= offset < T for offset in offsets) and len(set(offsets)) > 3
    ranks = [tuple((epoch // T).tolist()) for epoch in epochs]
    assert len(set(ranks)) == 12


def test_epochs_need_not_end_with_a_step(counting):
    wide, narrow = (Loader({"text": counting}, None, T, sequences, seed=3) for sequences in (W, 1))
    np.testing.assert_array_equal(starts(wide, range(3)), starts(narrow, range(3 * W)))


def test_a_batch_is_a_function_of_seed_and_step(counting):
    loader = Loader({"text": counting}, None, T, 8, seed=5)
    later = [loader.batch(step)[0] for step in (9, 2, 9)]
    assert torch.equal(later[0], later[2]) and torch.equal(
        later[0], Loader({"text": counting}, None, T, 8, seed=5).batch(9)[0]
    )
    assert not torch.equal(later[0], later[1]) and not torch.equal(
        later[0], Loader({"text": counting}, None, T, 8, seed=6).batch(9)[0]
    )


@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 2.5}])
def test_any_cut_of_the_rows_gives_the_same_batch(counting, tmp_path, weights):
    sources = (
        {"a": counting}
        if weights is None
        else {"a": counting, "b": make_tokens(tmp_path / "b", np.arange(N) + 5000, [300])}
    )
    loader = Loader(sources, weights, T, 24, seed=0)
    for step in (0, 41, 42, 43):  # 1024 sequences end in step 42
        tokens, targets = loader.batch(step)
        for size in (1, 5, 8, 24):
            parts = [loader.batch(step, slice(first, first + size)) for first in range(0, 24, size)]
            assert torch.equal(torch.cat([part[0] for part in parts]), tokens)
            assert torch.equal(torch.cat([part[1] for part in parts]), targets)
        assert torch.equal(loader.batch(step, slice(1, 24, 4))[0], tokens[1::4])


def test_starting_late_costs_nothing(counting):
    loader = Loader({"text": counting}, None, T, 8, seed=0)
    assert loader.batch(10**12)[0].shape == (8, T)  # whoever counted up to there would not end


@pytest.mark.parametrize("length", [T, N // 2 + 1, N - 1])
def test_short_corpora_down_to_one_window(counting, length):
    loader = Loader({"text": counting}, None, length, 4, seed=0)
    tokens, targets = loader.batch(0)
    assert tokens.shape == (4, length) and torch.equal(targets, tokens + 1)
    assert len(set(starts(loader, range(30)).tolist())) > (3 if length < N - 1 else 0)


def test_too_short_a_corpus_is_refused(counting):
    with pytest.raises(
        ValueError,
        match=r"batch.length=1003 needs 1004 tokens but the source text has 1003; shorten it",
    ):
        Loader({"text": counting}, None, N, 4, seed=0)


def test_shares_are_exact_and_by_largest_remainder():
    assert shares({"a": 1, "b": 1, "c": 1}).tolist() == [342, 341, 341]
    assert shares({"a": 3.0, "b": 1.0}).tolist() == [768, 256]
    assert shares({"a": 7.0}).tolist() == [1024]
    assert shares({"a": 0.7, "b": 0.2, "c": 0.1}).sum() == PERIOD
    with pytest.raises(
        ValueError, match=r"data.sources.b.weight=0.0001 is less than 1/1024 of all; raise it"
    ):
        shares({"a": 1.0, "b": 0.0001})


def test_weighted_sources_run_through_their_own_epochs(counting, tmp_path):
    small = make_tokens(tmp_path / "small", np.arange(200) + 10000, [])
    loader = Loader({"big": counting, "small": small}, {"big": 3.0, "small": 1.0}, T, 64, seed=0)
    alone = {
        name: Loader({name: tokens}, None, T, 1, seed=0)
        for name, tokens in (("big", counting), ("small", small))
    }
    first = starts(loader, range(16 * 3))  # three periods
    for period in np.split(first, 3):
        assert (period >= 10000).sum() == PERIOD // 4
    orders = [np.flatnonzero(period >= 10000).tolist() for period in np.split(first, 3)]
    # mixed, and another way each time
    assert orders[0] != orders[1] and np.diff(orders[0]).max() < 60
    own = first[first >= 10000] - 10000
    num_windows = (200 - T) // T
    for epoch in range(len(own) // num_windows):
        seen = own[epoch * num_windows : (epoch + 1) * num_windows]
        assert len(set(seen.tolist())) == num_windows and len(set((seen % T).tolist())) == 1
    # The first source has the order that it would have alone.
    np.testing.assert_array_equal(
        first[first < 10000], starts(alone["big"], range((first < 10000).sum()))
    )


def test_prefetched_batches_are_the_loaders(counting):
    loader = Loader({"text": counting}, None, T, 8, seed=0)
    prefetcher = Prefetcher(loader, step=5, rows=slice(2, 6))
    for step in range(5, 15):
        for got, expected in zip(prefetcher.next(), loader.batch(step, slice(2, 6)), strict=True):
            assert torch.equal(got, expected)
    assert prefetcher.seconds_waiting > 0
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


class Slow:
    """A loader that takes its time, and breaks at step 3."""

    def batch(self, step, rows):
        if step == 3:
            raise OSError("disk gone")
        time.sleep(0.05)
        return torch.tensor([step]), torch.tensor([step])


def test_waiting_is_counted_and_trouble_surfaces():
    prefetcher = Prefetcher(Slow())
    assert [int(prefetcher.next()[0]) for _ in range(3)] == [0, 1, 2]
    assert 0.1 < prefetcher.seconds_waiting < 1.0
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            prefetcher.next()
    prefetcher.close()
    prefetcher = Prefetcher(Slow())
    time.sleep(0.2)
    waited = prefetcher.seconds_waiting
    prefetcher.next()
    assert prefetcher.seconds_waiting - waited < 0.04  # it was ready
    prefetcher.close()


@pytest.mark.parametrize(
    ("num_tokens", "size"), [(N, 5), (2, 5), (T, 1), (T + 1, 3), (T + 2, 3), (10 * T + 1, 4)]
)
def test_validation_counts_every_token_but_the_first_once(tmp_path, num_tokens, size):
    tokenizer = numbered(60000)
    stream = np.random.default_rng(0).integers(0, 59000, num_tokens)
    validation = Validation(make_tokens(tmp_path, stream, [num_tokens // 2]), T, tokenizer)
    batches = list(validation.batches(size))
    assert (
        len({batch[0].shape for batch in batches}) == 1
        and batches[0][0].shape[1] == T
        and batches[0][0].shape[0] <= size
    )
    inputs, targets = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
    counted = targets != IGNORED
    assert (
        targets[counted].tolist() == stream[1:].tolist()
        and inputs[counted].tolist() == stream[:-1].tolist()
    )
    assert validation.num_tokens == counted.sum() == num_tokens - 1
    assert validation.num_bytes == 3 * (num_tokens - 1)
    again = list(validation.batches(size))
    assert all(
        torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        for one, two in zip(batches, again, strict=True)
    )


def test_limited_validation_is_spread_over_the_set(tmp_path):
    stream = np.arange(T * 1000)
    tokenizer = numbered(60000)
    validation = Validation(make_tokens(tmp_path, stream, []), T, tokenizer, max_tokens=10 * T + 5)
    firsts = torch.cat([inputs[:, 0] for inputs, _ in validation.batches(10)])
    assert firsts.tolist() == [100 * T * index for index in range(10)]
    assert validation.num_tokens == 10 * T and validation.num_bytes == 30 * T
    assert (
        Validation(validation.source, T, tokenizer, max_tokens=10**9).num_tokens == len(stream) - 1
    )
    assert Validation(validation.source, T, tokenizer, max_tokens=1).num_tokens == T


def test_bytes_of_end_of_text_are_none(tmp_path):
    tokenizer = numbered(60000)
    validation = Validation(
        make_tokens(tmp_path, np.array([5, tokenizer.eot, 6, tokenizer.eot]), []), T, tokenizer
    )
    assert (validation.num_tokens, validation.num_bytes) == (3, 3)


def test_a_validation_set_needs_two_tokens(tmp_path):
    with pytest.raises(
        ValueError, match="a validation set of 1 tokens has no next token to predict"
    ):
        Validation(make_tokens(tmp_path, np.array([1]), []), T, numbered(60000))
