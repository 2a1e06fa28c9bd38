"""Batches as a pure function of (seed, step), so that there is no position to save and no order to
store.

Training sequence n (n = step * sequences + row) is looked up, not drawn: which source it comes
from, which epoch of that source, and which window. The same n gives the same window on any number
of processes and for any micro-batch size."""

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from data.shards import Tokens
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]

PERIOD = 1024  # sequences in which the sources have exactly their shares
ROUNDS = 6
IGNORED = -100  # the target that no loss counts


def mix(*values: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of integers or arrays of them, elementwise: the finaliser of SplitMix64,
    chained."""
    state: np.ndarray = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = np.bitwise_xor(state, np.asarray(value).astype(np.uint64))
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The image of each index in [0, size) under the permutation of [0, size) that its key stands
    for; int64.

    A Feistel network permutes the next larger power of four; an image beyond `size` is sent through
    again until it falls inside (cycle walking), which keeps it a permutation. It takes no memory,
    whatever the size."""
    half = np.uint64(max(1, -(-int(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    image = np.broadcast_to(np.asarray(index), np.broadcast(index, key).shape).astype(np.uint64)
    outside = np.ones(image.shape, dtype=bool)
    key = np.broadcast_to(key, image.shape)
    while outside.any():
        left, right = image[outside] >> half, image[outside] & mask
        for round_ in range(ROUNDS):
            left, right = right, left ^ (mix(key[outside], round_, right) & mask)
        image[outside] = (left << half) | right
        outside = image >= size
    return image.astype(np.int64)


def shares(weights: Mapping[str, float]) -> np.ndarray:
    """Sequences of each source in a PERIOD, by largest remainder. Raises ValueError for a source
    too light to get one."""
    ideal = np.array(list(weights.values()), dtype=np.float64)
    ideal *= PERIOD / ideal.sum()
    counts = np.floor(ideal).astype(np.int64)
    counts[np.argsort(counts - ideal, kind="stable")[: PERIOD - counts.sum()]] += 1
    for name, count in zip(weights, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"data.sources.{name}.weight={weights[name]} is less than 1/{PERIOD} of all; raise"
                " it or leave the source out"
            )
    return counts


class Loader:
    """Batches of training sequences of T = `length` tokens.

    One epoch of a source of N tokens is W = (N - T) // T windows of T inputs and their targets, at
    stride T from an offset in [0, T) that is drawn for each epoch, in an order permuted for each
    epoch: no token is an input twice in it. Windows cross the borders of documents. Several sources
    are interleaved in fixed shares, each with epochs of its own.

    Raises ValueError for a source of fewer than T + 1 tokens.
    """

    def __init__(
        self,
        sources: Mapping[str, Tokens],
        weights: Mapping[str, float] | None,
        length: int,
        sequences: int,
        seed: int,
    ) -> None:
        self.names, self.sources = list(sources), list(sources.values())
        self.length, self.sequences, self.seed = length, sequences, seed
        for name, tokens in sources.items():
            if len(tokens) < length + 1:
                raise ValueError(
                    f"batch.length={length} needs {length + 1} tokens but the source {name} has"
                    f" {len(tokens)}; shorten it or give more text"
                )
        # Of fewer than 2 T tokens there is one window, and only so much room for its offset.
        self.num_windows = [max(1, (len(tokens) - length) // length) for tokens in self.sources]
        self.counts = shares({name: weights[name] if weights else 1.0 for name in self.names})

    def batch(self, step: int, rows: slice = slice(None)) -> "Batch":
        """Inputs and targets of a step, or of some `rows` of it (int64, B x T each). Reads only
        those rows."""
        import torch

        starts = self.windows(
            step * self.sequences + np.arange(self.sequences, dtype=np.int64)[rows]
        )
        windows = [
            self.sources[source].read(start, start + self.length + 1) for source, start in starts
        ]
        tokens = torch.from_numpy(np.stack(windows))  # B x (T+1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def windows(self, n: np.ndarray) -> list[tuple[int, int]]:
        """(index of the source, first token) of training sequences n."""
        source, within = self.interleave(n)
        starts = np.zeros_like(n)
        for index, (tokens, num_windows) in enumerate(
            zip(self.sources, self.num_windows, strict=True)
        ):
            mine = source == index
            epoch, position = np.divmod(within[mine], num_windows)
            room = min(self.length, len(tokens) - num_windows * self.length)
            offset = (mix(self.seed, 2, index, epoch) % np.uint64(room)).astype(np.int64)
            starts[mine] = offset + self.length * permute(
                position, num_windows, mix(self.seed, 3, index, epoch)
            )
        return list(zip(source.tolist(), starts.tolist(), strict=True))

    def interleave(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of training sequences n, and the number each has among that source's own."""
        if len(self.sources) == 1:
            return np.zeros_like(n), n
        source, within = np.zeros_like(n), np.zeros_like(n)
        for period in np.unique(n // PERIOD):
            order = permute(np.arange(PERIOD), PERIOD, mix(self.seed, 1, period))
            slot_source = np.searchsorted(np.cumsum(self.counts), order, side="right")
            slot_within = np.zeros(PERIOD, dtype=np.int64)
            for index, count in enumerate(self.counts):
                slot_within[slot_source == index] = period * count + np.arange(count)
            here = n // PERIOD == period
            source[here], within[here] = (
                slot_source[n[here] % PERIOD],
                slot_within[n[here] % PERIOD],
            )
        return source, within


class Prefetcher:
    """The loader's batches from `step` on, made ahead by a thread; in pinned memory if `pin`.

    `seconds_waiting` is the time that `next` has kept its caller waiting. What goes wrong in the
    thread is raised by `next`."""

    def __init__(
        self,
        loader: Loader,
        step: int = 0,
        rows: slice = slice(None),
        pin: bool = False,
        depth: int = 2,
    ) -> None:
        self.seconds_waiting = 0.0
        self._loader, self._step, self._rows, self._pin = loader, step, rows, pin
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._closed.is_set():
            item: Batch | BaseException
            try:
                inputs, targets = self._loader.batch(self._step, self._rows)
                item = (
                    (inputs.pin_memory(), targets.pin_memory()) if self._pin else (inputs, targets)
                )
            except BaseException as error:
                item = error
                self._closed.set()
            self._queue.put(item)
            self._step += 1

    def next(self) -> "Batch":
        """The next step's inputs and targets."""
        start = time.perf_counter()
        item = self._queue.get()
        self.seconds_waiting += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()  # it may be waiting for room
            self._thread.join(0.01)


class Validation:
    """Windows of T = `length` tokens over a validation set, the same at every evaluation.

    They lie at stride T from the first token, so that each token but the first is a target once;
    with max_tokens, only about so many of them, as windows spread evenly over the set. The last
    window is filled up with targets of -100, and so is the last batch, so that all batches have one
    shape.

    What a tokenizer puts before every document, as Llama's <|begin_of_text|>, is given: read, and
    never a target that is counted.

    num_tokens is the number of targets that are counted, num_bytes that of the bytes of text they
    stand for: bits per byte = total nats / (ln 2 num_bytes). Raises ValueError for a set of fewer
    than two tokens."""

    def __init__(
        self, source: Tokens, length: int, tokenizer: Tokenizer, max_tokens: int | None = None
    ) -> None:
        if len(source) < 2:
            raise ValueError(
                f"a validation set of {len(source)} tokens has no next token to predict; give"
                " data.validation more text"
            )
        self.source, self.length, self._byte_lengths, self._given = (
            source,
            length,
            tokenizer.byte_lengths(),
            list(tokenizer.bos),
        )
        total = -(-(len(source) - 1) // length)
        num_windows = total if max_tokens is None else min(total, max(1, max_tokens // length))
        self.starts = np.arange(num_windows, dtype=np.int64) * total // num_windows * length

    def batches(self, size: int) -> Iterator["Batch"]:
        """Inputs and targets (int64, B x T each, B at most `size`) of all windows in order."""
        import torch

        size = min(size, len(self.starts))
        for first in range(0, len(self.starts), size):
            inputs = np.zeros((size, self.length), dtype=np.int64)
            targets = np.full((size, self.length), IGNORED, dtype=np.int64)
            for row, start in enumerate(self.starts[first : first + size].tolist()):
                tokens = self.source.read(start, start + self.length + 1)
                inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = (
                    tokens[:-1],
                    tokens[1:],
                )
            if self._given:
                targets[np.isin(targets, self._given)] = IGNORED
            yield torch.from_numpy(inputs), torch.from_numpy(targets)

    @cached_property
    def num_tokens(self) -> int:
        total = int(np.minimum(self.length, len(self.source) - 1 - self.starts).sum())
        return (
            total - sum(int(np.isin(targets, self._given).sum()) for targets in self._targets())
            if self._given
            else total
        )

    @cached_property
    def num_bytes(self) -> int:
        return sum(int(self._byte_lengths[targets].sum()) for targets in self._targets())

    def _targets(self) -> Iterator[np.ndarray]:
        """The targets of each window, given ones included."""
        return (
            self.source.read(start + 1, start + 1 + self.length) for start in self.starts.tolist()
        )
