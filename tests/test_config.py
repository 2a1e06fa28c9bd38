"""Every choice composes, every key is described, and a mistake costs one line and exit code 2 and
leaves nothing behind."""

import copy
import json
import math
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, get_args

import hydra
import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import train
from conf import composition, overrides
from conf.key import check_value
from conf.keys import KEYS, lookup, walk
from conf.launcher import LauncherConfig
from conf.overrides import CONF, LAUNCHER_KEYS, groups
from conf.rule import OptimConfig
from conf.schema import Config
from launch import config
from launch.config import checks, compose, configure
from launch.plan.description import describe
from launch.plan.plan import make_plan
from launch.run.identity import run_name
from launch.sweep.sweep import check_launcher
from optim import build_schedule

CHOICES = [(group, name) for group, names in groups().items() if group != "local" for name in names]
# named, never opened: nothing is read before a configuration is found to be in order
FILE = "data.path=corpus.txt"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Calls train.py with arguments, in this process and in an empty folder; returns (exit code,
    stdout, stderr)."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which train.py sets, to be put back

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as end:
            config.main(train.main)
        assert Path.cwd() == folder
        assert not list(folder.iterdir())
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refusal(command):
    """What train.py says to arguments that it refuses."""

    def call(*arguments: str) -> str:
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), f"{arguments} was not refused: exit code {code}"
        assert re.fullmatch(r"error: .+\n", err), err
        return err

    return call


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of conf/ that train.py reads instead."""
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder, ignore=shutil.ignore_patterns("local", "__pycache__"))
    for module in (checks, composition, configure, overrides):
        monkeypatch.setattr(module, "CONF", str(folder))
    return folder


# Choices


def leaves(plain: Any, prefix: str) -> dict[str, Any]:
    """Everything in nested dictionaries by dotted name; a key that takes any value is not looked
    into."""
    if not isinstance(plain, dict) or prefix in KEYS:
        return {prefix: plain}
    return {
        name: value
        for key, part in plain.items()
        for name, value in leaves(part, f"{prefix}.{key}".strip(".")).items()
    }


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_choice_composes_and_says_what_it_means(group, name):
    try:
        composed = compose([f"{group}={name}"])
    except ValueError as error:  # it leaves to the user which files, and nothing else
        assert group in ("data", "experiment") and "data.path" in str(error)
        composed = compose([f"{group}={name}", FILE])
    text = (Path(CONF) / group / f"{name}.yaml").read_text()
    content = yaml.safe_load(text)
    content.pop("defaults", None)
    for key, value in leaves(content, "" if "@package _global_" in text else group).items():
        kind = KEYS[key].type
        assert kind is Any or type(value) in (
            kind,
            *get_args(kind),
        ), f"{key}={value!r} is no {kind}"  # OmegaConf would convert it
        # the set of a single split of a dataset gets that name
        assert lookup(composed, key) in (
            value,
            {"validation": value},
        )
    if group in ("model", "experiment"):
        assert make_plan(composed).num_parameters > 0


def test_every_group_has_a_default_and_no_other_folder_counts():
    assert set(groups()) - {"local"} == {
        "model",
        "tokenizer",
        "data",
        "optim",
        "schedule",
        "parallel",
        "tracking",
        "task",
        "experiment",
    }


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 0.1),
        ("nanodo_500k", 0.5),
        ("nanodo_2500k", 2.6),
        ("nanodo_10m", 10.6),
        ("nanodo_24m", 23.9),
        ("nanodo_43m", 42.5),
        ("nanodo_118m", 117.9),
        ("nanodo_1208m", 1208.0),
        ("gpt2_124m", 124.4),
        ("gpt2_355m", 354.8),
        ("gpt2_774m", 774.0),
        ("gpt2_1558m", 1557.6),
    ],
)
def test_shapes_have_the_published_sizes(name, millions):
    tokenizer = ["tokenizer=bpe", "tokenizer.vocab_size=50257"] if name.startswith("gpt2") else []
    plan = make_plan(compose([f"model={name}", *tokenizer]))
    count = plan.num_parameters if tokenizer else plan.num_non_embedding
    assert count / 1e6 == pytest.approx(millions, abs=0.09)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.rh=0.1"], "optim.rh=0.1: no such key; did you mean optim.rho?"),
        (["optmi.rho=0.1"], "did you mean optim.rho?"),
        (["lr=3e-4"], "did you mean optim.lr?"),
        (["steps=5"], "did you mean schedule.steps?"),
        (["modell=tiny"], "modell=tiny: no such key; did you mean model?"),
        (["foo=1"], "foo=1: no such key; python train.py help=true"),
        (["optim.lr.x=3"], "optim.lr"),
        (["model@foo=tiny"], "model@foo=tiny: no such key"),
        (["data.sources.wiki.weight=2"], "data.sources.wiki.weight: no such key"),
        (["model=huge"], "model=huge: no such choice; choose one of gpt2_124m, "),
        (["data=nope"], "data=nope: no such choice; choose one of "),
        (["experiment=nope"], "experiment=nope: no such choice"),
        (["optim=null"], "optim=null: no such choice; choose one of adamw"),
        (
            ["seed=1,2"],
            (
                "seed=1,2: several values are a sweep; give one, or start a sweep with python"
                " train.py -m"
            ),
        ),
        (["+foo=1"], "+foo=1: keys are neither added"),
        (["+optim.rho=0.3"], "write optim.rho=VALUE"),
        (["++optim.rho=0.3"], "write optim.rho=VALUE"),
        (
            ["data.path=" + "[" * 3000 + "]" * 3000],
            "[[[... is malformed; no value is as long or as deep",
        ),
        (["seed=" + "9" * 5000], "999... is malformed; no value is as long or as deep"),
        (["+épée=3"], "+épée=3: keys are neither added nor taken away"),
        (["é=3"], "é=3: no such key"),
        (["~optim.rho"], "~optim.rho: keys are neither added nor taken away"),
        (["~model"], "~model: keys are neither added nor taken away"),
        (["optim.rho"], "optim.rho is malformed; write key=value"),
        (["optim.rho==3"], "optim.rho==3 is malformed"),
        (["optim.rho=[1,2"], "optim.rho=[1,2 is malformed"),
        (["optim.rho=${nope}"], "optim.rho: Interpolation key 'nope' not found"),
        (["dir=${oc.env:NO_SUCH_VARIABLE}"], "dir: "),
        (["=3"], "=3: no such key"),
        (
            ["batch.sequences=32", "batch.micro=5"],
            "batch.sequences=32 is not divisible by batch.micro=5; choose a divisor",
        ),
        (["batch.sequences=32", "batch.micro=64"], "batch.micro=64"),
        (["batch.length=2048"], "batch.length=2048 exceeds model.max_length=1024; shorten"),
        (
            ["model.width=100", "model.num_heads=3"],
            "model.width=100 is not divisible by model.num_heads=3; choose",
        ),
        (
            ["model.num_heads=4", "model.width=64", "model.num_kv_heads=3"],
            "model.num_kv_heads=3 does not divide model.num_heads=4; choose",
        ),
        (
            ["schedule.steps=10", "schedule.warmup_steps=10"],
            "schedule.warmup_steps=10 reaches beyond the horizon of 10 steps; shorten",
        ),
        (["schedule.warmup=1"], "schedule.warmup=1 reaches beyond the horizon"),
        (
            ["schedule.tokens=10", "schedule.warmup_steps=3"],
            "schedule.warmup_steps=3 reaches beyond the horizon of 1 steps",
        ),
        (["schedule.shape=wsd", "schedule.decay=0.99"], "schedule.decay=0.99 overlaps the warm-up"),
        (["schedule.steps=null"], "schedule.steps=null leaves no horizon; set"),
        (["data=text"], "data=text needs one of the two: data.path=FILES or data.sources"),
        (["data=tokens"], "data=tokens needs one of the two: data.path=FILES or data.sources"),
        (
            ["data=hub"],
            (
                "data.path=None names no dataset; data=hub needs its name on the hub, as in"
                " data.path=allenai/c4, or a folder"
            ),
        ),
        (["data=hub", "data.path=[a]"], "data.path=['a'] names no dataset"),
        (["data=c4", "data.validation={v: 3}"], "data.validation.v=3 names no files"),
        (["data=c4", "data.documents=0"], "data.documents=0 is out of range"),
        (["data=text", FILE, "data.sources={a: {path: x}}"], "data=text needs one of the two"),
        (["data=text", "data.path="], "data.path= is empty, as an unset shell variable is"),
        (["data=text", "data.path={a: b}"], "data.path={'a': 'b'} names no files"),
        (["data=text", "data.path=[a,3]"], "data.path=['a', 3] names no files"),
        (
            ["data=text", "data.sources=3"],
            "data.sources=3 is malformed; write data.sources='{NAME: {path: FILES, weight: 1.0}}'",
        ),
        (["data=text", "data.sources=[a]"], "data.sources=['a'] is malformed"),
        (["data=text", "data.sources={a: b}"], "data.sources={'a': 'b'} is malformed"),
        (["data=text", "data.sources={a: {path: x, wieght: 2}}"], "'wieght': 2}} is malformed"),
        (["data=text", "data.sources={a: {weight: 2}}"], "is malformed"),
        (["data=text", "data.sources={a: {path: x, weight: heavy}}"], "is malformed"),
        (["data=text", "data.sources={a: {path: x, weight: true}}"], "is malformed"),
        (
            ["data=text", "data.sources={a: {path: x, weight: -2}}"],
            "data.sources.a.weight=-2.0 is out of range; it must be above 0.0",
        ),
        (
            ["data=text", "data.sources={a: {path: x, weight: nan}}"],
            "data.sources.a.weight=nan is not finite",
        ),
        (
            ["data=text", "data.sources={a: {path: null}}"],
            "data.sources.a.path=None names no files",
        ),
        (
            ["data=text", "data.sources={../a: {path: x}}"],
            "data.sources=../a goes into a folder's name",
        ),
        (
            ["data=text", "data.sources={..: {path: x}}"],
            "data.sources=.. goes into a folder's name",
        ),
        (
            ["data=text", FILE, "data.validation=3"],
            "data.validation=3 is malformed; write data.validation='{NAME: FILES}'",
        ),
        (["data=text", FILE, "data.validation=[a]"], "data.validation=['a'] is malformed"),
        (["data=text", FILE, "data.validation={a: 3}"], "data.validation.a=3 names no files"),
        (
            ["data=text", FILE, "data.validation={a/b: y}"],
            "data.validation=a/b goes into a folder's name",
        ),
        (["model.name=a/b"], "model.name=a/b goes into a folder's name; use letters, digits"),
        (["optim.name=.."], "optim.name=.. goes into a folder's name"),
        (["data.name="], "data.name= is empty"),
        (["init.step=3"], "init.step=3 needs a run to take it from; set init.run=DIR"),
        (["init.optimizer=true"], "init.optimizer=true needs a run"),
        (["optim=samm"], "optim=samm: no such choice; choose one of adamw, angle_sam, asam"),
        (["optim=sam", "optim.rho=-0.1"], "optim.rho=-0.1 is out of range; it must be at least 0"),
        (
            ["optim=sam", "optim.direction=uphill"],
            (
                "optim.direction=uphill is unknown; choose one of gradient, momentum, stale,"
                " friendly, random"
            ),
        ),
        (
            ["optim=sam", "optim.path=half"],
            "optim.path=half is unknown; choose one of none, full, functional, logit, angle",
        ),
        (["optim=sam", "optim.metric=riemannian"], "optim.metric=riemannian is unknown"),
        (["optim=angle_sam", "optim.angle=91"], "optim.angle=91.0 is out of range"),
        (["optim=sam", "optim.period=0"], "optim.period=0 is out of range"),
        (["optim=sam", "optim.ascent_fraction=0"], "optim.ascent_fraction=0.0 is out of range"),
        (["optim=sam", "optim.diagnostics_every=0"], "optim.diagnostics_every=0 is out of range"),
        (
            ["optim=sam", "optim.start=1000"],
            (
                "optim.start=1000 lies beyond the horizon of 1000 steps: the rule would never act;"
                " start earlier"
            ),
        ),
        (
            ["optim=sam", "optim.start=0.5", "optim.stop=0.2"],
            "optim.stop=0.2 is not after optim.start=0.5: the rule would never act; stop later",
        ),
        (
            ["optim=preconditioned_sam", "optim.base=sgd"],
            (
                "optim.metric=adam needs Adam's second moment, which optim.base=sgd does not keep"
                " of every weight; use optim.base=adamw or optim.metric=euclidean"
            ),
        ),
        (
            ["optim=preconditioned_functional_sam", "optim.base=muon"],
            "which optim.base=muon does not keep",
        ),
        (
            ["optim=adamw", "optim.path=full"],
            "optim.path=full moves the weights, and the run would be called adamw; use optim=sam",
        ),
        (["optim.path=functional"], "and the run would be called adamw; use optim=functional_sam"),
        (
            ["optim=sam", "optim.name=adamw"],
            "optim.path=full moves the weights, and the run would be called adamw",
        ),
        (
            ["optim.name=sam"],
            (
                "optim.path=none is the plain gradient, and the run would be called sam; use"
                " optim=adamw"
            ),
        ),
        (
            ["optim=sam", "optim.name=asam"],
            "optim.name=asam is the name of a method, and the run need not be that; use optim=asam",
        ),
        (
            ["data.source=text", FILE],
            "data.source=text is another corpus, and the run would be called stdlib; use data=text",
        ),
        (["optim.lr=1e-3é"], "optim.lr=1e-3é is malformed at é; give optim.lr=<float>"),
        (["dir=[a]"], """a text is written 'dir="[a]"', with both layers of quotes"""),
        (["data.path=[it's,b]"], "is malformed at 's,b]; a text is written"),
        (
            ["data.path=~nobody-is-called-so", "data=text"],
            "~nobody-is-called-so: no user has this name; write ./~nobody-is-called-so for a",
        ),
        (["seed=range(0,3)"], "seed=range(0,3): several values are a sweep"),
        (["-m", "seed=range(0,-5)"], "seed=range(0,-5) has no values, so the sweep has no runs"),
        (["-m", "seed=range(0,5,0)"], "seed=range(0,5,0) takes steps of 0"),
        (["-m", "optim.lr=range(0.0,1.0,0.0)"], "takes steps of 0; write range(START,STOP,STEP)"),
        (["-m", "seed=interval(0,1)"], "seed=interval(0,1) is a range without steps"),
        (["-m", "optim=glob(nope*)"], "optim=glob(nope*) has no values"),
        (["-m", "seed=range(0,1000000000)"], "makes a sweep of more than 10,000 runs"),
        (
            ["-m", "seed=range(0,1000)", "optim.lr=range(0.0,1.0,0.001)"],
            "makes a sweep of more than 10,000 runs",
        ),
        (["-m", "optim=[adamw,sam],adamw"], "optim=[adamw,sam],adamw: no such choice"),
        (
            ["-m", "seed=0,1", "hydra.launcher.partion=x"],
            "hydra.launcher.partion: no such key; did you mean hydra.launcher.partition?",
        ),
        (["--plan-only"], "--plan-only: keys take no dashes; write plan_only=VALUE"),
        (["--lr=3"], "--lr=3: keys take no dashes; write optim.lr=3"),
        (["--multirn", "seed=0,1"], "--multirn: no such option; did you mean --multirun?"),
        (["--cfg", "jobb"], "invalid choice: 'jobb'"),
        (
            ["schedule=chinchilla", "schedule.tokens_per_parameter=1e9"],
            "schedule.tokens_per_parameter=1e+09 makes",
        ),
        (
            ["schedule.tokens=1e18"],
            (
                "schedule.tokens=1e+18 makes 2.44e+14 steps of 4,096 tokens, where 2,147,483,647"
                " are the most; lower it"
            ),
        ),
        (
            [
                "model.num_heads=1024",
                "model.width=1048576",
                "model.num_layers=1000",
                "plan_only=true",
            ],
            "where any device has 64.0 TiB; lower",
        ),
        (
            ["batch.sequences=1048576", "batch.length=1024"],
            "tokens, 1048576 sequences at a time, need at least",
        ),
        (
            ["optim=sam", "optim.path=none"],
            (
                "optim.path=none is the plain gradient, and the run would be called sam; use"
                " optim=adamw"
            ),
        ),
        (
            ["optim=sam", "optim.start=2.5"],
            "optim.start=2.5 is no whole step; give one, or a fraction of the horizon below 1",
        ),
        (["optim=sam", "optim.stop=1.5"], "optim.stop=1.5 is no whole step"),
        (
            ["optim.base=muon", "parallel=fsdp"],
            "optim.base=muon orthogonalises whole matrices, which parallel=fsdp keeps in shards",
        ),
        (
            ["optim=momentum_sam", "optim.base=sgd", "optim.momentum=0"],
            "optim.direction=momentum needs a momentum, and optim.momentum=0; raise it",
        ),
        (
            ["optim=momentum_sam", "optim.scope=micro_batch"],
            (
                "optim.direction=momentum is the same for every group, so optim.scope=micro_batch"
                " means nothing; use optim.scope=batch"
            ),
        ),
        (
            ["optim=stale_sam", "optim.scope=micro_batch"],
            "optim.direction=stale is the same for every group",
        ),
        (
            ["optim=stale_sam", "optim.ascent_fraction=0.5"],
            "optim.ascent_fraction=0.5 is about the ascent gradient, which optim.direction=stale",
        ),
        (
            ["optim=momentum_sam", "optim.weights=delta"],
            "optim.weights=delta is about the ascent gradient",
        ),
        (
            ["optim=sam", "optim.scope=replica"],
            "optim.scope=replica needs replicas, which parallel=single does not have; use",
        ),
        (
            ["optim=msam", "optim.num_groups=3"],
            (
                "optim.num_groups=3: 16 batch.sequences / 3 groups must be a multiple of"
                " batch.micro=1; choose"
            ),
        ),
        (
            ["optim=sam", "optim.scope=micro_batch"],
            (
                "optim.num_groups=1 makes the whole batch one group, so optim.scope=micro_batch"
                " means nothing"
            ),
        ),
        (
            ["optim=look_sam", "optim.period=1"],
            (
                "optim.combine=reuse is about the steps between perturbed ones, and optim.period=1"
                " leaves none; set"
            ),
        ),
        (
            ["optim=msam", "optim.num_groups=32"],
            "optim.num_groups=32: 16 batch.sequences / 32 groups",
        ),
        (
            ["optim=msam", "batch.micro=8"],
            "optim.num_groups=4: 16 batch.sequences / 4 groups must be a multiple of batch.micro=8",
        ),
        (
            ["optim=gsam", "optim.weights=delta"],
            (
                "optim.combine=orthogonal needs the plain gradient, which optim.weights=delta does"
                " not compute; use optim.weights=uniform and optim.ascent_fraction=1"
            ),
        ),
        (
            ["optim=look_sam", "optim.ascent_fraction=0.5"],
            (
                "optim.combine=reuse needs the plain gradient, which optim.ascent_fraction=0.5"
                " does not"
            ),
        ),
        (
            ["optim=angle_sam", "optim.angle=30", "optim.weights=delta"],
            "optim.path=angle needs the plain gradient",
        ),
        (
            ["optim=functional_sam", "optim.weights=delta", "optim.delta_descent=reweighted"],
            "optim.delta_descent=reweighted weighs the loss at the",
        ),
        (
            ["optim=functional_sam", "optim.compute_matched=true"],
            (
                "optim.compute_matched=true needs to know the cost of a step, and "
                "optim.cotangent=auto decides it on the machine; use optim.cotangent=store or"
            ),
        ),
        (
            ["optim=sam", "optim.parameters=nothing_matches*"],
            "optim.parameters=nothing_matches* matches no parameter; the first is embedding.weight",
        ),
        (
            ["tracking.mode=false"],
            "tracking.mode=False is unknown; choose one of auto, online, offline, off",
        ),
        (
            ["tracking.project=a/b"],
            "tracking.project=a/b is refused by W&B (Invalid project name 'a/b': cannot contain",
        ),
        (
            [f"tracking.tags=[x,{'t' * 65}]"],
            f"tracking.tags=x,{'t' * 65} is refused by W&B (Tag '",
        ),
        (["optim.clip=None"], "give optim.clip=<float or null>, "),
        (
            ["seed=1 optim.lr=2"],
            "seed=1 optim.lr=2 is malformed at =; give each KEY=VALUE as a word of its own",
        ),
        (["model.bias=3"], "model.bias=3 has the wrong type; give model.bias=<bool>"),
        (["model.bias=1"], "model.bias=1 has the wrong type"),
        (["seed=1e3"], "seed=1e3 has the wrong type; give seed=<int>"),
        (["model.num_layers=2.0"], "give model.num_layers=<int>"),
        (["model.num_layers=true"], "give model.num_layers=<int>"),
        (["model.num_layers={a: 1}"], "model.num_layers={a: 1} has the wrong type"),
        (["checkpoint.milestones=[1.5]"], "give checkpoint.milestones=<list[int]>"),
        (
            ["checkpoint.milestones=[1,-2]"],
            "checkpoint.milestones=-2 is out of range; it must be at least 0",
        ),
    ],
)
def test_mistake_is_named_with_its_remedy(refusal, arguments, said):
    assert said in refusal("model=tiny", *arguments)


ONE_OF_EACH_TYPE = {
    str(entry.type): name for name, entry in KEYS.items() if entry.type is not Any
}.values()
WRONG = {
    "int": "2.5",
    "float": "fast",
    "bool": "maybe",
    "str": "[1]",
    "list[int]": "[1,x]",
    "list[str]": "a",
}


@pytest.mark.parametrize("name", ONE_OF_EACH_TYPE)
def test_value_of_another_type_is_refused(refusal, name):
    kinds = (
        get_args(KEYS[name].type) if type(None) in get_args(KEYS[name].type) else [KEYS[name].type]
    )
    value = WRONG[
        (
            kinds[0].__name__
            if isinstance(kinds[0], type) and not get_args(kinds[0])
            else str(kinds[0])
        )
    ]
    assert f"error: {name}={value} has the wrong type; give {name}=<" in refusal(f"{name}={value}")


@pytest.fixture(scope="module")
def composed():
    """What Hydra composes of no overrides, not checked yet."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("config")


