"""Prepared corpora: found in the cache, or made there by processes that turn pieces of text into
shards.

<cache>/<corpus>-<tokenizer>/    train/<source>/00000.bin, validation/<set>/00000.bin, ...,
                                 tokenizer.json
                                 00000.skipped.json beside a shard: rows that could not be read
                                 empty_split.json  why random documents could not be held out, where
                                 they could not
                                 meta.json       what was made of what; written last, so its
                                                 presence means complete
                                 verified.json   size and time of the shards whose checksums were
                                                 found right, and when
<cache>/bpe-<key>/               a trained tokenizer
<cache>/digests-<key>.json       sha256 of the files of a corpus as they lie there: another copy of
                                 them is the same corpus
<cache>/asked-<key>.json         the folder of a corpus, by what was asked for: its text may be gone
                                 by now

A corpus that was prepared before digests were taken is found by the names, sizes and times of its
files."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from conf.key import expand
from conf.text import DataConfig, TokenizerConfig
from data.corpora import (
    BadRow,
    EmptySplit,
    File,
    NoText,
    Piece,
    TextCorpus,
    digest,
    documents,
    empty_split,
    extent,
    skip,
    spans,
)
from data.files import DamagedFile, read_json, write_atomically
from data.hf_tokenizer import known_tokenizer
from data.hub import HubCorpus, HubPiece
from data.overlap import leaks, note_once
from data.shards import (
    REBUILT,
    VERSION,
    Corpus,
    Meta,
    Part,
    Shard,
    Tokens,
    key,
    shard_name,
    token_dtype,
    verify_once,
    write_shard,
)
from data.tokenizer import Tokenizer, head, train_bpe
from data.tokens import check_tokens, open_tokens

AnyCorpus = TextCorpus | HubCorpus
AnyPiece = Piece | HubPiece
job: tuple[Tokenizer, Path]  # what a worker process makes shards with, and where
EMPTY_SPLIT = "empty_split.json"
# What to do about a shard that is damaged, where the text that it was made of is gone.
GONE = "bring its text back and delete the shard, which is rebuilt from that, or bring a copy of it"
FILES_LOOKED_AT = 100  # of each source, by `check`
SIGN_OF_LIFE = 30.0  # seconds between lines while a tokenizer is trained


class Skipped(TypedDict):
    """The rows of a piece that could not be read: how many, and what was wrong with the first."""

    count: int
    first: list[str]


def prepare(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> Corpus:
    """The corpus that the configuration names, out of the cache or made now, in tokens of a
    tokenizer that is given or configured.

    Work that another process began and did not finish is taken up; while another is at it, this one
    waits. Raises ValueError for text that cannot be found, read or split as asked, for shards that
    are damaged, and for what the system refuses, as a full disk does: what is prepared by then is
    kept."""
    cache = Path(expand("data.cache", data.cache))
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache={data.cache} cannot be made ({error.strerror}); name a folder that can be"
            " written"
        ) from None
    try:
        if data.source == "tokens":
            return open_tokens(data, tokenizer, cache)
        return open_text(data, tokenizer, cache)
    except OSError as error:
        place = error.filename or f"data.cache={data.cache}"
        raise ValueError(
            f"{place}: {error.strerror or error}; once that is mended the same command goes on from"
            " what is prepared"
        ) from error


def check(data: DataConfig, tokenizer: TokenizerConfig, length: int) -> None:
    """Raises ValueError for what a run on sequences of `length` tokens would refuse, as far as that
    shows without reading much, writing or asking the network."""
    cache = Path(expand("data.cache", data.cache)).absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(
            f"data.cache={data.cache} cannot be made ({there} is no folder); name a folder that can"
            " be written"
        )
    if data.source == "stdlib":
        return
    if data.source == "tokens":
        check_tokens(data, tokenizer, cache)
        return
    try:
        text = find_text(data)
    except NoText:
        if recall(data, tokenizer, cache):
            return
        raise
    if isinstance(text, TextCorpus):
        for name, files in [*text.sources.items(), *text.named.items()]:
            check_text(text, name, files, length if name in text.sources else 1)


def check_text(text: TextCorpus, name: str, files: list[File], length: int) -> None:
    """Raises ValueError where files hold too little text for a sequence, or one of them, of the
    first FILES_LOOKED_AT, begins with rows that cannot be read."""
    filled = [file for file in files if file.size]
    if not filled:
        raise ValueError(f"{files[0].path} has no text; give files with some")
    # A token is a byte at least, but for those that begin and end a document.
    most = sum(file.size for file in files) + 2 * len(files)
    if most <= length and not any(file.path.endswith(".parquet") for file in files):
        raise ValueError(
            f"batch.length={length} needs {length + 1} tokens but the source {name} has {most} at"
            " most; shorten it or give more text"
        )
    for file in filled[:FILES_LOOKED_AT]:
        for span, _ in itertools.islice(spans(file, 0, extent(file), text.layout), 1):
            for _, found in itertools.islice(documents(span, text.layout), 100):
                if isinstance(found, BadRow):
                    skip(found, text.data.bad_rows, None)


def open_text(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, cache: Path) -> Corpus:
    """The corpus of a text, made where the cache lacks it. Where the text is gone, it is what was
    prepared from it."""
    try:
        text = find_text(data)
        if isinstance(text, HubCorpus) and not text.local and recall(data, tokenizer, cache):
            raise NoText(f"data.path={data.path} is no folder any more")
    except NoText as error:
        known = recall(data, tokenizer, cache)
        if known is None:
            raise
        note_once([f"{str(error).partition(';')[0]}; what was prepared from it is used: {known}"])
        return open_prepared(known, data, Tokenizer.load(known), GONE)
    digests = digest_files(text.files, cache)
    try:
        folder, chosen = prepare_text(text, digests, tokenizer, cache)
    except EmptySplit as error:
        assert isinstance(text, TextCorpus)
        text.hold_out_the_tail(str(error))
        folder, chosen = prepare_text(text, digests, tokenizer, cache)
    note_once(text.warnings)
    if isinstance(text, TextCorpus) or text.local:
        remember(data, tokenizer, chosen, folder)
    return open_prepared(folder, data, chosen)


def find_text(data: DataConfig) -> AnyCorpus:
    return HubCorpus(data) if data.source == "hub" else TextCorpus(data)


def prepare_text(
    text: AnyCorpus, digests: dict[str, str], tokenizer: TokenizerConfig | Tokenizer, cache: Path
) -> tuple[Path, Tokenizer]:
    """Returns the folder where a text is prepared, which is done now unless it was, and the
    tokenizer."""
    chosen = (
        tokenizer
        if isinstance(tokenizer, Tokenizer)
        else find_tokenizer(text, digests, tokenizer, cache)
    )
    folder = find_folder(
        text, digests, lambda identity: cache / f"{key(identity)}-{chosen.hash[:16]}", "meta.json"
    )
    if not is_complete(folder):
        if (
            isinstance(text, TextCorpus)
            and text.split == "documents"
            and (reason := read_json(folder / EMPTY_SPLIT, str, ""))
        ):
            raise EmptySplit(reason)
        with locked(folder):
            if not is_complete(folder):
                fill(folder, text, digests, chosen)
    return folder, chosen


def open_prepared(
    folder: Path, data: DataConfig, tokenizer: Tokenizer, remedy: str = REBUILT
) -> Corpus:
    """The corpus in a folder that is complete. Raises ValueError for shards that are damaged, with
    the remedy, and for rows that were skipped when it was prepared but are not to be."""
    meta = read_json(folder / "meta.json", Meta)
    if data.bad_rows == "error" and (num_skipped := sum(meta.get("skipped", {}).values())):
        raise ValueError(
            f"{folder} was prepared without {num_skipped} rows that cannot be read, the first:"
            f" {meta.get('first_skipped')}; set data.bad_rows=skip to use it, or mend the rows"
        )
    shards = open_shards(
        folder, {part: entry["shards"] for part, entry in meta["parts"].items()}, tokenizer, remedy
    )
    verify_once(folder, [shard for part in shards.values() for shard in part], data.verify_days)
    note_once(meta.get("notes", []))
    sources = (data.sources or {}) if data.source == "text" else {}
    parts = {part: Tokens(found) for part, found in shards.items()}
    names = list(sources) or [
        part.removeprefix("train/") for part in parts if part.startswith("train/")
    ]
    train = {name: parts[f"train/{name}"] for name in names}
    validation = {
        part.removeprefix("validation/"): tokens
        for part, tokens in parts.items()
        if part.startswith("validation/")
    }
    weights = {name: source.weight for name, source in sources.items()} or None
    return Corpus(folder, meta, tokenizer, train, validation, weights, meta["fingerprint"])


def find_tokenizer(
    text: AnyCorpus, digests: dict[str, str], config: TokenizerConfig, cache: Path
) -> Tokenizer:
    """The tokenizer of the configuration; a bpe out of the cache, or trained now on the head of
    each source's training text."""
    if known := known_tokenizer(config, cache):
        return known

    def name(identity: Any) -> Path:
        return cache / f"bpe-{key([identity, config.vocab_size, config.train_megabytes])}"

    folder = find_folder(text, digests, name, "tokenizer.json")
    if not (folder / "tokenizer.json").exists():
        with locked(folder):
            if not (folder / "tokenizer.json").exists():
                train_apart(text, config).save(folder)
    return Tokenizer.load(folder)


