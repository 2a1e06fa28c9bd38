"""What a run does between its first step and its last: it repeats itself, resumes, branches, skips
what is not finite, and keeps its word."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import launch.evaluate
import model.sample
import train as training
from conf.exit_codes import EXIT_PREEMPTED
from data import Validation
from launch import config
from launch.checkpoint import resume
from model import load
from model.checkpoint import checkpoints, open_checkpoint
from optim import Gradient
from optim.adamw import state_tensors
from tests.runs import STEPS, assert_same_run, assert_same_tensors, content, rows, tensors
from tests.test_checkpoint import DAMAGES, Bomb


@pytest.fixture
def run(tmp_path):
    """The folder of the test's run."""
    return tmp_path / "run"


@pytest.fixture
def start(tiny, run):
    """Trains in this process, from the overrides to the exit code."""

    def start(*overrides: str, dir: Path = run) -> int:
        return training.main(config.compose([*tiny, f"dir={dir}", *overrides]))

    return start


def after_step(monkeypatch, number: int, action: Callable[[], object]) -> None:
    """Acts when the step with that number is done."""
    original = training.Run.step

    def step(self):
        original(self)
        if self.progress.step == number:
            action()

    monkeypatch.setattr(training.Run, "step", step)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Crash(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def crash() -> None:
    raise Crash


@pytest.fixture(scope="module")
def halfway(tmp_path_factory, tiny):
    """A run that was preempted after step 13; its checkpoints are 12 and 13."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 13, terminate)
        assert training.main(config.compose([*tiny, f"dir={folder}"])) == EXIT_PREEMPTED
    assert kept(folder) == [12, 13]
    return folder


@pytest.fixture
def stopped(halfway, run):
    """A copy of it."""
    return shutil.copytree(halfway, run)


def kept(folder: Path) -> list[int]:
    return list(checkpoints(folder))


def step_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def error_line(capsys, call: Callable[[], object]) -> str:
    """The one line on stderr with which a call ends the process as a user's mistake."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, config.user_errors():
        call()
    assert end.value.code == 2
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith("training tokenizer=bpe")
    ]
    assert line.startswith("error: ")
    return line


# Twice the same


def test_two_fresh_runs_are_bit_identical(start, run, reference):
    assert start() == 0
    assert_same_run(run, reference)


def test_deterministic_kernels(start, run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for folder in (run, tmp_path / "again"):
            assert start("deterministic=true", "schedule.steps=6", dir=folder) == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_tensors(tensors(run, 6), tensors(tmp_path / "again", 6))
    assert rows(run) == rows(tmp_path / "again")


def test_micro_batches_change_no_loss(start, tmp_path):
    losses = []
    for micro in (1, 2, 4):
        assert (
            start(
                "schedule.steps=8",
                "precision=fp32",
                "model.dropout=0",
                f"batch.micro={micro}",
                dir=tmp_path / f"{micro}",
            )
            == 0
        )
        losses.append([row["train/loss"] for row in rows(tmp_path / f"{micro}")[1:]])
    assert len(losses[0]) == 8 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[2], abs=1e-5) and losses[1] == pytest.approx(
        losses[2], abs=1e-5
    )


def test_profile_is_a_trace(start, run):
    assert start("profile=true", "schedule.steps=10") == 0
    assert len(json.loads((run / "trace.json").read_text())["traceEvents"]) > 100


# Resumed


def test_rows_after_the_checkpoint_are_cut(start, stopped, reference):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 14, "train/loss": 1.0}\n{"step": 15, "train/loss": 2.0}\n{"step": 16, "tra'
        )
    assert start() == 0
    assert_same_run(stopped, reference)


def interrupt_evaluation(monkeypatch, at: int) -> None:
    """A signal comes with the third batch of the evaluation at that step."""
    original, batches, now = training.Run.evaluate_if_due, Validation.batches, []

    def evaluate_if_due(self):
        now[:] = [self.progress.step]
        original(self)

    def interrupted(self, size):
        for index, batch in enumerate(batches(self, size)):
            if (index, now) == (2, [at]):
                terminate()
            yield batch

    monkeypatch.setattr(training.Run, "evaluate_if_due", evaluate_if_due)
    monkeypatch.setattr(Validation, "batches", interrupted)


