"""The commands as a person types them: from training to text, and what is said to a mistake."""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import launch.evaluate
import model.sample
import train as training
from launch import config

ROOT = Path(__file__).resolve().parent.parent
# imported, the module would hide the function data.prepare
prepare = runpy.run_path(str(ROOT / "data/prepare.py"))["main"]
TRAIN = [sys.executable, str(ROOT / "train.py")]


def command(line: str) -> list[str]:
    """A printed command, for the interpreter of these tests."""
    program, *arguments = shlex.split(line)
    assert program == "python"
    return [sys.executable, *arguments]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 150 kB of text, in a file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(Path(argparse.__file__).read_text() + Path(subprocess.__file__).read_text())
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, cache):
    """A folder in which train.py has run to its end, and the completed process."""
    folder = tmp_path_factory.mktemp("home")
    arguments = [
        "model=tiny",
        "schedule.steps=10",
        "batch.length=64",
        "data=text",
        f"data.path={corpus}",
        "data.validation_split=tail",
        f"data.cache={cache}",
        "tracking.mode=off",
        "evaluation.tokens=null",
        "device=cpu",
        "optim.rho=0.1",
    ]
    return folder, subprocess.run([*TRAIN, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def run(finished, monkeypatch):
    """The run folder, seen from where it was trained."""
    folder, _ = finished
    monkeypatch.chdir(folder)
    (found,) = (folder / "runs").iterdir()
    return found.relative_to(folder)


def test_run_ends_with_its_result_a_sample_and_two_commands(finished, run):
    _, process = finished
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(r"tiny-adamw-text-10steps-s0-[0-9a-f]{8}", run.name)
    assert (
        process.stderr.count(
            "note: not read by this run, so left out of its name and identity: optim.rho\n"
        )
        == 1
    )
    for said in (
        "validation loss",
        "bits per byte",
        "bigram",
        "unigram",
        "a sample:",
        f"run folder: {run}",
    ):
        assert said in process.stdout
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "code"} <= {
        path.name for path in run.iterdir()
    }
    # nothing of Hydra's, no folder named by a clock
    assert [path.name for path in Path().iterdir()] == ["runs"]
    assert not list(Path().rglob(".hydra"))


def test_the_two_printed_commands_work(finished, run):
    _, process = finished
    printed = [
        line.strip()
        for line in process.stdout.split("try next:")[1].splitlines()
        if line.strip().startswith("python")
    ]
    assert len(printed) == 2
    started = [
        subprocess.Popen(command(line), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in printed
    ]
    (sample, trouble), (evaluation, more_trouble) = (process.communicate() for process in started)
    assert (trouble, more_trouble) == ("", "")
    prompt = shlex.split(printed[0])[-1].removeprefix("prompt=")
    assert prompt and sample.startswith(prompt) and len(sample) > 100
    loss = json.loads((run / "summary.json").read_text())["val/loss"]
    assert float(re.search(r"loss (\S+),", evaluation)[1]) == pytest.approx(loss, abs=2e-3)


def test_finished_run_says_so(run, cache, corpus):
    settings = (run / "config.yaml").read_text()
    process = subprocess.run(
        [
            *TRAIN,
            "model=tiny",
            "schedule.steps=10",
            "batch.length=64",
            "data=text",
            f"data.path={corpus}",
            "data.validation_split=tail",
            f"data.cache={cache}",
            "tracking.mode=off",
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0
    assert f"finished already: {run}/summary.json" in process.stdout
    assert "seed: 0" in settings and [path.name for path in Path("runs").iterdir()] == [run.name]


# model.sample


class Recorder(io.StringIO):
    """Standard output that keeps what was there at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def sampled(run: Path, monkeypatch, *arguments: str) -> Recorder:
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", recorder)
        model.sample.main([f"run={run}", "device=cpu", "tokens=40", *arguments])
    return recorder


def test_sample_streams_and_repeats_with_its_seed(run, monkeypatch):
    first, same, other = (
        sampled(run, monkeypatch, "prompt=import ", seed) for seed in ("seed=1", "seed=1", "seed=2")
    )
    assert first.getvalue() == same.getvalue() != other.getvalue()
    assert first.getvalue().startswith("import ") and first.getvalue().endswith("\n")
    assert len(set(first.flushed)) > 20  # it grew with every token but those that end no character
    greedy = [
        sampled(run, monkeypatch, "temperature=0", seed).getvalue() for seed in ("seed=1", "seed=2")
    ]
    assert greedy[0] == greedy[1]
    assert sampled(run, monkeypatch, "top_k=1").getvalue() == greedy[0]
    assert sampled(run, monkeypatch, "top_k=null", "top_p=1e-9", "step=10").getvalue() == greedy[0]
    for prompt in (
        "a=b, [c] {d",
        "???",
        "echo ${HOME}/bin",
        "null",
        "'é'\n\t~#",
        "${",
        "",
    ):  # a prompt is taken as it stands
        assert sampled(run, monkeypatch, f"prompt={prompt}").getvalue().startswith(prompt)


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (model.sample.main, ["tokens=3"], "run is missing; give run=..., run folder"),
        (
            model.sample.main,
            ["run="],
            "run= is empty, as an unset shell variable is; give a value, or leave run out",
        ),
        (
            model.sample.main,
            ["run=a\x1bb"],
            "run='a\\x1bb' has the control character '\\x1b' in it",
        ),
        (
            model.sample.main,
            ["run=~nobody-is-called-so/x"],
            "run=~nobody-is-called-so/x: no user has this name; write ./~nobody",
        ),
        (
            model.sample.main,
            ["run=nowhere"],
            "run=nowhere has no checkpoints; name the folder of a run",
        ),
        (
            model.sample.main,
            ["RUN", "temprature=1"],
            (
                "temprature=1: no such option; did you mean temperature=? --help lists all: run=,"
                " step="
            ),
        ),
        (
            model.sample.main,
            ["RUN", "optim.lr=1"],
            "optim.lr=1: no such option; --help lists all: run=, step=",
        ),
        (
            model.sample.main,
            ["RUN", "--temperature=1"],
            "--temperature=1: no such option; did you mean temperature=?",
        ),
        (model.sample.main, ["RUN", "temp=1"], "temp=1: no such option; did you mean temperature="),
        (model.sample.main, ["RUN", "seed"], "seed: no such option; did you mean seed=?"),
        (model.sample.main, ["RUN", "--hlep"], "--hlep: no such option; did you mean --help?"),
        (model.sample.main, ["runs/x"], "runs/x: no such option"),
        (
            model.sample.main,
            ["RUN", "temperature=1e-320"],
            "temperature=1e-320 is out of range; it is 0 in fp32",
        ),
        (
            model.sample.main,
            ["RUN", "tokens=10000000000000"],
            "tokens=10000000000000 is out of range",
        ),
        (model.sample.main, ["RUN", "tokens=true"], "tokens=true has the wrong type"),
        (
            model.sample.main,
            ["RUN", "temperature=-1"],
            "temperature=-1.0 is out of range; it must be at least 0.0",
        ),
        (model.sample.main, ["RUN", "temperature=nan"], "temperature=nan is not finite"),
        (
            model.sample.main,
            ["RUN", "temperature=hot"],
            "temperature=hot has the wrong type; give temperature=<float>",
        ),
        (model.sample.main, ["RUN", "temperature=null"], "temperature=null has the wrong type"),
        (
            model.sample.main,
            ["RUN", "tokens=2.5"],
            "tokens=2.5 has the wrong type; give tokens=<int>",
        ),
        (model.sample.main, ["RUN", "tokens=0"], "tokens=0 is out of range"),
        (model.sample.main, ["RUN", "top_k=0"], "top_k=0 is out of range"),
        (
            model.sample.main,
            ["RUN", "top_k=[1"],
            "top_k=[1 has the wrong type; give top_k=<int or null>",
        ),
        (
            model.sample.main,
            ["RUN", "top_p=0"],
            "top_p=0.0 is out of range; it must be above 0.0 and at most 1.0",
        ),
        (model.sample.main, ["RUN", "top_p=1.1"], "top_p=1.1 is out of range"),
        (
            model.sample.main,
            ["RUN", "device=tpu"],
            "device=tpu is unknown; choose one of auto, cpu, cuda",
        ),
        (model.sample.main, ["RUN", "step=3"], "step=3 is not among the checkpoints"),
        (launch.evaluate.main, ["length=3"], "run is missing; give run=..., run folder"),
        (launch.evaluate.main, ["RUN", "data=[text,stdlib]"], "data=[text,stdlib]: no such choice"),
        (
            launch.evaluate.main,
            ["run=nowhere"],
            "run=nowhere has no checkpoints; name the folder of a run",
        ),
        (
            launch.evaluate.main,
            ["RUN", "lenght=3"],
            "lenght=3: no such option; did you mean length=?",
        ),
        (
            launch.evaluate.main,
            ["RUN", "batch.length=32"],
            "batch.length=32: no such option; did you mean length=?",
        ),
        (launch.evaluate.main, ["RUN", "length=0"], "length=0 is out of range"),
        (launch.evaluate.main, ["RUN", "data=nope"], "data=nope: no such choice; choose one of "),
        (launch.evaluate.main, ["RUN", "data=text"], "data=text needs one of the two"),
        (
            launch.evaluate.main,
            ["RUN", "data=text", "data.path=nowhere.txt"],
            "data.path=nowhere.txt matches no file",
        ),
        (
            launch.evaluate.main,
            ["RUN", "data.pth=x"],
            "data.pth=x: no such key; did you mean data.path?",
        ),
        (prepare, ["data.pth=x"], "data.pth=x: no such key; did you mean data.path?"),
        (prepare, ["temprature=1"], "temprature=1: no such key"),
        (prepare, ["--workers=2"], "--workers=2: keys take no dashes; write data.workers=2"),
        (prepare, ["data=text", "data.path="], "data.path= is empty"),
        (prepare, ["data=text", "data.path=nowhere.txt"], "data.path=nowhere.txt matches no file"),
        (
            prepare,
            ["data=text", "data.path=runs"],
            "metrics.jsonl: line 1 has no text in field 'text'",
        ),
        (prepare, ["tokenizer=nope"], "tokenizer=nope: no such choice"),
    ],
)
def test_mistake_in_a_tool_is_one_line(run, capsys, main, arguments, said):
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as end:
        main([f"run={run}" if argument == "RUN" else argument for argument in arguments])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err)
    assert said in err
    assert sorted(Path().rglob("*")) == before


# launch.evaluate and data.prepare


def test_evaluate_on_another_corpus_and_at_another_length(run, tmp_path, cache, capsys):
    other = tmp_path / "other.txt"
    other.write_text(Path(textwrap.__file__).read_text())

    def loss(*arguments: str) -> float:
        launch.evaluate.main([f"run={run}", "device=cpu", *arguments])
        return float(
            re.search(
                r"loss (\S+), perplexity \S+ \S+ bits per byte over [\d,]+ tokens",
                capsys.readouterr().out,
            )[1]
        )

    own = loss()
    elsewhere = loss(
        "data=text",
        f"data.path={other}",
        "data.validation_split=tail",
        "data.validation_fraction=0.5",
        f"data.cache={cache}",
    )
    assert 0 < elsewhere < 8 and elsewhere != own
    assert loss("sequences=3") == pytest.approx(own, abs=1e-3)
    assert loss("length=16") != own


def test_prepare_fills_the_cache_that_training_reads(tmp_path, corpus, capsys):
    overrides = [
        "data=text",
        f"data.path={corpus}",
        "data.validation_split=tail",
        f"data.cache={tmp_path}",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
    ]
    prepare(overrides)
    out = capsys.readouterr().out
    assert "train/text: " in out and "validation/validation: " in out and "vocabulary 300" in out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")}
    prepare(overrides)
    assert before and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")} == before


def test_trained_tokenizer_goes_with_the_run(tmp_path, corpus, cache, train, monkeypatch):
    process = train(
        "model=tiny",
        "schedule.steps=5",
        "batch.length=64",
        "data=text",
        f"data.path={corpus}",
        "data.validation_split=tail",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
        "dir=mine",
        "device=cpu",
        "evaluation.baselines=false",
    )
    assert process.returncode == 0, process.stderr
    monkeypatch.chdir(tmp_path)
    assert sampled(Path("mine"), monkeypatch, "prompt=def ").getvalue().startswith("def ")
    assert (
        json.loads((tmp_path / "mine/checkpoints/step_00000005/state.json").read_text())["model"][
            "vocab_size"
        ]
        == 300
    )


# train.py


def test_mistakes_end_the_real_process_with_one_line_and_nothing_on_disk(tmp_path):
    mistakes = {
        "optim.rh=0.1": "did you mean optim.rho?",
        "schedule.warmup_steps=5000": "schedule.warmup_steps=5000 reaches beyond the horizon",
        "-m seed=0,1 batch.micro=5": "batch.micro=5; choose a divisor",
        "-m model=tiny,huge": "model=huge: no such choice",
        "print_only=true": "use plan_only=true for one run",
        "--optim=sam": "--optim=sam: keys take no dashes; write optim=sam",
    }
    started = [
        subprocess.Popen(
            [*TRAIN, *line.split()],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in mistakes
    ]
    for process, (line, said) in zip(started, mistakes.items(), strict=True):
        out, err = process.communicate()
        assert (process.returncode, out) == (2, ""), line
        assert re.fullmatch(r"error: .+\n", err), err
        assert said in err
        assert "Hydra" not in err and "HYDRA" not in err
    assert list(tmp_path.iterdir()) == []


# Help


COMMANDS = {
    "data.prepare": ["data.path", "tokenizer.vocab_size"],
    "model.sample": ["run", "top_p"],
    "model.export": ["run", "out"],
    "launch.evaluate": ["run", "length", "data.path"],
    "launch.report": ["DIR ...", "out", "axis"],
    "launch.status": ["DIR", "resubmit"],
    "launch.dashboard": ["entity", "offline", "out"],
}


def answers(tmp_path, *commands: list[str]) -> list[subprocess.CompletedProcess]:
    """What commands print that run beside each other in an empty folder, which stays so."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    found = [
        subprocess.CompletedProcess(process.args, 0, *process.communicate()) for process in started
    ]
    for answer, process in zip(found, started, strict=True):
        answer.returncode = process.returncode
    assert not list(tmp_path.iterdir())
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(tmp_path, name):
    """However it is asked for, and beside whatever else; called bare a command acts on nothing."""
    ways = ([], ["-h"], ["--help"], ["help=true"], ["HELP=True", "nonsense=3"])
    bare, *asked = answers(tmp_path, *(["-m", name, *way] for way in ways))
    assert (bare.returncode, bare.stderr) == (2, "")
    for answer in asked:
        assert (answer.returncode, answer.stderr, answer.stdout) == (0, "", bare.stdout)
    purpose, *lines = bare.stdout.splitlines()
    assert purpose[0].isupper() and purpose.endswith(".")
    assert sum(line.startswith(f"python -m {name} ") for line in lines) == 2
    for key in COMMANDS[name]:
        assert any(re.match(rf"{re.escape(key)} +[\w| \[\]]+  \S+", line) for line in lines), key


def test_help_of_training(tmp_path):
    ways = (
        ["-h"],
        ["--help"],
        ["help=true"],
        ["-m", "seed=0,1", "--help"],
        ["optim.rhoo=1", "help=true"],
    )
    found = answers(tmp_path, *([TRAIN[1], *way] for way in ways))
    for answer in found:
        assert (answer.returncode, answer.stderr, answer.stdout) == (0, "", found[0].stdout)
    assert len(re.findall(r"(?m)^    python train\.py ", found[0].stdout)) == 4


def test_help_may_be_cut_short(tmp_path):
    for command in ([TRAIN[1], "-h"], ["-m", "launch.evaluate", "-h"]):
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert (process.returncode, process.stderr) == (0, "")


def test_tab_completion(tmp_path):
    """Hydra's script, and the choices and keys that it offers."""
    script, *offers = (
        subprocess.run(
            [*TRAIN, "-sc", f"{what}=bash"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))},
        )
        for what, line in (
            ("install", ""),
            ("query", "python train.py optim=fun"),
            ("query", "python train.py optim.cotangent_"),
        )
    )
    assert (script.returncode, script.stderr) == (0, "") and "complete" in script.stdout
    assert offers[0].stdout.split() == ["optim=functional_sam"]
    assert offers[1].stdout.split() == ["optim.cotangent_share="]
    assert not list(tmp_path.iterdir())


def test_options_work_on_pythons_that_check_help_texts(tmp_path, monkeypatch, capsys):
    """Python 3.14's argparse refuses help that is no string, as an option of Hydra has."""

    def check(parser, action):
        if action.help and "%" not in action.help:
            return

    add = argparse._ActionsContainer._add_action
    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "_add_action",
        lambda parser, action: (parser._check_help(action), add(parser, action))[1],
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", "job"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    config.main(training.main)
    assert "optim:" in capsys.readouterr().out


# A run's folder where a tilde says


def test_tilde_is_the_home_of_every_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(run.parent.resolve()))
    assert sampled(run, monkeypatch, f"run=~/{run.name}", "tokens=1").getvalue()
    for argument in ("plan_only=true", "print_only=true"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "train.py",
                *(["-m"] if "print" in argument else []),
                argument,
                "model=tiny",
                "hydra.sweep.dir=~/sweep",
            ],
        )
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) if "plan" in argument else contextlib.nullcontext():
            config.main(training.main)
    assert f"runs in {run.parent.resolve()}/sweep" in capsys.readouterr().out
    assert not Path("~").exists()


def test_bug_is_not_passed_off_as_a_mistake(monkeypatch):
    """Whatever is no user's mistake ends with its traceback."""
    monkeypatch.setattr(sys, "argv", ["train.py", "plan_only=true"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(training, "make_plan", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        config.main(training.main)
