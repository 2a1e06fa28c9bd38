"""A run on W&B: the same run however often it is started, with every row once, whatever the network
does."""

import contextlib
import re
import shlex
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from conf.exit_codes import EXIT_PREEMPTED

PROJECT = "flatgpt"  # where neither tracking.project nor W&B names one
FINISH = 15.0  # seconds W&B gets to upload what is left at the end
AXES = ("step", "tokens", "flops", "seconds")  # x axes of W&B charts
BLOCK = 32768  # bytes of a block of a .wandb file
TAIL = 128 * BLOCK  # where its last row is looked for first


def wandb_mode(mode: str) -> tuple[str, str]:
    """Returns online, offline or off for a tracking.mode, and why, in words for the user.

    W&B itself says whether there is a key and, under `auto`, which mode its environment variables
    and settings files ask for."""
    if mode == "off":
        return "off", "as tracking.mode asks"
    found, why = _ask(mode)
    if found == "off":
        with contextlib.suppress(Exception):
            _teardown()
    return found, why


def _ask(mode: str) -> tuple[str, str]:
    try:
        asked = wandb_settings(None if mode == "auto" else mode).mode
    except Exception as error:
        # With wrong settings W&B starts in no mode at all.
        return "off", str(error)
    if asked == "disabled":
        return "off", "as WANDB_MODE or `wandb disabled` asks"
    if asked in ("offline", "dryrun"):
        asking = "WANDB_MODE or `wandb offline`" if mode == "auto" else "tracking.mode"
        return "offline", f"as {asking} asks"
    try:
        import wandb

        if wandb.login(prompt=False, verify=False):
            return "online", "there is a key"
        why = "no key found (`wandb login` stores one)"
    except Exception as error:  # no error of W&B's is worth a run
        why = _faults(error) or _first_line(error)
    # Who asked for W&B gets a record that can be uploaded later, who did not gets none.
    if mode == "auto":
        return "off", f"{why}; tracking.mode=offline records without one"
    return "offline", why


def _faults(error: Exception) -> str:
    """Returns the settings of W&B that pydantic finds wrong: variable, value and reason."""
    list_faults = getattr(error, "errors", list)
    return "; ".join(
        f"{_variable(fault['loc'][0])}={_as_typed(fault['input'])}: {fault['msg']}"
        for fault in list_faults()
        if fault["loc"]
    )


def _variable(setting: str) -> str:
    """Returns the environment variable of a setting of W&B's."""
    # The variables of these leave "run" out, and that of x_name is WANDB__NAME.
    shortened = ("run_job_type", "run_name", "run_notes", "run_tags")
    name = setting.removeprefix("run_") if setting in shortened else setting
    return f"WANDB_{re.sub('^x_', '_', name).upper()}"


def _as_typed(value: Any) -> str:
    """Returns a value as its variable holds it."""
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)


def wandb_settings(mode: str | None = None) -> Any:
    """Returns W&B's settings of this process, after its environment variables and files; `mode`
    overrides the one there. Raises ValueError where one of them is wrong."""
    import wandb

    asked = {"mode": mode} if mode else {}
    try:
        # Without `silent`, W&B would print lines about the key and saved files.
        settings: Any = wandb.Settings(silent=True, **asked)  # type: ignore[arg-type]
        return wandb.setup(settings=settings).settings
    except Exception as error:
        said = _faults(error) or _first_line(error)
        raise ValueError(f"{said}; correct that variable or setting of W&B's") from None