@pytest.mark.parametrize("at", [0, 12, STEPS])
def test_signal_during_an_evaluation_leaves_its_row_to_the_next_start(
    start, run, reference, monkeypatch, at
):
    with monkeypatch.context() as patch:
        interrupt_evaluation(patch, at)
        assert start() == EXIT_PREEMPTED
    assert kept(run)[-1] == at and not (run / "summary.json").exists()
    assert [row["step"] for row in rows(run)] == list(range(at))
    with (
        monkeypatch.context() as patch
    ):  # once more: killed after the row is logged, before the next checkpoint
        after_step(patch, at + 2, crash)
        patch.setattr(training.Run, "finish", lambda self: crash())
        with pytest.raises(Crash):
            start()
    assert at in [row["step"] for row in rows(run)]
    assert start() == 0
    assert_same_run(run, reference)


def test_keys_that_may_change_on_resume_change_no_weight(start, stopped, reference):
    changed = [
        "evaluation.every=13",
        "evaluation.tokens=256",
        "checkpoint.every=3",
        "checkpoint.keep=3",
        "tracking.every=5",
        "minutes=60",
        "checkpoint.milestones=[13,29]",
        "max_skipped=2",
    ]
    assert start(*changed) == 0
    assert_same_tensors(tensors(stopped), tensors(reference))
    assert [row["step"] for row in rows(stopped)] == [*range(14), 15, 20, 25, 26, 30, 32]
    assert kept(stopped) == [13, 27, 29, 30, 32]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "flipped"),
        ("optimizer.safetensors", "cut"),
        ("random.safetensors", "missing"),
        ("tokenizer.json", "empty"),
        ("state.json", "flipped in the head"),
    ],
)
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    start, stopped, reference, capsys, name, damage
):
    newest = step_folder(stopped, 13)
    DAMAGES[damage](newest / name)
    assert start() == 0
    said = capsys.readouterr().out
    assert (
        f"checkpoint {newest} is damaged" in said
        and f"resumed from {step_folder(stopped, 12)}\n" in said
    )
    assert_same_run(stopped, reference)


def test_all_damaged_is_one_error_and_removes_nothing(start, stopped, capsys):
    for step in (12, 13):
        (step_folder(stopped, step) / "state.json").write_text("{")
    before = content(stopped)
    line = error_line(capsys, start)
    assert (
        line
        == f"error: dir={stopped}: all 2 checkpoints are damaged; move the folder away to start"
        " again"
    )
    after = content(stopped)
    assert after.keys() == before.keys()
    assert all(
        after[name] == before[name]
        for name in before
        if name.startswith(("checkpoints", "metrics"))
    )


def test_leftovers_of_killed_saves_go_with_the_next_start(start, stopped, reference):
    shutil.copytree(step_folder(stopped, 13), stopped / "checkpoints/.step_00000016.partial")
    shutil.copytree(step_folder(stopped, 13), stopped / "checkpoints/.step_00000099.partial")
    assert start() == 0
    assert [
        path.name for path in (stopped / "checkpoints").iterdir() if path.name.startswith(".")
    ] == []
    assert_same_run(stopped, reference)


def test_changed_data_are_refused_until_they_are_back(
    start, run, tiny, tmp_path, reference, monkeypatch, capsys
):
    corpus = tmp_path / "corpus.txt"
    shutil.copy(
        next(entry for entry in tiny if entry.startswith("data.path=")).removeprefix("data.path="),
        corpus,
    )
    text = corpus.read_text()
    with monkeypatch.context() as patch:
        after_step(patch, 5, terminate)
        assert start(f"data.path={corpus}") == EXIT_PREEMPTED
    corpus.write_text(text.replace("return", "retern", 1))
    before = content(run / "checkpoints")
    line = error_line(capsys, lambda: start(f"data.path={corpus}"))
    assert line.startswith(
        f"error: the data have changed since {step_folder(run, 5)} was made; bring them back"
    )
    assert content(run / "checkpoints") == before
    corpus.write_text(text)  # at another time, but the same
    assert start(f"data.path={corpus}") == 0
    assert_same_tensors(tensors(run), tensors(reference))
    assert rows(run) == rows(reference)


