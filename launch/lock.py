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
SETTLE = 2.0  # seconds until it shows who wrote last of newcomers that found the folder free at the same moment
EXIT_TAKEN_OVER = 2  # as for a newcomer that is refused

_held: dict[Path, dict[str, Any]] = {}  # kernel locks exclude other processes only: these are this process's own


class RunLock:
    """Holds the run folder `dir` for this process while the context is open.

    The kernel's lock on `<dir>/lock` goes with its process, however that ends. Where a shared file system keeps such
    locks to each node, or has none, the heartbeat counts: the owner touches the file every HEARTBEAT seconds, and a
    newcomer watches for WATCH seconds whether its time moves. That compares no clocks of different hosts.
    A clean exit empties the file, and removes a folder that holds nothing else. What an owner that died left behind is taken
    over with a notice on stderr. An owner that was only suspended, and finds its folder taken over, ends its process at once.

    Raises ValueError where the folder is in use, or cannot be made or written.
    """

    def __init__(self, dir: Path) -> None:
        self._dir = dir
        self._path = (dir / "lock").resolve()

    def __enter__(self) -> Self:
        # Closing any descriptor of a file drops all of the process's locks on it: never open one that is held.
        if self._path in _held:
            raise ValueError(self._refusal(_held[self._path]))
        while True:
            try:
                self._dir.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise ValueError(f"dir={self._dir} cannot be a run folder ({error.strerror}); name one that can be written") from None
            try:
                self._claim = self._take()
            except BaseException:
                os.close(self._file)
                raise
            if os.fstat(self._file).st_nlink:  # else the one before removed the folder meanwhile
                break
            os.close(self._file)
        _held[self._path] = self._claim
        self._closing = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._heartbeat.join()
        self._end_if_taken_over()
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
        claim = {"host": host, "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(claim).encode(), 0)
        os.fsync(self._file)
        if not has_kernel_lock:
            time.sleep(SETTLE)
        self._check(claim)
        return claim

    def _lock(self) -> bool:
        """Takes the kernel's lock; False where the file system has none (Lustre mounted without flock, say). NFS drops what it has cached of
        a file whenever a lock is asked for, or the file is opened."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(self._refusal(self._owner() or {})) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            with contextlib.suppress(FileNotFoundError):  # the one before removed the folder meanwhile
                os.close(os.open(self._path, os.O_RDONLY))  # there is no lock that this could drop
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
            self._lock()  # for the file's times as they are now
            if os.fstat(self._file).st_mtime_ns != before:
                return True
        return False

    def _check(self, claim: dict[str, Any]) -> None:
        """Raises ValueError where the file does not hold this process's claim any more."""
        self._lock()  # for the file's content as it is now
        owner = self._owner()
        if owner != claim:
            raise ValueError(self._refusal(owner or {}))

    def _end_if_taken_over(self) -> None:
        try:
            self._check(self._claim)
        except ValueError as refusal:  # two would write the folder
            print(f"error: this process ends, for another one has taken over: {refusal}", file=sys.stderr, flush=True)
            os._exit(EXIT_TAKEN_OVER)

    def _beat(self) -> None:
        pause = SETTLE  # where each node has kernel locks of its own, a newcomer of another node may have written last
        while not self._closing.wait(pause):
            with contextlib.suppress(OSError):  # a file server may be away for a while
                self._end_if_taken_over()
                os.utime(self._file)
            pause = HEARTBEAT

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
