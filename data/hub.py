"""Text streamed from a Hugging Face dataset: one named on the hub, or a local folder that `datasets` can read.

A dataset is files, and a file is rows. Its stream is cut into pieces by the text alone, and the journal pieces.jsonl of a part
says at which row each piece ended: a preparation that was interrupted goes on there, without reading the files before it again.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.schema import DataConfig
from data.corpora import Text, is_held_out, list_files
from data.files import write_atomically
from data.shards import key, shard_name

PIECE_BYTES = 2**25  # of text: a terabyte makes thirty thousand shards, and a process works a few seconds on one
BATCH = 64  # rows taken from the stream at a time; a piece is a whole number of them


class Place(NamedTuple):
    """A row of a file, and how many rows the stream has had before it."""

    file: int
    row: int
    num_rows: int


class Rows(NamedTuple):
    """Texts of consecutive rows; a row without text has an empty one."""

    first: Place
    texts: list[str]
    num_bytes: int


@dataclass(frozen=True)
class HubPiece:
    """Rows whose texts become shard `index` of `part`, but for the share `fraction` of them that go to `held_out`."""

    part: str
    index: int
    rows: tuple[Rows, ...]
    held_out: str | None
    fraction: float
    num_bytes: int  # of text

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.part,) if self.held_out is None else (self.part, self.held_out)

    def texts(self) -> Iterator[Text]:
        """Every text in the piece, in order."""
        for rows in self.rows:
            for row, text in enumerate(rows.texts, rows.first.row):
                held_out = self.held_out is not None and is_held_out(str(rows.first.file), row, self.fraction)
                if text:
                    yield Text(self.held_out if held_out else self.part, text, True, True)  # type: ignore[arg-type]


class HubCorpus:
    """The text that a DataConfig of source "hub" names, for `data.cache` to make shards of, as of a TextCorpus.

    The network is asked only when text is wanted. Raises ValueError for a dataset, configuration, split or field that there is
    not, for text that cannot be reached, and for rows that hold something else.
    """

    def __init__(self, data: DataConfig) -> None:
        if not isinstance(data.path, str) or not data.path:
            raise ValueError(f"data.path={data.path} names no dataset; give its name on the hub, as in data.path=allenai/c4, or a folder")
        named = {"validation": data.validation} if isinstance(data.validation, str) else data.validation or {}
        if not isinstance(named, dict) or not all(isinstance(split, str) for split in named.values()):
            raise ValueError(f"data.validation={data.validation} names no splits; write data.validation=SPLIT or '{{NAME: SPLIT}}'")
        self.data = data
        self.sources = {"hub": data.split}
        self.named: dict[str, str] = named
        for name in self.named:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"{name!r} in data.validation names a folder; use letters, digits and _ . + - only")
        self.weights = None
        local = Path(data.path).expanduser()
        self.local = local.resolve() if local.is_dir() else None
        content: Any = [data.path, data.revision]
        if self.local:
            found = sorted(str(path) for path in self.local.rglob("*") if path.is_file())
            content = [file[1:] for file in list_files(found, str(self.local))]
        split = None if self.named else data.validation_fraction
        rest = [data.config, data.split, data.field, data.documents, self.named, split]
        self.identity = {"source": "hub", "content": content, "rest": rest}

    def held_out(self, source: str) -> str:
        """The part that gets the held-out text."""
        return "validation/validation"

    def notes(self) -> list[str]:
        """What a user should know before the text is used."""
        return []

    def pieces(self, folder: Path) -> Iterator[HubPiece]:
        """All pieces of all parts, in order; those whose shards are in the folder come without their text."""
        held_out = None if self.named else self.held_out("hub")
        yield from self._pieces(folder, "train/hub", self.data.split, held_out, self.data.documents)
        for name, split in self.named.items():
            yield from self._pieces(folder, f"validation/{name}", split, None, None)

    def training_texts(self, source: str) -> Iterator[str]:
        """The documents that are not held out."""
        for _, piece in self._packs(self.data.split, Place(0, 0, 0), self.data.documents):
            held_out = None if self.named else self.held_out(source)
            texts = HubPiece("train/hub", 0, piece, held_out, self.data.validation_fraction, 0).texts()
            yield from (text.text for text in texts if text.part == "train/hub")

    def _pieces(self, folder: Path, part: str, split: str, held_out: str | None, limit: int | None) -> Iterator[HubPiece]:
        """The pieces of a part, noted in its journal as they come: a line with the place where each ends, and null after the last."""
        (folder / part).mkdir(parents=True, exist_ok=True)
        journal = folder / part / "pieces.jsonl"
        ends, num_done = read_journal(journal), 0
        while num_done < len(ends) and ends[num_done]:
            piece = HubPiece(part, num_done, (), held_out, self.data.validation_fraction, 0)
            if not all((folder / each / shard_name(num_done)).exists() for each in piece.parts):
                break
            yield piece
            num_done += 1
        if num_done < len(ends) and ends[num_done] is None:
            return
        write_atomically(journal, "".join(json.dumps(end) + "\n" for end in ends[:num_done]))
        start = Place(*ends[num_done - 1]) if num_done else Place(0, 0, 0)
        with journal.open("a") as file:
            for index, (end, rows) in enumerate(self._packs(split, start, limit), num_done):
                file.write(json.dumps(end) + "\n")
                file.flush()
                yield HubPiece(part, index, rows, held_out, self.data.validation_fraction, sum(each.num_bytes for each in rows))
            file.write("null\n")

    def _packs(self, split: str, start: Place, limit: int | None) -> Iterator[tuple[Place, tuple[Rows, ...]]]:
        """Rows put together until they hold PIECE_BYTES, and the place where they end; `limit` rows of the stream at most."""
        if start.num_rows == limit:  # all were there already, but for the journal's end
            return
        pack: list[Rows] = []
        end = start
        for rows in self._rows(split, start):
            if limit is not None and rows.first.num_rows + len(rows.texts) > limit:
                rows = rows._replace(texts=rows.texts[: limit - rows.first.num_rows])
            pack.append(rows)
            end = Place(rows.first.file, rows.first.row + len(rows.texts), rows.first.num_rows + len(rows.texts))
            if end.num_rows == limit:
                break
            if sum(each.num_bytes for each in pack) >= PIECE_BYTES:
                yield end, tuple(pack)
                pack = []
        if pack:
            yield end, tuple(pack)

    def _rows(self, split: str, start: Place) -> Iterator[Rows]:
        """The rows of the splits from a place on, in the order of their files."""
        import pyarrow.compute as pc
        import pyarrow.types as types

        num_rows = start.num_rows
        for file, dataset in self._files(split, start.file):
            row = 0
            tables = iter(dataset.iter(batch_size=BATCH))
            while True:
                with self._reading(f"{split}, row {row} of file {file}"):
                    table = next(tables, None)
                if table is None:
                    break
                if file > start.file or row >= start.row:
                    column = table.column(self.data.field)
                    column = column.cast("string") if types.is_null(column.type) else column
                    if not (types.is_string(column.type) or types.is_large_string(column.type)):
                        raise ValueError(f"data.field={self.data.field} of {self.data.path} holds {column.type}; name a field that holds text")
                    texts = [text or "" for text in column.to_pylist()]  # null too: nobody can mend a row on the hub
                    yield Rows(Place(file, row, num_rows), texts, pc.sum(pc.binary_length(column)).as_py() or 0)
                    num_rows += len(texts)
                row += table.num_rows

    def _files(self, split: str, first: int) -> Iterator[tuple[int, Any]]:
        """(index, its rows as a dataset of arrow tables) of the files of the splits, from the first on."""
        index = 0
        for name in split.split("+"):
            with self._reading(name):
                dataset = self._load(name)
                columns = dataset.column_names
            if columns is not None and self.data.field not in columns:
                raise ValueError(f"data.field={self.data.field}: {self.data.path} has no such field; choose one of {', '.join(columns)}")
            dataset = dataset.select_columns([self.data.field]).with_format("arrow")
            num_files = dataset.num_shards
            for file in range(num_files):
                if index >= first:
                    yield index, dataset.shard(num_files, file)
                index += 1

    def _load(self, split: str) -> Any:
        """A split as a stream."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        return datasets.load_dataset(str(self.local or self.data.path), self.data.config, split=split, streaming=True, revision=self._revision())

    def _revision(self) -> str | None:
        """The commit of a dataset on the hub, asked for once and then kept in the cache, so that all of a corpus is of one commit."""
        if self.local:
            return None
        record = Path(self.data.cache).expanduser() / f"hub-{key(self.identity)}.revision"
        if not record.exists():
            from huggingface_hub import HfApi

            write_atomically(record, str(HfApi().dataset_info(self.data.path, revision=self.data.revision, timeout=20).sha))
        return record.read_text()

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turns what `datasets` may raise, which is anything, into a line with a remedy."""
        try:
            yield
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")[:300].rstrip(". ")
            check = "the folder" if self.local else "the network, or use a data.cache that was prepared where there is one"
            raise ValueError(f"data.path={self.data.path} ({what}) cannot be read: {type(error).__name__}: {reason}; check data.config, "
                             f"data.split and {check}; what is prepared is kept") from error  # fmt: skip


def read_journal(path: Path) -> list[Any]:
    """The lines of a journal up to one that was cut off."""
    ends = []
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            ends.append(json.loads(line))
        except ValueError:
            break
    return ends
