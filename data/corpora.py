"""A corpus of text files: its sources, which of their documents are held out, and the pieces that
processes turn into shards."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conf.text import DataConfig
from data.documents import DocumentLayout, has_separator
from data.pieces import PIECE_BYTES, Piece, Stretch, cut_tail, extent, pack_spans
from data.rows import is_held_out
from data.source_files import (
    File,
    content_hash,
    find_files,
    stdlib_files,
    training_paths,
    validation_paths,
)

# Files of which the beginning is searched for a separator line.
FILES_SEARCHED = 16


class EmptySplit(ValueError):
    """Holding out documents leaves a part without any."""


class TextCorpus:
    """The text that a DataConfig names: its files, their split into parts, and the pieces of those.

    A part is "train/<source>" or "validation/<set>". Without named validation sets each source
    gives up a share of its own text, as the set "validation", or under the source's name if there
    are several.

    Where each document is a whole file and chance would hold out none of them, the tail is held
    out; `warnings` says so.

    Raises:
        ValueError: files are of another kind, or a name of a source cannot be a folder's
        NoText: a key names no file
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.split = data.validation_split
        self.warnings: list[str] = []
        # A line of a program is no separator, so a file of the standard library is a document.
        separator = None
        if data.source == "text":
            separator = data.separator
        self.layout = DocumentLayout(data.field, separator)
        self.sources: dict[str, list[File]] = {}
        self.named: dict[str, list[File]] = {}
        self.stdlib_hash: str | None = None
        if data.source == "stdlib":
            self.sources["stdlib"] = stdlib_files()
            # Installing Python sets new times, so these files are known by their content alone.
            self.stdlib_hash = content_hash(self.sources["stdlib"])
        else:
            self._find_sources()
        check_names([*self.sources, *self.named], "data.sources or data.validation")
        if not self.named and self.split == "documents":
            self._check_whole_files()
        self._check_separator()

    def _find_sources(self) -> None:
        """Finds the files of the training sources and of the validation sets."""
        trained_on = training_paths(self.data, "text", "files")
        validated_on = validation_paths(self.data)
        for name, (key, paths) in trained_on.items():
            self.sources[name] = find_files(key, paths)
        for name, (key, paths) in validated_on.items():
            self.named[name] = find_files(key, paths)

    @property
    def files(self) -> list[File]:
        """Lists every file of the corpus, those of validation sets last; none where the content is
        known without."""
        # Their digests need not be taken: the identity has their content already.
        if self.stdlib_hash is not None:
            return []
        # The order is part of the record that keeps their digests.
        groups = [*self.sources.values(), *self.named.values()]
        return [file for files in groups for file in files]

    @property
    def identity(self) -> dict[str, Any]:
        """Returns what the corpus is, by the names, sizes and times of its files."""
        return self.identify(lambda file: file[1:])

    def identify(self, describe: Callable[[File], Any]) -> dict[str, Any]:
        """Returns what the corpus is, each file as it is described; two of one identity have the
        same shards."""
        content: Any = self.stdlib_hash
        if content is None:
            content = [
                {name: [describe(file) for file in files] for name, files in group.items()}
                for group in (self.sources, self.named)
            ]
        # With named sets nothing is held out, and these keys decide nothing.
        split = None if self.named else [self.data.validation_fraction, self.split]
        return {
            "source": self.data.source,
            "content": content,
            "layout": list(self.layout),
            "split": split,
        }

    def hold_out_the_tail(self, reason: str) -> None:
        """Holds out the end of the text instead of random documents."""
        self.split = "tail"
        self.warnings.append(
            f"{reason}, so the tail of the text is held out, as data.validation_split=tail does"
        )

    def held_out(self, source: str) -> str:
        """Names the part that gets the held-out text of a source."""
        return f"validation/{source if len(self.sources) > 1 else 'validation'}"

    def pieces(self, folder: Path | None = None) -> list[Piece]:
        """Returns all pieces of all parts, in order. They do not depend on the folder of the
        shards; those of streamed text do."""
        pieces = []
        for name, files in self.sources.items():
            part = f"train/{name}"
            held_out = self.held_out(name)
            whole = whole_files(files)
            # Nothing is held out, or documents as they are read, or the end, cut off beforehand.
            if self.named:
                pieces += self._pack(part, whole)
            elif self.split == "documents":
                pieces += self._pack(part, whole, held_out)
            else:
                # The files of a source are one text here: the tail is that of all of them.
                before, after = cut_tail(whole, self.data.validation_fraction, self.layout)
                pieces += self._pack(part, before) + self._pack(held_out, after)
        for name, files in self.named.items():
            pieces += self._pack(f"validation/{name}", whole_files(files))
        return pieces

    def training_texts(self, source: str) -> Iterator[str]:
        """Yields the documents of a source that are trained on."""
        part = f"train/{source}"
        for piece in self.pieces():
            if piece.part == part:
                yield from (text.text for text in piece.texts() if text.part == part)

    def leaks(self, digests: dict[str, str]) -> dict[str, str]:
        """Returns a line for each validation part with a file that holds the bytes of a training
        file, given the digests of files by path."""
        if not self.named:
            return {}
        # Empty files are all alike, and nothing is learnt from them.
        trained_on = {
            digests[file.path]: file.path
            for files in self.sources.values()
            for file in files
            if file.size
        }
        found = {}
        for name, files in self.named.items():
            for file in files:
                if other := trained_on.get(digests[file.path]):
                    found[f"validation/{name}"] = (
                        f"{file.path} of data.validation.{name} holds the same bytes as {other},"
                        " which is trained on"
                    )
        return found

    def _pack(
        self, part: str, stretches: list[Stretch], held_out: str | None = None
    ) -> list[Piece]:
        """Returns the pieces of stretches of files."""
        return [
            Piece(
                part=part,
                index=index,
                spans=spans,
                layout=self.layout,
                held_out=held_out,
                fraction=self.data.validation_fraction,
                num_bytes=num_bytes,
                bad_rows=self.data.bad_rows,
            )
            for index, (spans, num_bytes) in enumerate(pack_spans(stretches, self.layout))
        ]

    def _check_separator(self) -> None:
        """Warns of a separator that the text does not seem to hold, as a misspelt one."""
        files = [file.path for files in self.sources.values() for file in files]
        texts = [path for path in files if path.endswith(".txt")][:FILES_SEARCHED]
        if self.layout.separator is None or not texts:
            return
        if any(has_separator(path, self.layout, PIECE_BYTES) for path in texts):
            return
        self.warnings.append(
            f"data.separator={self.layout.separator!r} is no line of the text, so that each file is"
            f" one document (seen: the first {PIECE_BYTES >> 20} MB of {len(texts)} files)"
        )

    def _check_whole_files(self) -> None:
        """Holds out the tail where each document is a whole file and chance holds out none of them,
        or all."""
        if self.layout.separator is not None:
            return
        fraction = self.data.validation_fraction
        for name, files in self.sources.items():
            if not all(file.path.endswith(".txt") for file in files):
                continue
            # Each file is one document, which begins at 0.
            num_held_out = sum(is_held_out(file.name, 0, fraction) for file in files)
            if num_held_out == 0:
                part = self.held_out(name)
            elif num_held_out == len(files):
                part = f"train/{name}"
            else:
                continue
            # One source without a part is enough: the tail is held out of all of them.
            self.hold_out_the_tail(empty_split(part, len(files), self.data))
            return


def whole_files(files: list[File]) -> list[Stretch]:
    """Returns the stretches that are the whole of files."""
    return [(file, 0, extent(file)) for file in files]


def check_names(names: list[str], keys: str) -> None:
    """Raises ValueError, naming the keys, for a name of a source or set that cannot be a folder
    of shards."""
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(
                f"{name!r} in {keys} names a folder; use letters, digits and _ . + - only"
            )


def empty_split(part: str, num_documents: int, data: DataConfig) -> str:
    """Returns what happened where holding out text leaves a part without any."""
    return (
        f"data.validation_fraction={data.validation_fraction} of {num_documents}"
        f" document{'' if num_documents == 1 else 's'} leaves {part} empty"
    )
