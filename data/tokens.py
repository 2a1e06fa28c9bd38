"""Shards that exist already, read where they lie: our own, and files of raw uint16 as nanoGPT
writes them.

The corpus that a run resumes on is known by the checksums of the tokens, wherever the files lie."""

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.key import expand
from conf.text import DataConfig, TokenizerConfig
from data.cache_folders import record_of_file, remembered
from data.choose_tokenizer import tokenizer_of_shard
from data.files import DamagedFile, read_json
from data.overlap import leaks, note_once
from data.raw_tokens import (
    REMEDY,
    check_raw,
    count_ids,
    documents_and_bytes,
    is_own_shard,
    open_raw,
)
from data.shards import Corpus, Meta, Part, Shard, Tokens, key, shard_name, verify_once
from data.source_files import find_files, source_weights, training_paths, validation_paths
from data.tokenizer import Tokenizer

# The files of each source or set.
Paths = dict[str, list[Path]]


def open_tokens(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, cache: Path) -> Corpus:
    """Returns the corpus of the shards that a DataConfig names. Without validation shards, the tail
    of each source is held out.

    Args:
        data: names the files
        tokenizer: the tokenizer of their ids, or its configuration
        cache: the folder of the cache

    Raises:
        ValueError: files are missing or of another kind, cut off, or made with another tokenizer
    """
    train, validation = find_shards(data)
    # Of a bpe the tokenizer lies beside the first file.
    paths = [path for group in (train, validation) for found in group.values() for path in found]
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer_of_shard(tokenizer, cache, paths[0])
    folder = cache / f"tokens-{key([[str(path) for path in paths], tokenizer.hash])}"
    # A cache that others share may be read-only: then every start reads the files through.
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    opened = open_all(paths, tokenizer, folder, data.verify_days)
    shards = {f"train/{name}": [opened[path] for path in found] for name, found in train.items()}
    # Parts are views of the files: nothing is copied.
    if validation:
        for name, found in validation.items():
            shards[f"validation/{name}"] = [opened[path] for path in found]
    else:
        for name in train:
            held_out = f"validation/{name if len(train) > 1 else 'validation'}"
            # Documents are not moved, so it is the end of each source that is held out.
            shards[f"train/{name}"], shards[held_out] = cut_tail(
                shards[f"train/{name}"], data.validation_fraction, tokenizer, folder
            )
    refuse_without_tokens(shards)
    corpus = corpus_of_shards(shards, folder, tokenizer, source_weights(data))
    if validation:
        note_leaks(corpus, shards)
    return corpus


def refuse_without_tokens(shards: dict[str, list[Shard]]) -> None:
    """Raises ValueError for a part that has fewer than two tokens."""
    for part, found in shards.items():
        if sum(shard.header.num_tokens for shard in found) < 2:
            raise ValueError(
                f"{part} has fewer than two tokens; give data.path or data.validation files that"
                " hold more"
            )


def corpus_of_shards(
    shards: dict[str, list[Shard]],
    folder: Path,
    tokenizer: Tokenizer,
    weights: dict[str, float] | None,
) -> Corpus:
    """Returns the corpus that the shards of each part make."""
    # Both parts of a shard that is cut have its checksum, so where they lie in it counts too.
    extents = [
        [part, shard.checksum.hex(), shard.offset, shard.header.num_tokens]
        for part, found in shards.items()
        for shard in found
    ]
    fingerprint = hashlib.sha256(json.dumps(extents).encode()).hexdigest()
    by_kind: dict[str, dict[str, Tokens]] = {"train": {}, "validation": {}}
    parts: dict[str, Part] = {}
    for part, found in shards.items():
        kind, _, name = part.partition("/")
        tokens = Tokens(found)
        by_kind[kind][name] = tokens
        parts[part] = {
            "shards": len(tokens.shards),
            "tokens": len(tokens),
            "documents": tokens.num_documents,
            "bytes": tokens.num_bytes,
        }
    meta: Meta = {"fingerprint": fingerprint, "parts": parts}
    train = by_kind["train"]
    return Corpus(folder, meta, tokenizer, train, by_kind["validation"], weights, fingerprint)


# Text in training and in validation


def note_leaks(corpus: Corpus, shards: dict[str, list[Shard]]) -> None:
    """Notes validation sets whose text is trained on, which is looked for once."""

    def find() -> list[str]:
        parts = {f"train/{name}": tokens for name, tokens in corpus.train.items()}
        parts |= {f"validation/{name}": tokens for name, tokens in corpus.validation.items()}
        # Files that are the same as a whole need no comparison of what they say.
        return same_files(shards) or leaks(parts, corpus.tokenizer)

    record = corpus.folder / f"leaks-{corpus.fingerprint[:16]}.json"
    note_once(remembered(record, list[str], find))


def same_files(shards: dict[str, list[Shard]]) -> list[str]:
    """Returns a line for each validation file that holds the tokens of a training file."""
    trained_on = {
        (shard.checksum, shard.offset): shard.path
        for part, found in shards.items()
        if part.startswith("train")
        for shard in found
    }
    validated_on = [
        shard for part, found in shards.items() if part.startswith("validation") for shard in found
    ]
    pairs = [(shard.path, trained_on.get((shard.checksum, shard.offset))) for shard in validated_on]
    return [
        f"{path}, which is validated on, holds the same tokens as {other}, which is trained on"
        for path, other in pairs
        if other
    ]


