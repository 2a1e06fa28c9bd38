"""metrics.jsonl holds every step once; the console and W&B follow it and never hold a run up."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from conf.schema import TrackingConfig
from launch import tracking
from launch.tracking import Tracker, cut_metrics, read_rows, wandb_mode, write_atomically

CONFIG = {"model": {"name": "tiny"}, "optim": {"name": "sam", "rho": 0.05}, "data": {"name": "stdlib"}, "seed": 3}
# W&B keeps settings and a service per process, so each test of it has a process of its own, that runs this first.
PRELUDE = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
from conf.schema import TrackingConfig
from launch.tracking import Tracker, read_rows
dir = Path(sys.argv[1])
def tracker(mode, wandb_id=None, resumed_step=-1, **keys):
    return Tracker(dir, TrackingConfig(mode=mode, tags=["mine"], **keys), "my-run", {CONFIG!r}, wandb_id, 100, resumed_step)
def row(step):
    return {{"step": step, "tokens": step * 64, "flops": 1e6 * step, "seconds": step / 8, "train/loss": 5 - step / 100,
            "sharpness/rho": 0.05}}
"""


@pytest.fixture(autouse=True)
def no_wandb_account(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def run_script(dir: Path, script: str, **environment: str) -> str:
    command = [sys.executable, "-c", PRELUDE + script, str(dir)]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


def make_tracker(dir: Path, mode: str = "off", **keys) -> Tracker:
    arguments = {"wandb_id": None, "total_steps": 100, **keys}
    return Tracker(dir, TrackingConfig(mode=mode), "my-run", CONFIG, **arguments)


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


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (0, [0]), (4, [0, 2, 4]), (5, [0, 2, 4]), (99, [0, 2, 4, 6])])
def test_cut_keeps_rows_up_to_a_step(tmp_path, step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "train/loss": s / 7}) + "\n" for s in (0, 2, 4, 6)) + '{"step": 8, "tr')
    assert cut_metrics(path, step) == 6
    assert read_rows(path) == [{"step": s, "train/loss": s / 7} for s in kept]
    assert path.read_text().count("\n") == len(kept)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_cut_of_no_file_makes_an_empty_one(tmp_path):
    assert cut_metrics(tmp_path / "metrics.jsonl", 5) == -1
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fsync(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


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
    script = """
run = tracker("off")
for step in range(1, 101):
    run.log({**row(step), "perf/tokens_per_second": 81234.5, "perf/mfu": 0.415})
    time.sleep(0.005)
    if step == 50:
        run.message("half way")
run.close()
run.message("the end")
"""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60"}
    run = subprocess.Popen([sys.executable, "-c", PRELUDE + script, str(tmp_path)], stdout=slave, env=environment)
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


# W&B


def wandb_records(path: Path):
    """The records of a .wandb file: 7 bytes of header, then a LevelDB log of protobufs in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at run time

    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # too short for a header: padding
            position += left
            continue
        _crc, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_wandb(dir: Path) -> list[types.SimpleNamespace]:
    """What the starts of a run recorded offline, oldest first."""
    starts = []
    for path in sorted(dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        start = types.SimpleNamespace(rows=[], summary={}, metrics={}, run=None, config={}, preempting=False, exit_code=None)
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                start.run = record.run
                start.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                start.rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            elif kind == "summary":
                start.summary |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "metric":
                start.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif kind == "preempting":
                start.preempting = True
            elif kind == "exit":
                start.exit_code = record.exit.exit_code
        starts.append(start)
    return starts


def test_offline_run_holds_rows_config_axes_and_summary(tmp_path):
    script = """
run = tracker("offline")
print(run.wandb_id)
for step in range(1, 301):
    run.log(row(step))
run.log({**row(301), "val/loss": float("nan")})
run.summary({"val/loss": 3.5})
run.close(0)
"""
    wandb_id = run_script(tmp_path, script).splitlines()[0]
    (start,) = read_wandb(tmp_path)
    assert [row["step"] for row in start.rows] == list(range(1, 302))
    assert start.rows[9] | {"step": 10, "tokens": 640, "flops": 1e7, "seconds": 1.25, "train/loss": 4.9, "sharpness/rho": 0.05} == start.rows[9]
    assert "val/loss" not in start.rows[300]
    assert start.config | CONFIG == start.config
    assert start.metrics == {"step": "", "tokens": "", "flops": "", "seconds": "", "*": "step"}
    assert start.summary["val/loss"] == 3.5
    assert (start.run.run_id, start.run.display_name, start.run.project) == (wandb_id, "my-run", "flatgpt")
    assert (start.run.run_group, start.run.job_type, list(start.run.tags)) == (
        "tiny-stdlib",
        "train",
        ["sam", "tiny", "mine"],
    )
    assert start.exit_code == 0
    assert not start.preempting


def test_resumed_run_has_no_step_twice(tmp_path):
    first = """
run = tracker("offline")
for step in range(1, 11):
    run.log(row(step))
run.close(75)
print(run.wandb_id)
"""
    wandb_id = run_script(tmp_path, first).splitlines()[-1]
    second = f"""
run = tracker("offline", wandb_id={wandb_id!r}, resumed_step=6)
for step in range(7, 13):
    run.log(row(step))
run.close(0)
"""
    run_script(tmp_path, second)
    starts = read_wandb(tmp_path)
    assert [[row["step"] for row in start.rows] for start in starts] == [list(range(1, 11)), [11, 12]]
    assert {start.run.run_id for start in starts} == {wandb_id}
    assert [start.preempting for start in starts] == [True, False]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 13))


def test_rows_before_the_first_tracked_start_do_not_count_as_sent(tmp_path, monkeypatch):
    calls = install_wandb(monkeypatch)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    tracker = make_tracker(tmp_path, "offline", resumed_step=1)
    tracker.log({"step": 2})
    tracker.close()
    assert ("log", {"step": 2}) in calls


def test_unreachable_server_neither_stops_nor_slows_a_run(tmp_path):
    """All rows are in the file before W&B has given up on the server; it then records them offline."""
    script = """
run = tracker("auto", timeout=1.0)
for step in range(1, 21):
    run.log(row(step))
run.message(f"{len(read_rows(dir / 'metrics.jsonl'))} rows")
run.close(0)
run.message("closed")
"""
    output = run_script(tmp_path, script, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)
    assert re.search(r"20 rows\n(.*\n)*W&B: recording offline, CommError.* uploads what was recorded\n(.*\n)*closed\n", output)
    (start,) = read_wandb(tmp_path)
    assert [row["step"] for row in start.rows] == list(range(1, 21))
    assert start.metrics["*"] == "step"
    assert start.exit_code == 0


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the service in /proc")
def test_run_survives_the_end_of_wandbs_service(tmp_path):
    """Slurm sends SIGTERM to every process of a job, and W&B's service dies of it."""
    script = """
run = tracker("offline")
run.log(row(1))
while not any((dir / "wandb").glob("offline-run-*/*.wandb")):
    time.sleep(0.05)
time.sleep(0.5)
for process in Path("/proc").glob("[0-9]*"):
    try:
        parent, name = (process / "stat").read_text().split()[3], (process / "cmdline").read_text()
    except OSError:
        continue
    if parent == str(os.getpid()) and "wandb-core" in name:
        os.kill(int(process.name), signal.SIGTERM)
        while (process / "stat").exists() and (process / "stat").read_text().split()[2] != "Z":
            time.sleep(0.05)
run.log(row(2))
run.log(row(3))
run.close(75)
run.message("closed")
"""
    output = run_script(tmp_path, script)
    assert output.count("W&B: tracking ended") == 1
    assert output.endswith("closed\n")
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def install_wandb(monkeypatch, failing: str = "") -> list:
    """Puts a W&B in place that lists the calls it gets and fails in one of them."""
    calls: list = []

    def method(name):
        def call(*arguments, **keys):
            calls.append((name, *arguments))
            if name == failing:
                raise RuntimeError("W&B is broken\nin many lines")
            return run

        return call

    run = types.SimpleNamespace(
        **{name: method(name) for name in ("log", "finish", "define_metric", "mark_preempting")},
        summary=types.SimpleNamespace(update=method("summary")),
        url="https://wandb.ai/x",
    )
    module = types.SimpleNamespace(**{name: method(name) for name in ("init", "setup", "teardown")}, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize("failing", ["init", "setup", "define_metric", "log", "summary", "finish"])
def test_errors_of_wandb_are_told_once_and_go_no_further(tmp_path, monkeypatch, capsys, failing):
    install_wandb(monkeypatch, failing)
    tracker = make_tracker(tmp_path, "offline")
    for step in range(3):
        tracker.log({"step": step})
    tracker.summary({"x": 1})
    tracker.close()
    assert capsys.readouterr().out.count("W&B: tracking ended, RuntimeError: W&B is broken;") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_close_does_not_wait_for_ever(tmp_path, monkeypatch, capsys):
    install_wandb(monkeypatch)
    monkeypatch.setattr(tracking, "FINISH", 0.1)
    wake = threading.Event()
    sys.modules["wandb"].init = lambda **_: wake.wait()  # type: ignore[attr-defined]
    config = TrackingConfig(mode="offline", timeout=0.1)
    tracker = Tracker(tmp_path, config, "my-run", CONFIG, None, 100)
    tracker.close()
    assert "did not finish in time" in capsys.readouterr().out
    wake.set()


def test_without_a_key_wandb_is_not_even_imported(tmp_path):
    script = """
run = tracker("auto")
run.log(row(1))
run.close(0)
print("wandb" in sys.modules, run.wandb_id, (dir / "wandb").exists())
"""
    output = run_script(tmp_path, script)
    assert output.startswith("W&B: no key found, tracking off (tracking.mode=offline records without one)\n")
    assert output.endswith("False None False\n")


def test_mode_follows_the_config_then_the_environment_then_the_keys(tmp_path, monkeypatch):
    assert wandb_mode("auto")[0] == "off"
    assert wandb_mode("offline") == ("offline", None)
    assert wandb_mode("online")[0] == "offline"  # W&B would stop to ask for a key
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert wandb_mode("auto") == ("online", None)
    assert wandb_mode("online") == ("online", None)
    assert wandb_mode("off") == ("off", None)
    for value, mode in {"offline": "offline", "disabled": "off", "online": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", value)
        assert wandb_mode("auto") == (mode, None)
        assert wandb_mode("online") == ("online", None)


def test_keys_are_found_where_wandb_login_leaves_them(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine elsewhere.org\n  login user\n  password abc\n")
    assert not tracking.has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.org")
    assert tracking.has_wandb_key()
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = tmp_path / "wandb-settings" / "settings"
    settings.parent.mkdir()
    settings.write_text("[default]\nbase_url = https://elsewhere.org\n")
    assert tracking.has_wandb_key()
    netrc.write_text("not a netrc")
    assert not tracking.has_wandb_key()
    settings.write_text(f"[default]\napi_key = {'a' * 40}\n")
    assert tracking.has_wandb_key()
