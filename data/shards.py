"""Tokens on disk: the shard file, and shards read as one stream.

A shard is a header of 128 bytes, the tokens as little-endian uint16 (uint32 for a vocabulary above
65536), and for each document that begins in it the index of its first token, as little-endian
uint64. Every document ends with end of text."""

import contextlib
import hashlib
import json
import os
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import msgspec
import numpy as np

from data.files import open_regular, read_json, write_atomically
from data.tokenizer import Tokenizer

MAGIC = b"FLATGPT\0"
# of the shards' bytes and of how text is read; part of the cache key, so that another version is
# rebuilt
VERSION = 1
HEADER = struct.Struct("<8s2I4Q32s32s16x")  # the fields of Header, then the checksum
assert HEADER.size == 128
REBUILT = "delete it, it is rebuilt at the next start"


class Header(NamedTuple):
    """What a shard says of itself before its tokens."""

    magic: bytes
    version: int
    token_bytes: int  # 2 or 4
    num_tokens: int
    num_documents: int  # that begin in this shard
    num_bytes: int  # of text
    max_token: int
    tokenizer: bytes  # its hash

    def digest(self) -> "hashlib._Hash":
        """The checksum's beginning: sha256 is over the header's fields, then the tokens, then the
        documents."""
        return hashlib.sha256(HEADER.pack(*self, b""))


@dataclass(frozen=True)
class Shard:
    """A shard that can be read; tokens are memory-mapped and cost nothing until they are."""

    path: Path
    header: Header
    checksum: bytes
    offset: int = HEADER.size  # byte of the file where the tokens begin
    remedy: str = REBUILT  # what to do should it be damaged

    @cached_property
    def tokens(self) -> np.ndarray:
        """(num_tokens,) unsigned."""
        if self.header.num_tokens == 0:
            return np.zeros(0, dtype=np.uint16)
        return np.memmap(
            self.path, f"<u{self.header.token_bytes}", "r", self.offset, (self.header.num_tokens,)
        )

    @property
    def documents(self) -> np.ndarray:
        """(num_documents,) index of the first token of each document that begins here, uint64."""
        return np.fromfile(
            self.path, "<u8", offset=HEADER.size + self.header.num_tokens * self.header.token_bytes
        )

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, remedy: str = REBUILT) -> "Shard":
        """Raises ValueError, naming the file and the remedy, for one that is truncated, of another
        version or tokenizer."""

        def damaged(problem: str) -> ValueError:
            return ValueError(f"{path} {problem}; {remedy}")

        with open_regular(path) as file:
            start, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        if len(start) < HEADER.size or start[:8] != MAGIC:
            raise damaged("is not a token shard")
        *fields, checksum = HEADER.unpack(start)
        header = Header(*fields)
        if header.version != VERSION:
            raise damaged(f"has version {header.version} where this program reads {VERSION}")
        if (
            header.token_bytes not in (2, 4)
            or size
            != HEADER.size + header.num_tokens * header.token_bytes + header.num_documents * 8
        ):
            raise damaged(f"has {size} bytes, not what its header says: it is cut off or corrupt")
        if header.tokenizer.hex() != tokenizer.hash:
            raise damaged(
                f"was written with another tokenizer ({header.tokenizer.hex()[:16]}, not"
                f" {tokenizer.hash[:16]})"
            )
        if header.max_token >= tokenizer.vocab_size:
            raise damaged(
                f"holds token {header.max_token}, beyond the vocabulary of {tokenizer.vocab_size}"
            )
        return cls(path, header, checksum, remedy=remedy)

    def verify(self) -> None:
        """Reads all of it. Raises ValueError unless its contents are what was written."""
        digest = self.header.digest()
        with open_regular(self.path) as file:
            file.seek(HEADER.size)
            while block := file.read(2**22):
                digest.update(block)
        if digest.digest() != self.checksum:
            raise ValueError(
                f"{self.path} does not have its checksum: it is corrupt; {self.remedy}"
            )
        if self.header.num_tokens and int(self.tokens.max()) > self.header.max_token:
            raise ValueError(
                f"{self.path} holds token {self.tokens.max()}, beyond its own maximum of"
                f" {self.header.max_token}; {self.remedy}"
            )


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
        parts, index, stop = (
            [],
            int(np.searchsorted(self.ends, start, side="right")),
            min(stop, len(self)),
        )
        while start < stop:
            begin, end = (
                int(self.ends[index]) - self.shards[index].header.num_tokens,
                int(self.ends[index]),
            )
            parts.append(self.shards[index].tokens[start - begin : stop - begin])
            start, index = end, index + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


