"""Tokens on disk: the shard file, how text becomes shards, and how they are found again and checked.

A shard is a header of 128 bytes, the tokens as little-endian uint16 (uint32 for a vocabulary above 65536), and for
each document that begins in it the index of its first token, as little-endian uint64. Every document ends with end of text.

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
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.schema import DataConfig, TokenizerConfig
from data.corpora import Piece, TextCorpus, empty_split
from data.tokenizer import Tokenizer, bytes_tokenizer, head, train_bpe

MAGIC = b"FLATGPT\0"
VERSION = 1  # of the shards' bytes and of how text is read; part of the cache key, so that another version is rebuilt
HEADER = struct.Struct("<8s2I4Q32s32s16x")  # the fields of Header, then the checksum
assert HEADER.size == 128


class Header(NamedTuple):
    magic: bytes
    version: int
    token_bytes: int  # 2 or 4
    num_tokens: int
    num_documents: int  # that begin in this shard
    num_bytes: int  # of text
    max_token: int
    tokenizer: bytes  # its hash

    def digest(self) -> "hashlib._Hash":
        """The checksum's beginning: sha256 is over the header's fields, then the tokens, then the documents."""
        return hashlib.sha256(HEADER.pack(*self, b""))


@dataclass(frozen=True)
class Shard:
    """A shard that can be read; tokens are memory-mapped and cost nothing until they are."""

    path: Path
    header: Header
    checksum: bytes

    @cached_property
    def tokens(self) -> np.ndarray:
        """(num_tokens,) unsigned."""
        if self.header.num_tokens == 0:
            return np.zeros(0, dtype=np.uint16)
        return np.memmap(self.path, f"<u{self.header.token_bytes}", "r", HEADER.size, (self.header.num_tokens,))

    @property
    def documents(self) -> np.ndarray:
        """(num_documents,) index of the first token of each document that begins here, uint64."""
        return np.fromfile(self.path, "<u8", offset=HEADER.size + self.header.num_tokens * self.header.token_bytes)

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer) -> "Shard":
        """Raises ValueError, naming the file and the remedy, for one that is truncated, of another version or tokenizer."""
        with path.open("rb") as file:
            start, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        if len(start) < HEADER.size or start[:8] != MAGIC:
            raise damaged(path, "is not a token shard")
        *fields, checksum = HEADER.unpack(start)
        header = Header(*fields)
        if header.version != VERSION:
            raise damaged(path, f"has version {header.version} where this program reads {VERSION}")
        if header.token_bytes not in (2, 4) or size != HEADER.size + header.num_tokens * header.token_bytes + header.num_documents * 8:
            raise damaged(path, f"has {size} bytes, not what its header says: it is cut off or corrupt")
        if header.tokenizer.hex() != tokenizer.hash:
            raise damaged(path, f"was written with another tokenizer ({header.tokenizer.hex()[:16]}, not {tokenizer.hash[:16]})")
        if header.max_token >= tokenizer.vocab_size:
            raise damaged(path, f"holds token {header.max_token}, beyond the vocabulary of {tokenizer.vocab_size}")
        return cls(path, header, checksum)

    def verify(self) -> None:
        """Reads all of it. Raises ValueError unless its contents are what was written."""
        digest = self.header.digest()
        with self.path.open("rb") as file:
            file.seek(HEADER.size)
            while block := file.read(2**22):
                digest.update(block)
        if digest.digest() != self.checksum:
            raise damaged(self.path, "does not have its checksum: it is corrupt")
        if self.header.num_tokens and int(self.tokens.max()) > self.header.max_token:
            raise damaged(self.path, f"holds token {self.tokens.max()}, beyond its own maximum of {self.header.max_token}")


def damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} {problem}; delete it, it is rebuilt at the next start")


class Tokens:
    """The tokens of one part of a corpus: its shards, read as one stream."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = [shard for shard in shards if shard.header.num_tokens]
        self.ends = np.cumsum([shard.header.num_tokens for shard in self.shards], dtype=np.int64)
        self.num_documents = sum(shard.header.num_documents for shard in shards)
        self.num_bytes = sum(shard.header.num_bytes for shard in shards)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.shards else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop (at most the end), int64."""
        parts, index, stop = [], int(np.searchsorted(self.ends, start, side="right")), min(stop, len(self))
        while start < stop:
            begin, end = int(self.ends[index]) - self.shards[index].header.num_tokens, int(self.ends[index])
            parts.append(self.shards[index].tokens[start - begin : stop - begin])
            start, index = end, index + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. `fingerprint` is a hash of all its tokens; `weights` are relative, None where there is one source."""

    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train: dict[str, Tokens]
    validation: dict[str, Tokens]
    weights: dict[str, float] | None
    fingerprint: str


