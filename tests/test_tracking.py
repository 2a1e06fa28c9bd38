"""metrics.jsonl holds every step once; the console follows it."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.schema import TrackingConfig
from data.files import write_atomically
from launch.folder import Counted, RowFile, read_rows
from launch.tracking import Tracker, loss_at_flops

CONFIG = {"model": {"name": "tiny"}, "optim": {"name": "sam", "rho": 0.05}, "data": {"name": "stdlib"}, "seed": 3}


def make_tracker(dir: Path) -> Tracker:
    return Tracker(dir, TrackingConfig(mode="off"), "my-run", CONFIG, None, 100)


def strict_json(text: str):
    def reject(literal: str):
        raise ValueError(f"{literal} is not JSON")

    return json.loads(text, parse_constant=reject)


# The files


def test_rows_leave_out_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but its end of line is missing: an append would run into it
    assert read_rows(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n\xff\0\0')
    assert read_rows(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="damaged"):
        read_rows(path)


ROWS = [{"step": step, "train/loss": step / 7} for step in (0, 2, 4, 6)]


def write_rows(file: Path, rows: list[dict[str, Any]], torn: str = "") -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return file


def counted(tmp_path: Path, rows: list[dict[str, Any]]) -> Counted:
    """What a checkpoint that was made after these rows counts."""
    file = RowFile(tmp_path / "counted.jsonl", -1, None)
    for row in rows:
        file.append(row)
    file.close()
    (tmp_path / "counted.jsonl").unlink()
    return file.counted


@pytest.mark.parametrize("number", [0, 1, 3, 4])
@pytest.mark.parametrize("tells", [True, False])
def test_a_resume_keeps_the_rows_that_the_checkpoint_counts(tmp_path, number, tells):
    """One made before checkpoints counted rows knows the step of the last one."""
    path = write_rows(tmp_path / "metrics.jsonl", ROWS, '{"step": 8, "tr')
    kept, more = ROWS[:number], {"step": 99}
    file = RowFile(path, kept[-1]["step"] if kept else -1, counted(tmp_path, kept) if tells else None)
    assert read_rows(path) == kept and path.read_text().count("\n") == number
    file.append(more)
    file.close()
    assert read_rows(path) == [*kept, more] and file.counted == counted(tmp_path, [*kept, more])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(
    "content", [None, "", '{"step": 0}\n', "[0]\n[1]\n[2]\n", '{"step": 0}\n{"step": "2"}\n{"step": 4}\n', '{"step": 0}\n{"step": 3}\n{"step": 6}\n']
)
def test_rows_that_a_checkpoint_counts_and_are_gone_are_missed(tmp_path, tells, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl") as error:
        RowFile(path, 4, counted(tmp_path, ROWS[:3]) if tells else None)
    assert "\n" not in str(error.value)
    assert (path.read_text() if path.exists() else None) == content


def test_a_row_that_the_disk_refuses_is_one_line(tmp_path):
    file = RowFile(tmp_path / "metrics.jsonl", -1, None)
    file.append(ROWS[0])
    kept = os.dup(file.descriptor)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.descriptor)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: No space left on device; make room on its disk and start the same command again"):
        file.append(ROWS[1])
    os.dup2(kept, file.descriptor)
    assert file.counted.rows == 1
    file.close()


@pytest.mark.parametrize(("budget", "loss"), [(250, 3.5), (400, 2.0), (390, 2.0), (1e9, 2.0), (50, 5.0)])
def test_loss_at_equal_flops_lies_between_the_evaluations_around_it(budget, loss):
    """By hand: 250 lies in the middle of 200 and 300. 390 is within a twentieth of the end, and 50 before the first evaluation."""
    rows = [{"flops": 100, "val/loss": 5.0}, {"flops": 150, "train/loss": 9.0}, {"flops": 200, "val/loss": 4.0}, {"flops": 220, "val/loss": None},
            {"flops": 300, "val/loss": 3.0}, {"flops": 400, "val/loss": 2.0}]  # fmt: skip
    assert loss_at_flops(rows, budget) == pytest.approx(loss)


def test_loss_at_equal_flops_is_not_made_up():
    assert loss_at_flops([{"flops": 100, "val/loss": None}, {"flops": 200}], 150) is None


def test_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fsync(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_each_row_is_strict_json_in_the_file_at_once(tmp_path):
    tracker = make_tracker(tmp_path)
    tracker.log({"step": 1, "train/loss": float("nan"), "grad/norm": float("inf"), "optim/lr": 0.1})
    assert strict_json((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "train/loss": None,
        "grad/norm": None,
        "optim/lr": 0.1,
    }
    assert not (tmp_path / "summary.json").exists()
    tracker.summary({"val/loss": float("inf"), "steps": [1, float("-inf")], "nested": {"x": 2.5}})
    assert strict_json((tmp_path / "summary.json").read_text()) == {
        "val/loss": None,
        "steps": [1, None],
        "nested": {"x": 2.5},
    }
    tracker.close()
    assert tracker.wandb_id is None


# The console


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_pipe_gets_plain_lines_now_and_then(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    tracker = make_tracker(tmp_path)
    for step in range(1, 36):
        clock.now += 1
        tracker.log({"step": step, "train/loss": 2.5, "perf/mfu": None} | ({"val/loss": 3.25} if step == 15 else {}))
        if step == 20:
            tracker.message("a message")
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [*("step 1/100", "step 11/100", "step 15/100", "a message", "step 25/100", "step 35/100")]
    assert lines[2] == "step 15/100  loss 2.5000  val 3.2500  0:01:25 left"
    assert "val" not in lines[4]
    assert "\r" not in "".join(lines)


def test_terminal_gets_one_live_line(tmp_path):
    """On a real terminal, 60 columns wide: every redraw stays on its line, and a message does not tear it."""
    script = f"""