def train_apart(text: AnyCorpus, config: TokenizerConfig) -> Tokenizer:
    """Returns a bpe that is trained in a process of its own, which ctrl-C ends: the library does
    not listen."""
    print(
        f"training tokenizer=bpe of {config.vocab_size:,} ids on up to {config.train_megabytes:g}"
        " MB of each source",
        file=sys.stderr,
    )
    began = time.monotonic()
    with worker_processes(1, None) as pool:
        future = pool.submit(train_on_head, text, config)
        while True:
            try:
                return future.result(SIGN_OF_LIFE)
            except TimeoutError:
                if future.done():
                    raise
                print(
                    f"training tokenizer=bpe: {time.monotonic() - began:.0f} s so far",
                    file=sys.stderr,
                )
            except BrokenProcessPool:
                raise ValueError(
                    f"tokenizer.train_megabytes={config.train_megabytes}: training the tokenizer"
                    " was killed, perhaps for want of memory; set less"
                ) from None


def train_on_head(text: AnyCorpus, config: TokenizerConfig) -> Tokenizer:
    limit = int(config.train_megabytes * 1e6)
    return train_bpe(
        (part for name in text.sources for part in head(text.training_texts(name), limit)),
        config.vocab_size,
    )


# Finding again


def digest_files(files: list[File], cache: Path) -> dict[str, str]:
    """Returns the sha256 of each file by its path; those of files that have not been touched since
    are in the cache."""
    if not files:
        return {}
    record = (
        cache / f"digests-{key([[file.path, file.size, file.mtime_ns] for file in files])}.json"
    )
    try:
        known = read_json(record, list[str], [])
    except ValueError:
        known = []
    if len(known) != len(files):
        known = [digest(file) for file in files]
        record_if_writable(record, known)
    return {file.path: found for file, found in zip(files, known, strict=True)}


