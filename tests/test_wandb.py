"""W&B holds every row of a run once, however often the run starts and whatever the network does,
and never holds a run up."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from conf.schema import TrackingConfig
from launch.run.folder import read_rows
from launch.track import wandb_run
from launch.track.console import Console
from launch.track.tracker import Tracker
from launch.track.wandb_run import last_step, read_records, records_of
from tests.runs import ROOT
from tests.wandb_server import Server

pytestmark = pytest.mark.usefixtures("no_wandb_account")
CONFIG = {
    "model": {"name": "tiny"},
    "optim": {"name": "sam", "rho": 0.05},
    "data": {"name": "stdlib"},
    "seed": 3,
}
# W&B keeps settings and a service per process, so each test of it has a process of its own, that
# runs this first.
PRELUDE = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
from conf.schema import TrackingConfig
from launch.track import wandb_run
from launch.track.console import Console
from launch.run.folder import read_rows
from launch.track.tracker import Tracker, send_rest
dir = Path(sys.argv[1])
dir.mkdir(exist_ok=True)
def tracker(mode, wandb_id=None, last_logged=-1, **keys):
    config = TrackingConfig(mode=mode, tags=["mine"], **{{"timeout": 30.0, **keys}})
    return Tracker(dir, config, "my-run", {CONFIG!r}, wandb_id, Console(100, 10), last_logged)
def row(step):
    return {{"step": step, "tokens": step * 64, "flops": 1e6 * step, "seconds": step / 8,
            "train/loss": 5 - step / 100, "sharpness/rho": 0.05}}
"""


@pytest.fixture
def run(tmp_path):
    """A run folder with a snapshot of its code."""
    return new_run(tmp_path)


def new_run(where: Path) -> Path:
    folder = where / "run"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "revision.txt").write_text("abc\n")
    return folder


def run_script(dir: Path, script: str, **environment: str) -> str:
    command = [sys.executable, "-c", PRELUDE + script, str(dir)]
    run = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert not [
        line
        for line in run.stderr.splitlines()
        if not line.startswith("wandb: Loading settings from ")
    ]
    return run.stdout


def start(
    dir: Path, mode: str, first: int, last: int, code: int, keys: str = "", **environment: str
) -> str:
    """One start of a run, which logs rows up to `last` and prints its W&B id in the end."""
    script = f"""
run = tracker({mode!r}, {keys})
for step in range({first}, {last + 1}):
    run.log(row(step))
run.close({code})
print(run.wandb_id)
"""
    return run_script(dir, script, **environment).splitlines()[-1]