import sys, time
from pathlib import Path
from conf.schema import TrackingConfig
from launch.tracking import Tracker
run = Tracker(Path(sys.argv[1]), TrackingConfig(mode="off"), "my-run", {CONFIG!r}, None, 100)
for step in range(1, 101):
    run.log({{"step": step, "train/loss": 5 - step / 100, "perf/tokens_per_second": 81234.5, "perf/mfu": 0.415}})
    time.sleep(0.005)
    if step == 50:
        run.message("half way")
run.close()
run.message("the end")
"""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60"}
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=slave, env=environment)
    os.close(slave)
    output = b""
    try:
        while chunk := os.read(master, 4096):
            output += chunk
    except OSError:  # how Linux tells that the other end is closed
        pass
    os.close(master)
    assert run.wait() == 0
    lines = output.decode().replace("\r\n", "\n").split("\n")
    assert len(lines) == 4
    first, last, end, rest = lines
    assert first.endswith("\r\x1b[Khalf way")
    assert (end, rest) == ("\r\x1b[Kthe end", "")
    redraws = [text.removesuffix("\x1b[K") for text in (first + last).split("\r") if "step" in text]
    assert 2 <= len(redraws) < 50  # not one per row
    assert all(len(text) < 60 for text in redraws)
    assert "step 100/100" in redraws[-1]


def test_wide_terminal_shows_a_bar_and_everything(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "150")
    tracker = make_tracker(tmp_path)
    tracker.log({"step": 10, "val/loss": 3.25})
    clock.now += 40
    row = {"step": 50, "train/loss": 2.5, "perf/tokens_per_second": 81234.5, "perf/mfu": 0.415, "skipped": 2}
    tracker.log(row)
    expected = "step 50/100  loss 2.5000  val 3.2500  81,234 tokens/s  MFU 41.5%  skipped 2  0:00:50 left"
    assert capsys.readouterr().out.split("\r")[-1] == f"[##########..........]  {expected}\x1b[K"
    tracker.close()