def test_text_may_be_gone_once_it_is_prepared(
    start, run, tiny, tmp_path, reference, monkeypatch, capsys
):
    corpus = tmp_path / "corpus.txt"
    shutil.copy(
        next(entry for entry in tiny if entry.startswith("data.path=")).removeprefix("data.path="),
        corpus,
    )
    with monkeypatch.context() as patch:
        after_step(patch, 5, terminate)
        assert start(f"data.path={corpus}") == EXIT_PREEMPTED
    corpus.unlink()
    capsys.readouterr()
    assert start(f"data.path={corpus}") == 0
    assert (
        f"note: data.path={corpus} matches no file; what was prepared from it is used: "
        in capsys.readouterr().err
    )
    assert_same_tensors(tensors(run), tensors(reference))


# Checkpoints that are kept


def test_newest_and_milestones_are_kept(start, run, reference):
    assert kept(reference) == [10, 28, STEPS]
    assert start("checkpoint.keep=1", "checkpoint.milestones=[0,3,30]", "checkpoint.every=100") == 0
    assert kept(run) == [0, 3, 30, STEPS]
    assert_same_run(run, reference)


def test_time_limit_saves_and_exits_with_75(start, run, reference, capsys):
    assert start("minutes=1e-6") == EXIT_PREEMPTED
    assert (
        "time limit: saved step 0; the same command goes on from there" in capsys.readouterr().out
    )
    assert kept(run) == [0] and rows(run) == []
    before = content(run / "checkpoints")
    assert start("minutes=1e-6") == EXIT_PREEMPTED
    assert content(run / "checkpoints") == before  # to write it again is to risk it
    assert start("minutes=10") == 0
    assert_same_run(run, reference)


# Whose folder it is


def test_finished_run_says_so_and_touches_nothing(start, run, reference, capsys):
    shutil.copytree(reference, run)
    before = content(run)
    assert start("evaluation.every=3", "checkpoint.keep=1", "tracking.every=9") == 0
    assert f"finished already: {run}/summary.json has its figures" in capsys.readouterr().out
    assert content(run) == before


@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_folder_of_another_run_is_refused_with_the_difference(
    start, run, reference, halfway, capsys, end
):
    shutil.copytree(reference if end == "finished" else halfway, run)
    before = content(run)
    line = error_line(capsys, lambda: start("seed=5", "optim.lr=0.002", "evaluation.every=3"))
    assert (
        f"dir={run} holds another run (seed 0 -> 5, optim.lr 0.001 -> 0.002); choose another dir"
        in line
    )
    assert content(run) == before


# Branches


@pytest.fixture
def branch(start, reference):
    """Branches off the reference."""

    def branch(*overrides: str, step: int = 10) -> int:
        return start(f"init.run={reference}", f"init.step={step}", *overrides)

    return branch


