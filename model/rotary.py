"""Rotary positions (2104.09864): queries and keys turned by angles that grow with the position."""

import math

import torch
from torch import Tensor

from model.config import GPTConfig

Rotary = tuple[Tensor, Tensor]  # cos and sin, T x d each


def rotary_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Returns the radians per position of each of the d/2 pairs of a head, f_i = base^(-2i/d),
    which a longer context may scale.

    linear: f_i / s for a factor s (2306.15595). llama3: a pair that turns n_i = original_length f_i
    / (2 pi) times over the original context keeps f_i where n_i > high_factor, gets f_i / s where
    n_i < low_factor, and between them ((1 - a) / s + a) f_i, a = (n_i - low_factor) / (high_factor
    - low_factor) (Llama 3.1, `apply_scaling` of its reference implementation)."""
    exponents = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32)
    # Rounded as transformers does: far positions magnify the difference.
    frequencies = 1.0 / config.rope_base ** (exponents / config.head_width)
    if config.rope_scaling == "linear":
        return frequencies / config.rope_factor
    if config.rope_scaling == "llama3":
        turns = config.rope_original_length / (2 * math.pi / frequencies)
        range_of_turns = config.rope_high_factor - config.rope_low_factor
        kept = ((turns - config.rope_low_factor) / range_of_turns).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / config.rope_factor + kept * frequencies
    return frequencies


def rotary_table(config: GPTConfig, positions_T: Tensor) -> Rotary:
    """Returns cos and sin, T x d each, of the angles position * f_i (see `rotary_frequencies`),
    once for either half of a head."""
    angles = positions_T.float()[:, None] * rotary_frequencies(config, positions_T.device)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x_BxHxTxd: Tensor, rotary: Rotary) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) by its angle, in fp32 or wider."""
    cos, sin = rotary
    x = x_BxHxTxd.to(torch.promote_types(x_BxHxTxd.dtype, torch.float32))
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BxHxTxd.dtype)