def objection(composed, name: str, value: Any) -> str:
    """What is said to one value in a configuration that is in order otherwise."""
    changed = copy.deepcopy(composed)
    OmegaConf.update(changed, name, value)
    with pytest.raises(ValueError) as error:
        config.check(changed, [])
    return str(error.value)


def beyond(name: str) -> list[Any]:
    """Values that lie just outside the range of a key."""
    rules, kind = KEYS[name].metadata, str(KEYS[name].type)
    values = [math.nan, math.inf, -math.inf, 1e300, 1e-320] if "float" in kind else [10**13]
    for bound, end in (("low", -math.inf), ("high", math.inf), ("above", None)):
        if bound in rules:
            step = math.copysign(1, end) if end else 0
            values.append(
                math.nextafter(rules[bound], end or rules[bound])
                if "float" in kind
                else rules[bound] + int(step)
            )
    return [[value] for value in values] if kind.startswith("list") else values


NUMBERS = [name for name, entry in KEYS.items() if re.search("int|float", str(entry.type))]


@pytest.mark.parametrize("name", NUMBERS)
def test_number_out_of_range_is_refused(composed, name):
    rules = set(KEYS[name].metadata)
    assert {
        "low",
        "above",
    } & rules and "high" in rules, (
        f"{name} takes any number; give it a low or above and a high in conf/schema.py"
    )
    for value in beyond(name):
        said = objection(composed, name, value)
        shown = (
            value[0]
            if isinstance(value, list)
            else float(value)
            if "float" in str(KEYS[name].type)
            else value
        )
        finite = (
            "is out of range; it (must be (at least|above|at most)|is 0 in fp32)"
            if math.isfinite(shown)
            else "is not finite; give a number"
        )
        assert re.match(rf"{name}={re.escape(str(shown))} {finite}", said)


