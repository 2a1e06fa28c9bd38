"""A live run folder belongs to one process, wherever the others run and however the first one
ends."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch.run import lock
from launch.run.lock import RunLock

OWNER = """
import sys
from pathlib import Path
from launch.run import lock
lock.HEARTBEAT = lock.SETTLE = float(sys.argv[2])
with lock.RunLock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start_owner(tmp_path):
    """Starts a process that holds the lock of tmp_path until its stdin closes."""
    owners = []

    def start(heartbeat=10.0):
        command = [sys.executable, "-c", OWNER, str(tmp_path), str(heartbeat)]
        owner = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        owners.append(owner)
        assert owner.stdout and owner.stdout.readline() == "locked\n"
        return owner

    yield start
    for owner in owners:
        owner.kill()
        owner.communicate()


@pytest.fixture
def left_behind(tmp_path):
    """A lock file with the name of a process on another host in it."""
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": "yesterday"}))
    return path


def test_second_process_is_refused_and_told_who_holds_it(tmp_path, start_owner, capsys):
    owner = start_owner()
    with pytest.raises(
        ValueError,
        match=f"dir={tmp_path} is in use by process {owner.pid} on {socket.gethostname()} since",
    ) as refusal:
        RunLock(tmp_path).__enter__()
    assert "\n" not in str(refusal.value)
    owner.communicate()
    with RunLock(tmp_path):
        pass
    assert capsys.readouterr().err == ""  # a clean exit leaves nothing to take over


