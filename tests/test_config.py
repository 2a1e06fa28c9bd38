"""Every choice composes, every key is described, and a mistake costs one line and exit code 2 and leaves nothing behind."""

import copy
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

import train
from conf.schema import KEYS, Config, OptimConfig, lookup, walk
from launch import config
from launch.config import CONF, compose, groups
from launch.identity import run_name
from launch.plan import describe, make_plan
from optim import build_schedule

CHOICES = [(group, name) for group, names in groups().items() if group != "local" for name in names]
FILE = "data.path=corpus.txt"  # named, never opened: nothing is read before a configuration is found to be in order


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Calls train.py with arguments, in this process and in an empty folder; returns (exit code, stdout, stderr)."""
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
    monkeypatch.setattr(config, "CONF", str(folder))
    return folder


# Choices


def leaves(plain: Any, prefix: str) -> dict[str, Any]:
    """Everything in nested dictionaries by dotted name; a key that takes any value is not looked into."""
    if not isinstance(plain, dict) or prefix in KEYS:
        return {prefix: plain}
    return {name: value for key, part in plain.items() for name, value in leaves(part, f"{prefix}.{key}".strip(".")).items()}


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
        assert kind is Any or type(value) in (kind, *get_args(kind)), f"{key}={value!r} is no {kind}"  # OmegaConf would convert it
        assert lookup(composed, key) in (value, {"validation": value})  # the set of a single split of a dataset gets that name
    if group in ("model", "experiment"):
        assert make_plan(composed).num_parameters > 0


def test_every_group_has_a_default_and_no_other_folder_counts():
    assert set(groups()) - {"local"} == {"model", "tokenizer", "data", "optim", "schedule", "parallel", "tracking", "task", "experiment"}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 0.1), ("nanodo_500k", 0.5), ("nanodo_2500k", 2.6), ("nanodo_10m", 10.6), ("nanodo_24m", 23.9), ("nanodo_43m", 42.5),
     ("nanodo_118m", 117.9), ("nanodo_1208m", 1208.0), ("gpt2_124m", 124.4), ("gpt2_355m", 354.8), ("gpt2_774m", 774.0), ("gpt2_1558m", 1557.6)],
)  # fmt: skip
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
        (["seed=1,2"], "'seed=1,2'"),
        (["+foo=1"], "+foo=1: keys are neither added"),
        (["+optim.rho=0.3"], "write optim.rho=VALUE"),
        (["++optim.rho=0.3"], "write optim.rho=VALUE"),
        (["~optim.rho"], "~optim.rho: keys are neither added nor taken away"),
        (["~model"], "~model: keys are neither added nor taken away"),
        (["optim.rho"], "optim.rho is malformed; write key=value"),
        (["optim.rho==3"], "optim.rho==3 is malformed"),
        (["optim.rho=[1,2"], "optim.rho=[1,2 is malformed"),
        (["optim.rho=${nope}"], "optim.rho: Interpolation key 'nope' not found"),
        (["dir=${oc.env:NO_SUCH_VARIABLE}"], "dir: "),
        (["=3"], "=3: no such key"),
        (["batch.sequences=32", "batch.micro=5"], "batch.sequences=32 is not divisible by batch.micro=5; choose a divisor"),
        (["batch.sequences=32", "batch.micro=64"], "batch.micro=64"),
        (["batch.length=2048"], "batch.length=2048 exceeds model.max_length=1024; shorten"),
        (["model.width=100", "model.num_heads=3"], "model.width=100 is not divisible by model.num_heads=3; choose"),
        (["model.num_heads=4", "model.width=64", "model.num_kv_heads=3"], "model.num_kv_heads=3 does not divide model.num_heads=4; choose"),
        (["schedule.steps=10", "schedule.warmup_steps=10"], "schedule.warmup_steps=10 reaches beyond the horizon of 10 steps; shorten"),
        (["schedule.warmup=1"], "schedule.warmup=1 reaches beyond the horizon"),
        (["schedule.tokens=10", "schedule.warmup_steps=3"], "schedule.warmup_steps=3 reaches beyond the horizon of 1 steps"),
        (["schedule.shape=wsd", "schedule.decay=0.99"], "schedule.decay=0.99 overlaps the warm-up"),
        (["schedule.steps=null"], "schedule.steps=null leaves no horizon; set"),
        (["data=text"], "data=text needs one of the two: data.path=FILES or data.sources"),
        (["data=tokens"], "data=tokens needs one of the two: data.path=FILES or data.sources"),
        (["data=hub"], "data.path=None names no dataset; data=hub needs its name on the hub, as in data.path=allenai/c4, or a folder"),
        (["data=hub", "data.path=[a]"], "data.path=['a'] names no dataset"),
        (["data=c4", "data.validation={v: 3}"], "data.validation.v=3 names no files"),
        (["data=c4", "data.documents=0"], "data.documents=0 is out of range"),
        (["data=text", FILE, "data.sources={a: {path: x}}"], "data=text needs one of the two"),
        (["data=text", "data.path="], "data.path= names no files; give a file"),
        (["data=text", "data.path=3"], "data.path=3 names no files"),
        (["data=text", "data.path={a: b}"], "data.path={'a': 'b'} names no files"),
        (["data=text", "data.path=[a,3]"], "data.path=['a', 3] names no files"),
        (["data=text", "data.sources=3"], "data.sources=3 is malformed; write data.sources='{NAME: {path: FILES, weight: 1.0}}'"),
        (["data=text", "data.sources=[a]"], "data.sources=['a'] is malformed"),
        (["data=text", "data.sources={a: b}"], "data.sources={'a': 'b'} is malformed"),
        (["data=text", "data.sources={a: {path: x, wieght: 2}}"], "'wieght': 2}} is malformed"),
        (["data=text", "data.sources={a: {weight: 2}}"], "is malformed"),
        (["data=text", "data.sources={a: {path: x, weight: heavy}}"], "is malformed"),
        (["data=text", "data.sources={a: {path: x, weight: true}}"], "is malformed"),
        (["data=text", "data.sources={a: {path: x, weight: -2}}"], "data.sources.a.weight=-2.0 is out of range; it must be above 0.0"),
        (["data=text", "data.sources={a: {path: x, weight: nan}}"], "data.sources.a.weight=nan is not finite"),
        (["data=text", "data.sources={a: {path: null}}"], "data.sources.a.path=None names no files"),
        (["data=text", "data.sources={../a: {path: x}}"], "data.sources=../a goes into a folder's name"),
        (["data=text", "data.sources={..: {path: x}}"], "data.sources=.. goes into a folder's name"),
        (["data=text", FILE, "data.validation=3"], "data.validation=3 is malformed; write data.validation='{NAME: FILES}'"),
        (["data=text", FILE, "data.validation=[a]"], "data.validation=['a'] is malformed"),
        (["data=text", FILE, "data.validation={a: 3}"], "data.validation.a=3 names no files"),
        (["data=text", FILE, "data.validation={a/b: y}"], "data.validation=a/b goes into a folder's name"),
        (["model.name=a/b"], "model.name=a/b goes into a folder's name; use letters, digits"),
        (["optim.name=.."], "optim.name=.. goes into a folder's name"),
        (["data.name="], "data.name= goes into a folder's name"),
        (["init.step=3"], "init.step=3 needs a run to take it from; set init.run=DIR"),
        (["init.optimizer=true"], "init.optimizer=true needs a run"),
        (["optim=samm"], "optim=samm: no such choice; choose one of adamw, angle_sam, asam"),
        (["optim=sam", "optim.rho=-0.1"], "optim.rho=-0.1 is out of range; it must be at least 0"),
        (["optim=sam", "optim.direction=uphill"], "optim.direction=uphill is unknown; choose one of gradient, momentum, stale, friendly, random"),
        (["optim=sam", "optim.path=half"], "optim.path=half is unknown; choose one of none, full, functional, logit, angle"),
        (["optim=sam", "optim.metric=riemannian"], "optim.metric=riemannian is unknown"),
        (["optim=angle_sam", "optim.angle=91"], "optim.angle=91.0 is out of range"),
        (["optim=sam", "optim.period=0"], "optim.period=0 is out of range"),
        (["optim=sam", "optim.ascent_fraction=0"], "optim.ascent_fraction=0.0 is out of range"),
        (["optim=sam", "optim.diagnostics_every=0"], "optim.diagnostics_every=0 is out of range"),
        (["optim=sam", "optim.start=1000"], "optim.start=1000 lies beyond the horizon of 1000 steps: the rule would never act; start earlier"),
        (["optim=sam", "optim.start=0.5", "optim.stop=0.2"], "optim.stop=0.2 is not after optim.start=0.5: the rule would never act; stop later"),
        (["optim=preconditioned_sam", "optim.base=sgd"], "optim.metric=adam needs Adam's second moment, which optim.base=sgd does not keep of every "
                                                         "weight; use optim.base=adamw or optim.metric=euclidean"),
        (["optim=preconditioned_functional_sam", "optim.base=muon"], "which optim.base=muon does not keep"),
        (["optim=sam", "optim.path=none"], "optim.path=none is the plain gradient, and the run would be called sam; use optim=adamw"),
        (["optim=sam", "optim.start=2.5"], "optim.start=2.5 is no whole step; give one, or a fraction of the horizon below 1"),
        (["optim=sam", "optim.stop=1.5"], "optim.stop=1.5 is no whole step"),
        (["optim.base=muon", "parallel=fsdp"], "optim.base=muon orthogonalises whole matrices, which parallel=fsdp keeps in shards"),
        (["optim=momentum_sam", "optim.base=sgd", "optim.momentum=0"], "optim.direction=momentum needs a momentum, and optim.momentum=0; raise it"),
        (["optim=momentum_sam", "optim.scope=micro_batch"], "optim.direction=momentum is the same for every group, so optim.scope=micro_batch means "
                                                            "nothing; use optim.scope=batch"),
        (["optim=stale_sam", "optim.scope=micro_batch"], "optim.direction=stale is the same for every group"),
        (["optim=stale_sam", "optim.ascent_fraction=0.5"], "optim.ascent_fraction=0.5 is about the ascent gradient, which optim.direction=stale"),
        (["optim=momentum_sam", "optim.weights=delta"], "optim.weights=delta is about the ascent gradient"),
        (["optim=sam", "optim.scope=replica"], "optim.scope=replica needs replicas, which parallel=single does not have; use"),
        (["optim=msam", "optim.num_groups=3"], "optim.num_groups=3: 16 batch.sequences / 3 groups must be a multiple of batch.micro=1; choose"),
        (["optim=sam", "optim.scope=micro_batch"], "optim.num_groups=1 makes the whole batch one group, so optim.scope=micro_batch means nothing"),
        (["optim=look_sam", "optim.period=1"], "optim.combine=reuse is about the steps between perturbed ones, and optim.period=1 leaves none; set"),
        (["optim=msam", "optim.num_groups=32"], "optim.num_groups=32: 16 batch.sequences / 32 groups"),
        (["optim=msam", "batch.micro=8"], "optim.num_groups=4: 16 batch.sequences / 4 groups must be a multiple of batch.micro=8"),
        (["optim=gsam", "optim.weights=delta"], "optim.combine=orthogonal needs the plain gradient, which optim.weights=delta does not compute; use "
                                                "optim.weights=uniform and optim.ascent_fraction=1"),
        (["optim=look_sam", "optim.ascent_fraction=0.5"], "optim.combine=reuse needs the plain gradient, which optim.ascent_fraction=0.5 does not"),
        (["optim=angle_sam", "optim.angle=30", "optim.weights=delta"], "optim.path=angle needs the plain gradient"),
        (["optim=functional_sam", "optim.weights=delta", "optim.delta_descent=reweighted"], "optim.delta_descent=reweighted weighs the loss at the"),
        (["optim=functional_sam", "optim.compute_matched=true"], "optim.compute_matched=true needs to know the cost of a step, and "
                                                                 "optim.cotangent=auto decides it on the machine; use optim.cotangent=store or"),
        (["optim=sam", "optim.parameters=nothing_matches*"], "optim.parameters=nothing_matches* matches no parameter; the first is embedding.weight"),
        (["tracking.mode=false"], "tracking.mode=False is unknown; choose one of auto, online, offline, off"),
        (["model.bias=3"], "model.bias=3 has the wrong type; give model.bias=<bool>"),
        (["model.bias=1"], "model.bias=1 has the wrong type"),
        (["seed=1e3"], "seed=1e3 has the wrong type; give seed=<int>"),
        (["model.num_layers=2.0"], "give model.num_layers=<int>"),
        (["model.num_layers=true"], "give model.num_layers=<int>"),
        (["model.num_layers={a: 1}"], "model.num_layers={a: 1} has the wrong type"),
        (["checkpoint.milestones=[1.5]"], "give checkpoint.milestones=<list[int]>"),
        (["checkpoint.milestones=[1,-2]"], "checkpoint.milestones=-2 is out of range; it must be at least 0"),
    ],
)  # fmt: skip
def test_mistake_is_named_with_its_remedy(refusal, arguments, said):
    assert said in refusal("model=tiny", *arguments)


ONE_OF_EACH_TYPE = {str(entry.type): name for name, entry in KEYS.items() if entry.type is not Any}.values()
WRONG = {"int": "2.5", "float": "fast", "bool": "maybe", "str": "[1]", "list[int]": "[1,x]", "list[str]": "a"}


@pytest.mark.parametrize("name", ONE_OF_EACH_TYPE)
def test_value_of_another_type_is_refused(refusal, name):
    kinds = get_args(KEYS[name].type) if type(None) in get_args(KEYS[name].type) else [KEYS[name].type]
    value = WRONG[kinds[0].__name__ if isinstance(kinds[0], type) and not get_args(kinds[0]) else str(kinds[0])]
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
    step, values = 1e-9 if "float" in kind else 1, [math.nan, math.inf, -math.inf] if "float" in kind else []
    beside = {"low": -step, "high": step, "above": 0}
    values += [rules[bound] + distance for bound, distance in beside.items() if bound in rules]
    return [[value] for value in values] if kind.startswith("list") else values


NUMBERS = [name for name, entry in KEYS.items() if re.search("int|float", str(entry.type))]


@pytest.mark.parametrize("name", NUMBERS)
def test_number_out_of_range_is_refused(composed, name):
    assert {"low", "above"} & set(KEYS[name].metadata), f"{name} takes any number; give it a low or above in conf/schema.py"
    for value in beyond(name):
        said = objection(composed, name, value)
        shown = value[0] if isinstance(value, list) else float(value) if "float" in str(KEYS[name].type) else value
        finite = "is out of range; it must be (at least|above|at most)" if math.isfinite(shown) else "is not finite; give a number"
        assert re.match(rf"{name}={re.escape(str(shown))} {finite}", said)


@pytest.mark.parametrize("override", ["optim.lr=0", "optim.lr=nan", "optim.clip=inf", "optim.lr=1e999", "seed=-1", "seed=99999999999"])
def test_number_out_of_range_on_the_command_line_is_refused(refusal, override):
    assert f"error: {override.split('=')[0]}=" in refusal(override)


@pytest.mark.parametrize("name", [name for name, entry in KEYS.items() if "choices" in entry.metadata])
def test_unknown_choice_of_a_key_is_refused(composed, name):
    assert objection(composed, name, "nope") == f"{name}=nope is unknown; choose one of {', '.join(KEYS[name].metadata['choices'])}"


def test_rule_that_begins_beyond_the_horizon_is_refused():
    schedule = compose(["schedule.steps=100"]).schedule
    for start in (100, 5000):
        with pytest.raises(ValueError, match=f"optim.start={start} lies beyond the horizon of 100 steps.*start earlier"):
            build_schedule(schedule, OptimConfig(path="full", start=start), 1000, 1)
        assert build_schedule(schedule, OptimConfig(path="none", start=start), 1000, 1).steps == 100  # nobody reads it
    for start in (0, 0.99, 1, 99):
        assert build_schedule(schedule, OptimConfig(path="full", start=start), 1000, 1).steps == 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n  foo: 1", "optim.foo: no such key"),
        ("foo: 1", "foo: no such key"),
        ("model:\n  num_layers: two", "model.num_layers: .*'two'"),
        ("optim:\n  lr: -1", "optim.lr=-1.0 is out of range"),
        ("defaults:\n  - override /model: huge", "model=huge: no such choice; choose one of gpt2_124m"),
        ("optim: {", "expected the node content|while parsing"),
    ],
)
def test_mistake_in_a_file_is_named(conf, refusal, text, said):
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    assert re.search(said, refusal("experiment=mine"))


# Keys that a run does not read


@pytest.mark.parametrize(
    "override",
    ["optim.rho=0.1", "optim.start=5000", "optim.metric=adam", "tokenizer.vocab_size=500", "schedule.tokens_per_parameter=10", "data.path=x",
     "data.sources={a: {path: x}}", "optim.angle=10", "optim.num_groups=3", "optim.compute_matched=true", "optim.diagnostics_every=2"],
)  # fmt: skip
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
    composed = compose(["optim=sam", "optim.angle=10", "optim.num_groups=2", "optim.metric_power=1", "optim.adaptive_floor=1", "optim.alpha=0.3",
                        "optim.friendly_sigma=0.5", "optim.delta_sigma=0.1", "optim.cotangent=store", "optim.rho_warmup=0.2", "optim.momentum=0.5",
                        "optim.rho=0.1", "optim.period=2", "optim.parameters=head", "optim.compute=fp32", "optim.compute_matched=true"])  # fmt: skip
    assert capsys.readouterr().err == (
        "note: not read by this run, so left out of its name and identity: optim.angle, optim.num_groups, optim.metric_power, optim.adaptive_floor, "
        "optim.alpha, optim.friendly_sigma, optim.delta_sigma, optim.cotangent, optim.rho_warmup, optim.momentum\n"
    )
    assert "-sam-0.1-stdlib-1000steps-s0-" in run_name(composed)


def test_one_note_names_all(capsys):
    compose(["optim.rho=0.1", "optim.angle=3", "schedule.steps=5", "schedule.tokens=1e6", "schedule.warmup=0.1", "schedule.warmup_steps=0"])
    assert capsys.readouterr().err.endswith(": optim.rho, optim.angle, schedule.steps, schedule.warmup\n")


def test_only_what_was_typed_is_noted(conf, capsys):
    (conf / "experiment" / "mine.yaml").write_text("# @package _global_\noptim: {rho: 0.3}\ntokenizer: {vocab_size: 500}\n")
    compose(["experiment=mine", "schedule=chinchilla", "data=text", FILE])
    assert capsys.readouterr().err == ""


# This site's own settings


def test_local_settings_are_honoured(conf, command, capsys):
    (conf / "local").mkdir()
    (conf / "local" / "default.yaml").write_text("data: {cache: /scratch/cache}\ntracking: {entity: us, mode: 'off'}\n")
    composed = compose([])
    assert (composed.data.cache, composed.tracking.entity, composed.tracking.mode) == ("/scratch/cache", "us", "off")
    assert compose(["data.cache=/tmp/mine"]).data.cache == "/tmp/mine"  # the command line has the last word
    assert compose(["experiment=quickstart"]).data.cache == "/scratch/cache"
    (conf / "local" / "default.yaml").write_text("data: {cahce: /scratch/cache}\n")
    code, _, err = command()
    assert (code, err.count("\n")) == (2, 1)
    assert "data.cahce: no such key; did you mean data.cache?" in err


# What is printed


def test_help_lists_every_key_and_choice(command):
    code, out, err = command("help=true")
    assert (code, err) == (0, "")
    defaults = compose([])
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
    code, out, err = command("plan_only=true", "model=gpt2_124m", "batch.sequences=48", "batch.micro=12", "batch.length=1024", "device=cpu",
                             "tokenizer=bpe", "tokenizer.vocab_size=50257", "schedule.tokens=1e9", "schedule.warmup=0.1")  # fmt: skip
    assert (code, err) == (0, "")
    rows = {line[:22].strip(): line[22:] for line in out.splitlines()}
    D, L, V, T = 768, 12, 50257, 1024
    body = L * (12 * D * D + 13 * D) + 2 * D
    steps = -(-1_000_000_000 // (48 * T))
    flops = 3 * (24 * D * D * L + 4 * T * D * L + 2 * D * V) * 48 * T
    total = body + (V + T) * D
    assert total == 124_439_808
    assert rows["name"].startswith("gpt2_124m-adamw-stdlib-1e+09tokens-s0-")
    assert rows["parameters"].startswith(f"{total:,}, of which {body:,} without embeddings")
    assert rows["tokens per step"].startswith(f"{48 * T:,} = 48 sequences x 1024") and "4 " in rows["tokens per step"]
    assert rows["steps"] == f"{steps:,}, of which {round(0.1 * steps):,} warm-up"
    assert rows["tokens"] == f"{steps * 48 * T:,}"
    assert rows["tokens per parameter"] == f"{steps * 48 * T / body:.2f} without embeddings, {steps * 48 * T / total:.2f} with"
    assert rows["FLOPs"].startswith(f"{flops * steps:.3e} in all, {flops:.3e} a step")
    assert rows["checkpoint"] == f"{12 * total / 2**30:.1f} GiB"
    assert rows["hours on one H100"].startswith(f"{flops * steps / (0.4 * 989e12) / 3600:.2f} ")
    assert {"hours on one A100", "memory, about"} <= set(rows)


@pytest.mark.parametrize("counted", ["non_embedding", "all"])
def test_chinchilla_counts_and_says_what(command, counted):
    _, out, _ = command("plan_only=true", "model=tiny", "schedule=chinchilla", "schedule.tokens_per_parameter=30", f"schedule.parameters={counted}")
    plan = make_plan(compose(["model=tiny"]))
    count = plan.num_non_embedding if counted == "non_embedding" else plan.num_parameters
    steps = -(-30 * count // plan.tokens_per_step)
    assert f"{steps:,}, of which" in out
    assert f"30 tokens per parameter, {counted.replace('_', '-')} ones counted" in out


def test_schema_is_consistent():
    """A condition names a key and values that it can have; a default keeps to its own rules."""
    assert list(KEYS) == [name for name, _ in walk(Config)]
    for name, entry in KEYS.items():
        config.check_value(name, lookup(Config(), name), {} if lookup(Config(), name) is None else entry.metadata)
        if "read_when" in entry.metadata:
            other, values = entry.metadata["read_when"]
            assert set(values) <= {*KEYS[other].metadata.get("choices", ()), None}, name
        assert json.dumps(lookup(Config(), name)) is not None
