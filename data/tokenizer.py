"""Text to token ids and back. Our own tokenizers are tiktoken encodings: ranked byte strings, a
split pattern and end of text.

Those of Hugging Face that are something else are in data/hf_tokenizer.py, behind the same
interface."""

import base64
import hashlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from conf.key import expand
from data.files import DamagedFile, read_bytes, read_json, write_atomically

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
# Vocabularies that are known without the tokenizer.
SIZES = {"bytes": 257, "gpt2": 50257}
# There are no merges, so any split gives the same ids. This one is fast.
BYTES_PATTERN = r"(?s:.{1,64})"
# How GPT-2 splits text into words before it merges, in the words of tiktoken (what tokenizers'
# ByteLevel does by itself).
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
# Unicode's white space, which the pattern's \s is; Python's own is a little more.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(f"(?<![{WHITE_SPACE}])[{WHITE_SPACE}]{{100000,}}")
# Training takes the square of a word's length, so it sees longer words (base64, a padded field and
# the like) in stretches of this many characters. Encoding knows of no such limit.
LONGEST_WORD = 256
LONG_STRETCH = re.compile(
    rf"[{WHITE_SPACE}]{{{LONGEST_WORD + 1}}}|[^{WHITE_SPACE}]{{{LONGEST_WORD + 1}}}"
)
LONG_WORD = re.compile(
    "|".join(
        f"(?<!{kind}){kind}{{{LONGEST_WORD + 1},}}"
        for kind in (rf"[{WHITE_SPACE}]", r"[^\W_]", rf"(?:[^\w{WHITE_SPACE}]|_)")
    )
)

# GPT-2's ranks: where OpenAI keeps them, what the file may be called on a disk (the last name is
# tiktoken's own, in its cache), and the `Tokenizer.hash` that they must have.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_FILES = (
    "gpt2.tiktoken",
    "vocab.bpe",
    "merges.txt",
    hashlib.sha1(GPT2_URL.encode()).hexdigest(),
)
GPT2_HASH = "33fb72dd0f477229f21275e6b9c0f1f0f04f6e7df6c6c8f9ee47e49cad733b5c"


