"""Hugging Face's tokenizers, in and out: any folder's tokenizer.json behind our interface, and ours
as a tokenizer.json.

One of GPT-2's kind becomes ranks, which tiktoken encodes several times as fast; every other stays
what it is and runs in the library `tokenizers`. Nothing here needs transformers. The ids of any
text are the same on both sides."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict, TypeVar

import msgspec
import numpy as np

from conf.text import TokenizerConfig
from data.files import DamagedFile, NotDownloaded, check, parse_json, read_bytes, read_json
from data.tokenizer import (
    BYTES_PATTERN,
    END_OF_TEXT,
    FILE,
    GPT2_PATTERN,
    SIZES,
    RankedTokenizer,
    Tokenizer,
    byte_alphabet,
    bytes_tokenizer,
    gpt2_tokenizer,
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
LARGEST = 2**28  # bytes of a tokenizer.json
# ids; no tokenizer has a tenth of it, and a damaged number would fill the memory
LARGEST_VOCABULARY = 2**24
# parts of a tokenizer.json that decide no id, but for `bos`
NOT_READ = (
    "version",
    "truncation",
    "padding",
    "post_processor",
    "decoder",
)


T = TypeVar("T")
Id = Annotated[int, msgspec.Meta(ge=0, lt=LARGEST_VOCABULARY)]


class Ids(TypedDict, total=False):
    """What is read of config.json and generation_config.json for a tokenizer."""

    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_VOCABULARY)] | None
    eos_token_id: Id | list[Id] | None


class AddedToken(TypedDict):
    """A token of tokenizer_config.json that is more than its text."""

    content: str


class Names(TypedDict, total=False):
    """What is read of tokenizer_config.json and special_tokens_map.json; the rest is handed on."""

    eos_token: str | AddedToken | None


class Step(TypedDict):
    """What is read of a step of a normaliser, pre-tokenizer or decoder. The library takes steps of
    other shapes, and guesses."""

    type: str
    pattern: NotRequired[dict[str, str]]
    content: NotRequired[str]
    replacement: NotRequired[str]


class Steps(TypedDict):
    """The parts of a tokenizer.json that are steps."""

    normalizer: list[Step]
    pre_tokenizer: list[Step]
    decoder: list[Step]


@dataclass(frozen=True)
class HFTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's library: `huggingface` is its tokenizer.json, `settings` its
    tokenizer_config.json, as they were found.

    A space that it puts before a text (Llama 2, Mistral) is taken off the length of `eot`, so that
    the lengths of a document's ids add up to its bytes. They do unless it changes text (lower case,
    NFC) or has no ids for some of it; then they are those of what it decodes to."""

    huggingface: str
    settings: str
    end: int  # the id `eot`
    size: int  # `vocab_size`: of the folder's model, which may have more rows than there are ids
    bos: tuple[int, ...] = ()
    name: str = "hf"

    @property
    def eot(self) -> int:
        return self.end

    @property
    def vocab_size(self) -> int:
        return self.size

    def __getstate__(self) -> dict[str, Any]:
        # what is cached forgets its settings when it is pickled
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @cached_property
    def encoding(self) -> "tokenizers.Tokenizer":
        return build(json.loads(self.huggingface))

    @cached_property
    def later(self) -> "tokenizers.Tokenizer":
        """The same without a space before the text."""
        content = json.loads(self.huggingface)
        parts = {part: without_space(content.get(part)) for part in ("normalizer", "pre_tokenizer")}
        return build(content | parts)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        table = [b""] * self.vocab_size
        for index, spelled in spell(self.encoding, json.loads(self.huggingface)):
            if index < self.vocab_size:  # no text gives the others (see `read_tokenizer`)
                table[index] = spelled
        return tuple(table)

    @cached_property
    def hash(self) -> str:
        content = {
            part: value
            for part, value in json.loads(self.huggingface).items()
            if part not in NOT_READ
        }
        content["model"] = content["model"] | {"merges": pairs(content["model"])}
        return hashlib.sha256(
            json.dumps([essence(content), self.eot, self.bos], sort_keys=True).encode()
        ).hexdigest()

    @cached_property
    def space(self) -> bytes:
        """What it puts before a text."""
        return self.decode_bytes(self.encoding.encode("a", add_special_tokens=False).ids).partition(
            b"a"
        )[0]

    def encode(self, text: str, opens: bool = True) -> np.ndarray:
        encoding = self.encoding if opens or not self.space else self.later
        return np.array(encoding.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids stand for, without the space before it; bytes that are not UTF-8 become
        U+FFFD."""
        return self.decode_bytes(ids).removeprefix(self.space).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([*map(len, self.token_bytes)], dtype=np.int64)
        lengths[
            [
                index
                for index in special_ids(json.loads(self.huggingface))
                if index < self.vocab_size
            ]
        ] = 0
        lengths[self.eot] = -len(self.space)
        return lengths

    def content(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> "HFTokenizer":
        """The inverse of `content`. Raises ValueError, KeyError or TypeError for what is not
        one."""
        tokenizer = cls(**content | {"bos": tuple(content["bos"])})
        assert tokenizer.encoding is not None
        return tokenizer


def build(content: dict[str, Any]) -> "tokenizers.Tokenizer":
    """The library's own tokenizer, which neither cuts nor fills up, draws no lots, and takes the
    name of a special token for text. Raises ValueError for what is not a tokenizer."""
    import tokenizers

    kept = content | {"truncation": None, "padding": None, "model": {**content["model"]}}
    kept["model"].pop("dropout", None)
    prefix = kept["model"].get("continuing_subword_prefix")
    if prefix and not all(pair[-1].startswith(prefix) for pair in pairs(kept["model"])):
        # Left to itself the library cuts characters in two and aborts the process.
        raise ValueError(
            f"continuing_subword_prefix={prefix!r} does not begin the second part of every merge"
        )
    with library_errors():
        made = tokenizers.Tokenizer.from_str(json.dumps(kept))
    made.encode_special_tokens = True
    return made


@contextmanager
def library_errors() -> Iterator[None]:
    """Turns what the library raises, which is nothing more specific than Exception, and its panics,
    which are no Exception, into ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(str(error)) from None


def steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder, whether it is a sequence of them or a
    single one."""
    inner = (
        [part[name] for name in ("normalizers", "pretokenizers", "decoders") if name in part]
        if part
        else []
    )
    if part and not inner:
        yield part
    for step in inner[0] if inner else []:
        yield from steps(step)


def added_tokens(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What a tokenizer.json adds to its model's vocabulary."""
    return content.get("added_tokens") or []


def special_ids(content: dict[str, Any]) -> set[int]:
    """Returns the ids that no text gives, since the name of a special token is text here."""
    return {token["id"] for token in added_tokens(content) if token.get("special")}


def without_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer that puts no space before a text."""
    never: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    kept = [step | never.get(step["type"], {}) for step in steps(part) if step["type"] != "Prepend"]
    if len(kept) < 2:
        return kept[0] if kept else None
    return {"type": "Sequence", "normalizers": kept, "pretokenizers": kept}  # either reads its own


def spell(encoding: "tokenizers.Tokenizer", content: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
    """(id, the bytes that it decodes to): those of its letters for a byte-level vocabulary, <0xE6>
    as that byte with byte fallback, and for other decoders what is added to the text of another
    id."""
    added = {token["id"]: token["content"].encode() for token in added_tokens(content)}
    decoders, byte_of = [*steps(content.get("decoder"))], byte_alphabet()
    kinds = {step["type"] for step in decoders}
    spaces = [
        (step["pattern"].get("String", ""), step["content"])
        for step in decoders
        if step["type"] == "Replace"
    ]
    spaces += [(step["replacement"], " ") for step in decoders if step["type"] == "Metaspace"]
    plain = (
        bool(kinds)
        and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        and all(old for old, _ in spaces)
    )
    anchor = next(
        (
            index
            for index in range(encoding.get_vocab_size())
            if index not in added and encoding.decode([index]).strip()
        ),
        0,
    )
    before = encoding.decode([anchor])
    for token, index in encoding.get_vocab(with_added_tokens=True).items():
        if index in added:
            yield index, added[index]
        elif "ByteLevel" in kinds:
            known = all(character in byte_of for character in token)
            yield (
                index,
                bytes(byte_of[character] for character in token) if known else token.encode(),
            )
        elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
            yield index, bytes.fromhex(token[3:5])
        elif plain:
            for old, new in spaces:
                token = token.replace(old, new)
            yield index, token.encode()
        else:
            after = encoding.decode([anchor, index])
            yield (
                index,
                (
                    after.removeprefix(before)
                    if after.startswith(before)
                    else encoding.decode([index])
                ).encode(),
            )


def pairs(model: dict[str, Any]) -> list[list[str]]:
    """The merges of a BPE, which have been written in two ways."""
    return [
        pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []
    ]


def essence(part: Any) -> Any:
    """What is said in JSON, without the defaults that one version of the library writes and another
    leaves out."""
    if isinstance(part, dict):
        return {
            name: essence(value)
            for name, value in part.items()
            if value is not None and value is not False
        }
    return [essence(value) for value in part] if isinstance(part, list) else part


# Folders


def find_folder(name_or_dir: str | Path, wanted: Sequence[str] = FILES) -> Path:
    """The folder itself, or that of a hub name, whose `wanted` files are downloaded unless they
    were before. Raises ValueError where there is neither."""
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
    except (
        OSError,
        ValueError,
    ) as error:  # what huggingface_hub raises for no network, no such name, and no name at all
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name_or_dir} is no folder, nor could the hub give it ({type(error).__name__}:"
            f" {reason}); give a folder that holds {' and '.join(wanted[:2])}, or a hub name where"
            " there is a network"
        ) from None


def known_tokenizer(config: TokenizerConfig, cache: Path) -> Tokenizer | None:
    """The tokenizer of a configuration where no text has a part in it; None for a bpe of our
    own."""
    if config.name == "bytes":
        return bytes_tokenizer()
    if config.name == "gpt2":
        return gpt2_tokenizer(config.path, cache)
    return configured_hf(config) if config.name == "hf" else None


def configured_hf(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of tokenizer=hf. Raises ValueError where it names none, or none that can be
    read."""
    if config.path is None:
        raise ValueError(
            "tokenizer.path=null names no tokenizer; with tokenizer=hf set tokenizer.path=FOLDER,"
            " or init.hf=FOLDER to take its own"
        )
    return read_tokenizer(find_folder(config.path))


def vocabulary(config: TokenizerConfig) -> int:
    """The size of the vocabulary that a configuration will come to."""
    return (
        configured_hf(config).vocab_size
        if config.name == "hf"
        else SIZES.get(config.name, config.vocab_size)
    )


def read_settings(path: Path, kind: type[T], absent: T | None = None) -> T:
    """Returns what a JSON file of a folder holds, as `data.files.read_json` does; its errors say
    what to do about such a folder."""
    try:
        return read_json(path, kind, absent)
    except NotDownloaded:
        raise
    except DamagedFile as error:
        raise DamagedFile(f"{error}; fetch it again") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder. `bos` is what its post-processor puts before
    a text, as in transformers; `eot` is eos_token of tokenizer_config.json, else eos_token_id of
    config.json or of generation_config.json, the first if there are several. The vocabulary is that
    of config.json, and all further ids, but special tokens for which the model has no rows: no text
    gives them. Raises ValueError where there is none, or none that the library can read, and where
    nothing names an end of text."""
    path = folder / FILE
    try:
        text = read_bytes(path, LARGEST).decode()
        content = parse_json(text, dict[str, Any], path)
        made = build(content)
        parts = ("normalizer", "pre_tokenizer", "decoder")
        check({part: [*steps(content.get(part))] for part in parts}, Steps, path)
        with library_errors():
            start = made.encode("a", add_special_tokens=True)
        bos = tuple(start.ids[: [*start.special_tokens_mask, 0].index(0)])
        largest = max(made.get_vocab(with_added_tokens=True).values(), default=-1)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file;"
            f" AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r}) writes it"
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
    if largest >= LARGEST_VOCABULARY:
        raise ValueError(
            f"{path} has the id {largest:,}, where {LARGEST_VOCABULARY:,} ids are the most; fetch"
            " it again"
        )

    model = read_settings(folder / "config.json", Ids, Ids())
    eot = end_of_text(folder, made, model)
    vocab_size = max(largest + 1, model.get("vocab_size") or 0)
    if not bos and (ranks := read_ranks(content, vocab_size)):
        return ranks
    if eot is None or made.id_to_token(eot) is None:
        raise ValueError(
            f"{folder} names no token that ends a text; set eos_token in its {SETTINGS} to one of"
            f" {path}"
        )
    rows = model.get("vocab_size") or vocab_size
    if {*range(rows, vocab_size)} <= special_ids(content) - {eot, *bos}:
        vocab_size = rows
    return HFTokenizer(
        text, json.dumps(read_names(folder)), eot, vocab_size, () if bos == (eot,) else bos
    )


def read_names(folder: Path) -> dict[str, Any]:
    """Returns the settings of a folder's tokenizer, its chat template among them, whole."""
    files = [folder / "special_tokens_map.json", folder / SETTINGS]
    for file in files:
        read_settings(file, Names, Names())  # for its types
    settings: dict[str, Any] = read_settings(files[0], dict[str, Any], {}) | read_settings(
        files[1], dict[str, Any], {}
    )
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = read_bytes(template).decode(errors="replace")
    return settings


def end_of_text(folder: Path, made: "tokenizers.Tokenizer", model: Ids) -> int | None:
    """Returns the id that a folder says ends a text, if it says so."""
    token = read_names(folder).get("eos_token") or ""
    if (
        named := made.token_to_id(token["content"] if isinstance(token, dict) else token)
    ) is not None:
        return named
    stated = [
        file.get("eos_token_id")
        for file in (model, read_settings(folder / "generation_config.json", Ids, Ids()))
    ]
    ids = [
        index
        for value in stated
        if value is not None
        for index in (value if isinstance(value, list) else [value])
    ]
    return ids[0] if ids else None


def read_ranks(content: dict[str, Any], vocab_size: int) -> RankedTokenizer | None:
    """The same tokenizer as ranks, where it is a byte-level BPE as GPT-2's: its ids in the order of
    its merges, and end of text the only special token and the last id."""
    model, splitter, added = (
        content["model"],
        content.get("pre_tokenizer") or {},
        added_tokens(content),
    )
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("byte_fallback")
        or content.get("normalizer")
        or [*steps(splitter)] != [splitter]
    ):
        return None
    vocab = {token: rank for token, rank in model["vocab"].items() if token != END_OF_TEXT}
    by_id, bytes_of, merges = sorted(vocab, key=vocab.__getitem__), byte_alphabet(), pairs(model)
    results = [vocab.get("".join(pair), -1) for pair in merges]
    if (
        splitter["type"] != "ByteLevel"
        or splitter.get("add_prefix_space", True)
        or not (splitter.get("use_regex", True) or not merges)
        or [(token["content"], token["id"]) for token in added] != [(END_OF_TEXT, len(vocab))]
        or vocab_size != len(vocab) + 1
        or [vocab[token] for token in by_id] != [*range(len(vocab))]
        or not set("".join(by_id)) <= set(bytes_of)
        or results != sorted(results)
        or -1 in results
    ):
        return None
    ranks = tuple(bytes(bytes_of[character] for character in token) for token in by_id)
    return RankedTokenizer(
        *(("bpe", GPT2_PATTERN) if splitter.get("use_regex", True) else ("bytes", BYTES_PATTERN)),
        ranks,
    )


