"""Small files: written whole or not at all, and read with suspicion.

Whatever is read from a disk may be cut, emptied, of another kind, or made to hang a reader. `read_json` and `read_yaml`
are the only ways in: they take regular files of a bounded size and depth, and check the types of what they find.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml  # type: ignore[import-untyped]

T = TypeVar("T")
LARGEST = 64 * 2**20  # bytes of a file that is read whole
DEEPEST = 100  # brackets within brackets


class DamagedFile(ValueError):
    """A file that does not hold what it should; the message names the file and the field."""


def read_json(path: Path, kind: type[T], absent: T | None = None, largest: int = LARGEST) -> T:
    """Reads a JSON file that holds a `kind`: a dataclass, a TypedDict, dict[str, int] and so on.

    Args:
        path: the file
        kind: what it must hold; fields that it does not declare are left out
        absent: what to return where there is no such file
        largest: bytes that the file may have

    Raises:
        DamagedFile: the file cannot be read, or holds anything else
        FileNotFoundError: there is no such file, and no `absent`
    """
    return _read(path, json.loads, kind, absent, largest)


def read_yaml(path: Path, kind: type[T], absent: T | None = None, largest: int = LARGEST) -> T:
    """Reads a YAML file without aliases that holds a `kind`, as `read_json` does."""
    return _read(path, parse_yaml, kind, absent, largest)


def parse_json(text: str | bytes, kind: type[T], source: str | Path) -> T:
    """Parses JSON that holds a `kind`; `source` names the text in the error. Raises DamagedFile."""
    return _parse(text, json.loads, kind, source)


def parse_yaml(text: str | bytes) -> Any:
    """Parses one YAML document. Raises ValueError for aliases, which can unfold to any size, and for deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias, *{event.anchor}")
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
    return yaml.load(text, yaml.CSafeLoader)


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Reads a regular file. Raises DamagedFile where it is another kind of file, too large or unreadable, and FileNotFoundError
    where there is none."""
    try:
        # A pipe without a writer would wait for one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedFile(f"{path} is no regular file; remove it")
            if status.st_size > largest:
                raise DamagedFile(f"{path} is damaged ({status.st_size:,} bytes, where {largest:,} are the most)")
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror})") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file such that a crash at any moment leaves the old or the new one, whole; what a full disk refuses leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of this process: a dying one may still be at work
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, parse: Callable[[bytes], Any], kind: type[T], absent: T | None, largest: int) -> T:
    try:
        content = read_bytes(path, largest)
    except FileNotFoundError:
        if absent is None:
            raise
        return absent
    return _parse(content, parse, kind, path)


def _parse(content: str | bytes, parse: Callable[..., Any], kind: type[T], source: str | Path) -> T:
    try:
        return msgspec.convert(parse(content), kind, strict=True)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at ")
        named = field.strip("`").removeprefix("$").removeprefix(".")
        said = f"{named}: {reason}" if named else reason
        raise DamagedFile(f"{source} is damaged ({said.replace('`', '')})") from None
    except RecursionError:
        raise DamagedFile(f"{source} is damaged (it is nested deeper than a parser goes)") from None
    except (ValueError, yaml.YAMLError) as error:
        # UnicodeDecodeError and JSONDecodeError among them
        raise DamagedFile(f"{source} is damaged ({' '.join(str(error).split())})") from None