def sync(dir: Path, *options: str, **environment: str) -> str:
    """What `wandb sync DIR/wandb/*run-*` says."""
    command = [Path(sys.executable).parent / "wandb", "sync", *options, *dir.glob("wandb/*run-*")]
    done = subprocess.run(
        command,
        cwd=dir,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def steps(rows: list[dict]) -> list[int]:
    """The steps of rows, which are W&B's own steps too."""
    assert [row["_step"] for row in rows] == [row["step"] for row in rows]
    return [row["step"] for row in rows]


def read_wandb(dir: Path) -> list[types.SimpleNamespace]:
    """What the starts of a run recorded offline, oldest first."""
    starts = []
    for path in records_of(dir):
        start = types.SimpleNamespace(
            rows=[],
            summary={},
            metrics={},
            run=None,
            config={},
            files=[],
            preempting=False,
            exit_code=None,
        )
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                start.run = record.run
                start.config = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            elif kind == "history":
                start.rows.append(
                    {
                        item.key or ".".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
            elif kind == "summary":
                start.summary |= {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.summary.update
                }
            elif kind == "metric":
                start.metrics[record.metric.name or record.metric.glob_name] = (
                    record.metric.step_metric
                )
            elif kind == "files":
                start.files += [file.path for file in record.files.files]
            elif kind == "preempting":
                start.preempting = True
            elif kind == "exit":
                start.exit_code = record.exit.exit_code
        starts.append(start)
    return starts


# Offline


@pytest.fixture(scope="module")
def recorded(no_wandb_account, tmp_path_factory):
    """A run of 301 rows that was recorded offline, and its W&B id."""
    run = new_run(tmp_path_factory.mktemp("recorded"))
    script = """
run = tracker("offline")
print(run.wandb_id)
for step in range(1, 301):
    run.log(row(step))
run.log({**row(301), "val/loss": float("nan")})
run.summary({"val/loss": 3.5, "val/loss_at_equal_flops": 3.75})
run.close(0)
"""
    return run, run_script(run, script).splitlines()[1]


def test_offline_run_holds_rows_config_axes_code_and_summary(recorded):
    run, wandb_id = recorded
    (start,) = read_wandb(run)
    assert steps(start.rows) == list(range(1, 302))
    assert (
        start.rows[9]
        | {
            "step": 10,
            "tokens": 640,
            "flops": 1e7,
            "seconds": 1.25,
            "train/loss": 4.9,
            "sharpness/rho": 0.05,
        }
        == start.rows[9]
    )
    assert "val/loss" not in start.rows[300]
    assert start.config | CONFIG == start.config
    assert start.metrics == {"step": "", "tokens": "", "flops": "", "seconds": "", "*": "step"}
    assert (start.summary["val/loss"], start.summary["val/loss_at_equal_flops"]) == (3.5, 3.75)
    assert "code/revision.txt" in start.files
    assert (next(run.glob("wandb/offline-run-*/files/code/revision.txt"))).read_text() == "abc\n"
    assert (start.run.run_id, start.run.display_name, start.run.project) == (
        wandb_id,
        "my-run",
        "flatgpt",
    )
    assert (start.run.run_group, start.run.job_type, list(start.run.tags)) == (
        "tiny-stdlib",
        "train",
        ["sam", "tiny", "mine"],
    )
    assert start.exit_code == 0
    assert not start.preempting


def test_last_step_is_found_from_any_block_and_in_what_is_left_of_a_file(
    recorded, tmp_path, monkeypatch
):
    (path,) = records_of(recorded[0])
    assert path.stat().st_size > 3 * wandb_run.BLOCK
    assert last_step(path) == 301
    for tail in (1, 2):
        monkeypatch.setattr(wandb_run, "TAIL", tail * wandb_run.BLOCK)
        assert last_step(path) == 301
    content, cut = path.read_bytes(), tmp_path / "cut.wandb"
    found = []
    for size in (0, 7, 40_000, 80_000, 80_001):
        cut.write_bytes(content[:size])
        found.append(last_step(cut))
    assert found[:2] == [-1, -1]
    assert 0 < found[2] < found[3] <= found[4] < 300
    cut.write_bytes(content[:80_000] + os.urandom(20_000))
    assert last_step(cut) >= found[3]


@pytest.fixture(scope="module")
def thrice(no_wandb_account, tmp_path_factory):
    """A run of three starts, and its W&B id: the second runs untracked from an older checkpoint,
    the third finds no checkpoint that knows the id."""
    run = new_run(tmp_path_factory.mktemp("thrice"))
    first = start(run, "offline", 1, 10, 75)
    untracked = Tracker(
        run, TrackingConfig(mode="off"), "my-run", CONFIG, first, Console(100, 10), 6
    )
    for step in range(7, 15):
        untracked.log(
            {
                "step": step,
                "tokens": step * 64,
                "flops": 1e6 * step,
                "seconds": step / 8,
                "train/loss": 5 - step / 100,
            }
        )
    untracked.close(75)
    assert start(run, "offline", 13, 16, 0, "last_logged=12") == first
    return run, first


def test_no_start_loses_or_doubles_a_row(thrice):
    run, wandb_id = thrice
    starts = read_wandb(run)
    assert [steps(start.rows) for start in starts] == [list(range(1, 11)), list(range(11, 17))]
    assert {start.run.run_id for start in starts} == {wandb_id}
    assert [start.preempting for start in starts] == [True, False]
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, 17))


# A server


def test_offline_starts_are_synced_by_one_command(thrice, tmp_path):
    run = shutil.copytree(thrice[0], tmp_path / "run", symlinks=True)
    with Server() as server:
        sync(run, **server.environment)
        stored = server.runs[thrice[1]]
        assert steps(stored.rows) == list(range(1, 17))
        assert (stored.exit_code, stored.summary["train/loss"]) == (0, 4.84)
        assert stored.config | CONFIG == stored.config
        given = {
            key: stored.fields[key]
            for key in ("displayName", "groupName", "jobType", "tags", "project")
        }
        assert given == {
            "displayName": "my-run",
            "groupName": "tiny-stdlib",
            "jobType": "train",
            "tags": ["sam", "tiny", "mine"],
            "project": "flatgpt",
        }
        assert stored.files["code/revision.txt"] == b"abc\n"


def test_online_start_takes_over_from_those_recorded_offline(thrice, tmp_path):
    """Nothing was uploaded in between, and what the online start has sent is not sent again by a
    sync."""
    run, wandb_id = shutil.copytree(thrice[0], tmp_path / "run", symlinks=True), thrice[1]
    with Server() as server:
        start(
            run, "online", 15, 19, 0, f"wandb_id={wandb_id!r}, last_logged=14", **server.environment
        )
        assert steps(server.runs[wandb_id].rows) == list(range(1, 20))
        assert "No runs to sync" in sync(run, "--include-online", **server.environment)
        assert steps(server.runs[wandb_id].rows) == list(range(1, 20))


class Forgetful(Server):
    """A server that never got the end of a run: it has two rows when the run goes on."""

    def resumed(self, name: str) -> dict[str, Any] | None:
        if name in self.runs:
            del self.runs[name].history[2:]
            self.runs[name].summary, self.runs[name].exit_code = {}, None
        return super().resumed(name)


def test_run_of_train_py_tells_wandb_what_it_is(tiny, tmp_path):
    """The first row is of step 0, the last of the end; a sweep gives the group. The same command
    again asks nobody, unless the server may lack something."""
    overrides = [
        f"dir={tmp_path}/run",
        "optim=sam",
        "schedule.steps=3",
        "evaluation.every=2",
        "tracking.mode=online",
        "tracking.group=sweep",
    ]
    script = f"""
import train
from launch.config import compose
settings = compose({[*tiny, *overrides]!r})
assert [train.main(settings), train.main(settings)] == [0, 0]
for path in wandb_run.records_of(dir):
    wandb_run.sent_mark(path).unlink()
assert train.main(settings) == 0
"""
    with Forgetful() as server:
        output = run_script(tmp_path / "run", script, OMP_NUM_THREADS="1", **server.environment)
    assert re.findall("^(?:finished already|W&B: http)", output, re.MULTILINE) == [
        "W&B: http",
        "finished already",
        "finished already",
        "W&B: http",
    ]
    (stored,) = server.runs.values()
    logged = read_rows(tmp_path / "run/metrics.jsonl")
    assert steps(stored.rows) == [row["step"] for row in logged] == [0, 1, 2, 3]
    for row, shown in zip(logged, stored.rows, strict=True):
        assert {
            name: value for name, value in row.items() if value is not None
        }.items() <= shown.items()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary.items() <= stored.summary.items() and "val/loss_at_equal_flops" in summary
    assert (stored.fields["groupName"], stored.fields["displayName"]) == ("sweep", summary["name"])
    assert list(stored.fields["tags"]) == ["sam", "tiny"]
    assert (stored.config["optim"]["rho"], stored.config["optim"]["num_groups"]) == (0.05, None)
    assert {
        "code/start_1/revision.txt",
        "code/start_1/diff.patch",
        "code/environment.json",
    } <= stored.files.keys()
    assert stored.exit_code == 0


ONLINE = """
wandb_run.FINISH = {finish}
run = tracker("online"{keys})
for line in sys.stdin:
    first, last = map(int, line.split())
    for step in range(first, last + 1):
        run.log(row(step))
    run.message("logged")
if {code} == 0:
    run.summary({{"val/loss": 3.5, "step": 6, "tokens": 6, "flops": 6, "seconds": 6.0}})
run.close({code})
print("closed")
"""


class Online:
    """A start of a run that W&B's server has heard of, and whose rows are logged when the test says
    so."""

    def __init__(
        self,
        dir: Path,
        environment: dict[str, str],
        keys: str = "",
        code: int = 0,
        finish: float = 30.0,
    ) -> None:
        script = PRELUDE + ONLINE.format(keys=keys, code=code, finish=finish)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(dir)],
            env={**os.environ, **environment},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.said = ""
        self.until("W&B: http")

    def until(self, beginning: str) -> None:
        """Reads what the run says up to the next line with this beginning."""
        assert self.process.stdout
        line = ""
        while not line.startswith(beginning):
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line

    def log(self, first: int, last: int) -> None:
        """Returns when the run has logged these rows."""
        assert self.process.stdin
        self.process.stdin.write(f"{first} {last}\n")
        self.process.stdin.flush()
        self.until("logged")

    def end(self) -> None:
        """Lets the run end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.stdin = None

    def close(self) -> str:
        """Waits until it has; returns all it has said."""
        self.said += self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0
        return self.said


def test_network_that_goes_away_costs_neither_the_run_nor_a_row(run):
    """In the second start it stays away until the run is stopped, in the third it comes back while
    the run ends."""
    with Server() as server:
        wandb_id = start(run, "online", 1, 5, 75, **server.environment)
        assert steps(server.runs[wandb_id].rows) == [1, 2, 3, 4, 5]
        second = Online(
            run, server.environment, f", wandb_id={wandb_id!r}, last_logged=4", code=75, finish=1.0
        )
    second.log(5, 10)
    assert re.search(
        r"W&B: tracking ended, .*; \S+/metrics.jsonl has every row; the run's own .*\nclosed\n",
        second.close(),
    )
    assert steps(server.runs[wandb_id].rows) == [1, 2, 3, 4, 5]
    with Server(server) as again:
        third = Online(run, again.environment, f", wandb_id={wandb_id!r}, last_logged=8")
        third.log(9, 12)
    third.log(13, 14)
    third.end()
    time.sleep(1.0)  # W&B tries in vain
    assert steps(again.runs[wandb_id].rows) == [1, 2, 3, 4, 5]
    with Server(again) as back:
        assert third.close().endswith("closed\n") and third.said.count("W&B: ") == 1
        assert list(back.runs) == [wandb_id]
        assert steps(back.runs[wandb_id].rows) == list(range(1, 15))
        assert back.runs[wandb_id].exit_code == 0


def test_the_same_command_sends_what_the_end_of_a_run_could_not(run):
    """The network is gone when the run ends, and still when it is started again; then it is
    back."""
    rest = f"""
