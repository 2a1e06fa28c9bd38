"""The READMEs: each command that needs no network and no GPU is run as it stands, at a small scale;
links resolve, and what is read off the code is up to date."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import reference
from tests.runs import ROOT

READMES = [
    path
    for pattern in ("README.md", "*/README.md", "*/*/README.md")
    for path in sorted(ROOT.glob(pattern))
    if not any(part == "runs" or part.startswith(".") for part in path.relative_to(ROOT).parts)
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in READMES}
RESULTS = sorted((ROOT / "tests/benchmarks/results").glob("*.md"))
PROGRAMS = r"python|torchrun|make|pip|eval|wandb|srun|sbatch|lm_eval|launch/\w+\.sh"
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
SWEEP = ["optim=adamw,gsam,momentum_sam", "optim.diagnostics_every=1"]
PLAN = ["plan_only=true", "data.cache=cache"]

# What a command begins with: what makes it small.
RUNS = {
    "python train.py experiment=quickstart": RUN,
    "python train.py experiment=shakespeare_char": PLAN,
    "python train.py experiment=functional_sam_c4": PLAN,
    "python train.py plan_only=true model=nanodo_118m": [],
    "python train.py plan_only=true model=nanodo_1208m": [],
    "python train.py help=true": [],
    "python train.py optim=preconditioned_functional_sam": RUN,
    "python train.py -m optim=adamw,sam,functional_sam": RUN,
    "python train.py -m experiment=quickstart": ["print_only=true"],
    "python train.py -m ... hydra.launcher.n_jobs=2": RUN,
    "python train.py data=text data.path='books/*.txt'": [*SMALL, *FAST],
    "python train.py data=text 'data.sources=": SMALL,
    "python -m data.prepare tokenizer=bpe": [*CORPUS, *FAST],
    "python -m model.sample": ["tokens=5"],
    "python -m launch.evaluate run=runs/NAME": ["data.cache=cache", "data.validation_split=tail"],
    "python -m launch.evaluate run=OUT": ["data.cache=cache", "data.validation_split=tail"],
    "python -m model.export run=DIR": [],
    "python -m launch.status runs/radii": [],
    "python -m launch.report": [],
    "python -m launch.dashboard": ["offline=true"],
    "python -m launch.doctor": ["data.cache=cache"],
    "python train.py plan_only=true parallel=fsdp": ["batch.sequences=64"],
    "python train.py plan_only=true device=cuda": [],
}
NOT_RUN = {
    "make train": "installs; .ci/run does",
    "make test": "is what runs this",
    "make test-gpu": "needs a GPU; tests/test_gpu_rehearsal.py runs most of it on CPUs",
    "make lint": "is what .ci/run does after the tests",
    "pip install": "needs a network",
    "torchrun": (
        "takes eight processes; tests/test_scripts.py and tests/test_distributed.py start two"
    ),
    "srun": "needs Slurm; tests/test_slurm.py has one",
    "sbatch": "needs Slurm; tests/test_slurm.py has one",
    "launch/": "tests/test_scripts.py runs the scripts",
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
    "python -m launch.reference": "writes conf/README.md; its table is compared below",
    "python tests/benchmarks": "measures, for minutes",
    "wandb": "asks W&B; tests/test_wandb.py has a stand-in for it",
    "lm_eval": "needs a network; tests/test_export.py runs it on a task of its own",
    "eval": "changes a shell; tests/test_cli.py asks for completions",
}


def commands() -> list[str]:
    """The commands of all READMEs, in blocks and in sentences, each in one line, once and without
    its comment."""
    found = []
    for text in TEXTS.values():
        text = text.replace("\\\n", " ")
        found += re.findall(rf"^    ((?:{PROGRAMS})(?: .*?)?)(?:\s{{2,}}#.*)?$", text, re.M)
        prose = re.sub(
            r"^    .*$", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M
        )
        found += re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", prose)
    return list(dict.fromkeys(" ".join(command.split()) for command in found))


def of(command: str, known: dict) -> str | None:
    """The longest beginning of a command that is known."""
    return max((start for start in known if command.startswith(start)), key=len, default=None)


def test_every_command_is_run_or_there_is_a_reason():
    found = commands()
    assert len(found) > 40
    for command in found:
        assert (of(command, RUNS) is None) != (of(command, NOT_RUN) is None), command
        for script in re.findall(r"(?:tests/benchmarks|launch)/\w+\.(?:py|sh|sbatch)", command):
            assert (ROOT / script).exists(), command
    for start in (*RUNS, *NOT_RUN):
        assert any(command.startswith(start) for command in found), f"{start} is in no README"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name: texts, a finished run, its export and a sweep."""
    folder = tmp_path_factory.mktemp("readme")
    text = Path(subprocess.__file__).read_text()
    for name in ("corpus.txt", "books/one.txt", "tinyshakespeare/input.txt"):
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
        ["train.py", "-m", *RUN, *SWEEP, "hydra.sweep.dir=runs/radii"],
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


@pytest.mark.parametrize("command", [command for command in commands() if of(command, RUNS)])
def test_a_command_works_as_it_stands(place, command):
    start = of(command, RUNS)
    assert start
    shown = command
    for name, here in {
        "FILES": "corpus.txt",
        "runs/first ": "runs/radii ",
        "run=DIR": "run=runs/NAME",
        "out=OUT": "out=mine",
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
    printed = re.search(r"^    \$ python (.*)\n    (error: .*)$", TEXTS["conf/README.md"], re.M)
    command, answer = printed.groups()
    done = call([sys.executable, *shlex.split(command)], place)
    assert (done.returncode, done.stderr) == (2, f"{answer}\n")


def test_every_figure_of_a_row_is_explained(place):
    names = {
        name
        for file in place.glob("runs/**/metrics.jsonl")
        for line in file.read_text().splitlines()
        for name in json.loads(line)
    }
    names |= {
        name for file in place.glob("runs/**/summary.json") for name in json.loads(file.read_text())
    }
    assert len(names) > 30
    shown = re.findall(r"`([\w/]+)`", TEXTS["optim/README.md"])
    for name in names:
        of_any_set = re.sub(r"^val/\w+/", "val/", name)
        assert of_any_set in shown or name.removeprefix("sharpness/") in shown, name


def test_every_experiment_and_method_is_in_the_index():
    index = TEXTS["conf/experiment/README.md"]
    for name in (path.stem for path in ROOT.glob("conf/experiment/*.yaml")):
        assert f"`{name}`" in index, name
    for name in (path.stem for path in ROOT.glob("conf/optim/*.yaml")):
        assert f"`{name}`" in TEXTS["optim/README.md"], name
        assert name == "adamw" or f"`{name}`" in index, name


def test_the_table_of_keys_is_that_of_the_schema():
    text = TEXTS["conf/README.md"]
    assert text == reference.with_table(text), "out of date: python -m launch.reference writes it"


def test_every_link_leads_somewhere():
    for path in [*READMES, *RESULTS, ROOT / "CHANGELOG.md"]:
        text = re.sub(r"`[^`\n]*`", "", path.read_text())
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            other = (path.parent / name).resolve() if name else path
            assert other.exists(), f"{path}: {target}"
            if anchor:
                assert anchor in anchors(other.read_text()), f"{path}: {target}"


def anchors(text: str) -> list[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_first_page_is_short_and_no_line_too_wide():
    first = TEXTS["README.md"]
    assert len(first.splitlines()) <= 150 and len(first.split()) <= 1000
    for name, text in TEXTS.items():
        for line in text.splitlines():
            assert len(line) <= 120 or line.startswith("|"), f"{name}: {line}"
