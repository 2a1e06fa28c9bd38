"""Two runs have one name exactly if nothing that they read, and that may not change on resume,
differs."""

import copy
import json
import re
import subprocess
import sys
from typing import Any, get_args

import pytest

from conf.keys import KEYS, is_read, lookup
from conf.schema import Config
from conf.text import SourceConfig
from launch.config import compose
from launch.run.folder import load_config
from launch.run.identity import as_read, canonical, claim, run_name

MUTABLE = [name for name, entry in KEYS.items() if entry.metadata.get("mutable")]
CONDITIONAL = [name for name in KEYS if "read_when" in KEYS[name].metadata]


def put(config: Config, name: str, value: Any) -> None:
    section, _, leaf = name.rpartition(".")
    setattr(lookup(config, section) if section else config, leaf, value)


def where_read(name: str) -> Config:
    """A configuration whose runs read the key: what it needs is set, what that needs first."""
    config, needs = Config(), []
    while "read_when" in KEYS[name].metadata:
        name, values = KEYS[name].metadata["read_when"]
        needs.append((name, next(iter(values))))
    for other, value in reversed(needs):
        put(config, other, value)
    return config


def where_unread(name: str) -> Config:
    """A configuration whose runs do not read the key."""
    config = Config()
    other, values = KEYS[name].metadata["read_when"]
    rest = [value for value in KEYS[other].metadata.get("choices", (7,)) if value not in values]
    put(config, other, rest[0])
    return config


def change(config: Config, name: str) -> Config:
    """The configuration with another value of the key."""
    value, entry = lookup(config, name), KEYS[name]
    kind = (
        list if str(entry.type).startswith("list") else next(iter(get_args(entry.type)), entry.type)
    )
    if "choices" in entry.metadata:
        other = next((choice for choice in entry.metadata["choices"] if choice != value), "other")
    elif kind in (int, float):
        other = (value or 0) + 1
    else:
        other = {
            bool: not value,
            str: f"{value}x",
            list: [3],
            Any: {"a": SourceConfig("x")} if name == "data.sources" else {"a": "x"},
        }[kind]
    changed = copy.deepcopy(config)
    put(changed, name, other)
    return changed


@pytest.mark.parametrize("name", [name for name in KEYS if name not in MUTABLE])
def test_every_key_that_is_read_changes_the_hash(name):
    config = where_read(name)
    assert is_read(config, name)
    assert run_name(config)[-8:] != run_name(change(config, name))[-8:]


@pytest.mark.parametrize("name", MUTABLE)
def test_keys_that_may_change_on_resume_do_not(name):
    config = where_read(name)
    assert run_name(config) == run_name(change(config, name))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_keys_that_are_not_read_do_not(name):
    config = where_unread(name)
    assert not is_read(config, name)
    assert name not in canonical(config)
    assert run_name(config) == run_name(change(config, name))


def test_what_may_change_on_resume():
    """Listed here a second time, so that nobody marks a key that matters by accident."""
    logging = {
        name
        for name in KEYS
        if name.startswith(("evaluation.", "checkpoint.", "tracking.", "parallel."))
    }
    others = {
        "dir",
        "device",
        "profile",
        "minutes",
        "max_skipped",
        "plan_only",
        "print_only",
        "device_memory",
        "help",
        "activation_checkpointing",
        "data.cache",
        "data.workers",
        "data.bad_rows",
        "data.verify_days",
        "tokenizer.path",
        "optim.diagnostics_every",
        "optim.cotangent_share",
    }
    assert set(MUTABLE) == logging | others & set(KEYS)


def test_what_is_not_read_is_shown_as_none():
    """A radius in W&B's table is one that the run uses; the configuration itself stays as it is."""
    adamw, sam = compose(["optim.rho=0.3"]), compose(["optim=sam", "optim.rho=0.3"])
    assert (as_read(adamw)["optim"]["rho"], as_read(sam)["optim"]["rho"]) == (None, 0.3)
    assert (adamw.optim.rho, adamw.optim.name) == (0.3, as_read(adamw)["optim"]["name"])
    unread = {name for name in KEYS if lookup(as_read(sam), name) != lookup(sam, name)}
    assert "optim.num_groups" in unread and not any(is_read(sam, name) for name in unread)


def test_a_condition_of_a_condition_counts():
    config = Config()
    config.optim.metric = "adam"  # of a rule that is not there
    assert not is_read(config, "optim.metric_power")
    config.optim.path = "full"
    assert is_read(config, "optim.metric_power")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "nanodo_500k-adamw-stdlib-1000steps-s0"),
        (["model=tiny", "seed=7", "schedule.steps=50"], "tiny-adamw-stdlib-50steps-s7"),
        (
            ["schedule=chinchilla", "schedule.tokens_per_parameter=2.5"],
            "nanodo_500k-adamw-stdlib-2.5tpp-s0",
        ),
        (["schedule.tokens=2e9"], "nanodo_500k-adamw-stdlib-2e+09tokens-s0"),
        (
            ["data=text", "data.path=x.txt", "data.name=mine", "optim.rho=0.3"],
            "nanodo_500k-adamw-mine-1000steps-s0",
        ),
    ],
)
def test_name_says_what_the_run_is(overrides, name):
    assert re.fullmatch(re.escape(name) + "-[0-9a-f]{8}", run_name(compose(overrides)))


