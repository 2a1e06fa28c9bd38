"""What a run folder holds is verified by every command: one line says what is wrong, and nothing
that is damaged is believed."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import launch.evaluate
import launch.report.__main__
import launch.status
import model.export
import model.sample
import train as training
from conf.exit_codes import EXIT_PREEMPTED
from launch import config
from launch.run import lock
from launch.run.folder import load_config
from launch.sweep.jobs import read_jobs, write_jobs
from model import load
from model.checkpoint import checksum, describe
from tests.runs import content
from tests.test_sweep import a_job
from tests.test_train import after_step, kept, step_folder, terminate

SHORT = ["schedule.steps=6", "checkpoint.every=2", "evaluation.every=3"]
STOP = "minutes=1e-6"


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A reader that waits for ever is ended."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny) -> Path:
    """A run that was stopped after step 5; its checkpoints are 4 and 5."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 5, terminate)
        assert training.main(config.compose([*tiny, *SHORT, f"dir={folder}"])) == EXIT_PREEMPTED
    assert kept(folder) == [4, 5]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny) -> Path:
    """The same run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert training.main(config.compose([*tiny, *SHORT, f"dir={folder}"])) == 0
    return folder


@pytest.fixture
def run(begun, tmp_path) -> Path:
    """A copy of the run that was stopped."""
    return shutil.copytree(begun, tmp_path / "runs" / "run")


@pytest.fixture
def call(tiny, run, capsys) -> Callable[..., tuple[int, str]]:
    """Gives a command, as a user does; returns its exit code and what it said. An error is one line
    and code 2."""
    out = run.parent.parent

    def call(command: str, *overrides: str) -> tuple[int, str]:
        calls = {
            "train": lambda: training.main(
                config.compose([*tiny, *SHORT, f"dir={run}", *overrides])
            ),
            "branch": lambda: training.main(
                config.compose(
                    [*tiny, *SHORT, f"dir={out}/branch", f"init.run={run}", STOP, *overrides]
                )
            ),
            "evaluate": lambda: launch.evaluate.main([f"run={run}", "length=32", *overrides]),
            "sample": lambda: model.sample.main([f"run={run}", "tokens=2", *overrides]),
            "export": lambda: model.export.main([f"run={run}", f"out={out}/export", *overrides]),
            "load": lambda: load(run) and 0,
            "report": lambda: launch.report.__main__.main(
                [str(run.parent), f"out={out}/report.html"]
            ),
            "status": lambda: launch.status.main([str(run.parent)]),
        }
        capsys.readouterr()
        try:
            with config.user_errors():
                code = calls[command]() or 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in printed.err and len(errors) == (code == 2), printed.err
        return code, printed.out + printed.err

    return call


def as_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def as_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_text(""),
    "a list": lambda file: file.write_text("[1]"),
    "an empty mapping": lambda file: file.write_text("{}\n"),
    "text": lambda file: file.write_text('"text"'),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\n\0"),
    "brackets": lambda file: file.write_text("[" * 200_000),
    "an alias bomb": lambda file: file.write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    "a fifo": as_fifo,
    "a folder": as_folder,
    "a link to itself": as_loop,
}
READERS = ("branch", "evaluate", "sample", "export")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_is_refused_by_every_command(run, call, damage):
    DAMAGES[damage](run / "config.yaml")
    for command in ("train", *READERS):
        code, said = call(command)
        assert code == 2 and str(run / "config.yaml") in said, (command, said)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load(run)
    code, said = call("report")
    assert code == 0 and f"{run}: damaged" in said and "config.yaml" in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_summary_is_no_end(run, call, damage):
    (run / "summary.json").touch()
    DAMAGES[damage](run / "summary.json")
    code, said = call("train")
    assert (
        code == 2
        and f"{run}/summary.json" in said
        and "remove it" in said
        and "finished" not in said
    )
    code, said = call("report")
    assert code == 0 and f"{run}: damaged" in said and "summary.json" in said


@pytest.mark.parametrize(
    ("name", "figure"), [("metrics.jsonl", "tokens"), ("summary.json", "flops")]
)
def test_a_number_beyond_any_figure_takes_no_report_with_it(run, call, name, figure):
    (run / name).write_text(
        json.dumps(
            {"step": 1, "tokens": 1, "flops": 1, "seconds": 1.0, "val/loss": 1.0}
            | {figure: 10**400}
        )
        + "\n"
    )
    code, said = call("report")
    assert code == 0 and f"{run}: damaged" in said and name in said and figure in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_that_are_damaged_are_missed(run, call, damage):
    DAMAGES[damage](run / "metrics.jsonl")
    before = content(run / "checkpoints")
    code, said = call("train")
    assert code == 2 and f"{run}/metrics.jsonl" in said
    assert content(run / "checkpoints") == before
    assert call("report")[0] == 0


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.json", "tokenizer.json"])
def test_a_damaged_newest_checkpoint_is_skipped_or_refused(run, call, whole, name, damage):
    newest = step_folder(run, 5)
    DAMAGES[damage](newest / name)
    for command in READERS:
        code, said = call(command)
        assert code == 2 and f"{newest} is damaged (" in said and "step=4" in said, (command, said)
    assert call("evaluate", "step=4")[0] == 0
    assert call("report")[0] == 0
    code, said = call("train")
    assert (
        code == 0
        and f"checkpoint {newest} is damaged (" in said
        and f"resumed from {step_folder(run, 4)}\n" in said
    )
    assert rows_and_weights(run) == rows_and_weights(whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_lock_is_taken_over_or_refused(run, call, monkeypatch, damage):
    monkeypatch.setattr(lock, "WATCH", 0.05)
    DAMAGES[damage](run / "lock")
    assert not lock.is_in_use(run)
    assert call("report")[0] == 0
    code, said = call("train", STOP)
    assert (
        (code == 2 and str(run) in said)
        or (code == EXIT_PREEMPTED and "taking over" in said)
        or damage == "empty"
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_lists_of_jobs_and_starts_take_no_run_with_them(run, call, damage):
    write_jobs(run.parent, [a_job(run)])
    DAMAGES[damage](run.parent / "jobs.json")
    code, said = call("status")
    assert code == 2 and "jobs.json" in said
    code, said = call("report")
    assert code == 0 and "jobs.json" in said and f"{run}: stopped" in said
    DAMAGES[damage](run / "code/environment.json")
    assert call("train", STOP)[0] == EXIT_PREEMPTED
    assert call("report")[0] == 0


def rows_and_weights(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What must be the same of two runs that are the same, times left out."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {key: value for key, value in row.items() if not key.startswith(("seconds", "perf/"))}
        for row in rows
    ]
    return kept, {
        name: value.tolist()
        for name, value in load_file(step_folder(run, 6) / "model.safetensors").items()
    }


VALUES = [
    ("seed: 0", "seed: zero"),
    ("  length: 32", "  length: -5"),
    ("model:\n", "model: 3\nothers:\n"),
    ("  sources: {}", "  sources: [1]"),
    ("  width: 32", "  width: 32.5"),
    ("batch:\n", "others:\n"),
]


@pytest.mark.parametrize(("old", "new"), VALUES)
def test_a_value_that_a_configuration_cannot_have_is_named(run, call, old, new):
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new, 1))
    for command in ("train", "evaluate"):
        code, said = call(command)
        assert code == 2 and f"{run}/config.yaml is damaged (" in said


# Checkpoints that are whole, and wrong


def reseal(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the state of a checkpoint, with sizes and checksums that fit."""
    state = json.loads((path / "state.json").read_text())
    del state["checksum"]
    change(state)
    for name in state.get("files", {}):
        if isinstance(state["files"], dict) and (path / name).is_file():
            state["files"][name] = describe(path / name)
    (path / "state.json").write_text(json.dumps(state | {"checksum": checksum(state)}))