EXTREMES = (
    "1e300",
    "1e-320",
    "2147483648",
    "2147483647",
    "1000000000",
    "1e13",
    "nan",
    "inf",
    "-1",
    "0",
    "0.5",
    "high",
)


@pytest.mark.parametrize("name", NUMBERS)
def test_extreme_number_is_answered_at_once(composed, name):
    """One line, or a plan that works."""
    methods = {
        "alpha": "gsam",
        "angle": "angle_sam",
        "delta_sigma": "delta_sam",
        "num_groups": "msam",
    }
    for given in EXTREMES:
        value = yaml.safe_load(str(KEYS[name].metadata["high"]) if given == "high" else given)
        changed = copy.deepcopy(composed)
        changed.plan_only = True
        changed.optim.name, changed.optim.path = methods.get(name.split(".")[-1], "sam"), "full"
        if name.startswith("model.rope"):
            changed.model.positions, changed.model.rope_scaling = "rope", "llama3"
        if name == "parallel.processes":
            changed.parallel.name = "fsdp"
        if name.startswith("schedule"):
            changed.optim.cotangent, changed.optim.compute_matched = "store", True
        started = time.monotonic()
        try:
            OmegaConf.update(changed, name, [value] if "list" in str(KEYS[name].type) else value)
            settings = config.check(changed, [])
            assert describe(settings, make_plan(settings), "x")
        except (ValueError, OmegaConfBaseException) as error:
            assert name.split(".")[-1] in str(error) or "a process, where any device has" in str(
                error
            ), error
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=0",
        "optim.lr=nan",
        "optim.clip=inf",
        "optim.lr=1e999",
        "seed=-1",
        "seed=99999999999",
    ],
)
def test_number_out_of_range_on_the_command_line_is_refused(refusal, override):
    assert f"error: {override.split('=')[0]}=" in refusal(override)