def test_name_has_rho_where_it_is_read():
    config = compose(["model=tiny"])
    config.optim.name, config.optim.path, config.optim.rho = "sam", "full", 0.1
    assert run_name(config).startswith("tiny-sam-0.1-stdlib-1000steps-s0-")


@pytest.mark.parametrize(
    "spellings",
    [
        [["optim.lr=1e-3"], ["optim.lr=0.001"], ["optim.lr=1.0E-3"], []],
        [["schedule.tokens=1e6"], ["schedule.tokens=1000000"], ["schedule.tokens=1_000_000"]],
        [
            ["model=tiny", "seed=3"],
            ["seed=3", "model=tiny"],
            [
                "seed=3",
                "model.name=tiny",
                "model.num_layers=2",
                "model.num_heads=2",
                "model.width=64",
            ],
        ],
        [["model.bias=true"], ["model.bias=True"]],
        [["optim.clip=1"], ["optim.clip=1.0"]],
        [
            ["optim.rho=0.2"],
            ["optim.metric=adam", "optim.metric_power=0.3"],
            ["dir=elsewhere"],
            ["tracking=none"],
            ["evaluation.every=7"],
            [],
        ],
        [["schedule.warmup_steps=10"], ["schedule.warmup_steps=10", "schedule.warmup=0.3"]],
        [["schedule.tokens=1e6"], ["schedule.tokens=1e6", "schedule.steps=5"]],
        [
            ["data=text", "data.sources={a: {path: x}, b: {path: y, weight: 2}}"],
            ["data=text", "data.sources={b: {weight: 2.0, path: y}, a: {path: x, weight: 1}}"],
        ],
    ],
)
def test_equal_configurations_have_one_name(spellings):
    assert len({run_name(compose(overrides)) for overrides in spellings}) == 1


def test_order_of_validation_sets_counts():
    """The first of them is the one that val/loss means."""
    names = [
        run_name(compose(["data=text", "data.path=x", f"data.validation={sets}"]))
        for sets in ("{a: x, b: y}", "{b: y, a: x}")
    ]
    assert len(set(names)) == 2


def test_name_does_not_depend_on_the_process():
    overrides = ["data=text", "data.path=[x,y]", "data.validation={a: x, b: y}", "tokenizer=bpe"]
    code = (
        "import sys; from launch.config import compose; from launch.run.identity import run_name;"
        " print(run_name(compose(sys.argv[1:])))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, *overrides],
        env={"PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == run_name(compose(overrides))


def test_config_of_a_folder_is_the_one_that_was_claimed(tmp_path):
    overrides = [
        "data=text",
        "data.sources={a: {path: x}, b: {path: [y, z], weight: 2}}",
        "data.validation={v: w}",
        "data.separator=---",
        "checkpoint.milestones=[5]",
        "optim.lr=3e-4",
        "optim.clip=null",
    ]
    config = compose(overrides)
    claim(tmp_path, config)
    assert load_config(tmp_path) == config
    assert run_name(load_config(tmp_path)) == run_name(config)
    assert json.dumps(canonical(load_config(tmp_path))) == json.dumps(canonical(config))
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_folder_takes_the_same_run_again_with_what_may_change(tmp_path):
    claim(tmp_path, compose(["seed=3"]))
    claim(
        tmp_path,
        compose(
            ["seed=3", "evaluation.every=7", "checkpoint.keep=5", "optim.rho=0.7", "minutes=3"]
        ),
    )
    assert load_config(tmp_path).evaluation.every == 7


def test_folder_of_another_run_is_refused_with_the_difference(tmp_path):
    claim(tmp_path, compose(["seed=3"]))
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError) as refusal:
        claim(tmp_path, compose(["seed=4", "optim.lr=2e-3", "tokenizer=bpe", "evaluation.every=7"]))
    said = str(refusal.value)
    assert said.startswith(f"dir={tmp_path} holds another run (")
    assert "choose another dir" in said
    for difference in (
        "seed 3 -> 4",
        "optim.lr 0.001 -> 0.002",
        "tokenizer.name bytes -> bpe",
        "tokenizer.vocab_size unread -> 4096",
    ):
        assert difference in said
    assert "evaluation" not in said
    assert (tmp_path / "config.yaml").read_text() == before


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=f"run={tmp_path} holds no config.yaml; name the folder of a run"
    ):
        load_config(tmp_path)