def find_folder(
    text: AnyCorpus, digests: dict[str, str], name: Callable[[Any], Path], last: str
) -> Path:
    """Returns the folder of a corpus by the content of its files, or one that was named after their
    times and holds the `last` file."""
    by_content = name(text.identify(lambda file: [file.name, file.size, digests[file.path]]))
    by_times = name(text.identity)
    return (
        by_times if (by_times / last).exists() and not (by_content / last).exists() else by_content
    )


def asked(data: DataConfig, tokenizer: TokenizerConfig | str, cache: Path) -> Path:
    """Returns the file that remembers the folder of a corpus by what was asked for; a tokenizer may
    be named by its hash."""
    request = asdict(data)
    for name in ("name", "cache", "workers", "bad_rows", "verify_days"):
        del request[name]
    request["path"] = absolute(data.path)
    if data.source == "text":
        request["sources"] = {
            name: absolute(source.path) for name, source in (data.sources or {}).items()
        }
        request["validation"] = {
            name: absolute(paths) for name, paths in (data.validation or {}).items()
        }
    asked_for = [request, tokenizer if isinstance(tokenizer, str) else asdict(tokenizer)]
    return cache / f"asked-{key(asked_for)}.json"


def absolute(paths: Any) -> Any:
    """Returns a path, or a list of them, as they are from any folder."""
    if isinstance(paths, (list, tuple)):
        return [absolute(path) for path in paths]
    return os.path.abspath(os.path.expanduser(paths)) if isinstance(paths, str) else paths


def remember(
    data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, chosen: Tokenizer, folder: Path
) -> None:
    """Notes in the cache which folder answers a request, for the time when the text is gone."""
    for asked_for in (
        {chosen.hash} if isinstance(tokenizer, Tokenizer) else (chosen.hash, tokenizer)
    ):
        record = asked(data, asked_for, folder.parent)
        with contextlib.suppress(ValueError):
            if read_json(record, str, "") != folder.name:
                record_if_writable(record, folder.name)