@pytest.mark.parametrize(
    "name", [name for name, entry in KEYS.items() if "choices" in entry.metadata]
)
def test_unknown_choice_of_a_key_is_refused(composed, name):
    assert (
        objection(composed, name, "nope")
        == f"{name}=nope is unknown; choose one of {', '.join(KEYS[name].metadata['choices'])}"
    )


def test_rule_that_begins_beyond_the_horizon_is_refused():
    schedule = compose(["schedule.steps=100"]).schedule
    for start in (100, 5000):
        with pytest.raises(
            ValueError,
            match=f"optim.start={start} lies beyond the horizon of 100 steps.*start earlier",
        ):
            build_schedule(schedule, OptimConfig(path="full", start=start), 1000, 1)
        # nobody reads it
        assert build_schedule(schedule, OptimConfig(path="none", start=start), 1000, 1).steps == 100
    for start in (0, 0.99, 1, 99):
        assert build_schedule(schedule, OptimConfig(path="full", start=start), 1000, 1).steps == 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n  foo: 1", "optim.foo: no such key"),
        ("foo: 1", "foo: no such key"),
        ("model:\n  num_layers: two", "model.num_layers: .*'two'"),
        ("optim:\n  lr: -1", "optim.lr=-1.0 is out of range"),
        (
            "defaults:\n  - override /model: huge",
            "model=huge: no such choice; choose one of gpt2_124m",
        ),
        ("optim: {", "expected the node content|while parsing"),
    ],
)
def test_mistake_in_a_file_is_named(conf, refusal, text, said):
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    assert re.search(said, refusal("experiment=mine"))


