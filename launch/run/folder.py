"""A run folder as it is read: its configuration, its rows and its summary. `model.checkpoint` opens
its checkpoints.

What lies in a folder may have been cut, emptied or exchanged since it was written. Every command
reads it here, and says in one line what is wrong."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from conf.composition import name_files
from conf.key import check_value
from conf.keys import KEYS, lookup
from conf.schema import Config
from data.files import DamagedFile, check, parse_json, read_bytes, read_json
from model.checkpoint import read_config
from optim.rule.diagnostics import unfaithful

MOST = 2**34  # bytes of metrics.jsonl
REMEDY = (
    "bring it back, or go on from the checkpoint in another folder, dir=NEW init.run=THIS"
    " init.optimizer=true"
)
FILES = ("config.yaml", "metrics.jsonl", "summary.json")  # what a run writes beside its folders
Row = dict[str, Any]
# No run comes to a larger figure, of which a square would be no number.
LARGEST = 1e100
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]
Loss = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
# of every summary
Figures = TypedDict(
    "Figures",
    {"step": Count, "tokens": Count, "flops": Count, "seconds": Seconds, "val/loss": Loss | None},
)


@dataclass
class Counted:
    """The rows that a checkpoint counts: how many they are, and the sha256 of their lines."""

    rows: int
    sha256: str


def load_config(run: Path) -> Config:
    """Returns the configuration of a run folder. Raises ValueError where it holds none, and
    DamagedFile."""
    config = read_config(run)
    if config is None:
        raise ValueError(f"run={run} holds no config.yaml; name the folder of a run")
    # As the command line is checked: a file may have been edited since.
    try:
        name_files(config.data)
        for name, entry in KEYS.items():
            check_value(name, lookup(config, name), entry.metadata)
    except ValueError as error:
        raise DamagedFile(f"{run / 'config.yaml'} is damaged ({error})") from None
    return config


def read_summary(run: Path) -> dict[str, Any] | None:
    """Returns the final figures of a run, None where it is not done. Raises DamagedFile."""
    file = run / "summary.json"
    try:
        summary = read_json(file, dict[str, Any])
        check(summary, Figures, file)
        refuse_endless(summary, file)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        damage = str(error).removesuffix("; remove it")
        raise DamagedFile(
            f"{damage}; remove it, and the run's own command writes it anew from the last"
            " checkpoint"
        ) from None
    return summary


def remove_partial_checkpoints(run: Path) -> None:
    """Removes what killed saves left."""
    for path in (run / "checkpoints").glob(".step_*.partial"):
        shutil.rmtree(path)


def lines_of(file: Path) -> list[bytes]:
    """Returns the lines of a metrics.jsonl, oldest first, none where there is no file. A last one
    that a crash cut short is left out. Raises DamagedFile."""
    try:
        # What follows the last end of a line is a row that a crash cut short, or nothing.
        return read_bytes(file, MOST).split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def parse_row(line: bytes, number: int, file: Path) -> Row:
    """Returns the row in a line of a metrics.jsonl, whose number counts from 1. Raises
    DamagedFile."""
    source = f"{file}, line {number},"
    row = parse_json(line, dict[str, Any], source)
    # Figures are numbers, or null where they were not finite; JSON's true would pass for 1.
    for name, value in row.items():
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise DamagedFile(f"{source} is damaged ({name} is no number)")
    if not isinstance(row.get("step"), int):
        raise DamagedFile(f"{source} is damaged (it has no step)")
    refuse_endless(row, source)
    return row


def refuse_endless(figures: Row, source: str | Path) -> None:
    """Raises DamagedFile for an integer that is beyond what a float holds: no figure is, and no
    table or curve takes it."""
    for name, value in figures.items():
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise DamagedFile(f"{source} is damaged ({name} is no number that a run comes to)")


def read_rows(file: Path) -> list[Row]:
    """Returns the rows of a metrics.jsonl, oldest first. Raises DamagedFile for a line that is
    none."""
    return [parse_row(line, number, file) for number, line in enumerate(lines_of(file), 1)]


def harm(file: Path) -> str:
    """Returns what rounding does to the rule of a run, by the first row of its metrics.jsonl that
    tells; nothing where none does."""
    try:
        return next(filter(None, map(unfaithful, read_rows(file))), "")
    except DamagedFile:
        return ""  # said by what needs the rows


def counted_lines(file: Path, logged: int, counted: Counted | None) -> list[bytes]:
    """Returns the lines of the rows that a checkpoint counts. Later ones, however damaged, are left
    out.

    Args:
        file: the metrics.jsonl of the run
        logged: step of the last row that the checkpoint knows, -1 where there is none
        counted: the rows that it counts, None in the state of an older one, which knows the last
        step only

    Raises:
        ValueError: they are not all there
    """
    lines = lines_of(file)
    # The rows are known by their bytes: one that was changed or left out is missed.
    if counted:
        kept = lines[: counted.rows]
        if digest(kept).hexdigest() == counted.sha256:
            return kept
        raise ValueError(
            f"{file} does not hold the {counted.rows} rows that the checkpoint counts (it has"
            f" {len(lines)}, or others); {REMEDY}"
        )
    # An older checkpoint knows the step of the last row alone.
    kept = []
    for number, line in enumerate(lines, 1):
        if logged < 0 or parse_row(line, number, file)["step"] > logged:
            break
        kept.append(line)
    if logged >= 0 and not (kept and parse_row(kept[-1], len(kept), file)["step"] == logged):
        raise ValueError(
            f"{file} does not hold the row of step {logged}, which the checkpoint counts; {REMEDY}"
        )
    return kept


def digest(lines: list[bytes]) -> Any:
    """Returns the running sha256 of some rows."""
    return hashlib.sha256(b"".join(line + b"\n" for line in lines))


class RowFile:
    """The metrics.jsonl of a run under way. It begins with the rows that the checkpoint counts:
    later ones are logged again.

    Raises ValueError as `counted_lines` does, and where the disk refuses a row."""

    def __init__(self, file: Path, logged: int, counted: Counted | None) -> None:
        # Rows that were logged after the checkpoint are cut off: their steps are taken again.
        lines = counted_lines(file, logged, counted)
        self.path = file
        self.rows = len(lines)
        self.sha256 = digest(lines)
        self.descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.ftruncate(self.descriptor, sum(len(line) + 1 for line in lines))

    @property
    def counted(self) -> Counted:
        """Returns the rows so far."""
        return Counted(self.rows, self.sha256.hexdigest())

    def append(self, row: Row) -> None:
        """Adds a row; a full disk leaves a part of its line, which the next start cuts off."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self.descriptor, line)
            # What a full disk takes of a line it takes without an error; the rest meets it.
            while written < len(line):
                written += os.write(self.descriptor, line[written:])
        except OSError as error:
            raise ValueError(self._refusal(error)) from None
        self.rows += 1
        self.sha256.update(line)

    def sync(self) -> None:
        """Puts the rows so far on disk, so that a checkpoint never counts more than there are."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise ValueError(self._refusal(error)) from None

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self.descriptor)

    def _refusal(self, error: OSError) -> str:
        return (
            f"{self.path}: {error.strerror}; make room on its disk and start the same command"
            " again: it goes on from the last checkpoint"
        )
