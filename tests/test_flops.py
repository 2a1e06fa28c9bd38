"""The formula against what torch counts while the model runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from optim import forward_flops

B, T = 2, 32


@pytest.mark.parametrize(
    "shape",
    [
        GPTConfig(128, T, 3, 4, 32),
        GPTConfig(
            100,
            T,
            2,
            4,
            32,
            num_kv_heads=2,
            activation="swiglu",
            positions="rope",
            norm="rmsnorm",
            tied=False,
            mlp_width=80,
        ),
        GPTConfig(257, T, 2, 2, 32, activation="relu2", bias=True),
    ],
    ids=["nanodo", "llama", "gpt2"],
)
def test_forward_and_backward_are_what_torch_counts(shape):
    model, tokens = GPT(shape), torch.zeros(B, T, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(tokens).sum()
    assert counter.get_total_flops() == B * T * forward_flops(shape, T).total
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * B * T * forward_flops(shape, T).total


@pytest.mark.parametrize("vocab_size", [128, 257])
def test_the_lazy_head_costs_its_three_products(vocab_size):
    """Over the rows of its padding too: 320 at a vocabulary of 257."""
    shape = GPTConfig(vocab_size, T, 1, 1, 32)
    model, tokens = GPT(shape), torch.zeros(B, T, dtype=torch.long)
    hidden = model.hidden(tokens)
    with FlopCounterMode(display=False) as counter:
        model.logits(hidden).cross_entropy(tokens)
    assert counter.get_total_flops() == 3 * B * T * forward_flops(shape, T).head
