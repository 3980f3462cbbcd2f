"""The soft cap's tanh, for few of the special function unit's instructions (MUFU).

The softmax takes one MUFU instruction per score, exp2, and these nearly limit the forward. tanh x = 1 − 2 / (1 + e^2x)
takes two more. For |x| < NEAR, x · SERIES(x²) takes none and has the same relative error, 7e-7. A warp whose scores are
all near computes the series alone. Any other warp computes both forms and selects for each score. So a score has the
same tanh in every warp, and forward and backward agree (L22).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .mask import LOG2E

NEAR = gl.constexpr(0.5)
SERIES = gl.constexpr((0.999999456, -0.33326318, 0.131902967, -0.0444022254))
"""Minimax of the relative error for x² in [0, NEAR²]: 5.4e-7."""


@gluon.jit
def softcap_tanh(s, tanh_scale, SOFTCAP: gl.constexpr):
    """The tanh of a soft cap, or s as it is: `scores.softcap_tanh`."""
    if SOFTCAP:
        s = tanh(s * (tanh_scale * (2 / NEAR)))
    return s


@gluon.jit
def tanh(y):
    """tanh(y · NEAR / 2) of a product [64, N]: then y is near if its exponent's first bit is 0, which a warp finds for
    all its numbers with one `or` of each."""
    N: gl.constexpr = y.shape[0] * y.shape[1] // 128  # numbers of a thread
    ASM: gl.constexpr = tanh_of(N, NEAR, SERIES, LOG2E)
    REGISTERS: gl.constexpr = registers(N)
    return gl.inline_asm_elementwise(ASM, REGISTERS, [y], dtype=gl.float32, is_pure=True, pack=N)


@gluon.constexpr_function
def registers(n):
    return ",".join(["=&f"] * n + ["f"] * n)


@gluon.constexpr_function
def tanh_of(n, near, series, log2e):
    """PTX, since Gluon branches for a whole warp group and synchronises it first."""
    first, *rest = (f"{c * (near / 2) ** (2 * i + 1):.20f}" for i, c in reversed(list(enumerate(series))))
    ys = [f"${n + i}" for i in range(n)]

    def by_series(y, out):
        steps = [f"fma.rn.f32 t, {first}, y2, {rest[0]};", *(f"fma.rn.f32 t, t, y2, {c};" for c in rest[1:])]
        return [f"mul.f32 y2, {y}, {y};", *steps, f"mul.f32 {out}, {y}, t;"]

    def by_exponential(y, out):
        return [
            f"mul.f32 e, {y}, {near * log2e:.20f}; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;",
            f"rcp.approx.ftz.f32 e, e; fma.rn.f32 {out}, e, 0fC0000000, 0f3F800000;",
        ]

    lines = [
        "mov.b32 any, 0;",
        *(f"lop3.b32 any, any, {a}, {b}, 0xFE;" for a, b in zip(ys[::2], ys[1::2], strict=True)),
    ]
    lines += ["and.b32 any, any, 0x40000000; setp.ne.b32 far, any, 0; vote.sync.any.pred far, far, 0xffffffff;"]
    lines += ["@far bra.uni each;"]
    for i, y in enumerate(ys):
        lines += by_series(y, f"${i}")
    lines += ["bra.uni done;", "each:"]
    for i, y in enumerate(ys):
        lines += [*by_series(y, "t"), *by_exponential(y, "e")]
        lines += [f"abs.f32 y2, {y}; setp.lt.f32 far, y2, 0f40000000; selp.f32 ${i}, t, e, far;"]
    return "{ .reg .pred far; .reg .b32 any; .reg .f32 y2, t, e; " + " ".join(lines) + " done: }"
