"""Shards that exist already, read where they lie: our own, and files of raw uint16 as nanoGPT
writes them.

A raw file says nothing of itself, so it is read through once, to count its documents and to see
that all ids are in the vocabulary; a file in <cache>/tokens-<key>/ remembers. What a run resumes on
is known by the checksums of the tokens, wherever the files lie."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from conf.key import expand
from conf.text import DataConfig, TokenizerConfig
from data.corpora import find_files
from data.files import DamagedFile, open_regular, read_json, write_atomically
from data.hf_tokenizer import known_tokenizer
from data.overlap import leaks, note_once
from data.shards import (
    MAGIC,
    VERSION,
    Corpus,
    Header,
    Meta,
    Shard,
    Tokens,
    is_old,
    key,
    shard_name,
    verify_once,
)
from data.tokenizer import Tokenizer

BLOCK = 2**22  # tokens that are looked at together
REMEDY = "name the tokenizer that it was made with, or get the file again"
OTHERS = {
    b"\x93NUMPY": "a .npy file",
    b"PK\x03\x04": "a zip file, as torch.save writes",
    b"\x1f\x8b": "gzipped",
    b"PAR1": "a parquet file",
}
# how llm.c's files of uint16 begin: 256 int32, of which the third is the number of tokens
LLMC = (
    20240520,
    1,
)


class Counts(TypedDict):
    """What a raw file does not say of itself: the fields of a Header."""

    num_tokens: int
    num_documents: int
    num_bytes: int
    max_token: int


class Scan(TypedDict):
    """What was found in a raw file, and when it was last read through."""

    offset: int
    header: Counts
    sha256: str
    looked: float


def open_tokens(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, cache: Path) -> Corpus:
    """The corpus of the shards that a DataConfig names. Without validation shards, the tail of each
    source is held out.

    Raises ValueError for files that are missing or of another kind, cut off or made with another
    tokenizer than the one given."""
    train, validation = find_shards(data)
    named = bool(validation)
    paths = [path for group in (train, validation) for found in group.values() for path in found]
    chosen = (
        tokenizer
        if isinstance(tokenizer, Tokenizer)
        else find_tokenizer(tokenizer, cache, paths[0])
    )
    folder = cache / f"tokens-{key([[str(path) for path in paths], chosen.hash])}"
    with contextlib.suppress(
        OSError
    ):  # a cache that others share may be read-only; then every start reads the files through
        folder.mkdir(exist_ok=True)
    opened = open_all(paths, chosen, folder, data.verify_days)
    shards = {
        f"{kind}/{name}": [opened[path] for path in found]
        for kind, group in (("train", train), ("validation", validation))
        for name, found in group.items()
    }
    if not named:
        for name in train:
            held_out = f"validation/{name if len(train) > 1 else 'validation'}"
            shards[f"train/{name}"], shards[held_out] = cut_tail(
                shards[f"train/{name}"], data.validation_fraction, chosen, folder
            )
    for part, found in shards.items():
        if sum(shard.header.num_tokens for shard in found) < 2:
            raise ValueError(
                f"{part} has no tokens; give data.path or data.validation files that hold some"
            )
    extents = [
        [part, shard.checksum.hex(), shard.offset, shard.header.num_tokens]
        for part, found in shards.items()
        for shard in found
    ]
    fingerprint = hashlib.sha256(json.dumps(extents).encode()).hexdigest()
    parts = {part: Tokens(found) for part, found in shards.items()}
    meta: Meta = {
        "fingerprint": fingerprint,
        "parts": {
            part: {
                "shards": len(tokens.shards),
                "tokens": len(tokens),
                "documents": tokens.num_documents,
                "bytes": tokens.num_bytes,
            }
            for part, tokens in parts.items()
        },
    }
    by_kind = [
        {part.partition("/")[2]: tokens for part, tokens in parts.items() if part.startswith(kind)}
        for kind in ("train/", "validation/")
    ]
    weights = {name: source.weight for name, source in (data.sources or {}).items()} or None
    if named:
        found = remembered(
            folder / f"leaks-{fingerprint[:16]}.json",
            list[str],
            lambda: same_files(shards) or leaks(parts, chosen),
        )
        note_once(found)
    return Corpus(folder, meta, chosen, by_kind[0], by_kind[1], weights, fingerprint)


def same_files(shards: dict[str, list[Shard]]) -> list[str]:
    """Returns a line for each validation file that holds the tokens of a training file."""
    by_kind = {
        kind: [shard for part, found in shards.items() if part.startswith(kind) for shard in found]
        for kind in ("train", "validation")
    }
    trained_on = {(shard.checksum, shard.offset): shard.path for shard in by_kind["train"]}
    shared = [
        (shard.path, trained_on.get((shard.checksum, shard.offset)))
        for shard in by_kind["validation"]
    ]
    return [
        f"{path}, which is validated on, holds the same tokens as {other}, which is trained on"
        for path, other in shared
        if other
    ]


def find_shards(data: DataConfig) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The files of each training source and of each validation set. A folder stands for the
    train.bin and val.bin in it, or for the parts of a prepared corpus."""
    sources, validation = data.sources or {}, data.validation or {}
    if (data.path is None) == (not sources):
        raise ValueError(
            f"data.path={data.path} with {len(sources)} data.sources; give the shards to train on"
            " in one of the two"
        )
    if not isinstance(validation, dict):
        raise ValueError(
            f"data.validation={validation} has no names; write data.validation='{{NAME: FILES}}'"
        )

    def find(key: str, files: Any) -> list[Path]:
        return [Path(file.path) for file in find_files(key, files, (".bin",))]

    sets = {name: find(f"data.validation.{name}", files) for name, files in validation.items()}
    folder = (
        Path(os.path.abspath(expand("data.path", data.path)))
        if isinstance(data.path, str)
        else None
    )
    if folder is None or not folder.is_dir():
        named = (
            {"tokens": ("data.path", data.path)}
            if data.path is not None
            else {
                name: (f"data.sources.{name}.path", source.path) for name, source in sources.items()
            }
        )
        return {name: find(key, files) for name, (key, files) in named.items()}, sets
    if (folder / "meta.json").exists():
        try:
            parts = read_json(folder / "meta.json", Meta)["parts"]
        except DamagedFile as error:
            raise ValueError(f"{error}: meta.json cannot be read; {REMEDY}") from None
        groups: dict[str, dict[str, list[Path]]] = {"train": {}, "validation": {}}
        for part, entry in parts.items():
            kind, _, name = part.partition("/")
            groups[kind][name] = [
                folder / part / shard_name(index) for index in range(entry["shards"])
            ]
        return groups["train"], sets or groups["validation"]
    if not (folder / "train.bin").exists():
        return {"tokens": find("data.path", data.path)}, sets
    beside = {"validation": [folder / "val.bin"]} if (folder / "val.bin").exists() else {}
    return {"tokens": [folder / "train.bin"]}, sets or beside


