"""What a device computes: gradients of every rule, losses, attention, dropout, AdamW."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from conf.rule import OptimConfig
from launch.doctor import self_check
from model import GPT, GPTConfig
from model.device import autocast, choose_precision
from optim import Gradient, SharpnessAware, build_optimizer
from tests.problems import flat, presets, taken

CPU = torch.device("cpu")
RULES = {"adamw": {}, **presets()}


@pytest.mark.parametrize("name", RULES)
def test_gradient_in_fp32_is_the_cpus_in_fp64(
    name, problem, device, same_noise, ieee, record_property
):
    torch.manual_seed(0)
    error = self_check.error(problem, RULES[name], device, torch.float32)
    record_property("error", error)
    assert error <= 1e-5


@pytest.mark.parametrize("name", RULES)
def test_gradient_in_bf16_is_as_good_as_the_cpus(
    name, problem, device, same_noise, record_property
):
    """The sums of a device have other orders, so its error is another one of the same size."""
    if choose_precision("bf16", device) != torch.bfloat16:
        pytest.skip("no bf16")
    errors = []
    for place in (device, CPU):
        torch.manual_seed(0)
        errors.append(self_check.error(problem, RULES[name], place, torch.bfloat16))
    record_property("error", errors[0])
    record_property("error_of_the_cpu", errors[1])
    assert errors[0] <= 3 * errors[1]


@pytest.mark.parametrize("name", presets())
def test_weights_are_restored_bit_for_bit(name, problem, device):
    model, optimizer, batches = problem
    model = deepcopy(model).to(device, torch.float32)
    own = build_optimizer(model, OptimConfig())
    own.load_state_dict(optimizer.state_dict())
    before = flat(list(model.parameters())).clone()
    rule = SharpnessAware(model, own, **RULES[name])
    with autocast(device, torch.bfloat16):
        for _ in range(3):
            rule.gradient([(x.to(device), y.to(device)) for x, y in batches])
            own.zero_grad()
    assert torch.equal(flat(list(model.parameters())), before)


@pytest.mark.parametrize("vocab", [257, 50304])
def test_the_lazy_loss_is_the_dense_one(vocab, device, ieee, record_property):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab, 128, 2, 4, 64)).to(device)
    tokens = torch.randint(vocab, (4, 129), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    lazy = model.loss(inputs, targets, 1 / targets.numel())[0]
    lazy.backward()
    found = taken(model)
    dense = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
    dense.backward()
    exact = taken(model)
    error = float((found - exact).norm() / exact.norm())
    record_property("error", error)
    assert abs(lazy.item() - dense.item()) <= 1e-5 * dense.item()
    assert error <= 1e-5


@pytest.mark.needs_cuda
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_paths_agree(backend, kv_heads, device, record_property):
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 256, 2, 4, 256, num_kv_heads=kv_heads)).to(device)
    tokens = torch.randint(257, (2, 257), device=device)

    def gradient(kernel):
        with sdpa_kernel(kernel), autocast(device, torch.bfloat16):
            loss = model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1 / 512)[0]
            loss.backward()
        return taken(model)

    exact = gradient(SDPBackend.MATH)
    try:
        found = gradient(getattr(SDPBackend, backend))
    except RuntimeError as error:
        record_property("why", str(error)[:200])
        pytest.skip(f"{backend} does not run here")
    error = float((found - exact).norm() / exact.norm())
    record_property("error", error)
    assert error <= 0.03


@pytest.mark.parametrize("cotangent", ["store", "rebuild"])
@pytest.mark.parametrize("path", ["full", "functional"])
def test_both_passes_see_the_same_dropout(path, cotangent, device, ieee, record_property):
    """At radius 0 a rule's gradient is the plain one with the same masks; with others it is not."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 64, 2, 4, 64, dropout=0.2)).to(device)
    tokens = torch.randint(257, (4, 65), device=device)
    batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    optimizer = build_optimizer(model, OptimConfig())

    def gradient(rule, seed):
        torch.manual_seed(seed)
        rule.gradient(batches)
        return taken(model)

    rule = SharpnessAware(model, optimizer, rho=0.0, path=path, cotangent=cotangent)
    plain = gradient(Gradient(model), 5)
    error = float((gradient(rule, 5) - plain).norm() / plain.norm())
    other = float((gradient(rule, 6) - plain).norm() / plain.norm())
    record_property("error", error)
    assert error <= 1e-6
    assert other > 0.1


def test_fused_adamw_is_the_cpus_in_fp64(device, record_property):
    torch.manual_seed(0)
    exact = GPT(GPTConfig(257, 64, 2, 4, 64)).double()
    model = deepcopy(exact).to(device, torch.float32)
    pairs = [(one, build_optimizer(one, OptimConfig(lr=1e-2))) for one in (exact, model)]
    assert pairs[1][1].param_groups[0]["fused"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.to(q)
        for _, optimizer in pairs:
            optimizer.step()
    found, wanted = (flat(list(one.parameters())).cpu().double() for one in (model, exact))
    error = float((found - wanted).norm() / wanted.norm())
    record_property("error", error)
    assert error <= 1e-6