def test_branch_with_the_same_settings_is_the_parent(branch, run, reference, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        after_step(patch, 15, terminate)
        assert branch("init.optimizer=true") == EXIT_PREEMPTED
    assert f"branched from {step_folder(reference, 10)}\n" in capsys.readouterr().out
    monkeypatch.delattr(resume, "branch")  # from here on it stands on its own
    assert branch("init.optimizer=true") == 0
    assert_same_tensors(tensors(run), tensors(reference))
    first, *others = rows(run)
    assert (first["step"], first["tokens"]) == (
        10,
        rows(reference)[10]["tokens"],
    ) and "train/loss" not in first
    assert others == rows(reference)[11:]


def test_branch_with_another_schedule_sees_the_same_data(branch, run, reference):
    assert (
        branch("init.optimizer=true", "optim.lr=0.01", "schedule.shape=linear", "schedule.steps=14")
        == 0
    )
    ours, theirs = rows(run)[1:3], rows(reference)[11:13]
    # the same weights on the same batch under the same dropout
    assert ours[0]["train/loss"] == theirs[0]["train/loss"]
    assert (
        ours[0]["optim/lr"] != theirs[0]["optim/lr"]
        and ours[1]["train/loss"] != theirs[1]["train/loss"]
    )
    assert rows(run)[-1]["step"] == 14


def test_branch_without_the_optimiser_starts_anew_with_its_weights(branch, run, reference):
    assert branch("seed=3", "batch.sequences=2", "optim.lr=0.01", "minutes=1e-6") == EXIT_PREEMPTED
    saved, parent = (
        open_checkpoint(step_folder(run, 0)),
        open_checkpoint(step_folder(reference, 10)),
    )
    ours, theirs = (
        {name: stored[...] for name, stored in found.tensors["model"].items()}
        for found in (saved, parent)
    )
    assert_same_tensors(ours, theirs)
    assert (
        saved.tensors["optimizer"] == {}
        and saved.state["progress"]["tokens"] == saved.state["progress"]["step"] == 0
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["init.optimizer=true", "seed=1"],
            "seed=1 differs from 0 in init.run; to go on in its data order, keep it",
        ),
        (["init.optimizer=true", "batch.sequences=8"], "batch.sequences=8 differs from 4"),
        (["init.optimizer=true", "batch.length=16"], "batch.length=16 differs from 32"),
        (
            ["init.optimizer=true", "data.validation_fraction=0.1"],
            "data.validation_fraction=0.1 differs from 0.05",
        ),
        (
            ["init.optimizer=true", "optim.base=sgd"],
            (
                "optim.base=sgd differs from adamw in init.run, whose state it cannot take over;"
                " keep it, or"
            ),
        ),
        (
            ["init.optimizer=true", "schedule.steps=9"],
            "schedule.steps=9 ends before step 10 of init.run; lengthen the run",
        ),
        (["model.width=64"], "has another shape or tokenizer"),
        (["tokenizer=bpe", "tokenizer.vocab_size=300"], "has another shape or tokenizer"),
        (["init.step=7"], "step=7 is not among the checkpoints of"),
        (
            ["init.run=nowhere"],
            "run=nowhere has no checkpoints; name the folder of a run that was trained",
        ),
    ],
)
def test_branch_that_cannot_be_is_one_error(branch, run, capsys, overrides, said):
    assert said in error_line(capsys, lambda: branch(*overrides))
    assert kept(run) == []


def test_branch_of_a_damaged_checkpoint_is_one_error(start, stopped, tmp_path, capsys):
    DAMAGES["flipped"](step_folder(stopped, 13) / "model.safetensors")
    line = error_line(capsys, lambda: start(f"init.run={stopped}", dir=tmp_path / "branch"))
    assert f"{step_folder(stopped, 13)} is damaged" in line and "init.step" in line


# Losses that are not finite


def poison(monkeypatch, bad: Callable[[int], bool], what: str) -> None:
    """Makes the loss, or one number of the gradient, not finite at the steps that are bad; asserts
    that nothing moves there."""
    gradient, now = Gradient.gradient, assert_unharmed(monkeypatch, bad)

    def poisoned(self, *arguments):
        result = gradient(self, *arguments)
        if bad(now[0]):
            if what == "loss":
                result.loss = torch.full_like(result.loss, float("nan"))
            else:
                next(self.model.parameters()).grad.view(-1)[3] = float(
                    "inf" if what == "infinite gradient" else "nan"
                )
        return result

    monkeypatch.setattr(Gradient, "gradient", poisoned)


def assert_unharmed(monkeypatch, bad: Callable[[int], bool]) -> list[int]:
    """Asserts of every step from now on that it changes no weight and nothing of the optimiser
    where it is bad, and something where it is not; returns a list that holds the step under way."""
    step, now = training.Run.step, [0]

    def watched(self):
        def state() -> dict[str, torch.Tensor]:
            found = self.model.state_dict() | state_tensors(self.model, self.optimizer)
            return {name: tensor.clone() for name, tensor in found.items()}

        now[:] = [self.progress.step]
        before = state()
        step(self)
        if bad(now[0]):
            assert_same_tensors(state(), before)
        else:
            assert any(
                not torch.equal(before.get(name, torch.zeros(0)), tensor)
                for name, tensor in state().items()
            )

    monkeypatch.setattr(training.Run, "step", watched)
    return now


