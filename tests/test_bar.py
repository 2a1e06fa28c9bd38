"""BAR on real adapters: its equations, what SAM does to balancedness, and which tensors are taken
for a pair."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim import BAR
from optim.bar import _norms, lora_pairs

V, T, LR = 50, 9, 0.1
SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "vocab_size": V,
    "max_position_embeddings": 32,
}
TARGETS = {"gpt2": ["c_attn", "c_proj", "wte"], "llama": ["q_proj", "down_proj", "embed_tokens"]}
KINDS = pytest.mark.parametrize("kind", TARGETS)
FORMS = pytest.mark.parametrize("form", ["nbar", "obar"])


def peft_model(kind: str, adapters: dict[str, int] | None = None, random: bool = True) -> nn.Module:
    """A tiny model in float64 with peft's LoRA in linear (or Conv1D) layers and the embedding, all
    adapters in use at once."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    if kind == "gpt2":
        options = {
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **options))
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SMALL, intermediate_size=24)
        )
    adapters = adapters or {"default": 3}
    for name, rank in adapters.items():
        config = peft.LoraConfig(
            r=rank, lora_alpha=8, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
        )
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    model.base_model.set_adapter(list(adapters))
    if random:
        for index, (_, x, y) in enumerate(lora_pairs(model.double())):
            nn.init.normal_(x, std=0.5 if index % 2 else 0.02)
            nn.init.normal_(y, std=0.2)
    return model.double()


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: nn.Module, lr: float = LR) -> torch.optim.SGD:
    return torch.optim.SGD(trainable(model), lr=lr)


def backward(model: nn.Module, seed: int = 0) -> None:
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()


