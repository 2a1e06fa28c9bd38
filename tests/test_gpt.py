"""The transformer: its shapes, its initialisation, what it may see, and that it is the function the
docstrings say it is."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.overrides import groups
from launch.config import compose
from launch.plan.plan import gpt_config
from model import GPT, GPTConfig, KeyValueCache, gpt
from model import rotary as rope

NANODO = GPTConfig(vocab_size=101, max_length=32, num_layers=2, num_heads=4, width=32)
LLAMA = GPTConfig(
    101,
    32,
    2,
    4,
    32,
    num_kv_heads=2,
    norm="rmsnorm",
    positions="rope",
    activation="swiglu",
    qk_norm=True,
    tied=False,
)
GPT2 = GPTConfig(
    101, 32, 2, 4, 32, bias=True, norm_eps=1e-5, init="gpt2", activation="relu2", logit_softcap=4.0
)
SHAPES = pytest.mark.parametrize("shape", [NANODO, LLAMA, GPT2], ids=["nanodo", "llama", "gpt2"])


def tokens(length: int = 32, vocab: int = 101) -> Tensor:
    return torch.randint(0, vocab, (3, length), generator=torch.Generator().manual_seed(0))


PUBLISHED = {
    "nanodo_24m": 23.9e6,
    "nanodo_43m": 42.5e6,
    "nanodo_118m": 117.9e6,
    "nanodo_1208m": 1208e6,
}
PUBLISHED_TOTAL = {
    "gpt2_124m": 124.4e6,
    "gpt2_355m": 354.8e6,
    "gpt2_774m": 774.0e6,
    "gpt2_1558m": 1557.6e6,
}


@pytest.mark.parametrize("name", groups()["model"])
def test_every_shape_has_the_parameters_of_its_closed_form(name):
    shape = gpt_config(compose([f"model={name}", "batch.length=64"]).model, vocab_size=50257)
    with torch.device("meta"):
        model = GPT(shape)
    L, D, M, kv = (
        shape.num_layers,
        shape.width,
        shape.hidden_width,
        shape.kv_heads * shape.head_width,
    )
    maps = 3 if shape.activation == "swiglu" else 2
    body = L * (2 * D * D + 2 * D * kv + maps * D * M) + (2 * L + 1) * D
    if shape.bias:
        body += L * (2 * D + 2 * kv + M + D) + (2 * L + 1) * D
    assert model.num_parameters(embedding=False) == body
    if name in PUBLISHED:
        assert body == pytest.approx(PUBLISHED[name], rel=3e-3)
    if name in PUBLISHED_TOTAL:
        assert model.num_parameters() == pytest.approx(PUBLISHED_TOTAL[name], rel=1e-3)


@SHAPES
def test_no_token_sees_the_future(shape):
    model, x = GPT(shape).double(), tokens()
    changed = x.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 101
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-14)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@SHAPES
def test_no_sequence_sees_another(shape):
    model, x = GPT(shape).double(), tokens()
    torch.testing.assert_close(
        torch.cat([model(row[None]) for row in x]), model(x), rtol=1e-12, atol=1e-13
    )


def plain_nanodo(model: GPT, x: Tensor) -> Tensor:
    """NanoDO once more, with einsum and an explicit mask, from the same weights."""
    w, T = dict(model.named_parameters()), x.shape[1]
    H, D, eps = model.config.num_heads, model.config.width, model.config.norm_eps

    def norm(h: Tensor, scale: Tensor) -> Tensor:
        h = h - h.mean(-1, keepdim=True)
        return scale * h / (h.square().mean(-1, keepdim=True) + eps).sqrt()

    def gelu(h: Tensor) -> Tensor:
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    h = w["embedding.weight"][x] + w["positions.weight"][:T]
    for layer in range(model.config.num_layers):
        block = f"blocks.{layer}."
        n = norm(h, w[block + "attention_norm.weight"])
        q, k, v = (n @ part.T for part in w[block + "attention.qkv.weight"].chunk(3))
        q, k, v = (part.unflatten(-1, (H, D // H)) for part in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D // H)
        scores = scores.masked_fill(torch.arange(T)[:, None] < torch.arange(T), -math.inf)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)
        h = h + y @ w[block + "attention.out.weight"].T
        n = norm(h, w[block + "mlp_norm.weight"])
        h = h + gelu(n @ w[block + "mlp.up.weight"].T) @ w[block + "mlp.down.weight"].T
    return norm(h, w["norm.weight"]) @ w["embedding.weight"][: model.config.vocab_size].T


def test_nanodo_is_the_plain_decoder():
    model = GPT(NANODO).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)  # norms' scales too
    torch.testing.assert_close(
        model(tokens()), plain_nanodo(model, tokens()), rtol=1e-12, atol=1e-13
    )


def llama_frequencies(
    frequencies: list[float], factor: float, low: float, high: float, length: int
) -> list[float]:
    """`apply_scaling` of Meta's reference implementation of Llama 3.1
    (models/llama3/reference_impl/model.py), pair by pair."""
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            scaled.append(frequency)
        elif wavelength > length / low:
            scaled.append(frequency / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


@pytest.mark.parametrize(
    ("width", "factor", "low", "high", "length"),
    [(64, 32.0, 1.0, 4.0, 8192), (128, 8.0, 1.0, 4.0, 8192), (64, 4.0, 0.5, 9.0, 100)],
)
def test_rotary_angles_are_scaled_as_llamas(width, factor, low, high, length):
    """The first two are Llama 3.2 1B's and 3.1 8B's."""
    plain = GPTConfig(101, 32, 1, 1, width, norm="rmsnorm", positions="rope", rope_base=5e5)
    scaled = replace(
        plain,
        rope_factor=factor,
        rope_low_factor=low,
        rope_high_factor=high,
        rope_original_length=length,
    )
    device, exact = torch.device("cpu"), [5e5 ** (-2 * i / width) for i in range(width // 2)]
    expected = {
        "none": exact,
        "linear": [f / factor for f in exact],
        "llama3": llama_frequencies(exact, factor, low, high, length),
    }
    for kind, frequencies in expected.items():
        found = rope.rotary_frequencies(replace(scaled, rope_scaling=kind), device)
        torch.testing.assert_close(
            found.double(), torch.tensor(frequencies, dtype=torch.float64), rtol=1e-6, atol=0
        )
    slowed = [f / g for f, g in zip(exact, expected["llama3"], strict=True)]
    # all three cases were met
    assert (
        slowed[0] == 1
        and slowed[-1] == factor
        and any(1.01 < ratio < 0.99 * factor for ratio in slowed)
    )


def test_rotary_attention_sees_distances_only():
    """Scores of rotated q and k depend on their distance: shifting both positions changes
    nothing."""
    q, k = torch.randn(2, 1, 1, 6, LLAMA.head_width, dtype=torch.float64).unbind(0)
    scores = []
    for shift in (0, 11):
        rotary = tuple(
            part.double() for part in rope.rotary_table(LLAMA, torch.arange(shift, shift + 6))
        )
        scores.append(rope.rotate(q, rotary) @ rope.rotate(k, rotary).transpose(-1, -2))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)  # angles are fp32
    assert not torch.allclose(scores[0], q @ k.transpose(-1, -2), atol=1e-2)


def test_grouped_queries_are_heads_with_shared_keys_and_values():
    grouped = GPTConfig(101, 32, 1, 4, 32, num_kv_heads=2)
    model, full = GPT(grouped).double(), GPT(GPTConfig(101, 32, 1, 4, 32)).double()
    weights = dict(model.state_dict())
    q, k, v = weights["blocks.0.attention.qkv.weight"].split([32, 16, 16])
    k, v = (part.view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
    full.load_state_dict(weights | {"blocks.0.attention.qkv.weight": torch.cat([q, k, v])})
    torch.testing.assert_close(model(tokens()), full(tokens()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length", [48, gpt.QUERIES, gpt.QUERIES + 44, 2 * gpt.QUERIES])
def test_short_attention_is_the_fused_one(length):
    """In bf16 both err by rounding; short_attention by no more than twice as much."""
    q, k, v = torch.randn(3, 2, 4, length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    rounded = [part.bfloat16() for part in (q, k, v)]
    ours = (gpt.short_attention(*rounded).float() - exact).norm()
    fused = (F.scaled_dot_product_attention(*rounded, is_causal=True).float() - exact).norm()
    assert ours < 2 * fused < 0.02 * exact.norm()


@SHAPES
def test_the_cache_changes_no_logit(shape):
    model, x = GPT(shape).double(), tokens()
    caches = [KeyValueCache() for _ in model.blocks]
    steps = [model(x[:, :5], caches), *(model(x[:, t : t + 1], caches) for t in range(5, 32))]
    torch.testing.assert_close(torch.cat(steps, 1), model(x), rtol=1e-12, atol=1e-13)


@SHAPES
def test_checkpointing_activations_changes_no_bit(shape):
    model, x = GPT(GPTConfig(**asdict(shape) | {"dropout": 0.1})), tokens()
    found = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model.loss(x, x)[0].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_both_ways_to_the_loss_differentiate_under_torch_func():
    model, x = GPT(NANODO).double(), tokens()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.loss(x, x)[0]

    def lazy(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(
            Loss(), {f"model.{name}": value for name, value in p.items()}, (x,)
        )

    def dense(p: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(
            torch.func.functional_call(model, p, (x,)).flatten(0, 1), x.flatten(), reduction="sum"
        )

    model.loss(x, x)[0].backward()
    _, pull_back = torch.func.vjp(lazy, parameters)
    for gradient in (
        torch.func.grad(lazy)(parameters),
        torch.func.grad(dense)(parameters),
        pull_back(torch.ones((), dtype=torch.float64))[0],
    ):
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradient[name], p.grad, rtol=1e-11, atol=1e-12)


@SHAPES
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_models_is_a_loop_over_them(shape):
    models, x = [GPT(shape, seed).double() for seed in range(3)], tokens()
    stacked, _ = torch.func.stack_module_state(models)
    found = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, (x,)))(stacked)
    torch.testing.assert_close(
        found, torch.stack([model(x) for model in models]), rtol=1e-12, atol=1e-13
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_the_gradient_of_every_sequence():
    model, x = GPT(NANODO).double(), tokens()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], row_T: Tensor) -> Tensor:
        return F.cross_entropy(
            torch.func.functional_call(model, p, (row_T[None, :-1],))[0], row_T[1:], reduction="sum"
        )

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        model.zero_grad()
        model.loss(row[None, :-1], row[None, 1:])[0].backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad, rtol=1e-11, atol=1e-12)


# Initialisation


def test_nanodo_draws_by_its_formulas():
    D, V = 256, 1000
    model = GPT(GPTConfig(V, 512, 1, 4, D))
    w = dict(model.named_parameters())
    for name in ("embedding.weight", "positions.weight"):
        rows = w[name][:V] if name == "embedding.weight" else w[name]
        assert (
            rows.std().item() == pytest.approx(D**-0.5, rel=0.02) and abs(rows.mean().item()) < 1e-3
        )
    for part in w["blocks.0.attention.qkv.weight"].chunk(3):
        bound = math.sqrt(6 / (2 * D))
        assert 0.99 * bound < part.abs().max() <= bound and part.std().item() == pytest.approx(
            bound / math.sqrt(3), rel=0.02
        )
    assert (
        0.99 * math.sqrt(6 / (5 * D))
        < w["blocks.0.mlp.up.weight"].abs().max()
        <= math.sqrt(6 / (5 * D))
    )


def test_gpt2_draws_by_its_formulas():
    L = 8
    model = GPT(GPTConfig(500, 256, L, 4, 128, bias=True, init="gpt2"))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif name.endswith("norm.weight"):
            assert (p == 1).all()
        else:
            std = 0.01 if name == "positions.weight" else 0.02
            std /= (
                math.sqrt(2 * L)
                if name.endswith(("attention.out.weight", "mlp.down.weight"))
                else 1
            )
            rows = p[:500] if name == "embedding.weight" else p
            assert rows.std().item() == pytest.approx(std, rel=0.05), name


@SHAPES
def test_weights_depend_on_seed_and_name_only(shape):
    model = GPT(shape, seed=3)
    with torch.device("meta"):
        later = GPT(shape)
    assert all(p.is_meta for p in later.parameters())
    torch.manual_seed(99)
    later.to_empty(device="cpu").init_weights(3)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), later.parameters(), strict=True)
    )
    assert not torch.equal(model.embedding.weight, GPT(shape, seed=4).embedding.weight)
    assert not model.unembedding[shape.vocab_size :].any()  # padding


def test_weights_do_not_depend_on_the_default_device():
    """A run builds its model under its own device; meta stands for one that is not the CPU."""
    model = GPT(NANODO, seed=1)
    with torch.device("meta"):
        model.init_weights(0)
    assert all(map(torch.equal, model.parameters(), GPT(NANODO).parameters()))


def test_drawing_weights_leaves_torchs_own_generator_alone():
    before = torch.manual_seed(5).get_state()
    GPT(NANODO)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_weights_share_their_numbers():
    parts = [
        p[: LLAMA.width, : LLAMA.width] for _, p in GPT(LLAMA).named_parameters() if p.ndim == 2
    ]
    starts = [part.flatten()[:16] / part.std() for part in parts]
    assert not any(
        torch.allclose(a, b, rtol=1e-2) for i, a in enumerate(starts) for b in starts[:i]
    )


def test_weights_do_not_depend_on_padding_or_depth(monkeypatch):
    monkeypatch.setattr("model.config.VOCAB_MULTIPLE", 1)
    narrow = dict(GPT(NANODO).named_parameters())
    monkeypatch.setattr("model.config.VOCAB_MULTIPLE", 256)
    padded = dict(GPT(GPTConfig(**asdict(NANODO) | {"num_layers": 3})).named_parameters())
    for name, p in narrow.items():
        assert torch.equal(p, padded[name][: len(p)])


# Dropout and refusals


def test_dropout_acts_in_training_only():
    model, x = GPT(GPTConfig(**asdict(NANODO) | {"dropout": 0.5})), tokens()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), GPT(NANODO)(x))


def test_z_loss_is_part_of_the_training_loss_only():
    model, x = GPT(GPTConfig(**asdict(NANODO) | {"z_loss": 1.0})).double(), tokens()
    training = model.loss(x, x)[0]
    model.eval()
    evaluation = model.loss(x, x)[0]
    torch.testing.assert_close(
        training - evaluation, model(x).logsumexp(-1).square().sum(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 3}, "model.num_heads=3"),
        ({"num_kv_heads": 3}, "model.num_kv_heads=3"),
        ({"activation": "tanh"}, "model.activation=tanh"),
        ({"positions": "rope", "num_heads": 32}, "odd width"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**asdict(NANODO) | change)


def test_a_sequence_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match="max_length=32"):
        GPT(NANODO)(tokens(33))
