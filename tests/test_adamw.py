"""The base optimiser: its groups, its update against the textbook's, and its state in a
checkpoint's form."""

import pytest
import torch

from conf.rule import OptimConfig
from model import GPT, GPTConfig
from optim import build_optimizer
from optim.adamw import describe_groups, load_state_tensors, parameter_groups, state_tensors

SHAPE = GPTConfig(30, 8, 2, 2, 8, bias=True, tied=False)


def test_every_parameter_is_in_exactly_one_group_and_vectors_do_not_decay():
    model = GPT(SHAPE)
    model.positions.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.3)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "matrices": 0.3,
        "vectors": 0.0,
    }
    for group in groups:
        assert all((p.ndim >= 2) == (group["name"] == "matrices") for p in group["params"])


def test_a_tied_weight_is_there_once():
    tied = parameter_groups(GPT(GPTConfig(30, 8, 2, 2, 8)), 0.1)
    assert (
        sum(
            name in ("embedding.weight", "head.weight") for group in tied for name in group["names"]
        )
        == 1
    )


def test_the_groups_are_described():
    optimizer = build_optimizer(GPT(GPTConfig(30, 8, 1, 2, 8)), OptimConfig())
    assert (
        describe_groups(optimizer)
        == "matrices 6 tensors, 1,344 numbers, decay 0.1; vectors 3 tensors, 24 numbers, decay 0"
    )


def test_three_steps_are_the_textbook_update():
    model, config = (
        GPT(SHAPE).double(),
        OptimConfig(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.2),
    )
    optimizer = build_optimizer(model, config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        for name, p in model.named_parameters():
            g = p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            adam = (m[name] / (1 - 0.8**step)) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-6)
            weights[name] = weights[name] - 0.01 * (
                adam + (0.2 * weights[name] if p.ndim >= 2 else 0)
            )
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-14)


def test_state_of_an_unknown_parameter_is_refused():
    model = GPT(SHAPE)
    with pytest.raises(KeyError, match="nowhere"):
        load_state_tensors(
            model, build_optimizer(model, OptimConfig()), {"nowhere.weight.exp_avg": torch.zeros(1)}
        )


def test_state_survives_the_checkpoints_form_bit_for_bit():
    models = [GPT(SHAPE), GPT(SHAPE)]
    optimizers = [build_optimizer(model, OptimConfig()) for model in models]

    def step(index: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in models[index].parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers[index].step()

    step(0, 1)
    models[1].load_state_dict(models[0].state_dict())
    load_state_tensors(
        models[1],
        optimizers[1],
        {name: tensor.clone() for name, tensor in state_tensors(models[0], optimizers[0]).items()},
    )
    step(0, 2)
    step(1, 2)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert (
        state_tensors(models[0], optimizers[0]).keys()
        == state_tensors(models[1], optimizers[1]).keys()
    )