# Texts, as they are typed


@pytest.mark.parametrize(
    ("name", "typed", "kept"),
    [
        ("data.separator", "<|endoftext|>", None),
        ("data.separator", "a=b, [c] {d} (e): ${HOME} \\${x} #&%~é'\"", None),
        ("data.separator", "\f", None),
        ("data.separator", "[SEP]", None),
        ("data.separator", "'quoted'", "quoted"),
        ("data.separator", "null", "NONE"),
        ("data.path", "épée (2), [v2] #1.txt", None),
        ("data.path", "[a,é b.txt]", ["a", "é b.txt"]),
        ("data.path", "x~y,100%&z.txt", None),
        ("data.path", "2024", None),
        ("data.path", "it's.txt", None),
        ("data.path", "half${open", None),
        ("data.field", "1e3", None),
        ("data.revision", "0123", None),
        ("tracking.tags", "[é,b#1,a=b,'c,d']", ["é", "b#1", "a=b", "c,d"]),
        ("tracking.tags", "[]", []),
        ("optim.parameters", "*.mlp.*", None),
        ("dir", "${oc.env:FLATGPT_TEST_DIR}/x", "/there/x"),
    ],
)
def test_text_is_taken_as_it_is_typed(monkeypatch, name, typed, kept):
    monkeypatch.setenv("FLATGPT_TEST_DIR", "/there")
    wanted = {None: typed, "NONE": None}[kept] if kept in (None, "NONE") else kept
    composed = compose(["data=text", FILE, f"{name}={typed}"])
    assert lookup(composed, name) == wanted


