"""Tokenizers of Hugging Face's library `tokenizers`, behind the interface of ours.

The ids of any text are those that the library gives. Nothing here needs transformers."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tokenizer import Tokenizer, byte_alphabet

if TYPE_CHECKING:
    import tokenizers

# Parts of a tokenizer.json that decide no id, but for `bos`.
NOT_READ = ("version", "truncation", "padding", "post_processor", "decoder")
# Decoders that only replace strings in the names of tokens.
REPLACING = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
# The byte that each letter of a byte-level vocabulary stands for.
BYTE_OF = byte_alphabet()


@dataclass(frozen=True)
class HFTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's library: `huggingface` is its tokenizer.json, `settings` its
    tokenizer_config.json, as they were found.

    `end` is the id `eot`. `size` is `vocab_size`, that of the folder's model, which may have more
    rows than there are ids.

    A space that it puts before a text (Llama 2, Mistral) is taken off the length of `eot`, so that
    the lengths of a document's ids add up to its bytes. They do unless it changes text (lower case,
    NFC) or has no ids for some of it; then they are those of what it decodes to."""

    huggingface: str
    settings: str
    end: int
    size: int
    bos: tuple[int, ...] = ()
    name: str = "hf"

    @property
    def eot(self) -> int:
        return self.end

    @property
    def vocab_size(self) -> int:
        return self.size

    def __getstate__(self) -> dict[str, Any]:
        # The library's objects, which are cached here, lose their settings when they are pickled.
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @cached_property
    def encoding(self) -> "tokenizers.Tokenizer":
        """Returns the library's tokenizer."""
        return build(json.loads(self.huggingface))

    @cached_property
    def later(self) -> "tokenizers.Tokenizer":
        """Returns the encoding without a space before the text."""
        content = json.loads(self.huggingface)
        parts = {part: without_space(content.get(part)) for part in ("normalizer", "pre_tokenizer")}
        return build(content | parts)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        table = [b""] * self.vocab_size
        for index, spelled in spell(self.encoding, json.loads(self.huggingface)):
            # No text gives the other ids, as `read_tokenizer` says.
            if index < self.vocab_size:
                table[index] = spelled
        return tuple(table)

    @cached_property
    def hash(self) -> str:
        whole = json.loads(self.huggingface)
        content = {part: value for part, value in whole.items() if part not in NOT_READ}
        # The two ways to write merges mean the same.
        content["model"] = content["model"] | {"merges": pairs(content["model"])}
        decides = json.dumps([essence(content), self.eot, self.bos], sort_keys=True)
        return hashlib.sha256(decides.encode()).hexdigest()

    @cached_property
    def space(self) -> bytes:
        """Returns the bytes that the tokenizer puts before a text."""
        ids = self.encoding.encode("a", add_special_tokens=False).ids
        return self.decode_bytes(ids).partition(b"a")[0]

    def encode(self, text: str, opens: bool = True) -> np.ndarray:
        encoding = self.encoding
        # The second encoding is built only where a space makes a difference.
        if not opens and self.space:
            encoding = self.later
        return np.array(encoding.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text that ids stand for, without the space before it; bytes that are not
        UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).removeprefix(self.space).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([*map(len, self.token_bytes)], dtype=np.int64)
        special = special_ids(json.loads(self.huggingface))
        lengths[[index for index in special if index < self.vocab_size]] = 0
        # Every document has one end, and one space that is no text.
        lengths[self.eot] = -len(self.space)
        return lengths

    def content(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> "HFTokenizer":
        """Returns the tokenizer of a `content`. Raises ValueError, KeyError or TypeError for
        anything else."""
        tokenizer = cls(**content | {"bos": tuple(content["bos"])})
        # Building it shows whether the library can read the file.
        assert tokenizer.encoding is not None
        return tokenizer


def build(content: dict[str, Any]) -> "tokenizers.Tokenizer":
    """Returns the library's own tokenizer of a tokenizer.json, which neither cuts nor fills up,
    draws no lots, and takes the name of a special token for text. Raises ValueError for what is not
    a tokenizer."""
    import tokenizers

    kept = content | {"truncation": None, "padding": None, "model": {**content["model"]}}
    # Dropout draws lots while it encodes.
    kept["model"].pop("dropout", None)
    prefix = kept["model"].get("continuing_subword_prefix")
    if prefix and not all(pair[-1].startswith(prefix) for pair in pairs(kept["model"])):
        # Left to itself the library cuts characters in two and aborts the process.
        raise ValueError(
            f"continuing_subword_prefix={prefix!r} does not begin the second part of every merge"
        )
    with library_errors():
        made = tokenizers.Tokenizer.from_str(json.dumps(kept))
    # The name of a special token in a text is text.
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
    """Yields the steps of a normaliser, pre-tokenizer or decoder, whether it is a sequence of them
    or a single one."""
    if not part:
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            for step in part[name]:
                yield from steps(step)
            return
    yield part


def added_tokens(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the tokens that a tokenizer.json adds to its model's vocabulary."""
    return content.get("added_tokens") or []


def special_ids(content: dict[str, Any]) -> set[int]:
    """Returns the ids that no text gives, since the name of a special token is text here."""
    return {token["id"] for token in added_tokens(content) if token.get("special")}


def without_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns a normaliser or pre-tokenizer that puts no space before a text."""
    never: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    kept = [step | never.get(step["type"], {}) for step in steps(part) if step["type"] != "Prepend"]
    if not kept:
        return None
    if len(kept) == 1:
        return kept[0]
    # A normaliser and a pre-tokenizer call their steps differently, and read no other name.
    return {"type": "Sequence", "normalizers": kept, "pretokenizers": kept}


def spell(encoding: "tokenizers.Tokenizer", content: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
    """Yields (id, the bytes that it decodes to): those of its letters for a byte-level vocabulary,
    <0xE6> as that byte with byte fallback, and for other decoders what is added to the text of
    another id."""
    added = {token["id"]: token["content"].encode() for token in added_tokens(content)}
    decoders = [*steps(content.get("decoder"))]
    kinds = {step["type"] for step in decoders}
    replaced = replacements(decoders)
    only_replaces = bool(kinds) and kinds <= REPLACING and all(old for old, _ in replaced)
    anchor = plain_id(encoding, added)
    # From the surest way to the slowest: what is added stands for itself, a byte-level letter for a
    # byte, and what no rule here knows is decoded by the library.
    for token, index in encoding.get_vocab(with_added_tokens=True).items():
        if index in added:
            yield index, added[index]
        elif "ByteLevel" in kinds:
            yield index, letters_to_bytes(token)
        elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
            yield index, bytes.fromhex(token[3:5])
        elif only_replaces:
            for old, new in replaced:
                token = token.replace(old, new)
            yield index, token.encode()
        else:
            yield index, decode_after(encoding, anchor, index).encode()


def replacements(decoders: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns the strings that decoders replace, and what by. A pattern that is no plain string is
    the empty string here."""
    found = [
        (step["pattern"].get("String", ""), step["content"])
        for step in decoders
        if step["type"] == "Replace"
    ]
    return found + [(step["replacement"], " ") for step in decoders if step["type"] == "Metaspace"]


def letters_to_bytes(token: str) -> bytes:
    """Returns the bytes that the letters of a byte-level token stand for; those of the text where
    it has other letters."""
    if all(letter in BYTE_OF for letter in token):
        return bytes(BYTE_OF[letter] for letter in token)
    return token.encode()


def plain_id(encoding: "tokenizers.Tokenizer", added: dict[int, bytes]) -> int:
    """Returns the first id of the model's own whose text is not empty; 0 where there is none."""
    for index in range(encoding.get_vocab_size()):
        if index not in added and encoding.decode([index]).strip():
            return index
    return 0


def decode_after(encoding: "tokenizers.Tokenizer", anchor: int, index: int) -> str:
    """Returns the text that an id adds to that of the id `anchor`: some decoders take the space off
    a text's first id."""
    before = encoding.decode([anchor])
    after = encoding.decode([anchor, index])
    if after.startswith(before):
        return after.removeprefix(before)
    return encoding.decode([index])


def pairs(model: dict[str, Any]) -> list[list[str]]:
    """Returns the merges of a BPE, which have been written in two ways."""
    return [
        pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []
    ]


def essence(part: Any) -> Any:
    """Returns a part of a tokenizer.json without the defaults that one version of the library
    writes and another leaves out."""
    if isinstance(part, dict):
        return {
            name: essence(value)
            for name, value in part.items()
            if value is not None and value is not False
        }
    if isinstance(part, list):
        return [essence(value) for value in part]
    return part
