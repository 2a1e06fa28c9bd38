"""Identities that every gradient rule must satisfy, held against the product; in float64 unless
stated.

Which test holds which identity (numbered as in the list of identities that the project was planned
with), and which mutation fails it: tests/IDENTITIES.md."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import chunked_head
from optim import Adapter, Gradient, SharpnessAware
from optim.rule.delta import Delta
from optim.rule.directions import noise
from tests.problems import (
    PROBLEMS,
    Reference,
    V,
    adamw,
    assert_apart,
    assert_close,
    assert_order,
    flat,
    gpt,
    halved,
    mlp,
    perturbation,
    rule_gradient,
    rule_step,
    taken,
    token_batches,
    vector_batches,
    visited,
    warm,
    weights_of,
    whole,
)

# torch.func.jvp scripts some derivatives
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def differentiable_attention():
    """The kernel that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=PROBLEMS)
def problem(request):
    """A model for the rule, its batches, and the same to calculus."""
    model, batches = PROBLEMS[request.param]()
    return model, batches, Reference(getattr(model, "module", model), batches)


def plain_gradient(model, batches):
    Gradient(model).gradient(batches)
    return taken(model)


# SAM


class Quadratic(nn.Module):
    """l_i(w) = w^T A_i w / 2 - b_i^T w for every instance i, as its logit."""

    def __init__(self, size=6):
        super().__init__()
        self.w = nn.Parameter(
            torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, inputs):
        A, b = inputs[..., :-1], inputs[..., -1]
        return (A @ self.w * self.w).sum(-1) / 2 - b @ self.w


