"""What every gradient rule leaves behind: weights, buffers, random stream, optimiser and its own
memory; and what it refuses.

The rules are those of conf/optim/*.yaml, whichever they are. Bit for bit where it says so.
"""

import copy
import io
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conf.rule import OptimConfig, RuleConfig
from conf.schema import ScheduleConfig
from launch.run.preemption import Preemption
from model import GPT, GPTConfig
from optim import (
    Adapter,
    Gradient,
    SharpnessAware,
    build_optimizer,
    build_schedule,
    check_axes,
    forward_flops,
    passes,
)
from optim.rule.axes import make_axes
from optim.rule.metrics import Metric
from optim.rule.perturbation import moved
from tests.problems import (
    T,
    V,
    adamw,
    assert_apart,
    assert_close,
    flat,
    gpt,
    presets,
    taken,
    token_batches,
    vector_batches,
    weights_of,
    whole,
)

PRESETS = presets()
RULES = PRESETS | {
    "functional_rebuild": {"path": "functional", "cotangent": "rebuild"},
    "functional_store": {"path": "functional", "cotangent": "store"},
    "angle_rebuild": {"path": "angle", "angle": 30.0, "cotangent": "rebuild"},
    "preconditioned_before": {"path": "full", "metric": "adam", "second_moment": "before"},
    "delta_functional": {"path": "functional", "weights": "delta", "cotangent": "store"},
    "delta_mixed_functional": {
        "path": "functional",
        "weights": "delta",
        "delta_probe": "mixed",
        "cotangent": "rebuild",
    },
    "delta_reweighted": {"path": "full", "weights": "delta", "delta_descent": "reweighted"},
    "random": {"path": "full", "direction": "random"},
    "momentum_functional": {"path": "functional", "direction": "momentum"},
    "stale_logit": {"path": "logit", "direction": "stale"},
    "friendly_msam": {"path": "full", "direction": "friendly", "scope": "micro_batch"},
    "functional_msam": {"path": "functional", "scope": "micro_batch"},
    "look_started": {"path": "functional", "combine": "reuse", "period": 3, "start": 1},
    "few_steps": {"path": "full", "direction": "stale", "period": 2, "start": 1, "stop": 6},
    "mlps_only": {"path": "full", "direction": "friendly", "parameters": "*.mlp.*"},
}
NO_CLEAN_PASS = ("momentum_sam", "stale_sam", "random", "few_steps")


def every(rules=RULES):
    """Every rule by its name."""
    return pytest.mark.parametrize("name", rules)


def of(name, **more):
    """The axes of a rule. For models with names of their own, patterns of a GPT's names become
    all."""
    return RULES[name] | more


def bits(tensors):
    """Copies, their bytes and addresses."""
    return [(tensor.data_ptr(), tensor.detach().clone().view(torch.uint8)) for tensor in tensors]


def same_bits(tensors, noted):
    """Whether addresses and bytes are still those that were noted."""
    return all(
        t.data_ptr() == at and torch.equal(t.detach().view(torch.uint8), was)
        for t, (at, was) in zip(tensors, noted, strict=True)
    )


def state_of(optimizer):
    """Every tensor of an optimiser's state."""
    return [tensor.reshape(-1) for state in optimizer.state.values() for tensor in state.values()]


def trained(
    name,
    steps,
    model=None,
    rule=None,
    optimizer=None,
    begin=0,
    autocast=False,
    batches=token_batches,
):
    """A model in fp32 with dropout, its rule and optimiser, so many steps on."""
    model = model or gpt(dropout=0.2, dtype=torch.float32)
    optimizer = optimizer or build_optimizer(model, OptimConfig(lr=0.02))
    rule = rule or SharpnessAware(model, optimizer, **of(name))
    for step in range(begin, begin + steps):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            result = rule.gradient(batches(step), logged=False)
        assert result.finite
        optimizer.step()
        optimizer.zero_grad()
    return model, rule, optimizer


# Weights


def test_presets_have_the_papers_numbers():
    """Radii, and what the methods have beside them, as each was published."""
    found = {name: make_axes(axes) for name, axes in PRESETS.items()}
    assert {name: axes.rho for name, axes in found.items() if axes.rho != 0.05} == {
        "asam": 0.2,
        "momentum_sam": 3.0,
    }
    assert (found["look_sam"].period, found["look_sam"].alpha, found["gsam"].alpha) == (5, 0.7, 0.4)
    assert (
        found["friendly_sam"].friendly_sigma,
        found["friendly_sam"].friendly_decay,
        found["asam"].adaptive_floor,
    ) == (1.0, 0.9, 0.01)
    assert (
        found["delta_sam"].delta_sigma,
        found["delta_sam"].delta_power,
        found["angle_sam"].angle_norm,
    ) == (0.15, 1.0, "max")
    preconditioned = found["preconditioned_sam"]
    assert (
        preconditioned.second_moment,
        preconditioned.metric_power,
        preconditioned.metric_norm,
    ) == ("with_gradient", 0.5, "l2")


@every()
def test_a_step_costs_the_flops_that_it_counts(name):
    """Every product, the head's too; those of logits at the moved point would show."""
    shape = GPTConfig(64, 16, 2, 2, 32)
    torch.manual_seed(0)
    model = GPT(shape)
    optimizer = adamw(model)
    rule = SharpnessAware(model, optimizer, **of(name))
    for step in range(4):
        tokens = torch.randint(0, 64, (2, 2, 17), generator=torch.Generator().manual_seed(step))
        batches = [(micro[:, :-1], micro[:, 1:]) for micro in tokens]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = rule.gradient(batches, logged=False)
        assert counter.get_total_flops() == 64 * forward_flops(shape, 16).of(
            result.forwards, result.backwards, result.head_products
        )
        optimizer.step()
        optimizer.zero_grad()


