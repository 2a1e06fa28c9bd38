"""Small files: written whole or not at all, and read with suspicion.

Whatever is read from a disk may be cut, emptied, of another kind, or made to hang a reader.
`read_json` and `read_yaml` are the only ways in: they take regular files of a bounded size and
depth, and check the types of what they find."""

import errno
import glob
import io
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml  # type: ignore[import-untyped]

T = TypeVar("T")
# Bytes of a file that is read whole.
LARGEST = 64 * 2**20
# Brackets within brackets.
DEEPEST = 100
# How the pointer to a large file of Git begins.
POINTER = b"version https://git-lfs.github.com/spec/"


class DamagedFile(ValueError):
    """A file that does not hold what it should; the message names the file and the field."""


class NotDownloaded(DamagedFile):
    """The pointer that Git leaves where it did not fetch a large file."""


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
    """Parses one YAML document. Raises ValueError for aliases, which can unfold to any size, for
    deep nesting, and for a tag whose value is none."""
    depth = 0
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias, *{event.anchor}")
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
    try:
        return yaml.CSafeLoader(text).get_single_data()
    except (AttributeError, IndexError, KeyError, TypeError):
        # So PyYAML meets !!int "", !!bool maybe and !!timestamp soon.
        raise ValueError("a value of it is not what its tag says") from None


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Reads a regular file. Raises DamagedFile where it is another kind of file, too large or
    unreadable, and FileNotFoundError where there is none."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise DamagedFile(f"{path} is damaged ({size:,} bytes, where {largest:,} are the most)")
        # A bad disk shows itself here, not when the file is opened.
        try:
            return file.read()
        except OSError as error:
            raise DamagedFile(f"{path} cannot be read ({error.strerror})") from None


def open_regular(path: str | Path) -> io.BufferedReader:
    """Opens a regular file for reading. Raises DamagedFile where it is another kind of file or
    unreadable, NotDownloaded, and FileNotFoundError where there is none."""
    try:
        # A pipe without a writer would wait for one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFile(f"{path} is no regular file; remove it")
    # The caller closes it.
    file = open(descriptor, "rb")  # noqa: SIM115
    if file.peek(len(POINTER)).startswith(POINTER):
        file.close()
        raise NotDownloaded(
            f"{path} is a Git LFS pointer, its content was not downloaded; run git lfs pull in its"
            " folder"
        )
    return file


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file such that a crash at any moment leaves the old or the new one, whole; what a
    full disk refuses leaves nothing behind."""
    # The name is of this process, since a dying one may still be at work.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # The new name is on the disk only when its folder is.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        # A write that the disk refuses does not say which file's it was. An error without a number
        # says all that it has in its text, which a name would take the place of.
        if error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path, names: Iterable[str] | None = None) -> None:
    """Removes what killed writers of `write_atomically` left in a folder, of all files or of those
    with some names. The caller is the only one that writes them: it holds the folder's lock."""
    for path in folder.glob("*.tmp"):
        name, _, process = path.name.removesuffix(".tmp").rpartition(".")
        if re.fullmatch(r"\d+", process) and (names is None or name in names):
            path.unlink(missing_ok=True)


def write_result(path: Path, content: str | bytes) -> None:
    """Writes a file that no lock guards, as a report, by `write_atomically`, and removes what
    killed writers of it left. A link stays and leads to the file.

    Raises OSError where it cannot be written, or is a device, a pipe or a folder, in the place of
    which a file would come."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it is no regular file", str(path))
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        process = leftover.suffixes[-2].removeprefix(".")
        # A process of another host may be at work, for the moment that a file takes.
        is_old = time.time() - leftover.stat().st_mtime > 5
        if re.fullmatch(r"\d{1,9}", process) and is_old and not is_alive(int(process)):
            leftover.unlink(missing_ok=True)
    write_atomically(path, content)


def is_alive(process: int) -> bool:
    """Returns whether this host has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It is another user's.
        pass
    return True


def _read(
    path: Path, parse: Callable[[bytes], Any], kind: type[T], absent: T | None, largest: int
) -> T:
    try:
        content = read_bytes(path, largest)
    except FileNotFoundError:
        if absent is None:
            raise
        return absent
    return _parse(content, parse, kind, path)


def check(value: Any, kind: type[T], source: str | Path) -> T:
    """Returns a plain value as the `kind` that it must be; `source` names it in the error. Raises
    DamagedFile."""
    try:
        return msgspec.convert(value, kind, strict=True, dec_hook=_of_text)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at ")
        named = field.strip("`").removeprefix("$").removeprefix(".")
        said = f"{named}: {reason}" if named else reason
        raise DamagedFile(f"{source} is damaged ({said.replace('`', '')})") from None


def _of_text(kind: type[Any], value: Any) -> Any:
    """Makes what JSON has no type for, and msgspec asks for: a path."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"Expected {kind.__name__}")


def _parse(content: str | bytes, parse: Callable[..., Any], kind: type[T], source: str | Path) -> T:
    try:
        plain = parse(content)
    except RecursionError:
        raise DamagedFile(f"{source} is damaged (it is nested deeper than a parser goes)") from None
    except (ValueError, yaml.YAMLError) as error:
        # UnicodeDecodeError and JSONDecodeError are kinds of ValueError.
        raise DamagedFile(f"{source} is damaged ({' '.join(str(error).split())})") from None
    return check(plain, kind, source)
