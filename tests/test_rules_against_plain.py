"""Every rule against `plain_rules`, the same equations written a second time; and those held
against closed forms first."""

from dataclasses import replace
from functools import partial
from itertools import cycle

import pytest
import torch
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from conf.rule import OptimConfig
from model import GPT, GPTConfig
from optim import SharpnessAware, build_optimizer
from optim.rule.directions import noise
from tests.plain_rules import AdamW, Axes, Loss, MicroBatch, PlainModel, PlainRule

# torch's own, where it differentiates twice
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

V, T = 40, 6
LAYERNORM = GPTConfig(V, T, 1, 2, 16)
RMSNORM = GPTConfig(
    V, T, 1, 2, 16, norm="rmsnorm", positions="rope", activation="swiglu", mlp_width=24, tied=False
)
CAPPED = GPTConfig(V, T, 2, 2, 16, logit_softcap=1.5, z_loss=0.02, bias=True)
# none of them a default
OPTIM = OptimConfig(lr=0.01, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6)


@pytest.fixture(autouse=True)
def one_kernel_and_seed():
    """Attention by matrix products: it can be differentiated twice, and draws dropout masks in one
    way only."""
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def micro_batches(
    seed: int, sizes: tuple[int, ...] = (2, 1, 1), empty: int = 3
) -> list[MicroBatch]:
    """Micro-batches of so many sequences each, which count unequal numbers of tokens; sequence
    `empty` counts none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (sum(sizes), T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    targets[empty : empty + 1] = -100
    return [
        MicroBatch(*pair)
        for pair in zip(tokens[:, :-1].split(sizes), targets.split(sizes), strict=True)
    ]


def model_of(shape: GPTConfig) -> GPT:
    """A model in float64 whose norms and biases are not what they are at first, or half of the
    gradients would be special."""
    model, generator = GPT(shape, seed=1).double(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
        for name, rows in model.unpadded_rows.items():
            model.get_parameter(name)[rows:] = 0  # as they are for good
    return model.train()


# The plain rules against closed forms


@pytest.fixture(params=[LAYERNORM, RMSNORM, CAPPED], ids=["layernorm", "rmsnorm", "capped"])
def problem(request):
    """A plain model, its weights, the loss of three micro-batches, and a unit direction."""
    model = model_of(request.param)
    plain = PlainModel(model)
    t = plain.flat(dict(model.named_parameters()))
    u = torch.randn(t.shape, generator=torch.Generator().manual_seed(3), dtype=t.dtype)
    return plain, t, Loss(plain, micro_batches(0)), u / u.norm()


def slope(f, t, u, h=1e-5):
    return (f(t + h * u) - f(t - h * u)) / (2 * h)


@pytest.mark.parametrize(
    "shape", [LAYERNORM, RMSNORM, CAPPED], ids=["layernorm", "rmsnorm", "capped"]
)
def test_the_loss_is_what_torch_says(shape):
    model = model_of(shape)
    loss = Loss(PlainModel(model), micro_batches(0))
    z, targets = model(loss.tokens_BxT).flatten(0, 1), loss.targets_BxT.flatten()  # soft-capped
    z_loss = shape.z_loss * z.logsumexp(1)[targets != -100].square().mean()
    expected = torch.nn.functional.cross_entropy(z, targets) + z_loss
    assert loss.at(loss.plain.flat(dict(model.named_parameters()))) == pytest.approx(
        expected.item(), rel=1e-14
    )
    assert loss.tokens == (targets != -100).sum() > 0


def test_pull_is_the_transposed_jacobian(problem):
    _, t, loss, u = problem
    assert (loss.g(t) @ u).item() == pytest.approx(slope(loss.at, t, u), rel=1e-7)
    r = torch.randn(loss.F(t).shape, dtype=t.dtype)
    assert (loss.pull(t, r) @ u).item() == pytest.approx(
        slope(lambda t: (r * loss.F(t)).sum().item(), t, u), rel=1e-7
    )
    r = loss.r(t + u)
    assert (loss.pull(t, r) @ u).item() == pytest.approx(
        slope(lambda t: (r * loss.F(t)).sum().item(), t, u), rel=1e-7
    )


@pytest.mark.parametrize(
    "problem", [LAYERNORM, RMSNORM], ids=["layernorm", "rmsnorm"], indirect=True
)
def test_sam_less_functional_sam_is_the_softmax_that_moved(problem):
    """At any radius: the labels cancel."""
    plain, t, loss, u = problem
    e = 0.7 * u
    difference = moved(plain, t, e, loss, path="full") - moved(plain, t, e, loss, path="functional")
    r = (
        (loss.F(t + e).softmax(-1) - loss.F(t).softmax(-1))
        * loss.counted_BxT[..., None]
        / loss.tokens
    )
    torch.testing.assert_close(difference, loss.pull(t + e, r), rtol=1e-10, atol=1e-14)


def moved(plain, t, e, loss, **axes):
    return PlainRule(plain, Axes(**axes)).along_path(t, t + e, loss)


def test_each_path_sees_its_part_of_the_hessian(problem):
    """H = G + H_F: full sees H, functional H_F, logit G, and 45 degrees H; each to second order in
    the radius by central differences."""
    plain, t, loss, u = problem
    Hu = jvp(grad(lambda t: loss.of_logits(loss.F(t))), (t,), (u,))[1]
    z, Ju = jvp(loss.F, (t,), (u,))
    Gu = loss.pull(t, jvp(grad(loss.of_logits), (z,), (Ju,))[1])
    expected = {"full": Hu, "logit": Gu, "functional": Hu - Gu, "angle": Hu}
    for path, product in expected.items():
        found = slope(
            lambda t_moved, path=path: moved(plain, t, t_moved - t, loss, path=path), t, u, h=1e-4
        )
        torch.testing.assert_close(found, product, rtol=1e-4, atol=1e-6 * product.norm().item())
        assert product.norm() > 0.05


def test_angles(problem):
    plain, t, loss, u = problem
    path = partial(moved, plain, t, u, loss)
    torch.testing.assert_close(
        path(path="angle", angle=0.0), path(path="logit"), rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(
        path(path="angle", angle=90.0), path(path="functional"), rtol=1e-12, atol=1e-15
    )
    g, logit, functional = loss.g(t), path(path="logit"), path(path="functional")
    torch.testing.assert_close(path(path="angle"), functional + logit - g, rtol=1e-12, atol=1e-15)
    paper = g + 2**0.5 * (3**0.5 / 2 * (logit - g) + 0.5 * (functional - g))
    torch.testing.assert_close(
        path(path="angle", angle=30.0, angle_norm="paper"), paper, rtol=1e-12, atol=1e-15
    )


def test_metrics(problem):
    """Each radius in the norm that its metric means, and e along what it means."""
    plain, t, loss, _ = problem
    adam = AdamW(0.01, plain.where(lambda name, p: p.ndim >= 2))
    g = loss.g(t)
    later = adam.step(t, loss.g(t))

    def perturbation(**axes):
        return PlainRule(plain, Axes(rho=0.3, **axes)).perturbation(later, g, adam)

    torch.testing.assert_close(perturbation(), 0.3 * g / g.norm())
    v = adam.v / 0.05  # one step of beta2 = 0.95
    torch.testing.assert_close(v, g**2)
    root = g.abs() + 1e-8  # the same gradient again leaves v^ = g^2
    for second_moment in ("before", "with_gradient"):
        preconditioned = partial(perturbation, metric="adam", second_moment=second_moment)
        torch.testing.assert_close(preconditioned(), 0.3 * (g / root) / (g / root).norm())
        torch.testing.assert_close(preconditioned(metric_norm="raw"), 0.3 * (g / root) / g.norm())
        e = preconditioned(metric_norm="dual")
        torch.testing.assert_close(e @ (root * e), torch.tensor(0.09, dtype=t.dtype))
        e = preconditioned(metric_power=0.25, metric_eps=0.1)
        torch.testing.assert_close(
            e, 0.3 * (g / (g.abs().sqrt() + 0.1)) / (g / (g.abs().sqrt() + 0.1)).norm()
        )
    fresh = AdamW(0.01, adam.decay)
    torch.testing.assert_close(
        PlainRule(plain, Axes(rho=0.3, metric="adam")).perturbation(t, g, fresh),
        perturbation(metric="adam"),
    )
    first = PlainRule(plain, Axes(rho=0.3, metric="adam", second_moment="before")).perturbation(
        t, g, fresh
    )
    torch.testing.assert_close(first, perturbation())
    matrix = plain.where(lambda name, p: p.ndim == 2).bool()
    T = torch.where(matrix, later.abs() + 0.01, 1.0)
    torch.testing.assert_close(perturbation(metric="adaptive"), 0.3 * T**2 * g / (T * g).norm())
    assert 0 < matrix.sum() < len(matrix)


def test_directions(problem):
    """Those that remember: nothing at first, then the average, the last gradient of the rule, and
    minus Adam's m."""
    plain, t, loss, _ = problem
    adam, groups = AdamW(0.01, plain.where(lambda name, p: p.ndim >= 2)), [[m] for m in loss.micro]
    rules = {
        name: PlainRule(plain, Axes(rho=1.0, direction=name))
        for name in ("friendly", "stale", "momentum")
    }
    u = torch.randn_like(t)
    torch.testing.assert_close(rules["friendly"].perturbation(t, u, adam), u / u.norm())
    assert not any(rules[name].perturbation(t, u, adam).any() for name in ("stale", "momentum"))
    given = [rules["stale"].gradient(t, groups, adam).gradient for _ in range(2)]
    torch.testing.assert_close(given[0], loss.g(t))
    torch.testing.assert_close(given[1], loss.g(t + given[0] / given[0].norm()))
    torch.testing.assert_close(rules["stale"].direction(u, adam), given[1])
    for _ in range(2):
        rules["friendly"].gradient(t, groups, adam)
    torch.testing.assert_close(rules["friendly"].direction(u, adam), u - (1 - 0.9**2) * loss.g(t))
    adam.step(t, u)
    torch.testing.assert_close(rules["momentum"].perturbation(t, loss.g(t), adam), -u / u.norm())