def quadratics(count, size=6, seed=1, definite=False):
    """An adapter for `count` instances, their A_i and b_i, and the batch."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(count, size, size, dtype=torch.float64, generator=generator)
    A = A @ A.mT if definite else A + A.mT
    b = torch.randn(count, size, dtype=torch.float64, generator=generator)
    model = Adapter(Quadratic(size), losses=lambda z, y: z)
    return model, A, b, [(torch.cat([A, b[..., None]], -1), torch.zeros(count))]


@pytest.mark.parametrize("rho", [1e-6, 0.1, 30.0])
def test_02_sam_of_a_quadratic_is_exact_at_any_radius(rho):
    model, A, b, batches = quadratics(3)
    w, A, b = weights_of(model), A.mean(0), b.mean(0)
    g = A @ w - b
    assert_close(rule_gradient(model, batches, rho=rho), g + rho * A @ g / g.norm(), 1e-14)


def test_03_sam_sees_the_hessian_along_the_gradient(problem):
    model, batches, reference = problem
    Hu, g, radii = reference.H(reference.u), plain_gradient(model, batches), halved(4e-3)
    forward = [((rule_gradient(model, batches, rho=rho) - g) / rho - Hu).norm() for rho in radii]
    assert_order(forward, 1)
    central = [
        (
            (rule_gradient(model, batches, rho=rho) - rule_gradient(model, batches, rho=-rho))
            / (2 * rho)
            - Hu
        ).norm()
        for rho in radii
    ]
    assert_order(central, 2)
    assert central[-1] < 1e-3 * Hu.norm()


def test_04_the_loss_rises_by_radius_times_slope(problem):
    model, batches, reference = problem
    errors = []
    for rho in halved(1e-3):
        _, result = rule_step(model, batches, rho=rho)
        errors.append(
            abs(float(result.perturbed_loss - result.loss) / (rho * float(reference.g.norm())) - 1)
        )
    assert_order(errors, 1)
    assert errors[-1] < 0.05


METRICS = {
    "euclidean": {},
    "adam": {"metric": "adam", "metric_eps": 0.0},
    "adaptive": {"metric": "adaptive"},
}


@pytest.mark.parametrize("metric", ["euclidean", "adam", "adaptive"])
def test_05_the_perturbation_knows_neither_the_scale_of_the_loss_nor_the_number_of_micro_batches(
    metric,
):
    """Nor the clipping of the gradient, which is yet to come: a loss 1000 times as steep is clipped
    at a norm of 1, and this one is not."""
    module, batches = mlp(), vector_batches()

    def e(scale, batches):
        model = Adapter(module, losses=lambda z, y: scale * F.cross_entropy(z, y, reduction="none"))
        return perturbation(model, batches, rho=0.3, **METRICS[metric])

    expected = e(1.0, batches)
    for scale in (1e-3, 1e3):
        assert_close(e(scale, batches), expected, 1e-11)
    assert_close(e(1.0, [whole(batches)]), expected, 1e-11)


@pytest.mark.parametrize("metric", ["euclidean", "adam"])
@pytest.mark.parametrize("path", ["full", "functional", "logit", "angle"])
def test_07_micro_batches_change_nothing(path, metric, problem):
    model, batches, reference = problem
    expected, result = rule_step(model, [whole(batches)], rho=0.4, path=path, metric=metric)
    for cut in (batches, [*batches[:1], whole(batches[1:])]):
        found, other = rule_step(model, cut, rho=0.4, path=path, metric=metric)
        assert_close(found, expected, 1e-9 if metric == "adam" else 1e-12)
        assert float(other.loss) == pytest.approx(float(result.loss), rel=1e-13)
        assert other.tokens == result.tokens
    assert_apart(expected, reference.g)


class Tied(nn.Module):
    """Embedding and head share one tensor, as modules do, or by an explicit transpose of a lone
    parameter."""

    def __init__(self, explicit):
        super().__init__()
        self.explicit = explicit
        self.table = nn.Embedding.from_pretrained(
            torch.randn(V, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
            freeze=False,
        )
        self.middle = nn.Linear(7, 7, dtype=torch.float64)
        nn.init.eye_(self.middle.weight)
        nn.init.zeros_(self.middle.bias)
        if not explicit:
            self.head = nn.Linear(7, V, bias=False)
            self.head.weight = self.table.weight

    def forward(self, tokens):
        h = torch.tanh(self.middle(self.table(tokens)))
        return h @ self.table.weight.T if self.explicit else self.head(h)


@pytest.mark.parametrize(
    "axes", [{}, {"metric": "adam"}, {"path": "functional"}, {"path": "logit"}], ids=str
)
def test_08_a_tied_tensor_is_moved_once(axes):
    batches = token_batches()
    explicit, by_module = (Adapter(Tied(explicit)) for explicit in (True, False))
    assert_close(
        rule_gradient(by_module, batches, rho=0.5, **axes),
        rule_gradient(explicit, batches, rho=0.5, **axes),
        0,
    )
    model = gpt()
    for e in (
        perturbation(by_module, batches, rho=0.5, **axes),
        perturbation(model, batches, rho=0.5, **axes),
    ):
        assert e.norm().item() == pytest.approx(0.5, rel=1e-13)


@pytest.mark.parametrize(
    "parameters, inside",
    [
        ("all", lambda name: True),
        ("no_embeddings", lambda name: name not in ("embedding.weight", "positions.weight")),
        ("no_norms", lambda name: "norm" not in name),
        ("head", lambda name: name == "embedding.weight"),
        ("*.mlp.*", lambda name: ".mlp." in name),
    ],
)
def test_09_only_the_chosen_parameters_move_and_by_the_radius(parameters, inside):
    model, batches = gpt(), token_batches()
    mask = flat([torch.full_like(p, float(inside(name))) for name, p in model.named_parameters()])
    for axes in ({}, {"metric": "adam"}, {"path": "functional"}):
        e = perturbation(model, batches, rho=0.3, parameters=parameters, **axes)
        assert e.norm().item() == pytest.approx(0.3, rel=1e-13)
        assert not (e * (1 - mask)).any() and (e * mask).any()


def test_10_asam_does_not_see_a_rescaling_of_layers():
    """w1 -> c w1, w2 -> w2 / c leaves a ReLU network what it is; so does e / w with T = |w|."""

    def relative_move(c):
        module = nn.Sequential(
            nn.Linear(7, 9, bias=False), nn.ReLU(), nn.Linear(9, V, bias=False)
        ).double()
        with torch.no_grad():
            for layer, factor in ((module[0], c), (module[2], 1 / c)):
                layer.weight.copy_(
                    factor
                    * torch.randn(
                        layer.weight.shape,
                        dtype=torch.float64,
                        generator=torch.Generator().manual_seed(5),
                    )
                )
        e = perturbation(
            Adapter(module), vector_batches(), rho=0.2, metric="adaptive", adaptive_floor=0.0
        )
        return e / weights_of(module)

    assert_close(relative_move(5.0), relative_move(1.0), 1e-12)
    assert_close(relative_move(0.01), relative_move(1.0), 1e-12)


def test_asam_moves_by_the_radius_in_units_of_the_weights():
    """|T^-1 e| = rho, T = |w| + floor for matrices and 1 for vectors, along T^2 g."""
    model, batches = gpt(), token_batches()
    T = flat(
        [p.detach().abs() + 0.01 if p.ndim == 2 else torch.ones_like(p) for p in model.parameters()]
    )
    g = Reference(model, batches).g
    assert_close(
        perturbation(model, batches, rho=0.2, metric="adaptive"), 0.2 * T**2 * g / (T * g).norm()
    )


@pytest.mark.parametrize(
    "axes, perturbed",
    [
        ({}, range(9)),
        ({"period": 3}, (0, 3, 6)),
        ({"start": 4}, range(4, 9)),
        ({"stop": 3}, range(3)),
        ({"start": 2, "stop": 7, "period": 2}, (2, 4, 6)),
    ],
)
@pytest.mark.parametrize("path", ["full", "functional"])
def test_11_extra_backward_passes_are_those_of_the_perturbed_steps(path, axes, perturbed):
    model, batches = gpt(), token_batches()
    rule, backwards, counts = SharpnessAware(model, adamw(model), path=path, **axes), [], []
    model.embedding.weight.register_post_accumulate_grad_hook(backwards.append)
    for _ in range(9):
        backwards.clear()
        result = rule.gradient(batches)
        counts.append((len(backwards), result.perturbed, round(result.backwards, 12)))
        taken(model)
    assert counts == [(6, True, 2) if step in perturbed else (3, False, 1) for step in range(9)]


def test_weight_decay_applies_to_the_weights_and_not_to_where_the_gradient_was_taken():
    """One step of AdamW by hand on SAM's gradient: decay is no part of the direction, nor of the
    moved point."""
    model, batches = gpt(), token_batches()
    reference = Reference(model, batches)
    g_sam = reference.gradient(reference.t + 0.3 * reference.u)
    optimizer = adamw(model, lr=0.02, weight_decay=0.5)
    SharpnessAware(model, optimizer, rho=0.3).gradient(batches)
    optimizer.step()
    assert_close(
        weights_of(model),
        (1 - 0.02 * 0.5) * reference.t - 0.02 * g_sam / (g_sam.abs() + 1e-8),
        1e-12,
    )


# Functional-SAM, the logit path and the angles between


def frozen_body():
    """Only the untied head learns: logits that are linear in what is moved."""
    model = gpt(tied=False)
    for name, p in model.named_parameters():
        p.requires_grad = name == "head.weight"
    return model


@pytest.mark.parametrize("cotangent", ["store", "rebuild"])
@pytest.mark.parametrize("rho", [0.05, 5.0])
def test_14_functional_sam_of_a_linear_model_is_the_plain_gradient(rho, cotangent):
    """And the logit path is SAM."""
    linear = Adapter(nn.Linear(7, V, dtype=torch.float64))
    for model, batches in ((linear, vector_batches()), (frozen_body(), token_batches())):
        g, g_sam = plain_gradient(model, batches), rule_gradient(model, batches, rho=rho)
        assert_close(
            rule_gradient(model, batches, rho=rho, path="functional", cotangent=cotangent), g
        )
        assert_close(rule_gradient(model, batches, rho=rho, path="logit"), g_sam)
        assert_apart(g_sam, g, 1e-3)


def test_15_functional_sam_sees_the_functional_part_of_the_hessian_and_the_logit_path_the_rest(
    problem,
):
    model, batches, reference = problem
    u, g, radii = reference.u, reference.g, halved(2e-3)
    along = {
        path: [
            rule_gradient(model, batches, rho=sign * rho, path=path)
            for rho in radii
            for sign in (1, -1)
        ]
        for path in ("full", "functional", "logit")
    }
    along["difference"] = [
        full - functional
        for full, functional in zip(along["full"], along["functional"], strict=True)
    ]
    base = {"functional": g, "logit": g, "difference": torch.zeros_like(g)}
    expected = {
        "functional": reference.functional_H(u),
        "logit": reference.G(u),
        "difference": reference.G(u),
    }
    assert_close(expected["functional"] + expected["logit"], reference.H(u))
    for path, product in expected.items():
        ahead, behind = along[path][::2], along[path][1::2]
        assert_order(
            [
                ((a - base[path]) / rho - product).norm()
                for a, rho in zip(ahead, radii, strict=True)
            ],
            1,
        )
        assert_order(
            [
                ((a - b) / (2 * rho) - product).norm()
                for a, b, rho in zip(ahead, behind, radii, strict=True)
            ],
            2,
        )


@pytest.mark.parametrize("rho", [0.05, 1.0])
@pytest.mark.parametrize("cotangent", ["store", "rebuild"])
def test_16_sam_less_functional_sam_is_the_softmax_that_moved(problem, rho, cotangent):
    """J(t~)^T [softmax(z~) - softmax(z)] / N at any radius: the labels cancel."""
    model, batches, reference = problem
    moved = reference.t + rho * reference.u
    change = reference.logits(moved).softmax(-1) - reference.logits(reference.t).softmax(-1)
    expected = reference.pull(
        moved, change * reference.counted[..., None] / reference.counted.sum()
    )
    functional = rule_gradient(model, batches, rho=rho, path="functional", cotangent=cotangent)
    assert_close(rule_gradient(model, batches, rho=rho) - functional, expected, 1e-11)
    assert_close(functional, reference.pull(moved, reference.r(reference.t)))


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_17_the_same_for_squared_errors(rho):
    """J(t~)^T 2 (z~ - z) / N."""
    module, inputs = mlp(), whole(vector_batches())[0]
    targets = torch.randn(
        len(inputs), V, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    model = Adapter(module, losses=lambda z, y: (z - y).square())
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    reference = Reference(module, batches, losses=lambda z, y: (z - y).square())
    assert_close(plain_gradient(model, batches), reference.g)
    moved = reference.t + rho * reference.u
    expected = reference.pull(
        moved, 2 * (reference.logits(moved) - reference.logits(reference.t)) / targets.numel()
    )
    assert_close(
        rule_gradient(model, batches, rho=rho)
        - rule_gradient(model, batches, rho=rho, path="functional"),
        expected,
        1e-11,
    )


@pytest.mark.parametrize("path", ["full", "functional", "logit", "angle"])
def test_18_labels_that_are_not_counted_may_be_anything(path):
    """Here those below 0 are not: what stands there, and where nothing of a sequence is counted the
    sequence itself, plays no part."""
    model = Adapter(
        gpt(),
        losses=lambda z, y: F.cross_entropy(
            z.flatten(0, 1), y.flatten().clamp(0, V - 1), reduction="none"
        ).view(y.shape),
        counted=lambda y: y >= 0,
    )
    tokens, targets = whole(token_batches())
    targets[1] = -100
    expected = rule_gradient(model, [(tokens, targets)], rho=0.5, path=path)
    tokens, others = tokens.clone(), torch.where(targets < 0, -1 - torch.arange(5), targets)
    tokens[1] = (tokens[1] + 1) % V
    assert_close(rule_gradient(model, [(tokens, others)], rho=0.5, path=path), expected, 1e-13)
    assert_close(rule_gradient(model.module, [(tokens, targets)], rho=0.5, path=path), expected)


@pytest.mark.parametrize("cotangent", ["store", "rebuild"])
@pytest.mark.parametrize(
    "head",
    [{"z_loss": 0.1}, {"logit_softcap": 0.5}, {"z_loss": 0.1, "logit_softcap": 0.5}],
    ids=str,
)
def test_18_z_loss_and_soft_cap_belong_to_the_loss(head, cotangent):
    model, batches = gpt(**head), token_batches()
    reference, plain = Reference(model, batches), Reference(gpt(), batches)
    moved = reference.t + 0.5 * reference.u
    functional = rule_gradient(model, batches, rho=0.5, path="functional", cotangent=cotangent)
    assert_close(functional, reference.pull(moved, reference.r(reference.t)))
    assert_close(
        rule_gradient(model, batches, rho=0.5, path="logit"),
        reference.pull(reference.t, reference.r(moved)),
    )
    assert_close(rule_gradient(model, batches, rho=0.5), reference.gradient(moved))
    assert_apart(functional, plain.pull(moved, plain.r(plain.t)), 1e-2)


@pytest.mark.parametrize(
    "axes",
    [
        {"path": "full"},
        {"path": "logit"},
        {"path": "functional", "cotangent": "store"},
        {"path": "functional", "cotangent": "rebuild"},
        {"path": "angle", "angle": 30.0, "cotangent": "store"},
        {"path": "angle", "angle": 60.0, "cotangent": "rebuild", "angle_norm": "paper"},
        {"path": "functional", "cotangent": "rebuild", "direction": "momentum"},
        {"path": "functional", "cotangent": "rebuild", "ascent_fraction": 0.5},
        {"path": "full", "weights": "delta"},
        {"path": "functional", "weights": "delta", "cotangent": "rebuild"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_19_the_lazy_head_in_chunks_is_the_dense_one(axes, tied, monkeypatch):
    """Store, rebuild and dense logits agree, the gradient of the head included; chunks of 2 tokens,
    or of one sequence."""
    monkeypatch.setitem(chunked_head.CHUNK_ELEMENTS, "cpu", 2 * 64)
    monkeypatch.setitem(chunked_head.BLOCK_ELEMENTS, "cpu", 64)
    model, batches = gpt(tied=tied), token_batches()
    optimizer = adamw(model)
    warm(model, optimizer, batches)
    dense = rule_gradient(
        Adapter(model), batches, optimizer, rho=0.5, **axes | {"cotangent": "auto"}
    )
    assert_close(rule_gradient(model, batches, optimizer, rho=0.5, **axes), dense)
    assert_apart(dense, plain_gradient(model, batches))


def test_20_the_curvature_of_the_loss_over_the_logits_is_not_negative():
    """u^T (g_SAM - g_F) / rho -> u^T G u >= 0, whatever the batch; the Hessian itself has both
    signs."""
    model, hessian = gpt(), []
    for seed in range(6):
        batches = token_batches(seed)
        reference = Reference(model, batches)
        u, expected, errors = reference.u, reference.u @ reference.G(reference.u), []
        for rho in halved(2e-3):
            found = (
                u
                @ (
                    rule_gradient(model, batches, rho=rho)
                    - rule_gradient(model, batches, rho=rho, path="functional")
                )
                / rho
            )
            assert found > 0
            errors.append(abs(found - expected))
        assert_order(errors, 1)
        hessian.append(float(u @ reference.functional_H(u)))
    assert min(hessian) < 0


@pytest.mark.parametrize("cotangent", ["store", "rebuild"])
@pytest.mark.parametrize("angle, path", [(0.0, "logit"), (90.0, "functional")])
def test_the_ends_of_the_angle_are_the_paths_themselves(angle, path, cotangent, problem):
    model, batches, _ = problem
    end = rule_gradient(model, batches, path=path, cotangent=cotangent, rho=0.5)
    assert torch.equal(
        rule_gradient(model, batches, path="angle", angle=angle, cotangent=cotangent, rho=0.5), end
    )


def test_45_degrees_are_sam_to_first_order(problem):
    model, batches, reference = problem
    radii = halved(4e-3)
    sam = [rule_gradient(model, batches, rho=rho) for rho in radii]
    assert_order(
        [
            (rule_gradient(model, batches, path="angle", rho=rho) - g).norm()
            for rho, g in zip(radii, sam, strict=True)
        ],
        2,
    )
    assert_order([(g - reference.g).norm() for g in sam], 1)


@pytest.mark.parametrize("angle_norm", ["max", "paper"])
@pytest.mark.parametrize("angle", [20.0, 45.0, 70.0])
def test_an_angle_is_the_plain_gradient_and_its_two_changes(angle, angle_norm, problem):
    """g + a delta_logit + b delta_func."""
    model, batches, reference = problem
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    c = 1 / max(cos, sin) if angle_norm == "max" else math.sqrt(2)
    change = {
        path: rule_gradient(model, batches, path=path, rho=0.5) - reference.g
        for path in ("logit", "functional")
    }
    expected = reference.g + c * cos * change["logit"] + c * sin * change["functional"]
    assert_close(
        rule_gradient(model, batches, path="angle", angle=angle, angle_norm=angle_norm, rho=0.5),
        expected,
    )


# Preconditioned SAM

BEFORE = {"metric": "adam", "second_moment": "before"}


def with_moments(model, value=None, seed=8):
    """An AdamW whose second moments are given, or drawn; three steps old."""
    optimizer, generator = (
        adamw(model, betas=(0.9, 0.95), eps=1e-8),
        torch.Generator().manual_seed(seed),
    )
    for p in getattr(model, "module", model).parameters():
        v = (
            torch.rand(p.shape, generator=generator, dtype=p.dtype) + 1e-3
            if value is None
            else torch.full_like(p, value)
        )
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": v,
        }
    return optimizer


@pytest.mark.parametrize("path", ["full", "functional"])
@pytest.mark.parametrize("value", [1e-4, 1.0, 1e4])
def test_22_equal_moments_are_the_euclidean_metric(value, path):
    model, batches = gpt(), token_batches()
    expected = rule_gradient(model, batches, rho=0.3, path=path)
    assert_close(
        rule_gradient(model, batches, with_moments(model, value), rho=0.3, path=path, **BEFORE),
        expected,
    )


def test_23_the_dual_norm_is_sam_in_other_coordinates():
    """e = rho P g / sqrt(g^T P g): e^T P^-1 e = rho^2, e^T g = rho sqrt(g^T P g), and SAM on y =
    P^-1/2 w."""
    module, batches = mlp(), vector_batches()
    model, reference = Adapter(module), Reference(module, batches)
    optimizer = with_moments(model)
    v = flat([optimizer.state[p]["exp_avg_sq"] for p in module.parameters()])
    P, g = 1 / ((v / (1 - 0.95**3)).sqrt() + 1e-8), reference.g
    axes = BEFORE | {"metric_norm": "dual", "rho": 0.3}
    e = perturbation(model, batches, optimizer, **axes)
    assert_close(e, 0.3 * P * g / (g @ (P * g)).sqrt())
    assert float(e @ (e / P)) == pytest.approx(0.09, rel=1e-12)
    assert float(e @ g) == pytest.approx(0.3 * float((g @ (P * g)).sqrt()), rel=1e-12)

    class Stretched(nn.Module):
        def __init__(self):
            super().__init__()
            self.y = nn.Parameter(reference.t / P.sqrt())

        def forward(self, inputs):
            parts = (P.sqrt() * self.y).split([shape.numel() for shape in reference.shapes])
            theta = {
                name: part.view(shape)
                for name, part, shape in zip(reference.names, parts, reference.shapes, strict=True)
            }
            return functional_call(module, theta, inputs)

    stretched = Adapter(Stretched())
    assert_close(P.sqrt() * perturbation(stretched, batches, rho=0.3), e)
    assert_close(
        rule_gradient(stretched, batches, rho=0.3) / P.sqrt(),
        rule_gradient(model, batches, optimizer, **axes),
        1e-11,
    )


@pytest.mark.parametrize("second_moment", ["with_gradient", "before"])
@pytest.mark.parametrize("metric_norm, sizes", [("l2", "e"), ("raw", "q")])
def test_24_the_radius_is_that_of_its_norm(second_moment, metric_norm, sizes):
    """|e| = rho; by choice the radius of the step that the unscaled direction would have taken:
    |P^-1 e| = rho."""
    model, batches = gpt(), token_batches()
    optimizer = with_moments(model)
    axes = {"metric": "adam", "second_moment": second_moment, "metric_norm": metric_norm}
    e, g = perturbation(model, batches, optimizer, rho=0.3, **axes), Reference(model, batches).g
    v = flat([optimizer.state[p]["exp_avg_sq"] for p in model.parameters()])
    v = (
        (0.95 * v + 0.05 * g**2) / (1 - 0.95**4)
        if second_moment == "with_gradient"
        else v / (1 - 0.95**3)
    )
    scaled = g / (v.sqrt() + 1e-8)
    assert_close(e, 0.3 * scaled / (scaled if sizes == "e" else g).norm())


def test_24_only_the_ratios_of_moments_matter():
    """With the moments as they stand and eps 0; bias correction, the same factor everywhere, drops
    out as well."""
    model, batches = gpt(), token_batches()
    optimizer, axes = with_moments(model), BEFORE | {"metric_eps": 0.0, "rho": 0.3}
    expected = perturbation(model, batches, optimizer, **axes)
    for state in optimizer.state.values():
        state["exp_avg_sq"].mul_(1e3)
    assert_close(perturbation(model, batches, optimizer, **axes), expected)
    for state in optimizer.state.values():
        state["step"].fill_(100.0)
    assert_close(perturbation(model, batches, optimizer, **axes), expected)
    assert_apart(perturbation(model, batches, with_moments(model, seed=9), **axes), expected, 0.1)


def test_25_the_first_step_of_the_moments_as_they_stand_is_sam():
    model, batches = gpt(), token_batches()
    assert torch.equal(
        rule_gradient(model, batches, rho=0.3, **BEFORE), rule_gradient(model, batches, rho=0.3)
    )


def test_25_the_first_step_of_the_moments_with_the_gradient_is_one_of_signs():
    """v' = g^2 after bias correction, so that d = g / (|g| + eps): the first step is no exception.
    Rows that no token hits stay."""
    model, batches = gpt(), token_batches()
    g = Reference(model, batches).g
    d = g / (g.abs() + 1e-8)
    assert_close(perturbation(model, batches, rho=0.3, metric="adam"), 0.3 * d / d.norm(), 1e-8)


@pytest.mark.parametrize("second_moment", ["with_gradient", "before"])
def test_25_after_a_resume_the_first_perturbation_is_that_of_the_uninterrupted_run(second_moment):
    model, batches = gpt(), token_batches()
    optimizer = adamw(model)
    warm(model, optimizer, batches, 3)
    again = gpt()
    again.load_state_dict(model.state_dict())
    resumed = adamw(again)
    resumed.load_state_dict(optimizer.state_dict())
    axes = {"metric": "adam", "second_moment": second_moment, "rho": 0.3}
    e = perturbation(model, batches, optimizer, **axes)
    assert torch.equal(perturbation(again, batches, resumed, **axes), e)
    assert_apart(perturbation(again, batches, adamw(again), **axes), e, 0.1)


# mSAM: groups that are perturbed on their own

GROUPED = {"scope": "micro_batch"}


@pytest.mark.parametrize("path", ["full", "functional", "logit", "angle"])
def test_27_one_group_is_sam(path, problem):
    model, batches, _ = problem
    one_group = rule_gradient(model, [batches], rho=0.3, path=path, **GROUPED)
    assert torch.equal(one_group, rule_gradient(model, batches, rho=0.3, path=path))


def test_27_equal_groups_are_sam_on_one_of_them(problem):
    model, batches, _ = problem
    one = rule_gradient(model, batches[:1], rho=0.3)
    assert_close(rule_gradient(model, [batches[0]] * 3, rho=0.3, **GROUPED), one, 1e-14)


@pytest.mark.parametrize("path", ["full", "functional"])
def test_27_a_radius_of_0_is_the_plain_gradient(path, problem):
    model, batches, _ = problem
    g = plain_gradient(model, batches)
    if path == "full":
        assert torch.equal(rule_gradient(model, batches, rho=0.0, **GROUPED), g)
    assert_close(
        rule_gradient(model, batches, rho=0.0, path=path, cotangent="store", **GROUPED), g, 1e-14
    )


def test_28_every_group_sees_its_own_hessian_along_its_own_gradient(problem):
    model, batches, reference = problem
    groups = [Reference(reference.model, [batch]) for batch in batches]
    tokens = torch.tensor([float(group.counted.sum()) for group in groups], dtype=torch.float64)
    expected = sum(
        n * group.H(group.u) for n, group in zip(tokens / tokens.sum(), groups, strict=True)
    )
    radii = halved(4e-3)
    assert_order(
        [
            (
                (rule_gradient(model, batches, rho=rho, **GROUPED) - reference.g) / rho - expected
            ).norm()
            for rho in radii
        ],
        1,
    )
    assert_apart(expected, reference.H(reference.u), 0.1)


def test_29_the_order_of_groups_does_not_matter_and_their_tokens_do(problem):
    model, batches, reference = problem
    forwards = rule_gradient(model, batches, rho=0.3, **GROUPED)
    assert_close(rule_gradient(model, batches[::-1], rho=0.3, **GROUPED), forwards, 1e-13)
    groups = [Reference(reference.model, [batch]) for batch in batches]
    tokens = [int(group.counted.sum()) for group in groups]
    assert len(set(tokens)) > 1
    moved = [group.gradient(group.t + 0.3 * group.u) for group in groups]
    assert_close(forwards, sum(n * g for n, g in zip(tokens, moved, strict=True)) / sum(tokens))
    assert_apart(forwards, sum(moved) / len(moved), 1e-3)


def test_a_group_may_be_several_micro_batches(problem):
    model, batches, _ = problem
    expected = rule_gradient(model, [whole(batches[:2]), batches[2]], rho=0.3, **GROUPED)
    assert_close(rule_gradient(model, [batches[:2], batches[2:]], rho=0.3, **GROUPED), expected)
    assert_apart(rule_gradient(model, batches, rho=0.3, **GROUPED), expected)


# delta-SAM

DELTA = {"weights": "delta", "rho": 0.3}


def weighing(monkeypatch, weights):
    """Replaces the weight of every instance; `weights` are those of the whole batch, in its
    order."""
    left = list(weights)
    monkeypatch.setattr(
        Delta,
        "weights_of",
        lambda self, *rest: torch.stack([left.pop(0) for _ in rest[-1]]),
    )


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_32_equal_weights_are_sam(name, monkeypatch):
    """A power of 0 makes them equal. A batch of one instance needs no probes, and is SAM bit for
    bit."""
    model, batches = PROBLEMS[name]()
    assert_close(
        rule_gradient(model, batches, delta_power=0.0, **DELTA),
        rule_gradient(model, batches, rho=0.3),
        1e-13,
    )
    one = [tuple(tensor[:1] for tensor in batches[0])]
    assert torch.equal(rule_gradient(model, one, **DELTA), rule_gradient(model, one, rho=0.3))


def instance_gradients(model, batches):
    """(g_i of the mean loss of instance i, n_i) of every instance."""
    inputs, targets = whole(batches)
    references = [
        Reference(getattr(model, "module", model), [(inputs[i : i + 1], targets[i : i + 1])])
        for i in range(len(inputs))
    ]
    return (
        torch.stack([reference.g for reference in references]),
        torch.tensor([int(reference.counted.sum()) for reference in references]).double(),
    )


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_32_33_the_ascent_is_that_of_the_weighted_loss(name, monkeypatch):
    """e along sum_i w_i n_i g_i, whatever the scale of w; one instance that has all the weight
    gives its own direction."""
    model, batches = PROBLEMS[name]()
    g_B, n_B = instance_gradients(model, batches)
    w_B = torch.rand(len(n_B), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for weights in (w_B, 100 * w_B, torch.eye(len(n_B), dtype=torch.float64)[1]):
        weighing(monkeypatch, weights)
        along = (weights * n_B) @ g_B
        assert_close(perturbation(model, batches, **DELTA), 0.3 * along / along.norm())


def weights_found(rule, batches):
    """w_i of every instance of a step, in the batch's order, as the moved pass has them."""
    found, original = [], rule.take_moved_pass

    def noting(ascent, *rest):
        found.extend(weight for micro in ascent.group for weight in micro.weights_B)
        return original(ascent, *rest)

    rule.take_moved_pass = noting
    rule.gradient(batches)
    return torch.stack(found)