# Finding files


def find_shards(data: DataConfig) -> tuple[Paths, Paths]:
    """Returns the files of each training source and of each validation set. A folder stands for the
    train.bin and val.bin in it, or for the parts of a prepared corpus.

    Raises ValueError for keys that name no files, or for files of another kind."""
    named = training_paths(data, "tokens", "shards")
    sets = {name: find_bins(key, paths) for name, (key, paths) in validation_paths(data).items()}
    if isinstance(data.path, str):
        folder = Path(os.path.abspath(expand("data.path", data.path)))
        # A prepared corpus of ours, then a folder as nanoGPT's prepare.py leaves it.
        if (folder / "meta.json").exists():
            train, validation = prepared_files(folder)
            return train, sets or validation
        if (folder / "train.bin").exists():
            if not sets and (folder / "val.bin").exists():
                sets = {"validation": [folder / "val.bin"]}
            return {"tokens": [folder / "train.bin"]}, sets
    return {name: find_bins(key, paths) for name, (key, paths) in named.items()}, sets


def find_bins(key: str, paths: Any) -> list[Path]:
    """Returns the .bin files that a key names."""
    return [Path(file.path) for file in find_files(key, paths, (".bin",))]


def prepared_files(folder: Path) -> tuple[Paths, Paths]:
    """Returns the shards of a prepared corpus. Raises ValueError for a meta.json that cannot be
    read."""
    try:
        parts = read_json(folder / "meta.json", Meta)["parts"]
    except DamagedFile as error:
        raise ValueError(f"{error}: meta.json cannot be read; {REMEDY}") from None
    groups: dict[str, Paths] = {"train": {}, "validation": {}}
    for part, entry in parts.items():
        kind, _, name = part.partition("/")
        paths = [folder / part / shard_name(index) for index in range(entry["shards"])]
        # The parts of meta.json are "train/NAME" and "validation/NAME".
        groups[kind][name] = paths
    return groups["train"], groups["validation"]


def check_tokens(data: DataConfig, config: TokenizerConfig, cache: Path) -> None:
    """Raises ValueError for files that their beginnings show to be wrong. GPT-2's ranks may have to
    be fetched, so they are not asked."""
    paths = [path for group in find_shards(data) for found in group.values() for path in found]
    if config.name == "gpt2":
        return
    tokenizer = tokenizer_of_shard(config, cache, paths[0])
    for path in paths:
        if is_own_shard(path):
            Shard.open(path, tokenizer, REMEDY)
        else:
            check_raw(path, tokenizer)


def open_all(
    paths: list[Path], tokenizer: Tokenizer, folder: Path, days: float
) -> dict[Path, Shard]:
    """Returns the shards of the files: our own with their checksums verified, raw ones looked
    through, either once in so many days."""
    own = {}
    raw = {}
    # A file may be named twice, for training and for validation.
    for path in dict.fromkeys(paths):
        if is_own_shard(path):
            own[path] = Shard.open(path, tokenizer, REMEDY)
        else:
            raw[path] = open_raw(path, tokenizer, folder, days)
    verify_once(folder, list(own.values()), days)
    return own | raw


# Holding out the tail


def cut_tail(
    shards: list[Shard], fraction: float, tokenizer: Tokenizer, folder: Path
) -> tuple[list[Shard], list[Shard]]:
    """Returns the shards before and after the token where the last `fraction` of all begins; views,
    nothing is copied.

    Args:
        shards: the shards of a source
        fraction: the share of the tokens that is held out
        tokenizer: their tokenizer, by which documents and bytes are counted
        folder: the folder of the cache that remembers these counts
    """
    # The point counts from the start of the first shard, then of each further one.
    point = int(sum(shard.header.num_tokens for shard in shards) * (1 - fraction))
    before = []
    after = []
    for shard in shards:
        num_tokens = shard.header.num_tokens
        # The point lies in this shard, behind it, or in one before it.
        if 0 < point < num_tokens:
            head, tail = cut_shard(shard, point, tokenizer, folder)
            before.append(head)
            after.append(tail)
        elif point >= num_tokens:
            before.append(shard)
        else:
            after.append(shard)
        point -= num_tokens
    return before, after


def cut_shard(shard: Shard, point: int, tokenizer: Tokenizer, folder: Path) -> tuple[Shard, Shard]:
    """Returns the tokens of a shard before a point, and those from there on."""

    def count_tail() -> tuple[int, int]:
        counts = count_ids(shard.tokens[point:], tokenizer, shard.path)
        return documents_and_bytes(counts, tokenizer)

    record = record_of_file(folder, shard.path, point)
    num_documents, num_bytes = remembered(record, tuple[int, int], count_tail)
    whole = shard.header
    tail = whole._replace(
        num_tokens=whole.num_tokens - point, num_documents=num_documents, num_bytes=num_bytes
    )
    # A document that the point cuts is counted where it ends, as in a raw file.
    head = whole._replace(
        num_tokens=point,
        num_documents=whole.num_documents - num_documents,
        num_bytes=whole.num_bytes - num_bytes,
    )
    offset = shard.offset + point * whole.token_bytes
    return replace(shard, header=head), replace(shard, header=tail, offset=offset)
