"""Tiny runs and how they are compared; run as a program, it trains in processes that start fast.

Torch takes seconds to import, and a test that kills a run many times pays for each start. The
program imports everything once, then forks for every start: what is killed is a process of its own
that runs the code of train.py from its first line."""

import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 32
TINY = [
    "model=tiny",
    "model.num_layers=1",
    "model.width=32",
    "model.max_length=64",
    "model.dropout=0.1",
    "batch.sequences=4",
    "batch.length=32",
    f"schedule.steps={STEPS}",
    "checkpoint.every=4",
    "evaluation.every=6",
    "evaluation.tokens=512",
    "evaluation.baselines=false",
    "evaluation.sample=0",
    "tracking.mode=off",
    "device=cpu",
]
TIMES = ("seconds", "perf/")  # what may differ between two runs that are the same


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run without its times; every line of the file is whole."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
        for line in lines
    ]


def tensors(run: Path, step: int = STEPS) -> dict[str, Any]:
    """Every tensor of a checkpoint, however many processes wrote it, by "<group>/<name>": weights,
    optimiser state, random state."""
    from model.checkpoint import TENSORS, files_of, open_tensors

    path = run / "checkpoints" / f"step_{step:08d}"
    groups = {
        group: open_tensors(path / name for name in files_of(group, os.listdir(path)))
        for group in TENSORS
    }
    assert groups["model"] and groups["optimizer"] and groups["random"]
    return {
        f"{group}/{name}": stored[...]
        for group, found in groups.items()
        for name, stored in found.items()
    }


def bits(tensor: Any) -> list[int]:
    """The bytes of a tensor."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_tensors(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape
        assert bits(tensor) == bits(other[name]), name


def assert_same_run(one: Path, other: Path) -> None:
    """Both ended with the same weights, optimiser and random state, and logged the same rows and
    summary, each step once."""
    assert_same_tensors(tensors(one), tensors(other))
    assert rows(one) == rows(other)
    assert [row["step"] for row in rows(one)] == list(range(STEPS + 1))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    assert summaries[0] | {"seconds": 0} == summaries[1] | {"seconds": 0}


def torchrun(world: int, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    """N processes on this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file of a folder, but for the lock's time."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes(),
            0 if path.name == "lock" else path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


class Server:
    """Starts runs in forks of one process, one at a time."""

    def __init__(self) -> None:
        command, environment = (
            [sys.executable, str(Path(__file__).resolve())],
            {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        *overrides: str,
        output: Path,
        file_size: int | None = None,
        variables: dict[str, str] | None = None,
    ) -> "Started":
        """Starts `python train.py OVERRIDES` with both its outputs in a file and more variables in
        its environment; it can write no file beyond `file_size` bytes."""
        assert self.process.stdin and self.process.stdout
        output.unlink(missing_ok=True)
        order = {
            "overrides": overrides,
            "output": str(output),
            "file_size": file_size,
            "variables": variables or {},
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Started(int(self.process.stdout.readline()), output, self.process.stdout)

    def close(self) -> None:
        """Ends the program."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Started:
    """A run under way."""

    def __init__(self, pid: int, output: Path, codes: Any) -> None:
        self.pid, self.output, self.codes = pid, output, codes

    def wait(self) -> int:
        """Its exit code, when it has one; -n if signal n ended it."""
        return int(self.codes.readline())

    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal, unless the run is over."""
        if not self.over():
            os.kill(self.pid, number)

    def over(self) -> bool:
        """Whether it has ended."""
        return bool(select.select([self.codes], [], [], 0)[0])

    def until(self, condition: Callable[[], Any], timeout: float = 30.0) -> bool:
        """Watches closely until the condition holds; False where the run ended before."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.said()
            if self.over():
                return bool(condition())
            time.sleep(0.0002)
        return True


def serve() -> None:
    """Reads orders from stdin; answers each with the pid of a process that trains and, when it has
    ended, its exit code."""
    import train
    from launch import config
    from model import GPT
    from optim import build_optimizer

    settings = config.compose(["model=tiny"])
    model = GPT(train.make_plan(settings).model)  # imports what torch imports late
    build_optimizer(model, settings.optim)
    del model
    gc.collect()
    gc.freeze()  # what was imported is shared by all forks: leave it alone
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1  # a fork takes over one thread only
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            file = os.open(order["output"], os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if order["file_size"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
            else:  # a limit that is set later ends it in the middle of a write
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os.environ.update(order["variables"])
            sys.argv = ["train.py", *order["overrides"]]
            config.main(train.main)
            sys.exit()
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