def check_tokens(data: DataConfig, config: TokenizerConfig, cache: Path) -> None:
    """Raises ValueError for files that their beginnings show to be wrong. GPT-2's ranks may have to
    be fetched, so they are not asked."""
    paths = [path for group in find_shards(data) for found in group.values() for path in found]
    if config.name == "gpt2":
        return
    tokenizer = find_tokenizer(config, cache, paths[0])
    for path in paths:
        with open_regular(path) as file:
            is_own = file.read(len(MAGIC)) == MAGIC
        if is_own:
            Shard.open(path, tokenizer, REMEDY)
        else:
            check_raw(path, tokenizer)


def find_tokenizer(config: TokenizerConfig, cache: Path, shard: Path) -> Tokenizer:
    """The tokenizer of the configuration; a bpe out of the prepared corpus that a shard is of."""
    if known := known_tokenizer(config, cache):
        return known
    folder = next(
        (folder for folder in shard.parents[:3] if (folder / "tokenizer.json").exists()), None
    )
    if folder is None:
        raise ValueError(
            f"tokenizer=bpe: there is no tokenizer.json by {shard}; put the one that it was made"
            " with beside it"
        )
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} but {folder / 'tokenizer.json'} has"
            f" {tokenizer.vocab_size}; set that"
        )
    return tokenizer