class Wandb:
    """A W&B run on a thread of its own, so that a slow or absent network costs the training
    nothing.

    Calls queue up until the run has started. Where no online run starts, it is recorded offline,
    unless `fall_back` is false. Whatever goes wrong becomes a notice, never an exception.

    W&B cannot take rows back, and what a start sent may be lost. So a row's step is W&B's step too,
    and a start sends every row of the run, `rows()` and those logged from now on, beyond the last
    step that W&B has: the server's online, offline that of this folder's records."""

    def __init__(
        self,
        mode: str,
        timeout: float,
        arguments: dict[str, Any],
        rows: Callable[[], Iterable[dict[str, Any]]],
        notice: Callable[[str], None],
        fall_back: bool = True,
    ) -> None:
        self._mode = mode
        self._timeout = timeout
        self._arguments = arguments
        self._rows = rows
        self._notice = notice
        self._fall_back = fall_back
        self._last = -1  # step that W&B has
        self._queue: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Queues a row."""
        self.send(lambda run: self._log(run, row))

    def send(self, call: Callable[[Any], object]) -> None:
        """Queues a call on the run."""
        if self._thread.is_alive():  # else W&B has failed, and nobody empties the queue
            self._queue.put(call)

    def close(self, exit_code: int) -> None:
        """Finishes the run, within the time of a failed start and of an upload without a
        network."""
        if exit_code == EXIT_PREEMPTED:
            self.send(lambda run: run.mark_preempting())
        self.send(lambda run: self._finish(run, exit_code))
        self._queue.put(None)
        self._thread.join(self._timeout + 2 * FINISH)
        if self._thread.is_alive():
            self._notice(f"W&B: did not finish in time{self._remedy()}")

    def _work(self) -> None:
        try:
            run = self._start()
            for row in self._rows():
                self._log(run, row)
            while (call := self._queue.get()) is not None:
                call(run)
        except Exception as error:  # no error of W&B's is worth a run
            self._notice(f"W&B: tracking ended, {_first_line(error)}{self._remedy()}")
            with contextlib.suppress(Exception):
                _teardown()

    def _start(self) -> Any:
        """Returns W&B's run, with the axes of its charts and the code of the run."""
        # Offline nobody but the records of earlier starts knows which rows W&B will have.
        dir, wandb_id = Path(self._arguments["dir"]), self._arguments["id"]
        records = (path for path in records_of(dir) if id_of(path) == wandb_id)
        recorded = max((last_step(path) for path in records), default=-1)
        run = self._begin(dir)
        self._last = recorded
        if self._mode != "offline":
            self._last = run.starting_step - 1
        for name in AXES:
            run.define_metric(name)
        run.define_metric("*", step_metric="step")
        # Once, and now: nothing in there changes during a start.
        for path in sorted((dir / "code").rglob("*")):
            if path.is_file():
                run.save(path, base_path=dir, policy="now", glob=False)
        return run

    def _begin(self, dir: Path) -> Any:
        """Returns W&B's run, recorded offline where the network fails and that is allowed."""
        import wandb

        wandb_settings()
        settings = wandb.Settings(
            init_timeout=self._timeout,
            finish_timeout=FINISH,
            finish_timeout_raises=True,
            # W&B's service dies at once of the SIGTERM that Slurm sends to every process of a job,
            # and takes with it what it has not yet written: by default the last 15 seconds.
            x_transaction_log_flush_interval=1.0,
            # It would catch each redraw of the live line.
            console="off",
            silent=True,
        )
        try:
            mode: Any = self._mode
            run = wandb.init(mode=mode, settings=settings, **self._arguments)
            if self._mode == "online":
                self._notice(f"W&B: {run.url}")
            return run
        except Exception as error:
            if self._mode != "online" or not self._fall_back:
                raise
            self._mode = "offline"
            folder = shlex.quote(str(dir))
            self._notice(
                f"W&B: recording offline, {_first_line(error)}; `wandb sync"
                f" {folder}/wandb/offline-run-*` uploads it"
            )
            # The failed run would still hold the id.
            _teardown()
            wandb_settings()
            return wandb.init(mode="offline", settings=settings, **self._arguments)

    def _log(self, run: Any, row: dict[str, Any]) -> None:
        """Sends a row that W&B does not have."""
        if row["step"] > self._last:
            run.log(
                {key: value for key, value in row.items() if value is not None},
                step=row["step"],
                commit=True,
            )
            self._last = row["step"]

    def _finish(self, run: Any, exit_code: int) -> None:
        """Ends the run. Once an online start has ended, the server has what any start recorded:
        `wandb sync` shall skip it, for it would send all rows of a record again, whichever of them
        the server has."""
        run.finish(exit_code)
        if self._mode == "online":
            for path in records_of(Path(self._arguments["dir"])):
                sent_mark(path).touch()

    def _remedy(self) -> str:
        dir, wandb_id = Path(self._arguments["dir"]), self._arguments["id"]
        rows = f"; {dir}/metrics.jsonl has every row"
        if not any(id_of(path) == wandb_id for path in records_of(dir)):
            return rows  # W&B has not begun: there is nothing to upload
        if self._mode == "offline":
            return (
                f"; `wandb sync {shlex.quote(str(dir))}/wandb/offline-run-*` uploads what was"
                " recorded"
            )
        return (
            f"{rows}; the run's own command (in {dir}/code/environment.json) sends W&B what it"
            " lacks"
        )


def records_of(dir: Path) -> list[Path]:
    """Returns the files in which W&B recorded the starts of a run folder, oldest first."""
    return sorted(
        dir.glob("wandb/*run-*/run-*.wandb"),
        key=lambda path: path.parent.name.removeprefix("offline-"),
    )


def id_of(path: Path) -> str:
    """Returns the W&B id of a recorded start."""
    return path.stem.removeprefix("run-")


def recorded_id(dir: Path) -> str | None:
    """Returns the W&B id of a run that was started before, though it has no checkpoint yet."""
    paths = records_of(dir)
    if not paths:
        return None
    return id_of(paths[-1])


def sent_mark(path: Path) -> Path:
    """Returns the file by which W&B's own `wandb sync` marks a record that the server has."""
    return path.with_name(f"{path.name}.synced")


def unsent(dir: Path) -> bool:
    """Returns whether a start of a run folder recorded what the server may lack."""
    return not all(sent_mark(path).exists() for path in records_of(dir))


def last_step(path: Path) -> int:
    """Returns the step of the last row in a .wandb file, -1 where there is none."""
    # Rows stand at the end of a file, as a rule; a record may be hundreds of megabytes.
    for begin in (max(0, path.stat().st_size - TAIL) // BLOCK * BLOCK, 0):
        if steps := [
            record.history.step.num
            for record in read_records(path, begin)
            if record.WhichOneof("record_type") == "history"
        ]:
            return max(steps)
    return -1


def read_records(path: Path, begin: int = 0) -> Iterator[Any]:
    """Returns the records of a .wandb file from the beginning of a block on: 7 bytes of header,
    then a LevelDB log of protobufs. It ends where the file was cut short or is damaged."""
    from google.protobuf.message import DecodeError

    # Its classes are made at run time, which mypy cannot see.
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    whole, first, last = 1, 2, 4  # kinds of parts; 3 is one in the middle
    with path.open("rb") as file:
        file.seek(begin)
        content = file.read()
    # The file itself begins with a header of 7 bytes.
    position = 0 if begin else 7
    parts = None
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:  # too short for the header of a part: padding
            position += left
            continue
        _crc, length, kind = struct.unpack_from("<IHB", content, position)
        part = content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (whole, first):
            parts = [part]
        elif parts is not None:  # else the record began before `begin`
            parts.append(part)
        if kind in (whole, last) and parts is not None:
            try:
                yield Record.FromString(b"".join(parts))
            except DecodeError:
                return


def _teardown() -> None:
    """Ends W&B's service, which otherwise fails or waits again when the interpreter exits."""
    import wandb

    wandb.teardown()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
