"""Rows of a Hugging Face dataset, streamed file by file: one named on the hub, or a local folder
that `datasets` can read."""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from conf.key import expand
from conf.text import DataConfig
from data.documents import BYTE_ORDER_MARK, row_text
from data.files import read_bytes, write_atomically
from data.parquet import column_texts
from data.rows import BadRow, located

# Rows taken from the stream at a time; a piece is a whole number of them.
BATCH = 64
# Bytes of a file of JSON lines that are read at a time.
BLOCK_BYTES = 2**23
# A file called so is JSON lines; one called .json may hold a list, or a single object.
JSON_LINES = (".jsonl", ".ndjson")


class Place(NamedTuple):
    """A row of a file, and how many rows the stream has had before it."""

    file: int
    row: int
    num_rows: int

    def after(self, num_rows: int) -> "Place":
        """Returns the place a number of rows further on in the same file."""
        return Place(self.file, self.row + num_rows, self.num_rows + num_rows)


class Rows(NamedTuple):
    """Texts of consecutive rows, and the file that they are in, as a person calls it. A row that
    cannot be read says where it is."""

    first: Place
    texts: list[str | BadRow]
    num_bytes: int
    file: str


class Line(NamedTuple):
    """A line of a file that is not blank, and its number, counted from 1."""

    number: int
    content: bytes


class HubStream:
    """The rows of a dataset, in the order of its files. The network is asked only when rows are
    wanted.

    Args:
        data: names the dataset and the field of the text
        local: the folder of the dataset; None for one on the hub
        record: the file of the cache that keeps the commit of a dataset on the hub
    """

    def __init__(self, data: DataConfig, local: Path | None, record: str) -> None:
        self.data = data
        self.local = local
        self.record = record

    def rows(self, split: str, start: Place) -> Iterator[Rows]:
        """Yields the rows of the splits "a+b" from a place on, about BATCH at a time. Raises
        ValueError for what cannot be reached or read."""
        num_rows = start.num_rows
        for file, name, batches in self.files(split, start.file):
            row = 0
            while True:
                place = f"{split}, row {row} or soon after of file {file}: {name}"
                with self._reading(place):
                    batch = next(batches, None)
                if batch is None:
                    break
                # A file cannot be entered in its middle, so rows before the place are read past.
                if file > start.file or row >= start.row:
                    rows = self._texts(batch, Place(file, row, num_rows), name)
                    yield rows
                    num_rows += len(rows.texts)
                row += len(batch)

    def _texts(self, batch: Any, first: Place, name: str) -> Rows:
        """Returns the texts of a table of Arrow, or of a list of lines of JSON."""
        texts: list[str | BadRow] = []
        if isinstance(batch, list):
            for line in batch:
                text = row_text(line.content, self.data.field)
                texts.append(located(text, f"{name}: line {line.number}"))
        else:
            for chunk in batch.column(self.data.field).chunks:
                for text in column_texts(chunk, self.data.field, name):
                    texts.append(located(text, f"{name}: row {first.row + len(texts)}"))
        num_bytes = 0
        for index, text in enumerate(texts):
            # Bad rows have no text.
            if isinstance(text, str):
                plain = text.removeprefix(BYTE_ORDER_MARK)
                texts[index] = plain
                num_bytes += len(plain.encode())
        return Rows(first, texts, num_bytes, name)

    def files(self, split: str, first: int) -> Iterator[tuple[int, str, Iterator[Any]]]:
        """Yields (index, name, its rows as batches that have a length: tables of Arrow or lists of
        `Line`) of the files of the splits, from the first on."""
        # Files are counted over all splits, so that a number names one of them.
        index = 0
        for name in split.split("+"):
            with self._reading(name):
                found = self._load(name)
                num_files = found.num_files
            names = found.paths
            if len(names) != num_files:
                # Without a path for each file, a file is known by its number.
                names = [
                    f"data.path={self.data.path}, {name}, file {file}" for file in range(num_files)
                ]
            for file, path in enumerate(names):
                if index >= first:
                    yield index, path, found.batches(file)
                index += 1

    def _load(self, split: str) -> "Split":
        """Opens a split. Raises ValueError where the dataset has none of this name."""
        import datasets

        # Preparation has a bar of its own, and errors are said in one line.
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        builder = datasets.load_dataset_builder(
            str(self.local or self.data.path), self.data.config, revision=self._revision()
        )
        files = builder.config.data_files or {}
        if files and split not in files:
            raise ValueError(f"there is no split {split} but {', '.join(map(str, files))}")
        return Split(builder, split, [str(path) for path in files.get(split, [])], self.data)

    def _revision(self) -> str | None:
        """Returns the commit of a dataset on the hub, asked for once and then kept in the cache, so
        that all of a corpus is of one commit."""
        if self.local:
            return None
        record = Path(expand("data.cache", self.data.cache)) / self.record
        # A record that holds no commit, as one that was cut off, is written again.
        known = ""
        if record.exists():
            known = read_bytes(record).decode(errors="replace")
        if not re.fullmatch("[0-9a-f]{40,64}", known):
            from huggingface_hub import HfApi

            info = HfApi().dataset_info(self.data.path, revision=self.data.revision, timeout=20)
            known = str(info.sha)
            write_atomically(record, known)
        return known

    @contextmanager
    def _reading(self, place: str) -> Iterator[None]:
        """Turns what `datasets` may raise, which is anything, into a line with a remedy."""
        try:
            yield
        except WrongField:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")[:300].rstrip(". ")
            raise ValueError(
                f"data.path={self.data.path} ({place}) cannot be read: {type(error).__name__}:"
                f" {reason}; {self._remedy(reason)}; what is prepared is kept"
            ) from error

    def _remedy(self, reason: str) -> str:
        """Returns what a user can do about what `datasets` said."""
        if "scripts are no longer supported" in reason:
            if self.local:
                return (
                    "save its rows as .parquet or .jsonl files, without the script, and name the"
                    " folder of those"
                )
            return (
                "set data.revision=refs/convert/parquet, where the hub keeps most such datasets as"
                " parquet"
            )
        if self.local:
            return (
                "check data.config, data.split and the folder (data=text reads .jsonl and .parquet"
                " too)"
            )
        return (
            "check data.config, data.split and the network, or use a data.cache that was prepared"
            " where there is one"
        )