def open_all(
    paths: list[Path], tokenizer: Tokenizer, folder: Path, days: float
) -> dict[Path, Shard]:
    """Returns the shards of the files: our own with their checksums verified, raw ones looked
    through, either once in so many days."""
    own, raw = {}, {}
    for path in dict.fromkeys(paths):
        with open_regular(path) as file:
            is_own = file.read(len(MAGIC)) == MAGIC
        if is_own:
            own[path] = Shard.open(path, tokenizer, REMEDY)
        else:
            found = look_through(path, tokenizer, folder, days)
            header = Header(
                MAGIC, VERSION, 2, tokenizer=bytes.fromhex(tokenizer.hash), **found["header"]
            )
            raw[path] = Shard(path, header, bytes.fromhex(found["sha256"]), found["offset"], REMEDY)
    verify_once(folder, list(own.values()), days)
    return own | raw


def look_through(path: Path, tokenizer: Tokenizer, folder: Path, days: float) -> Scan:
    """Returns what is in a raw file. Raises ValueError where it holds other tokens than it did,
    with the size and time that it had."""
    record = record_of(folder, path)
    try:
        found = read_json(record, Scan)
    except (FileNotFoundError, ValueError):
        found = scan(path, tokenizer)
        remember(record, found)
        return found
    if is_old([found["looked"]], days):
        again = scan(path, tokenizer)
        if again["sha256"] != found["sha256"]:
            raise ValueError(
                f"{path} holds other tokens than before, though its size and time are the same: it"
                f" is corrupt; get it again, or delete {record} if they are right"
            )
        remember(record, again)
    return found


def record_of(folder: Path, path: Path, *what: Any) -> Path:
    """Returns the file that remembers something about a file as it is now."""
    stat = path.stat()
    return folder / f"{key([str(path), stat.st_size, stat.st_mtime_ns, *what])}.json"


def remembered(record: Path, kind: Any, find: Callable[[], Any]) -> Any:
    """Returns what a record holds, or else what `find` finds, which is recorded."""
    try:
        return read_json(record, kind)
    except (FileNotFoundError, ValueError):
        found = find()
        remember(record, found)
        return found


def remember(record: Path, found: Any) -> None:
    with contextlib.suppress(
        OSError
    ):  # a cache that others share may be read-only; then every start looks again
        write_atomically(record, json.dumps(found))


def scan(path: Path, tokenizer: Tokenizer) -> Scan:
    """What a file of raw uint16 does not say: its tokens, documents, bytes of text and largest id,
    and the sha256 of the tokens."""
    offset = check_raw(path, tokenizer)
    ids, digest = np.memmap(path, "<u2", "r", offset), hashlib.sha256()
    counts = count(ids, tokenizer, path, digest)
    print(
        f"note: {path} holds {len(ids):,} tokens and begins {tokenizer.decode(ids[:16])!r}",
        file=sys.stderr,
    )
    num_documents, num_bytes = documents_and_bytes(counts, tokenizer)
    header: Counts = {
        "num_tokens": len(ids),
        "num_documents": num_documents,
        "num_bytes": num_bytes,
        "max_token": int(np.flatnonzero(counts)[-1]),
    }
    return {"offset": offset, "header": header, "sha256": digest.hexdigest(), "looked": time.time()}