@pytest.mark.parametrize(
    "parameters, names",
    [
        (
            "all",
            [
                "embedding.weight",
                "positions.weight",
                "blocks.0.attention_norm.weight",
                "blocks.0.mlp.up.weight",
                "norm.weight",
            ],
        ),
        (
            "no_embeddings",
            ["blocks.0.attention_norm.weight", "blocks.0.mlp.up.weight", "norm.weight"],
        ),
        ("no_norms", ["embedding.weight", "positions.weight", "blocks.0.mlp.up.weight"]),
        ("head", ["embedding.weight"]),
        ("*.mlp.*", ["blocks.0.mlp.up.weight"]),
    ],
)
def test_which_parameters_move(parameters, names):
    plain = PlainModel(model_of(LAYERNORM))
    looked_at = [
        "embedding.weight",
        "positions.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.mlp.up.weight",
        "norm.weight",
    ]
    mask = plain.split(plain.perturbed(parameters))
    assert [name for name in looked_at if mask[name].all()] == names
    assert not any(mask[name].any() for name in looked_at if name not in names)


def test_combinations(problem):
    plain, t, loss, u = problem
    g, g_sam = loss.g(t), loss.g(t + 0.5 * u)
    look = PlainRule(plain, Axes(combine="reuse"))
    torch.testing.assert_close(look.combined(g, g_sam), g_sam)
    assert abs((look.g_v @ g).item()) < 1e-12
    torch.testing.assert_close(look.g_v + (g_sam @ g) / (g @ g) * g, g_sam)
    removed = g_sam - PlainRule(plain, Axes(combine="orthogonal", alpha=1.0)).combined(g, g_sam)
    assert abs((removed @ g_sam).item()) < 1e-12
    torch.testing.assert_close(removed + (g @ g_sam) / (g_sam @ g_sam) * g_sam, g)


