"""Text streamed from a Hugging Face dataset: one named on the hub, or a local folder that
`datasets` can read.

A dataset is files, and a file is rows. Its stream is cut into pieces by the text alone, and the
journal pieces.jsonl of a part says at which row each piece ended: a preparation that was
interrupted goes on there, without reading the files before it again."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.key import expand
from conf.text import DataConfig
from data.corpora import (
    BadRow,
    File,
    NoText,
    Text,
    column_texts,
    is_held_out,
    json_object,
    list_files,
    skip,
)
from data.files import parse_json, read_bytes, write_atomically
from data.shards import key, shard_name

# of text: a terabyte makes thirty thousand shards, and a process works a few seconds on one
PIECE_BYTES = 2**25
BATCH = 64  # rows taken from the stream at a time; a piece is a whole number of them


class Place(NamedTuple):
    """A row of a file, and how many rows the stream has had before it."""

    file: int
    row: int
    num_rows: int


class Rows(NamedTuple):
    """Texts of consecutive rows, and the file that they are in, as a person calls it."""

    first: Place
    texts: list[str | BadRow]
    num_bytes: int
    file: str


@dataclass(frozen=True)
class HubPiece:
    """Rows whose texts become shard `index` of `part`, but for the share `fraction` of them that go
    to `held_out`."""

    part: str
    index: int
    rows: tuple[Rows, ...]
    held_out: str | None
    fraction: float
    num_bytes: int  # of text
    bad_rows: str  # as in DataConfig

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.part,) if self.held_out is None else (self.part, self.held_out)

    def texts(self, skipped: list[str] | None = None) -> Iterator[Text]:
        """Every text in the piece, in order. Raises ValueError that names the file and the row for
        what cannot be read; with bad_rows=skip, rows that cannot are appended to `skipped`."""
        for rows in self.rows:
            for row, text in enumerate(rows.texts, rows.first.row):
                if isinstance(text, BadRow):
                    skip(
                        BadRow(f"{rows.file}: row {row} {text.problem}", text.remedy),
                        self.bad_rows,
                        skipped,
                    )
                elif text:
                    held_out = self.held_out is not None and is_held_out(
                        str(rows.first.file), row, self.fraction
                    )
                    yield Text(
                        self.held_out if held_out and self.held_out else self.part,
                        text,
                        True,
                        True,
                        rows.file,
                        row,
                    )


class HubCorpus:
    """The text that a DataConfig of source "hub" names, for `data.prepared` to make shards of, as
    of a TextCorpus.

    The network is asked only when text is wanted. Raises ValueError for a dataset, configuration,
    split or field that there is not, for text that cannot be reached, and for rows that hold
    something else."""

    def __init__(self, data: DataConfig) -> None:
        if not isinstance(data.path, str) or not data.path:
            raise ValueError(
                f"data.path={data.path} names no dataset; give its name on the hub, as in"
                " data.path=allenai/c4, or a folder"
            )
        named = (
            {"validation": data.validation}
            if isinstance(data.validation, str)
            else data.validation or {}
        )
        if not isinstance(named, dict) or not all(
            isinstance(split, str) for split in named.values()
        ):
            raise ValueError(
                f"data.validation={data.validation} names no splits; write data.validation=SPLIT or"
                " '{NAME: SPLIT}'"
            )
        self.data = data
        self.sources = {"hub": data.split}
        self.named: dict[str, str] = named
        for name in self.named:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"{name!r} in data.validation names a folder; use letters, digits and _ . + -"
                    " only"
                )
        self.weights = None
        local = Path(expand("data.path", data.path))
        self.local = local.resolve() if local.is_dir() else None
        if self.local is None and (
            data.path.startswith(("/", "~", ".")) or data.path.count("/") > 1
        ):
            raise NoText(
                f"data.path={data.path} is no folder; give the folder of a dataset, or its name on"
                " the hub, as in data.path=allenai/c4"
            )
        if self.local and re.search(r"[\[\]*?]", str(self.local)):
            raise ValueError(
                f"data.path={data.path}: `datasets` takes [ ] * ? in a folder's name for a pattern;"
                " give a link to it without them, or read its .jsonl and .parquet files by"
                " data=text"
            )
        self.warnings: list[str] = []

    @property
    def identity(self) -> dict[str, Any]:
        """What the corpus is: the name of a dataset on the hub, or the names, sizes and times of
        all files of a folder."""
        found = list_below(self.local, lambda name: True) if self.local else []
        return self._identify([file[1:] for file in found])

    @property
    def files(self) -> list[File]:
        """The files of a folder that can hold rows: neither hidden ones nor what is about the
        dataset."""
        return list_below(self.local, is_data) if self.local else []

    def identify(self, describe: Callable[[File], Any]) -> dict[str, Any]:
        """Returns what the corpus is, each file as it is described, and what the head of README.md
        says of them."""
        if self.local is None:
            return self.identity
        return self._identify(
            [[describe(file) for file in self.files], card_hash(self.local / "README.md")]
        )

    def _identify(self, content: Any) -> dict[str, Any]:
        data = self.data
        split = None if self.named else data.validation_fraction
        rest = [data.config, data.split, data.field, data.documents, self.named, split]
        return {
            "source": "hub",
            "content": content if self.local else [data.path, data.revision],
            "rest": rest,
        }

    def leaks(self, digests: dict[str, str]) -> dict[str, str]:
        """Returns a line for each validation part of a split that is trained on."""
        found, trained_on = {}, self.data.split.split("+")
        for name, split in self.named.items():
            if set(split.split("+")) & set(trained_on):
                found[f"validation/{name}"] = (
                    f"data.validation.{name}={split} is trained on: data.split={self.data.split}"
                )
        return found

    def held_out(self, source: str) -> str:
        """The part that gets the held-out text."""
        return "validation/validation"

    def pieces(self, folder: Path) -> Iterator[HubPiece]:
        """All pieces of all parts, in order; those whose shards are in the folder come without
        their text."""
        held_out = None if self.named else self.held_out("hub")
        yield from self._pieces(folder, "train/hub", self.data.split, held_out, self.data.documents)
        for name, split in self.named.items():
            yield from self._pieces(folder, f"validation/{name}", split, None, None)

    def training_texts(self, source: str) -> Iterator[str]:
        """The documents that are not held out."""
        for _, piece in self._packs(self.data.split, Place(0, 0, 0), self.data.documents):
            held_out = None if self.named else self.held_out(source)
            texts = HubPiece(
                "train/hub",
                0,
                piece,
                held_out,
                self.data.validation_fraction,
                0,
                self.data.bad_rows,
            ).texts()
            yield from (text.text for text in texts if text.part == "train/hub")

    def _pieces(
        self, folder: Path, part: str, split: str, held_out: str | None, limit: int | None
    ) -> Iterator[HubPiece]:
        """The pieces of a part, noted in its journal as they come: a line with the place where each
        ends, and null after the last."""
        (folder / part).mkdir(parents=True, exist_ok=True)
        journal = folder / part / "pieces.jsonl"
        ends, num_done = read_journal(journal), 0
        while num_done < len(ends) and ends[num_done]:
            piece = HubPiece(
                part, num_done, (), held_out, self.data.validation_fraction, 0, self.data.bad_rows
            )
            if not all((folder / each / shard_name(num_done)).exists() for each in piece.parts):
                break
            yield piece
            num_done += 1
        if num_done < len(ends) and ends[num_done] is None:
            return
        write_atomically(journal, "".join(json.dumps(end) + "\n" for end in ends[:num_done]))
        last = ends[num_done - 1] if num_done else None
        start = Place(*last) if last else Place(0, 0, 0)
        with journal.open("a") as file:
            for index, (end, rows) in enumerate(self._packs(split, start, limit), num_done):
                file.write(json.dumps(end) + "\n")
                file.flush()
                num_bytes = sum(each.num_bytes for each in rows)
                yield HubPiece(
                    part,
                    index,
                    rows,
                    held_out,
                    self.data.validation_fraction,
                    num_bytes,
                    self.data.bad_rows,
                )
            file.write("null\n")

    def _packs(
        self, split: str, start: Place, limit: int | None
    ) -> Iterator[tuple[Place, tuple[Rows, ...]]]:
        """Rows put together until they hold PIECE_BYTES, and the place where they end; `limit` rows
        of the stream at most."""
        if start.num_rows == limit:  # all were there already, but for the journal's end
            return
        pack: list[Rows] = []
        end = start
        for rows in self._rows(split, start):
            if limit is not None and rows.first.num_rows + len(rows.texts) > limit:
                rows = rows._replace(texts=rows.texts[: limit - rows.first.num_rows])
            pack.append(rows)
            end = Place(
                rows.first.file,
                rows.first.row + len(rows.texts),
                rows.first.num_rows + len(rows.texts),
            )
            if end.num_rows == limit:
                break
            if sum(each.num_bytes for each in pack) >= PIECE_BYTES:
                yield end, tuple(pack)
                pack = []
        if pack:
            yield end, tuple(pack)

    def _rows(self, split: str, start: Place) -> Iterator[Rows]:
        """The rows of the splits from a place on, in the order of their files."""
        num_rows = start.num_rows
        for file, name, dataset in self._files(split, start.file):
            row = 0
            tables = iter(dataset.iter(batch_size=BATCH))
            while True:
                with self._reading(
                    f"{split}, row {row} or soon after of file {file}: {name}", name
                ):
                    table = next(tables, None)
                if table is None:
                    break
                if file > start.file or row >= start.row:
                    texts = [
                        text
                        for chunk in table.column(self.data.field).chunks
                        for text in column_texts(chunk, self.data.field, name)
                    ]
                    num_bytes = sum(len(text.encode()) for text in texts if isinstance(text, str))
                    yield Rows(Place(file, row, num_rows), texts, num_bytes, name)
                    num_rows += len(texts)
                row += table.num_rows

    def _files(self, split: str, first: int) -> Iterator[tuple[int, str, Any]]:
        """(index, name, its rows as a dataset of arrow tables) of the files of the splits, from the
        first on."""
        index = 0
        for name in split.split("+"):
            with self._reading(name):
                dataset, paths = self._load(name)
                columns = dataset.column_names
            if columns is not None and self.data.field not in columns:
                raise ValueError(
                    f"data.field={self.data.field}: {self.data.path} has no such field; choose one"
                    f" of {', '.join(columns)}"
                )
            dataset = dataset.select_columns([self.data.field]).with_format("arrow")
            num_files = dataset.num_shards
            for file in range(num_files):
                if index >= first:
                    called = (
                        paths[file]
                        if len(paths) == num_files
                        else f"data.path={self.data.path}, {name}, file {file}"
                    )
                    yield index, called, dataset.shard(num_files, file)
                index += 1

    def _load(self, split: str) -> tuple[Any, list[str]]:
        """A split as a stream, and the paths of its files."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        builder = datasets.load_dataset_builder(
            str(self.local or self.data.path), self.data.config, revision=self._revision()
        )
        return builder.as_streaming_dataset(split), [
            str(path) for path in (builder.config.data_files or {}).get(split, [])
        ]

    def _revision(self) -> str | None:
        """The commit of a dataset on the hub, asked for once and then kept in the cache, so that
        all of a corpus is of one commit."""
        if self.local:
            return None
        record = Path(expand("data.cache", self.data.cache)) / f"hub-{key(self.identity)}.revision"
        known = read_bytes(record).decode(errors="replace") if record.exists() else ""
        if not re.fullmatch("[0-9a-f]{40,64}", known):
            from huggingface_hub import HfApi

            known = str(
                HfApi().dataset_info(self.data.path, revision=self.data.revision, timeout=20).sha
            )
            write_atomically(record, known)
        return known

    @contextmanager
    def _reading(self, what: str, path: str = "") -> Iterator[None]:
        """Turns what `datasets` may raise, which is anything, into a line with a remedy; a local
        .jsonl file is searched for its first row that is none."""
        try:
            yield
        except Exception as error:
            if row := bad_row(path):
                raise ValueError(f"{row}; mend or remove it; what is prepared is kept") from error
            reason = next(iter(str(error).splitlines()), "")[:300].rstrip(". ")
            raise ValueError(
                f"data.path={self.data.path} ({what}) cannot be read: {type(error).__name__}:"
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


def bad_row(path: str) -> str:
    """Returns the first line of a local .jsonl file that is no JSON object, and what is wrong with
    it; nothing where there is none."""
    if path.endswith(".jsonl") and os.path.isfile(path):
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and isinstance(row := json_object(line), BadRow):
                    return f"{path}: line {number} {row.problem}"
    return ""


def read_journal(path: Path) -> list[tuple[int, int, int] | None]:
    """The lines of a journal up to one that was cut off."""
    ends: list[tuple[int, int, int] | None] = []
    for line in read_bytes(path).split(b"\n") if path.exists() else []:
        try:
            ends.append(parse_json(line, tuple[int, int, int] | None, path))  # type: ignore[arg-type]
        except ValueError:
            break
    return ends


ABOUT = (".md", ".py", ".pdf", ".png", ".jpg", ".svg", ".lock", ".cff", ".bib")
NOT_DATA = (
    "license",
    "license.txt",
    "notice",
    "notice.txt",
    "dataset_infos.json",
    "dataset_info.json",
    "thumbs.db",
    "desktop.ini",
)


def is_data(name: str) -> bool:
    """Returns whether a file below a dataset's folder can hold rows, by its path there. Hidden ones
    cannot, for `datasets`."""
    last = name.rpartition("/")[2].lower()
    return (
        not any(part.startswith((".", "__")) for part in name.split("/"))
        and last not in NOT_DATA
        and not last.endswith(ABOUT)
    )


def list_below(folder: Path, wanted: Callable[[str], bool]) -> list[File]:
    """Returns the files below a folder whose path there is wanted, in order."""
    found = (str(path) for path in folder.rglob("*") if path.is_file())
    return list_files(
        sorted(
            path for path in found if wanted(os.path.relpath(path, folder).replace(os.sep, "/"))
        ),
        str(folder),
    )


def card_hash(card: Path) -> str:
    """Returns a hash of the head of a dataset's README.md, which may say what files its
    configurations have."""
    head = read_bytes(card).split(b"---\n")[1:2] if card.is_file() else []
    return hashlib.sha256(b"".join(head)).hexdigest()
