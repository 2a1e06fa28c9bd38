"""Compiled blocks: what they compute, and that nothing is compiled anew while a run goes on."""

import pytest
import torch

from conf.rule import OptimConfig
from model import GPT, GPTConfig
from model.device import autocast
from model.parallelize import parallelize
from optim import SharpnessAware, build_optimizer
from tests.problems import flat


@pytest.mark.parametrize("path", ["full", "functional"])
def test_no_recompilation_while_rho_lr_and_step_change(path, device, record_property):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = GPT(GPTConfig(257, 64, 2, 4, 64)).to(device)
    parallelize(model, "block", False, device)
    optimizer = build_optimizer(model, OptimConfig())
    rule = SharpnessAware(model, optimizer, rho=0.05, path=path, metric="adam")

    def step(number):
        rule.rho = 0.05 / (1 + number)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + number)
        tokens = torch.randint(257, (4, 65), device=device)
        with autocast(device, torch.bfloat16):
            rule.gradient([(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())])
        optimizer.step()
        optimizer.zero_grad()

    for number in range(3):
        step(number)
    # From here on a recompilation is an error.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3, 8):
            step(number)
    record_property("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert bool(flat(list(model.parameters())).isfinite().all())