def test_sweep_splits_texts_at_commas(monkeypatch):
    said = {
        "data.path=é a.txt,b.txt": "data.path='é a.txt','b.txt'",
        "data.path=[a,b],c": "data.path=[a,b],'c'",
        "data.path='a,b',c": "data.path='a,b','c'",
        "data.path=choice(a,b)": "data.path=choice(a,b)",
        "data.separator=<|x|>": "data.separator='<|x|>'",
        "seed=1,2": "seed=1,2",
        "hydra.launcher.partition=a,b": "hydra.launcher.partition='a,b'",
        "tracking.tags=[a:b],[c]": "tracking.tags=['a:b'],['c']",
    }
    for typed, quoted in said.items():
        assert overrides.for_hydra(typed, sweep=True) == quoted
        assert overrides.for_hydra(quoted, sweep=True) == quoted  # as a sweep hands it on


def test_advice_for_a_text_works_as_printed(refusal):
    said = refusal("data.path=[it's.txt]", "data=text")
    printed = re.search("a text is written (.+), with both", said)[1]
    (argument,) = shlex.split(printed)
    assert compose(["data=text", argument]).data.path == "[it's.txt]"


TEXTS = [name for name, entry in KEYS.items() if re.search("str|Any", str(entry.type))]


@pytest.mark.parametrize(
    "name", [*KEYS, *LAUNCHER_KEYS, *groups(), "hydra.sweep.dir", "hydra/launcher"]
)
def test_empty_value_is_refused(name):
    for value in ("", "''", '""'):
        with pytest.raises(
            ValueError,
            match=(
                f"{name}= is empty, as an unset shell variable is; give a value, or leave"
                f" {name} out"
            ),
        ):
            overrides.check_overrides([f"{name}={value}"])


@pytest.mark.parametrize("group", groups())
def test_group_has_one_choice(group):
    for value in (f"[{','.join(groups()[group][:2])}]", "{a: b}", "3", "null", "true"):
        with pytest.raises(ValueError, match=": no such choice; choose one of "):
            overrides.check_overrides([f"{group}={value}"])


@pytest.mark.parametrize("name", TEXTS)
def test_control_character_is_refused(composed, name):
    rules, kind = KEYS[name].metadata, str(KEYS[name].type)
    if name == "data.sources":
        values = [{"web": {"path": "a\nb"}}, {"a\nb": {"path": "x"}}]
    else:
        values = [["a\nb"] if "list" in kind else "a\nb", ["a\x1b"] if "list" in kind else "a\x1b"]
    if "text" in rules or "choices" in rules:
        return
    for value in values:
        assert re.search(
            "control character|goes into a folder's name|is malformed",
            objection(composed, name, value),
        )


