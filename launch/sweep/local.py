"""hydra/launcher=local: the runs of a sweep on this machine, some at a time, each in processes of
its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from types import FrameType

import torch

from conf.exit_codes import EXIT_PREEMPTED, IN_ORDER
from launch.run.folder import harm
from launch.run.preemption import caught_signals
from launch.sweep.jobs import PATIENCE, Job, reason

POLL = 0.1  # seconds between looks at the processes


class Running:
    """A run at work, in one or more processes."""

    def __init__(self, job: Job, shared: dict[str, str]) -> None:
        """Starts the processes. Raises OSError where one cannot be started; then none is left."""
        self.job, self.processes = job, list[subprocess.Popen]()
        # When the first process ended out of order, and its exit code.
        self.lost: tuple[float, int] | None = None
        try:
            for rank, group in enumerate(process_group(job.processes)):
                self.processes.append(job.start(rank, shared | group))
        except OSError:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends what is left of it."""
        for process in self.processes:
            process.kill()

    def poll(self) -> int | None:
        """Returns the exit code once all processes have ended.

        Where one ends out of order, the others are given PATIENCE seconds: they may not have met it
        yet, and would wait for it."""
        codes = [process.poll() for process in self.processes]
        for rank, code in enumerate(codes):
            if self.lost is None and code is not None and code not in IN_ORDER:
                self.lost = time.monotonic(), code
                if len(codes) > 1:
                    self.job.lost(rank, code)
        if None in codes:
            if self.lost and time.monotonic() - self.lost[0] > PATIENCE:
                self.kill()
            return None
        # The code of the first that was lost: the others may have ended by it.
        if self.lost:
            return self.lost[1]
        return next((code for code in codes if code), 0)


def begin(job: Job, shared: dict[str, str], waiting: int) -> Running | None:
    """Starts a run and says so; says why, and returns None, where it cannot be started."""
    try:
        run = Running(job, shared)
    except OSError as error:
        print(
            f"error: {job.run.name} cannot be started: {error.strerror}: {error.filename}",
            file=sys.stderr,
        )
        return None
    print(f"started {job.run.name}, {waiting} waiting; its log is {job.log()}", flush=True)
    return run


def run_all(jobs: list[Job], n_jobs: int | None) -> int:
    """Runs all jobs, `n_jobs` at a time (default: as many as have devices of their own), and says
    how each ended.

    A signal is passed on to the runs, which save and exit, and no more are started; a second one is
    passed on too. Returns the exit code of the sweep: 0, 1 where a run failed, EXIT_PREEMPTED where
    a signal stopped it or a run stopped by itself."""
    pool = Pool(jobs, n_jobs)

    def note(number: int, frame: FrameType | None) -> None:
        # No more than this: it may be the start of a run that is interrupted here.
        pool.signals.append(number)

    previous = {number: signal.signal(number, note) for number in caught_signals()}
    try:
        while pool.running or (pool.waiting and not pool.signals):
            pool.start_what_fits()
            pool.pass_on_signals()
            pool.look_at_runs()
            time.sleep(POLL)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return conclude(pool.ended, pool.signals)


class Pool:
    """The runs of a sweep on this machine.

    waiting     jobs that are not started yet
    running     runs by the slot that they take; a slot has devices of its own, where there are any
    slots       slots that are free
    ended       jobs that have ended, by how they did
    signals     signals that came
    num_sent    how many of them the runs were sent
    """

    def __init__(self, jobs: list[Job], n_jobs: int | None) -> None:
        self.devices, each = visible_devices(), max(job.processes for job in jobs)
        self.slots = list(range(n_jobs or max(1, len(self.devices) // each)))
        # Threads that wait for a busy core spin.
        threads = torch.get_num_threads() // (len(self.slots) * each)
        self.cores = {"OMP_NUM_THREADS": str(max(1, threads))}
        self.waiting = deque(jobs)
        self.running: dict[int, Running] = {}
        self.ended: dict[str, list[Job]] = {"done": [], "stopped": [], "failed": []}
        self.signals: list[int] = []
        self.num_sent = 0

    def start_what_fits(self) -> None:
        """Starts the next jobs while there is a slot, and until a signal came."""
        # A run that cannot be started leaves its slot to the next.
        while self.waiting and self.slots and not self.signals:
            job = self.waiting.popleft()
            shared = self.cores | visible(self.devices, self.slots[0], job.processes)
            if run := begin(job, shared, len(self.waiting)):
                self.running[self.slots.pop(0)] = run
            else:
                self.ended["failed"].append(job)

    def pass_on_signals(self) -> None:
        """Sends every process the signals that came since the last time."""
        for number in self.signals[self.num_sent :]:
            for run in self.running.values():
                for process in run.processes:
                    process.send_signal(number)
            self.num_sent += 1

    def look_at_runs(self) -> None:
        """Notes and says how runs ended that have."""
        for slot, run in list(self.running.items()):
            code = run.poll()
            if code is None:
                continue
            run.job.ended(code)
            del self.running[slot]
            self.slots.append(slot)
            how = self.how_it_ended(code)
            self.ended[how].append(run.job)
            print(f"{how} {run.job.run.name}", flush=True)
            if text := harm(run.job.run / "metrics.jsonl"):
                print(f"warning: {run.job.run.name}: {text}", flush=True)

    def how_it_ended(self, code: int) -> str:
        """Returns done, stopped or failed for the exit code of a run."""
        if code == 0:
            return "done"
        if self.signals or code == EXIT_PREEMPTED:
            return "stopped"
        return "failed"


def conclude(ended: dict[str, list[Job]], signals: list[int]) -> int:
    """Says what failed, and how to go on; returns the exit code of the sweep."""
    for job in ended["failed"]:
        line, log = reason(job)
        print(f"failed: {job.run.name}: {line}; see {log}", file=sys.stderr)
    if ended["stopped"] or signals:
        cause = f": {len(ended['stopped'])} runs saved"
        if signals:
            cause = f" by {signal.Signals(signals[0]).name}"
        print(f"stopped{cause}; the same command goes on", file=sys.stderr)
    # A signal explains a failure: the run may have been ended before it could save.
    if ended["failed"] and not signals:
        return 1
    if signals or ended["stopped"]:
        return EXIT_PREEMPTED
    return 0


def visible_devices() -> list[str]:
    """Returns the GPUs that runs share out among them, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    # An empty variable hides all of them.
    return [name for name in named.split(",") if name]


def visible(devices: list[str], slot: int, processes: int) -> dict[str, str]:
    """Returns the devices of a run: a slot has the next ones after those of the slot before, from
    the first again where there are too few."""
    if not devices:
        return {}
    first = slot * processes
    # Each once, though several processes of a run may share one.
    chosen = dict.fromkeys(devices[(first + rank) % len(devices)] for rank in range(processes))
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def process_group(processes: int) -> list[dict[str, str]]:
    """Returns the variables by which the processes of a run find each other, those that torchrun
    sets; nothing for one alone.

    torchrun itself would end by an exit code of its own where the run says that it saved."""
    if processes == 1:
        return [{}]
    # Free at this moment; the processes bind it a moment later.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
