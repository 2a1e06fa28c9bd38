"""Pieces of text to shards, in processes where there is work for several."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from data.files import DamagedFile, read_json, write_atomically
from data.rows import BadRow, Text, skip_or_refuse
from data.shards import shard_name, token_dtype, write_shard
from data.sources import AnyPiece
from data.tokenizer import Tokenizer

# What a worker process makes shards with, and where: given once, when it starts.
job: tuple[Tokenizer, Path]
# Problems that are kept of the rows of a piece.
PROBLEMS_KEPT = 100


class Skipped(TypedDict):
    """The rows of a piece that could not be read: how many, and the problems of the first."""

    count: int
    first: list[str]


def encode_pieces(
    pieces: Iterable[AnyPiece], tokenizer: Tokenizer, folder: Path, num_workers: int
) -> dict[str, int]:
    """Turns the pieces whose shards are not in the folder into shards.

    Args:
        pieces: a list, or a stream, whose pieces are made as they are asked for
        tokenizer: the tokenizer
        folder: the folder of the corpus
        num_workers: processes at most

    Returns:
        The number of shards of each part.

    Raises:
        Exception: whatever went wrong in a process, as it is
    """
    from tqdm import tqdm

    num_shards: dict[str, int] = {}
    # tqdm's bar has no end without a total.
    total = None
    # How many pieces a stream has is known at its end only.
    if isinstance(pieces, list):
        lacking = [piece for piece in pieces if not is_done(piece, folder)]
        total = sum(piece.num_bytes for piece in lacking)
        num_workers = min(num_workers, len(lacking))
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokens", disable=None, file=sys.stderr)
    with bar, pool_for_several(num_workers, (tokenizer, folder)) as pool:
        workers = Workers(num_workers, pool, tokenizer, folder)
        for piece in pieces:
            # Shards are counted as their pieces come: the last index is known at the end only.
            for part in piece.parts:
                num_shards[part] = num_shards.get(part, 0) + 1
                (folder / part).mkdir(parents=True, exist_ok=True)
            if not is_done(piece, folder):
                bar.update(workers.encode(piece))
        bar.update(workers.finish())
    return num_shards


def is_done(piece: AnyPiece, folder: Path) -> bool:
    """Returns whether all shards of a piece are in the folder."""
    return all((folder / part / shard_name(piece.index)).exists() for part in piece.parts)


def num_cores() -> int:
    """Returns the number of cores that this process may use; a Slurm job or a container may have
    fewer than the machine."""
    # macOS has no sched_getaffinity.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Processes


class Workers:
    """Processes that encode pieces; without a pool, this process.

    They are given few pieces ahead of their work, for a piece of a stream holds its text, and are
    given the tokenizer once."""

    def __init__(
        self, number: int, pool: ProcessPoolExecutor | None, tokenizer: Tokenizer, folder: Path
    ) -> None:
        self.number = number
        self.pool = pool
        self.tokenizer = tokenizer
        self.folder = folder
        self.jobs: deque[tuple[int, Future[None]]] = deque()

    def encode(self, piece: AnyPiece) -> int:
        """Takes a piece on; returns the bytes of text of the pieces that were finished
        meanwhile."""
        if self.pool is None:
            encode_piece(piece, self.tokenizer, self.folder)
            return piece.num_bytes
        # Two pieces a process keep all at work without holding much text.
        self.jobs.append((piece.num_bytes, self.pool.submit(encode_job, piece)))
        return self.finish(2 * self.number)

    def finish(self, num_left: int = 0) -> int:
        """Waits until at most `num_left` pieces are unfinished; returns the bytes of text of those
        that were finished. Raises ValueError where the system killed a process."""
        finished = 0
        while len(self.jobs) > num_left:
            num_bytes, future = self.jobs.popleft()
            try:
                future.result()
            except BrokenProcessPool:
                raise ValueError(
                    f"data.workers={self.number}: a worker was killed, perhaps for want of memory;"
                    " set fewer"
                ) from None
            finished += num_bytes
        return finished


@contextlib.contextmanager
def worker_processes(
    number: int, given: tuple[Tokenizer, Path] | None
) -> Iterator[ProcessPoolExecutor]:
    """Holds a pool of processes, which are ended at once where their user fails or is
    interrupted."""
    # forkserver: a fork of this process could copy locks that threads of torch or of the tokenizer
    # hold.
    context = multiprocessing.get_context("forkserver")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(number, context, start_worker, (given,))
    try:
        yield pool
    except BaseException:
        # A shard is whole or not there, so a process may be ended at any moment.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def pool_for_several(
    number: int, given: tuple[Tokenizer, Path]
) -> contextlib.AbstractContextManager[ProcessPoolExecutor | None]:
    """Returns a pool of processes for more than one worker; a single one is this process."""
    if number > 1:
        return worker_processes(number, given)
    return contextlib.nullcontext()


def start_worker(given: tuple[Tokenizer, Path] | None) -> None:
    """Ties a worker to its parent: it leaves ctrl-C to it, and ends with it instead of waiting for
    work for ever."""
    global job
    if given:
        job = given
    # Ctrl-C reaches every process of a terminal. The parent answers it for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_job(piece: AnyPiece) -> None:
    """Encodes a piece in a worker, with what that was given at its start."""
    encode_piece(piece, *job)


# Pieces


@dataclass
class Encoded:
    """The documents of a piece that go to one part, in tokens. `starts` are the indices of their
    first tokens, and `num_bytes` counts their text."""

    tokens: list[np.ndarray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0

    def add(self, text: Text, ids: np.ndarray) -> None:
        """Adds a document, or a part of one."""
        if text.opens:
            self.starts.append(self.num_tokens)
        self.tokens.append(ids)
        self.num_tokens += len(ids)
        self.num_bytes += len(text.text.encode())


def encode_piece(piece: AnyPiece, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the shards of a piece: one of each part that it feeds."""
    dtype = token_dtype(tokenizer)
    # Held-out documents lie among the others, so one pass fills both shards.
    parts = {part: Encoded() for part in piece.parts}
    skipped: list[str] = []
    for text in piece.texts(skipped):
        try:
            ids = tokenizer.document(text.text, text.opens, text.closes)
        except ValueError as error:
            problem = " ".join(str(error).split())
            row = BadRow(f"{text.place} cannot be made into tokens ({problem})")
            # Of a document that is cut, the other parts may be elsewhere by now.
            is_whole = text.opens and text.closes
            skip_or_refuse(row, piece.bad_rows if is_whole else "error", skipped)
            continue
        parts[text.part].add(text, ids.astype(dtype))
    # The record comes before the shards, whose presence means that the piece is done.
    if skipped:
        found: Skipped = {"count": len(skipped), "first": skipped[:PROBLEMS_KEPT]}
        write_atomically(folder / piece.part / f"{piece.index:05d}.skipped.json", json.dumps(found))
    for part, encoded in parts.items():
        path = folder / part / shard_name(piece.index)
        ids = np.concatenate([np.zeros(0, dtype), *encoded.tokens])
        write_shard(path, ids, encoded.starts, encoded.num_bytes, tokenizer)


def skipped_rows(folder: Path) -> Skipped:
    """Returns the rows of a part that could not be read, from the records beside its shards.
    Raises ValueError for a record that is damaged."""
    try:
        records = [read_json(path, Skipped) for path in sorted(folder.glob("*.skipped.json"))]
    except DamagedFile as error:
        raise ValueError(
            f"{error}; delete it and the shard of its number, which is rebuilt at the next start"
        ) from None
    return {
        "count": sum(record["count"] for record in records),
        "first": [line for record in records for line in record["first"]],
    }
