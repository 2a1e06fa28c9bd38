"""The commands that README.md prints: each one that needs no network and no GPU is run as it
stands, at a small scale."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs import ROOT

README = (ROOT / "README.md").read_text()
SMALL = [
    "model=tiny",
    "model.max_length=64",
    "batch.length=32",
    "schedule.steps=2",
    "schedule.warmup=0",
    "evaluation.tokens=256",
    "evaluation.sample=4",
    "evaluation.baselines=false",
    "tracking=none",
    "device=cpu",
    "data.cache=cache",
]
CORPUS = ["data=text", "data.path=corpus.txt", "data.validation_split=tail"]
RUN = [*SMALL, *CORPUS]
FAST = ["data.cache=cache", "tokenizer.vocab_size=300", "data.validation_split=tail"]

# What a command begins with: what makes it small.
RUNS = {
    "python train.py experiment=quickstart": RUN,
    "python train.py plan_only=true model=nanodo_118m": [],
    "python train.py plan_only=true model=nanodo_1208m": [],
    "python train.py help=true": [],
    "python train.py optim=preconditioned_functional_sam": RUN,
    "python train.py -m optim=adamw,sam,functional_sam": RUN,
    "python train.py -m ... hydra.launcher.n_jobs=2": RUN,
    "python train.py data=text data.path='books/*.txt'": [*SMALL, *FAST],
    "python train.py data=text 'data.sources=": SMALL,
    "python -m data.prepare tokenizer=bpe": [*CORPUS, *FAST],
    "python -m model.sample": ["tokens=5"],
    "python -m launch.evaluate run=runs/NAME": ["data.cache=cache", "data.validation_split=tail"],
    "python -m launch.evaluate run=OUT": ["data.cache=cache", "data.validation_split=tail"],
    "python -m model.export run=runs/NAME": [],
    "python -m model.export run=DIR": [],
    "python -m launch.status runs/radii": [],
    "python -m launch.report DIR": [],
    "python -m launch.dashboard": ["offline=true"],
    "python train.py plan_only=true parallel=fsdp": ["batch.sequences=64"],
}
NOT_RUN = {
    "make train": "installs; .ci/run does",
    "make test": "is what runs this",
    "torchrun": (
        "takes eight processes; tests/test_scripts.py and tests/test_distributed.py start two"
    ),
    "python train.py -m ... hydra/launcher=slurm": "needs Slurm; tests/test_slurm.py has one",
    "python -m data.prepare data=c4": "needs a network; tests/test_hub.py prepares local datasets",
    "python -m data.prepare data=hub": "needs a network; tests/test_hub.py prepares local datasets",
    "python train.py data=tokens": (
        "needs the ranks of GPT-2's tokenizer; tests/test_tokens.py reads such files"
    ),
    "python train.py model=gpt2_124m": (
        "needs a network; tests/test_hf.py starts from local folders"
    ),
    "python train.py model=llama_1b": "needs a network; tests/test_hf.py starts from local folders",
    "python train.py ... optim=sam init.run=DIR": (
        "needs a run that kept the step; tests/test_rule_runs.py branches"
    ),
    "python train.py optim=smoothed_sam": (
        "needs the method that the text adds; tests/test_rule_runs.py adds one"
    ),
    "python tests/benchmarks": "measures, for minutes",
    "eval": "changes a shell; tests/test_cli.py asks for completions",
}


def commands() -> list[str]:
    """The commands of README.md, in blocks and in sentences, each in one line and without its
    comment."""
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^    ((?:python|torchrun|make|pip|eval) .*?)(?:\s{2,}#.*)?$", text, re.M)
    lines += re.findall(r"`(python (?:train|-m|tests)[^`]+)`", text)
    return [" ".join(line.split()) for line in lines]


def of(command: str, known: dict) -> str | None:
    """The longest beginning of a command that is known."""
    return max((start for start in known if command.startswith(start)), key=len, default=None)


def test_every_command_is_run_or_there_is_a_reason():
    found = commands()
    assert len(found) > 20
    for command in found:
        assert (of(command, RUNS) is None) != (of(command, NOT_RUN) is None), command
    for start in (*RUNS, *NOT_RUN):
        assert any(command.startswith(start) for command in found), (
            f"{start} is no longer in README.md"
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name: texts, a finished run, its export and a sweep."""
    folder = tmp_path_factory.mktemp("readme")
    text = Path(subprocess.__file__).read_text()
    for name in ("corpus.txt", "books/one.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            "<|endoftext|>\n".join(
                text[place : place + 500] + "\n" for place in range(0, 40_000, 500)
            )
        )
    rows = pa.table({"text": [text[place : place + 500] for place in range(0, 40_000, 500)]})
    for name in ("web/a.parquet", "held_out/web.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(rows, folder / name)
    for name in ("code.jsonl", "held_out/code.jsonl"):
        rows.to_pandas().to_json(folder / name, orient="records", lines=True)
    for arguments in (
        ["train.py", *RUN, "dir=runs/NAME"],
        ["-m", "model.export", "run=runs/NAME", "out=OUT"],
        ["train.py", "-m", *RUN, "hydra.sweep.dir=runs/radii"],
    ):
        done = call([sys.executable, *arguments], folder)
        assert done.returncode == 0, done.stderr
    return folder


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Runs a command of this checkout in a folder."""
    command = [str(ROOT / word) if word == "train.py" else word for word in command]
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    "command", [command for command in dict.fromkeys(commands()) if of(command, RUNS)]
)
def test_a_command_of_the_readme_works_as_it_stands(place, command):
    start = of(command, RUNS)
    assert start
    shown = command
    for name, here in {
        "FILES": "corpus.txt",
        "run=DIR": "run=runs/NAME",
        "out=DIR": "out=mine",
        "DIR...": "runs",
        " ...": "",
    }.items():
        shown = shown.replace(name, here)
    # What stands in brackets may be left out.
    _python, *words = shlex.split(re.sub(r" \[[^]]*\]", "", shown))
    done = call([sys.executable, *words, *RUNS[start]], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout and "Traceback" not in done.stderr


def test_the_mistake_is_answered_as_printed(place):
    command, answer = re.search(r"^    \$ python (.*)\n    (error: .*)$", README, re.M).groups()
    done = call([sys.executable, *shlex.split(command)], place)
    assert (done.returncode, done.stderr) == (2, f"{answer}\n")
