"""One process per run folder: a lock that goes with its process, and that other nodes respect."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

HEARTBEAT = 10.0  # seconds between touches of a live run's lock file
WATCH = 25.0  # seconds without a touch after which an owner counts as dead; spans two heartbeats

_held: dict[Path, dict[str, Any]] = {}  # kernel locks exclude other processes only: these are this process's own


class RunLock:
    """Holds the run folder `dir` for this process while the context is open.

    The kernel's lock on `<dir>/lock` goes with its process, however that ends. Where a shared file system keeps such
    locks to each node, or has none, the heartbeat counts: the owner touches the file every HEARTBEAT seconds, and a
    newcomer watches for WATCH seconds whether its time moves. That compares no clocks of different hosts.
    A clean exit empties the file, and removes a folder that holds nothing else. What an owner that died left behind is taken
    over with a notice on stderr.

    Raises ValueError where the folder is in use.
    """

    def __init__(self, dir: Path) -> None:
        self._dir = dir
        self._path = (dir / "lock").resolve()

    def __enter__(self) -> Self:
        # Closing any descriptor of a file drops all of the process's locks on it: never open one that is held.
        if self._path in _held:
            raise ValueError(self._refusal(_held[self._path]))
        while True:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                owner = self._take()
            except BaseException:
                os.close(self._file)
                raise
            if os.fstat(self._file).st_nlink:  # else the one before removed the folder meanwhile
                break
            os.close(self._file)
        _held[self._path] = owner
        self._closing = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._heartbeat.join()
        os.ftruncate(self._file, 0)
        if os.listdir(self._dir) == ["lock"]:  # nothing came of it
            self._path.unlink()
            self._dir.rmdir()
        os.close(self._file)
        del _held[self._path]

    def _take(self) -> dict[str, Any]:
        has_kernel_lock = self._lock()
        owner, host = self._owner(), socket.gethostname()
        if owner is not None:
            if (not has_kernel_lock or owner.get("host") != host) and self._is_alive(owner):
                raise ValueError(self._refusal(owner))
            print(f"dir={self._dir}: taking over from {_name(owner)}, which did not clean up", file=sys.stderr)
        content = {"host": host, "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(content).encode(), 0)
        os.fsync(self._file)
        return content

    def _lock(self) -> bool:
        """Takes the kernel's lock; False where the file system has none (Lustre mounted without flock, say)."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(self._refusal(self._owner() or {})) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return False
        return True

    def _owner(self) -> dict[str, Any] | None:
        """Who wrote the file: None if it is empty, {} if it is cut short."""
        content = os.pread(self._file, 4096, 0)
        try:
            return json.loads(content) if content else None
        except ValueError:
            return {}

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        print(
            f"dir={self._dir}: last used by {_name(owner)}; watching for {WATCH:.0f} s whether it is alive",
            file=sys.stderr,
        )
        before, end = os.fstat(self._file).st_mtime_ns, time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(WATCH / 50)
            self._lock()  # NFS drops what it has cached of a file's times whenever a lock is asked for
            if os.fstat(self._file).st_mtime_ns != before:
                return True
        return False

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a file server may be away for a while
                os.utime(self._file)

    def _refusal(self, owner: dict[str, Any]) -> str:
        return f"dir={self._dir} is in use by {_name(owner)} since {owner.get('start', '?')}; wait for it, stop it, or choose another dir"


def is_in_use(dir: Path) -> bool:
    """Whether a process seems to hold the folder: one that has not let go of it, and gave a sign of life lately. It takes nothing."""
    file = dir / "lock"
    try:
        owner, touched = json.loads(file.read_text() or "{}"), file.stat().st_mtime
    except (OSError, ValueError):
        return False
    if owner.get("host") == socket.gethostname():
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
    return bool(owner) and time.time() - touched < 2 * WATCH  # clocks of two hosts differ by less


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