@every()
def test_a_step_leaves_weights_addresses_and_the_optimiser_bit_for_bit(name):
    """A step of learning rate 0; nothing of a rule is in the optimiser, which it only reads."""
    torch.manual_seed(0)
    model, rule, optimizer = trained(name, 2)
    weights, state = bits(model.parameters()), bits(state_of(optimizer))
    groups = copy.deepcopy(
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    )
    for step in (2, 5):
        rule.step = step
        rule.gradient(token_batches(step))
        assert same_bits(model.parameters(), weights)
        assert same_bits(state_of(optimizer), state)
        taken(model)
    assert all(set(kept) == {"step", "exp_avg", "exp_avg_sq"} for kept in optimizer.state.values())
    assert [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ] == groups
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    rule.gradient(token_batches(9))
    optimizer.step()
    assert same_bits(model.parameters(), weights)


def raising_at(model, forward, where):
    """Makes the model's so many-th forward from now raise, in itself or in its backward."""
    original, count = model.lazy_logits, [0]

    def backward(_):
        raise RuntimeError("out of memory")

    def lazy_logits(inputs):
        count[0] += 1
        logits = original(inputs)
        if count[0] == forward:
            if where == "forward":
                raise RuntimeError("out of memory")
            logits.h_BxTxD.register_hook(backward)
        return logits

    model.lazy_logits = lazy_logits


@pytest.mark.parametrize(
    "axes", [{"path": "full"}, {"path": "functional"}, {"path": "full", "metric": "adam"}], ids=str
)
def test_where_nothing_that_moves_has_a_gradient_the_gradient_is_the_plain_one(axes):
    module = torch.nn.ModuleDict(
        {"used": torch.nn.Linear(3, 4), "aside": torch.nn.Linear(3, 4)}
    ).double()
    rule = SharpnessAware(
        Adapter(module, lambda m, x: m["used"](x)),
        torch.optim.AdamW(module.parameters()),
        parameters="aside.*",
        **axes,
    )
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 4, (5,))
    result = rule.gradient([(x, y)])
    own = torch.autograd.grad(
        torch.nn.functional.cross_entropy(module["used"](x), y), module["used"].weight
    )[0]
    torch.testing.assert_close(module["used"].weight.grad, own, rtol=1e-12, atol=0)
    assert result.finite and module["aside"].weight.grad is None


@pytest.mark.parametrize("direction", ["random", "momentum", "gradient"])
@pytest.mark.parametrize("eps", [None, 0.0])
def test_what_has_no_gradient_stays_under_adams_metric(direction, eps):
    """A parameter that the loss does not reach has no second moment, and one that it reached
    earlier keeps its own."""
    module = torch.nn.ModuleDict(
        {name: torch.nn.Linear(3, 4) for name in ("used", "once", "never")}
    ).double()
    reached = ["used", "once"]
    optimizer = torch.optim.AdamW(module.parameters())
    adapter = Adapter(module, lambda m, x: sum(m[name](x) for name in reached))
    rule = SharpnessAware(adapter, optimizer, direction=direction, metric="adam", metric_eps=eps)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 4, (5,))
    before = bits(module["never"].parameters())
    for _ in range(3):
        result = rule.gradient([(x, y)])
        assert (
            result.finite
            and module["used"].weight.grad.isfinite().all()
            and module["never"].weight.grad is None
        )
        assert not result.perturbed or 0 < result.metrics["sharpness/realised_radius"] <= 0.05 * (
            1 + 1e-6
        )
        optimizer.step()
        optimizer.zero_grad()
        reached[:] = ["used"]
    assert same_bits(module["never"].parameters(), before)


def test_the_decomposition_of_a_group_is_that_of_the_group_alone():
    """The first one, whatever else is in the batch."""
    found = []
    for scope, groups in (("batch", 1), ("micro_batch", 1), ("micro_batch", 2)):
        model = gpt()
        rule = SharpnessAware(model, adamw(model), scope=scope)
        found.append(rule.gradient(token_batches(0, (2, 2))[:groups], diagnose=True).metrics)
    names = [name for name in found[0] if "delta_" in name or "cosine_" in name]
    assert len(names) == 5
    for name in names:
        assert (
            float(found[0][name])
            == pytest.approx(float(found[1][name]), rel=1e-9)
            == pytest.approx(float(found[2][name]), rel=1e-9)
        ), name


def test_batches_and_parameters_that_cannot_be_are_refused():
    model, batches = gpt(), token_batches(0)
    rule = SharpnessAware(model, adamw(model))
    for empty in ([], [[]]):
        with pytest.raises(ValueError, match="batches hold no instance; give at least one"):
            rule.gradient(empty)
    rule.gradient(batches)
    with pytest.raises(
        ValueError, match=r"\.grad is not empty, and would be added to; call optimizer\.zero_grad"
    ):
        rule.gradient(batches)
    taken(model)
    model.norm.weight.requires_grad = False
    frozen = SharpnessAware(model, adamw(model))
    model.norm.weight.requires_grad = True
    with pytest.raises(
        ValueError, match=r"norm\.weight was frozen when the rule was made; make another one"
    ):
        frozen.gradient(batches)