@pytest.mark.parametrize(
    "name",
    [name for name, entry in LAUNCHER_KEYS.items() if re.search("str|dict", str(entry.type))],
)
def test_control_character_never_reaches_sbatch(name):
    field = name.split(".")[-1]
    if "choices" in LAUNCHER_KEYS[name].metadata:
        return
    for text in ("a\nrm -rf x", "a\rb", "\x00", "\x7f", "\x85"):
        kinds = {
            "setup": [["ok", text]],
            "additional_parameters": [
                {"exclude": text},
                {text: 1},
                {"a": [text]},
                {"a": {"b": text}},
            ],
        }
        for value in kinds.get(field, [text]):
            with pytest.raises(ValueError, match=f"{name}=.* has the control character"):
                check_launcher(LauncherConfig(**{field: value}), Path("x"))
    with pytest.raises(ValueError, match=r"hydra\.sweep\.dir=.* has the control character"):
        check_launcher(LauncherConfig(), Path("a\nb"))


@pytest.mark.parametrize("name", ["hydra.job.name", "hydra.sweep.subdir", "hydra.sweep.dir"])
def test_no_key_of_hydra_takes_a_control_character(name):
    with pytest.raises(ValueError, match=f"{name}=.* has the control character"):
        overrides.check_overrides([f'{name}="a\nb"'], sweep=True)


# Paths


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, entry in KEYS.items()
        if "path" in entry.metadata and name != "data.validation"
    ],
)
def test_home_is_meant_by_a_tilde(monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    rest = [
        "data=text",
        *([FILE] if name != "data.path" else []),
        *(["tokenizer=gpt2"] if name == "tokenizer.path" else []),
    ]
    assert lookup(compose([*rest, f"{name}=~/a b"]), name) == "/home/me/a b"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    with pytest.raises(
        ValueError,
        match=f"{name}=~/x: no home folder is known; set HOME, or give {name} a path without ~",
    ):
        compose([*rest, "data.cache=/tmp/x", f"{name}=~/x"])


def test_home_is_meant_in_lists_and_mappings(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert compose(["data=text", "data.path=[~/a,b]"]).data.path == ["/home/me/a", "b"]
    data = compose(
        ["data=text", "data.sources={w: {path: ~/a#.txt}}", "data.validation={v: [~/b]}"]
    ).data
    assert (data.sources["w"].path, data.validation) == ("/home/me/a#.txt", {"v": ["/home/me/b"]})


def test_default_stays_as_it_is_for_another_home(monkeypatch):
    assert compose([]).data.cache == "~/.cache/flatgpt"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    with pytest.raises(ValueError, match=r"data\.cache=~/\.cache/flatgpt: no home folder is known"):
        compose([])


# Keys that a run does not read


@pytest.mark.parametrize(
    "override",
    [
        "optim.rho=0.1",
        "optim.start=5000",
        "optim.metric=adam",
        "tokenizer.vocab_size=500",
        "schedule.tokens_per_parameter=10",
        "data.path=x",
        "data.sources={a: {path: x}}",
        "optim.angle=10",
        "optim.num_groups=3",
        "optim.compute_matched=true",
        "optim.diagnostics_every=2",
    ],
)
def test_key_that_is_not_read_is_noted_once(command, override):
    def name(*arguments):
        code, out, err = command("model=tiny", "plan_only=true", *arguments)
        assert code == 0
        return out.split()[1], err

    key = override.split("=")[0]
    plain, silence = name()
    noted, note = name(override)
    assert silence == ""
    assert note == f"note: not read by this run, so left out of its name and identity: {key}\n"
    assert noted == plain


def test_axes_that_a_rule_does_not_read_are_noted(capsys):
    composed = compose(
        [
            "optim=sam",
            "optim.angle=10",
            "optim.num_groups=2",
            "optim.metric_power=1",
            "optim.adaptive_floor=1",
            "optim.alpha=0.3",
            "optim.friendly_sigma=0.5",
            "optim.delta_sigma=0.1",
            "optim.cotangent=store",
            "optim.rho_warmup=0.2",
            "optim.momentum=0.5",
            "optim.rho=0.1",
            "optim.period=2",
            "optim.parameters=head",
            "optim.compute=fp32",
            "optim.compute_matched=true",
        ]
    )
    assert (
        capsys.readouterr().err
        == "note: not read by this run, so left out of its name and identity: optim.angle,"
        " optim.num_groups, optim.metric_power, optim.adaptive_floor, optim.alpha,"
        " optim.friendly_sigma, optim.delta_sigma, optim.cotangent, optim.rho_warmup,"
        " optim.momentum\n"
    )
    assert "-sam-0.1-stdlib-1000steps-s0-" in run_name(composed)


def test_one_note_names_all(capsys):
    compose(
        [
            "optim.rho=0.1",
            "optim.angle=3",
            "schedule.steps=5",
            "schedule.tokens=1e6",
            "schedule.warmup=0.1",
            "schedule.warmup_steps=0",
        ]
    )
    assert capsys.readouterr().err.endswith(
        ": optim.rho, optim.angle, schedule.steps, schedule.warmup\n"
    )


def test_only_what_was_typed_is_noted(conf, capsys):
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\noptim: {rho: 0.3}\ntokenizer: {vocab_size: 500}\n"
    )
    compose(["experiment=mine", "schedule=chinchilla", "data=text", FILE])
    assert capsys.readouterr().err == ""


# This site's own settings


def test_local_settings_are_honoured(conf, command, capsys):
    (conf / "local").mkdir()
    (conf / "local" / "default.yaml").write_text(
        "data: {cache: /scratch/cache}\ntracking: {entity: us, mode: 'off'}\n"
    )
    composed = compose([])
    assert (composed.data.cache, composed.tracking.entity, composed.tracking.mode) == (
        "/scratch/cache",
        "us",
        "off",
    )
    # the command line has the last word
    assert compose(["data.cache=/tmp/mine"]).data.cache == "/tmp/mine"
    assert compose(["experiment=quickstart"]).data.cache == "/scratch/cache"
    (conf / "local" / "default.yaml").write_text("data: {cahce: /scratch/cache}\n")
    code, _, err = command()
    assert (code, err.count("\n")) == (2, 1)
    assert "data.cahce: no such key; did you mean data.cache?" in err


# What is printed


def test_help_lists_every_key_and_choice(command):
    code, out, err = command("help=true")
    assert (code, err) == (0, "")
    defaults = composition.defaults()
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for name, entry in KEYS.items():
        _, kind, rest = re.split(r"  +", lines[name], maxsplit=2)
        assert entry.metadata["meaning"] in rest
        assert re.fullmatch(r"(int|float|bool|str|Any|list\[\w+\])( \| None)?", kind)
        default = yaml.safe_load(rest.split(entry.metadata["meaning"])[0])
        assert str(default) == str(lookup(defaults, name))
        assert all(choice in rest for choice in entry.metadata.get("choices", ()))
    for group, choices in groups().items():
        assert f"{group} {' | '.join(choices)}" in " ".join(out.split())
    assert max(map(len, out.splitlines())) < 230


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "model"])
def test_plan_of_every_model(name):
    composed = compose([f"model={name}", "schedule=chinchilla"])
    plan = make_plan(composed)
    text = describe(composed, plan, "x")
    assert f"{plan.num_parameters:,}" in text