def check_raw(path: Path, tokenizer: Tokenizer) -> int:
    """Returns the byte of a file of raw uint16 where its tokens begin. Raises ValueError for a file
    that its beginning shows to be another."""
    if tokenizer.vocab_size > 2**16:
        raise ValueError(
            f"{path} is no shard of ours, and raw uint16 is too narrow for a vocabulary of"
            f" {tokenizer.vocab_size}; {REMEDY}"
        )
    if (path.parent / "meta.pkl").exists():
        raise ValueError(
            f"{path} has a meta.pkl beside it: its ids are nanoGPT's characters, which no tokenizer"
            " here has; prepare its text with data=text"
        )
    size = path.stat().st_size
    start = np.fromfile(path, "<i4", 3)
    if kind := next(
        (kind for magic, kind in OTHERS.items() if start.tobytes().startswith(magic)), None
    ):
        raise ValueError(
            f"{path} is {kind}, not a file of uint16; write its ids with numpy:"
            " ids.astype('uint16').tofile(FILE)"
        )
    offset = 1024 if len(start) == 3 and tuple(start[:2]) == LLMC else 0
    if size % 2 or size == offset or (offset and size != offset + 2 * start[2]):
        raise ValueError(
            f"{path} has {size} bytes, which no file of uint16 has: it is cut off or of another"
            " kind; get it again"
        )
    ids = np.memmap(path, "<u2", "r", offset)[:BLOCK]
    if len(ids) >= 16 and ids[::2].any() and not ids[1::2].any():
        width = 64 if not ids[2::4].any() else 32
        raise ValueError(
            f"{path} holds uint{width}, not uint16: every second id would be 0; write it again with"
            f" numpy: numpy.fromfile(FILE, 'uint{width}').astype('uint16').tofile(OTHER)"
        )
    if (largest := int(ids.max())) >= tokenizer.vocab_size:
        raise ValueError(beyond(path, largest, tokenizer))
    return offset


def beyond(path: Path, largest: int, tokenizer: Tokenizer) -> str:
    return (
        f"{path} holds token {largest}, beyond the vocabulary of {tokenizer.vocab_size} of"
        f" tokenizer={tokenizer.name}; {REMEDY}"
    )


def count(ids: np.ndarray, tokenizer: Tokenizer, path: Path, digest: Any = None) -> np.ndarray:
    """How often each id of the vocabulary is among the ids of a file, int64; a digest is told them
    on the way."""
    from tqdm import tqdm

    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    show = None if len(ids) > 100 * BLOCK else True
    for first in tqdm(
        range(0, len(ids), BLOCK),
        desc=f"reading {path.name}",
        unit_scale=2 * BLOCK,
        unit="B",
        disable=show,
        file=sys.stderr,
    ):
        block = ids[first : first + BLOCK]
        if (largest := int(block.max())) >= tokenizer.vocab_size:
            raise ValueError(beyond(path, largest, tokenizer))
        counts += np.bincount(block, minlength=tokenizer.vocab_size)
        if digest:
            digest.update(block.data)
    return counts


def documents_and_bytes(counts: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    return int(counts[tokenizer.eot]), int(counts @ tokenizer.byte_lengths())


def cut_tail(
    shards: list[Shard], fraction: float, tokenizer: Tokenizer, folder: Path
) -> tuple[list[Shard], list[Shard]]:
    """The shards before and after the token where the last `fraction` of all begins; views, nothing
    is copied."""
    point = int(sum(shard.header.num_tokens for shard in shards) * (1 - fraction))
    before, after = [], []
    for shard in shards:
        num_tokens = shard.header.num_tokens
        if 0 < point < num_tokens:
            head, tail = cut(shard, point, tokenizer, folder)
            before.append(head)
            after.append(tail)
        else:
            (before if point >= num_tokens else after).append(shard)
        point -= num_tokens
    return before, after


def cut(shard: Shard, point: int, tokenizer: Tokenizer, folder: Path) -> tuple[Shard, Shard]:
    """The tokens of a shard before a point, and those from there on."""
    documents, num_bytes = remembered(
        record_of(folder, shard.path, point),
        tuple[int, int],
        lambda: documents_and_bytes(count(shard.tokens[point:], tokenizer, shard.path), tokenizer),
    )
    whole = shard.header
    tail = whole._replace(
        num_tokens=whole.num_tokens - point, num_documents=documents, num_bytes=num_bytes
    )
    head = whole._replace(
        num_tokens=point,
        num_documents=whole.num_documents - documents,
        num_bytes=whole.num_bytes - num_bytes,
    )
    return replace(shard, header=head), replace(
        shard, header=tail, offset=shard.offset + point * whole.token_bytes
    )