def test_groups(problem):
    """One group is SAM, and so are equal groups; the order of groups and empty ones do not matter,
    their sizes do."""
    plain, t, _, _ = problem
    adam, one, other = AdamW(0.01, t), micro_batches(4, (2,)), micro_batches(5, (1,))

    def gradient(groups, **axes):
        return PlainRule(plain, Axes(rho=0.5, **axes)).gradient(t, groups, adam).gradient

    groups = partial(gradient, scope="micro_batch")
    sam = gradient([one])
    torch.testing.assert_close(groups([one]), sam)
    torch.testing.assert_close(groups([one, one, one]), sam)
    torch.testing.assert_close(groups([one, other]), groups([other, one]))
    empty = [MicroBatch(other[0].tokens_BxT, torch.full_like(other[0].targets_BxT, -100))]
    torch.testing.assert_close(groups([one, empty]), sam)
    n, m = Loss(plain, one).tokens, Loss(plain, other).tokens
    assert n != m
    torch.testing.assert_close(groups([one, other]), (n * sam + m * gradient([other])) / (n + m))


def test_delta_weights(problem):
    """The second difference is z H_i z for a small probe, and mixed ones z H_i z'; weights sum to
    the counted tokens."""
    plain, t, _, u = problem
    loss = Loss(plain, micro_batches(6, (2, 2, 1)))
    n = loss.counted_BxT.sum(1)
    v = torch.randn_like(u) / len(u) ** 0.5
    Hu = [jvp(grad(lambda t, i=i: loss.sequence_losses(t)[i]), (t,), (u,))[1] for i in range(5)]
    curvature, mixed = (torch.stack([(H_iu @ z).abs() for H_iu in Hu]) for z in (u, v))
    for axes, probes, c in (
        ({}, (u,), curvature),
        ({"delta_probe": "mixed"}, (u, v), mixed),
        ({"delta_power": 2.0}, (u,), curvature**2),
    ):
        w = PlainRule(plain, Axes(weights="delta", delta_sigma=2e-3, **axes)).delta_weights(
            t, loss, *probes
        )
        torch.testing.assert_close(w, c * loss.tokens / (n * c).sum(), rtol=5e-3, atol=1e-6)
        assert (n * w).sum().item() == pytest.approx(loss.tokens)
        assert w[3] == 0 and n[3] == 0