def reshape(path: Path, name: str) -> None:
    """Gives a file of tensors others of another shape."""
    tensors = {key: torch.zeros(3, 3) for key in load_file(path / name)}
    save_file(tensors, path / name)


WRONG: dict[str, Callable[[Path], Any]] = {
    "no counters": lambda path: reseal(path, lambda state: state.pop("progress")),
    "counters of text": lambda path: reseal(path, lambda state: state["progress"].update(step="5")),
    "a list of counters": lambda path: reseal(path, lambda state: state.update(progress=[])),
    "no files": lambda path: reseal(path, lambda state: state.pop("files")),
    "files of another kind": lambda path: reseal(
        path, lambda state: state.update(files=["model.safetensors"])
    ),
    "a file outside": lambda path: reseal(
        path, lambda state: state["files"].update({"../step_00000004/state.json": [1, "x"]})
    ),
    "no weights": lambda path: reseal(path, lambda state: state["files"].pop("model.safetensors")),
    "an identity of text": lambda path: reseal(path, lambda state: state.update(identity="seed")),
    "another step": lambda path: reseal(path, lambda state: state.update(step=4)),
    "weights of another shape": lambda path: (
        reshape(path, "model.safetensors"),
        reseal(path, lambda state: None),
    ),
    "an optimizer of another shape": lambda path: (
        reshape(path, "optimizer.safetensors"),
        reseal(path, lambda state: None),
    ),
    "a random state of another shape": lambda path: (
        reshape(path, "random.safetensors"),
        reseal(path, lambda state: None),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_that_does_not_fit_is_skipped(run, call, whole, wrong):
    WRONG[wrong](step_folder(run, 5))
    code, said = call("train")
    assert (
        code == 0
        and f"checkpoint {step_folder(run, 5)} is damaged (" in said
        and f"resumed from {step_folder(run, 4)}\n" in said
    )
    assert rows_and_weights(run) == rows_and_weights(whole)


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(
    run, call, whole, tiny, tmp_path, monkeypatch, all_of_them
):
    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        after_step(patch, 5, terminate)
        assert (
            training.main(config.compose([*tiny, *SHORT, f"dir={other}", "seed=1"]))
            == EXIT_PREEMPTED
        )
    for step in (4, 5) if all_of_them else (5,):
        shutil.rmtree(step_folder(run, step))
        shutil.copytree(step_folder(other, step), step_folder(run, step))
    for command in READERS:
        code, said = call(command)
        assert code == 2 and "it is of another run: seed 1 -> 0" in said, (command, said)
    code, said = call("train")
    if all_of_them:
        assert (
            code == 2
            and f"dir={run} holds the checkpoints of another run" in said
            and "(it is of another run: seed 1 -> 0)" in said
        )
    else:
        assert code == 0 and "seed 1 -> 0" in said
        assert rows_and_weights(run) == rows_and_weights(whole)


def test_a_changed_number_of_the_state_is_noticed_by_every_command(run, call):
    state = json.loads((step_folder(run, 5) / "state.json").read_text())
    state["model"]["num_heads"] = 1
    (step_folder(run, 5) / "state.json").write_text(json.dumps(state))
    for command in READERS:
        code, said = call(command)
        assert code == 2 and "state.json does not match its checksum" in said


ROWS_CHANGED: dict[str, Callable[[list[str]], list[str]]] = {
    "the last ones are gone": lambda lines: lines[:-2],
    "the first one is gone": lambda lines: lines[1:],
    "a number is another": lambda lines: [
        *lines[:-1],
        lines[-1].replace('"tokens": ', '"tokens": 1'),
    ],
}


@pytest.mark.parametrize("change", ROWS_CHANGED)
def test_rows_that_are_cut_or_replaced_are_missed(run, call, change):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in ROWS_CHANGED[change](lines)))
    code, said = call("train")
    assert (
        code == 2
        and "does not hold the 6 rows that the checkpoint counts" in said
        and "init.optimizer=true" in said
    )