Count = Annotated[int, msgspec.Meta(ge=0)]


class Part(TypedDict):
    """What a part of a corpus comes to."""

    shards: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
    tokens: Count
    documents: Count
    bytes: Count


class TokenizerMeta(TypedDict):
    name: str
    vocab_size: int
    hash: str


class Meta(TypedDict):
    """The meta.json of a prepared corpus."""

    version: NotRequired[int]
    fingerprint: str
    corpus: NotRequired[dict[str, Any]]
    parts: dict[Annotated[str, msgspec.Meta(pattern=r"^(train|validation)/[\w.+-]+$")], Part]
    tokenizer: NotRequired[TokenizerMeta]
    notes: NotRequired[list[str]]  # what every user of the corpus should know
    skipped: NotRequired[dict[str, Count]]  # rows that could not be read, by part
    first_skipped: NotRequired[str]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. `fingerprint` is a hash of all its tokens; `weights` are relative, None
    where there is one source."""

    folder: Path
    meta: Meta
    tokenizer: Tokenizer
    train: dict[str, Tokens]
    validation: dict[str, Tokens]
    weights: dict[str, float] | None
    fingerprint: str


def key(identity: Any) -> str:
    """The name of what is made from something: a hash of that."""
    return hashlib.sha256(json.dumps([VERSION, identity]).encode()).hexdigest()[:16]


# Writing


def shard_name(index: int) -> str:
    return f"{index:05d}.bin"


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write_shard(
    path: Path, ids: np.ndarray, starts: Sequence[int], num_bytes: int, tokenizer: Tokenizer
) -> None:
    """Writes token ids and the starts of documents among them as a shard, in one step: under its
    name it is whole or not there."""
    dtype, max_token = token_dtype(tokenizer), int(ids.max()) if len(ids) else 0
    header = Header(
        MAGIC,
        VERSION,
        dtype.itemsize,
        len(ids),
        len(starts),
        num_bytes,
        max_token,
        bytes.fromhex(tokenizer.hash),
    )
    payload = ids.astype(dtype).tobytes() + np.array(starts, dtype="<u8").tobytes()
    digest = header.digest()
    digest.update(payload)
    write_atomically(path, HEADER.pack(*header, digest.digest()) + payload)


# Reading


def verify_once(folder: Path, shards: Sequence[Shard], days: float) -> None:
    """Verifies the shards that were not found right before, that were touched since, or that were
    found right more than so many days ago, as disks lose bits; the folder's verified.json tells."""
    from tqdm import tqdm

    record = folder / "verified.json"
    stats = {
        os.path.relpath(shard.path, folder).replace(os.sep, "/"): shard.path.stat()
        for shard in shards
    }
    current = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    try:
        known = read_json(record, dict[str, list[int | float]], {})
    except ValueError:
        known = {}
    doubtful = [
        shard
        for shard, name in zip(shards, current, strict=True)
        if known.get(name, [])[:2] != current[name] or is_old(known[name][2:], days)
    ]
    for shard in tqdm(
        doubtful,
        desc="verifying",
        unit="shard",
        disable=None if len(doubtful) > 1 else True,
        file=sys.stderr,
    ):
        shard.verify()
        known[os.path.relpath(shard.path, folder).replace(os.sep, "/")] = []
    if doubtful:
        looked = {
            name: [*stat, *(known[name][2:] or [time.time()])] for name, stat in current.items()
        }
        with contextlib.suppress(
            OSError
        ):  # a cache that others share may be read-only; then every start verifies
            write_atomically(record, json.dumps(looked))


def is_old(looked: Sequence[float], days: float) -> bool:
    """Returns whether a time, if there is one, lies more than so many days back, or in the future
    by the clock of another host."""
    return not looked or abs(time.time() - looked[0]) >= days * 86400
