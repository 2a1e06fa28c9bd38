"""Shards that exist already, read where they lie: our own, and files of raw uint16 as nanoGPT writes them.

A raw file says nothing of itself, so it is read through once, to count its documents and to see that all ids are in the vocabulary;
a file in <cache>/tokens-<key>/ remembers. What a run resumes on is known by the checksums of the tokens, wherever the files lie.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import DataConfig, TokenizerConfig
from data.corpora import find_files
from data.files import write_atomically
from data.hf_tokenizer import known_tokenizer
from data.shards import MAGIC, VERSION, Corpus, Header, Shard, Tokens, key, shard_name, verify_once
from data.tokenizer import Tokenizer

BLOCK = 2**22  # tokens that are looked at together
REMEDY = "name the tokenizer that it was made with, or get the file again"
LLMC = (20240520, 1)  # how llm.c's files of uint16 begin: 256 int32, of which the third is the number of tokens


def open_tokens(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, cache: Path) -> Corpus:
    """The corpus of the shards that a DataConfig names. Without validation shards, the tail of each source is held out.

    Raises ValueError for files that are missing or of another kind, cut off or made with another tokenizer than the one given.
    """
    train, validation = find_shards(data)
    named = bool(validation)
    paths = [path for group in (train, validation) for found in group.values() for path in found]
    chosen = tokenizer if isinstance(tokenizer, Tokenizer) else find_tokenizer(tokenizer, cache, paths[0])
    folder = cache / f"tokens-{key([[str(path) for path in paths], chosen.hash])}"
    folder.mkdir(exist_ok=True)
    opened = open_all(paths, chosen, folder)
    shards = {f"{kind}/{name}": [opened[path] for path in found]
              for kind, group in (("train", train), ("validation", validation)) for name, found in group.items()}  # fmt: skip
    if not named:
        for name in train:
            held_out = f"validation/{name if len(train) > 1 else 'validation'}"
            shards[f"train/{name}"], shards[held_out] = cut_tail(shards[f"train/{name}"], data.validation_fraction, chosen, folder)
    for part, found in shards.items():
        if sum(shard.header.num_tokens for shard in found) < 2:
            raise ValueError(f"{part} has no tokens; give data.path or data.validation files that hold some")
    extents = [[part, shard.checksum.hex(), shard.offset, shard.header.num_tokens] for part, found in shards.items() for shard in found]
    fingerprint = hashlib.sha256(json.dumps(extents).encode()).hexdigest()
    parts = {part: Tokens(found) for part, found in shards.items()}
    meta = {"fingerprint": fingerprint, "parts": {
        part: {"shards": len(tokens.shards), "tokens": len(tokens), "documents": tokens.num_documents, "bytes": tokens.num_bytes}
        for part, tokens in parts.items()}}  # fmt: skip
    by_kind = [{part.partition("/")[2]: tokens for part, tokens in parts.items() if part.startswith(kind)} for kind in ("train/", "validation/")]
    weights = {name: source.weight for name, source in (data.sources or {}).items()} or None
    return Corpus(folder, meta, chosen, by_kind[0], by_kind[1], weights, fingerprint)


def find_shards(data: DataConfig) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The files of each training source and of each validation set. A folder stands for the train.bin and val.bin in it, or for the
    parts of a prepared corpus."""
    sources, validation = data.sources or {}, data.validation or {}
    if (data.path is None) == (not sources):
        raise ValueError(f"data.path={data.path} with {len(sources)} data.sources; give the shards to train on in one of the two")
    if not isinstance(validation, dict):
        raise ValueError(f"data.validation={validation} has no names; write data.validation='{{NAME: FILES}}'")

    def find(key: str, files: Any) -> list[Path]:
        return [Path(file.path) for file in find_files(key, files, (".bin",))]

    sets = {name: find(f"data.validation.{name}", files) for name, files in validation.items()}
    folder = Path(os.path.abspath(os.path.expanduser(data.path))) if isinstance(data.path, str) else None
    if folder is None or not folder.is_dir():
        named = {"tokens": ("data.path", data.path)} if data.path is not None else {
            name: (f"data.sources.{name}.path", source.path) for name, source in sources.items()}  # fmt: skip
        return {name: find(key, files) for name, (key, files) in named.items()}, sets
    if (folder / "meta.json").exists():
        try:
            parts = json.loads((folder / "meta.json").read_text())["parts"]
        except (ValueError, KeyError):
            raise ValueError(f"{folder / 'meta.json'} cannot be read; {REMEDY}") from None
        groups: dict[str, dict[str, list[Path]]] = {"train": {}, "validation": {}}
        for part, entry in parts.items():
            kind, _, name = part.partition("/")
            groups[kind][name] = [folder / part / shard_name(index) for index in range(entry["shards"])]
        return groups["train"], sets or groups["validation"]
    if not (folder / "train.bin").exists():
        raise ValueError(f"data.path={data.path} is a folder without train.bin or meta.json; give .bin files, a glob or a list of them")
    beside = {"validation": [folder / "val.bin"]} if (folder / "val.bin").exists() else {}
    return {"tokens": [folder / "train.bin"]}, sets or beside


