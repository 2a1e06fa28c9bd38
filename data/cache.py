"""Prepared corpora: found in the cache, or made there by processes that turn pieces of text into shards.

<cache>/<corpus>-<tokenizer>/    train/<source>/00000.bin, validation/<set>/00000.bin, ..., tokenizer.json
                                 meta.json       what was made of what; written last, so its presence means complete
                                 verified.json   size and time of the shards whose checksums were found right
<cache>/bpe-<key>/               a trained tokenizer
"""

import contextlib
import fcntl
import hashlib
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
from pathlib import Path
from typing import Self

import numpy as np

from conf.schema import DataConfig, TokenizerConfig
from data.corpora import Piece, TextCorpus, empty_split
from data.files import write_atomically
from data.hf_tokenizer import known_tokenizer
from data.hub import HubCorpus, HubPiece
from data.shards import REBUILT, VERSION, Corpus, Shard, Tokens, key, shard_name, token_dtype, verify_once, write_shard
from data.tokenizer import Tokenizer, head, train_bpe
from data.tokens import open_tokens

AnyCorpus = TextCorpus | HubCorpus
AnyPiece = Piece | HubPiece
job: tuple[Tokenizer, Path]  # what a worker process makes shards with, and where


def prepare(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> Corpus:
    """The corpus that the configuration names, out of the cache or made now, in tokens of a tokenizer that is given or configured.

    Work that another process began and did not finish is taken up; while another is at it, this one waits.
    Raises ValueError for text that cannot be found, read or split as asked, for shards that are damaged, and for what the system
    refuses, as a full disk does: what is prepared by then is kept.
    """
    cache = Path(data.cache).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache={data.cache} cannot be made ({error.strerror}); name a folder that can be written") from None
    try:
        if data.source == "tokens":
            return open_tokens(data, tokenizer, cache)
        return open_text(HubCorpus(data) if data.source == "hub" else TextCorpus(data), tokenizer, cache)
    except OSError as error:
        place = error.filename or f"data.cache={data.cache}"
        raise ValueError(f"{place}: {error.strerror or error}; once that is mended the same command goes on from what is prepared") from error


def open_text(text: AnyCorpus, tokenizer: TokenizerConfig | Tokenizer, cache: Path) -> Corpus:
    """The corpus of a text, made where the cache lacks it."""
    chosen = tokenizer if isinstance(tokenizer, Tokenizer) else find_tokenizer(text, tokenizer, cache)
    folder = cache / f"{key(text.identity)}-{chosen.hash[:16]}"
    if not is_complete(folder):
        with locked(folder):
            if not is_complete(folder):
                fill(folder, text, chosen)
    meta = json.loads((folder / "meta.json").read_text())
    shards = open_shards(folder, {part: entry["shards"] for part, entry in meta["parts"].items()}, chosen)
    verify_once(folder, [shard for part in shards.values() for shard in part])
    parts = {part: Tokens(found) for part, found in shards.items()}
    train = {name: parts[f"train/{name}"] for name in text.sources}
    validation = {part.removeprefix("validation/"): tokens for part, tokens in parts.items() if part.startswith("validation/")}
    return Corpus(folder, meta, chosen, train, validation, text.weights, meta["fingerprint"])


def find_tokenizer(text: AnyCorpus, config: TokenizerConfig, cache: Path) -> Tokenizer:
    """The tokenizer of the configuration; a bpe out of the cache, or trained now on the head of each source's training text."""
    if known := known_tokenizer(config, cache):
        return known
    folder = cache / f"bpe-{key([text.identity, config.vocab_size, config.train_megabytes])}"
    if not (folder / "tokenizer.json").exists():
        with locked(folder):
            if not (folder / "tokenizer.json").exists():
                limit = int(config.train_megabytes * 1e6)
                texts = (part for name in text.sources for part in head(text.training_texts(name), limit))
                train_bpe(texts, config.vocab_size).save(folder)
    return Tokenizer.load(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; waits while another has it. A process that dies lets go."""
    folder.mkdir(exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another process that prepares {folder}", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# Writing


def is_complete(folder: Path) -> bool:
    """Whether meta.json is there and no shard that it lists is missing."""
    try:
        parts = json.loads((folder / "meta.json").read_text())["parts"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):
        raise ValueError(f"{folder / 'meta.json'} cannot be read; {REBUILT}") from None
    return all((folder / part / shard_name(index)).exists() for part, entry in parts.items() for index in range(entry["shards"]))


def open_shards(folder: Path, num_shards: dict[str, int], tokenizer: Tokenizer) -> dict[str, list[Shard]]:
    return {part: [Shard.open(folder / part / shard_name(index), tokenizer) for index in range(number)] for part, number in num_shards.items()}


def fill(folder: Path, text: AnyCorpus, tokenizer: Tokenizer) -> None:
    """Writes what the folder lacks: the shards, then the tokenizer, then meta.json. The lock must be held."""
    for leftover in folder.rglob("*.tmp"):
        leftover.unlink()
    for note in text.notes():
        print(f"note: {note}", file=sys.stderr)
    num_shards = encode_pieces(text.pieces(folder), tokenizer, folder, text.data.workers or num_cores())
    shards = open_shards(folder, num_shards, tokenizer)
    parts = {part: {"shards": len(found), "tokens": sum(shard.header.num_tokens for shard in found),
                    "documents": sum(shard.header.num_documents for shard in found),
                    "bytes": sum(shard.header.num_bytes for shard in found)} for part, found in shards.items()}  # fmt: skip
    expected = {f"train/{name}" for name in text.sources} | {f"validation/{name}" for name in text.named}
    for part in sorted(expected | {text.held_out(name) for name in text.sources if not text.named}):
        if parts.get(part, {"tokens": 0})["tokens"] == 0:
            raise ValueError(empty(part, sum(entry["documents"] for entry in parts.values()), text))
    fingerprint = hashlib.sha256(b"".join(shard.checksum for found in shards.values() for shard in found)).hexdigest()
    tokenizer.save(folder)
    meta = {"version": VERSION, "fingerprint": fingerprint, "corpus": text.identity, "parts": parts,
            "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash}}  # fmt: skip
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1))


def empty(part: str, num_documents: int, text: AnyCorpus) -> str:
    """What to say when a part has come out without text."""
    if text.named or not num_documents:
        return f"{part} has no text; give {'a split' if isinstance(text, HubCorpus) else 'files'} with some"
    if isinstance(text, HubCorpus):
        return (f"data.validation_fraction={text.data.validation_fraction} of {num_documents} documents leaves {part} empty; "
                "raise it or data.documents, or name a split in data.validation")  # fmt: skip
    return empty_split(part, num_documents, text.data)


def num_cores() -> int:
    """Cores that this process may use; a Slurm job or a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_pieces(pieces: Iterable[AnyPiece], tokenizer: Tokenizer, folder: Path, num_workers: int) -> dict[str, int]:
    """Turns the pieces whose shards are not in the folder into shards, in processes where there is work for several, and returns the
    number of shards of each part. Raises what went wrong in a process, as it is."""
    from tqdm import tqdm

    num_shards: dict[str, int] = {}
    total = None
    if isinstance(pieces, list):  # otherwise they come as they are asked for, and nobody knows how many
        lacking = [piece for piece in pieces if not is_done(piece, folder)]
        total, num_workers = sum(piece.num_bytes for piece in lacking), min(num_workers, len(lacking))
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokens", disable=None, file=sys.stderr)
    with bar, Workers(num_workers, tokenizer, folder) as workers:
        for piece in pieces:
            for part in piece.parts:
                num_shards[part] = num_shards.get(part, 0) + 1
                (folder / part).mkdir(parents=True, exist_ok=True)
            if not is_done(piece, folder):
                bar.update(workers.encode(piece))
        bar.update(workers.finish())
    return num_shards


def is_done(piece: AnyPiece, folder: Path) -> bool:
    return all((folder / part / shard_name(piece.index)).exists() for part in piece.parts)


class Workers:
    """Processes that encode pieces; a single worker is this process.

    They are given few pieces ahead of their work, for a piece of a stream holds its text, and are told the tokenizer once.
    """

    def __init__(self, number: int, tokenizer: Tokenizer, folder: Path) -> None:
        self.number, self.tokenizer, self.folder = number, tokenizer, folder
        self.jobs: deque[tuple[int, Future[None]]] = deque()
        self.pool: ProcessPoolExecutor | None = None
        if number > 1:
            # forkserver: a fork of this process could copy locks that threads of torch or of the tokenizer hold.
            context = multiprocessing.get_context("forkserver")
            self.pool = ProcessPoolExecutor(number, context, start_worker, (tokenizer, folder))

    def __enter__(self) -> Self:
        self.others = set(multiprocessing.active_children())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool:
            for process in set(multiprocessing.active_children()) - self.others if kind else ():
                process.terminate()  # their shards are whole or not there
            self.pool.shutdown(cancel_futures=True)

    def encode(self, piece: AnyPiece) -> int:
        """Takes a piece on; returns the bytes of text of the pieces that were finished meanwhile."""
        if self.pool is None:
            encode_piece(piece, self.tokenizer, self.folder)
            return piece.num_bytes
        self.jobs.append((piece.num_bytes, self.pool.submit(work, piece)))
        return self.finish(2 * self.number)

    def finish(self, num_left: int = 0) -> int:
        """Waits until no more than so many pieces are unfinished; returns the bytes of text of those that were finished."""
        finished = 0
        while len(self.jobs) > num_left:
            num_bytes, future = self.jobs.popleft()
            try:
                future.result()
            except BrokenProcessPool:
                raise ValueError(f"data.workers={self.number}: a worker was killed, perhaps for want of memory; set fewer") from None
            finished += num_bytes
        return finished


def start_worker(tokenizer: Tokenizer, folder: Path) -> None:
    """Ties a worker to its parent: it leaves ctrl-C to it, and ends with it instead of waiting for work for ever."""
    global job
    job = tokenizer, folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(piece: AnyPiece) -> None:
    encode_piece(piece, *job)


def encode_piece(piece: AnyPiece, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the shards of a piece: one of each part that it feeds."""
    dtype = token_dtype(tokenizer)
    tokens: dict[str, list[np.ndarray]] = {part: [] for part in piece.parts}
    starts: dict[str, list[int]] = {part: [] for part in piece.parts}
    counts, num_bytes = dict.fromkeys(piece.parts, 0), dict.fromkeys(piece.parts, 0)
    for text in piece.texts():
        ids = tokenizer.document(text.text, text.opens, text.closes)
        if text.opens:
            starts[text.part].append(counts[text.part])
        tokens[text.part].append(ids.astype(dtype))
        counts[text.part] += len(ids)
        num_bytes[text.part] += len(text.text.encode())
    for part in piece.parts:
        ids = np.concatenate([np.zeros(0, dtype), *tokens[part]])
        write_shard(folder / part / shard_name(piece.index), ids, starts[part], num_bytes[part], tokenizer)
