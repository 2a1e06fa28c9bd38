"""Folders of Hugging Face's: found on the disk or the hub, and the tokenizers in them read.

One of GPT-2's kind becomes ranks, which tiktoken encodes several times as fast; every other stays
what it is and runs in the library `tokenizers`. Nothing here needs transformers. The ids of any
text are the same on both sides."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NotRequired, TypedDict, TypeVar

import msgspec

from data.files import DamagedFile, NotDownloaded, check, parse_json, read_bytes, read_json
from data.hf_tokenizer import (
    HFTokenizer,
    added_tokens,
    build,
    library_errors,
    pairs,
    special_ids,
    steps,
)
from data.tokenizer import (
    BYTES_PATTERN,
    END_OF_TEXT,
    FILE,
    GPT2_PATTERN,
    RankedTokenizer,
    Tokenizer,
    byte_alphabet,
)

if TYPE_CHECKING:
    import tokenizers

SETTINGS = "tokenizer_config.json"
FILES = (
    FILE,
    SETTINGS,
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
# Bytes of a tokenizer.json.
LARGEST = 2**28
# Ids: no tokenizer has a tenth of it, and a damaged number would fill the memory.
LARGEST_VOCABULARY = 2**24

T = TypeVar("T")
Id = Annotated[int, msgspec.Meta(ge=0, lt=LARGEST_VOCABULARY)]


class Ids(TypedDict, total=False):
    """The fields of config.json and generation_config.json that are read for a tokenizer."""

    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_VOCABULARY)] | None
    eos_token_id: Id | list[Id] | None


class AddedToken(TypedDict):
    """A token of tokenizer_config.json that is more than its text."""

    content: str


class Names(TypedDict, total=False):
    """The fields of tokenizer_config.json and special_tokens_map.json that are read; the rest is
    handed on."""

    eos_token: str | AddedToken | None


class Step(TypedDict):
    """The fields that are read of a step of a normaliser, pre-tokenizer or decoder. The library
    takes steps of other shapes, and guesses."""

    type: str
    pattern: NotRequired[dict[str, str]]
    content: NotRequired[str]
    replacement: NotRequired[str]


class Steps(TypedDict):
    """The parts of a tokenizer.json that are steps."""

    normalizer: list[Step]
    pre_tokenizer: list[Step]
    decoder: list[Step]


class LibraryTokenizer(NamedTuple):
    """A tokenizer.json, and the library's own tokenizer of it.

    `bos` is what its post-processor puts before a text, and `largest` its largest id."""

    text: str
    content: dict[str, Any]
    made: "tokenizers.Tokenizer"
    bos: tuple[int, ...]
    largest: int


# Files


def find_folder(name_or_dir: str | Path, wanted: Sequence[str] = FILES) -> Path:
    """Returns the folder itself, or that of a hub name.

    Args:
        name_or_dir: a folder, or a name on the hub
        wanted: the files of the hub that are downloaded unless they were before

    Raises:
        ValueError: there is neither
    """
    try:
        folder = Path(name_or_dir).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{name_or_dir}: there is no home folder to put for ~; set HOME, or write the whole"
            " path"
        ) from None
    if os.path.isdir(folder):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_dir), allow_patterns=list(wanted)))
    except (OSError, ValueError) as error:
        # These are raised for no network, no such name, and what cannot be a name at all.
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name_or_dir} is no folder, nor could the hub give it ({type(error).__name__}:"
            f" {reason}); give a folder that holds {' and '.join(wanted[:2])}, or a hub name where"
            " there is a network"
        ) from None


def read_settings(path: Path, kind: type[T], absent: T | None = None) -> T:
    """Returns what a JSON file of a folder holds, as `data.files.read_json` does; its errors say
    what to do about such a folder."""
    try:
        return read_json(path, kind, absent)
    except NotDownloaded:
        raise
    except DamagedFile as error:
        raise DamagedFile(f"{error}; fetch it again") from None


def read_names(folder: Path) -> dict[str, Any]:
    """Returns the settings of a folder's tokenizer, its chat template among them, whole."""
    files = [folder / "special_tokens_map.json", folder / SETTINGS]
    for file in files:
        read_settings(file, Names, Names())  # for its types
    # tokenizer_config.json goes before the older special_tokens_map.json.
    settings: dict[str, Any] = read_settings(files[0], dict[str, Any], {}) | read_settings(
        files[1], dict[str, Any], {}
    )
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = read_bytes(template).decode(errors="replace")
    return settings


# Tokenizers


