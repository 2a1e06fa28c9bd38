"""Texts as they come out of files, the rows among them that cannot be read, and which are held
out."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from data.source_files import name_position

SET_FIELD = "set data.field to the field that holds the text"


class BadRow(NamedTuple):
    """A row, or a document between separators, that cannot be read: its file, place and problem,
    and what a user can do."""

    problem: str
    remedy: str = "mend or remove it"


class Text(NamedTuple):
    """A document, or a part of one where `opens` or `closes` is false.

    `part` is the part of the corpus that it belongs to, `file` where it was read, and `position` is
    the byte of that file where it begins (of .parquet and of streams: the row)."""

    part: str
    text: str
    opens: bool
    closes: bool
    file: str
    position: int

    @property
    def place(self) -> str:
        """Names the file and the line, or row, where the text begins."""
        return f"{self.file}: {name_position(self.file, self.position)}"


def located(text: str | BadRow, place: str) -> str | BadRow:
    """Returns a text as it is; of a row that cannot be read, where it is and why."""
    return BadRow(f"{place} {text.problem}", text.remedy) if isinstance(text, BadRow) else text


def skip_or_refuse(row: BadRow, bad_rows: str, skipped: list[str] | None) -> None:
    """Notes a row that cannot be read.

    Args:
        row: the row
        bad_rows: as in DataConfig, "error" or "skip"
        skipped: the notes, to which the row's problem is added

    Raises:
        ValueError: such rows are not to be skipped
    """
    if bad_rows == "error":
        raise ValueError(
            f"{row.problem}; {row.remedy}, or set data.bad_rows=skip to leave such rows out"
        )
    if skipped is not None:
        skipped.append(row.problem)


def is_held_out(name: str, position: int, fraction: float) -> bool:
    """Returns whether the document at a byte or row of a file is held out: a hash decides, alike on
    every machine and in every run."""
    place = hashlib.blake2b(f"{name}\0{position}".encode(), digest_size=8).digest()
    return int.from_bytes(place, "little") < fraction * 2**64


@dataclass(frozen=True, kw_only=True)
class PieceOfText:
    """Documents that become shard `index` of `part`, but for the share `fraction` of them that go
    to `held_out`.

    `num_bytes` is about the bytes of their text; `bad_rows` is as in DataConfig."""

    part: str
    index: int
    held_out: str | None
    fraction: float
    num_bytes: int
    bad_rows: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Names the parts of the corpus that the piece feeds."""
        return (self.part,) if self.held_out is None else (self.part, self.held_out)

    def part_of(self, name: str, position: int) -> str:
        """Returns the part that the document at a byte or row of a file belongs to."""
        if self.held_out and is_held_out(name, position, self.fraction):
            return self.held_out
        return self.part