PLACES = [
    ("sam", 4, "forward"),
    ("sam", 5, "backward"),
    ("functional_sam", 6, "backward"),
    ("functional_rebuild", 4, "backward"),
    ("msam", 4, "backward"),
    ("functional_msam", 6, "forward"),
    ("delta_sam", 2, "forward"),
    ("delta_sam", 5, "forward"),
    ("delta_sam", 11, "backward"),
    ("logit_sam", 5, "forward"),
    ("logit_sam", 8, "backward"),
    ("angle_sam", 5, "backward"),
    ("stale_sam", 2, "backward"),
    ("momentum_sam", 3, "forward"),
    ("look_sam", 4, "backward"),
    ("sam", 2, "backward"),
]


@pytest.mark.parametrize("name, forward, where", PLACES)
def test_weights_survive_a_pass_that_raises(name, forward, where):
    """In the clean pass, in a probe, at the moved point, and after it; the next step is then what
    it would have been."""
    model, rule, optimizer = trained(name, 1, gpt(dtype=torch.float32))
    if name == "look_sam":
        rule.step = 0  # so that the next step moves
    other, untouched, _ = trained(name, 1, gpt(dtype=torch.float32))
    weights, state = bits(model.parameters()), bits(state_of(optimizer))
    raising_at(model, forward, where)
    with pytest.raises(RuntimeError, match="out of memory"):
        rule.gradient(token_batches(1))
    assert same_bits(model.parameters(), weights) and same_bits(state_of(optimizer), state)
    del model.lazy_logits
    optimizer.zero_grad()
    untouched.step = rule.step
    if name == "look_sam":  # let go of for the one that the step would have left
        untouched.combination.state = {}
    rule.gradient(token_batches(2))
    untouched.gradient(token_batches(2))
    assert torch.equal(taken(model), taken(other))


@pytest.mark.parametrize("path", ["full", "functional", "logit"])
def test_weights_survive_a_move_that_stops_half_way(path, monkeypatch):
    """Here the metric makes a move of the last parameter that does not fit it."""

    def scale(self, parameters, q, gradients):
        return [*q[:-1], torch.ones(3, 3, 3)]

    monkeypatch.setattr(Metric, "scale", scale)
    model = gpt(dtype=torch.float32)
    rule = SharpnessAware(model, adamw(model), path=path, rho=0.5)
    weights, moves = bits(model.parameters()), []
    monkeypatch.setattr(Metric, "norm", lambda self, d, q: torch.ones(()))
    monkeypatch.setattr("optim.rule.diagnostics.dot", lambda ones, others: torch.ones(()))
    with pytest.raises(RuntimeError, match=r"size|shape|broadcast"):
        rule.gradient(token_batches(0))
    assert same_bits(model.parameters(), weights)
    big = [torch.randn(300_000), torch.randn(5)]
    noted = bits(big)
    with pytest.raises(RuntimeError), moved(big, [torch.ones(300_000), torch.ones(2, 2)], 0.1):
        moves.append("never")
    assert same_bits(big, noted) and not moves


def test_restoring_is_exact_where_adding_and_subtracting_is_not():
    model = gpt(dtype=torch.float32)
    weights = [p.detach().clone() for p in model.parameters()]
    directions = [torch.randn_like(p) for p in weights]
    noted = bits(model.parameters())
    with moved(list(model.parameters()), directions, 0.05) as copies:
        assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert all(torch.equal(copy, w) for copy, w in zip(copies, weights, strict=True))
    assert same_bits(model.parameters(), noted)
    assert any(
        not torch.equal((w + 0.05 * d) - 0.05 * d, w)
        for w, d in zip(weights, directions, strict=True)
    )


class Branches(nn.Module):
    """Uses a layer in some forwards only."""

    def __init__(self, used):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 9), nn.Linear(7, 9), nn.Linear(9, V)
        self.used, self.forwards = used, 0

    def forward(self, x):
        self.forwards += 1
        return self.head(
            torch.tanh(self.first(x) + (self.second(x) if self.forwards in self.used else 0))
        )


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"path": "functional"},
        {"metric": "adam"},
        {"combine": "orthogonal"},
        {"combine": "reuse"},
        {"direction": "friendly"},
    ],
    ids=str,
)
@pytest.mark.parametrize("used", [{1}, {2}, set()], ids=["clean_pass", "moved_pass", "never"])
def test_a_gradient_that_is_missing_in_one_pass(used, axes):
    """A layer that the moved pass does not use was moved all the same, and is restored."""
    model = Branches(used).double()
    rule, noted = (
        SharpnessAware(Adapter(model), adamw(model), rho=0.5, **axes),
        bits(model.parameters()),
    )
    at = []
    model.register_forward_pre_hook(
        lambda module, _: at.append(module.second.weight.detach().clone())
    )
    result = rule.gradient([whole(vector_batches())])
    assert result.finite and same_bits(model.parameters(), noted)
    assert torch.equal(at[0], at[1]) == (used != {1})
    assert (model.second.weight.grad is not None and model.second.weight.grad.any().item()) == (
        used == {2}
    ) or "combine" in axes
    optimizer = rule.optimizer
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# Values that are not finite


def nans(batches):
    """The same batches with a number that is none in the last."""
    inputs = batches[-1][0].clone()
    inputs[0, 0] = torch.nan
    return [*batches[:-1], (inputs, batches[-1][1])]


