"""The losses that counting reaches, of a unigram and a bigram model, for a trained model to be held
against."""

from collections.abc import Mapping

import numpy as np

from data.loader import IGNORED, Validation
from data.shards import Tokens

# Training tokens counted: enough for a bigram, and a second's work.
NUM_TOKENS = 10_000_000


def training_sample(
    sources: Mapping[str, Tokens], weights: Mapping[str, float] | None, num_tokens: int = NUM_TOKENS
) -> np.ndarray:
    """Returns about num_tokens training tokens (int64), from the start of each source.

    Args:
        sources: the tokens of each training source
        weights: relative shares of the sources; None where there is one
        num_tokens: tokens in all
    """
    # A single source has no weight, and all of the sample.
    weights = weights or dict.fromkeys(sources, 1.0)
    total = sum(weights.values())
    parts = []
    for name, tokens in sources.items():
        parts.append(tokens.read(0, int(num_tokens * weights[name] / total)))
    return np.concatenate(parts)


def unigram_bigram(
    train_tokens: np.ndarray, validation: Validation, vocab_size: int
) -> tuple[float, float]:
    """Returns the mean loss (nats per token) of an add-one unigram and of a Witten-Bell bigram on
    the windows of a validation set.

    With N training tokens, c(w) and c(h, w) the counts of tokens and of pairs, c(h) = sum_w c(h,
    w), t(h) the number of different tokens seen after h, and V the size of the vocabulary:

        p1(w)     = (c(w) + 1) / (N + V)
        p2(w | h) = (c(h, w) + t(h) p1(w)) / (c(h) + t(h)),  and p1(w) after an h that was never
        seen

    Both see exactly the (input, target) pairs that the model sees. Source: Witten and Bell 1991,
    method C, as interpolation (Chen and Goodman 1998).

    Args:
        train_tokens: training tokens, of which the first NUM_TOKENS are counted
        validation: the windows
        vocab_size: V
    """
    tokens = train_tokens[:NUM_TOKENS].astype(np.int64)
    batches = counted_pairs(validation)
    inputs = np.concatenate([inputs for inputs, _ in batches])
    targets = np.concatenate([targets for _, targets in batches])
    unigram = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)
    backoff = unigram[targets]
    bigram = interpolated_bigram(tokens, inputs, targets, backoff, vocab_size)
    return -float(np.log(backoff).mean()), -float(np.log(bigram).mean())


def interpolated_bigram(
    tokens: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    backoff: np.ndarray,
    vocab_size: int,
) -> np.ndarray:
    """Returns p2(w | h) of `unigram_bigram` for each pair of an input h and a target w.

    Args:
        tokens: the training tokens
        inputs: h, (pairs,)
        targets: w, (pairs,)
        backoff: p1(w), (pairs,)
        vocab_size: V
    """
    # A pair (h, w) is the number h V + w, and `pairs` holds those that were seen, sorted.
    pairs, pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    heads = pairs // vocab_size
    # t(h), and c(h) of the pairs.
    followers = np.bincount(heads, minlength=vocab_size)
    followed = np.bincount(heads, weights=pair_counts, minlength=vocab_size)

    # c(h, w) of the wanted pairs, 0 for those that were never seen.
    wanted = inputs * vocab_size + targets
    found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[found] == wanted, pair_counts[found], 0)
    seen = followed[inputs] > 0
    # An h that was never seen would divide by zero; p1 stands for it below.
    denominator = np.where(seen, followed[inputs] + followers[inputs], 1.0)
    return np.where(seen, (count + followers[inputs] * backoff) / denominator, backoff)


def counted_pairs(validation: Validation) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (inputs, targets) of each batch, without the targets that are not counted."""
    pairs = []
    for inputs, targets in validation.batches(256):
        counted = targets != IGNORED
        pairs.append((inputs[counted].numpy(), targets[counted].numpy()))
    return pairs
