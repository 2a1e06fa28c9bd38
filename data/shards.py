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
# Of the shards' bytes and of how text is read. It is part of the cache key, so that another version
# is rebuilt.
VERSION = 1
# The fields of Header, then the checksum.
HEADER = struct.Struct("<8s2I4Q32s32s16x")
assert HEADER.size == 128
REBUILT = "delete it, it is rebuilt at the next start"


class Header(NamedTuple):
    """The fields of a shard before its tokens.

    `token_bytes` is 2 or 4, `num_documents` counts those that begin in the shard, `num_bytes` is of
    text, and `tokenizer` is the hash of the tokenizer."""

    magic: bytes
    version: int
    token_bytes: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    max_token: int
    tokenizer: bytes

    def digest(self) -> "hashlib._Hash":
        """Returns the beginning of the checksum, a sha256 over the header's fields, then the
        tokens, then the documents."""
        return hashlib.sha256(HEADER.pack(*self, b""))


@dataclass(frozen=True)
class Shard:
    """A shard that can be read; tokens are memory-mapped and cost nothing until they are.

    `offset` is the byte of the file where the tokens begin, and `remedy` says what to do should it
    be damaged."""

    path: Path
    header: Header
    checksum: bytes
    offset: int = HEADER.size
    remedy: str = REBUILT

    @cached_property
    def tokens(self) -> np.ndarray:
        """Returns the tokens, (num_tokens,) unsigned."""
        # No memory can be mapped to nothing.
        if self.header.num_tokens == 0:
            return np.zeros(0, dtype=np.uint16)
        return np.memmap(
            self.path, f"<u{self.header.token_bytes}", "r", self.offset, (self.header.num_tokens,)
        )

    @property
    def documents(self) -> np.ndarray:
        """Returns the index of the first token of each document that begins here, (num_documents,)
        uint64."""
        return np.fromfile(
            self.path, "<u8", offset=HEADER.size + self.header.num_tokens * self.header.token_bytes
        )

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, remedy: str = REBUILT) -> "Shard":
        """Opens a shard of ours.

        Args:
            path: its file
            tokenizer: the tokenizer of its tokens
            remedy: what to do should it be damaged

        Raises:
            ValueError: it is truncated, or of another version or tokenizer; the error names the
                file and the remedy
        """

        def damaged(problem: str) -> ValueError:
            return ValueError(f"{path} {problem}; {remedy}")

        with open_regular(path) as file:
            start = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
        if len(start) < HEADER.size or start[:8] != MAGIC:
            raise damaged("is not a token shard")
        *fields, checksum = HEADER.unpack(start)
        header = Header(*fields)
        if header.version != VERSION:
            raise damaged(f"has version {header.version} where this program reads {VERSION}")
        # Only the size is compared here: reading all of a shard is left to `verify`.
        payload = header.num_tokens * header.token_bytes + header.num_documents * 8
        if header.token_bytes not in (2, 4) or size != HEADER.size + payload:
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
        """Reads all of the shard. Raises ValueError unless its contents are those that were
        written."""
        digest = self.header.digest()
        with open_regular(self.path) as file:
            file.seek(HEADER.size)
            while block := file.read(2**22):
                digest.update(block)
        if digest.digest() != self.checksum:
            raise ValueError(
                f"{self.path} does not have its checksum: it is corrupt; {self.remedy}"
            )
        # A checksum does not show a writer's mistake: an id beyond the vocabulary would fail in the
        # middle of a run.
        if self.header.num_tokens and int(self.tokens.max()) > self.header.max_token:
            raise ValueError(
                f"{self.path} holds token {self.tokens.max()}, beyond its own maximum of"
                f" {self.header.max_token}; {self.remedy}"
            )


class Tokens:
    """The tokens of one part of a corpus: its shards, read as one stream."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        # An empty shard has no tokens to be found by its end.
        self.shards = [shard for shard in shards if shard.header.num_tokens]
        self.ends = np.cumsum([shard.header.num_tokens for shard in self.shards], dtype=np.int64)
        self.num_documents = sum(shard.header.num_documents for shard in shards)
        self.num_bytes = sum(shard.header.num_bytes for shard in shards)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.shards else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens start to stop (at most the end), int64."""
        stop = min(stop, len(self))
        parts = []
        # The first shard that ends behind the start holds it.
        index = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            shard = self.shards[index]
            end = int(self.ends[index])
            begin = end - shard.header.num_tokens
            parts.append(shard.tokens[start - begin : stop - begin])
            start = end
            index += 1
        # numpy joins no empty list.
        if not parts:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate(parts).astype(np.int64)