def read_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder.

    `bos` is what its post-processor puts before a text, as in transformers; `eot` is eos_token of
    tokenizer_config.json, else eos_token_id of config.json or of generation_config.json, the first
    if there are several. The vocabulary is that of config.json, and all further ids, but special
    tokens for which the model has no rows: no text gives them.

    Raises:
        ValueError: there is no tokenizer, or none that the library can read, or nothing names an
            end of text
    """
    path = folder / FILE
    text, content, made, bos, largest = read_library_tokenizer(path)
    if largest >= LARGEST_VOCABULARY:
        raise ValueError(
            f"{path} has the id {largest:,}, where {LARGEST_VOCABULARY:,} ids are the most; fetch"
            " it again"
        )
    # The model has a row for each id of its config.json, which may be more than the tokenizer has.
    model = read_settings(folder / "config.json", Ids, Ids())
    eot = end_of_text(folder, made, model)
    vocab_size = max(largest + 1, model.get("vocab_size") or 0)
    # Ranks know nothing that is put before a text.
    if not bos and (ranks := read_ranks(content, vocab_size)):
        return ranks
    if eot is None or made.id_to_token(eot) is None:
        raise ValueError(
            f"{folder} names no token that ends a text; set eos_token in its {SETTINGS} to one of"
            f" {path}"
        )
    # Special tokens that were added without resizing the model are no part of the vocabulary.
    rows = model.get("vocab_size") or vocab_size
    if {*range(rows, vocab_size)} <= special_ids(content) - {eot, *bos}:
        vocab_size = rows
    # The end of the document before is enough where the same token would begin the next.
    begins = () if bos == (eot,) else bos
    return HFTokenizer(text, json.dumps(read_names(folder)), eot, vocab_size, begins)


def read_library_tokenizer(path: Path) -> LibraryTokenizer:
    """Returns the tokenizer of a tokenizer.json. Raises ValueError where there is none, or none
    that the library can read."""
    try:
        text = read_bytes(path, LARGEST).decode()
        content = parse_json(text, dict[str, Any], path)
        made = build(content)
        parts = ("normalizer", "pre_tokenizer", "decoder")
        check({part: [*steps(content.get(part))] for part in parts}, Steps, path)
        with library_errors():
            start = made.encode("a", add_special_tokens=True)
        # The special tokens at the start, up to the first that is none.
        bos = tuple(start.ids[: [*start.special_tokens_mask, 0].index(0)])
        largest = max(made.get_vocab(with_added_tokens=True).values(), default=-1)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file;"
            f" AutoTokenizer.from_pretrained(...).save_pretrained({str(path.parent)!r}) writes it"
        ) from None
    except NotDownloaded:
        raise
    except DamagedFile as error:
        raise DamagedFile(f"{error}; fetch it again") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(next(iter(str(error).splitlines()), "").split())[:200]
        raise ValueError(
            f"{path} is not a tokenizer that this version of tokenizers reads"
            f" ({type(error).__name__}: {reason}); fetch it again, or update tokenizers"
        ) from None
    return LibraryTokenizer(text, content, made, bos, largest)


def end_of_text(folder: Path, made: "tokenizers.Tokenizer", model: Ids) -> int | None:
    """Returns the id that a folder says ends a text, if it says so.

    Args:
        folder: the folder
        made: its tokenizer
        model: what its config.json says
    """
    token = read_names(folder).get("eos_token") or ""
    # The tokenizer's own word goes before that of the model.
    named = made.token_to_id(token["content"] if isinstance(token, dict) else token)
    if named is not None:
        return named
    generation = read_settings(folder / "generation_config.json", Ids, Ids())
    # A model that may end in several ways lists them, the usual one first.
    for stated in (model.get("eos_token_id"), generation.get("eos_token_id")):
        ids = stated if isinstance(stated, list) else [stated]
        if ids and ids[0] is not None:
            return ids[0]
    return None


def read_ranks(content: dict[str, Any], vocab_size: int) -> RankedTokenizer | None:
    """Returns the same tokenizer as ranks, where it is a byte-level BPE as GPT-2's: its ids in the
    order of its merges, and end of text the only special token and the last id."""
    model = content["model"]
    splitter = content.get("pre_tokenizer") or {}
    if not is_byte_level_bpe(content, splitter):
        return None
    merges = pairs(model)
    splits_words = splitter.get("use_regex", True)
    # Where text is not split into words, ours cuts it anywhere, which a merge could lie across.
    if merges and not splits_words:
        return None
    vocab = {token: rank for token, rank in model["vocab"].items() if token != END_OF_TEXT}
    added = [(token["content"], token["id"]) for token in added_tokens(content)]
    if added != [(END_OF_TEXT, len(vocab))] or vocab_size != len(vocab) + 1:
        return None
    by_id = sorted(vocab, key=vocab.__getitem__)
    byte_of = byte_alphabet()
    if not set("".join(by_id)) <= set(byte_of) or not is_in_order(vocab, by_id, merges):
        return None
    ranks = tuple(bytes(byte_of[character] for character in token) for token in by_id)
    if splits_words:
        return RankedTokenizer("bpe", GPT2_PATTERN, ranks)
    return RankedTokenizer("bytes", BYTES_PATTERN, ranks)


def is_byte_level_bpe(content: dict[str, Any], splitter: dict[str, Any]) -> bool:
    """Returns whether a tokenizer.json merges bytes of the text as it stands, as GPT-2's does.

    Args:
        content: the tokenizer.json
        splitter: its pre-tokenizer, empty where it has none
    """
    model = content["model"]
    merges_bytes = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    is_single = [*steps(splitter)] == [splitter] and splitter["type"] == "ByteLevel"
    changes_text = content.get("normalizer") or splitter.get("add_prefix_space", True)
    return bool(merges_bytes and is_single and not changes_text)


def is_in_order(vocab: dict[str, int], by_id: list[str], merges: list[list[str]]) -> bool:
    """Returns whether ids count up from 0, and merges give them in that order: ranks are merged in
    the order of their ids.

    Args:
        vocab: the id of each token
        by_id: the tokens in the order of their ids
        merges: the pairs of tokens that are merged, first to last
    """
    merged = [vocab.get("".join(pair), -1) for pair in merges]
    has_all_ids = [vocab[token] for token in by_id] == [*range(len(vocab))]
    return has_all_ids and merged == sorted(merged) and -1 not in merged
