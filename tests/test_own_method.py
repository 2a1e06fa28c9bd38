"""A method of one's own, for every axis of the rule: the example in the docstring of the axis' file
is registered, does what it says, costs what is planned, and trains from a file of its own."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import torch

from conf.rule import (
    COMBINATIONS,
    COTANGENT_PATHS,
    DIRECTIONS,
    METRICS,
    PATHS,
    WEIGHTINGS,
)
from optim import SharpnessAware, passes
from optim.rule.axes import copies
from tests.problems import (
    Reference,
    adamw,
    assert_close,
    gpt,
    perturbation,
    presets,
    rule_gradient,
    token_batches,
    weights_of,
    whole,
)
from tests.runs import ROOT

# File of the axis: its key, its registry, the name that the example registers, and its lines.
AXES = {
    "directions": ("direction", DIRECTIONS, "sign", 5),
    "metrics": ("metric", METRICS, "sign", 6),
    "descent": ("path", PATHS, "halfway", 3),
    "combine": ("combine", COMBINATIONS, "average", 6),
    "weights": ("weights", WEIGHTINGS, "hard", 4),
}
RHO = 0.3


def example(file: str) -> str:
    """The code in the docstring of a file."""
    docstring = import_module(f"optim.rule.{file}").__doc__
    return textwrap.dedent(docstring.split("selects it:\n\n")[1])


@pytest.fixture(params=AXES)
def axis(request, monkeypatch):
    """The key and the name of an example that is registered for one test."""
    file = request.param
    key, registry, name, lines = AXES[file]
    for names in (registry, COTANGENT_PATHS):
        monkeypatch.setitem(names, name, None)
        del names[name]
    code = example(file)
    assert len([line for line in code.splitlines() if line.strip()]) <= lines
    exec(code, dict(vars(import_module(f"optim.rule.{file}"))))
    assert name in registry
    return key, name


def test_an_example_does_what_it_says(axis):
    key, name = axis
    model, batches = gpt(), token_batches()
    reference = Reference(model, batches)
    axes = {key: name, "rho": RHO}
    if key == "weights":
        expected = hard_ascent(model, batches)
    else:
        expected = reference.g.sign() if key in ("direction", "metric") else reference.g
    assert_close(
        perturbation(model, batches, **axes), RHO * expected / expected.norm(), tolerance=1e-11
    )
    t = weights_of(model)
    moved = t + RHO * expected / expected.norm()
    g_rule = reference.gradient(moved)
    if key == "path":
        g_rule = (g_rule + reference.pull(moved, reference.r(t))) / 2
    if key == "combine":
        g_rule = (g_rule + reference.g) / 2
    assert_close(rule_gradient(model, batches, **axes), g_rule, tolerance=1e-11)


def hard_ascent(model, batches) -> torch.Tensor:
    """sum_i l_i n_i g_i over the instances, g_i and l_i of their mean losses."""
    inputs, targets = whole(batches)
    total = torch.zeros_like(weights_of(model))
    for i in range(len(inputs)):
        one = Reference(model, [(inputs[i : i + 1], targets[i : i + 1])])
        total += one.loss(one.t) * one.counted.sum() * one.g
    return total


def test_an_example_costs_what_is_planned(axis):
    key, name = axis
    model = gpt()
    rule = SharpnessAware(model, adamw(model), cotangent="store", **{key: name})
    result = rule.gradient(token_batches(), logged=False)
    spent = (result.forwards, result.backwards, result.head_products)
    assert spent == pytest.approx(passes(rule.axes, True, 4))
    assert spent == pytest.approx((2, 2, 8 if key == "path" else 6))


@pytest.mark.parametrize("name", presets())
def test_memory_is_what_is_declared(name):
    """In numbers, after two steps, one of which moves the weights."""
    model = gpt()
    rule = SharpnessAware(model, adamw(model), **presets()[name])
    for _ in range(2):
        rule.gradient(token_batches(), logged=False)
        model.zero_grad()
    held = [tensor.numel() for key, tensor in rule.state_dict().items() if "/" in key]
    declared = copies(rule.axes)
    moving = sum(p.numel() for p in rule.moving.values())
    everything = sum(p.numel() for p in rule.parameters.values())
    assert sum(held) == (
        declared.direction_memory * moving + declared.combination_memory * everything
    )


def test_examples_train(tmp_path, tiny):
    """Each is appended to the file of its axis, in a copy of the project, and has one more file."""
    project = shutil.copytree(
        ROOT,
        tmp_path / "project",
        ignore=shutil.ignore_patterns(".*", "runs", "tests", "local", "__pycache__"),
    )
    methods = {f"my_{key}": (file, key, name) for file, (key, _, name, _) in AXES.items()}
    for method, (file, key, name) in methods.items():
        with Path(project / f"optim/rule/{file}.py").open("a") as source:
            source.write(f"\n\n{example(file)}")
        axes = {"name": method, "path": "full", key: name, "defaults": "[adamw]"}
        content = "".join(f"{key}: {value}\n" for key, value in axes.items())
        (project / f"conf/optim/{method}.yaml").write_text(content)
    overrides = [*tiny, "schedule.steps=3", "evaluation.every=3", "precision=fp32"]
    command = [sys.executable, "-c", TRAIN, *overrides, "--", *methods]
    process = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "not read" not in process.stderr
    for method in methods:
        summary = json.loads((project / method / "summary.json").read_text())
        assert summary["perturbed_steps"] == 3
    assert re.findall(r"choose one of (.*)", process.stdout) == [", ".join([*DIRECTIONS, "sign"])]


TRAIN = """
import sys
import train
from launch.config import compose
split = sys.argv.index("--")
for method in sys.argv[split + 1 :]:
    overrides = [*sys.argv[1:split], f"optim={method}", f"dir={method}"]
    assert train.main(compose(overrides)) == 0