def normed_mlp():
    """A classifier with running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, V)
        ).double()


ADAPTED = {name: axes for name, axes in RULES.items() if axes.get("parameters") is None}


def pairs(step):
    """Micro-batches that batch statistics can be taken of."""
    return vector_batches(step, (3, 2, 2))


def memory_of(rule):
    """What the rule remembers but for the step and the way of its cotangents."""
    return {name: tensor.clone() for name, tensor in rule.state_dict().items() if "/" in name}


def adapted(name):
    """A rule on a plain classifier, three steps on."""
    model = nn.Sequential(
        nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, V)
    ).double()
    optimizer = adamw(model)
    return trained(
        name,
        3,
        model,
        SharpnessAware(Adapter(model), optimizer, **of(name)),
        optimizer,
        batches=pairs,
    )


@every(ADAPTED)
def test_an_ascent_that_is_not_finite_changes_nothing(name):
    """Every p.grad is None where the move would not have been finite, and no memory hears of such a
    gradient: the next steps are those of a rule that never saw the batch."""
    torch.manual_seed(0)
    model, rule, optimizer = adapted(name)
    if name in ("look_sam", "look_started", "few_steps"):
        rule.step = {"look_sam": 5, "look_started": 4, "few_steps": 3}[name]  # one that moves
    weights, state, memory = bits(model.parameters()), bits(state_of(optimizer)), memory_of(rule)
    twin = copy.deepcopy(model)
    its_optimizer = adamw(twin)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_rule = SharpnessAware(Adapter(twin), its_optimizer, **of(name))
    its_rule.load_state_dict(rule.state_dict())
    result = rule.gradient(nans(pairs(3)))
    without = name in (*NO_CLEAN_PASS, "momentum_functional", "stale_logit")
    assert result.finite == without  # those see it in the gradient only, as AdamW would
    gradients = [p.grad for p in model.parameters()]
    assert (
        all(g is None for g in gradients) if not without else not flat(gradients).isfinite().all()
    )
    assert same_bits(model.parameters(), weights) and same_bits(state_of(optimizer), state)
    after = memory_of(rule)
    assert after.keys() == memory.keys() and all(
        torch.equal(after[key], memory[key]) for key in memory
    )
    optimizer.zero_grad()
    its_rule.step += 1
    for step in (4, 5, 6):
        for r, o in ((rule, optimizer), (its_rule, its_optimizer)):
            assert r.gradient(pairs(step)).finite
            o.step()
            o.zero_grad()
    assert torch.equal(weights_of(model), weights_of(twin)) and weights_of(model).isfinite().all()


@every(ADAPTED)
def test_a_moved_pass_that_is_not_finite_poisons_no_memory(name):
    """The caller sees the gradient and skips the step, as train.py does."""
    torch.manual_seed(0)
    model, rule, optimizer = adapted(name)
    if name in ("look_sam", "look_started", "few_steps"):
        rule.step = {"look_sam": 5, "look_started": 4, "few_steps": 3}[name]
    weights, rho = bits(model.parameters()), rule.rho
    rule.rho = 1e200
    rule.gradient(pairs(3))
    assert not flat([p.grad for p in model.parameters()]).isfinite().all()
    assert same_bits(model.parameters(), weights)
    optimizer.zero_grad()
    assert all(tensor.isfinite().all() for tensor in memory_of(rule).values())
    rule.rho = rho
    for step in (4, 5, 6):
        result = rule.gradient(pairs(step))
        assert result.finite and all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def test_a_direction_that_is_not_finite_moves_nothing():
    model, batches = gpt(), token_batches()
    optimizer = adamw(model)
    SharpnessAware(model, optimizer).gradient(batches)
    optimizer.step()
    optimizer.zero_grad()
    rule, noted = SharpnessAware(model, optimizer, direction="momentum"), bits(model.parameters())
    optimizer.state[model.embedding.weight]["exp_avg"][0, 0] = torch.inf
    assert not rule.gradient(batches).finite
    assert same_bits(model.parameters(), noted) and all(p.grad is None for p in model.parameters())


def test_a_batch_of_which_nothing_counts_moves_nothing():
    model, (tokens, targets) = gpt(), whole(token_batches())
    for name in ("sam", "functional_sam", "logit_sam", "delta_sam", "msam"):
        result = SharpnessAware(model, adamw(model), **of(name)).gradient(
            [(tokens, torch.full_like(targets, -100))]
        )
        assert result.tokens == 0 and not result.perturbed and not taken(model).any()


# Buffers, dropout and the random stream


@every(ADAPTED)
def test_only_the_clean_pass_updates_buffers(name):
    """Running statistics are afterwards those of a plain step, bit for bit; of rules whose only
    pass is at the moved point, those of one."""
    torch.manual_seed(0)
    model, twin = normed_mlp(), normed_mlp()
    rule = SharpnessAware(Adapter(model), adamw(model), **of(name, rho=0.5))
    for step in range(4):
        rule.gradient(pairs(step))
        taken(model)
        Gradient(Adapter(twin)).gradient(pairs(step))
        taken(twin)
        assert model[1].num_batches_tracked == twin[1].num_batches_tracked == 3 * (step + 1)
        if name not in NO_CLEAN_PASS:
            assert torch.equal(model[1].running_mean, twin[1].running_mean) and torch.equal(
                model[1].running_var, twin[1].running_var
            )


def test_buffers_survive_a_moved_pass_that_raises():
    model, twin = normed_mlp(), normed_mlp()
    count = []

    def losses(z, y):
        count.append(1)
        if len(count) == 5:
            raise RuntimeError("out of memory")
        return F.cross_entropy(z, y, reduction="none")

    with pytest.raises(RuntimeError, match="out of memory"):
        SharpnessAware(Adapter(model, losses=losses), adamw(model)).gradient(pairs(0))
    Gradient(Adapter(twin)).gradient(pairs(0))
    assert all(
        torch.equal(one, other) for one, other in zip(model.buffers(), twin.buffers(), strict=True)
    )


def masks_of(model):
    """A list that the masks of every dropout layer, of every forward, will be appended to."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: found.append(output == 0))
    return found