class Tokenizer(ABC):
    """Text to ids and back.

    Text is encoded as it stands: the name of a special token in it, as "<|endoftext|>", is ordinary
    text. A document is the ids `bos`, those of its text, and the id `eot`, which are put in as ids
    only. `bos` is empty where the end of the document before is enough."""

    name: str
    bos: tuple[int, ...] = ()

    @property
    @abstractmethod
    def eot(self) -> int:
        """Returns the id that ends a document."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Returns the number of ids of a model that uses the tokenizer."""

    @property
    @abstractmethod
    def token_bytes(self) -> tuple[bytes, ...]:
        """Returns the bytes that each id of the vocabulary decodes to."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Returns a sha256 (hex) over everything that decides the ids."""

    @abstractmethod
    def encode(self, text: str, opens: bool = True) -> np.ndarray:
        """Returns the token ids (uint32) of a text, without `bos` and `eot`. `opens` is false for a
        later part of a document, before which no tokenizer may put a space."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """Returns the bytes of text that each id stands for, int64 (vocab_size,); they add up to
        those of a whole document. 0 for special tokens."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Returns everything that makes the tokenizer, for its file."""

    def document(self, text: str, opens: bool = True, closes: bool = True) -> np.ndarray:
        """Returns the token ids (uint32) of a document, or of a part of one that does not open or
        close it."""
        start = np.array(self.bos if opens else (), dtype=np.uint32)
        end = np.array([self.eot] if closes else [], dtype=np.uint32)
        return np.concatenate([start, self.encode(text, opens), end])

    def prompt(self, text: str) -> list[int]:
        """Returns the token ids for a model to go on from: of a document's beginning, or the end of
        another where that is all there is."""
        return [*self.bos, *self.encode(text).tolist()] or [self.eot]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the bytes that ids stand for. A single id may stand for a part of a character, so
        a stream is best decoded so."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text that ids stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json into the folder, in one step."""
        write_atomically(Path(folder) / FILE, json.dumps(self.content(), indent=0))

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Returns the tokenizer of a folder, of either kind. Raises ValueError where there is none,
        or none that can be read."""
        from data.hf_tokenizer import HFTokenizer

        path = Path(folder) / FILE
        try:
            content = read_json(path, dict[str, Any])
            return (
                HFTokenizer.from_content(content)
                if "huggingface" in content
                else RankedTokenizer.from_content(content)
            )
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; give a folder that holds a {FILE}") from None
        except DamagedFile as error:
            raise ValueError(f"{error}; delete it, it is rebuilt") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged; delete it, it is rebuilt") from None


@dataclass(frozen=True)
class RankedTokenizer(Tokenizer):
    """A byte-level tokenizer of len(ranks) byte strings and, as its last id, end of text.

    ranks[i] is the byte string of id i; a lower id is merged earlier.
    """

    name: str
    pattern: str
    ranks: tuple[bytes, ...]

    @property
    def eot(self) -> int:
        return len(self.ranks)

    @property
    def token_bytes(self) -> tuple[bytes, ...]:
        return *self.ranks, END_OF_TEXT.encode()

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + 1

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """Returns tiktoken's encoding of these ranks."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.ranks)}
        return tiktoken.Encoding(
            self.name,
            pat_str=self.pattern,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot},
        )

    @cached_property
    def _undivided(self) -> "tiktoken.Encoding":
        """Returns the encoding of a text that is one word."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.ranks)}
        return tiktoken.Encoding(
            f"{self.name}-word", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={}
        )

    @cached_property
    def hash(self) -> str:
        content = [
            self.pattern,
            [base64.b64encode(token).decode() for token in self.ranks],
            {END_OF_TEXT: self.eot},
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str, opens: bool = True) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The matcher of split patterns gives up on a million white-space characters in a row.
            if self.pattern != GPT2_PATTERN or not LONG_SPACE.search(text):
                raise
            return self._encode_long_spaces(text)

    def _encode_long_spaces(self, text: str) -> np.ndarray:
        """Encodes a text around its long runs of white space. The pattern makes one word of such a
        run, up to the last character before other text, which goes with that: the words, and so the
        ids, are those of the whole text."""
        parts = []
        begin = 0
        for run in LONG_SPACE.finditer(text):
            end = run.end() if run.end() == len(text) else run.end() - 1
            parts += [
                self.encode(text[begin : run.start()]),
                self._undivided.encode_to_numpy(text[run.start() : end]),
            ]
            begin = end
        return np.concatenate([*parts, self.encode(text[begin:])])

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.encoding.decode_bytes([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        return np.array([*map(len, self.ranks), 0], dtype=np.int64)

    def content(self) -> dict[str, Any]:
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        return {
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": {END_OF_TEXT: self.eot},
            "ranks": ranks,
        }

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> "RankedTokenizer":
        """Returns the tokenizer of a `content`. Raises ValueError, KeyError or TypeError for
        anything else."""
        ranks = tuple(base64.b64decode(token, validate=True) for token in content["ranks"])
        tokenizer = cls(str(content["name"]), str(content["pattern"]), ranks)
        has_one_id_each = len(set(ranks)) == len(ranks)
        if content["special_tokens"] != {END_OF_TEXT: tokenizer.eot} or not has_one_id_each:
            raise ValueError("not one id for each string of bytes")
        if tokenizer.pattern not in (BYTES_PATTERN, GPT2_PATTERN):
            # tiktoken raises ValueError for a pattern that is none.
            assert tokenizer.encoding
        return tokenizer


def bytes_tokenizer() -> RankedTokenizer:
    """Returns the tokenizer of 256 bytes and end of text."""
    return RankedTokenizer("bytes", BYTES_PATTERN, tuple(bytes([value]) for value in range(256)))


def gpt2_tokenizer(path: str | None, cache: Path) -> RankedTokenizer:
    """Returns GPT-2's tokenizer, with tiktoken's ids. Its ranks are read from `path`, a file or the
    folder of one; without it from $TIKTOKEN_CACHE_DIR, from <cache>/gpt2, or from the network,
    once. Raises ValueError where they cannot be had or are not GPT-2's."""
    if path is not None:
        file = find_gpt2(Path(expand("tokenizer.path", path)))
        if file is None:
            raise ValueError(
                f"tokenizer.path={path} holds no ranks of GPT-2; name a"
                f" {' or '.join(GPT2_FILES[:3])}, or the folder of one"
            )
        return read_gpt2(file)
    # tiktoken's own cache may have the ranks already.
    kept = cache / "gpt2"
    folders = [Path(folder) for folder in (os.environ.get("TIKTOKEN_CACHE_DIR"), kept) if folder]
    file = next((found for folder in folders if (found := find_gpt2(folder))), None)
    return read_gpt2(file or download_gpt2(kept))


def find_gpt2(path: Path) -> Path | None:
    """Returns the file of ranks that a path is, or that lies in it."""
    candidates = [path, *(path / name for name in GPT2_FILES)]
    return next((file for file in candidates if file.is_file()), None)


