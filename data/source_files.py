"""Finds the files that a configuration names, and tells what they are by name, size and content."""

import glob
import hashlib
import mmap
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conf.key import expand
from conf.text import DataConfig
from data.files import open_regular

SUFFIXES = (".txt", ".jsonl", ".parquet")
NOT_IN_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}


class File(NamedTuple):
    """A file of text. `name` is its path below the folder that the files of a source share, so it
    is the same on every machine."""

    path: str
    name: str
    size: int
    mtime_ns: int


class NoText(ValueError):
    """There is no text where a key says it is."""


# Paths of a configuration


def training_paths(data: DataConfig, default: str, kind: str) -> dict[str, tuple[str, Any]]:
    """Returns the key and the paths of each training source.

    Args:
        data: the configuration
        default: the name of the source that data.path is
        kind: what the paths are of, for the error

    Raises:
        ValueError: there are data.path and data.sources, or neither
    """
    sources = data.sources or {}
    if (data.path is None) == (not sources):
        raise ValueError(
            f"data.path={data.path} with {len(sources)} data.sources; give the {kind} to train on"
            " in one of the two"
        )
    if data.path is not None:
        return {default: ("data.path", data.path)}
    return {name: (f"data.sources.{name}.path", source.path) for name, source in sources.items()}


def validation_paths(data: DataConfig) -> dict[str, tuple[str, Any]]:
    """Returns the key and the paths of each validation set. Raises ValueError for sets without
    names."""
    validation = data.validation or {}
    if not isinstance(validation, dict):
        raise ValueError(
            f"data.validation={validation} has no names; write data.validation='{{NAME: FILES}}'"
        )
    return {name: (f"data.validation.{name}", paths) for name, paths in validation.items()}


def source_weights(data: DataConfig) -> dict[str, float] | None:
    """Returns the relative weights of data.sources; None where there are no sources."""
    return {name: source.weight for name, source in (data.sources or {}).items()} or None


def find_files(key: str, paths: Any, suffixes: tuple[str, ...] = SUFFIXES) -> list[File]:
    """Returns the files of a path, glob or list of them; those of a glob or below a folder in
    alphabetical order, each file once.

    Args:
        key: the key that names the paths, for errors
        paths: a path, a glob, or a list of them
        suffixes: how the names of the files may end

    Raises:
        ValueError: the paths are no text, or a file is of another kind
        NoText: a path or glob matches nothing
    """
    patterns: list[Any] = []
    if isinstance(paths, str):
        patterns = [paths]
    elif isinstance(paths, (list, tuple)):
        patterns = list(paths)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{key}={paths} names no files; give a file, a glob or a list of them")
    found: list[str] = []
    for pattern in patterns:
        found += match_files(key, pattern, suffixes)
    if wrong := [path for path in found if not path.endswith(suffixes)]:
        raise ValueError(f"{key}={wrong[0]} is of no known kind; give {', '.join(suffixes)} files")
    # Names are taken below the folder that all files share, so a copy elsewhere has the same.
    root = os.path.commonpath([os.path.dirname(path) for path in found])
    return list_files(list(dict.fromkeys(found)), root)


def match_files(key: str, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Returns the paths of the files that a path or glob stands for. Raises NoText where there are
    none."""
    path = os.path.abspath(expand(key, pattern))
    # A path that is there stands for itself, though its name have the characters of a glob.
    matches = [path]
    if not os.path.exists(path):
        matches = sorted(glob.glob(as_glob(path), recursive=True))
    files = [match for match in matches if os.path.isfile(match)]
    # A folder stands for what is below it, where it is not named beside files.
    if not files:
        files = sorted(file for match in matches for file in files_below(match, suffixes))
    if files:
        return files
    if os.path.islink(path) and not os.path.exists(path):
        raise NoText(
            f"{key}={pattern} is a link to {os.readlink(path)}, which is not there; bring that back"
            " or name another file"
        )
    if os.path.exists(path) and not os.path.isdir(path):
        raise NoText(f"{key}={pattern} is a pipe or a device; write its text into a file")
    # From here on the error says which of several mistakes it was.
    if matches:
        raise NoText(
            f"{key}={pattern} holds no {', '.join(suffixes)} file; give a file, a folder of such,"
            f" or a glob like FOLDER/*{suffixes[0]}"
        )
    missing = path.removeprefix(existing_prefix(path))
    brackets = ""
    if "[" in missing:
        brackets = "; [ ] in a name are written [[] and []]"
    raise NoText(
        f"{key}={pattern} matches no file; give a file or a glob like"
        f" FOLDER/*{suffixes[0]}{brackets}"
    )


def as_glob(path: str) -> str:
    """Returns a pattern in which the folders that are there stand for themselves, whatever
    characters they have in their names."""
    literal = existing_prefix(path)
    return glob.escape(literal) + path.removeprefix(literal)


def existing_prefix(path: str) -> str:
    """Returns the beginning of a path that is there, up to a whole name."""
    while path and not os.path.exists(path):
        path = path.rpartition("/")[0]
    return path


def files_below(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yields the files of the kinds below a folder, but hidden ones; links are followed, each
    folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            # A link may lead back to a folder above it, so a folder that was seen ends the walk.
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(root, name)
            is_wanted = name.endswith(suffixes) and not name.startswith(".")
            if is_wanted and os.path.isfile(path):
                yield path


def stdlib_files() -> list[File]:
    """Returns the .py files of the running Python's standard library, without its tests, installed
    packages and character tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        # The walk stays out of site-packages, which may hold a hundred times as much.
        subfolders[:] = set(subfolders) - NOT_IN_STDLIB
        # Compiled files and libraries lie among the sources.
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return list_files(sorted(paths), str(root))


# What files are


def list_files(paths: list[str], root: str) -> list[File]:
    """Returns the files of the paths, named by where they are below a folder `root`."""
    files = []
    for path in paths:
        name = os.path.relpath(path, root).replace(os.sep, "/")
        stat = os.stat(path)
        files.append(File(path, name, stat.st_size, stat.st_mtime_ns))
    return files


def content_hash(files: list[File]) -> str:
    """Returns the sha256 (hex) over the names and contents of files."""
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name}\0{file.size}\0".encode() + Path(file.path).read_bytes())
    return found.hexdigest()


def digest(file: File) -> str:
    """Returns the sha256 (hex) of a file's bytes."""
    with open_regular(file.path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def mapped(path: str) -> mmap.mmap:
    """Returns the bytes of a file that is not empty, mapped into memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def name_position(path: str, position: int) -> str:
    """Returns what a person calls a place in a file: a row of .parquet and of streams, else a
    line."""
    if path.endswith((".txt", ".jsonl", ".py")) and os.path.isfile(path):
        return f"line {line_number(path, position)}"
    return f"row {position}"


def line_number(path: str, position: int) -> int:
    """Returns the line, counted from 1, of a byte of a file."""
    with mapped(path) as view:
        return view[:position].count(b"\n") + 1