@every()
def test_every_pass_sees_the_same_dropout_masks(name):
    """Those of the plain gradient; in each micro-batch others."""
    torch.manual_seed(0)
    model, _, optimizer = trained(name, 2)
    rule = SharpnessAware(model, optimizer, **of(name, start=0, stop=None, period=1))
    batches = token_batches(3, (2, 2))
    if RULES[name].get("direction") == "stale":
        rule.gradient(batches)
        taken(model)
    masks = masks_of(model)
    torch.manual_seed(5)
    Gradient(model).gradient(batches)
    taken(model)
    plain = [*masks]
    masks.clear()
    torch.manual_seed(5)
    assert rule.gradient(batches).perturbed
    layers = len(plain) // 2
    groups = [[0], [1]] if RULES[name].get("scope") == "micro_batch" else [[0, 1]]
    expected = []
    per_group = len(masks) // layers // 2  # passes over the batch
    for group in groups:
        for _ in range(per_group):
            expected += [
                mask for micro in group for mask in plain[micro * layers : (micro + 1) * layers]
            ]
    assert per_group == (1 if name in NO_CLEAN_PASS else passes(rule.axes, True, 4).forwards)
    assert len(masks) == len(expected) and all(
        torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True)
    )
    assert not torch.equal(plain[0], plain[layers]) and plain[0].any()


@every()
def test_the_random_stream_is_left_where_a_plain_step_leaves_it(name):
    """At any radius, with probes, and with diagnostics that cost passes."""
    torch.manual_seed(0)
    model, _, optimizer = trained(name, 1)
    often = of(name, start=0, stop=None, period=1)
    rules = [SharpnessAware(model, optimizer, **often | {"rho": rho}) for rho in (0.0, 0.4)]
    for step in range(2):
        after = []
        for rule in (Gradient(model), *rules):
            torch.manual_seed(step)
            rule.gradient(token_batches(step), diagnose=step == 1 and rule is rules[-1])
            taken(model)
            after.append(torch.get_rng_state())
        assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


# Radius 0 as a training run

