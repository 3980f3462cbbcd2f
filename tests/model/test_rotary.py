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
UNSCALED = inverse_frequencies(RotaryConfig(theta=10000.0), D)


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
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]))
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
    torch.testing.assert_close(inverse_frequencies(RotaryConfig(scaling="linear", factor=4.0), D), UNSCALED / 4)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    frequencies = inverse_frequencies(RotaryConfig(scaling="ntk", factor=4.0), D)
    assert frequencies[0] == 1
    torch.testing.assert_close(frequencies[-1], UNSCALED[-1] / 4)
    slowed = (UNSCALED / frequencies).tolist()
    assert all(faster < slower for faster, slower in pairwise(slowed))


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_blends_between():
    # Pair f turns 4096 · 10000^(−f / 32) / 2π times in the original context: 32 times at f = 10.47, once at f = 22.51.
    # The ramp runs over the whole pairs around these: 10 to 23.
    frequencies = inverse_frequencies(RotaryConfig(scaling="yarn", factor=4.0, original_seq_len=4096), D)
    torch.testing.assert_close(frequencies[:11], UNSCALED[:11])
    torch.testing.assert_close(frequencies[23:], UNSCALED[23:] / 4)
    # Pair 16 lies 6 of 13 steps up the ramp, where 1/4 of the speed is left.
    torch.testing.assert_close(frequencies[16], UNSCALED[16] * (1 - 6 / 13 * 3 / 4))
    slowed = (UNSCALED / frequencies)[10:24].tolist()
    assert all(faster < slower for faster, slower in pairwise(slowed))


def test_yarns_ramp_follows_its_two_betas():
    # 8 turns at f = 15.28 and 2 at f = 20.10.
    config = RotaryConfig(scaling="yarn", factor=4.0, original_seq_len=4096, beta_fast=8.0, beta_slow=2.0)
    slowed = UNSCALED / inverse_frequencies(config, D)
    torch.testing.assert_close(slowed[:16], torch.ones(16))
    torch.testing.assert_close(slowed[21:], torch.full((11,), 4.0))
    assert ((slowed[16:21] > 1.01) & (slowed[16:21] < 3.99)).all()


def test_llama3_keeps_short_wavelengths_slows_long_ones_and_blends_between():
    # Llama 3.1: wavelengths 2π · 500000^(f / 64) are 8192 / 4 at f = 28.2 and 8192 / 1 at f = 34.98.
    published = {"theta": 500000.0, "factor": 8.0, "original_seq_len": 8192}
    frequencies = inverse_frequencies(RotaryConfig(scaling="llama3", **published), 128)
    unscaled = inverse_frequencies(RotaryConfig(theta=500000.0), 128)
    torch.testing.assert_close(frequencies[:29], unscaled[:29])
    torch.testing.assert_close(frequencies[35:], unscaled[35:] / 8)
    slowed = (unscaled / frequencies)[28:36].tolist()
    assert all(faster < slower for faster, slower in pairwise(slowed))
    # Pair 32 has a wavelength of 2π · √500000 = 4442.9: 8192 / 4442.9 = 1.84383, so (1.84383 − 1) / (4 − 1) is kept.
    kept = (8192 / (2 * math.pi * math.sqrt(500000)) - 1) / 3
    torch.testing.assert_close(frequencies[32], unscaled[32] * (kept + (1 - kept) / 8))


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_1_changes_nothing(scaling):
    config = RotaryConfig(scaling=scaling, factor=1.0, original_seq_len=512)
    torch.testing.assert_close(inverse_frequencies(config, D), UNSCALED)
    assert attention_scaling(config) == 1


def test_only_yarn_sharpens_attention():
    assert attention_scaling(RotaryConfig(scaling="yarn", factor=math.e**3)) == pytest.approx(1.3)
    for scaling in ("linear", "ntk", "llama3"):
        assert attention_scaling(RotaryConfig(scaling=scaling, factor=8.0)) == 1
    assert attention_scaling(RotaryConfig()) == 1