def prepare(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> Corpus:
    """The corpus that the configuration names, out of the cache or made now, in tokens of a tokenizer that is given or configured.

    Work that another process began and did not finish is taken up; while another is at it, this one waits.
    Raises ValueError for text that cannot be found, read or split as asked, and for shards that are damaged.
    """
    text = TextCorpus(data)
    cache = Path(data.cache).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache={data.cache} cannot be made ({error.strerror}); name a folder that can be written") from None
    trained = tokenizer if isinstance(tokenizer, Tokenizer) else trained_tokenizer(text, tokenizer, cache)
    folder = cache / f"{key(text.identity)}-{trained.hash[:16]}"
    if not is_complete(folder):
        with locked(folder):
            if not is_complete(folder):
                fill(folder, text, trained)
    meta = json.loads((folder / "meta.json").read_text())
    shards = open_shards(folder, meta["parts"], trained)
    verify_once(folder, [shard for part in shards.values() for shard in part])
    parts = {part: Tokens(found) for part, found in shards.items()}
    train = {name: parts[f"train/{name}"] for name in text.sources}
    validation = {part.removeprefix("validation/"): tokens for part, tokens in parts.items() if part.startswith("validation/")}
    return Corpus(folder, meta, trained, train, validation, text.weights, meta["fingerprint"])


def key(identity: Any) -> str:
    """The name of what is made from something: a hash of that."""
    return hashlib.sha256(json.dumps([VERSION, identity]).encode()).hexdigest()[:16]


def trained_tokenizer(text: TextCorpus, config: TokenizerConfig, cache: Path) -> Tokenizer:
    """The tokenizer of the configuration; a bpe out of the cache, or trained now on the head of each source's training text."""
    if config.name == "bytes":
        return bytes_tokenizer()
    folder = cache / f"bpe-{key([text.identity, config.vocab_size, config.train_megabytes])}"
    if not (folder / "tokenizer.json").exists():
        with locked(folder):
            if not (folder / "tokenizer.json").exists():
                pieces, limit = text.pieces(), int(config.train_megabytes * 1e6)
                sources = [[piece for piece in pieces if piece.part == f"train/{name}"] for name in text.sources]
                texts = (head(training_texts(source), limit) for source in sources)
                train_bpe((text for source in texts for text in source), config.vocab_size).save(folder)
    return Tokenizer.load(folder)


def training_texts(pieces: list[Piece]) -> Iterator[str]:
    return (text.text for piece in pieces for text in piece.texts() if text.part == piece.part)


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
        raise damaged(folder / "meta.json", "cannot be read") from None
    return all(path.exists() for part, entry in parts.items() for path in shard_paths(folder, part, entry["shards"]))


def shard_paths(folder: Path, part: str, num_shards: int) -> list[Path]:
    return [folder / part / f"{index:05d}.bin" for index in range(num_shards)]


def fill(folder: Path, text: TextCorpus, tokenizer: Tokenizer) -> None:
    """Writes what the folder lacks: the shards, then the tokenizer, then meta.json. The lock must be held."""
    for leftover in folder.rglob("*.tmp"):
        leftover.unlink()
    for note in text.notes():
        print(f"note: {note}", file=sys.stderr)
    pieces = text.pieces()
    num_shards: dict[str, int] = {}
    for part in (part for piece in pieces for part in piece.parts):
        num_shards[part] = num_shards.get(part, 0) + 1
        (folder / part).mkdir(parents=True, exist_ok=True)
    todo = [piece for piece in pieces if not all((folder / part / f"{piece.index:05d}.bin").exists() for part in piece.parts)]
    encode_pieces(todo, tokenizer, folder, text.data.workers or num_cores())
    shards = open_shards(folder, {part: {"shards": number} for part, number in num_shards.items()}, tokenizer)
    parts = {part: {"shards": len(found), "tokens": sum(shard.header.num_tokens for shard in found),
                    "documents": sum(shard.header.num_documents for shard in found),
                    "bytes": sum(shard.header.num_bytes for shard in found)} for part, found in shards.items()}  # fmt: skip
    expected = {f"train/{name}" for name in text.sources} | {f"validation/{name}" for name in text.named}
    for part in sorted(expected | {text.held_out(name) for name in text.sources if not text.named}):
        if parts.get(part, {"tokens": 0})["tokens"] == 0:
            num_documents = sum(entry["documents"] for entry in parts.values())
            raise ValueError(f"{part} has no text; give files that hold some" if text.named or not num_documents
                             else empty_split(part, num_documents, text.data))  # fmt: skip
    fingerprint = hashlib.sha256(b"".join(shard.checksum for found in shards.values() for shard in found)).hexdigest()
    tokenizer.save(folder)
    meta = {"version": VERSION, "fingerprint": fingerprint, "corpus": text.identity, "parts": parts,
            "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash}}  # fmt: skip
    write(folder / "meta.json", json.dumps(meta, indent=1).encode())


def num_cores() -> int:
    """Cores that this process may use; a Slurm job or a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_pieces(pieces: list[Piece], tokenizer: Tokenizer, folder: Path, num_workers: int) -> None:
    """Turns pieces into shards, in processes where there is work for several. Raises what went wrong in one, as it is."""
    from tqdm import tqdm

    total = sum(piece.num_bytes for piece in pieces)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokens", disable=None, file=sys.stderr) as bar:
        if min(len(pieces), num_workers) <= 1:
            for piece in pieces:
                encode_piece(piece, tokenizer, folder)
                bar.update(piece.num_bytes)
            return
        # forkserver: a fork of this process could copy locks that threads of torch or of the tokenizer hold.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(len(pieces), num_workers), context, start_worker) as pool:
            try:
                jobs = [pool.submit(encode_piece, piece, tokenizer, folder) for piece in pieces]
                for piece, job in zip(pieces, jobs, strict=True):
                    job.result()
                    bar.update(piece.num_bytes)
            except BrokenProcessPool:
                raise ValueError(f"data.workers={num_workers}: a worker was killed, perhaps for want of memory; set fewer") from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def start_worker() -> None:
    """Ties a worker to its parent: it leaves ctrl-C to it, and ends with it instead of waiting for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_piece(piece: Piece, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the shards of a piece: one of each part that it feeds."""
    dtype = token_dtype(tokenizer)
    tokens: dict[str, list[np.ndarray]] = {part: [] for part in piece.parts}
    starts: dict[str, list[int]] = {part: [] for part in piece.parts}
    counts, num_bytes = dict.fromkeys(piece.parts, 0), dict.fromkeys(piece.parts, 0)
    for text in piece.texts():
        ids = tokenizer.encode(text.text)
        if text.opens:
            starts[text.part].append(counts[text.part])
        if text.closes:
            ids = np.append(ids, np.uint32(tokenizer.eot))
        tokens[text.part].append(ids.astype(dtype))
        counts[text.part] += len(ids)
        num_bytes[text.part] += len(text.text.encode())
    for part in piece.parts:
        ids = np.concatenate([np.zeros(0, dtype), *tokens[part]])
        write_shard(folder / part / f"{piece.index:05d}.bin", ids, starts[part], num_bytes[part], tokenizer)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write_shard(path: Path, ids: np.ndarray, starts: Sequence[int], num_bytes: int, tokenizer: Tokenizer) -> None:
    """Writes token ids and the starts of documents among them as a shard, in one step: under its name it is whole or not there."""
    dtype, max_token = token_dtype(tokenizer), int(ids.max()) if len(ids) else 0
    header = Header(MAGIC, VERSION, dtype.itemsize, len(ids), len(starts), num_bytes, max_token, bytes.fromhex(tokenizer.hash))
    payload = ids.astype(dtype).tobytes() + np.array(starts, dtype="<u8").tobytes()
    digest = header.digest()
    digest.update(payload)
    write(path, HEADER.pack(*header, digest.digest()) + payload)


def write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of this process: a dying one may still be at work
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# Reading


def open_shards(folder: Path, parts: dict[str, Any], tokenizer: Tokenizer) -> dict[str, list[Shard]]:
    return {part: [Shard.open(path, tokenizer) for path in shard_paths(folder, part, entry["shards"])] for part, entry in parts.items()}


def verify_once(folder: Path, shards: list[Shard]) -> None:
    """Verifies the shards that were not found right before, or that were touched since."""
    from tqdm import tqdm

    record = folder / "verified.json"
    stats = {shard.path.relative_to(folder).as_posix(): shard.path.stat() for shard in shards}
    current = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    try:
        known = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    doubtful = [shard for shard, name in zip(shards, current, strict=True) if known.get(name) != current[name]]
    for shard in tqdm(doubtful, desc="verifying", unit="shard", disable=None if len(doubtful) > 1 else True, file=sys.stderr):
        shard.verify()
    if doubtful:
        with contextlib.suppress(OSError):  # a cache that others share may be read-only; then every start verifies
            write(record, json.dumps(current).encode())