def test_adamw_is_torchs():
    t = torch.randn(12, dtype=torch.float64)
    theirs = torch.nn.Parameter(t.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.2)
    ours = AdamW(0.03, torch.full_like(t, 0.2), 0.8, 0.97, 1e-3)
    for _ in range(3):
        theirs.grad = torch.randn_like(t)
        optimizer.step()
        t = ours.step(t, theirs.grad)
        torch.testing.assert_close(t, theirs.detach(), rtol=1e-13, atol=1e-15)


# The rules against the plain rules

# into so many micro-batches; the last of four counts nothing
CUTS = {
    1: (4,),
    2: (2, 2),
    4: (1, 1, 1, 1),
}
SHAPES = {1: LAYERNORM, 2: RMSNORM, 4: CAPPED}  # for each cut another
# sizes of the micro-batches of each
GROUPS = {
    "3": ((2,), (2,), (1,)),
    "2_of_several": ((1, 2), (1, 1)),
    "one_empty": ((1, 1), (1,), (1,), (2,)),
}
PATHS = {
    "sam": {},
    "functional": {"path": "functional"},
    "logit": {"path": "logit"},
    "angle": {"path": "angle", "angle": 30.0},
    "angle_paper": {"path": "angle", "angle": 60.0, "angle_norm": "paper"},
}


def cut_into(groups: list[list[MicroBatch]], scope: str) -> list:
    """What the rule is given: micro-batches, or groups of them, a group of one as it is."""
    pairs = [[(m.tokens_BxT, m.targets_BxT) for m in group] for group in groups]
    return (
        [pair for group in pairs for pair in group]
        if scope == "batch"
        else [group if len(group) > 1 else group[0] for group in pairs]
    )


def assert_agree(
    ours: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    what: str,
    tolerance: float = 1e-10,
) -> None:
    for name, tensor in expected.items():
        error = (ours[name] - tensor).norm() / tensor.norm().clamp_min(1e-300)
        assert error <= tolerance, (
            f"{what} of {name}: relative error {error:.1e}, norm {ours[name].norm():.3e} instead of"
            f" {tensor.norm():.3e}"
        )