class WrongField(ValueError):
    """The dataset has no such field, or it holds no text."""


class Split:
    """A split of a dataset: its files, and their rows.

    JSON lines are read here, as those of data=text are: `datasets` gives up on a whole file for a
    row that is no JSON, makes JSON of every text for a row whose text is a number, and dies of a
    row that is nested deeply. All other formats are read by the library.

    Args:
        builder: the dataset, as `datasets` knows it
        name: the name of the split
        paths: its files; none where `datasets` does not say
        data: names the field of the text
    """

    def __init__(self, builder: Any, name: str, paths: list[str], data: DataConfig) -> None:
        self.builder = builder
        self.name = name
        self.paths = paths
        self.data = data
        self.is_json = type(builder.config).__name__ == "JsonConfig" and not builder.config.field
        self._stream: Any = None

    @property
    def num_files(self) -> int:
        """Returns the number of files."""
        if self.is_json:
            return len(self.paths)
        num_files: int = self.stream.num_shards
        return num_files

    @property
    def stream(self) -> Any:
        """Returns the rows as `datasets` reads them, in tables of Arrow."""
        if self._stream is None:
            stream = self.builder.as_streaming_dataset(self.name)
            columns = stream.column_names
            # Of some formats the columns are known only when rows are read.
            if columns is not None and self.data.field not in columns:
                raise WrongField(
                    f"data.field={self.data.field}: {self.data.path} has no such field; choose one"
                    f" of {', '.join(columns)}"
                )
            # Tables of Arrow with one column cost least: no other field is decoded.
            self._stream = stream.select_columns([self.data.field]).with_format("arrow")
        return self._stream

    def batches(self, file: int) -> Iterator[Any]:
        """Yields the rows of a file, BATCH at a time: tables of Arrow, or lists of `Line`."""
        if self.is_json and self._holds_lines(self.paths[file]):
            lines = self._lines(self.paths[file])
            while batch := [*itertools.islice(lines, BATCH)]:
                yield batch
        else:
            yield from self.stream.shard(self.num_files, file).iter(batch_size=BATCH)

    def _holds_lines(self, path: str) -> bool:
        """Returns whether a file of JSON holds a row in each line."""
        if any(suffix in path.rpartition("/")[2] for suffix in JSON_LINES):
            return True
        first = next(self._lines(path), Line(1, b"")).content.removeprefix(codecs.BOM_UTF8).strip()
        return first != b"{" and not first.startswith(b"[")

    def _lines(self, path: str) -> Iterator[Line]:
        """Yields the lines of a file that are not blank; of an archive those of its files."""
        import datasets
        from datasets.utils.file_utils import xopen

        # The library unpacks what is compressed, by name or first bytes, and tries again where the
        # network breaks off.
        manager = datasets.StreamingDownloadManager()
        for file in manager.iter_files(manager.download_and_extract(path)):
            with xopen(file, "rb") as opened:
                blocks = iter(lambda: opened.read(BLOCK_BYTES), b"")
                for number, content in enumerate(split_lines(blocks), 1):
                    if content.strip():
                        yield Line(number, content)


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file that is read in blocks, without their ends."""
    rest = b""
    for block in blocks:
        # The last line may go on in the next block.
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest
