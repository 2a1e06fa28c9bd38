"""Ends the processes of a run together: where one dies, fails or hangs, one line says which, and
the others do not wait for it.

A thread of every process writes every few seconds, for people and for the other processes, what its
process is doing:

    heartbeat/rank_<r>.json     rank, host, pid, phase, step, idle (seconds since it last got on),
                                overdue, progress_count, time
    heartbeat/failure.json      what ends the run, written once by the first process to find out:
                                by, code, line
    logs/stacks_rank<r>.txt     where every thread of a process stood that was given up

in the run folder, which all processes share. Until the tasks of a Slurm step have met, heartbeats
and a failure lie in a hidden folder beside that one, for it may be another run's yet. The main
thread counts whenever it gets on (`Liveness.report_phase`, `Layout.any_rank`), the same in the same
order on all processes, so that the one with the lowest count is the one that the others wait for.
Clocks of different hosts are not compared, and a stopped or sleeping machine counts no time."""

import contextlib
import faulthandler
import glob
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

from conf.exit_codes import EXIT_LOST, EXIT_USER_ERROR
from data.files import read_json
from launch.run.heartbeats import (
    Beat,
    Failure,
    Heartbeat,
    has_died,
    lost_contact,
    meeting_place,
    missing_tasks,
    names,
)
from launch.run.liveness import Liveness
from model.processes import AgreedError, Layout

BEAT = 2.0  # seconds between heartbeats

GRACE = 10.0  # seconds for a process to end in order once the run has failed

NEAR = (
    4  # beats without a heartbeat after which a process that is gone from this host counts as lost
)

FAR = 60  # the same for a process of another host: NFS may show a file as it was a minute ago

FAR_AT_FIRST = 35  # the same until they have met: there is no training to lose

GO_ON = "the same command goes on from the last checkpoint"