def hold_against_plain(
    shape=LAYERNORM, sizes=((1, 2, 1),), steps=3, kinds=(), empty=3, moves=True, **axes
) -> None:
    """Trains by the rule and by its plain counterpart, each with its own AdamW, and compares after
    every step.

    sizes    of the micro-batches of each group, in sequences; the sequence numbered `empty` counts
             nothing
    kinds    of noise that the rule draws
    moves    whether the rule differs from the plain gradient; without, the comparison shows
             little"""
    axes = {"rho": 0.4} | axes
    model = model_of(shape)
    optimizer, plain = build_optimizer(model, OPTIM), PlainModel(model)
    rule, plain_rule = (
        SharpnessAware(model, optimizer, **axes),
        PlainRule(plain, Axes(**{k: v for k, v in axes.items() if hasattr(Axes, k)})),
    )
    matrix = plain.where(lambda name, p: p.ndim >= 2)
    adam = AdamW(OPTIM.lr, OPTIM.weight_decay * matrix, OPTIM.beta1, OPTIM.beta2, OPTIM.eps)
    t, differs = plain.flat(dict(model.named_parameters())), False
    for step in range(steps):
        torch.manual_seed(step)
        groups, state = batches_of_step(step, sizes, empty, model)
        numbers = [
            plain.flat(
                {
                    name: noise(p, rule.direction.seed, step, kind + name)
                    for name, p in model.named_parameters()
                }
            )
            for kind in kinds
        ]
        expected = plain_rule.gradient(t, groups, adam, *numbers)
        result = rule.gradient(cut_into(groups, axes.get("scope", "batch")))
        assert torch.equal(torch.get_rng_state(), state), (
            "the generator is not where a plain step would leave it"
        )
        assert_agree(
            {name: p.grad for name, p in model.named_parameters()},
            plain.split(expected.gradient),
            f"step {step}, gradient",
        )
        assert result.tokens == sum(
            (m.targets_BxT != -100).sum() for group in groups for m in group
        )
        if result.loss is not None:
            assert float(result.loss) == pytest.approx(expected.loss, rel=1e-10)
        if result.perturbed_loss is not None and expected.perturbed_loss is not None:
            assert float(result.perturbed_loss) == pytest.approx(expected.perturbed_loss, rel=1e-10)
        for p in model.parameters():
            # a rule that remembers its gradient remembers the unclipped one
            p.grad.clamp_(-0.03, 0.03)
        optimizer.step()
        optimizer.zero_grad()
        t = adam.step(t, expected.gradient.clamp(-0.03, 0.03))
        assert_agree(dict(model.named_parameters()), plain.split(t), f"step {step}, weights")
        differs |= bool((expected.gradient - expected.clean).norm() > 1e-2 * expected.clean.norm())
    assert differs == moves


def batches_of_step(
    step: int, sizes: tuple[tuple[int, ...], ...], empty: int, model: GPT
) -> tuple[list[list[MicroBatch]], torch.Tensor]:
    """The groups of a step, and the generator's state after a plain step; with dropout each
    micro-batch has the state that it begins with."""
    micro = micro_batches(step, tuple(size for group in sizes for size in group), empty)
    if model.config.dropout:
        with torch.random.fork_rng(), torch.no_grad():
            for i, (tokens, targets, _) in enumerate(micro):
                micro[i] = MicroBatch(tokens, targets, torch.get_rng_state())
                model(tokens)
            after = torch.get_rng_state()
    else:
        after = torch.get_rng_state()
    remaining = iter(micro)
    return [[next(remaining) for _ in group] for group in sizes], after


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("path", PATHS)
def test_paths(path, cut):
    hold_against_plain(SHAPES[cut], [CUTS[cut]], **PATHS[path])


@pytest.mark.parametrize(
    "shape", [LAYERNORM, RMSNORM, CAPPED], ids=["layernorm", "rmsnorm", "capped"]
)
@pytest.mark.parametrize("cotangent", ["store", "rebuild"])
@pytest.mark.parametrize("path", ["functional", "angle"])
def test_cotangents(path, cotangent, shape):
    hold_against_plain(shape, path=path, angle=60.0, cotangent=cotangent)