for address in ("http://127.0.0.1:9", os.environ["WANDB_BASE_URL"], os.environ["WANDB_BASE_URL"]):
    os.environ["WANDB_BASE_URL"] = address
    send_rest(dir, TrackingConfig(timeout=2.0), "my-run", {CONFIG!r})
    print("asked")
"""
    with Server() as server:
        online = Online(
            run, server.environment | {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}, finish=1.0
        )
        (stored,) = server.runs.values()
        online.log(1, 3)
        end = time.monotonic() + 30
        while len(stored.history) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
    online.log(4, 6)
    online.end()
    ending = (
        r"W&B: tracking ended, .*/metrics.jsonl has every row; the run's own command \(in"
        r" \S+/code/environment.json\) sends W&B what it lacks\n"
    )
    assert re.search(ending + "closed\n$", online.close())
    assert (steps(stored.rows), stored.exit_code) == ([1, 2, 3], None)
    with Server(server) as back:
        assert re.fullmatch(
            f"{ending}asked\nW&B: {back.url}\\S+\nasked\nasked\n",
            run_script(run, rest, **back.environment),
        )
        assert (steps(stored.rows), stored.exit_code, stored.summary["val/loss"]) == (
            [1, 2, 3, 4, 5, 6],
            0,
            3.5,
        )
    assert list(back.runs.values()) == [stored] and list(run.glob("wandb/offline-*")) == []


def test_unreachable_server_neither_stops_nor_slows_a_run(run):
    """All rows are in the file before W&B has given up on the server; it then records them
    offline."""
    script = """