# Ours as theirs


def to_files(tokenizer: Tokenizer, max_length: int) -> dict[str, dict[str, Any]]:
    """The files of a folder from which AutoTokenizer loads a tokenizer; those that it was read
    from, where it is Hugging Face's. Raises ValueError for ranks with a split pattern other than
    GPT-2's."""
    if isinstance(tokenizer, HFTokenizer):
        own = json.loads(tokenizer.settings)
        defaults = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.encoding.id_to_token(tokenizer.eot),
        }
        return {
            FILE: json.loads(tokenizer.huggingface),
            SETTINGS: defaults | {"model_max_length": max_length} | own,
        }
    assert isinstance(tokenizer, RankedTokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as in training: the name in a text is only text
    }
    return {FILE: json.loads(to_tokenizers(tokenizer).to_str()), SETTINGS: settings}


def to_tokenizers(tokenizer: RankedTokenizer) -> "tokenizers.Tokenizer":
    """Ranks as Hugging Face's own kind. End of text is a special token; whoever loads it must ask
    for `encode_special_tokens`, lest "<|endoftext|>" in a text become that. Raises ValueError for a
    split pattern other than GPT-2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if tokenizer.pattern not in (BYTES_PATTERN, GPT2_PATTERN):
        raise ValueError(
            f"tokenizer.name={tokenizer.name} splits text as GPT-2 does not, which cannot be"
            " exported; train with tokenizer=bpe"
        )
    spelling = {value: character for character, value in byte_alphabet().items()}
    vocab = {
        "".join(spelling[value] for value in token): rank
        for rank, token in enumerate(tokenizer.ranks)
    }
    # tiktoken merges any two neighbours that make a token, lowest rank first: here every way to
    # part a token is a merge.
    merges = [
        (token[:i], token[i:])
        for token in vocab
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    # a word that is a token is not taken apart, as in tiktoken
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=tokenizer.pattern == GPT2_PATTERN
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert made.token_to_id(END_OF_TEXT) == tokenizer.eot
    return made