@pytest.mark.parametrize("delta_probe", ["central", "mixed"])
def test_34_quadratic_losses_give_their_curvature_along_the_probe(delta_probe):
    """l(t+z) + l(t-z) - 2 l(t) = z^T A z and l(t+z+z') - l(t+z) - l(t+z') + l(t) = z^T A z',
    exactly."""
    model, A, _, batches = quadratics(5, definite=True)
    w = next(model.module.parameters())
    rule = SharpnessAware(model, adamw(model), delta_probe=delta_probe, delta_sigma=0.4, **DELTA)
    rms = 0.4 * w.detach().norm() / math.sqrt(w.numel())
    z, other = (rms * noise(w, rule.direction.seed, 0, f"{kind}/w") for kind in ("z", "other"))
    c = (A @ (z if delta_probe == "central" else other) @ z).abs()
    found = weights_found(rule, batches)
    assert_close(found, 5 * c / c.sum(), 1e-11)
    assert found.argsort().tolist() == c.argsort().tolist()


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_35_weights_are_constants_and_normalised_over_the_whole_batch(name):
    model, batches = PROBLEMS[name]()
    _, n_B = instance_gradients(model, batches)

    def weights(batches):
        found = weights_found(SharpnessAware(model, adamw(model), **DELTA), batches)
        taken(model)
        return found

    found = weights(batches)
    assert found.min() >= 0 and not found.requires_grad
    assert float(found @ n_B) == pytest.approx(float(n_B.sum()), rel=1e-12)
    assert_apart(found, torch.ones_like(found), 0.1)
    assert_close(weights([whole(batches)]), found, 1e-9)


