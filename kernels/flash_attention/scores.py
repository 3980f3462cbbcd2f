"""From a raw product q · k to a score, a weight and the score's gradient: the arithmetic that all kernels share.

Scores are kept in base 2, with the scale folded into log₂e: a raw product s becomes scale_log2 · s, or with a soft cap
scale_log2 · tanh(tanh_scale · s) (`problem.scalars`).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh x = 1 − 2 / (1 + e^2x); near 0 that difference would lose the digits that the series keeps."""
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 - x2 * (17 / 315))))
    return tl.where(x2 < 0.04, series, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def softcap_tanh(s, tanh_scale, SOFTCAP: tl.constexpr):
    """Raw products as `exp_scores` and `score_gradient` take them: the tanh of a soft cap, or s as it is. The Hopper
    kernels have another form, hopper/softcap.py."""
    if SOFTCAP:
        s = tanh(s * tanh_scale)
    return s


@triton.jit
def exp_scores(s, lse, scale_log2):
    """P of capped products, from LSE in base 2 along the rows of s. One of ∞ makes all weights of its row 0."""
    return tl.exp2(s * scale_log2 - lse)


@triton.jit
def score_gradient(p, dp, delta, s, SOFTCAP: tl.constexpr):
    """dS = P · (dP − delta), times the derivative of the soft cap; the scale is left to the end of dQ and dK."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds *= 1 - s * s
    return ds
