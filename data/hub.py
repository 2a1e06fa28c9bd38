"""A corpus of a Hugging Face dataset: one named on the hub, or a local folder that `datasets` can
read.

A dataset is files, and a file is rows. Its stream is cut into pieces by the text alone, and the
journal pieces.jsonl of a part says at which row each piece ended: a preparation that was
interrupted goes on there, without reading the files before it again."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.key import expand
from conf.text import DataConfig
from data.corpora import check_names
from data.files import parse_json, read_bytes, write_atomically
from data.hub_stream import HubStream, Place, Rows
from data.rows import BadRow, PieceOfText, Text, skip_or_refuse
from data.shards import key, shard_name
from data.source_files import File, NoText, list_files

# Of text: a terabyte makes thirty thousand shards, and a process works a few seconds on one.
PIECE_BYTES = 2**25
# Files of a dataset's folder that are about the dataset, and hold no rows.
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


class HubText(Text):
    """A row of a dataset, whose file may lie anywhere, in any format."""

    @property
    def place(self) -> str:
        """Names the file and the row of the text."""
        return f"{self.file}: row {self.position}"


@dataclass(frozen=True, kw_only=True)
class HubPiece(PieceOfText):
    """Rows of a dataset whose texts become a shard."""

    rows: tuple[Rows, ...]

    def texts(self, skipped: list[str] | None = None) -> Iterator[Text]:
        """Yields every text in the piece, in order.

        Args:
            skipped: with bad_rows=skip, the rows that cannot be read are appended to it

        Raises:
            ValueError: a row cannot be read; the error names the file and the row
        """
        for rows in self.rows:
            for row, text in enumerate(rows.texts, rows.first.row):
                if isinstance(text, BadRow):
                    skip_or_refuse(text, self.bad_rows, skipped)
                elif text:
                    # The number of the file decides, not its path, so that a copy elsewhere holds
                    # out the same rows.
                    part = self.part_of(str(rows.first.file), row)
                    yield HubText(part, text, True, True, rows.file, row)


class HubCorpus:
    """The text that a DataConfig of source "hub" names, for `data.prepared` to make shards of, as
    of a TextCorpus.

    The network is asked only when text is wanted.

    Raises:
        ValueError: there is no such dataset, configuration, split or field, its text cannot be
            reached, or its rows hold something else
        NoText: data.path names a folder that there is not
    """

    def __init__(self, data: DataConfig) -> None:
        if not isinstance(data.path, str) or not data.path:
            raise ValueError(
                f"data.path={data.path} names no dataset; give its name on the hub, as in"
                " data.path=allenai/c4, or a folder"
            )
        self.data = data
        # Several splits "a+b" are one source: they are streamed one after the other.
        self.sources = {"hub": data.split}
        self.named = validation_splits(data)
        check_names([*self.named], "data.validation")
        self.local = dataset_folder(data.path)
        self.warnings: list[str] = []

    @property
    def identity(self) -> dict[str, Any]:
        """Returns what the corpus is: the name of a dataset on the hub, or the names, sizes and
        times of all files of a folder."""
        if self.local is None:
            return self._identify([self.data.path, self.data.revision])
        found = list_below(self.local, lambda name: True)
        return self._identify([file[1:] for file in found])

    @property
    def files(self) -> list[File]:
        """Lists the files of a folder that can hold rows: neither hidden ones nor those about the
        dataset."""
        if self.local is None:
            return []
        return list_below(self.local, is_data)

    def identify(self, describe: Callable[[File], Any]) -> dict[str, Any]:
        """Returns what the corpus is, each file as it is described, and what the head of README.md
        says of them."""
        # The name and revision of a dataset on the hub stand for its content.
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
            "content": content,
            "rest": rest,
        }

    def leaks(self, digests: dict[str, str]) -> dict[str, str]:
        """Returns a line for each validation part of a split that is trained on."""
        found = {}
        trained_on = set(self.data.split.split("+"))
        for name, split in self.named.items():
            if trained_on & set(split.split("+")):
                found[f"validation/{name}"] = (
                    f"data.validation.{name}={split} is trained on: data.split={self.data.split}"
                )
        return found

    def held_out(self, source: str) -> str:
        """Names the part that gets the held-out text."""
        return "validation/validation"

    def pieces(self, folder: Path) -> Iterator[HubPiece]:
        """Yields all pieces of all parts, in order; those whose shards are in the folder come
        without their text."""
        # With named sets nothing is held out.
        held_out = None if self.named else self.held_out("hub")
        yield from self._pieces(folder, "train/hub", self.data.split, held_out, self.data.documents)
        for name, split in self.named.items():
            yield from self._pieces(folder, f"validation/{name}", split, None, None)

    def training_texts(self, source: str) -> Iterator[str]:
        """Yields the documents that are not held out."""
        held_out = None if self.named else self.held_out(source)
        for _, rows in self._packs(self.data.split, Place(0, 0, 0), self.data.documents):
            texts = self._piece("train/hub", 0, rows, held_out).texts()
            yield from (text.text for text in texts if text.part == "train/hub")

    def _piece(
        self, part: str, index: int, rows: tuple[Rows, ...], held_out: str | None
    ) -> HubPiece:
        return HubPiece(
            part=part,
            index=index,
            rows=rows,
            held_out=held_out,
            fraction=self.data.validation_fraction,
            num_bytes=sum(each.num_bytes for each in rows),
            bad_rows=self.data.bad_rows,
        )

    def _pieces(
        self, folder: Path, part: str, split: str, held_out: str | None, limit: int | None
    ) -> Iterator[HubPiece]:
        """Yields the pieces of a part, noted in its journal as they come: a line with the place
        where each ends, and null after the last.

        Args:
            folder: the folder of the corpus
            part: the part
            split: the splits "a+b" that its text is of
            held_out: the part that gets the held-out share, if there is one
            limit: rows of the stream at most
        """
        (folder / part).mkdir(parents=True, exist_ok=True)
        journal = folder / part / "pieces.jsonl"
        ends = read_journal(journal)
        # Pieces of a start before come first, without text, while all of their shards are there.
        num_done = 0
        while num_done < len(ends) and ends[num_done]:
            piece = self._piece(part, num_done, (), held_out)
            if not all((folder / each / shard_name(num_done)).exists() for each in piece.parts):
                break
            yield piece
            num_done += 1
        if num_done < len(ends) and ends[num_done] is None:
            return
        # Lines of pieces whose shards are not all there are taken back, and the pieces made again.
        write_atomically(journal, "".join(json.dumps(end) + "\n" for end in ends[:num_done]))
        start = Place(0, 0, 0)
        if num_done and (last := ends[num_done - 1]):
            start = Place(*last)
        with journal.open("a") as file:
            for index, (end, rows) in enumerate(self._packs(split, start, limit), num_done):
                file.write(json.dumps(end) + "\n")
                # A process that is killed from here on leaves the line, and the shards tell whether
                # the piece is done.
                file.flush()
                yield self._piece(part, index, rows, held_out)
            file.write("null\n")

    def _packs(
        self, split: str, start: Place, limit: int | None
    ) -> Iterator[tuple[Place, tuple[Rows, ...]]]:
        """Yields rows put together until they hold PIECE_BYTES, and the place where they end;
        `limit` rows of the stream at most."""
        # All rows may have been there already, but for the journal's last line.
        if start.num_rows == limit:
            return
        pack: list[Rows] = []
        end = start
        for rows in self._rows(split, start):
            # Places count the rows of the whole stream, so a limit holds across interruptions.
            if limit is not None and rows.first.num_rows + len(rows.texts) > limit:
                rows = rows._replace(texts=rows.texts[: limit - rows.first.num_rows])
            pack.append(rows)
            end = rows.first.after(len(rows.texts))
            if end.num_rows == limit:
                break
            if sum(each.num_bytes for each in pack) >= PIECE_BYTES:
                yield end, tuple(pack)
                pack = []
        if pack:
            yield end, tuple(pack)

    def _rows(self, split: str, start: Place) -> Iterator[Rows]:
        record = "" if self.local else f"hub-{key(self.identity)}.revision"
        return HubStream(self.data, self.local, record).rows(split, start)


def validation_splits(data: DataConfig) -> dict[str, str]:
    """Returns the split of each validation set. Raises ValueError where data.validation names no
    splits."""
    named = data.validation or {}
    if isinstance(named, str):
        named = {"validation": named}
    is_named = isinstance(named, dict)
    if not is_named or not all(isinstance(split, str) for split in named.values()):
        raise ValueError(
            f"data.validation={data.validation} names no splits; write data.validation=SPLIT or"
            " '{NAME: SPLIT}'"
        )
    return named


def dataset_folder(path: str) -> Path | None:
    """Returns the local folder of a dataset; None for the name of one on the hub. Raises NoText for
    a folder that there is not, and ValueError for one that `datasets` does not find."""
    folder = Path(expand("data.path", path))
    if not folder.is_dir():
        # A name on the hub is OWNER/NAME: anything else is meant as a path.
        if path.startswith(("/", "~", ".")) or path.count("/") > 1:
            raise NoText(
                f"data.path={path} is no folder; give the folder of a dataset, or its name on the"
                " hub, as in data.path=allenai/c4"
            )
        return None
    folder = folder.resolve()
    if re.search(r"[\[\]*?]", str(folder)):
        raise ValueError(
            f"data.path={path}: `datasets` takes [ ] * ? in a folder's name for a pattern; give a"
            " link to it without them, or read its .jsonl and .parquet files by data=text"
        )
    return folder


def read_journal(path: Path) -> list[tuple[int, int, int] | None]:
    """Returns the lines of a journal up to one that was cut off."""
    ends: list[tuple[int, int, int] | None] = []
    if not path.exists():
        return ends
    end_or_null: Any = tuple[int, int, int] | None
    for line in read_bytes(path).split(b"\n"):
        # A process that was killed may have left half a line at the end.
        try:
            ends.append(parse_json(line, end_or_null, path))
        except ValueError:
            break
    return ends


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
    paths = []
    for path in folder.rglob("*"):
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        if path.is_file() and wanted(name):
            paths.append(str(path))
    return list_files(sorted(paths), str(folder))


def card_hash(card: Path) -> str:
    """Returns a hash of the head of a dataset's README.md, which may say what files its
    configurations have."""
    head: list[bytes] = []
    if card.is_file():
        # The head lies between two lines of dashes. The rest is prose.
        head = read_bytes(card).split(b"---\n")[1:2]
    return hashlib.sha256(b"".join(head)).hexdigest()
