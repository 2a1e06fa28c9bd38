"""The folders of the cache: named by the content of what they were made of, held by one process at
a time, and remembered by what was asked for."""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.text import DataConfig, TokenizerConfig
from data.files import DamagedFile, read_json, write_atomically
from data.shards import REBUILT, Meta, key, shard_name
from data.source_files import File, digest
from data.sources import AnyCorpus
from data.tokenizer import Tokenizer

# Keys that decide nothing of what is in the shards.
NOT_ASKED_FOR = ("name", "cache", "workers", "bad_rows", "verify_days")


# Records


def write_if_possible(record: Path, content: Any) -> None:
    """Writes a record as JSON, unless the system refuses: a cache that others share may be
    read-only, and then every start looks again."""
    with contextlib.suppress(OSError):
        write_atomically(record, json.dumps(content))


def record_of_file(folder: Path, path: Path, *details: Any) -> Path:
    """Returns the record that remembers something, told apart by details, about a file as it is
    now."""
    stat = path.stat()
    return folder / f"{key([str(path), stat.st_size, stat.st_mtime_ns, *details])}.json"


def remembered(record: Path, kind: Any, find: Callable[[], Any]) -> Any:
    """Returns the `kind` that a record holds, or else what `find` finds, which is recorded."""
    try:
        return read_json(record, kind)
    except (FileNotFoundError, ValueError):
        found = find()
        write_if_possible(record, found)
        return found


def digest_files(files: list[File], cache: Path) -> dict[str, str]:
    """Returns the sha256 of each file by its path; those of files that have not been touched since
    are in the cache."""
    if not files:
        return {}
    stats = [[file.path, file.size, file.mtime_ns] for file in files]
    record = cache / f"digests-{key(stats)}.json"
    try:
        known = read_json(record, list[str], [])
    except ValueError:
        known = []
    # A record that is missing or damaged is made again.
    if len(known) != len(files):
        known = [digest(file) for file in files]
        write_if_possible(record, known)
    return {file.path: found for file, found in zip(files, known, strict=True)}


# Folders


def folder_by_content(
    text: AnyCorpus, digests: dict[str, str], name: Callable[[Any], Path], last: str
) -> Path:
    """Returns the folder of a corpus by the content of its files, or one that was named after their
    times and is complete.

    Args:
        text: the corpus
        digests: sha256 of each of its files by path
        name: makes the path of a folder from an identity
        last: the file whose presence means that a folder is complete
    """
    by_content = name(text.identify(lambda file: [file.name, file.size, digests[file.path]]))
    # Corpora that were prepared before digests were taken are named after times.
    by_times = name(text.identity)
    if (by_times / last).exists() and not (by_content / last).exists():
        return by_times
    return by_content


def is_complete(folder: Path) -> bool:
    """Returns whether meta.json is there and no shard that it lists is missing. Raises ValueError
    for a meta.json that cannot be read, and where the folder is none."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; {REBUILT}")
    try:
        parts = read_json(folder / "meta.json", Meta)["parts"]
    except FileNotFoundError:
        return False
    except DamagedFile as error:
        raise ValueError(f"{error}: meta.json cannot be read; {REBUILT}") from None
    return all(
        (folder / part / shard_name(index)).exists()
        for part, entry in parts.items()
        for index in range(entry["shards"])
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; waits while another has it. A process that
    dies lets go.

    Where the file system has no locks, a file that its owner touches now and then stands for one;
    no two clocks are compared."""
    folder.mkdir(exist_ok=True)
    waiting = f"waiting for another process that prepares {folder}"
    with contextlib.ExitStack() as stack:
        lock = folder.parent / f"{folder.name}.lock"
        # A pipe of this name would wait for a reader.
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
        file = stack.enter_context(open(descriptor, "w"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process has the lock. The second call waits for it.
        except BlockingIOError:
            print(waiting, file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            # This file system has no locks, as some network file systems.
            from filelock import SoftFileLease, Timeout

            lease = SoftFileLease(folder.parent / f"{folder.name}.lease")
            try:
                lease.acquire(timeout=0)
            except Timeout:
                print(waiting, file=sys.stderr)
                lease.acquire()
            stack.callback(lease.release)
        yield


# Requests


def request_record(data: DataConfig, tokenizer: TokenizerConfig | str, cache: Path) -> Path:
    """Returns the file that remembers the folder of a corpus by what was asked for; a tokenizer may
    be named by its hash."""
    # Everything counts but where the cache is and how the work is done.
    request = asdict(data)
    for name in NOT_ASKED_FOR:
        del request[name]
    # The same files are asked for from any folder.
    request["path"] = absolute(data.path)
    if data.source == "text":
        request["sources"] = {
            name: absolute(source.path) for name, source in (data.sources or {}).items()
        }
        request["validation"] = {
            name: absolute(paths) for name, paths in (data.validation or {}).items()
        }
    asked_for = [request, tokenizer if isinstance(tokenizer, str) else asdict(tokenizer)]
    return cache / f"asked-{key(asked_for)}.json"


def absolute(paths: Any) -> Any:
    """Returns a path, or a list of them, as they are from any folder."""
    if isinstance(paths, (list, tuple)):
        return [absolute(path) for path in paths]
    if isinstance(paths, str):
        return os.path.abspath(os.path.expanduser(paths))
    # Anything else is a mistake, which is refused elsewhere.
    return paths


def remember_folder(
    data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, chosen: Tokenizer, folder: Path
) -> None:
    """Notes in the cache which folder answers a request, for the time when the text is gone.

    Args:
        data: the text that was asked for
        tokenizer: the tokenizer that was asked for
        chosen: the tokenizer that this came to
        folder: the folder of the prepared corpus
    """
    requests: list[TokenizerConfig | str] = [chosen.hash]
    if not isinstance(tokenizer, Tokenizer):
        requests.append(tokenizer)
    for asked_for in requests:
        record = request_record(data, asked_for, folder.parent)
        # A record that is damaged is made again, in silence: its folder is known by now.
        try:
            known = read_json(record, str, "")
        except ValueError:
            known = ""
        # Most starts find the record as it should be, and write nothing.
        if known != folder.name:
            write_if_possible(record, folder.name)


def recall_folder(
    data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, cache: Path
) -> Path | None:
    """Returns the complete folder that answered a request before."""
    asked_for = tokenizer.hash if isinstance(tokenizer, Tokenizer) else tokenizer
    try:
        name = read_json(request_record(data, asked_for, cache), str, "")
        # A name with a slash would lead out of the cache.
        if name and "/" not in name and is_complete(cache / name):
            return cache / name
    except (AttributeError, TypeError, ValueError):
        # A request that is malformed is refused elsewhere, in words of its own.
        pass
    return None