@pytest.mark.parametrize("what", ["loss", "gradient", "infinite gradient"])
def test_step_that_is_not_finite_is_skipped_counted_and_named(
    start, run, tmp_path, monkeypatch, capsys, what
):
    poison(monkeypatch, {0: True, 5: True, 6: True, 9: True}.__contains__, what)
    assert start("schedule.steps=12", "max_skipped=3") == 0
    said = capsys.readouterr().out
    assert [step for step in range(12) if f"skipped batch {step}: loss " in said] == [0, 5, 6, 9]
    assert [row["skipped"] for row in rows(run)[1:]] == [1, 1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4]
    assert [row["step"] for row in rows(run) if row.get("train/loss", 0) is None] == [1, 6, 7, 10]
    assert json.loads((run / "summary.json").read_text())["skipped"] == 4
    if what == "loss":  # and resumed between two of them, it counts on
        other = tmp_path / "other"
        with monkeypatch.context() as patch:
            after_step(patch, 6, terminate)
            assert start("schedule.steps=12", "max_skipped=3", dir=other) == EXIT_PREEMPTED
        assert start("schedule.steps=12", "max_skipped=3", dir=other) == 0
        assert_same_tensors(tensors(other, 12), tensors(run, 12))
        assert rows(other) == rows(run)


def test_too_many_in_a_row_end_the_run_with_the_last_checkpoint_intact(
    start, run, reference, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        poison(patch, lambda step: step >= 10, "loss")
        assert start("max_skipped=4") == training.EXIT_DIVERGED == 3
        said = capsys.readouterr().out
        assert (
            "error: 4 steps in a row were not finite (max_skipped), up to batch 13; the last"
            " checkpoint is intact" in said
        )
        before = content(run / "checkpoints")
        assert (
            kept(run) == [8, 12]
            and open_checkpoint(step_folder(run, 12)).state["progress"]["skipped_in_a_row"] == 2
        )
        assert start("max_skipped=4") == 3  # the count goes on: no endless row of restarts
        assert content(run / "checkpoints") == before
    assert not (run / "summary.json").exists()
    shutil.rmtree(step_folder(run, 12))
    assert start() == 0
    assert_same_run(run, reference)


# No code


@pytest.mark.parametrize(
    "dump",
    [
        lambda bomb, file: file.write_bytes(pickle.dumps(bomb)),
        lambda bomb, file: torch.save({"model": bomb}, file),
    ],
    ids=["pickle", "torch"],
)
def test_nothing_that_is_loaded_runs_code(start, stopped, tmp_path, capsys, dump):
    marker, newest = tmp_path / "marker", step_folder(stopped, 13)

    def tools() -> None:
        for call in (
            lambda: load(stopped),
            lambda: load(stopped, 12),
            lambda: model.sample.main([f"run={stopped}", "tokens=2"]),
            lambda: launch.evaluate.main([f"run={stopped}"]),
            lambda: start(f"init.run={stopped}", dir=tmp_path / "branch"),
        ):
            with pytest.raises((ValueError, SystemExit)):
                call()
            assert not marker.exists()

    for name in (
        "extra.pt",
        "model.pt",
        "model.bin",
        "pytorch_model.bin",
        "optimizer.pkl",
        "rule.safetensors",
    ):  # beside what was saved
        dump(Bomb(marker), newest / name)
        dump(Bomb(marker), stopped / name)
    load(stopped)
    assert start("minutes=1e-6") == EXIT_PREEMPTED
    assert not marker.exists()
    for name in (
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "tokenizer.json",
        "state.json",
    ):  # instead of it
        for step in (12, 13):
            dump(Bomb(marker), step_folder(stopped, step) / name)
    tools()
    with pytest.raises(ValueError, match="damaged"):
        start()
    for text in (
        f"!!python/object/apply:os.mkdir ['{marker}']",
        f"seed: !!python/object/apply:os.mkdir ['{marker}']",
    ):
        (stopped / "config.yaml").write_text(text + "\n")
        tools()
        with pytest.raises(SystemExit), config.user_errors():
            start()
    assert "Traceback" not in capsys.readouterr().err
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # it would have gone off


def test_weights_with_a_flipped_byte_are_not_loaded(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "copy")
    load(run)
    weights = max(run.glob("checkpoints/step_*")) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="does not match its size or checksum"):
        load(run)
