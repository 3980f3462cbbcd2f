"""Rotary embeddings: what a rotation keeps, and which pairs each way of stretching slows down by how much."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.config import RotaryConfig
from model.rotary import attention_scaling, inverse_frequencies, rotate

D = 64


def slowdown(config: RotaryConfig, head_dim: int = D) -> Tensor:
    """How many times slower than unscaled each pair turns. Frequencies span four orders of magnitude; ratios do not."""
    return inverse_frequencies(RotaryConfig(theta=config.theta), head_dim) / inverse_frequencies(config, head_dim)


def strictly_rising(x: Tensor) -> bool:
    return all(a < b for a, b in pairwise(x.tolist()))


def at(positions_S: Tensor, x_BSHD: Tensor, config: RotaryConfig) -> Tensor:
    """x rotated to these positions."""
    frequencies_F = inverse_frequencies(config, x_BSHD.shape[-1])
    angles_BS1F = (positions_S[:, None].float() * frequencies_F)[None, :, None]
    return rotate(x_BSHD, angles_BS1F.cos(), angles_BS1F.sin())


def test_rotation_keeps_every_norm():
    x = torch.randn(2, 50, 3, D)
    rotated = at(torch.arange(50) * 37, x, RotaryConfig())
    assert (rotated - x).abs().max() > 1
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_position_0_is_the_identity():
    x = torch.randn(2, 1, 3, D)
    assert torch.equal(at(torch.tensor([0]), x, RotaryConfig()), x)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def score(query_position: int, key_position: int) -> float:
        rotated_q = at(torch.tensor([query_position]), q, RotaryConfig())
        return (rotated_q * at(torch.tensor([key_position]), k, RotaryConfig())).sum().item()

    near, shifted, farther = score(7, 3), score(507, 503), score(507, 400)
    assert math.isclose(near, shifted, abs_tol=1e-3)  # |q| |k| is about 64 and float32 angles of 500 are good to 3e-5
    assert abs(near - farther) > 0.1
    assert abs(near - score(3, 7)) > 0.1  # before is not after


def test_each_pair_turns_at_its_own_speed():
    # Radians per position: θ^(−2f / D), here 10000^(−f / 4).
    frequencies = inverse_frequencies(RotaryConfig(theta=10000.0), 8)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]), rtol=1e-6, atol=0)
    # Pair 1 of 4 is (x[1], x[5]); 5 positions are half a radian.
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1
    expected = torch.zeros(8)
    expected[1], expected[5] = math.cos(0.5), math.sin(0.5)
    torch.testing.assert_close(at(torch.tensor([5]), x, RotaryConfig(theta=10000.0)).flatten(), expected)


def test_rotation_is_float32_inside_and_keeps_the_dtype():
    x = torch.randn(1, 40, 2, D).bfloat16()
    rotated = at(torch.arange(40), x, RotaryConfig())
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, at(torch.arange(40), x.float(), RotaryConfig()).bfloat16())


def test_linear_slows_every_pair_by_the_factor():
    torch.testing.assert_close(slowdown(RotaryConfig(scaling="linear", factor=4.0)), torch.full((D // 2,), 4.0))


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    slower = slowdown(RotaryConfig(scaling="ntk", factor=4.0))
    assert slower[0] == 1
    assert slower[-1].item() == pytest.approx(4, rel=1e-5)
    assert strictly_rising(slower)


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_blends_between():
    # Pair f turns 4096 · 10000^(−f / 32) / 2π times in the original context: 32 times at f = 10.47, once at f = 22.51.
    # The ramp runs over the whole pairs around these: 10 to 23.
    slower = slowdown(RotaryConfig(scaling="yarn", factor=4.0, original_seq_len=4096))
    torch.testing.assert_close(slower[:11], torch.ones(11))
    torch.testing.assert_close(slower[23:], torch.full((9,), 4.0))
    assert strictly_rising(slower[10:24])
    # Pair 16 lies 6 of 13 steps up the ramp, at whose top 3/4 of the speed is lost.
    assert slower[16].item() == pytest.approx(1 / (1 - 6 / 13 * 3 / 4), rel=1e-5)


def test_yarns_ramp_follows_its_two_betas():
    # 8 turns at f = 15.28 and 2 at f = 20.10.
    config = RotaryConfig(scaling="yarn", factor=4.0, original_seq_len=4096, beta_fast=8.0, beta_slow=2.0)
    slower = slowdown(config)
    torch.testing.assert_close(slower[:16], torch.ones(16))
    torch.testing.assert_close(slower[21:], torch.full((11,), 4.0))
    assert strictly_rising(slower[15:22])


def test_llama3_keeps_short_wavelengths_slows_long_ones_and_blends_between():
    # Llama 3.1: wavelengths 2π · 500000^(f / 64) are 8192 / 4 at f = 28.2 and 8192 / 1 at f = 34.98.
    slower = slowdown(RotaryConfig(theta=500000.0, scaling="llama3", factor=8.0, original_seq_len=8192), 128)
    torch.testing.assert_close(slower[:29], torch.ones(29))
    torch.testing.assert_close(slower[35:], torch.full((29,), 8.0))
    assert strictly_rising(slower[28:36])
    # Pair 32 has a wavelength of 2π · √500000 = 4443: (8192 / 4443 − 1) / (4 − 1) of it is kept, the rest slowed by 8.
    kept = (8192 / (2 * math.pi * math.sqrt(500000)) - 1) / 3
    assert slower[32].item() == pytest.approx(1 / (kept + (1 - kept) / 8), rel=1e-5)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_1_changes_nothing(scaling):
    config = RotaryConfig(scaling=scaling, factor=1.0, original_seq_len=512)
    torch.testing.assert_close(slowdown(config), torch.ones(D // 2))
    assert attention_scaling(config) == 1


def test_only_yarn_sharpens_attention():
    assert attention_scaling(RotaryConfig(scaling="yarn", factor=math.e**3)) == pytest.approx(1.3)
    for scaling in ("linear", "ntk", "llama3"):
        assert attention_scaling(RotaryConfig(scaling=scaling, factor=8.0)) == 1
    assert attention_scaling(RotaryConfig()) == 1