class Watchdog:
    """Watches the processes of a run from before they meet until they part; `minutes` is how long
    none of them may get on. One that is no more ends the run sooner: at once where a collective
    fails by it, else as soon as the heartbeats tell.

    A process that leaves by an exception leaves with one line on stderr and an exit code, of which
    only the first to fail speaks; the others end with its code. A process alone in its run is not
    watched, and only shows its heartbeat."""

    def __init__(self, folder: Path, layout: Layout, minutes: float) -> None:
        self.layout, self.minutes, self.limit = layout, minutes, 60 * minutes
        self.liveness = Liveness(layout)  # of this process, which reports its phases there
        self.heartbeat, self.logs = folder / "heartbeat", folder / "logs"
        self.meeting = meeting_place(folder) if layout.world > 1 else None
        self.place = self.meeting or self.heartbeat  # where the heartbeats are
        self.beat = min(BEAT, self.limit / 5)
        self.grace = min(GRACE, self.limit)
        self.shown = False  # whether there are heartbeats
        self.writing = threading.Lock()
        self.failure: dict[str, Any] | None = None  # what ends the run
        self.left = False  # whether an error of this process has had its say
        self.idle = 0.0  # seconds since the main thread last got on
        self.last_count = -1  # Liveness.progress_count at the beat before
        # All heartbeats as they were when this process became overdue.
        self.first_look: dict[int, Beat] | None = None
        self.written = 0  # heartbeats in a row that the disk took
        self.missed = 0  # looks in a row at which a task had no process
        self.still: dict[
            int, tuple[float, int]
        ] = {}  # of neighbours: their last heartbeat, and for how many beats it has been the last
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.meeting:
            # Without this folder nothing warns of a process that dies before they have met.
            with contextlib.suppress(OSError):
                self.meeting.mkdir(exist_ok=True)
                self.shown = True
                self._write()
        self.thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Ends the watch, unless the run failed: then the thread ends a process that does not end
        by itself."""
        if error is None or self.layout.world == 1:
            self.closing.set()
            self.thread.join()
            self._end_meeting()
        elif isinstance(error, Exception) and not self.left:
            try:
                self._leave(error)
            finally:
                self.liveness.report_phase("ended")
                self._write()
                if self.layout.main and self.shown:
                    self._await_the_others()
                self._end_meeting()

    @contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Shows heartbeats in the run folder, which belongs to this run from here on."""
        # Heartbeats of an earlier start would be taken for those of this one: they are gone before
        # anybody looks.
        if self.layout.main:
            shutil.rmtree(self.heartbeat, ignore_errors=True)
            self.heartbeat.mkdir()
        self.layout.any_rank(None)
        self.place = self.heartbeat
        self.shown = True
        self._write()
        # Once all have come here nobody writes where they met any more.
        self.layout.any_rank(None)
        self._end_meeting()
        try:
            yield
        except Exception as error:
            self._leave(error)
        finally:
            self.liveness.report_phase("ended")
            self._write()
            self._find_failure()
            with self.writing:
                self.shown = False
            if self.layout.main:
                self._await_the_others()
                shutil.rmtree(self.heartbeat, ignore_errors=True)

    def _end_meeting(self) -> None:
        """Removes where the processes showed themselves before they had met, and what starts left
        that were killed meanwhile."""
        if self.meeting and self.layout.main:
            for left in self.meeting.parent.glob(
                f"{glob.escape(self.meeting.name.rpartition('_')[0])}_*"
            ):
                shutil.rmtree(left, ignore_errors=True)

    # What a process says when it leaves

    def _leave(self, error: Exception) -> None:
        """Ends this process for an error:

        of a process alone, or agreed on by all    it is raised
        a collective that failed                   the process that was lost is to blame
        a user's mistake                           what all find wrong the main process says
        anything else                              it is raised, and ends the others
        """
        self.left = True
        if self.layout.world == 1 or isinstance(error, AgreedError):
            raise error
        if lost_contact(error):
            self._leave_for_another(error)
        if isinstance(error, ValueError):
            self._leave_for_a_mistake(error)
        self._publish(EXIT_LOST, f"{type(error).__name__}: {error}")
        say(f"rank {self.layout.rank}: {type(error).__name__}, which ends the run")
        raise error

    def _leave_for_another(self, error: Exception) -> NoReturn:
        """Ends this process with the code of the one that was lost."""
        failure = self._find_lost()
        # All are there: no process is to blame.
        if failure is None:
            raise error
        self._end_by(failure)

    def _leave_for_a_mistake(self, error: Exception) -> NoReturn:
        """Ends this process for a user's mistake, of which the first to find it speaks; the main
        process, where all find it."""
        main = self.layout.main
        # The main process speaks where all find the mistake, so the others give it a second.
        end = time.monotonic()
        if not main:
            end += 1.0
        while time.monotonic() < end and not self._find_failure():
            time.sleep(0.05)
        failure = self._publish(EXIT_USER_ERROR, str(error))
        is_first = failure["by"] == self.layout.rank
        if is_first and (main or os.environ.get("FLATGPT_TRACEBACK")):
            raise error
        self._end_by(failure)

    def _end_by(self, failure: dict[str, Any]) -> NoReturn:
        """Ends this process with the code of a failure, which the process that failed tells."""
        rank, line = self.layout.rank, failure.get("line", "")
        if failure["by"] == rank:
            is_mistake = failure["code"] == EXIT_USER_ERROR
            say(f"rank {rank}: {line}" if is_mistake else line)
        raise SystemExit(failure["code"]) from None

    def _find_lost(self) -> dict[str, Any] | None:
        """Returns what ended the run, after a collective failed: what another process has said by
        now, or that it died without a word."""
        if not self.shown:
            return self._publish(
                EXIT_LOST,
                f"rank {self.layout.rank}: another process ended while this one was"
                f" {self.liveness.phase}",
            )
        # The one that was lost is dead on this host, or its heartbeat stands still for four beats.
        before, end = self._read(), time.monotonic() + 4 * self.beat
        lost: list[int] = []
        while not (failure := self._find_failure()) and not lost and time.monotonic() < end:
            # The main process has left in order and cleared up.
            if not self.place.exists():
                return {"by": 0, "code": EXIT_LOST}
            time.sleep(0.1)
            lost = [rank for rank, seen in before.items() if has_died(seen)]
        if failure:
            return failure
        lost = lost or self._silent(before, self._read())
        if not lost:
            return None
        return self._publish(EXIT_LOST, f"{names(before, lost)} ended without a word; {GO_ON}")

    def _publish(self, code: int, line: str) -> dict[str, Any]:
        """Says what ends the run, and with which code the other processes end; returns what was
        said first, perhaps by another one."""
        # The file is made by one process only; those that come later read what the first has said.
        failure = {"by": self.layout.rank, "code": code, "line": " ".join(line.split())}
        if self.shown:
            with contextlib.suppress(OSError), (self.place / "failure.json").open("x") as file:
                json.dump(failure, file)
        self.failure = self._find_failure() or failure
        return self.failure

    def _find_failure(self) -> dict[str, Any] | None:
        """Returns what a process has said to end the run, None where none has."""
        if self.failure is None and self.shown:
            with contextlib.suppress(OSError, ValueError):  # it may not be whole yet
                self.failure = dict(read_json(self.place / "failure.json", Failure))
        return self.failure

    def _await_the_others(self) -> None:
        """Leaves the others time to write that they ended, and to read why."""
        end = time.monotonic() + self.grace / 2
        while time.monotonic() < end and any(
            seen["phase"] != "ended" and not has_died(seen) for seen in self._read().values()
        ):
            time.sleep(0.05)

    # The thread

    def _watch(self) -> None:
        """Looks at every beat whether this process gets on and the others are there."""
        while not self.closing.wait(self.beat):
            self._count_idle_time()
            self._write()
            # A process alone waits for nobody, however long a step of it takes.
            if self.layout.world == 1:
                continue
            if failure := self._find_failure():
                self._follow(failure)
            # While this process gets on it waits for nobody.
            if self.idle < NEAR * self.beat:
                self.still = {}
            elif line := self._lost_neighbour():
                self._end(line)
            self._judge_if_overdue()

    def _count_idle_time(self) -> None:
        """Counts for how long the main thread has not got on."""
        # In beats of this thread, not by a clock: a suspended process sleeps through no time.
        count = self.liveness.progress_count
        self.idle = self.idle + self.beat if count == self.last_count else 0.0
        self.last_count = count

    def _follow(self, failure: dict[str, Any]) -> NoReturn:
        """Ends this process after a failure, one that still has something to do in order."""
        # The main process lets go of the run folder, and one with a traceback prints it.
        holds_folder = self.layout.main and self.place == self.heartbeat
        if failure["by"] == self.layout.rank or holds_folder:
            self.closing.wait(self.grace)
        self._give_up(failure)

    def _judge_if_overdue(self) -> None:
        """Ends the run where this process waits beyond the limit, and two looks at all heartbeats,
        some beats apart, tell for whom."""
        if self.idle < self.limit:
            self.first_look = None
        elif self.first_look is None:
            self.first_look = self._read()
        elif self.idle >= self.limit + max(4 * self.beat, self.limit / 10):
            if line := self._judge(self.first_look, self._read()):
                self._end(line)
            # One that lives may take its time: it is asked again after half the limit.
            self.idle, self.first_look = self.limit / 2, None

    def _lost_neighbour(self) -> str | None:
        """Returns a line about the process beside this one, in the order of ranks, that is no more;
        None where both are there. It is asked at every beat while this process waits.

        Not every collective fails where a process dies: NCCL's wait on. Ranks go from host to host,
        so that mostly one neighbour runs on this host, where its death shows; but its number may be
        one in another container, and its heartbeat must stand still as well. Of another host only
        the heartbeat is seen, and where this process cannot write its own, that one may not be able
        to either."""
        if self.place == self.meeting and (line := self._missing_task()):
            return line
        if not self.shown:
            return None
        rank, world = self.layout.rank, self.layout.world
        beats = self._read((rank - 1) % world, (rank + 1) % world)
        for other, seen in beats.items():
            last, still = self.still.get(other, (None, 0))
            still += 1
            if seen["time"] != last:
                still = 0
            self.still[other] = seen["time"], still
            if seen["phase"] == "ended":
                continue
            if still >= NEAR and has_died(seen):
                return f"{names(beats, [other])} ended without a word; {GO_ON}"
            far = FAR_AT_FIRST
            if self.place == self.heartbeat:
                far = FAR
            if min(still, self.written) >= far and seen["host"] != socket.gethostname():
                return (
                    f"{names(beats, [other])} has shown no sign of life for {far * self.beat:g}"
                    f" seconds; {GO_ON}"
                )
        return None

    def _missing_task(self) -> str | None:
        """Returns which task of the Slurm step has no process, where that shows: it may have died
        before it could show itself."""
        missing = missing_tasks(self.layout)
        self.missed = self.missed + 1 if missing else 0
        if self.missed < NEAR:
            return None
        ranks = " and ".join(f"rank {rank}" for rank in missing)
        return (
            f"{ranks} has no process on {socket.gethostname()}, where the whole step runs: it ended"
            f" before it had loaded; {GO_ON}"
        )

    def _end(self, line: str) -> None:
        """Ends the run with what this process found, or what another one has said by now."""
        failure = self._publish(EXIT_LOST, line)
        if failure["by"] == self.layout.rank:
            say(failure["line"])
        self._give_up(failure)

    def _judge(self, before: dict[int, Beat], after: dict[int, Beat]) -> str | None:
        """Returns which process keeps this one waiting, from two looks at all heartbeats; None
        where one that lives may still take its time."""
        remedy = (
            f"stacks are in {self.logs}; {GO_ON}, and parallel.timeout={self.minutes:g} allows more"
        )
        if self.place != self.heartbeat or not self.shown:
            return (
                f"rank {self.layout.rank} of {self.layout.world} has been {self.liveness.phase} for"
                f" {self.minutes:g} minutes; start all of them within parallel.timeout, and check"
                " that they reach MASTER_ADDR and MASTER_PORT"
            )
        if lost := self._silent(before, after):
            return f"{names(after, lost)} shows no sign of life; {remedy}"
        if any(not seen["overdue"] and seen["phase"] != "ended" for seen in after.values()):
            return None
        # All count the same in the same order: the others wait for those that have counted least.
        fewest = min(seen["progress_count"] for seen in after.values())
        behind = [rank for rank, seen in after.items() if seen["progress_count"] == fewest]
        if len(behind) == len(after):
            return (
                f"all {len(after)} processes have been {self.liveness.phase} at step"
                f" {self.liveness.step} for {self.minutes:g} minutes; {remedy}"
            )
        return (
            f"{names(after, behind)} has not got on for {self.minutes:g} minutes while the others"
            f" wait; {remedy}"
        )

    def _silent(self, before: dict[int, Beat], after: dict[int, Beat]) -> list[int]:
        """Returns the ranks without a heartbeat between two looks."""
        # One that never showed itself has the same time, none, in both looks.
        nothing: Beat = {"phase": "", "time": None}
        seen = {
            rank: (before.get(rank, nothing), after.get(rank, nothing))
            for rank in range(self.layout.world)
        }
        return [
            rank
            for rank, (one, other) in seen.items()
            if other["phase"] != "ended" and one["time"] == other["time"]
        ]

    def _give_up(self, failure: dict[str, Any]) -> NoReturn:
        """Ends the process wherever its main thread stands, and notes where that is."""
        # The main thread may hang in the kernel for ever: its stack is all that can be had of it.
        with contextlib.suppress(OSError):
            self.logs.mkdir(exist_ok=True)
            with (self.logs / f"stacks_rank{self.layout.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        self.liveness.phase = "ended"
        self._write()
        if self.place != self.heartbeat and self.layout.main:
            self._await_the_others()
            self._end_meeting()
        sys.stdout.flush()
        os._exit(failure["code"])

    def _write(self) -> None:
        """Writes this process's heartbeat, where there are heartbeats."""
        layout = self.layout
        seen = {
            "rank": layout.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self.liveness.phase,
            "step": self.liveness.step,
            "idle": round(self.idle, 1),
            "overdue": self.idle >= self.limit * self.liveness.timeout_factor,
            "progress_count": self.liveness.progress_count,
            "time": time.time(),
        }
        # Written beside its name and renamed, so that a reader never sees a half; by one thread at
        # a time, since both write.
        partial = self.place / f".rank_{layout.rank}"
        with self.writing:
            if self.shown:
                try:
                    partial.write_text(json.dumps(seen))
                    partial.replace(self.place / f"rank_{layout.rank}.json")
                    self.written += 1
                except OSError:  # a file server may be away for a while
                    self.written = 0

    def _read(self, *ranks: int) -> dict[int, Beat]:
        """Returns the heartbeats of these ranks, by default of all, as far as they can be read."""
        found = {}
        for rank in ranks or range(self.layout.world):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = dict(read_json(self.place / f"rank_{rank}.json", Heartbeat))
        return found


def say(line: str) -> None:
    """Prints an error on stderr, in one line."""
    print(f"error: {line}", file=sys.stderr, flush=True)