def test_35_an_instance_without_counted_tokens_weighs_nothing():
    model, (tokens, targets) = gpt(), whole(token_batches())
    targets[2] = -100
    rest = [0, 1, 3]
    expected = perturbation(model, [(tokens[rest], targets[rest])], **DELTA)
    assert_close(perturbation(model, [(tokens, targets)], **DELTA), expected, 1e-9)


def test_35_no_gradient_goes_through_the_weights():
    """The ascent is the gradient of sum_i w_i n_i l_i at constant w_i, and not that of sum_i w_i(t)
    n_i l_i(t)."""
    model, batches = gpt(), [whole(token_batches())]
    g_B, n_B = instance_gradients(model, batches)
    rule = SharpnessAware(model, adamw(model), **DELTA)
    before = weights_of(model)
    with visited(rule) as points:
        w_B = weights_found(rule, batches)
    along = (w_B * n_B) @ g_B
    assert_close(points[-1] - before, 0.3 * along / along.norm(), 1e-11)


@pytest.mark.parametrize("delta_probe, count", [("central", 2), ("mixed", 3)])
def test_36_probes_go_where_they_should_and_leave_everything_as_it_was(delta_probe, count):
    """t + z and t - z, or t + z + z', t + z and t + z'; then the clean pass at t, bit for bit, and
    the moved one. What is random and what lies in buffers: test_rules.py."""
    model, batches = gpt(), [whole(token_batches())]
    rule = SharpnessAware(model, adamw(model), delta_probe=delta_probe, **DELTA)
    before = weights_of(model)
    with visited(rule) as points:
        rule.gradient(batches)
    probes, clean, moved = points[:count], points[count], points[count + 1]
    assert len(points) == count + 2
    assert torch.equal(clean, before) and torch.equal(weights_of(model), before)
    rms = before.norm() / math.sqrt(model.num_parameters())
    draws = (
        [
            noise(p, rule.direction.seed, 0, f"{kind}/{name}", model.unpadded_rows.get(name))
            for name, p in model.named_parameters()
        ]
        for kind in ("z", "other")
    )
    z, other = (0.15 * rms * flat(draw) for draw in draws)
    expected = [z, -z] if delta_probe == "central" else [z + other, z, other]
    for probe, move in zip(probes, expected, strict=True):
        assert_close(probe - before, move, 1e-12)
    assert (moved - before).norm().item() == pytest.approx(0.3, rel=1e-12)