EXACT = [
    "sam",
    "asam",
    "preconditioned_sam",
    "preconditioned_before",
    "msam",
    "delta_sam",
    "momentum_sam",
    "stale_sam",
    "friendly_sam",
    "random",
    "friendly_msam",
    "few_steps",
    "mlps_only",
    "functional_store",
    "preconditioned_functional_sam",
    "momentum_functional",
]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@every(EXACT)
def test_radius_0_trains_as_the_plain_gradient_bit_for_bit(name, autocast):
    """Through both passes; weights, moments and random stream, with dropout."""
    found = []
    for rule_class in (
        Gradient,
        partial(
            SharpnessAware,
            **of(name, rho=0.0) | ({"cotangent": "store"} if "functional" in name else {}),
        ),
    ):
        torch.manual_seed(1)
        model = gpt(dropout=0.2, dtype=torch.float32)
        optimizer = build_optimizer(model, OptimConfig(lr=0.02))
        rule = rule_class(model, optimizer) if rule_class is not Gradient else Gradient(model)
        trained(name, 3, model, rule, optimizer, autocast=autocast)
        found.append([*model.parameters(), *state_of(optimizer), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@every(
    [name for name in RULES if name != "delta_reweighted"]
)  # which weighs the loss at the moved point too
def test_radius_0_gives_the_plain_gradient_up_to_rounding(name):
    model = gpt()
    rule = SharpnessAware(model, adamw(model), **of(name, rho=0.0))
    for step in range(3):
        rule.gradient(token_batches(step))
        found = taken(model)
        Gradient(model).gradient(token_batches(step))
        assert_close(found, taken(model), 1e-12)


@every()
def test_autocast_sees_the_weights_where_they_are(name):
    """It keeps casts of weights by their addresses while it lasts; a pass in between two moves must
    not meet those of another point."""
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        model, rule, optimizer = trained(name, 0)
        for step in range(2):
            rule.rho = 1.0
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
                rule.gradient(token_batches(step), diagnose=step == 1)
            found.append([p.grad.clone() for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(found[:2], found[2:], strict=True):
        assert torch.equal(flat(one), flat(other))


@every()
def test_a_gradient_of_zeros_stays_one(name):
    """Squared errors that are all 0."""
    model = nn.Linear(7, 3)
    rule, inputs = (
        SharpnessAware(
            Adapter(model, losses=lambda z, y: (z - y).square()),
            adamw(model),
            **of(name, parameters="all", start=0),
        ),
        torch.randn(4, 7),
    )
    for _ in range(2):
        with torch.no_grad():
            targets = torch.cat([model(half) for half in inputs.split(2)])
        rule.gradient(list(zip(inputs.split(2), targets.split(2), strict=True)))
        assert not taken(model).any() or name == "random"


# Several rules, resuming


def test_rules_that_share_a_model_do_not_hear_of_each_other():
    torch.manual_seed(0)
    model = gpt(dtype=torch.float32)
    optimizer = adamw(model, lr=0.0)
    trained("sam", 1, model, None, optimizer)
    alone = {}
    for name in PRESETS:
        rule = SharpnessAware(model, optimizer, **of(name))
        alone[name] = [(rule.gradient(token_batches(step)), taken(model))[1] for step in range(2)]
    together = {name: SharpnessAware(model, optimizer, **of(name)) for name in PRESETS}
    for step in range(2):
        for name, rule in together.items():
            rule.gradient(token_batches(step))
            assert torch.equal(taken(model), alone[name][step]), name


def saved(model, rule, optimizer):
    """All that a checkpoint keeps, through a file."""
    file = io.BytesIO()
    torch.save(
        (model.state_dict(), optimizer.state_dict(), rule.state_dict(), torch.get_rng_state()), file
    )
    return file.getvalue()


SAVED = [(name, False) for name in RULES] + [(name, True) for name in PRESETS]


@pytest.mark.parametrize(
    "name, autocast",
    SAVED,
    ids=lambda value: value if isinstance(value, str) else "bf16" if value else "fp32",
)
def test_a_run_that_was_saved_goes_on_bit_for_bit(name, autocast):
    """Saved and loaded into new objects, its next three steps are those of the run that went on."""
    torch.manual_seed(0)
    model, rule, optimizer = trained(name, 0)
    files, weights = [saved(model, rule, optimizer)], [weights_of(model)]
    step = 4 if RULES[name].get("period") else 2
    for past in range(step + 3):
        trained(name, 1, model, rule, optimizer, past, autocast)
        files.append(saved(model, rule, optimizer))
        weights.append(weights_of(model))
    model, rule, optimizer = trained(name, 0)
    one, two, three, random = torch.load(io.BytesIO(files[step]))
    model.load_state_dict(one)
    optimizer.load_state_dict(two)
    rule.load_state_dict(three)
    torch.set_rng_state(random)
    for after in range(step, step + 3):
        trained(name, 1, model, rule, optimizer, after, autocast)
        assert torch.equal(weights_of(model), weights[after + 1]), after


@pytest.mark.parametrize("name", ["random", "delta_sam"])
def test_noise_is_that_of_the_seed_that_the_rule_was_made_under(name):
    """Saved with it, whatever torch is seeded with by then; a state without a seed leaves the rule
    its own."""
    model, states = gpt(dtype=torch.float32), []

    def gradient(seed, state=None):
        torch.manual_seed(seed)
        rule = SharpnessAware(model, adamw(model), **of(name))
        rule.load_state_dict(state or rule.state_dict())
        states.append(rule.state_dict())
        torch.manual_seed(5)
        rule.gradient(token_batches(0))
        return taken(model)

    found = gradient(2**63 + 1)
    assert torch.equal(gradient(8, states[0]), found) and not torch.equal(gradient(8), found)
    assert not torch.equal(gradient(8, {"step": torch.tensor(0)}), found)


def test_what_was_saved_is_not_changed_by_what_comes_after():
    """Nor by the rule that it was loaded into."""
    _, rule, _ = trained("friendly_sam", 2, gpt(dtype=torch.float32))
    state = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
    _, other, _ = trained("friendly_sam", 0, gpt(dtype=torch.float32))
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other.load_state_dict(state)
    trained("friendly_sam", 1, other.module, other, other.optimizer)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_a_signal_at_the_moved_point_waits_for_the_weights_to_be_back():
    """Nothing is saved between the move and the restoration: the handler only takes a note."""
    model = gpt(dtype=torch.float32)
    rule, noted, original, count = (
        SharpnessAware(model, adamw(model)),
        bits(model.parameters()),
        model.lazy_logits,
        [],
    )

    def lazy_logits(inputs):
        count.append(same_bits(model.parameters(), noted))
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(inputs)

    model.lazy_logits = lazy_logits
    with Preemption() as preemption:
        result = rule.gradient(token_batches())
        assert preemption.requested == "SIGTERM"
    assert (
        count == [True] * 3 + [False] * 3
        and result.perturbed
        and same_bits(model.parameters(), noted)
    )


# Any module


def test_a_classifier_with_batch_statistics():
    """SAM and Functional-SAM against two passes by hand, over a few steps."""
    for path in ("full", "functional"):
        model, twin = normed_mlp(), normed_mlp()
        optimizer, its_optimizer = adamw(model), adamw(twin)
        rule = SharpnessAware(Adapter(model), optimizer, rho=0.3, path=path)
        for step in range(4):
            inputs, targets = whole(pairs(step))
            rule.gradient([(inputs, targets)])
            by_hand(
                twin,
                lambda z, targets=targets: F.cross_entropy(z, targets),
                lambda inputs=inputs, twin=twin: twin(inputs),
                0.3,
                path,
            )
            for o in (optimizer, its_optimizer):
                o.step()
                o.zero_grad()
            assert_close(weights_of(model), weights_of(twin), 1e-9)
            assert_close(flat(list(model.buffers())), flat(list(twin.buffers())), 1e-9)


def by_hand(model, loss, logits, rho, path):
    """Leaves the gradient of SAM or Functional-SAM in p.grad, in two passes that anybody would
    write down."""
    parameters = list(model.parameters())
    z = logits()
    (r,) = torch.autograd.grad(loss(z), z, retain_graph=True)
    g = torch.autograd.grad(z, parameters, r)
    buffers, weights = (
        [buffer.clone() for buffer in model.buffers()],
        [p.detach().clone() for p in parameters],
    )
    length = sum(x.square().sum() for x in g).sqrt()
    with torch.no_grad():
        for p, x in zip(parameters, g, strict=True):
            p.add_(rho * x / length)
    z = logits()
    (loss(z) if path == "full" else (r * z).sum()).backward()
    with torch.no_grad():
        for p, w in zip(parameters, weights, strict=True):
            p.copy_(w)
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "sam",
        "functional_sam",
        "logit_sam",
        "angle_sam",
        "msam",
        "delta_sam",
        "preconditioned_functional_sam",
    ],
)
def test_a_regression(name, outputs):
    """Squared errors of one number, without a dimension of its own, or of several."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(7, 9),
        nn.Tanh(),
        nn.Linear(9, outputs),
        *([nn.Flatten(0)] if outputs == 1 else []),
    )
    teacher = torch.randn(7, outputs)
    model = Adapter(module, losses=lambda z, y: (z - y).square())
    optimizer = adamw(module, lr=0.02)
    rule, losses = SharpnessAware(model, optimizer, **of(name, rho=0.01)), []
    inputs = torch.randn(16, 7)
    targets = (inputs @ teacher).squeeze(-1)
    for _ in range(40):
        result = rule.gradient([(inputs[:5], targets[:5]), (inputs[5:], targets[5:])])
        losses.append(float(result.loss))
        optimizer.step()
        optimizer.zero_grad()
    assert result.tokens == targets.numel()
    assert losses[-1] < 0.3 * losses[0]
    assert losses[0] == pytest.approx(float(teacher.norm() ** 2) / outputs, rel=1.0)


@pytest.mark.parametrize("path", ["full", "functional"])
def test_a_hugging_face_classifier(path):
    """Inputs are a dict, cut into micro-batches or not; SAM and Functional-SAM against two passes
    by hand."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=T,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    module = transformers.BertForSequenceClassification(config).double().train()
    twin = copy.deepcopy(module)
    optimizer, its_optimizer = adamw(module), adamw(twin)
    rule = SharpnessAware(
        Adapter(module, logits=lambda m, inputs: m(**inputs).logits), optimizer, rho=0.3, path=path
    )
    losses = []
    for _ in range(6):
        tokens = torch.randint(0, V, (6, T), generator=torch.Generator().manual_seed(1))
        inputs, labels = (
            {"input_ids": tokens, "attention_mask": (tokens > 2).long()},
            tokens[:, 0] % 3,
        )
        cut = [
            ({key: value[rows] for key, value in inputs.items()}, labels[rows])
            for rows in (slice(0, 2), slice(2, 6))
        ]
        losses.append(float(rule.gradient(cut).loss))
        by_hand(
            twin,
            lambda z, labels=labels: F.cross_entropy(z, labels),
            lambda inputs=inputs: twin(**inputs).logits,
            0.3,
            path,
        )
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)
        for o in (optimizer, its_optimizer):
            o.step()
            o.zero_grad()
    assert losses[-1] < losses[0]


# What a step costs


@pytest.mark.parametrize("store", [True, False], ids=["store", "rebuild"])
@every()
def test_a_step_costs_what_the_plan_says(name, store):
    axes = of(name, start=0, stop=None, period=1)
    if axes["path"] in ("functional", "angle"):
        if store and axes.get("weights") == "delta":
            return
        axes |= {"cotangent": "store" if store else "rebuild"}
    model = gpt()
    rule = SharpnessAware(model, adamw(model), **axes)
    trained(name, 1, model, rule, rule.optimizer)
    result = rule.gradient(token_batches(1), logged=False)
    assert result.perturbed
    assert (result.forwards, result.backwards, result.head_products) == pytest.approx(
        passes(rule.axes, store, 4)
    )


def test_an_ascent_on_a_part_costs_a_part():
    model, batches = gpt(), token_batches(0, (2, 1, 1))
    for path in ("full", "functional", "logit"):
        rule = SharpnessAware(
            model, adamw(model), path=path, ascent_fraction=0.5, cotangent="rebuild"
        )
        result = rule.gradient(batches, logged=False)
        taken(model)
        assert (result.forwards, result.backwards, result.head_products) == pytest.approx(
            passes(rule.axes, False, 4)
        )
        assert result.backwards == pytest.approx(
            passes(replace(rule.axes, ascent_fraction=1.0), False, 4).backwards - 0.5
        )


# What is refused

REFUSED = [
    ({"direction": "momentum", "scope": "micro_batch"}, "direction=momentum", "use scope=batch"),
    ({"direction": "stale", "scope": "micro_batch"}, "direction=stale", "use scope=batch"),
    ({"direction": "random", "scope": "micro_batch"}, "direction=random", "use scope=batch"),
    ({"direction": "momentum", "weights": "delta"}, "weights=delta", "use direction=gradient"),
    (
        {"direction": "stale", "ascent_fraction": 0.5},
        "ascent_fraction=0.5",
        "use direction=gradient",
    ),
    ({"path": "angle", "weights": "delta"}, "path=angle", "use weights=uniform"),
    (
        {"path": "angle", "angle": 30.0, "ascent_fraction": 0.5},
        "ascent_fraction=0.5",
        "ascent_fraction=1",
    ),
    ({"combine": "orthogonal", "weights": "delta"}, "combine=orthogonal", "use weights=uniform"),
    ({"combine": "reuse", "ascent_fraction": 0.25}, "combine=reuse", "ascent_fraction=1"),
    (
        {"path": "logit", "weights": "delta", "delta_descent": "reweighted"},
        "delta_descent=reweighted",
        "use path=full",
    ),
    (
        {"weights": "delta", "delta_descent": "reweighted", "ascent_fraction": 0.5},
        "ascent_fraction=0.5",
        "use ascent_fraction=1",
    ),
]
OUT_OF_RANGE = [
    ({"scope": "replica"}, "scope=replica", "use scope="),
    ({"rho": -0.1}, "rho=-0.1", "at least"),
    ({"period": 0}, "period=0", "at least 1"),
    ({"angle": 91.0}, "angle=91.0", "at most 90"),
    ({"ascent_fraction": 0.0}, "ascent_fraction=0.0", "above 0"),
    ({"direction": "uphill"}, "direction=uphill", "choose one of gradient"),
    ({"path": "sideways"}, "path=sideways", "choose one of none, full"),
    ({"radius": 1}, "radius=1", "choose among path"),
    ({"start": 0.5}, "start=0.5", "give steps"),
    ({"stop": 0.5}, "stop=0.5", "give steps"),
    ({"start": 2.5}, "start=2.5", "give steps"),
    ({"rho": float("nan")}, "rho=nan", "give a number"),
    ({"rho": "0.1"}, "rho='0.1'", "it must be float"),
    ({"rho": None}, "rho=None", "float"),
    ({"period": 1.5}, "period=1.5", "it must be int"),
    ({"parameters": None}, "parameters=None", "it must be str"),
    ({"path": "none"}, "path=none", "optim.Gradient"),
    ({"start": 3, "stop": 2}, "stop=2", "stop later"),
    ({"stop": 0}, "stop=0", "stop later"),
    ({"parameters": "*.lora.*"}, "parameters=*.lora.*", "matches no parameter"),
]


@pytest.mark.parametrize("axes, what, remedy", REFUSED + OUT_OF_RANGE, ids=str)
def test_what_means_nothing_is_refused_with_key_value_and_remedy(axes, what, remedy):
    model = gpt()
    with pytest.raises(ValueError) as raised:
        SharpnessAware(model, adamw(model), **axes)
    assert what in str(raised.value) and remedy in str(raised.value)


@pytest.mark.parametrize("axes, what, remedy", REFUSED, ids=str)
def test_a_configuration_is_refused_alike(axes, what, remedy):
    with pytest.raises(ValueError) as raised:
        check_axes(RuleConfig(**{"path": "full"} | axes))
    assert what in str(raised.value) and remedy in str(raised.value)


def test_what_the_optimiser_must_hold():
    model = gpt()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError,
        match=(
            r"metric=adam needs Adam's second moment of embedding.weight.*use AdamW or"
            r" metric=euclidean"
        ),
    ):
        SharpnessAware(model, sgd, metric="adam")
    with pytest.raises(
        ValueError,
        match=(
            r"direction=momentum needs a momentum of embedding.weight.*use AdamW or SGD with"
            r" momentum"
        ),
    ):
        SharpnessAware(model, sgd, direction="momentum")
    SharpnessAware(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), direction="momentum"
    )
    with pytest.raises(
        ValueError, match=r"embedding.weight is torch.bfloat16.*keep weights in fp32"
    ):
        SharpnessAware(model.bfloat16(), adamw(model))


