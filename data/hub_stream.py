"""Rows of a Hugging Face dataset, streamed file by file: one named on the hub, or a local folder
that `datasets` can read."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from conf.key import expand
from conf.text import DataConfig
from data.documents import json_object
from data.files import read_bytes, write_atomically
from data.parquet import column_texts
from data.rows import BadRow

# Rows taken from the stream at a time; a piece is a whole number of them.
BATCH = 64


class Place(NamedTuple):
    """A row of a file, and how many rows the stream has had before it."""

    file: int
    row: int
    num_rows: int

    def after(self, num_rows: int) -> "Place":
        """Returns the place a number of rows further on in the same file."""
        return Place(self.file, self.row + num_rows, self.num_rows + num_rows)


class Rows(NamedTuple):
    """Texts of consecutive rows, and the file that they are in, as a person calls it."""

    first: Place
    texts: list[str | BadRow]
    num_bytes: int
    file: str


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
        for file, name, dataset in self.files(split, start.file):
            row = 0
            tables = iter(dataset.iter(batch_size=BATCH))
            while True:
                place = f"{split}, row {row} or soon after of file {file}: {name}"
                with self._reading(place, name):
                    table = next(tables, None)
                if table is None:
                    break
                # A file cannot be entered in its middle, so rows before the place are read past.
                if file > start.file or row >= start.row:
                    rows = self._texts(table, Place(file, row, num_rows), name)
                    yield rows
                    num_rows += len(rows.texts)
                row += table.num_rows

    def _texts(self, table: Any, first: Place, name: str) -> Rows:
        """Returns the texts of a table of Arrow."""
        texts: list[str | BadRow] = []
        for chunk in table.column(self.data.field).chunks:
            texts += column_texts(chunk, self.data.field, name)
        # Bad rows have no text.
        num_bytes = sum(len(text.encode()) for text in texts if isinstance(text, str))
        return Rows(first, texts, num_bytes, name)

    def files(self, split: str, first: int) -> Iterator[tuple[int, str, Any]]:
        """Yields (index, name, its rows as a dataset of arrow tables) of the files of the splits,
        from the first on."""
        # Files are counted over all splits, so that a number names one of them.
        index = 0
        for name in split.split("+"):
            with self._reading(name):
                dataset, paths = self._load(name)
                columns = dataset.column_names
            # Of some formats the columns are known only when rows are read.
            if columns is not None and self.data.field not in columns:
                raise ValueError(
                    f"data.field={self.data.field}: {self.data.path} has no such field; choose one"
                    f" of {', '.join(columns)}"
                )
            # Tables of Arrow with one column cost least: no other field is decoded.
            dataset = dataset.select_columns([self.data.field]).with_format("arrow")
            num_files = dataset.num_shards
            if len(paths) != num_files:
                # Without a path for each file, a file is known by its number.
                paths = [
                    f"data.path={self.data.path}, {name}, file {file}" for file in range(num_files)
                ]
            for file, path in enumerate(paths):
                if index >= first:
                    yield index, path, dataset.shard(num_files, file)
                index += 1

    def _load(self, split: str) -> tuple[Any, list[str]]:
        """Returns a split as a stream, and the paths of its files."""
        import datasets

        # Preparation has a bar of its own, and errors are said in one line.
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        builder = datasets.load_dataset_builder(
            str(self.local or self.data.path), self.data.config, revision=self._revision()
        )
        files = (builder.config.data_files or {}).get(split, [])
        return builder.as_streaming_dataset(split), [str(path) for path in files]

    def _revision(self) -> str | None:
        """Returns the commit of a dataset on the hub, asked for once and then kept in the cache, so
        that all of a corpus is of one commit."""
        if self.local:
            return None
        record = Path(expand("data.cache", self.data.cache)) / self.record
        # A record that holds no commit, as one that was cut off, is written again.
        known = read_bytes(record).decode(errors="replace") if record.exists() else ""
        if not re.fullmatch("[0-9a-f]{40,64}", known):
            from huggingface_hub import HfApi

            info = HfApi().dataset_info(self.data.path, revision=self.data.revision, timeout=20)
            known = str(info.sha)
            write_atomically(record, known)
        return known

    @contextmanager
    def _reading(self, place: str, path: str = "") -> Iterator[None]:
        """Turns what `datasets` may raise, which is anything, into a line with a remedy; a local
        .jsonl file is searched for its first row that is none."""
        try:
            yield
        except Exception as error:
            if row := first_bad_row(path):
                raise ValueError(f"{row}; mend or remove it; what is prepared is kept") from error
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
                " too, and can skip bad rows)"
            )
        return (
            "check data.config, data.split and the network, or use a data.cache that was prepared"
            " where there is one"
        )


def first_bad_row(path: str) -> str:
    """Returns the first line of a local .jsonl file that is no JSON object, and what is wrong with
    it; nothing where there is none."""
    if path.endswith(".jsonl") and os.path.isfile(path):
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and isinstance(row := json_object(line), BadRow):
                    return f"{path}: line {number} {row.problem}"
    return ""
