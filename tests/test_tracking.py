"""metrics.jsonl holds every step once; the console follows it."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.schema import TrackingConfig
from data.files import write_atomically
from launch.run.folder import Counted, RowFile, read_rows
from launch.track.console import Console
from launch.track.tracker import Tracker, loss_at_flops

CONFIG = {
    "model": {"name": "tiny"},
    "optim": {"name": "sam", "rho": 0.05},
    "data": {"name": "stdlib"},
    "seed": 3,
}


def make_tracker(dir: Path) -> Tracker:
    return Tracker(dir, TrackingConfig(mode="off"), "my-run", CONFIG, None, Console(100, 10))


def strict_json(text: str):
    def reject(literal: str):
        raise ValueError(f"{literal} is not JSON")

    return json.loads(text, parse_constant=reject)


# The files


def test_rows_leave_out_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    # whole, but its end of line is missing: an append would run into it
    path.write_text('{"step": 1}\n{"step": 2}')
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
    file = RowFile(
        path, kept[-1]["step"] if kept else -1, counted(tmp_path, kept) if tells else None
    )
    assert read_rows(path) == kept and path.read_text().count("\n") == number
    file.append(more)
    file.close()
    assert read_rows(path) == [*kept, more] and file.counted == counted(tmp_path, [*kept, more])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        '{"step": 0}\n',
        "[0]\n[1]\n[2]\n",
        '{"step": 0}\n{"step": "2"}\n{"step": 4}\n',
        '{"step": 0}\n{"step": 3}\n{"step": 6}\n',
    ],
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
    with pytest.raises(
        ValueError,
        match=(
            r"metrics\.jsonl: No space left on device; make room on its disk and start the same"
            r" command again"
        ),
    ):
        file.append(ROWS[1])
    os.dup2(kept, file.descriptor)
    assert file.counted.rows == 1
    file.close()


@pytest.mark.parametrize(
    ("budget", "loss"), [(250, 3.5), (400, 2.0), (390, 2.0), (1e9, 2.0), (50, 5.0)]
)
def test_loss_at_equal_flops_lies_between_the_evaluations_around_it(budget, loss):
    """By hand: 250 lies in the middle of 200 and 300. 390 is within a twentieth of the end, and 50
    before the first evaluation."""
    rows = [
        {"flops": 100, "val/loss": 5.0},
        {"flops": 150, "train/loss": 9.0},
        {"flops": 200, "val/loss": 4.0},
        {"flops": 220, "val/loss": None},
        {"flops": 300, "val/loss": 3.0},
        {"flops": 400, "val/loss": 2.0},
    ]
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
    tracker.log(
        {
            "step": 1,
            "seconds": 0.5,
            "train/loss": float("nan"),
            "grad/norm": float("inf"),
            "optim/lr": 0.1,
        }
    )
    assert strict_json((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "seconds": 0.5,
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
        tracker.log(
            {"step": step, "seconds": step, "train/loss": 2.5, "perf/mfu": None}
            | ({"val/loss": 3.25} if step == 15 else {})
        )
        if step == 20:
            tracker.message("a message")
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("step 1/100", "step 11/100", "step 15/100", "a message", "step 25/100", "step 35/100")
    ]
    assert lines[2] == "step 15/100  loss 2.5000  val 3.2500  0:01:25 left"
    assert "val" not in lines[4]
    assert "\r" not in "".join(lines) and "\x1b" not in "".join(lines)


def test_the_time_left_counts_down_through_evaluations(tmp_path, monkeypatch, capsys):
    """A step takes 2 s and an evaluation 7, at the start, every 4 steps and at the end: what is
    shown is what is left, whatever came last."""
    clock = Clock(monkeypatch)
    console = Console(10, 4)
    ends, left = 1000.0 + 10 * 2 + 4 * 7, []
    for step in range(11):
        evaluated = step % 4 == 0 or step == 10
        clock.now += 2 * (step > 0) + 7 * evaluated
        console.row(
            {"step": step, "seconds": 50 + 2 * step} | ({"val/loss": 1.0} if evaluated else {})
        )
        left.append(console._left())
    assert (
        left
        == [
            None,
            *(
                ends - 1000 - 7 - 2 * step - 7 * (step // 4) - 7 * (step == 10)
                for step in range(1, 11)
            ),
        ]
        and left[-1] == 0
    )
    assert "0:00:11 left" in capsys.readouterr().out.splitlines()[2]


SCRIPT = f"""
import sys, time
from pathlib import Path
from conf.schema import TrackingConfig
from launch.track.console import Console
from launch.track.tracker import Tracker
console = Console(100, 25)
run = Tracker(Path(sys.argv[1]), TrackingConfig(mode="off"), "my-run", {CONFIG!r}, None, console)
run.message("the beginning")
for step in range(0, 101):
    row = {{"step": step, "seconds": step / 200, "train/loss": 5 - step / 100}}
    row |= {{"perf/tokens_per_second": 10.0 ** (step % 7 + 1), "perf/mfu": 0.415}}
    run.log(row | ({{"val/loss": 3 + step / 100}} if step % 25 == 0 else {{}}))
    time.sleep(0.01)
    if step == 50:
        run.message("warning: half way")
run.close()
run.message("the end")
"""


def shown(tmp_path: Path, columns: int, **environment: str) -> tuple[list[str], list[str]]:
    """What a terminal of this width gets: the lines that stay on it, and every state of the live
    line."""
    master, slave = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment},
    )
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
    drawn = [
        text
        for line in lines
        for text in line.split("\r")
        if re.search("^(\\x1b\\[32m)?[\u2588-\u258f ]+(\\x1b\\[0m)?  step ", text)
    ]
    return [line.split("\r")[-1] for line in lines], drawn


def test_a_terminal_keeps_evaluations_and_messages_above_one_live_line(tmp_path):
    """Its bar is as wide whatever stands beside it, and no redraw is wider than the terminal."""
    for columns in (60, 150):
        lines, drawn = shown(tmp_path, columns, NO_COLOR="1")
        assert [line.split("  ")[0] for line in lines[:6]] == [
            "the beginning",
            "step 0/100",
            "step 25/100",
            "step 50/100",
            "warning: half way",
            "step 75/100",
        ]
        assert (
            lines[6].startswith("step 100/100")
            and lines[7] == drawn[-1]
            and lines[8:] == ["the end", ""]
        ), lines
        assert 2 <= len(drawn) < 60  # not one per row
        assert {text.index("  step") for text in drawn} == {20} and all(
            len(text) < columns for text in drawn
        ), drawn
        assert "\x1b" not in "".join(lines + drawn)
    assert (
        "val 3.7500" in lines[5]
        and "step 100/100" in drawn[-1]
        and "0:00:00 left  1,000 tokens/s" in drawn[-1]
    )


def test_colours_are_for_terminals_that_want_them(tmp_path):
    lines, drawn = shown(tmp_path, 100)
    assert (
        any(line.startswith("\x1b[32mstep 25/100") for line in lines)
        and "\x1b[33mwarning: half way\x1b[0m" in lines
    )
    assert all("\x1b[32m" in text for text in drawn)
    assert not any("\x1b" in line for line in shown(tmp_path, 100, TERM="dumb")[0])
