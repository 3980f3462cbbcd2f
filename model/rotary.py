"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them to longer contexts.

Shape suffixes: B batch, S sequence, H heads, D head dimension, F = D / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import RotaryConfig


def inverse_frequencies(config: RotaryConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: float32 (F,).

    linear: positions divided by the factor (Chen et al. 2023, arXiv:2306.15595). ntk: the base raised to
    θ · factor^(D / (D − 2)), so the slowest pair is interpolated by the factor and the fastest not at all. yarn: a ramp
    between the two by how often a pair turns within the original context (Peng et al. 2023, arXiv:2309.00071, §3.2).
    llama3: the same idea with the ramp over wavelengths (Llama 3.1 model card).
    """
    theta = config.theta
    if config.scaling == "ntk":
        theta *= config.factor ** (head_dim / (head_dim - 2))
    frequencies_F = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    interpolated_F = frequencies_F / config.factor
    if config.scaling == "linear":
        return interpolated_F
    if config.scaling == "yarn":

        def pair_turning(turns: float) -> float:
            return head_dim * math.log(config.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

        low = max(math.floor(pair_turning(config.beta_fast)), 0)
        high = min(math.ceil(pair_turning(config.beta_slow)), head_dim - 1)
        ramp_F = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        return torch.lerp(frequencies_F, interpolated_F, ramp_F.clamp(0, 1))
    if config.scaling == "llama3":
        turns_F = config.original_seq_len * frequencies_F / (2 * math.pi)
        kept_F = (turns_F - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        return torch.lerp(interpolated_F, frequencies_F, kept_F.clamp(0, 1))
    return frequencies_F


def attention_scaling(config: RotaryConfig) -> float:
    """What cos and sin are multiplied with: YaRN's temperature 0.1 · ln(factor) + 1, and 1 for all others."""
    return 0.1 * math.log(config.factor) + 1 if config.scaling == "yarn" else 1.0


def rotate(x_BSHD: Tensor, cos_BS1F: Tensor, sin_BS1F: Tensor) -> Tensor:
    """Rotate each pair (x[f], x[f + F]) by its angle, in float32; returns x's dtype."""
    a, b = x_BSHD.float().chunk(2, dim=-1)
    rotated = torch.cat([a * cos_BS1F - b * sin_BS1F, b * cos_BS1F + a * sin_BS1F], dim=-1)
    return rotated.to(x_BSHD.dtype)