Count = Annotated[int, msgspec.Meta(ge=0)]


class Part(TypedDict):
    """The counts of a part of a corpus."""

    shards: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
    tokens: Count
    documents: Count
    bytes: Count


class TokenizerMeta(TypedDict):
    """The tokenizer of a corpus, as meta.json names it."""

    name: str
    vocab_size: int
    hash: str


class Meta(TypedDict):
    """The meta.json of a prepared corpus.

    `notes` are lines that every user of the corpus should see; `skipped` counts rows that could not
    be read, by part."""

    version: NotRequired[int]
    fingerprint: str
    corpus: NotRequired[dict[str, Any]]
    parts: dict[Annotated[str, msgspec.Meta(pattern=r"^(train|validation)/[\w.+-]+$")], Part]
    tokenizer: NotRequired[TokenizerMeta]
    notes: NotRequired[list[str]]
    skipped: NotRequired[dict[str, Count]]
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
    """Returns the name for a thing that is made of an identity: a hash of that."""
    return hashlib.sha256(json.dumps([VERSION, identity]).encode()).hexdigest()[:16]


# Writing


def shard_name(index: int) -> str:
    """Returns the name of the file of a shard."""
    return f"{index:05d}.bin"


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the type of tokens on disk, wide enough for the vocabulary."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write_shard(
    path: Path, ids: np.ndarray, starts: Sequence[int], num_bytes: int, tokenizer: Tokenizer
) -> None:
    """Writes a shard in one step: under its name it is whole or not there.

    Args:
        path: its file
        ids: the token ids
        starts: the indices of the first tokens of documents
        num_bytes: bytes of the text
        tokenizer: the tokenizer of the ids
    """
    dtype = token_dtype(tokenizer)
    # A part of a piece may get no document, and so no token.
    max_token = int(ids.max(initial=0))
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
    found right more than so many days ago, as disks lose bits.

    Args:
        folder: the folder whose verified.json remembers what was found right
        shards: the shards
        days: days after which a shard is verified again

    Raises:
        ValueError: a shard is damaged
    """
    from tqdm import tqdm

    record = folder / "verified.json"
    current = sizes_and_times(folder, shards)
    # A record that is damaged vouches for nothing.
    try:
        known = read_json(record, dict[str, list[int | float]], {})
    except ValueError:
        known = {}
    doubtful = [
        shard
        for shard, name in zip(shards, current, strict=True)
        if known.get(name, [])[:2] != current[name] or is_old(known[name][2:], days)
    ]
    if not doubtful:
        return
    # tqdm's None shows a bar on a terminal only. A single shard needs none.
    disable = None if len(doubtful) > 1 else True
    bar = tqdm(doubtful, desc="verifying", unit="shard", disable=disable, file=sys.stderr)
    for shard in bar:
        shard.verify()
        # Without a time here, the shard gets the present one below.
        known[name_in(folder, shard.path)] = []
    looked = {name: [*stat, *(known[name][2:] or [time.time()])] for name, stat in current.items()}
    # A cache that others share may be read-only: then every start verifies.
    with contextlib.suppress(OSError):
        write_atomically(record, json.dumps(looked))


def sizes_and_times(folder: Path, shards: Sequence[Shard]) -> dict[str, list[int]]:
    """Returns the size and the time of each shard, by its path from the folder."""
    found: dict[str, list[int]] = {}
    for shard in shards:
        stat = shard.path.stat()
        found[name_in(folder, shard.path)] = [stat.st_size, stat.st_mtime_ns]
    return found


def name_in(folder: Path, path: Path) -> str:
    """Returns the path of a file from a folder, alike on every system."""
    return os.path.relpath(path, folder).replace(os.sep, "/")


def is_old(looked: Sequence[float], days: float) -> bool:
    """Returns whether a time, if there is one, lies more than so many days back, or in the future
    by the clock of another host."""
    # A time in the future is not trusted either.
    return not looked or abs(time.time() - looked[0]) >= days * 86400