run = tracker("auto", timeout=1.0)
for step in range(1, 21):
    run.log(row(step))
run.message(f"{len(read_rows(dir / 'metrics.jsonl'))} rows")
run.close(0)
run.message("closed")
"""
    output = run_script(run, script, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)
    assert re.search(
        r"20 rows\n(.*\n)*W&B: recording offline, CommError.* uploads it\n(.*\n)*closed\n", output
    )
    (start,) = [start for start in read_wandb(run) if start.rows]
    assert steps(start.rows) == list(range(1, 21))
    assert start.metrics["*"] == "step"
    assert start.exit_code == 0


# What goes wrong


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
    run.settings = types.SimpleNamespace(
        mode="offline",
        **dict.fromkeys(
            ("run_id", "run_name", "project", "entity", "run_group", "run_tags", "run_job_type")
        ),
    )
    module = types.SimpleNamespace(
        **{name: method(name) for name in ("init", "setup", "teardown")}, Settings=dict
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize("failing", ["init", "define_metric", "log", "summary", "finish"])
def test_errors_of_wandb_are_told_once_and_go_no_further(tmp_path, monkeypatch, capsys, failing):
    install_wandb(monkeypatch, failing)
    tracker = Tracker(
        tmp_path, TrackingConfig(mode="offline"), "my-run", CONFIG, None, Console(100, 10)
    )
    for step in range(3):
        tracker.log({"step": step, "seconds": 0.5 * step})
    tracker.summary({"x": 1})
    tracker.close()
    assert capsys.readouterr().out.count("W&B: tracking ended, RuntimeError: W&B is broken;") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_close_does_not_wait_for_ever(tmp_path, monkeypatch, capsys):
    install_wandb(monkeypatch)
    monkeypatch.setattr(wandb_run, "FINISH", 0.1)
    wake = threading.Event()
    sys.modules["wandb"].init = lambda **_: wake.wait()  # type: ignore[attr-defined]
    config = TrackingConfig(mode="offline", timeout=0.1)
    tracker = Tracker(tmp_path, config, "my-run", CONFIG, None, Console(100, 10))
    tracker.close()
    assert "did not finish in time" in capsys.readouterr().out
    wake.set()


def test_without_a_key_nothing_is_tracked_and_nobody_waits(tmp_path):
    script = """