def find_tokenizer(config: TokenizerConfig, cache: Path, shard: Path) -> Tokenizer:
    """The tokenizer of the configuration; a bpe out of the prepared corpus that a shard is of."""
    if known := known_tokenizer(config, cache):
        return known
    folder = next((folder for folder in shard.parents[:3] if (folder / "tokenizer.json").exists()), None)
    if folder is None:
        raise ValueError(f"tokenizer=bpe: there is no tokenizer.json by {shard}; put the one that it was made with beside it")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"tokenizer.vocab_size={config.vocab_size} but {folder / 'tokenizer.json'} has {tokenizer.vocab_size}; set that")
    return tokenizer


def open_all(paths: list[Path], tokenizer: Tokenizer, folder: Path) -> dict[Path, Shard]:
    """The shards of the files: our own with their checksums verified, raw ones looked through, either once."""
    own, raw = {}, {}
    for path in dict.fromkeys(paths):
        with path.open("rb") as file:
            is_own = file.read(len(MAGIC)) == MAGIC
        if is_own:
            own[path] = Shard.open(path, tokenizer, REMEDY)
        else:
            found = remembered(folder, path, [], partial(scan, path, tokenizer))
            header = Header(MAGIC, VERSION, 2, tokenizer=bytes.fromhex(tokenizer.hash), **found["header"])
            raw[path] = Shard(path, header, bytes.fromhex(found["sha256"]), found["offset"], REMEDY)
    verify_once(folder, list(own.values()))
    return own | raw


def remembered(folder: Path, path: Path, what: list[Any], find: Callable[[], Any]) -> Any:
    """What `find` finds in a file, asked for again only when the file was touched."""
    stat = path.stat()
    record = folder / f"{key([str(path), stat.st_size, stat.st_mtime_ns, *what])}.json"
    try:
        return json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        found = find()
        with contextlib.suppress(OSError):  # a cache that others share may be read-only; then every start looks again
            write_atomically(record, json.dumps(found))
        return found


def scan(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a file of raw uint16 does not say: its tokens, documents, bytes of text and largest id, and the sha256 of the tokens."""
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{path} is no shard of ours, and raw uint16 is too narrow for a vocabulary of {tokenizer.vocab_size}; {REMEDY}")
    if (path.parent / "meta.pkl").exists():
        raise ValueError(f"{path} has a meta.pkl beside it: its ids are nanoGPT's characters, which no tokenizer here has; "
                         "prepare its text with data=text")  # fmt: skip
    size = path.stat().st_size
    start = np.fromfile(path, "<i4", 3)
    offset = 1024 if len(start) == 3 and tuple(start[:2]) == LLMC else 0
    if size % 2 or size == offset or (offset and size != offset + 2 * start[2]):
        raise ValueError(f"{path} has {size} bytes, which no file of uint16 has: it is cut off or of another kind; get it again")
    ids, digest = np.memmap(path, "<u2", "r", offset), hashlib.sha256()
    counts = count(ids, tokenizer, path, digest)
    print(f"note: {path} holds {len(ids):,} tokens and begins {tokenizer.decode(ids[:16])!r}", file=sys.stderr)
    num_documents, num_bytes = documents_and_bytes(counts, tokenizer)
    header = {"num_tokens": len(ids), "num_documents": num_documents, "num_bytes": num_bytes, "max_token": int(np.flatnonzero(counts)[-1])}
    return {"offset": offset, "header": header, "sha256": digest.hexdigest()}


def count(ids: np.ndarray, tokenizer: Tokenizer, path: Path, digest: Any = None) -> np.ndarray:
    """How often each id of the vocabulary is among the ids of a file, int64; a digest is told them on the way."""
    from tqdm import tqdm

    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    show = None if len(ids) > 100 * BLOCK else True
    for first in tqdm(range(0, len(ids), BLOCK), desc=f"reading {path.name}", unit_scale=2 * BLOCK, unit="B", disable=show, file=sys.stderr):
        block = ids[first : first + BLOCK]
        if (largest := int(block.max())) >= tokenizer.vocab_size:
            raise ValueError(f"{path} holds token {largest}, beyond the vocabulary of {tokenizer.vocab_size} of tokenizer={tokenizer.name}; {REMEDY}")
        counts += np.bincount(block, minlength=tokenizer.vocab_size)
        if digest:
            digest.update(block.data)
    return counts


def documents_and_bytes(counts: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    return int(counts[tokenizer.eot]), int(counts @ tokenizer.byte_lengths())


def cut_tail(shards: list[Shard], fraction: float, tokenizer: Tokenizer, folder: Path) -> tuple[list[Shard], list[Shard]]:
    """The shards before and after the token where the last `fraction` of all begins; views, nothing is copied."""
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
        folder, shard.path, [point], lambda: documents_and_bytes(count(shard.tokens[point:], tokenizer, shard.path), tokenizer)
    )
    whole = shard.header
    tail = whole._replace(num_tokens=whole.num_tokens - point, num_documents=documents, num_bytes=num_bytes)
    head = whole._replace(num_tokens=point, num_documents=whole.num_documents - documents, num_bytes=whole.num_bytes - num_bytes)
    return replace(shard, header=head), replace(shard, header=tail, offset=shard.offset + point * whole.token_bytes)
