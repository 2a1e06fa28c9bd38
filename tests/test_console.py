"""A view of a run never ends it: whatever becomes of its output, it trains, saves and finishes with
its summary."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train as training
from conf.cli import user_errors
from conf.exit_codes import EXIT_PREEMPTED
from conf.output import Harmless, end_quietly, harmless_output
from launch import config
from launch.track import messages
from tests.runs import ROOT


def train(
    tiny: list[str], folder: Path, stdout, code: str = "", **environment: str
) -> subprocess.Popen:
    """Starts a run of two steps with a sample at its end."""
    overrides = [
        *tiny,
        "schedule.steps=2",
        "checkpoint.every=1",
        "evaluation.every=1",
        "evaluation.sample=48",
        f"dir={folder}",
    ]
    script = (
        f"import sys\n{code}\nsys.argv = ['train.py', *sys.argv[1:]]\nimport train\nfrom launch"
        " import config\nconfig.main(train.main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *overrides],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )


def test_a_reader_that_goes_a_full_disk_and_a_poor_encoding_end_no_run(tiny, tmp_path):
    """Both outputs: a pipe that nobody reads, one whose reader leaves after a line, a full disk, a
    closed descriptor, a terminal of ASCII."""
    unread = train(tiny, tmp_path / "unread", subprocess.PIPE)
    unread.stdout.close()
    left = train(tiny, tmp_path / "left", subprocess.PIPE)
    left.stdout.readline()
    left.stdout.close()
    with open("/dev/full", "w") as full:
        full_disk = train(tiny, tmp_path / "full", full)
    closed = train(
        tiny, tmp_path / "closed", subprocess.DEVNULL, "import os; os.close(1); sys.stdout = None"
    )
    quoted = "a run [v2]"
    ascii_only = train(tiny, tmp_path / quoted, subprocess.PIPE, PYTHONIOENCODING="ascii")
    said = ascii_only.communicate(timeout=200)[0].decode("ascii")
    for name, run in {
        "unread": unread,
        "left": left,
        "full": full_disk,
        "closed": closed,
        quoted: ascii_only,
    }.items():
        assert run.wait(timeout=200) == 0, (name, said)
        assert json.loads((tmp_path / name / "summary.json").read_text())["step"] == 2, name
        assert (tmp_path / name / "checkpoints/step_00000002").exists(), name
    assert "a sample:" in said and "\\ufffd" in said and "run folder: " in said, said
    # The commands to try next are quoted for the shell.
    assert f"python -m model.sample 'run={tmp_path}/{quoted}' prompt=" in said
    assert f"python -m launch.evaluate 'run={tmp_path}/{quoted}'\n" in said


def test_the_summary_is_there_before_anything_is_shown(tiny, tmp_path, monkeypatch):
    def sample(*_, **__):
        assert (tmp_path / "run/summary.json").exists()
        raise OSError("no room for a sample")

    monkeypatch.setattr(messages, "generate", sample)
    with pytest.raises(OSError, match="no room for a sample"):
        training.main(
            config.compose(
                [*tiny, "schedule.steps=1", "evaluation.sample=8", f"dir={tmp_path}/run"]
            )
        )
    assert (
        training.main(
            config.compose(
                [*tiny, "schedule.steps=1", "evaluation.sample=8", f"dir={tmp_path}/run"]
            )
        )
        == 0
    )


def test_streams_come_back_and_lose_only_what_cannot_be_written(capsys, tmp_path):
    before = sys.stdout, sys.stderr
    with harmless_output():
        print("plain \udc80")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "plain \\udc80\n"
    with (tmp_path / "closed").open("w") as closed:
        pass
    assert Harmless(closed).write("four") == 4
    Harmless(closed).flush()


def ended(run) -> int:
    """The exit code of what is run as a command."""
    try:
        with user_errors():
            run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def mistake() -> None:
    raise ValueError("a mistake")


def test_a_command_whose_shell_has_closed_its_output_ends_as_any_other(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert ended(lambda: print("a line", flush=True)) == 0
    assert ended(mistake) == 2


def test_a_full_disk_under_a_command_is_named_and_changes_no_exit_code(monkeypatch, capsys):
    with open("/dev/full", "w") as full, open("/dev/full", "w") as other:
        monkeypatch.setattr(sys, "stdout", full)
        assert ended(lambda: print("a line")) == 2
        assert "error: stdout: No space left on device; make room" in capsys.readouterr().err
        # More than the stream holds back is lost where it is refused.
        assert ended(lambda: print("a line\n" * 20000)) == 2
        assert "error: stdout: No space left on device; make room" in capsys.readouterr().err
        monkeypatch.setattr(sys, "stderr", other)
        assert ended(mistake) == 2
        for stream in (full, other):
            end_quietly(stream)


def test_what_another_file_refuses_is_not_called_stdout(capsys):
    """A write names no file; what wrote it may."""

    def fill() -> None:
        with open("/dev/full", "w") as full:
            full.write("a line")

    assert ended(fill) == 2
    assert capsys.readouterr().err == (
        "error: No space left on device; make room there, and give the same command again\n"
    )


def test_a_limit_of_threads_is_one_line(capsys):
    def start() -> None:
        raise RuntimeError("can't start new thread")

    assert ended(start) == 2
    assert "raise the limit of processes, ulimit -u" in capsys.readouterr().err


def test_a_terminal_that_is_closed_stops_a_run_in_order(tiny, tmp_path):
    """Kernel and shell each send it a signal."""
    master, slave = pty.openpty()
    command = [sys.executable, "train.py", *tiny, f"dir={tmp_path}/run", "schedule.steps=100000"]
    run = subprocess.Popen(
        command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    said = b""
    while b"step 0/100000" not in said:
        said += os.read(master, 4096)
    os.close(master)
    for _ in range(2):
        run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=200) == EXIT_PREEMPTED
    assert list((tmp_path / "run/checkpoints").glob("step_*"))
