"""Training held against a plain torch loop around transformers' GPT-2: nothing of ours but the
first weights and the batches."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conf.rule import OptimConfig
from conf.schema import ScheduleConfig
from model import GPT, GPTConfig
from optim import Gradient, build_optimizer, build_schedule

STEPS, V, T, B = 20, 257, 64, 4
SHAPE = GPTConfig(V, T, 3, 4, 64, bias=True, norm_eps=1e-5, init="gpt2")
NAMES = {
    "embedding": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def theirs(name: str) -> str:
    """Their name of our parameter."""
    *module, kind = name.split(".")
    prefix = f"transformer.h.{module[1]}." if module[0] == "blocks" else "transformer."
    return f"{prefix}{NAMES['.'.join(module[2:] if module[0] == 'blocks' else module)]}.{kind}"


def in_their_layout(name: str, ours: torch.Tensor) -> torch.Tensor:
    """Their linear layers are input x output, and their vocabulary has no padding."""
    if name == "embedding.weight":
        return ours[:V]
    return ours.T if ours.ndim == 2 and name.startswith("blocks") else ours


@pytest.fixture
def pair():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_layer=3,
        n_head=4,
        n_embd=64,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    model, plain = GPT(SHAPE), transformers.GPT2LMHeadModel(config)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameters[theirs(name)].copy_(in_their_layout(name, parameter))
    return model, plain


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    text = torch.tensor(list(Path(__file__).read_bytes()))  # something to learn
    starts = torch.randint(
        0, len(text) - T, (STEPS * B,), generator=torch.Generator().manual_seed(1)
    )
    tokens = torch.stack([text[start : start + T + 1] for start in starts]).view(STEPS, B, T + 1)
    targets = tokens[:, :, 1:].clone()
    targets[:, 1, :7] = -100
    return list(zip(tokens[:, :, :-1], targets, strict=True))


def plain_loss(plain, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(plain(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def test_the_first_gradient_agrees_tensor_by_tensor(pair):
    model, plain = pair
    tokens, targets = batches()[0]
    result = Gradient(model).gradient([(tokens[:2], targets[:2]), (tokens[2:], targets[2:])])
    loss = plain_loss(plain, tokens, targets)
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    parameters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        ours, expected = in_their_layout(name, parameter.grad), parameters[theirs(name)].grad
        # Key biases shift all scores of a query alike, so their gradient is zero but for rounding.
        assert (ours - expected).norm() <= 1e-6 * expected.norm() + 1e-8, name


def test_in_fp64_they_agree_to_rounding(pair):
    """What is left in fp32 is rounding, and no small difference between the two models."""
    model, plain = (part.double() for part in pair)
    tokens, targets = batches()[0]
    Gradient(model).gradient([(tokens[:2], targets[:2]), (tokens[2:], targets[2:])])
    plain_loss(plain, tokens, targets).backward()
    parameters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        ours, expected = in_their_layout(name, parameter.grad), parameters[theirs(name)].grad
        assert (ours - expected).norm() <= 1e-12 * expected.norm(), name


def test_twenty_steps_of_losses_agree(pair):
    model, plain = pair
    optim = OptimConfig(lr=3e-3, beta2=0.99, eps=1e-6)
    schedule = build_schedule(ScheduleConfig(steps=STEPS, warmup_steps=3), optim, B * T, 0)
    optimizer, rule = build_optimizer(model, optim), Gradient(model)
    matrices = [p for p in plain.parameters() if p.ndim >= 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        groups, lr=3e-3, betas=(0.9, 0.99), eps=1e-6, foreach=False, fused=False
    )
    ours, expected = [], []
    for step, (tokens, targets) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        optimizer.zero_grad()
        ours.append(
            rule.gradient([(tokens[:1], targets[:1]), (tokens[1:], targets[1:])]).loss.item()
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        rate = (
            step / 3
            if step < 3
            else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        )
        for group in reference.param_groups:
            group["lr"] = 3e-3 * rate
        reference.zero_grad()
        loss = plain_loss(plain, tokens, targets)
        loss.backward()
        expected.append(loss.item())
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
    assert ours == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.2  # the comparison covers learning