def test_a_checkpoint_that_counts_no_rows_goes_on(run, call, whole):
    """As one that was made before checkpoints did."""
    for step in (4, 5):
        reseal(step_folder(run, step), lambda state: (state.pop("rows"), state.pop("origin")))
    assert call("train")[0] == 0
    assert rows_and_weights(run) == rows_and_weights(whole)


# Where things lie


def moved_corpus(tiny: list[str], to: Path) -> str:
    text = next(entry for entry in tiny if entry.startswith("data.path=")).removeprefix(
        "data.path="
    )
    return f"data.path={shutil.copy(text, to)}"


def test_the_same_text_at_another_place_goes_on(run, call, whole, tiny, tmp_path):
    code, said = call("train", moved_corpus(tiny, tmp_path / "elsewhere.txt"))
    assert code == 0 and "resumed from" in said
    assert rows_and_weights(run) == rows_and_weights(whole)
    assert load_config(run).data.path == str(tmp_path / "elsewhere.txt")


def test_another_text_at_another_place_is_refused(run, call, tiny, tmp_path):
    override = moved_corpus(tiny, tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text(
        (tmp_path / "elsewhere.txt").read_text().replace("return", "retern")
    )
    before = content(run / "checkpoints")
    code, said = call("train", override)
    assert code == 2 and "data.path" in said and "elsewhere.txt" in said
    code, said = call("train", override, "seed=3")
    assert code == 2 and "holds another run (seed 0 -> 3); choose another dir" in said
    assert (
        content(run / "checkpoints") == before
        and "elsewhere" not in (run / "config.yaml").read_text()
    )


def test_a_finished_run_is_known_by_its_text_wherever_that_lies(run, call, whole, tiny, tmp_path):
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    before = content(run)
    override = moved_corpus(tiny, tmp_path / "elsewhere.txt")
    code, said = call("train", override)
    assert code == 0 and "finished already" in said
    (tmp_path / "elsewhere.txt").write_text("another text " * 5000)
    code, said = call("train", override)
    assert code == 2 and f"dir={run} holds another run (data.path " in said
    shutil.rmtree(run / "checkpoints")
    assert call("train", moved_corpus(tiny, tmp_path / "elsewhere.txt"))[0] == 2
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    assert content(run) == before


def test_a_run_without_a_checkpoint_begins_with_the_text_that_is_given(
    run, call, whole, tiny, tmp_path
):
    shutil.rmtree(run / "checkpoints")
    assert call("train", "seed=3")[0] == 2
    assert call("train", moved_corpus(tiny, tmp_path / "elsewhere.txt"))[0] == 0
    assert rows_and_weights(run) == rows_and_weights(whole)


def test_a_parent_at_another_place_is_known_by_its_checkpoint(run, call, tiny, tmp_path):
    branch = tmp_path / "branch"
    assert call("branch", "init.optimizer=true")[0] == EXIT_PREEMPTED
    moved = run.rename(tmp_path / "moved")
    code, said = call("branch", "init.optimizer=true", f"init.run={moved}", "minutes=null")
    assert code == 0 and f"resumed from {branch}/checkpoints" in said
    shutil.rmtree(branch / "checkpoints/step_00000006")
    (branch / "summary.json").unlink()
    shutil.rmtree(step_folder(moved, 5))
    code, said = call("branch", "init.optimizer=true", f"init.run={tmp_path}/runs/../moved")
    assert code == 2 and "holds" in said and "init.run" in said


def test_weights_of_hugging_face_at_another_place_are_known(call, tmp_path):
    assert call("export")[0] == 0
    child = ["model.bias=true", f"dir={tmp_path}/child"]
    code, said = call("train", *child, f"init.hf={tmp_path}/export", STOP)
    assert code == EXIT_PREEMPTED and "started from the weights of" in said, said
    (tmp_path / "export").rename(tmp_path / "moved")
    code, said = call("train", *child, f"init.hf={tmp_path}/moved", STOP)
    assert code == EXIT_PREEMPTED and "resumed from" in said, said
    weights = load_file(tmp_path / "moved/model.safetensors")
    save_file(
        {name: value + 1 for name, value in weights.items()}, tmp_path / "moved/model.safetensors"
    )
    code, said = call("train", *child, f"init.hf={tmp_path}/moved/../moved", STOP)
    assert code == 2 and "init.hf" in said


# Links, and folders that move


def test_a_run_folder_may_be_a_link(run, call, tmp_path):
    disk = run.rename(tmp_path / "disk")
    run.symlink_to(disk)
    code, said = call("train", "data.path=missing.txt")
    assert code == 2 and run.is_symlink() and disk.is_dir()
    assert call("train")[0] == 0 and run.is_symlink() and (disk / "summary.json").exists()
    (empty := tmp_path / "empty").mkdir()
    (link := tmp_path / "link").symlink_to(empty)
    code, said = call("train", f"dir={link}", "data.path=missing.txt")
    assert code == 2 and "missing.txt" in said and link.is_symlink() and list(empty.iterdir()) == []
    empty.rmdir()
    code, said = call("train", f"dir={link}")
    assert (
        code == 2
        and f"dir={link} is a link to {empty}, which is gone" in said
        and link.is_symlink()
        and not empty.exists()
    )


@pytest.mark.parametrize("to", ["a folder", "nothing"])
def test_an_export_may_go_through_a_link(call, tmp_path, to):
    disk, link = tmp_path / "disk", tmp_path / "export"
    link.symlink_to(disk)
    if to == "a folder":
        disk.mkdir()
    for _ in range(2):
        assert call("export")[0] == 0
        assert link.is_symlink() and (disk / "model.safetensors").exists()
    assert not list(tmp_path.glob("**/.*.partial"))


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_folder_that_moves_at_work_ends_its_run(run, call, tmp_path, monkeypatch, how):
    shutil.rmtree(step_folder(run, 5))
    away = tmp_path / "away"

    def move() -> None:
        run.rename(away)
        if how == "removed":
            shutil.rmtree(away)
        if how == "replaced":
            run.mkdir()
            (run / "lock").touch()

    with monkeypatch.context() as patch:
        after_step(patch, 5, move)
        code, said = call("train")
    assert code == 2 and f"dir={run} was moved or removed while its run was at work" in said
    assert not run.exists() if how != "replaced" else list(run.iterdir()) == [run / "lock"]
    if how == "moved":
        assert call("train", f"dir={away}")[0] == 0


# Disks that refuse, and what killed writers left


def test_an_export_that_the_disk_refuses_is_one_line_and_leaves_nothing(call, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, said = call("export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        code == 2
        and f"out={tmp_path}/export cannot be written (" in said
        and "File too large" in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (tmp_path / ".export.partial").mkdir()
    # of an export that was killed
    (tmp_path / ".export.partial/model.safetensors").write_text("half")
    assert call("export")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "runs"]


def test_a_row_that_the_disk_refuses_ends_the_run_and_loses_nothing(run, call, whole, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.rmtree(step_folder(run, 5))

    def fill() -> None:
        size = (run / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))

    try:
        with monkeypatch.context() as patch:
            after_step(patch, 5, fill)
            code, said = call("train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        code == 2
        and f"{run}/metrics.jsonl: File too large; make room on its disk" in said
        and "and start the same command again" in said
    )
    assert call("train")[0] == 0
    assert rows_and_weights(run) == rows_and_weights(whole)


def test_temporary_files_of_killed_writers_are_cleared(run, call):
    ours = [
        run / "config.yaml.123.tmp",
        run / "summary.json.4194304.tmp",
        run / "code/environment.json.7.tmp",
    ]
    others = [run / "report.html.123.tmp", run / "config.yaml.mine.tmp"]
    for file in (*ours, *others):
        file.write_text("half")
    assert call("train", STOP)[0] == EXIT_PREEMPTED
    assert [file.exists() for file in (*ours, *others)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            errno.ENOSPC,
            "error: x/y: No space left on device; make room there, and give the same command again",
        ),
        (
            errno.EROFS,
            (
                "error: x/y: Read-only file system; name a place that can be written, and give the"
                " same command again"
            ),
        ),
        (errno.EIO, "error: x/y: Input/output error; mend that, and give the same command again"),
    ],
)
def test_what_the_system_refuses_is_one_line(capsys, number, said):
    with pytest.raises(SystemExit) as end, config.user_errors():
        raise OSError(number, os.strerror(number), "x/y")
    assert end.value.code == 2 and capsys.readouterr().err == f"{said}\n"


def test_an_old_list_of_jobs_is_read(tmp_path):
    write_jobs(tmp_path, [a_job(tmp_path / "run")])
    assert read_jobs(tmp_path) == [a_job(tmp_path / "run")]
    (tmp_path / "jobs.json").write_text("[{}]")
    with pytest.raises(
        ValueError, match=r"jobs\.json is damaged \(\[0\]: Object missing required field"
    ):
        read_jobs(tmp_path)