run = tracker("auto")
run.log(row(1))
run.close(0)
threads = [thread.name for thread in __import__("threading").enumerate()]
print(run.wandb_id, (dir / "wandb").exists(), threads)
"""
    said = (
        "W&B: tracking off, no key found (`wandb login` stores one); tracking.mode=offline records"
        " without one\n"
    )
    assert run_script(tmp_path, script).startswith(said)
    assert run_script(tmp_path, script).endswith("None False ['MainThread']\n")


ASK = """
import json, wandb
for mode, variables in json.loads(os.environ["ASKED"]):
    os.environ.update(variables)
    print(json.dumps(wandb_run.wandb_mode(mode)))
    wandb.teardown()
    for name in variables:
        del os.environ[name]
"""


def ask(dir: Path, *asked: tuple[str, dict[str, str]], **environment: str) -> list[tuple[str, str]]:
    """What W&B makes of each tracking.mode with these variables, and why."""
    return [
        tuple(json.loads(line))
        for line in run_script(dir, ASK, ASKED=json.dumps(asked), **environment).splitlines()
    ]


def test_wandb_says_which_mode_it_is_in(tmp_path):
    """In all the words of WANDB_MODE, which tracking.mode overrides; a wrong one costs a line."""
    key = {"WANDB_API_KEY": "a" * 40}
    words = {
        "online": "online",
        "run": "online",
        "offline": "offline",
        "dryrun": "offline",
        "disabled": "off",
        "ofline": "off",
    }
    found = ask(tmp_path, *(("auto", key | {"WANDB_MODE": word}) for word in words))
    assert [mode for mode, _ in found] == list(words.values())
    assert found[3][1] == "as WANDB_MODE or `wandb offline` asks"
    assert (
        found[5][1].startswith("WANDB_MODE=ofline: ")
        and "'disabled', 'dryrun' or 'run'" in found[5][1]
        and "\n" not in found[5][1]
        and found[5][1].endswith("; correct that variable or setting of W&B's")
    )
    asked = [
        ("auto", key),
        ("online", key | {"WANDB_MODE": "dryrun"}),
        ("offline", key),
        ("online", {"WANDB_MODE": "disabled"}),
        ("auto", {}),
        ("auto", {"WANDB_API_KEY": "short"}),
        ("online", {"WANDB_API_KEY": "short"}),
    ]
    found = ask(tmp_path, *asked)
    assert [mode for mode, _ in found] == [
        "online",
        "online",
        "offline",
        "offline",
        "off",
        "off",
        "offline",
    ]
    assert "WANDB_API_KEY invalid" in found[5][1] and "WANDB_API_KEY invalid" in found[6][1]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WANDB_MODE", "", "WANDB_MODE=: Input should be"),
        ("WANDB_TAGS", "t" * 65, f"WANDB_TAGS={'t' * 65}: Value error, Tag"),
        ("WANDB_PROJECT", "a/b", "Invalid project name 'a/b'"),
        ("WANDB_RUN_ID", "a/b", "Run ID cannot contain"),
        ("WANDB_SILENT", "maybe", "WANDB_SILENT=maybe: Input should be a valid boolean"),
    ],
)
def test_a_wrong_variable_of_wandbs_costs_a_line_whatever_the_mode(tmp_path, variable, value, said):
    script = """