FUNCTIONAL = {"path": "functional"}
RULES = {
    "rho_0": {"rho": 0.0, "moves": False},
    "rho_0_functional": FUNCTIONAL | {"rho": 0.0, "moves": False},
    "preconditioned": {"metric": "adam"},
    "preconditioned_before": {"metric": "adam", "second_moment": "before"},
    "preconditioned_power": {"metric": "adam", "metric_power": 0.3},
    "preconditioned_eps": {"metric": "adam", "metric_eps": 0.01},
    "preconditioned_raw": {"metric": "adam", "metric_norm": "raw", "metric_eps": 1.0},
    "preconditioned_dual": {"metric": "adam", "metric_norm": "dual"},
    "preconditioned_functional": FUNCTIONAL | {"metric": "adam"},
    "preconditioned_logit": {
        "path": "logit",
        "metric": "adam",
        "second_moment": "before",
        "metric_norm": "dual",
    },
    "asam": {"metric": "adaptive"},
    "asam_functional": FUNCTIONAL | {"metric": "adaptive", "adaptive_floor": 0.1},
    "momentum": {"direction": "momentum"},
    "momentum_functional": FUNCTIONAL | {"direction": "momentum"},
    "momentum_asam": {"direction": "momentum", "metric": "adaptive"},
    "momentum_before": {"direction": "momentum", "metric": "adam", "second_moment": "before"},
    "momentum_logit": {"direction": "momentum", "path": "logit"},
    "momentum_gsam": {"direction": "momentum", "combine": "orthogonal"},
    "momentum_preconditioned": {"direction": "momentum", "metric": "adam"},
    "stale": {"direction": "stale"},
    "stale_preconditioned_functional": FUNCTIONAL | {"direction": "stale", "metric": "adam"},
    "stale_functional": FUNCTIONAL | {"direction": "stale"},
    "friendly": {"direction": "friendly"},
    "friendly_options": {"direction": "friendly", "friendly_sigma": 0.6, "friendly_decay": 0.5},
    "friendly_functional": FUNCTIONAL | {"direction": "friendly"},
    "friendly_preconditioned": {"direction": "friendly", "metric": "adam"},
    "look": {"combine": "reuse", "period": 2},
    "look_functional": FUNCTIONAL | {"combine": "reuse", "period": 2, "alpha": 0.3},
    "look_started": {"combine": "reuse", "period": 2, "start": 1, "steps": 5, "stop": 4},
    "gsam": {"combine": "orthogonal"},
    "gsam_functional": FUNCTIONAL | {"combine": "orthogonal", "alpha": 0.3},
    "gsam_angle": {"path": "angle", "combine": "orthogonal"},
    "period": {"period": 2, "steps": 4},
    "period_functional": FUNCTIONAL | {"period": 3, "steps": 5},
    "start_stop": {"start": 1, "stop": 3, "steps": 4},
    "start_period": {"start": 1, "period": 2, "steps": 4},
    "stale_period": {"direction": "stale", "period": 2, "steps": 5},
    "friendly_started": {"direction": "friendly", "start": 1, "steps": 4},
    "friendly_period": {"direction": "friendly", "period": 2, "steps": 5},
    "half_ascent": {"ascent_fraction": 0.5},
    "little_ascent": {"ascent_fraction": 0.1},
    "three_quarters_functional": FUNCTIONAL | {"ascent_fraction": 0.75},
    "half_ascent_logit": {"path": "logit", "ascent_fraction": 0.5},
    "half_ascent_friendly": {"direction": "friendly", "ascent_fraction": 0.5},
    "half_ascent_preconditioned": {"metric": "adam", "ascent_fraction": 0.5},
    "no_embeddings": {"parameters": "no_embeddings"},
    "no_norms": FUNCTIONAL | {"parameters": "no_norms", "metric": "adam"},
    "head_tied": {"parameters": "head", "shape": LAYERNORM},
    "head_untied": FUNCTIONAL | {"parameters": "head", "shape": RMSNORM},
    "mlps": {"parameters": "*.mlp.*"},
    "mlps_look": {"parameters": "*.mlp.*", "combine": "reuse", "period": 2},
    "mlps_gsam": {"parameters": "*.mlp.*", "combine": "orthogonal"},
    "mlps_stale": {"parameters": "*.mlp.*", "direction": "stale"},
    "mlps_friendly": {"parameters": "*.mlp.*", "direction": "friendly"},
    "mlps_asam": {"parameters": "*.mlp.*", "metric": "adaptive"},
}