class Plain(nn.Module):
    """LoRA without peft; A is made before B or after it, as a layer or as a bare parameter."""

    def __init__(
        self,
        out: int = 4,
        width: int = 5,
        rank: int = 2,
        bare: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if bare:
            self.lora_B = nn.Parameter(torch.randn(out, rank, dtype=dtype))
            self.lora_A = nn.Parameter(torch.randn(rank, width, dtype=dtype))
        else:
            self.lora_A = nn.Linear(width, rank, bias=False, dtype=dtype)
            self.lora_B = nn.Linear(rank, out, dtype=dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        return (
            (self.lora_B, self.lora_A)
            if isinstance(self.lora_B, Tensor)
            else (self.lora_B.weight, self.lora_A.weight)
        )


def plain(gx: float = 1.0, gy: float = 1.0, **options) -> tuple[Plain, Tensor, Tensor]:
    """A layer whose gradients have these norms."""
    layer = Plain(**options)
    x, y = layer.factors()
    for p, norm in ((x, gx), (y, gy)):
        p.grad = torch.full_like(p, norm / math.sqrt(p.numel()))
    return layer, x, y


def balance(x: Tensor, y: Tensor) -> float:
    return float(x.detach().square().sum() - y.detach().square().sum()) / 2


# Which tensors


@KINDS
def test_pairs_are_found_by_structure_in_every_layer_and_adapter(kind):
    peft = pytest.importorskip("peft")
    ranks = {"first": 3, "second": 2}
    model = peft_model(kind, ranks)
    expected = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for adapter in ranks:
                embedding = adapter in layer.lora_embedding_A
                b, a = (
                    (layer.lora_embedding_B, layer.lora_embedding_A)
                    if embedding
                    else (layer.lora_B, layer.lora_A)
                )
                expected[f"{name}.{adapter}"] = (
                    (b[adapter], a[adapter])
                    if embedding
                    else (b[adapter].weight, a[adapter].weight)
                )
    found = {name: (x, y) for name, x, y in lora_pairs(model)}
    assert found.keys() == expected.keys() and len(found) == 2 * (7 if kind == "gpt2" else 5)
    for name, (x, y) in found.items():
        assert x is expected[name][0] and y is expected[name][1]
        assert x.shape[1] == y.shape[0] == ranks[name.rsplit(".")[-1]]


@KINDS
def test_both_factors_see_the_same_inner_product_with_their_gradient(kind):
    """Identity 37: <X, gX> = <Y, gY>, which no other pairing fulfils."""
    model = peft_model(kind, {"first": 3, "second": 3})
    backward(model)
    pairs = BAR(model, sgd(model)).pairs
    products = [
        ((pair.x * pair.x.grad).sum().item(), (pair.y * pair.y.grad).sum().item()) for pair in pairs
    ]
    assert all(
        abs(of_x - of_y) < 1e-12 * (pair.x.norm() * pair.x.grad.norm())
        for pair, (of_x, of_y) in zip(pairs, products, strict=True)
    )
    assert all(
        abs(of_x - of_y) > 1e-6 * abs(of_x) for (of_x, _), (_, of_y) in itertools.pairwise(products)
    )


def test_any_module_with_these_members_has_pairs():
    conv = nn.Module()
    conv.lora_A, conv.lora_B = nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 4, 1)
    by_adapter = nn.Module()
    by_adapter.lora_embedding_A, by_adapter.lora_embedding_B = (
        nn.ParameterDict(),
        nn.ParameterDict(),
    )
    for adapter, rank in (("a", 1), ("b", 2)):
        by_adapter.lora_embedding_A[adapter] = torch.ones(rank, 9)
    for adapter, rank in (("b", 2), ("a", 1)):  # dictionaries keep their order
        by_adapter.lora_embedding_B[adapter] = torch.ones(4, rank)
    only_b = nn.Module()
    only_b.lora_B = nn.Linear(2, 2)
    model = nn.ModuleDict(
        {
            "linear": Plain(),
            "bare": Plain(bare=True),
            "conv": conv,
            "dict": by_adapter,
            "other": only_b,
        }
    )
    found = {name: (x, y) for name, x, y in lora_pairs(model)}
    assert set(found) == {"linear", "bare", "conv", "dict.a", "dict.b"}
    for name in ("linear", "bare"):
        assert all(p is q for p, q in zip(found[name], model[name].factors(), strict=True))
    assert found["conv"] == (conv.lora_B.weight, conv.lora_A.weight)
    assert (
        found["dict.a"][0].shape == (4, 1)
        and found["dict.a"][1].shape == (1, 9)
        and found["dict.b"][1].shape == (2, 9)
    )


def test_frozen_pairs_are_left_out():
    model = peft_model("llama", {"first": 3, "second": 2})
    model.base_model.set_adapter("second")
    pairs = lora_pairs(model)
    assert len(pairs) == 5 and all(name.endswith(".second") for name, _, _ in pairs)
    pairs[0][2].requires_grad_(False)  # one frozen factor is enough
    assert [name for name, _, _ in BAR(model, sgd(model)).pairs and lora_pairs(model)] == [
        name for name, _, _ in pairs[1:]
    ]


# The equations


@FORMS
@KINDS
def test_a_step_on_a_real_model_is_the_equation(kind, form):
    model = peft_model(kind)
    backward(model)
    bar, s, branches = BAR(model, sgd(model), mu=0.5, form=form), 0.5 * LR, set()
    expected = []
    for pair in bar.pairs:
        if form == "nbar":
            grows = pair.x.grad.square().sum().sqrt() >= pair.y.grad.square().sum().sqrt()
        else:
            grows = not (pair.x.square().sum().sqrt() >= pair.y.square().sum().sqrt())
        branches.add(bool(grows))
        expected.append(
            (pair.x * (1 + s), pair.y * (1 - s)) if grows else (pair.x * (1 - s), pair.y * (1 + s))
        )
    others = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    balances = {pair.name: balance(pair.x, pair.y) for pair in bar.pairs}
    logged = bar.step()
    assert branches == {True, False}
    for pair, (x, y) in zip(bar.pairs, expected, strict=True):
        torch.testing.assert_close((pair.x, pair.y), (x, y), rtol=1e-14, atol=0)
    assert all(
        torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others
    )
    assert list(logged) == [pair.name for pair in bar.pairs]
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(
        balances, rel=1e-12
    )


@pytest.mark.parametrize(("form", "scales"), [("nbar", (1.05, 0.95)), ("obar", (0.95, 1.05))])
def test_a_tie_goes_to_x(form, scales):
    layer, x, y = plain(out=5)
    with torch.no_grad():
        x.fill_(2), y.fill_(-2)
    BAR(layer, sgd(layer), form=form).step()
    torch.testing.assert_close(
        (x, y),
        (torch.full_like(x, 2 * scales[0]), torch.full_like(y, -2 * scales[1])),
        rtol=1e-15,
        atol=0,
    )


@FORMS
def test_the_product_shrinks_by_one_minus_s_squared_and_obar_balances(form):
    """Identity 38."""
    model = peft_model("llama")
    backward(model)
    bar, s = BAR(model, sgd(model), form=form), 0.5 * LR
    before = [
        ((pair.x @ pair.y).detach(), pair.x.square().sum().item(), pair.y.square().sum().item())
        for pair in bar.pairs
    ]
    bar.step()
    for pair, (product, x2, y2) in zip(bar.pairs, before, strict=True):
        torch.testing.assert_close(pair.x @ pair.y, (1 - s * s) * product, rtol=1e-12, atol=1e-16)
        if form == "obar":
            expected = (1 + s * s) * (x2 - y2) - math.copysign(2 * s, x2 - y2) * (x2 + y2)
            assert 2 * balance(pair.x, pair.y) == pytest.approx(expected, rel=1e-12)


# What SAM does to balancedness


@KINDS
def test_sgd_changes_balancedness_by_exactly_the_square_of_the_step(kind):
    """Identity 39, first part: lr^2 (|gX|^2 - |gY|^2) / 2."""
    model, lr = peft_model(kind), 3.0
    backward(model)
    pairs, optimizer = lora_pairs(model), sgd(model, lr)
    before = [balance(x, y) for _, x, y in pairs]
    optimizer.step()
    for (_, x, y), was in zip(pairs, before, strict=True):
        expected = lr**2 * balance(x.grad, y.grad)
        assert (
            balance(x, y) - was == pytest.approx(expected, rel=1e-6, abs=1e-13)
            and abs(expected) > 1e-11
        )


def sam_gradients(model: nn.Module, rho: float) -> list[tuple[Tensor, Tensor]]:
    """SAM's gradient (gX, gY) of every pair, the norm over all factors; leaves weights and plain
    gradients as they are."""
    backward(model)
    factors, pairs = trainable(model), lora_pairs(model)
    copies, gradients = [p.detach().clone() for p in factors], [p.grad.clone() for p in factors]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    with torch.no_grad():
        for p, g in zip(factors, gradients, strict=True):
            p.add_(g, alpha=rho / norm)
    backward(model)
    found = [(x.grad.clone(), y.grad.clone()) for _, x, y in pairs]
    with torch.no_grad():
        for p, copy, g in zip(factors, copies, gradients, strict=True):
            p.copy_(copy)
            p.grad = g
    return found


def sam_flow(model: nn.Module, rho: float) -> tuple[list[float], list[float], list[float]]:
    """Of every pair: dB/dt under gradient flow by SAM's gradient, what the identity says it is, and
    the theorem's first order."""
    sam, pairs = sam_gradients(model, rho), lora_pairs(model)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in trainable(model)))
    flow, identity, theorem = [], [], []
    for (_, x, y), (gx, gy) in zip(pairs, sam, strict=True):
        flow.append(((y * gy).sum() - (x * gx).sum()).item())
        identity.append(rho * ((x.grad * gx).sum() - (y.grad * gy).sum()).item() / norm)
        theorem.append(rho * 2 * balance(x.grad, y.grad) / norm)
    return flow, identity, theorem


