import math
import tracemalloc
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from data import Validation, baselines, training_sample, unigram_bigram
from tests.test_shards import make_tokens, numbered


def brute_force(train: list[int], vocab_size: int):
    """p1(w) and p2(w, h) with dictionaries, as the equations stand."""
    counts, followers = Counter(train), defaultdict(Counter)
    for head, word in pairwise(train):
        followers[head][word] += 1

    def unigram(word):
        return (counts[word] + 1) / (len(train) + vocab_size)

    def bigram(word, head):
        num_types, num_tokens = len(followers[head]), sum(followers[head].values())
        return (
            (followers[head][word] + num_types * unigram(word)) / (num_tokens + num_types)
            if num_types
            else unigram(word)
        )

    return unigram, bigram


def skewed(generator, size: int, vocab_size: int) -> np.ndarray:
    return np.minimum(
        generator.geometric(0.1, size) + generator.integers(0, 2, size), vocab_size - 1
    )


@pytest.mark.parametrize("num_validation", [2, 3, 50, 801])
def test_equal_to_dictionaries_on_the_pairs_of_validation(tmp_path, num_validation):
    generator = np.random.default_rng(num_validation)
    vocab_size = 60
    train, held_out = (
        skewed(generator, 2000, vocab_size - 10),
        generator.integers(0, vocab_size - 1, num_validation),
    )
    validation = Validation(
        make_tokens(tmp_path, held_out, [1], vocab_size), 16, numbered(vocab_size)
    )
    unigram, bigram = brute_force(train.tolist(), vocab_size)
    pairs = list(zip(held_out[:-1].tolist(), held_out[1:].tolist(), strict=True))
    expected = [
        -sum(math.log(p) for p in values) / len(pairs)
        for values in (
            [unigram(word) for _, word in pairs],
            [bigram(word, head) for head, word in pairs],
        )
    ]
    assert unigram_bigram(train, validation, vocab_size) == pytest.approx(expected, rel=1e-12)


def test_only_the_windows_of_a_limited_validation_count(tmp_path):
    generator = np.random.default_rng(0)
    train, held_out = skewed(generator, 2000, 60), generator.integers(0, 59, 1000)
    validation = Validation(
        make_tokens(tmp_path, held_out, [], 60), 16, numbered(60), max_tokens=100
    )
    unigram, bigram = brute_force(train.tolist(), 60)
    pairs = [
        (head, word)
        for first in validation.starts
        for head, word in zip(held_out[first:][:16], held_out[first + 1 :][:16], strict=True)
    ]
    assert len(pairs) == 96
    expected = [
        -np.mean([math.log(unigram(word)) for _, word in pairs]),
        -np.mean([math.log(bigram(word, head)) for head, word in pairs]),
    ]
    assert unigram_bigram(train, validation, 60) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("head", [0, 3, 20])  # frequent, rare, never seen
def test_probabilities_sum_to_one(tmp_path, head):
    vocab_size = 24
    train = np.array([0, 1, 0, 2, 0, 1, 3, 4] * 20 + [5])
    totals = np.zeros(2)
    for word in range(vocab_size - 1):
        validation = Validation(
            make_tokens(tmp_path / str(word), np.array([head, word]), [], vocab_size),
            4,
            numbered(vocab_size),
        )
        totals += np.exp(-np.array(unigram_bigram(train, validation, vocab_size)))
    end_of_text = Validation(
        make_tokens(tmp_path / "eot", np.array([head, vocab_size - 1]), [], vocab_size),
        4,
        numbered(vocab_size),
    )
    totals += np.exp(-np.array(unigram_bigram(train, end_of_text, vocab_size)))
    assert totals == pytest.approx([1, 1], rel=1e-12)


def test_a_large_vocabulary_takes_no_table(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    train = np.minimum(generator.zipf(1.2, 3_000_000), 50_000)
    validation = Validation(make_tokens(tmp_path, train[-100_000:], []), 64, numbered(60000))
    tracemalloc.start()
    unigram, bigram = unigram_bigram(train, validation, 60000)
    # a byte for every pair would be 3.6 GB
    assert tracemalloc.get_traced_memory()[1] < 60000**2 / 4
    tracemalloc.stop()
    assert 0 < bigram < unigram + 0.5 < math.log(60000)
    monkeypatch.setattr(baselines, "NUM_TOKENS", 1000)
    assert unigram_bigram(train, validation, 60000) == unigram_bigram(
        train[:1000], validation, 60000
    )


def test_the_training_sample_keeps_the_shares(tmp_path):
    sources = {
        "a": make_tokens(tmp_path / "a", np.arange(900), []),
        "b": make_tokens(tmp_path / "b", np.arange(900) + 1000, [5]),
    }
    assert training_sample(sources, {"a": 3.0, "b": 1.0}, 400).tolist() == [
        *range(300),
        *range(1000, 1100),
    ]
    assert len(training_sample(sources, None, 400)) == 400
    assert len(training_sample({"a": sources["a"]}, None)) == 900