@every(PRESETS)
def test_every_preset_means_something(name):
    check_axes(RuleConfig(**PRESETS[name]))
    model = gpt()
    rule = SharpnessAware(model, adamw(model), **PRESETS[name])
    Gradient(model).gradient(token_batches(0))
    plain = taken(model)
    trained(name, 1, model, rule, rule.optimizer)
    rule.rho = 1.0
    rule.gradient(token_batches(0))
    assert_apart(taken(model), plain)


# What a run makes of it


def test_a_run_cuts_its_batch_into_so_many_groups(tiny, tmp_path, monkeypatch, capfd):
    """optim.num_groups is their number, and not their size."""
    import train
    from launch.config import compose

    seen, original = [], SharpnessAware.gradient

    def gradient(self, batches, *rest):
        seen.append([[len(targets) for _, targets in group] for group in batches])
        return original(self, batches, *rest)

    monkeypatch.setattr(SharpnessAware, "gradient", gradient)
    overrides = [
        "optim=msam",
        "batch.sequences=8",
        "batch.micro=1",
        "schedule.steps=1",
        "schedule.warmup_steps=0",
        f"dir={tmp_path}/run",
    ]
    assert train.main(compose([*tiny, *overrides, "optim.num_groups=2"])) == 0
    assert seen == [[[1, 1, 1, 1], [1, 1, 1, 1]]]


def test_a_rule_that_would_never_act_is_refused():
    optim = OptimConfig(path="full", start=10)
    with pytest.raises(
        ValueError, match=r"optim.start=10 lies beyond the horizon of 10 steps.*start earlier"
    ):
        build_schedule(ScheduleConfig(steps=10), optim, 1, 1)


def test_making_a_rule_computes_no_weight():
    """Of a layer under spectral_norm, whose weight is a step of a power iteration each time that it
    is asked for; its bias is an operand still."""
    model = torch.nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 3)
    )
    before = [buffer.clone() for buffer in model.buffers()]
    rule = SharpnessAware(model, torch.optim.AdamW(model.parameters()))
    assert before and all(map(torch.equal, before, model.buffers()))
    assert rule.diagnostics.multiplied == rule.parameters.keys()