# The other directions


def test_momentum_moves_against_the_first_moment():
    model, batches = gpt(), token_batches()
    optimizer = adamw(model)
    assert not perturbation(model, batches, optimizer, direction="momentum").any()
    warm(model, optimizer, batches)
    m = flat([optimizer.state[p]["exp_avg"] for p in model.parameters()])
    e = perturbation(model, batches, optimizer, direction="momentum", rho=0.3)
    assert_close(e, -0.3 * m / m.norm())


def test_stale_moves_along_the_last_gradient_handed_on_before_it_is_clipped():
    model, optimizer = gpt(), None
    optimizer = adamw(model)
    rule, last = SharpnessAware(model, optimizer, direction="stale", rho=0.3), None
    for step in range(3):
        before = weights_of(model)
        with visited(rule) as points:
            rule.gradient([whole(token_batches(step))])
        assert len(points) == 1
        assert_close(
            points[0] - before,
            torch.zeros_like(before) if last is None else 0.3 * last / last.norm(),
            0 if last is None else 1e-12,
        )
        last = flat([p.grad for p in model.parameters()])
        for p in model.parameters():
            p.grad.mul_(torch.rand_like(p))  # whatever is done to it afterwards
        optimizer.step()
        optimizer.zero_grad()


def test_friendly_takes_the_average_of_earlier_gradients_out_of_the_ascent():
    """q = g - sigma E, E <- decay E + (1 - decay) g afterwards, from 0: the first step is SAM."""
    model = gpt()
    rule, E = (
        SharpnessAware(
            model,
            adamw(model, lr=0.0),
            direction="friendly",
            friendly_sigma=0.8,
            friendly_decay=0.6,
            rho=0.3,
        ),
        0.0,
    )
    for step in range(3):
        batches = token_batches(step)
        reference = Reference(model, batches)
        q = reference.g - 0.8 * E
        rule.gradient(batches)
        assert_close(taken(model), reference.gradient(reference.t + 0.3 * q / q.norm()))
        E = 0.6 * E + 0.4 * reference.g


