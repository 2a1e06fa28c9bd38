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

# Sequences in which the sources have exactly their shares.
PERIOD = 1024
# Of the Feistel network that permutes windows.
ROUNDS = 6
# The target that no loss counts.
IGNORED = -100


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Returns a uint64 hash of integers or arrays of them, elementwise: the finaliser of
    SplitMix64, chained."""
    state: np.ndarray = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            # The constants are SplitMix64's (Steele, Lea and Flood 2014).
            state = np.bitwise_xor(state, np.asarray(value).astype(np.uint64))
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Returns the image of each index in [0, size) under the permutation of [0, size) that its key
    stands for; int64.

    A Feistel network permutes the next larger power of four; an image beyond `size` is sent through
    again until it falls inside (cycle walking), which keeps it a permutation. It takes no memory,
    whatever the size.

    Args:
        index: the indices
        size: numbers that are permuted
        key: a hash for each index, or one for all
    """
    # Half of the bits of the network, which are the least even number that holds the size.
    half = np.uint64(max(1, -(-int(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    image = np.broadcast_to(np.asarray(index), np.broadcast(index, key).shape).astype(np.uint64)
    outside = np.ones(image.shape, dtype=bool)
    key = np.broadcast_to(key, image.shape)
    while outside.any():
        left = image[outside] >> half
        right = image[outside] & mask
        for round_ in range(ROUNDS):
            # A round is undone by swapping back, so any hash makes a permutation.
            left, right = right, left ^ (mix(key[outside], round_, right) & mask)
        image[outside] = (left << half) | right
        outside = image >= size
    return image.astype(np.int64)


def shares(weights: Mapping[str, float]) -> np.ndarray:
    """Returns the sequences of each source in a PERIOD, by largest remainder. Raises ValueError for
    a source too light to get one."""
    # Shares are whole sequences, and their remainders go to the largest fractions.
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

    Args:
        sources: the tokens of each source
        weights: relative shares of the sources; None for equal ones
        length: T
        sequences: sequences of a batch
        seed: decides offsets and orders

    Raises:
        ValueError: a source has fewer than T + 1 tokens, or too light a weight
    """

    def __init__(
        self,
        sources: Mapping[str, Tokens],
        weights: Mapping[str, float] | None,
        length: int,
        sequences: int,
        seed: int,
    ) -> None:
        self.names = list(sources)
        self.sources = list(sources.values())
        self.length = length
        self.sequences = sequences
        self.seed = seed
        for name, tokens in sources.items():
            if len(tokens) < length + 1:
                raise ValueError(
                    f"batch.length={length} needs {length + 1} tokens but the source {name} has"
                    f" {len(tokens)}; shorten it or give more text"
                )
        # Of fewer than 2 T tokens there is one window, and only so much room for its offset.
        self.num_windows = [max(1, (len(tokens) - length) // length) for tokens in self.sources]
        weights = weights or dict.fromkeys(self.names, 1.0)
        self.counts = shares({name: weights[name] for name in self.names})

    def batch(self, step: int, rows: slice = slice(None)) -> "Batch":
        """Returns inputs and targets of a step, or of some `rows` of it (int64, B x T each). Reads
        only those rows."""
        import torch

        n = step * self.sequences + np.arange(self.sequences, dtype=np.int64)[rows]
        windows = [
            self.sources[source].read(start, start + self.length + 1)
            for source, start in self.windows(n)
        ]
        tokens = torch.from_numpy(np.stack(windows))  # B x (T+1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def windows(self, n: np.ndarray) -> list[tuple[int, int]]:
        """Returns (index of the source, first token) of training sequences n."""
        source, within = self.interleave(n)
        starts = np.zeros_like(n)
        for index, (tokens, num_windows) in enumerate(
            zip(self.sources, self.num_windows, strict=True)
        ):
            mine = source == index
            epoch, position = np.divmod(within[mine], num_windows)
            # The offset leaves whole windows and their last target inside the source.
            room = min(self.length, len(tokens) - num_windows * self.length)
            offset = (mix(self.seed, 2, index, epoch) % np.uint64(room)).astype(np.int64)
            # The numbers 1, 2 and 3 keep the hashes of periods, offsets and orders apart.
            starts[mine] = offset + self.length * permute(
                position, num_windows, mix(self.seed, 3, index, epoch)
            )
        return list(zip(source.tolist(), starts.tolist(), strict=True))

    def interleave(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of training sequences n, and the number each has among that source's
        own."""
        if len(self.sources) == 1:
            return np.zeros_like(n), n
        source = np.zeros_like(n)
        within = np.zeros_like(n)
        for period in np.unique(n // PERIOD):
            # A period has every slot once, so each source has exactly its share of it.
            order = permute(np.arange(PERIOD), PERIOD, mix(self.seed, 1, period))
            # Slots [0, c_0) are the first source's, the next c_1 the second's, and so on.
            slot_source = np.searchsorted(np.cumsum(self.counts), order, side="right")
            slot_within = np.zeros(PERIOD, dtype=np.int64)
            for index, count in enumerate(self.counts):
                slot_within[slot_source == index] = period * count + np.arange(count)
            # The sequences that were asked for and lie in this period.
            here = n // PERIOD == period
            slots = n[here] % PERIOD
            source[here] = slot_source[slots]
            within[here] = slot_within[slots]
        return source, within


class Prefetcher:
    """The loader's batches from `step` on, made ahead by a thread; in pinned memory if `pin`.

    `seconds_waiting` is the time that `next` has kept its caller waiting. What goes wrong in the
    thread is raised by `next`. (torch's DataLoader prefetches by processes only, and waits longer:
    tests/benchmarks/results/libraries.md.)

    Args:
        loader: the loader
        step: the first step
        rows: the rows of each batch that this process reads
        pin: whether batches are copied to pinned memory, for a GPU
        depth: batches that are made ahead
    """

    def __init__(
        self,
        loader: Loader,
        step: int = 0,
        rows: slice = slice(None),
        pin: bool = False,
        depth: int = 2,
    ) -> None:
        self.seconds_waiting = 0.0
        self._loader = loader
        self._step = step
        self._rows = rows
        self._pin = pin
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._device = None
        if pin:
            import torch

            # A new thread begins on the first device, and must not make a CUDA context there.
            self._device = torch.cuda.current_device()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        if self._device is not None:
            import torch

            torch.cuda.set_device(self._device)
        while not self._closed.is_set():
            item: Batch | BaseException
            # An error is handed over in place of a batch, and raised where batches are taken.
            try:
                item = self._loader.batch(self._step, self._rows)
                if self._pin:
                    item = (item[0].pin_memory(), item[1].pin_memory())
            except BaseException as error:
                item = error
                self._closed.set()
            self._queue.put(item)
            self._step += 1

    def next(self) -> "Batch":
        """Returns the next step's inputs and targets, as soon as they are made."""
        start = time.perf_counter()
        item = self._queue.get()
        self.seconds_waiting += time.perf_counter() - start
        if isinstance(item, BaseException):
            # It is raised again at every further call.
            self._queue.put(item)
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        while self._thread.is_alive():
            # The thread may be waiting for room in the queue.
            while not self._queue.empty():
                self._queue.get_nowait()
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
    stand for: bits per byte = total nats / (ln 2 num_bytes).

    Args:
        source: the tokens of the set
        length: T
        tokenizer: their tokenizer
        max_tokens: about the tokens that are read; None for all

    Raises:
        ValueError: the set has fewer than two tokens
    """

    def __init__(
        self, source: Tokens, length: int, tokenizer: Tokenizer, max_tokens: int | None = None
    ) -> None:
        if len(source) < 2:
            raise ValueError(
                f"a validation set of {len(source)} tokens has no next token to predict; give"
                " data.validation more text"
            )
        self.source = source
        self.length = length
        self._byte_lengths = tokenizer.byte_lengths()
        self._given = list(tokenizer.bos)
        # The first token is no target, and the last window may be short.
        total = -(-(len(source) - 1) // length)
        num_windows = total
        if max_tokens is not None:
            num_windows = min(total, max(1, max_tokens // length))
        # Spread evenly: window i of n is window i total // n of all.
        self.starts = np.arange(num_windows, dtype=np.int64) * total // num_windows * length

    def batches(self, size: int) -> Iterator["Batch"]:
        """Yields inputs and targets (int64, B x T each, B at most `size`) of all windows in
        order."""
        import torch

        # A small set is one batch without filling.
        size = min(size, len(self.starts))
        for first in range(0, len(self.starts), size):
            inputs = np.zeros((size, self.length), dtype=np.int64)
            targets = np.full((size, self.length), IGNORED, dtype=np.int64)
            for row, start in enumerate(self.starts[first : first + size].tolist()):
                tokens = self.source.read(start, start + self.length + 1)
                inputs[row, : len(tokens) - 1] = tokens[:-1]
                targets[row, : len(tokens) - 1] = tokens[1:]
            # Rows that are left are all IGNORED, so they add nothing to the loss.
            # A model that goes on from a text is given these, so it need not predict them.
            if self._given:
                targets[np.isin(targets, self._given)] = IGNORED
            yield torch.from_numpy(inputs), torch.from_numpy(targets)

    @cached_property
    def num_tokens(self) -> int:
        """Counts the targets of all windows, without those that are given."""
        total = int(np.minimum(self.length, len(self.source) - 1 - self.starts).sum())
        if not self._given:
            return total
        return total - sum(int(np.isin(targets, self._given).sum()) for targets in self._targets())

    @cached_property
    def num_bytes(self) -> int:
        """Counts the bytes of text that the targets of all windows stand for."""
        return sum(int(self._byte_lengths[targets].sum()) for targets in self._targets())

    def _targets(self) -> Iterator[np.ndarray]:
        """Yields the targets of each window, given ones included."""
        return (
            self.source.read(start + 1, start + 1 + self.length) for start in self.starts.tolist()
        )
