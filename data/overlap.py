"""The same text in training and in validation, noticed by what it says, wherever it was read.

Stretches of tokens, evenly spread over a validation set, are looked for at every place of the
training tokens: all windows of WINDOW tokens are hashed by doubling, h_2n(i) = h_n(i) f_n + h_n(i +
n) modulo 2^64, six passes over the tokens in all."""

import sys
from collections.abc import Mapping
from functools import cache

import numpy as np

from data.shards import Tokens
from data.tokenizer import Tokenizer

# About the bytes of text in a stretch: boilerplate as a licence's first lines is shorter.
WINDOW_BYTES = 256
# Stretches of each validation set that are looked for.
NUM_WINDOWS = 1024
# Of these as many must lie within documents for the others to be left out.
NUM_WITHIN = 32
# The share of them that is worth a warning.
NOTICED = 0.05
# Tokens of a validation set by which the lengths of its documents are known.
LOOKED_AT = 2**20
# Tokens that are hashed together: few enough to stay in a core's cache.
BLOCK = 2**15
# Odd numbers, so that multiplying by them modulo 2^64 can be undone.
FACTORS = [
    0x9E3779B97F4A7C15,
    0xBF58476D1CE4E5B9,
    0x94D049BB133111EB,
    0xD6E8FEB86659FD93,
    0xA0761D6478BD642F,
    0xE7037ED1A0B428DB,
    0x8EBC6AF09C88C6E3,
    0x589965CC75374CC3,
]


@cache
def print_note(line: str) -> None:
    """Prints a note on stderr; the cache makes that once in a process."""
    print(f"note: {line}", file=sys.stderr)


def note_once(lines: list[str]) -> None:
    """Prints notes on stderr, each once in a process."""
    for line in lines:
        print_note(line)


def leaks(parts: Mapping[str, Tokens], tokenizer: Tokenizer) -> list[str]:
    """Returns a line for each validation part of which a noticeable share is in the training parts
    too.

    Args:
        parts: the tokens of each part, by "train/NAME" or "validation/NAME"
        tokenizer: what they are tokens of
    """
    train = [tokens for part, tokens in parts.items() if part.startswith("train/")]
    found = {
        part: overlap(train, tokens, tokenizer.eot)
        for part, tokens in parts.items()
        if part.startswith("validation/")
    }
    return [
        f"about {share:.0%} of {part} is in the training text too, as"
        f" {tokenizer.decode(example)[:60]!r}: what is measured on it is partly known by heart"
        for part, (share, example) in found.items()
        if share >= NOTICED
    ]


def overlap(train: list[Tokens], validation: Tokens, eot: int) -> tuple[float, np.ndarray]:
    """Returns the share of a validation set's stretches that are in the training tokens, and the
    first of those."""
    # The stretches of the validation set, as hashes.
    starts, doublings = stretches(validation, eot)
    length = 2**doublings
    if not len(starts):
        return 0.0, np.zeros(0)
    wanted = np.array(
        [window_hashes(validation.read(start, start + length), doublings)[0] for start in starts]
    )
    # A table of the upper bits keeps nearly all other windows out of the search.
    table = np.zeros(2**16, dtype=bool)
    table[wanted >> np.uint64(48)] = True
    seen = np.zeros(0, dtype=np.uint64)
    # Every window of the training tokens is looked at; blocks overlap by a window less one token.
    for tokens in train:
        for first in range(0, len(tokens), BLOCK):
            hashes = window_hashes(tokens.read(first, first + BLOCK + length - 1), doublings)
            near = hashes[table[hashes >> np.uint64(48)]]
            if near.size:
                seen = np.union1d(seen, near[np.isin(near, wanted)])
    hits = np.isin(wanted, seen)
    if not hits.any():
        return 0.0, np.zeros(0)
    first = starts[hits.argmax()]
    return float(hits.mean()), validation.read(first, first + length)


def stretches(validation: Tokens, eot: int) -> tuple[np.ndarray, int]:
    """Returns where the stretches that are looked for begin, and the power of two of their tokens.

    They lie anywhere within documents, whose neighbours elsewhere are others; where most documents
    are shorter than a stretch, or little longer, at the beginnings of documents."""
    doublings = window_doublings(validation)
    # How long documents are is seen at the beginning of the set.
    head = validation.read(0, min(len(validation), LOOKED_AT))
    ends = np.flatnonzero(head == eot)
    lengths = np.diff(ends) - 1
    if len(lengths) and np.median(lengths) < 2**doublings:
        # Half of the documents are as long as the median, so a window of its size fits them.
        doublings = int(max(4, np.floor(np.log2(max(1, np.median(lengths))))))
        return beginnings(ends, lengths, 2**doublings), doublings
    # A stretch may end with a document, but not go on into the next.
    starts = spread(len(validation) - 2**doublings + 1)
    crosses = [eot in validation.read(start, start + 2**doublings - 1) for start in starts]
    within = starts[~np.array(crosses, dtype=bool)]
    if len(within) >= NUM_WITHIN:
        return within, doublings
    # Of a set without ends of documents every stretch counts.
    if not len(lengths):
        return starts, doublings
    return beginnings(ends, lengths, 2**doublings), doublings


def beginnings(ends: np.ndarray, lengths: np.ndarray, length: int) -> np.ndarray:
    """Returns where documents of at least `length` tokens begin, given the ends of all documents
    and the lengths of all but the first."""
    starts = ends[:-1][lengths >= length] + 1
    return starts[spread(len(starts))]


def spread(number: int) -> np.ndarray:
    """Returns at most NUM_WINDOWS of the indices below a number, evenly spread."""
    indices = np.linspace(0, max(0, number - 1), NUM_WINDOWS).astype(np.int64)
    return np.unique(indices)[: max(0, number)]


def window_doublings(tokens: Tokens) -> int:
    """Returns the power of two of the tokens in a stretch: about WINDOW_BYTES of text, less in a
    set that has no more."""
    per_token = max(1.0, tokens.num_bytes / max(1, len(tokens)))
    longest = min(WINDOW_BYTES / per_token, max(16, len(tokens)))
    return int(np.clip(np.floor(np.log2(longest)), 4, len(FACTORS)))


def window_hashes(tokens: np.ndarray, doublings: int) -> np.ndarray:
    """Returns a hash (uint64) of each window of 2^doublings consecutive tokens."""
    # Token 0 counts too, hence the 1.
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(FACTORS[-1])
    for step in range(doublings):
        size = 2**step
        if len(hashes) <= size:
            return hashes[:0]
        hashes = hashes[:-size] * np.uint64(FACTORS[step]) + hashes[size:]
        # Products carry upwards only: bits are brought down again.
        hashes ^= hashes >> np.uint64(29)
    return hashes
