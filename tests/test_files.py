"""Small files: what is read is checked, and what is damaged is named; nothing hangs, nothing is a
traceback."""

import os
import resource
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

from data.files import (
    DamagedFile,
    parse_json,
    read_bytes,
    read_json,
    read_yaml,
    write_atomically,
    write_result,
)


@dataclass
class Counters:
    step: int
    seconds: float = 0.0


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_is_read_as_its_type(tmp_path):
    file = written(tmp_path / "state.json", '{"step": 3, "seconds": 2, "of a later version": NaN}')
    assert read_json(file, Counters) == Counters(3, 2.0)
    assert read_yaml(written(tmp_path / "config.yaml", "a: {b: [1, 2]}"), dict[str, Any]) == {
        "a": {"b": [1, 2]}
    }
    assert parse_json('{"step": 1}', Counters, "row 1") == Counters(1)


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "Expecting value"),
        ('{"step": "3"}', "step: Expected int, got str"),
        ('{"step": null}', "step: Expected int, got null"),
        ("[1]", "Expected object, got array"),
        ("{}", "missing required field step"),
        ('{"step": 1', "delimiter"),
        ("[" * 200_000, "nested deeper"),
        ('{"step":' + "[" * 200_000 + "]" * 200_000 + "}", "nested deeper"),
        ('{"step": ' + "9" * 5000 + "}", "digits"),
        (b'{"step": \xff}', "utf-8"),
    ],
)
def test_damaged_json_is_named_with_its_field(tmp_path, content, said):
    file = written(tmp_path / "state.json", content)
    with pytest.raises(DamagedFile, match=said) as error:
        read_json(file, Counters)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "Expected object, got null"),
        ("a: [1", "flow sequence"),
        ("- 1", "Expected object, got array"),
        ("[" * 200_000, "nested deeper"),
        ("a: &x [1]\nb: [*x, *x]", "alias"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ('a: !!int ""', "not what its tag says"),
        ("a: !!bool maybe", "not what its tag says"),
        ("a: !!timestamp soon", "not what its tag says"),
    ],
)
def test_damaged_yaml_is_named(tmp_path, content, said):
    file = written(tmp_path / "config.yaml", content)
    with pytest.raises(DamagedFile, match=said) as error:
        read_yaml(file, dict[str, Any])
    assert str(file) in str(error.value)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "fifo", tmp_path / "folder", tmp_path / "fifo" / "state.json"):
        with pytest.raises(DamagedFile, match=path.name):
            read_json(path, Counters)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with pytest.raises(DamagedFile, match="11 bytes, where 10 are the most"):
        read_bytes(written(tmp_path / "file", "x" * 11), largest=10)


def test_a_file_that_is_not_there_is_absent(tmp_path):
    assert read_json(tmp_path / "none", dict[str, Any], absent={}) == {}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", dict[str, Any])


def test_a_result_removes_what_its_killed_writers_left(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    stays = [
        tmp_path / f"report.html.{os.getppid()}.tmp",  # of a writer that is alive
        tmp_path / f"other.html.{ended.pid}.tmp",
        tmp_path / "report.html.old.tmp",
    ]
    left = tmp_path / f"report.html.{ended.pid}.tmp"
    for path in [left, *stays]:
        path.touch()
        os.utime(path, (0, 0))
    write_result(tmp_path / "report.html", "all of it")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "report.html", *stays])
    assert (tmp_path / "report.html").read_text() == "all of it"


def test_what_a_full_disk_refuses_is_named(tmp_path):
    """The error of a write has no name."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            write_atomically(tmp_path / "config.yaml", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.filename == str(tmp_path / "config.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe"])
def test_a_result_takes_the_place_of_no_device(tmp_path, kind):
    """As /dev/null, which root could replace."""
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    if kind == "pipe":
        os.mkfifo(out)
    if kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        out.symlink_to("pipe")
    before = os.lstat(out)
    with pytest.raises(OSError, match="no regular file"):
        write_result(out, "a report")
    assert os.lstat(out) == before and len(list(tmp_path.iterdir())) <= 2


@pytest.mark.parametrize("there", [True, False])
def test_a_result_goes_through_a_link(tmp_path, there):
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "report.html").write_text("an old one")
    (tmp_path / "report.html").symlink_to(disk / "report.html")
    write_result(tmp_path / "report.html", "a new one")
    assert (tmp_path / "report.html").is_symlink()
    assert (disk / "report.html").read_text() == "a new one"