def test_a_clean_exit_empties_the_file_and_removes_a_folder_without_content(tmp_path):
    with RunLock(tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists()
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert (tmp_path / "run" / "lock").read_text() == ""


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(
        ValueError,
        match=(
            r"dir=.*file.* cannot be a run folder \((File exists|Not a directory)\); name one that"
            r" can be written"
        ),
    ):
        RunLock(tmp_path / name).__enter__()
    assert (tmp_path / "file").read_text() == "precious"


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(ValueError, match=r"dir=.*run is a link that leads back to itself"):
        RunLock(tmp_path / "run").__enter__()


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(ValueError, match=r"lock is no regular file; remove it"):
        RunLock(tmp_path).__enter__()


def test_a_folder_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    take, path = RunLock._take, tmp_path / "run" / "lock"

    def removed_once(self):
        monkeypatch.setattr(RunLock, "_take", take)
        path.unlink()
        return take(self)

    monkeypatch.setattr(RunLock, "_take", removed_once)
    with RunLock(tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_refused_process_leaves_the_owner_its_lock(tmp_path, start_owner):
    start_owner()
    for _ in range(2):
        with pytest.raises(ValueError, match="in use"):
            RunLock(tmp_path).__enter__()


def test_killed_owner_is_taken_over_with_a_notice(tmp_path, start_owner, capsys):
    owner = start_owner()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert f"taking over from process {owner.pid} on {socket.gethostname()}" in notice


def test_file_cut_short_is_taken_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WATCH", 0.1)
    (tmp_path / "lock").write_text('{"host": "els')
    with RunLock(tmp_path):
        pass
    assert "taking over" in capsys.readouterr().err


def test_one_process_cannot_hold_a_folder_twice(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            RunLock(tmp_path).__enter__()
        newcomer = subprocess.run(
            [sys.executable, "-c", OWNER, tmp_path, "10"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        # the refusal did not drop the kernel's lock
        assert f"in use by process {os.getpid()}" in newcomer.stderr
    with RunLock(tmp_path):
        pass


def test_live_owner_on_another_host_is_respected(tmp_path, left_behind, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 20.0)  # ends at the first touch
    closing = threading.Event()

    def beat():
        while not closing.wait(0.05):
            os.utime(left_behind)

    heartbeat = threading.Thread(target=beat)
    heartbeat.start()
    try:
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere since yesterday"):
            RunLock(tmp_path).__enter__()
    finally:
        closing.set()
        heartbeat.join()
    assert "elsewhere" in left_behind.read_text()


def test_dead_owner_on_another_host_is_taken_over(tmp_path, left_behind, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WATCH", 0.3)
    os.utime(left_behind, (2**32, 2**32))  # its clock may be far ahead
    with RunLock(tmp_path):
        assert json.loads(left_behind.read_text())["host"] == socket.gethostname()
    assert "taking over from process 7 on elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("nodes", ["apart", "same"])
def test_heartbeat_alone_protects_where_kernel_locks_do_not(
    tmp_path, start_owner, monkeypatch, nodes
):
    owner = start_owner(heartbeat=0.05)
    monkeypatch.setattr(lock, "WATCH", 20.0)

    def lockf(*_):
        if nodes == "same":  # a file system without locks
            raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    if nodes == "apart":  # one that keeps them to each node
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(ValueError, match=f"in use by process {owner.pid}"):
        RunLock(tmp_path).__enter__()


NEWCOMER = """
import errno, fcntl, os, sys, time
from pathlib import Path
from launch.run import lock

kind, folder = sys.argv[1], Path(sys.argv[2])
look = lock.RunLock._owner

def lockf(*_):
    if kind == "none":
        raise OSError(errno.ENOLCK, "no locks available")

def together(self):
    lock.RunLock._owner, found = look, look(self)
    Path(folder, f"seen{os.getpid()}").touch()
    while len(seen := sorted(folder.glob("seen*"))) < 2:
        time.sleep(0.001)
    if seen[1].name == f"seen{os.getpid()}":  # this one writes later
        time.sleep(0.3)
        while kind == "apart" and not Path(folder, "held").exists():
            time.sleep(0.001)
    return found

fcntl.lockf, lock.RunLock._owner, lock.HEARTBEAT = lockf, together, 1000.0
with lock.RunLock(folder / "run"):
    Path(folder, "held").touch()
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["none", "apart"])
def test_of_two_newcomers_that_find_the_folder_free_one_gives_way(tmp_path, kind):
    """Both have looked before either has written: where there are no kernel locks at all, and where
    each node has its own."""
    command, pipe = [sys.executable, "-c", NEWCOMER, kind, str(tmp_path)], subprocess.PIPE
    both = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    try:
        end = time.monotonic() + 60
        while not (ended := [process for process in both if process.poll() is not None]):
            assert time.monotonic() < end, "both have the folder"
            time.sleep(0.05)
        (loser,), (winner,) = ended, [process for process in both if process not in ended]
        assert winner.stdout and winner.stdout.readline() == "locked\n"
        assert json.loads((tmp_path / "run/lock").read_text())["pid"] == winner.pid
        out, said = loser.communicate()
        assert (
            loser.returncode > 0
            and f"in use by process {winner.pid} on {socket.gethostname()} since" in said
        )
        assert out == ("" if kind == "none" else "locked\n")  # it never had it, or not for long
        assert winner.communicate()[1] == "" and winner.returncode == 0
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("heartbeat", [0.1, 1000.0])
def test_a_suspended_owner_that_was_taken_over_ends_at_once(
    tmp_path, start_owner, monkeypatch, heartbeat
):
    """At its next heartbeat, or where it leaves before that; what the other one wrote stands."""
    owner = start_owner(heartbeat)
    owner.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(lock, "WATCH", 0.5)
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with RunLock(tmp_path):
        taken = (tmp_path / "lock").read_bytes()
        owner.send_signal(signal.SIGCONT)
        if heartbeat < 1:
            owner.wait(timeout=60)
        _, said = owner.communicate(timeout=60)
        assert owner.returncode == lock.EXIT_TAKEN_OVER
        assert (
            said.count("\n") == 1
            and said.startswith("error: ")
            and f"in use by process {os.getpid()} on elsewhere since" in said
        )
        assert (tmp_path / "lock").read_bytes() == taken


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES, errno.EIO, errno.EINVAL])
def test_a_file_system_whose_locks_fail_has_the_heartbeat(
    tmp_path, start_owner, monkeypatch, number
):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    with RunLock(tmp_path / "run"):
        assert lock.is_in_use(tmp_path / "run")
    owner = start_owner(heartbeat=0.05)
    with pytest.raises(ValueError, match=f"in use by process {owner.pid}"):
        RunLock(tmp_path).__enter__()


def test_a_dead_owner_of_the_future_is_not_at_work(left_behind, tmp_path):
    """Its clock was two hours ahead."""
    os.utime(left_behind, (time.time() + 7200,) * 2)
    assert not lock.is_in_use(tmp_path)
    os.utime(left_behind)
    assert lock.is_in_use(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["7", "[]", '{"pid": "x"}', '{"pid": -1}', '{"pid": 99999999999999999999}', "[" * 4000],
)
def test_a_damaged_lock_is_nobodys(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(lock, "WATCH", 0.1)
    (tmp_path / "lock").write_text(content)
    assert not lock.is_in_use(tmp_path)
    with RunLock(tmp_path):
        pass
    assert "taking over from process ? on ?" in capsys.readouterr().err


def test_an_empty_folder_of_the_users_stays(tmp_path):
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