def test_looksam_reuses_the_part_of_sam_that_is_orthogonal_to_the_gradient(problem):
    model, batches, reference = problem
    rule = SharpnessAware(model, adamw(model), combine="reuse", period=3, alpha=0.7, rho=0.3)
    rule.gradient(batches)
    g, g_sam = reference.g, reference.gradient(reference.t + 0.3 * reference.u)
    assert_close(taken(model), g_sam)
    g_v = g_sam - (g_sam @ g) / (g @ g) * g
    for _ in range(2):
        rule.gradient(batches)
        assert_close(taken(model), g + 0.7 * g.norm() / g_v.norm() * g_v, 1e-11)


def test_gsam_takes_from_sam_the_part_of_the_gradient_orthogonal_to_it(problem):
    model, batches, reference = problem
    g, g_sam = reference.g, reference.gradient(reference.t + 0.3 * reference.u)
    expected = g_sam - 0.4 * (g - (g @ g_sam) / (g_sam @ g_sam) * g_sam)
    assert_close(rule_gradient(model, batches, combine="orthogonal", alpha=0.4, rho=0.3), expected)


# Radius 0


@pytest.mark.parametrize(
    "axes",
    [{}, {"metric": "adam"}, {"metric": "adaptive"}, {"path": "functional", "cotangent": "store"}],
    ids=str,
)
def test_01_13_a_radius_of_0_runs_all_passes_and_gives_the_plain_gradient(axes, problem):
    """Bit for bit; training, and the random stream, in test_rules.py."""
    model, batches, _ = problem
    found, result = rule_step(model, batches, rho=0.0, **axes)
    assert torch.equal(found, plain_gradient(model, batches))
    assert result.perturbed and result.forwards == result.backwards == 2


@pytest.mark.parametrize(
    "axes",
    [
        {"path": "functional", "cotangent": "rebuild"},
        {"path": "logit"},
        {"path": "angle"},
        {"combine": "orthogonal"},
    ],
    ids=str,
)
def test_13_the_other_paths_give_it_up_to_rounding(axes, problem):
    model, batches, _ = problem
    assert_close(
        rule_gradient(model, batches, rho=0.0, **axes), plain_gradient(model, batches), 1e-13
    )


def test_the_reference_is_that_of_torch():
    """The loss that calculus above differentiates is cross-entropy over the counted targets, and
    its pull a transposed Jacobian."""
    model, batches = gpt(), token_batches()
    reference = Reference(model, batches)
    tokens, targets = whole(batches)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert reference.loss(reference.t).item() == pytest.approx(expected.item(), rel=1e-14)
    assert_close(
        reference.pull(reference.t, reference.r(reference.t)),
        grad(reference.loss)(reference.t),
        1e-14,
    )
    r = torch.randn_like(reference.logits(reference.t))
    assert_close(reference.pull(reference.t, r), vjp(reference.logits, reference.t)[1](r)[0], 0)