def recall(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, cache: Path) -> Path | None:
    """Returns the complete folder that answered a request before."""
    try:
        name = read_json(
            asked(data, tokenizer.hash if isinstance(tokenizer, Tokenizer) else tokenizer, cache),
            str,
            "",
        )
        return cache / name if name and "/" not in name and is_complete(cache / name) else None
    except (
        AttributeError,
        TypeError,
        ValueError,
    ):  # a request that is malformed is refused elsewhere
        return None


def record_if_writable(record: Path, content: Any) -> None:
    with contextlib.suppress(OSError):  # a cache that others share may be read-only
        write_atomically(record, json.dumps(content))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; waits while another has it. A process that
    dies lets go.

    Where the file system has no locks, a file that its owner touches now and then stands for one;
    no two clocks are compared."""
    folder.mkdir(exist_ok=True)
    waiting = f"waiting for another process that prepares {folder}"
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder.parent / f"{folder.name}.lock").open("w"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            from filelock import SoftFileLease, Timeout

            lease = SoftFileLease(folder.parent / f"{folder.name}.lease")
            try:
                lease.acquire(timeout=0)
            except Timeout:
                print(waiting, file=sys.stderr)
                lease.acquire()
            stack.callback(lease.release)
        yield


# Writing


def is_complete(folder: Path) -> bool:
    """Whether meta.json is there and no shard that it lists is missing."""
    try:
        parts = read_json(folder / "meta.json", Meta)["parts"]
    except FileNotFoundError:
        return False
    except DamagedFile as error:
        raise ValueError(f"{error}: meta.json cannot be read; {REBUILT}") from None
    return all(
        (folder / part / shard_name(index)).exists()
        for part, entry in parts.items()
        for index in range(entry["shards"])
    )


def open_shards(
    folder: Path, num_shards: dict[str, int], tokenizer: Tokenizer, remedy: str = REBUILT
) -> dict[str, list[Shard]]:
    return {
        part: [
            Shard.open(folder / part / shard_name(index), tokenizer, remedy)
            for index in range(number)
        ]
        for part, number in num_shards.items()
    }


def fill(folder: Path, text: AnyCorpus, digests: dict[str, str], tokenizer: Tokenizer) -> None:
    """Writes what the folder lacks: the shards, then the tokenizer, then meta.json. The lock must
    be held.

    Raises ValueError for a part that comes out without text: EmptySplit where random documents were
    held out."""
    for leftover in folder.rglob("*.tmp"):
        leftover.unlink()
    whole = text.leaks(digests)
    note_once([*whole.values()])
    num_shards = encode_pieces(
        text.pieces(folder), tokenizer, folder, text.data.workers or num_cores()
    )
    shards = open_shards(folder, num_shards, tokenizer)
    skipped = {
        part: found for part in num_shards if (found := skipped_rows(folder / part))["count"]
    }
    parts = {part: summary(found) for part, found in shards.items()}
    try:
        refuse_empty(text, parts, skipped)
    except EmptySplit as error:
        write_atomically(folder / EMPTY_SPLIT, json.dumps(str(error)))
        raise
    partly = leaks(
        {part: Tokens(found) for part, found in shards.items() if part not in whole}, tokenizer
    )
    tokenizer.save(folder)
    meta: Meta = {
        "version": VERSION,
        "fingerprint": (
            hashlib.sha256(
                b"".join(shard.checksum for found in shards.values() for shard in found)
            ).hexdigest()
        ),
        "corpus": text.identity,
        "parts": parts,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "hash": tokenizer.hash,
        },
        "notes": [*whole.values(), *partly],
    }
    if skipped:
        meta["skipped"] = {part: found["count"] for part, found in skipped.items()}
        meta["first_skipped"] = next(iter(skipped.values()))["first"][0]
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1))


def summary(shards: list[Shard]) -> Part:
    """Returns what the shards of a part come to."""
    headers = [shard.header for shard in shards]
    return {
        "shards": len(headers),
        "tokens": sum(header.num_tokens for header in headers),
        "documents": sum(header.num_documents for header in headers),
        "bytes": sum(header.num_bytes for header in headers),
    }


def skipped_rows(folder: Path) -> Skipped:
    """Returns the rows of a part that could not be read, from the records beside its shards."""
    records = [read_json(path, Skipped) for path in sorted(folder.glob("*.skipped.json"))]
    return {
        "count": sum(record["count"] for record in records),
        "first": [line for record in records for line in record["first"]],
    }


def refuse_empty(text: AnyCorpus, parts: dict[str, Part], skipped: dict[str, Skipped]) -> None:
    """Raises ValueError for a part that has come out without text."""
    held_out = set() if text.named else {text.held_out(name) for name in text.sources}
    expected = (
        {f"train/{name}" for name in text.sources}
        | {f"validation/{name}" for name in text.named}
        | held_out
    )
    num_documents = sum(entry["documents"] for entry in parts.values())
    for part in sorted(expected):
        if part in parts and parts[part]["tokens"]:
            continue
        if text.named or not num_documents:
            reason = (
                f" (rows were skipped, the first: {skipped[part]['first'][0]})"
                if part in skipped
                else ""
            )
            raise ValueError(
                f"{part} has no text{reason}; give"
                f" {'a split' if isinstance(text, HubCorpus) else 'files'} with some"
            )
        reason = empty_split(part, num_documents, text.data)
        if isinstance(text, HubCorpus):
            raise ValueError(
                f"{reason}; raise it or data.documents, or name a split in data.validation"
            )
        if text.split == "documents":
            raise EmptySplit(reason)
        raise ValueError(
            f"{reason}, by its tail too; raise data.validation_fraction, give more text, or name a"
            " set in data.validation"
        )


def num_cores() -> int:
    """Cores that this process may use; a Slurm job or a container may have fewer than the
    machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_pieces(
    pieces: Iterable[AnyPiece], tokenizer: Tokenizer, folder: Path, num_workers: int
) -> dict[str, int]:
    """Turns the pieces whose shards are not in the folder into shards, in processes where there is
    work for several, and returns the number of shards of each part. Raises what went wrong in a
    process, as it is."""
    from tqdm import tqdm

    num_shards: dict[str, int] = {}
    total = None
    if isinstance(
        pieces, list
    ):  # otherwise they come as they are asked for, and nobody knows how many
        lacking = [piece for piece in pieces if not is_done(piece, folder)]
        total, num_workers = (
            sum(piece.num_bytes for piece in lacking),
            min(num_workers, len(lacking)),
        )
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokens", disable=None, file=sys.stderr)
    # A pool needs processes of its own, so a single worker is this process.
    several = (
        worker_processes(num_workers, (tokenizer, folder))
        if num_workers > 1
        else contextlib.nullcontext()
    )
    with bar, several as pool:
        workers = Workers(num_workers, pool, tokenizer, folder)
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
    """Processes that encode pieces; without a pool, this process.

    They are given few pieces ahead of their work, for a piece of a stream holds its text, and are
    told the tokenizer once."""

    def __init__(
        self, number: int, pool: ProcessPoolExecutor | None, tokenizer: Tokenizer, folder: Path
    ) -> None:
        self.number, self.pool, self.tokenizer, self.folder = number, pool, tokenizer, folder
        self.jobs: deque[tuple[int, Future[None]]] = deque()

    def encode(self, piece: AnyPiece) -> int:
        """Takes a piece on; returns the bytes of text of the pieces that were finished
        meanwhile."""
        if self.pool is None:
            encode_piece(piece, self.tokenizer, self.folder)
            return piece.num_bytes
        self.jobs.append((piece.num_bytes, self.pool.submit(work, piece)))
        return self.finish(2 * self.number)

    def finish(self, num_left: int = 0) -> int:
        """Waits until no more than so many pieces are unfinished; returns the bytes of text of
        those that were finished."""
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
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # their shards are whole or not there
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(given: tuple[Tokenizer, Path] | None) -> None:
    """Ties a worker to its parent: it leaves ctrl-C to it, and ends with it instead of waiting for
    work for ever."""
    global job
    if given:
        job = given
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
    skipped: list[str] = []
    for text in piece.texts(skipped):
        try:
            ids = tokenizer.document(text.text, text.opens, text.closes)
        except ValueError as error:
            row = BadRow(
                f"{text.place} cannot be made into tokens ({' '.join(str(error).split())})"
            )
            # Of a document that is cut, the other parts may be elsewhere by now.
            skip(row, piece.bad_rows if text.opens and text.closes else "error", skipped)
            continue
        if text.opens:
            starts[text.part].append(counts[text.part])
        tokens[text.part].append(ids.astype(dtype))
        counts[text.part] += len(ids)
        num_bytes[text.part] += len(text.text.encode())
    if skipped:
        found: Skipped = {"count": len(skipped), "first": skipped[:100]}
        write_atomically(folder / piece.part / f"{piece.index:05d}.skipped.json", json.dumps(found))
    for part in piece.parts:
        ids = np.concatenate([np.zeros(0, dtype), *tokens[part]])
        write_shard(
            folder / part / shard_name(piece.index), ids, starts[part], num_bytes[part], tokenizer
        )