@pytest.mark.parametrize(
    "name, shape", list(zip(RULES, cycle((LAYERNORM, RMSNORM)), strict=False)), ids=RULES
)
def test_rules(name, shape):
    hold_against_plain(**{"shape": shape} | RULES[name])


GROUPED = {
    "msam": {},
    "functional": FUNCTIONAL,
    "logit": {"path": "logit"},
    "angle": {"path": "angle"},
    "preconditioned_functional": FUNCTIONAL | {"metric": "adam"},
    "asam": {"metric": "adaptive"},
    "gsam": {"combine": "orthogonal"},
    "look": {"combine": "reuse", "period": 2},
    "every_second_preconditioned_functional": FUNCTIONAL | {"metric": "adam", "period": 2},
    "friendly": {"direction": "friendly"},
    "half_ascent": {"ascent_fraction": 0.5},
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_micro_batches(name, groups):
    hold_against_plain(
        RMSNORM if groups == "3" else LAYERNORM,
        GROUPS[groups],
        scope="micro_batch",
        **GROUPED[name],
    )


DELTA = {
    "central": {},
    "mixed": {"delta_probe": "mixed"},
    "power": {"delta_power": 0.5, "delta_sigma": 0.3},
    "reweighted": {"delta_descent": "reweighted"},
    "functional": FUNCTIONAL,
    "preconditioned": {"metric": "adam"},
    "mlps": {"parameters": "*.mlp.*"},
    "half_ascent": {"ascent_fraction": 0.5},
    "friendly": {"direction": "friendly"},
    "groups": {"scope": "micro_batch"},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", DELTA)
def test_delta_sam(name, cut):
    axes = {"weights": "delta"} | DELTA[name]
    kinds = ("z/", "other/") if name == "mixed" else ("z/",)
    hold_against_plain(
        SHAPES[cut],
        [(size,) for size in CUTS[cut]] if name == "groups" else [CUTS[cut]],
        kinds=kinds,
        **axes,
    )


@pytest.mark.parametrize("path", PATHS)
def test_random_direction(path):
    hold_against_plain(kinds=("",), direction="random", **PATHS[path])


WITH_DROPOUT = PATHS | {
    "preconditioned_functional": RULES["preconditioned_functional"],
    "momentum_functional": RULES["momentum_functional"],
    "friendly": RULES["friendly"],
    "look": RULES["look"],
    "msam": {"scope": "micro_batch"},
    "functional_msam": FUNCTIONAL | {"scope": "micro_batch"},
    "logit_msam": {"path": "logit", "scope": "micro_batch"},
    "delta": {"weights": "delta"},
}


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_masks_are_those_of_the_clean_pass(name):
    sizes = ((2, 1), (1, 1)) if "msam" in name else ((2, 1, 1),)
    hold_against_plain(
        replace(LAYERNORM, dropout=0.3),
        sizes,
        kinds=("z/",) if name == "delta" else (),
        **WITH_DROPOUT[name],
    )


@pytest.mark.parametrize("path", ["full", "functional"])
def test_an_ascent_on_nothing_does_not_move(path):
    hold_against_plain(path=path, ascent_fraction=0.1, empty=0, moves=False)


def test_defaults():
    """The plain rules' are those of the methods' table."""
    theirs = SharpnessAware(model := model_of(LAYERNORM), build_optimizer(model, OPTIM)).axes
    assert {name: getattr(theirs, name) for name in vars(Axes())} == vars(Axes())


@pytest.mark.parametrize(
    "axes, looks_here, looks_there",
    [
        ({}, True, True),
        (FUNCTIONAL, True, False),
        ({"path": "logit"}, True, True),
        ({"direction": "momentum"}, False, True),
        ({"direction": "stale"}, False, True),
        (FUNCTIONAL | {"direction": "momentum"}, True, False),
    ],
)
def test_losses_are_reported_where_the_rule_looks(axes, looks_here, looks_there):
    model = model_of(LAYERNORM)
    optimizer = build_optimizer(model, OPTIM)
    rule = SharpnessAware(model, optimizer, **axes)
    for _ in range(2):  # without a direction the first step is a plain one
        optimizer.zero_grad()
        result = rule.gradient(cut_into([micro_batches(0)], "batch"))
        optimizer.step()
    assert (result.loss is not None, result.perturbed_loss is not None) == (looks_here, looks_there)
