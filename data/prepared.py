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

import errno
import hashlib
import json
from pathlib import Path

from conf.key import expand
from conf.text import DataConfig, TokenizerConfig
from data.cache_folders import (
    digest_files,
    folder_by_content,
    is_complete,
    locked,
    recall_folder,
    remember_folder,
)
from data.choose_tokenizer import tokenizer_of_text
from data.corpora import EmptySplit, TextCorpus, empty_split
from data.encode import Skipped, encode_pieces, num_cores, skipped_rows
from data.files import DamagedFile, read_json, write_atomically
from data.hub import HubCorpus
from data.overlap import leaks, note_once
from data.shards import (
    REBUILT,
    VERSION,
    Corpus,
    Meta,
    Part,
    Shard,
    TokenizerMeta,
    Tokens,
    key,
    shard_name,
    verify_once,
)
from data.source_files import NoText, source_weights
from data.sources import AnyCorpus, find_text
from data.tokenizer import Tokenizer
from data.tokens import open_tokens

EMPTY_SPLIT = "empty_split.json"
# What to do about a shard that is damaged, where the text that it was made of is gone.
GONE = "bring its text back and delete the shard, which is rebuilt from that, or bring a copy of it"


def prepare(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> Corpus:
    """Returns the corpus that a configuration names, out of the cache or made now.

    Work that another process began and did not finish is taken up; while another is at it, this one
    waits.

    Args:
        data: where the text is, and what of it is held out
        tokenizer: the tokenizer, or its configuration

    Raises:
        ValueError: text cannot be found, read or split as asked, shards are damaged, or the system
            refuses, as a full disk does; what is prepared by then is kept
    """
    cache = Path(expand("data.cache", data.cache))
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # Also a link whose target is gone exists.
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(
            f"data.cache={data.cache} cannot be made ({reason}); name a folder that can be written"
        ) from None
    try:
        if data.source == "tokens":
            return open_tokens(data, tokenizer, cache)
        return open_text(data, tokenizer, cache)
    except OSError as error:
        remedy = "once that is mended the same command goes on from what is prepared"
        is_refused = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        place = error.filename
        # Of the cache the key is named, also where the error names no file.
        if not place or cache in Path(str(place)).parents:
            place = f"data.cache={data.cache}" + (f": {place}" if place else "")
            if is_refused:
                remedy = "set data.cache to a folder that can be written"
        raise ValueError(f"{place}: {error.strerror or error}; {remedy}") from error


# Finding and opening


def open_text(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, cache: Path) -> Corpus:
    """Returns the corpus of a text, made where the cache lacks it. Where the text is gone, it is
    what was prepared from it."""
    try:
        text = find_text(data)
        # A name on the hub may be that of a folder that was here and is gone.
        if isinstance(text, HubCorpus) and not text.local and recall_folder(data, tokenizer, cache):
            raise NoText(f"data.path={data.path} is no folder any more")
    except NoText as error:
        known = recall_folder(data, tokenizer, cache)
        if known is None:
            raise
        note_once([f"{str(error).partition(';')[0]}; what was prepared from it is used: {known}"])
        return open_prepared(known, data, Tokenizer.load(known), GONE)
    # The content of the files decides which folder it is, wherever they lie.
    digests = digest_files(text.files, cache)
    try:
        folder, chosen = prepare_text(text, digests, tokenizer, cache)
    except EmptySplit as error:
        assert isinstance(text, TextCorpus)
        text.hold_out_the_tail(str(error))
        # What is wrong with the tail is understood only by one who knows of it.
        note_once(text.warnings)
        folder, chosen = prepare_text(text, digests, tokenizer, cache)
    note_once(text.warnings)
    if isinstance(text, TextCorpus) or text.local:
        remember_folder(data, tokenizer, chosen, folder)
    return open_prepared(folder, data, chosen)


def prepare_text(
    text: AnyCorpus, digests: dict[str, str], tokenizer: TokenizerConfig | Tokenizer, cache: Path
) -> tuple[Path, Tokenizer]:
    """Prepares a text, unless it was.

    Args:
        text: the corpus
        digests: sha256 of each of its files by path
        tokenizer: the tokenizer, or its configuration
        cache: the folder of the cache

    Returns:
        The folder of the prepared corpus, and the tokenizer.

    Raises:
        EmptySplit: random documents leave a part without any
        ValueError: the text cannot be read or split as asked
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer_of_text(text, digests, tokenizer, cache)
    suffix = tokenizer.hash[:16]
    folder = folder_by_content(
        text, digests, lambda identity: cache / f"{key(identity)}-{suffix}", "meta.json"
    )
    if not is_complete(folder):
        # All of the text was encoded once to find that out.
        if is_random_split(text) and (reason := known_empty_split(folder)):
            raise EmptySplit(reason)
        with locked(folder):
            # Another process may have made it while this one waited.
            if not is_complete(folder):
                fill(folder, text, digests, tokenizer)
    return folder, tokenizer


def known_empty_split(folder: Path) -> str:
    """Returns why random documents could not be held out, as a former start found; nothing where
    none did, or where its record is damaged."""
    try:
        return read_json(folder / EMPTY_SPLIT, str, "")
    except DamagedFile:
        return ""


def is_random_split(text: AnyCorpus) -> bool:
    """Returns whether random documents of a text are held out, and its tail could be instead."""
    return isinstance(text, TextCorpus) and text.split == "documents"


def open_prepared(
    folder: Path, data: DataConfig, tokenizer: Tokenizer, remedy: str = REBUILT
) -> Corpus:
    """Returns the corpus in a folder that is complete.

    Args:
        folder: the folder
        data: the configuration, for the sources and what to do about rows that were skipped
        tokenizer: the tokenizer of its shards
        remedy: what to do about a shard that is damaged

    Raises:
        ValueError: shards are damaged, or rows were skipped when it was prepared and are not to be
    """
    meta = read_json(folder / "meta.json", Meta)
    if data.bad_rows == "error" and (num_skipped := sum(meta.get("skipped", {}).values())):
        raise ValueError(
            f"{folder} was prepared without {num_skipped} rows that cannot be read, the first:"
            f" {meta.get('first_skipped')}; set data.bad_rows=skip to use it, or mend the rows"
        )
    # Sizes and headers are looked at now, and contents once in data.verify_days.
    num_shards = {part: entry["shards"] for part, entry in meta["parts"].items()}
    shards = open_shards(folder, num_shards, tokenizer, remedy)
    verify_once(folder, [shard for found in shards.values() for shard in found], data.verify_days)
    note_once([*meta.get("notes", []), *skipped_notes(meta)])
    train = tokens_of_kind("train/", shards)
    validation = tokens_of_kind("validation/", shards)
    weights = source_weights(data) if data.source == "text" else None
    if weights:
        # Batches depend on the order of the sources, which is that of the configuration.
        train = {name: train[name] for name in weights}
    return Corpus(folder, meta, tokenizer, train, validation, weights, meta["fingerprint"])


def skipped_notes(meta: Meta) -> list[str]:
    """Returns a line for each part that was prepared without rows of its text."""
    return [
        f"{part}: {count:,} rows that could not be read were skipped, the first:"
        f" {meta.get('first_skipped')}"
        for part, count in meta.get("skipped", {}).items()
    ]


def open_shards(
    folder: Path, num_shards: dict[str, int], tokenizer: Tokenizer, remedy: str = REBUILT
) -> dict[str, list[Shard]]:
    """Returns the shards of each part in a folder, given their numbers. Raises ValueError, with the
    remedy, for one that is damaged."""
    shards = {}
    for part, number in num_shards.items():
        paths = [folder / part / shard_name(index) for index in range(number)]
        shards[part] = [Shard.open(path, tokenizer, remedy) for path in paths]
    return shards


def tokens_of_kind(kind: str, shards: dict[str, list[Shard]]) -> dict[str, Tokens]:
    """Returns the tokens of the parts of a kind, "train/" or "validation/", by their names."""
    return {
        part.removeprefix(kind): Tokens(found)
        for part, found in shards.items()
        if part.startswith(kind)
    }


# Making


def fill(folder: Path, text: AnyCorpus, digests: dict[str, str], tokenizer: Tokenizer) -> None:
    """Writes what the folder lacks: the shards, then the tokenizer, then meta.json. The lock must
    be held.

    Args:
        folder: the folder of the corpus
        text: the corpus
        digests: sha256 of each of its files by path
        tokenizer: the tokenizer

    Raises:
        EmptySplit: random documents were held out, and a part comes out without text
        ValueError: another part comes out without text
    """
    known_leaks = text.leaks(digests)
    note_once([*known_leaks.values()])
    # This is the long part of the work.
    shards = encode_text(folder, text, tokenizer)
    # Parts without text are refused before anything says that the corpus is complete.
    skipped = {part: skipped_rows(folder / part) for part in shards}
    skipped = {part: found for part, found in skipped.items() if found["count"]}
    parts = {part: summary(found) for part, found in shards.items()}
    check_parts(folder, text, parts, skipped)
    # The sets of known leaks are trained on as a whole, so their tokens need not be compared.
    compared = {part: Tokens(found) for part, found in shards.items() if part not in known_leaks}
    notes = [*known_leaks.values(), *leaks(compared, tokenizer)]
    # The tokenizer comes before meta.json, whose presence means that all is there.
    tokenizer.save(folder)
    meta: Meta = {
        "version": VERSION,
        "fingerprint": fingerprint(shards),
        "corpus": text.identity,
        "parts": parts,
        "tokenizer": tokenizer_meta(tokenizer),
        "notes": notes,
    }
    if skipped:
        meta["skipped"] = {part: found["count"] for part, found in skipped.items()}
        meta["first_skipped"] = next(iter(skipped.values()))["first"][0]
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1))


def encode_text(folder: Path, text: AnyCorpus, tokenizer: Tokenizer) -> dict[str, list[Shard]]:
    """Returns the shards of each part of a text, those that the folder lacks made now."""
    # Killed writers left these. None is at work now, since the lock is held.
    for leftover in folder.rglob("*.tmp"):
        leftover.unlink()
    num_workers = text.data.workers or num_cores()
    num_shards = encode_pieces(text.pieces(folder), tokenizer, folder, num_workers)
    return open_shards(folder, num_shards, tokenizer)


def tokenizer_meta(tokenizer: Tokenizer) -> TokenizerMeta:
    """Returns the tokenizer as meta.json names it."""
    return {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "hash": tokenizer.hash,
    }


def fingerprint(shards: dict[str, list[Shard]]) -> str:
    """Returns a hash (hex) of all tokens of a corpus, by the checksums of its shards."""
    checksums = [shard.checksum for found in shards.values() for shard in found]
    return hashlib.sha256(b"".join(checksums)).hexdigest()


def summary(shards: list[Shard]) -> Part:
    """Returns what the shards of a part come to."""
    headers = [shard.header for shard in shards]
    return {
        "shards": len(headers),
        "tokens": sum(header.num_tokens for header in headers),
        "documents": sum(header.num_documents for header in headers),
        "bytes": sum(header.num_bytes for header in headers),
    }


def check_parts(
    folder: Path, text: AnyCorpus, parts: dict[str, Part], skipped: dict[str, Skipped]
) -> None:
    """Raises what `refuse_empty` does, and notes in the folder that random documents cannot be held
    out: the next start then goes to the tail at once, without encoding all of the text."""
    try:
        refuse_empty(text, parts, skipped)
    except EmptySplit as error:
        write_atomically(folder / EMPTY_SPLIT, json.dumps(str(error)))
        raise


def refuse_empty(text: AnyCorpus, parts: dict[str, Part], skipped: dict[str, Skipped]) -> None:
    """Raises an error for the first part that has come out without text.

    Args:
        text: the corpus
        parts: what each part has come to
        skipped: the rows of each part that could not be read

    Raises:
        EmptySplit: holding out random documents leaves the part empty; the tail may not
        ValueError: the part is empty for another reason
    """
    expected = {f"train/{name}" for name in text.sources}
    expected |= {f"validation/{name}" for name in text.named}
    if not text.named:
        expected |= {text.held_out(name) for name in text.sources}
    empty = [part for part in sorted(expected) if part not in parts or not parts[part]["tokens"]]
    if not empty:
        return
    part = empty[0]
    num_documents = sum(entry["documents"] for entry in parts.values())
    # Where nothing is held out, or there is no document at all, the text is at fault.
    if text.named or not num_documents:
        reason = ""
        if part in skipped:
            reason = f" (rows were skipped, the first: {skipped[part]['first'][0]})"
        wanted = "a split" if isinstance(text, HubCorpus) else "files"
        raise ValueError(f"{part} has no text{reason}; give {wanted} with some")
    # Else the split is at fault: too small a share of too few documents.
    reason = empty_split(part, num_documents, text.data)
    if isinstance(text, HubCorpus):
        remedy = hub_remedy(text, num_documents)
        raise ValueError(f"{reason}, and data=hub holds out random rows only; {remedy}")
    if text.split == "documents":
        raise EmptySplit(reason)
    raise ValueError(
        f"{reason}, by its tail too; raise data.validation_fraction, give more text, or name a set"
        " in data.validation"
    )


def hub_remedy(text: HubCorpus, num_documents: int) -> str:
    """Returns what to do where holding out rows of a dataset leaves a part empty. The end of a
    stream is not known beforehand, so its tail cannot be held out instead."""
    remedies = []
    # A single row goes to one part or the other, whatever the share.
    if num_documents > 1:
        remedies.append("raise it")
    if num_documents > 1 and text.data.documents:
        remedies.append("raise data.documents")
    remedies.append("name a split in data.validation")
    if text.local:
        remedies.append("read the folder by data=text, which then holds out its tail")
    return ", or ".join(remedies)