def download_gpt2(folder: Path) -> Path:
    """Fetches the file of ranks into the folder, and returns it. Raises ValueError where the
    network does not give it."""
    import requests

    try:
        response = requests.get(GPT2_URL, timeout=(5, 60))
        response.raise_for_status()
    except requests.RequestException as error:
        raise ValueError(
            f"tokenizer=gpt2: its ranks are not in {folder} and cannot be fetched from {GPT2_URL}"
            f" ({type(error).__name__}); put vocab.bpe or gpt2.tiktoken into that folder, or set"
            " tokenizer.path to it"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "vocab.bpe", response.content)
    return folder / "vocab.bpe"


def read_gpt2(file: Path) -> RankedTokenizer:
    """Returns the tokenizer of a file of ranks: lines "<base64> <rank>" (tiktoken's), or a version
    and then the pairs that are merged. Raises ValueError for a file of anything else."""
    try:
        lines = read_bytes(file).decode().splitlines()
        # vocab.bpe has a pair of strings a line, whose ids follow those of the single bytes.
        if lines and lines[0].startswith("#version"):
            byte_of = byte_alphabet()
            merged = (
                bytes(byte_of[character] for character in line.replace(" ", ""))
                for line in lines[1:]
            )
            ranks = (*(bytes([value]) for value in byte_of.values()), *merged)
        else:
            ranks = tuple(base64.b64decode(line.split()[0], validate=True) for line in lines)
        tokenizer = RankedTokenizer("gpt2", GPT2_PATTERN, ranks)
    except (ValueError, KeyError, IndexError):
        raise ValueError(
            f"{file} is no file of GPT-2's ranks; give gpt2.tiktoken or vocab.bpe as they were"
            " published"
        ) from None
    # Other ranks would give other ids under the same name.
    if tokenizer.hash != GPT2_HASH:
        raise ValueError(
            f"{file} does not hold GPT-2's {SIZES['gpt2'] - 1} ranks (but {len(ranks)}, or others);"
            " delete it or get it again"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> RankedTokenizer:
    """Returns a byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909; over bytes as GPT-2) of
    the texts, end of text as last id.

    The pairs that are merged, and so the ids, are those of Hugging Face's `tokenizers`, but for
    words of more than LONGEST_WORD characters, which are seen in parts; training twice gives the
    same. Raises ValueError if the texts hold too few repeated pairs for that many merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    # All 256 bytes are in the vocabulary, so that any text can be encoded.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The library's own bar, on stderr, where that is a terminal.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator((part for text in texts for part in part_long_words(text)), trainer)
    vocab = model.get_vocab()
    # The last id is end of text, which is not trained.
    if len(vocab) < vocab_size - 1:
        refuse_little_text(vocab_size, len(vocab) + 1)
    byte_of = byte_alphabet()
    ranks = tuple(
        bytes(byte_of[character] for character in token)
        for token in sorted(vocab, key=vocab.__getitem__)
    )
    return RankedTokenizer("bpe", GPT2_PATTERN, ranks)


def refuse_little_text(vocab_size: int, found: int) -> NoReturn:
    """Raises ValueError where a text gives fewer ids than were asked for."""
    # Without a merge there are 257, fewer than a configuration can ask for.
    if found == 257:
        raise ValueError(
            "tokenizer=bpe has nothing to learn from this text: no two bytes of it come together"
            " twice; give more text, raise tokenizer.train_megabytes, or use tokenizer=bytes"
        )
    raise ValueError(
        f"tokenizer.vocab_size={vocab_size} is too large for this text, which gives {found};"
        " choose that or less"
    )


def part_long_words(text: str) -> Iterator[str]:
    """Yields a text whole, or in parts that hold no word of more than LONGEST_WORD characters."""
    begin = 0
    if LONG_STRETCH.search(text):
        for word in LONG_WORD.finditer(text):
            # The text after the last whole stretch goes with the next.
            for end in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
                yield text[begin:end]
                begin = end
    yield text[begin:]


def byte_alphabet() -> dict[str, int]:
    """Maps the printable character that stands for a byte in GPT-2's and Hugging Face's
    vocabularies to that byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + i): value for i, value in enumerate(others)
    }


def head(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    """Yields the first num_bytes bytes of the texts, less the character that the limit cuts."""
    for text in texts:
        data = text.encode()
        yield data[:num_bytes].decode(errors="ignore")
        num_bytes -= len(data)
        if num_bytes <= 0:
            return