try:
    compose([*sys.argv[1:split], "optim=sam", "optim.direction=uphill"])
except ValueError as error:
    print(error)
"""


# Mistakes in a part of one's own


@pytest.mark.parametrize(
    "returned, said",
    [
        (lambda gradient: None, "direction=mine returned None for every parameter"),
        (lambda gradient: 1.0, "direction=mine of .* returned float; return a tensor, or None"),
        (lambda gradient: gradient.sum(), r"direction=mine of .* has shape \[\]; return a tensor"),
        (lambda gradient: gradient.sign_(), "direction=mine of .* changed the gradient in place"),
    ],
)
def test_a_direction_that_gives_no_direction_is_refused(monkeypatch, returned, said):
    class Mine(DIRECTIONS["gradient"]):
        def __call__(self, name, parameter, gradient):
            return returned(gradient)

    monkeypatch.setitem(DIRECTIONS, "mine", Mine)
    model = gpt()
    before = weights_of(model).clone()
    rule = SharpnessAware(model, adamw(model), rho=RHO, direction="mine")
    with pytest.raises(ValueError, match=said):
        rule.gradient(token_batches())
    assert torch.equal(weights_of(model), before)


def test_a_combination_that_returns_its_result_is_refused(monkeypatch):
    class Mine(COMBINATIONS["orthogonal"]):
        def combine(self, g, g_rule, overlap):
            return torch._foreach_add(g, g_rule)

    monkeypatch.setitem(COMBINATIONS, "mine", Mine)
    model = gpt()
    rule = SharpnessAware(model, adamw(model), rho=RHO, combine="mine")
    with pytest.raises(ValueError, match="combine=mine returned a result; change g_rule in place"):
        rule.gradient(token_batches())


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match=r"gradient is the name of .* already; choose another"):
        DIRECTIONS.register("gradient")(object)
    assert DIRECTIONS["gradient"] is not object


def test_a_method_without_a_path_is_refused(tmp_path, monkeypatch):
    """It would train by the plain gradient under the name of the method."""
    from launch.config import checks, compose

    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").write_text("name: mine\ndirection: stale\nlr: 1e-3\n")
    settings = compose(["model=tiny"])
    settings.optim.name = "mine"
    monkeypatch.setattr(checks, "CONF", str(tmp_path))
    with pytest.raises(ValueError, match=r"mine.yaml sets direction but no path, .* path: full"):
        checks.check_names(settings)
    (tmp_path / "optim" / "mine.yaml").write_text("name: mine\npath: none\ndirection: stale\n")
    checks.check_names(settings)
