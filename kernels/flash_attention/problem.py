"""What every implementation takes from the interface: the mask and the scaling as numbers, and tensors it can read."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .scores import LOG2E


class Problem:
    """The mask and the scores' scaling as the kernels take them."""

    def __init__(
        self, causal: bool, window: int | None, starts: Tensor | None, softcap: float, scale: float,
        ends: Tensor | None = None, slopes: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.starts, self.ends, self.slopes = starts, ends, slopes
        self.flags = {
            "CAUSAL": causal, "WINDOW": window is not None, "STARTS": starts is not None, "SOFTCAP": softcap > 0,
            "ENDS": ends is not None, "ALIBI": slopes is not None,
        }  # fmt: skip
        self.scalars = scalars(window, softcap, scale)


def scalars(window: int | None, softcap: float, scale: float) -> tuple[int, float, float]:
    """window, tanh_scale, scale_log2: see scores.py."""
    tanh_scale, outer = (scale / softcap, softcap) if softcap > 0 else (0.0, scale)
    return window or 0, tanh_scale, outer * LOG2E.value


def aligned(x_BSHD: Tensor) -> Tensor:
    """x, or a copy where the kernels could not read x: TMA wants 16-byte multiples, and rows without gaps in them;
    pointers count in 32 bits from a tile's first row to its last (128 at most)."""
    fits = x_BSHD.data_ptr() % 16 == 0 and _are_readable(x_BSHD.stride(), x_BSHD.element_size())
    return x_BSHD if fits else x_BSHD.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1024)
def _are_readable(strides: tuple[int, ...], element_size: int) -> bool:
    *outer, last = strides
    return last == 1 and outer[1] * 128 < 2**31 and all(s > 0 and s * element_size % 16 == 0 for s in outer)


def dsinks_of(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of sinks (H,), from LSE and delta = Σ out · dout − dlse, float32 (B, H, S).

    A sink is a key without a value: p = exp(sink − lse), ds = p · (0 − delta). One of −∞ is none, also for a query that
    sees nothing, where −∞ − (−∞) would be NaN.
    """
    p = torch.exp(sinks[:, None] - lse).masked_fill(sinks[:, None] == float("-inf"), 0.0)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def padded(D: int) -> int:
    """D as the kernels' tiles have it: the next power of 2. (Triton's own function takes 5 µs, five times a call.)"""
    return 1 << (D - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; again without Triton's 5 µs."""
    return -(-a // b)