for mode in ("auto", "online", "offline"):
    run = tracker(mode)
    run.log(row(1))
    run.close(0)
"""
    lines = run_script(tmp_path, script, WANDB_API_KEY="a" * 40, **{variable: value}).splitlines()
    lines = [line for line in lines if line.startswith("W&B: ")]
    assert len(lines) == 3 and len(set(lines)) == 1
    assert lines[0].startswith("W&B: tracking off, ") and said in lines[0]
    assert lines[0].endswith("; correct that variable or setting of W&B's")


def test_where_nothing_could_be_recorded_nothing_is_said_to_be(tmp_path):
    (tmp_path / "wandb").touch()
    said = run_script(tmp_path, "run = tracker('offline')\nrun.log(row(1))\nrun.close(0)\n")
    (line,) = [line for line in said.splitlines() if "tracking ended" in line]
    assert line.endswith(f"; {tmp_path}/metrics.jsonl has every row")


def test_an_id_of_wandbs_own_is_the_runs(tmp_path):
    """Until the run has one: WANDB_RUN_ID may be another run's by then."""
    script = "run = tracker('offline')\nrun.log(row(1))\nrun.close(0)\nprint(run.wandb_id)\n"
    assert run_script(tmp_path, script, WANDB_RUN_ID="mine").endswith("mine\n")
    assert run_script(tmp_path, script, WANDB_RUN_ID="theirs").endswith("mine\n")


def wandb_command(home: Path, *arguments: str) -> None:
    """Calls W&B's own command line."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NETRC", "WANDB_CONFIG_DIR")
    } | {"HOME": str(home)}
    subprocess.run(
        [Path(sys.executable).parent / "wandb", *arguments],
        cwd=home,
        env=environment,
        check=True,
        capture_output=True,
    )


def test_who_logged_in_by_wandbs_own_command_is_online_until_they_say_offline(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("NETRC")
    monkeypatch.delenv("WANDB_CONFIG_DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ask(tmp_path, ("auto", {}))[0][0] == "off"
    wandb_command(tmp_path, "login", "--no-verify", "a" * 40)
    assert (tmp_path / ".netrc").exists()
    elsewhere = {"WANDB_BASE_URL": "https://elsewhere.org"}
    assert [
        mode for mode, _ in ask(tmp_path, ("auto", {}), ("online", {}), ("auto", elsewhere))
    ] == ["online", "online", "off"]
    wandb_command(tmp_path, "offline")
    assert ask(tmp_path, ("auto", {}), ("online", {})) == [
        ("offline", "as WANDB_MODE or `wandb offline` asks"),
        ("online", "there is a key"),
    ]
    (tmp_path / ".netrc").write_text("not a netrc")
    wandb_command(tmp_path, "online")
    assert ask(tmp_path, ("auto", {}))[0][0] == "off"


def test_wandbs_own_variables_name_project_group_and_tags_unless_our_keys_do(tmp_path):
    theirs = {
        "WANDB_PROJECT": "my-project",
        "WANDB_ENTITY": "me",
        "WANDB_NAME": "first",
        "WANDB_RUN_GROUP": "radii",
        "WANDB_TAGS": "a,b",
        "WANDB_JOB_TYPE": "probe",
        "WANDB_MODE": "dryrun",
    }
    script = """
run = Tracker(dir, TrackingConfig(KEYS), "my-run", CONFIG, None, Console(100, 10))
run.log(row(1))
run.close(0)
""".replace("CONFIG", repr(CONFIG))
    assert "W&B: recording offline, as WANDB_MODE" in run_script(
        tmp_path / "theirs", script.replace("KEYS", ""), **theirs
    )
    ours = "project='p', entity='e', group='g', tags=['c']"
    run_script(tmp_path / "ours", script.replace("KEYS", ours), **theirs)
    found = []
    for folder in ("theirs", "ours"):
        (start,) = read_wandb(tmp_path / folder)
        run = start.run
        found.append(
            (run.project, run.entity, run.display_name, run.run_group, run.job_type, list(run.tags))
        )
    assert found == [
        ("my-project", "me", "first", "radii", "probe", ["sam", "tiny", "a", "b"]),
        ("p", "e", "first", "g", "probe", ["sam", "tiny", "c"]),
    ]