@KINDS
def test_sam_moves_balancedness_as_the_theorem_says(kind):
    """Identity 39, second part: exact at every radius, and the theorem's value to first order in
    it."""
    model = peft_model(kind)
    for rho in (1e-3, 0.05, 2.0):
        flow, identity, _ = sam_flow(model, rho)
        assert flow == pytest.approx(identity, rel=1e-9, abs=1e-15)
    errors = []
    for rho in (5e-5, 2.5e-5):
        flow, _, theorem = sam_flow(model, rho)
        errors.append([ours / theirs - 1 for ours, theirs in zip(flow, theorem, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert abs(fine) < 2e-3 and coarse / fine == pytest.approx(2, abs=0.1)


@KINDS
def test_nbar_moves_balancedness_in_sams_direction(kind):
    model = peft_model(kind)
    flow, _, _ = sam_flow(model, 1e-4)
    bar = BAR(model, sgd(model))
    before = bar.step()
    moved = [balance(pair.x, pair.y) - before[pair.name].item() for pair in bar.pairs]
    assert [value > 0 for value in moved] == [value > 0 for value in flow]
    assert {value > 0 for value in flow} == {True, False}


@pytest.mark.parametrize("flip", [False, True])
def test_for_an_inner_product_both_forms_are_one(flip):
    """W = X Y^T a number: gX = c Y, gY = c X, so the larger gradient is the smaller factor's, and
    SAM balances."""
    results = []
    for form in ("nbar", "obar"):
        torch.manual_seed(0)
        layer = Plain(out=1, width=1, rank=6)
        x, y = layer.factors()
        with torch.no_grad():
            (x if flip else y).mul_(3)
        ((x @ y).squeeze() - 2).square().backward()
        before = balance(x, y)
        BAR(layer, sgd(layer), form=form).step()
        assert abs(balance(x, y)) < abs(before)
        results.append((x, y))
    assert all(torch.equal(*same) for same in zip(*results, strict=True))


# Limits


def test_at_the_start_of_lora_only_a_shrinks():
    """Identity 40: B = 0 has all the gradient."""
    model = peft_model("gpt2", random=False)
    backward(model)
    bar = BAR(model, sgd(model))
    # peft starts embeddings with A = 0
    pairs = [(pair, pair.y.clone()) for pair in bar.pairs if "wte" not in pair.name]
    bar.step()
    assert len(pairs) == 6
    for pair, y in pairs:
        assert not pair.x.any() and pair.x.grad.any()
        torch.testing.assert_close(pair.y, y * (1 - 0.5 * LR), rtol=1e-15, atol=0)


@FORMS
def test_without_mu_nothing_changes(form):
    """Bit for bit the bare optimiser, its state too."""
    runs = []
    for with_bar in (False, True):
        model = peft_model("llama").float()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        bar = BAR(model, optimizer, mu=0, form=form) if with_bar else None
        for seed in range(3):
            backward(model, seed)
            if bar:
                bar.step()
            optimizer.step()
        runs.append(
            [
                *trainable(model),
                *(value for state in optimizer.state.values() for value in state.values()),
            ]
        )
    assert len(runs[0]) == 4 * 2 * 5
    assert all(torch.equal(*same) for same in zip(*runs, strict=True))


@FORMS
@pytest.mark.parametrize(
    ("bad", "which"),
    [(0.0, (0, 1)), *itertools.product([None, math.nan, math.inf], [(0,), (1,), (0, 1)])],
)
def test_a_pair_without_usable_gradients_is_left_alone(form, bad, which):
    model = nn.ModuleDict({"sick": Plain(), "well": Plain()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sick = model["sick"].factors()
    for index in which:
        sick[index].grad = (
            None
            if bad is None
            else sick[index].grad * 0 + torch.tensor([bad] + [0] * (sick[index].shape[1] - 1))
        )
    before = [p.clone() for layer in model.values() for p in layer.factors()]
    logged = BAR(model, sgd(model), form=form).step()
    after = [p for layer in model.values() for p in layer.factors()]
    assert [torch.equal(*same) for same in zip(before, after, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert logged["sick"].item() == pytest.approx(balance(*sick))


def test_an_idle_adapter_keeps_its_weights():
    model = peft_model("llama", {"first": 3, "second": 2})
    optimizer = sgd(model)
    bar, tokens = BAR(model, optimizer), torch.arange(T).view(1, T)
    for set_to_none in (True, False):
        model.base_model.set_adapter(["first", "second"])
        backward(model)
        model.base_model.set_adapter("first")
        optimizer.zero_grad(set_to_none)
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(
            (pair.x.grad is None) == (set_to_none and pair.name.endswith("second"))
            for pair in bar.pairs
        )
        before = [pair.x.clone() for pair in bar.pairs]
        bar.step()
        for pair, x in zip(bar.pairs, before, strict=True):
            assert torch.equal(pair.x, x) == pair.name.endswith("second")


# Strength


def scale_of(bar: BAR, x: Tensor) -> float:
    before = x.detach().clone()
    bar.step()
    return (x / before).mean().item() - 1


HALFWAY = 0.125 * math.sqrt(2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5] * 6),
        ("linear", [0.5, 0.375, 0.25, 0.125, 0, 0]),
        ("cosine", [0.5, 0.25 + HALFWAY, 0.25, 0.25 - HALFWAY, 0, 0]),
    ],
)
def test_mu_follows_its_schedule_and_a_resumed_run_goes_on_with_it(schedule, expected):
    layer, x, _ = plain(gx=2)
    bar = BAR(layer, sgd(layer), schedule=schedule, steps=4)
    found = []
    for _ in range(6):
        found.append(scale_of(bar, x) / LR)
        resumed = BAR(layer, sgd(layer), schedule=schedule, steps=4)
        resumed.load_state_dict(bar.state_dict())
        bar = resumed
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_learning_rate_is_the_one_of_the_step_and_of_the_group():
    model = nn.ModuleDict({"slow": plain(gx=2)[0], "fast": plain(gx=2)[0]})
    optimizer = torch.optim.SGD(
        [
            {"params": [*model["slow"].parameters()], "lr": 0.01},
            {"params": [*model["fast"].parameters()], "lr": 0.1},
        ]
    )
    bar = BAR(model, optimizer)
    state = optimizer.state_dict()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        before = [model[name].factors()[0].detach().clone() for name in model]
        bar.step()
        found = [
            (model[name].factors()[0] / x).mean().item() - 1
            for name, x in zip(model, before, strict=True)
        ]
        assert found == pytest.approx([0.5 * lr / (1 + step) for lr in (0.01, 0.1)], abs=1e-14)
        optimizer.step()
        schedule.step()
    state["param_groups"][0]["lr"] = 0.03
    optimizer.load_state_dict(state)  # replaces the groups
    assert scale_of(bar, model["slow"].factors()[0]) == pytest.approx(0.015, abs=1e-14)


def test_the_learning_rate_may_be_a_tensor():
    layer, x, _ = plain(gx=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=torch.tensor(0.25))
    assert scale_of(BAR(layer, optimizer), x) == pytest.approx(0.125, abs=1e-14)


def test_factors_in_two_groups_need_one_learning_rate():
    layer, x, y = plain(gx=2)
    optimizer = torch.optim.SGD([{"params": [x], "weight_decay": 0.1}, {"params": [y]}], lr=LR)
    bar = BAR(layer, optimizer)
    assert scale_of(bar, x) == pytest.approx(0.5 * LR, abs=1e-14)
    optimizer.param_groups[1]["lr"], before = 0.2, x.clone()
    message = r"optimizer: lr=0\.1 for X \(B\) and 0\.2 for Y \(A\) of ''; give both the same"
    with pytest.raises(ValueError, match=message):
        bar.step()
    assert torch.equal(x, before) and bar.state_dict() == {"step": 1}
    with pytest.raises(ValueError, match=message):
        BAR(layer, optimizer)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "BAR"}, "form='BAR'; choose nbar or obar"),
        ({"mu": -0.1}, "mu=-0.1; choose a finite number"),
        ({"mu": math.nan}, "mu=nan; choose a finite number"),
        ({"schedule": "step"}, "schedule='step'; choose constant, linear or cosine"),
        ({"schedule": "linear"}, "steps=None; schedule='linear' needs the number of steps"),
        (
            {"schedule": "cosine", "steps": 0},
            "steps=0; schedule='cosine' needs the number of steps",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    layer, _, _ = plain()
    with pytest.raises(ValueError, match=message):
        BAR(layer, sgd(layer), **options)


def test_a_scale_that_would_turn_a_factor_over_is_refused():
    layer, x, _ = plain()
    before = x.clone()
    with pytest.raises(
        ValueError, match=r"mu=2: s = mu lr reaches 1 at lr=0\.5, where 1 - s is no scale; lower mu"
    ):
        BAR(layer, sgd(layer, 0.5), mu=2).step()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_refused(dtype):
    layer = Plain(dtype=dtype)
    with pytest.raises(
        ValueError,
        match=rf"module: a factor of '' is {dtype}, where .* keep the factors in float32",
    ):
        BAR(layer, sgd(layer))
    weights = torch.randn(1000).bfloat16()
    assert torch.equal(weights * torch.tensor(1 + 1e-3), weights)  # why


def test_a_module_without_trainable_pairs_is_refused():
    for module in (nn.Linear(2, 2), peft_model("gpt2").requires_grad_(False)):
        with pytest.raises(
            ValueError,
            match=(
                r"module: no trainable LoRA pair in it; wrap it with peft\.get_peft_model, or"
                r" unfreeze an adapter"
            ),
        ):
            BAR(module, torch.optim.SGD([torch.zeros(1)]))


def test_a_factor_that_the_optimiser_does_not_hold_is_refused():
    model = nn.ModuleDict({"a": Plain(), "b": Plain()})
    for kept in (model["a"].parameters(), [*model["a"].parameters(), model["b"].lora_A.weight]):
        with pytest.raises(
            ValueError,
            match=(
                "optimizer: it does not hold a factor of 'b'; make it after the adapters, or freeze"
                " that pair"
            ),
        ):
            BAR(model, torch.optim.SGD(kept))


def test_members_that_make_no_pair_are_refused():
    layer = nn.Module()
    layer.lora_A, layer.lora_B = (
        nn.ModuleDict({"a": nn.Linear(2, 2)}),
        nn.ModuleDict({"b": nn.Linear(2, 2)}),
    )
    odd = nn.Module()
    odd.lora_A, odd.lora_B = nn.Identity(), nn.Linear(2, 2)
    for module in (layer, odd):
        with pytest.raises(
            ValueError,
            match=(
                "module: lora_B and lora_A of 'q' are no pairs; give both a weight for the same"
                " adapters"
            ),
        ):
            lora_pairs(nn.ModuleDict({"q": module}))


def test_a_shared_factor_is_refused_but_a_shared_layer_is_one_pair():
    shared = Plain()
    assert len(lora_pairs(nn.ModuleList([shared, shared]))) == 1
    model = nn.ModuleDict({"a": Plain(bare=True), "b": Plain(bare=True)})
    model["b"].lora_A = model["a"].lora_A
    with pytest.raises(
        ValueError,
        match=(
            "module: 'a' and 'b' share a factor, which would be scaled twice; untie them or freeze"
            " one pair"
        ),
    ):
        BAR(model, sgd(model))
    # as peft ties an output layer to the embedding
    model["b"].lora_A = nn.Parameter(model["a"].lora_A.detach().t())
    with pytest.raises(ValueError, match="share a factor"):
        BAR(model, sgd(model))


# Machines


def test_a_step_waits_for_nothing():
    """On the meta device every look at a value raises."""
    with torch.device("meta"):
        model = nn.ModuleList([Plain(), Plain(dtype=torch.float32), Plain()])
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model[0].lora_A.weight.sum().item()
    logged = BAR(model, sgd(model), schedule="cosine", steps=3).step()
    assert all(value.is_meta for value in logged.values())
    assert [(name, value.dtype) for name, value in logged.items()] == [
        ("0", torch.float64),
        ("1", torch.float32),
        ("2", torch.float64),
    ]


def test_all_norms_are_one_reduction(monkeypatch):
    model, calls = peft_model("gpt2"), []
    foreach_norm = torch._foreach_norm
    monkeypatch.setattr(
        torch,
        "_foreach_norm",
        lambda tensors, *rest: calls.append(len(tensors)) or foreach_norm(tensors, *rest),
    )
    backward(model)
    BAR(model, sgd(model)).step()
    assert calls == [4 * 7]


def test_norms_accumulate_in_the_wider_precision():
    assert _norms([torch.ones(1000, dtype=torch.bfloat16)], torch.float32).item() == pytest.approx(
        math.sqrt(1000), rel=1e-6
    )
    assert _norms(
        [torch.full((10,), 1e30, dtype=torch.float64)], torch.float64
    ).item() == pytest.approx(math.sqrt(10) * 1e30)


def sharded_step(rank: int, folder: str) -> None:
    """Rank 0 holds the larger half of X and of its gradient, rank 1 of Y, so that the local answers
    differ."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x, y = torch.tensor([[5.0, 1], [1, 1], [1, 0], [1, 0]]), torch.tensor([[1.0, 0, 0], [2, 2, 2]])
    values = {"lora_B": (x, x / 4), "lora_A": (y, y / 4)}

    def layer(sharded: bool, absent: bool) -> Plain:
        made = Plain(bare=True)
        for name, pair in values.items():
            value, gradient = (
                distribute_tensor(t, mesh, [Shard(0)]) if sharded else t.clone() for t in pair
            )
            parameter = nn.Parameter(value)
            setattr(made, name, parameter)
            if not (absent and name == "lora_A"):
                parameter.grad = gradient
        return made

    for form in ("nbar", "obar"):
        for absent in (False, True):
            ours, theirs = layer(True, absent), layer(False, absent)
            found, expected = (
                BAR(made, sgd(made), form=form).step()[""] for made in (ours, theirs)
            )
            torch.testing.assert_close(found, expected)
            assert all(
                torch.equal(p.full_tensor(), q)
                for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
            )
            assert torch.equal(theirs.lora_B, x) == absent
    dist.destroy_process_group()


def test_norms_are_of_the_whole_of_a_sharded_factor(tmp_path):
    """Identity 40: two processes that hold half of every factor do what one does."""
    torch.multiprocessing.spawn(sharded_step, (str(tmp_path),), nprocs=2)
