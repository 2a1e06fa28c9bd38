"""One process per run folder: a lock that goes with its process, and that other nodes respect."""

import contextlib
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

import msgspec

from conf.exit_codes import EXIT_TAKEN_OVER
from data.files import is_alive, parse_json, read_bytes

HEARTBEAT = 10.0  # seconds between touches of a live run's lock file

WATCH = 25.0  # seconds without a touch after which an owner counts as dead; spans two heartbeats

# seconds until it shows who wrote last of newcomers that found the folder free at the same moment
SETTLE = 2.0


@dataclass
class Owner:
    """Who holds a folder, as its lock file tells; of a damaged file nothing is known."""

    host: str = "?"
    pid: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    start: str = "?"

    def __str__(self) -> str:
        return f"process {self.pid or '?'} on {self.host}"


# The folders that this process holds: the kernel's locks exclude other processes only.
_held: dict[Path, Owner] = {}


class RunLock:
    """Holds the run folder `dir` for this process while the context is open.

    The kernel's lock on `<dir>/lock` goes with its process, however that ends. Where a shared file
    system keeps such locks to each node, or has none, the heartbeat counts: the owner touches the
    file every HEARTBEAT seconds, and a newcomer watches for WATCH seconds whether its time moves.
    That compares no clocks of different hosts. A clean exit empties the file. Where there is
    nothing else in the folder it removes the file, and the folder too if it made that. What an
    owner that died left behind is taken over with a notice on stderr. An owner that was only
    suspended, and finds its folder taken over, ends its process at once.

    filelock's lease was tried: on the same disk it gives the folder of a suspended process away
    (tests/benchmarks/results/libraries.md).

    Raises ValueError where the folder is in use, or cannot be made or written.
    """

    def __init__(self, dir: Path) -> None:
        self._dir = dir
        self._path = Path(os.path.realpath(dir)) / "lock"
        self._made = False

    def __enter__(self) -> Self:
        # Closing any descriptor of a file drops all of the process's locks on it: never open one
        # that is held.
        if self._path in _held:
            raise ValueError(self._refusal(_held[self._path]))
        while True:
            try:
                self._file = self._open()
                try:
                    self._claim = self._take()
                except BaseException:
                    os.close(self._file)
                    raise
            except OSError as error:
                raise ValueError(
                    f"dir={self._dir} cannot be a run folder ({error.strerror}); name one that can"
                    " be written"
                ) from None
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
        with contextlib.suppress(OSError):  # on a disk that fails, what is left is taken over
            os.ftruncate(self._file, 0)
            if not self._is_moved() and os.listdir(self._dir) == ["lock"]:  # nothing came of it
                self._path.unlink()
                if self._made:
                    self._dir.rmdir()
        os.close(self._file)
        del _held[self._path]

    def refuse_moved_folder(self) -> None:
        """Raises ValueError where the folder does not lie any more where it lay: what is written
        there now would be half a run."""
        if self._is_moved():
            raise ValueError(
                f"dir={self._dir} was moved or removed while its run was at work; the same command"
                " with dir= its new place goes on from the last checkpoint there"
            )

    def _is_moved(self) -> bool:
        try:
            there, here = os.stat(self._path), os.fstat(self._file)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    def _open(self) -> int:
        """Makes the folder where there is none, and opens its lock file. Raises ValueError for a
        link that leads nowhere."""
        if self._dir.is_symlink() and os.path.islink(os.path.realpath(self._dir)):
            raise ValueError(f"dir={self._dir} is a link that leads back to itself; remove it")
        if self._dir.is_symlink() and not self._dir.exists():
            raise ValueError(
                f"dir={self._dir} is a link to {os.readlink(self._dir)}, which is gone; make that"
                " folder, or name another dir"
            )
        self._made = self._made or not self._dir.exists()
        self._dir.mkdir(parents=True, exist_ok=True)
        if self._path.is_dir():
            raise ValueError(f"{self._path} is no regular file; remove it")
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise ValueError(f"{self._path} is no regular file; remove it")
        return file

    def _take(self) -> Owner:
        has_kernel_lock = self._lock()
        owner, host = self._owner(), socket.gethostname()
        if owner is not None:
            if (not has_kernel_lock or owner.host != host) and self._is_alive(owner):
                raise ValueError(self._refusal(owner))
            print(
                f"dir={self._dir}: taking over from {owner}, which did not clean up",
                file=sys.stderr,
            )
        # From here on the folder is claimed. Where the kernel has no locks, another newcomer may
        # have done the same at this moment: whose claim still stands after SETTLE has the folder.
        claim = Owner(host, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(asdict(claim)).encode(), 0)
        os.fsync(self._file)
        if not has_kernel_lock:
            time.sleep(SETTLE)
        self._check(claim)
        return claim

    def _lock(self) -> bool:
        """Takes the kernel's lock; False where the file system has none (Lustre mounted without
        flock, say) or fails. NFS drops what it has cached of a file whenever a lock is asked for,
        or the file is opened."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(self._refusal(self._owner() or Owner())) from None
        except OSError:
            # Whatever its number says, the heartbeat counts: ENOLCK, ENOSYS and EOPNOTSUPP are
            # usual, EACCES may mean a holder.
            with contextlib.suppress(
                FileNotFoundError
            ):  # the one before removed the folder meanwhile
                os.close(os.open(self._path, os.O_RDONLY))  # there is no lock that this could drop
            return False
        return True

    def _owner(self) -> Owner | None:
        """Returns the owner that the file names: None if it is empty, an unknown one if it is
        damaged."""
        content = os.pread(self._file, 4096, 0)
        if not content:
            return None
        return owner_in(content, self._path)

    def _is_alive(self, owner: Owner) -> bool:
        print(
            f"dir={self._dir}: last used by {owner}; watching for {WATCH:.0f} s whether it is"
            " alive",
            file=sys.stderr,
        )
        # Only whether the time moves counts, not which it is: another host's clock may be wrong.
        before, end = os.fstat(self._file).st_mtime_ns, time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(WATCH / 50)
            self._lock()  # for the file's times as they are now
            if os.fstat(self._file).st_mtime_ns != before:
                return True
        return False

    def _check(self, claim: Owner) -> None:
        """Raises ValueError where the file does not hold this process's claim any more."""
        self._lock()  # for the file's content as it is now
        owner = self._owner()
        if owner != claim:
            raise ValueError(self._refusal(owner or Owner()))

    def _end_if_taken_over(self) -> None:
        try:
            self._check(self._claim)
        except ValueError as refusal:  # two would write the folder
            print(
                f"error: this process ends, for another one has taken over: {refusal}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_TAKEN_OVER)

    def _beat(self) -> None:
        # The first beat comes early: where each node has kernel locks of its own, a newcomer of
        # another node may have written last.
        pause = SETTLE
        while not self._closing.wait(pause):
            with contextlib.suppress(OSError):  # a file server may be away for a while
                self._end_if_taken_over()
                os.utime(self._file)
            pause = HEARTBEAT

    def _refusal(self, owner: Owner) -> str:
        return (
            f"dir={self._dir} is in use by {owner} since {owner.start}; wait for it, stop it, or"
            " choose another dir"
        )


def owner_in(content: bytes, file: Path) -> Owner:
    """Returns the owner whom the content of a lock file names, an unknown one where it is
    damaged."""
    try:
        return parse_json(content, Owner, file)
    except ValueError:
        return Owner()


def is_in_use(dir: Path) -> bool:
    """Returns whether a process seems to hold the folder: one that has not let go of it, and gave a
    sign of life lately. It takes nothing."""
    file = dir / "lock"
    try:
        content, touched = read_bytes(file), file.stat().st_mtime
    except (OSError, ValueError):
        return False
    owner = owner_in(content, file) if content else Owner()
    if not owner.pid:
        return False
    if owner.host == socket.gethostname() and not is_alive(owner.pid):
        return False
    return abs(time.time() - touched) < 2 * WATCH  # clocks of two hosts differ by less