def test_plan_prints_everything_derived(command):
    code, out, err = command(
        "plan_only=true",
        "model=gpt2_124m",
        "batch.sequences=48",
        "batch.micro=12",
        "batch.length=1024",
        "device=cpu",
        "tokenizer=bpe",
        "tokenizer.vocab_size=50257",
        "schedule.tokens=1e9",
        "schedule.warmup=0.1",
    )
    assert (code, err) == (0, "")
    rows = {line[:22].strip(): line[22:] for line in out.splitlines()}
    D, L, V, T = 768, 12, 50257, 1024
    body = L * (12 * D * D + 13 * D) + 2 * D
    steps = -(-1_000_000_000 // (48 * T))
    padded = 50304  # rows of the head, which its products run over
    flops = 3 * (24 * D * D * L + 4 * T * D * L + 2 * D * padded) * 48 * T
    total = body + (V + T) * D
    assert total == 124_439_808
    assert rows["name"].startswith("gpt2_124m-adamw-stdlib-1e+09tokens-s0-")
    assert rows["parameters"].startswith(f"{total:,}, of which {body:,} without embeddings")
    assert (
        rows["tokens per step"].startswith(f"{48 * T:,} = 48 sequences x 1024")
        and "4 " in rows["tokens per step"]
    )
    assert rows["steps"] == f"{steps:,}, of which {round(0.1 * steps):,} warm-up"
    assert rows["tokens"] == f"{steps * 48 * T:,}"
    assert (
        rows["tokens per parameter"]
        == f"{steps * 48 * T / body:.2f} without embeddings, {steps * 48 * T / total:.2f} with"
    )
    assert rows["FLOPs"].startswith(f"{flops * steps:.3e} in all, {flops:.3e} a step")
    assert rows["checkpoint"] == f"{12 * total / 2**30:.1f} GiB"
    assert rows["hours on one H100"].startswith(f"{flops * steps / (0.4 * 989e12) / 3600:.2f} ")
    assert {"hours on one A100", "memory, about"} <= set(rows)


@pytest.mark.parametrize("counted", ["non_embedding", "all"])
def test_chinchilla_counts_and_says_what(command, counted):
    _, out, _ = command(
        "plan_only=true",
        "model=tiny",
        "schedule=chinchilla",
        "schedule.tokens_per_parameter=30",
        f"schedule.parameters={counted}",
    )
    plan = make_plan(compose(["model=tiny"]))
    count = plan.num_non_embedding if counted == "non_embedding" else plan.num_parameters
    steps = -(-30 * count // plan.tokens_per_step)
    assert f"{steps:,}, of which" in out
    assert f"30 tokens per parameter, {counted.replace('_', '-')} ones counted" in out


def test_schema_is_consistent():
    """A condition names a key and values that it can have; a default keeps to its own rules."""
    assert list(KEYS) == [name for name, _ in walk(Config)]
    for name, entry in KEYS.items():
        check_value(
            name, lookup(Config(), name), {} if lookup(Config(), name) is None else entry.metadata
        )
        if "read_when" in entry.metadata:
            other, values = entry.metadata["read_when"]
            assert set(values) <= {*KEYS[other].metadata.get("choices", ()), None}, name
        assert json.dumps(lookup(Config(), name)) is not None
