"""The forward pass's softmax, block by block, and how it stays exact without a row maximum in every block.

Softmax is the same whatever is subtracted from a row's scores, as long as nothing overflows or vanishes. So `row_max`,
which is subtracted, is the maximum of a row's first blocks, up to the first key that all queries of the tile see. Later
blocks are not searched for a higher one, which would be a quarter of a step's instructions (L11). A row whose maximum
comes late is therefore weighed against an earlier one, and three things follow.

- *A weight above 1 is rounded* for P·V. Online softmax gives a row's maximum the weight 1, which is exact. If one key
  has nearly all of a row's weight, its rounding must not show: out would not be that key's value, and the backward's
  dP − delta would not vanish. So where a block outweighs what came before (`outweighs`), `rounding_excess` corrects the
  divisor of the row's outputs for that block's rounding. LSE has the sum of the weights themselves (L14).
- *A row may overflow.* Where its sum comes to `LIMIT`, or an output is not finite (`not_finite`), the program computes
  the work tile again after all others, with the maximum of every block: the usual online softmax.
- *float16* weights end at 65,504, so there every block is searched.

[64, 4] is one number for each thread of a row: four threads share a row of a product [64, N].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import split_d
from .mask import LOG2E
from .softcap import softcap_tanh

LIMIT = gl.constexpr(2.0**60)
"""A row whose sum comes to this is computed again: its weights may have overflowed, or its outputs."""
FLOAT16_RISE = gl.constexpr(8)
"""In float16, where every block is searched, a higher maximum replaces `row_max` only if it is this far above, in
powers of two: so nearly no block rescales the outputs so far."""


@gluon.jit
def nothing_seen(s, sinks_ptr, tile):
    """`row_max`, its four sums and their rounding excess, before a row's first scores: those of the sink, if any."""
    row: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    row_max = gl.full([64], float("-inf"), gl.float32, row)
    row_sum = thread_sums(gl.full(s.shape, 0.0, gl.float32, s.type.layout))
    excess = row_sum * 0
    if sinks_ptr is not None:
        row_max = gl.full([64], 0.0, gl.float32, row) + gl.load(sinks_ptr + tile.h).to(gl.float32) * LOG2E
        row_sum += 0.25
    return row_max, row_sum, excess


@gluon.jit
def maximum(s, row_max, tile, n0, online, dtype: gl.constexpr, mask, CONFIG: gl.constexpr):
    """The first half of a block's online softmax.

    Returns the masked scores; `row_max`, −inf where nothing is seen yet; what to subtract; and the factor for
    everything before.
    """
    N: gl.constexpr = s.shape[1]
    RISE: gl.constexpr = FLOAT16_RISE if dtype == gl.float16 else 0
    s = softcap_tanh(s, mask.tanh_scale, CONFIG.softcap)
    if (n0 < tile.full_from) | (n0 + N > tile.full_to):
        n = gl.expand_dims(n0 + gl.arange(0, N, gl.SliceLayout(0, s.type.layout)), 0)
        s = hide(s, n, tile.first, tile.width)
    subtract = row_max
    rescale = gl.full([64], 1.0, gl.float32, row_max.type.layout)
    if online | (n0 < tile.online_until):
        highest = gl.max(s, 1) * mask.scale_log2
        highest = gl.where(highest > row_max + RISE, highest, row_max)
        # A row that has seen nothing yet has nothing to subtract: −inf − (−inf) would be NaN.
        subtract = gl.where(highest == float("-inf"), 0.0, highest)
        rescale = gl.exp2(row_max - subtract)
        row_max = highest
    return s, row_max, subtract, rescale


@gluon.jit
def exp_and_sum(s, subtract, rescale, row_sum, dtype: gl.constexpr, mask):
    """The second half: p, what it adds to the sums, and these."""
    p = gl.exp2(s * mask.scale_log2 - gl.expand_dims(subtract, 1))
    # The four threads of a row add up at the very end: a shuffle less in every block.
    block = thread_sums(p)
    return p.to(dtype), block, row_sum * split_d.along_rows(rescale, row_sum) + block


@gluon.jit
def thread_sums(x):
    """[64, 4]: sums over what each thread holds of a product's rows [64, N]; four threads share a row."""
    return gl.sum(gl.sum(x.reshape([64, x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def hide(s, n, first, width):
    """s, with −inf where a key n is not in its row's [first, first + width).

    In PTX, since ptxas would make all comparisons first and pack their results bit by bit: 453 instructions with 160
    registers, where this takes 161 (L7).
    """
    n, _ = gl.broadcast(n, s)
    first, _ = gl.broadcast(gl.expand_dims(first, 1), s)
    width, _ = gl.broadcast(gl.expand_dims(width, 1), s)
    HIDE: gl.constexpr = """{
        .reg .pred hidden; .reg .u32 at;
        sub.u32 at, $2, $3; setp.ge.u32 hidden, at, $4; selp.f32 $0, 0fFF800000, $1, hidden;
    }"""
    return gl.inline_asm_elementwise(HIDE, "=f,f,r,r,r", [s, n, first, width], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def outweighs(block, row_sum):
    """[64, 4] int32: 1 if, in some row of the warp, a thread's part of this block is more than 4/5 of its sum so
    far."""
    OUTWEIGHS: gl.constexpr = """{
        .reg .pred any; .reg .f32 most;
        mul.f32 most, $4, 0f3F4CCCCD; setp.gt.f32 any, $2, most;
        mul.f32 most, $5, 0f3F4CCCCD; setp.gt.or.f32 any, $3, most, any;
        vote.sync.any.pred any, any, 0xffffffff;
        selp.b32 $0, 1, 0, any; mov.b32 $1, $0;
    }"""
    return gl.inline_asm_elementwise(
        OUTWEIGHS, "=&r,=&r,f,f,f,f", [block, row_sum], dtype=gl.int32, is_pure=True, pack=2
    )


@gluon.jit
def rounding_excess(p, block, outweighing):
    """[64, 4]: by how much a block's weights, rounded as in `p`, sum to more than themselves, `block`. A row's excess
    is the sum over its four threads. 0 where `outweighing` is 0, which all threads of a warp agree on.

    In PTX, since Gluon branches for a whole warp group and synchronises it first.
    """
    N: gl.constexpr = p.shape[1] // 2  # numbers of a thread
    ASM: gl.constexpr = excess_of_rounding(N, p.dtype == gl.bfloat16)
    REGISTERS: gl.constexpr = registers_of_excess(N)
    arguments = [p, as_product(block, p), as_product(outweighing, p)]
    # Not pure, so that it stays where it is called.
    excess = gl.inline_asm_elementwise(ASM, REGISTERS, arguments, dtype=gl.float32, is_pure=False, pack=N)
    return first_of_rows(excess, block)


@gluon.constexpr_function
def registers_of_excess(n):
    return ",".join(["=&f"] * n + ["r"] * (n // 2) + ["f"] * n + ["r"] * n)


@gluon.constexpr_function
def excess_of_rounding(n, is_bfloat16):
    """PTX. A warp's weights lie as `mma` has its left side, so their sums are a product with ones."""
    dtype, one = ("bf16", "0x3F803F80") if is_bfloat16 else ("f16", "0x3C003C00")
    p, block, wanted = n, n + n // 2, 2 * n + n // 2
    lines = [
        f"mov.f32 $0, 0f00000000; mov.f32 $2, 0f00000000; setp.ne.u32 wanted, ${wanted}, 0; @!wanted bra.uni done;"
    ]
    lines += [f"mov.b32 one, {one};", *(f"mov.f32 sum{i}, 0f00000000;" for i in range(4))]
    sums = "{sum0, sum1, sum2, sum3}"
    for i in range(p, block, 4):
        left = f"{{${i}, ${i + 1}, ${i + 2}, ${i + 3}}}"
        lines += [f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {sums}, {left}, {{one, one}}, {sums};"]
    for row in (0, 2):  # a thread's two rows; the weights of a row are those of four threads
        lines += [f"neg.f32 less, ${block + row}; fma.rn.f32 ${row}, sum{row}, 0f3E800000, less;"]
    registers = ".reg .pred wanted; .reg .b32 one; .reg .f32 sum0, sum1, sum2, sum3, less;"
    return "{" + registers + " ".join(lines) + " done: }"


@gluon.jit
def not_finite(outs, row_sum):
    """[64, 4]: NaN where a thread holds an output of the row that is not finite, and 0 elsewhere.

    Nearly no warp has to look: while its four sums are below 2^8, values below 2^118 add up to less than float32 holds.
    """
    found = not_finite_part(outs[0], row_sum)
    for i in gl.static_range(1, len(outs)):
        found += not_finite_part(outs[i], row_sum)
    return found


@gluon.jit
def not_finite_part(x, row_sum):
    N: gl.constexpr = x.shape[1] // 2  # numbers of a thread
    ASM: gl.constexpr = overflow_of(N)
    REGISTERS: gl.constexpr = split_d.registers(N)
    found = gl.inline_asm_elementwise(
        ASM, REGISTERS, [x, as_product(row_sum, x)], dtype=gl.float32, is_pure=True, pack=N
    )
    return first_of_rows(found, row_sum)


@gluon.constexpr_function
def overflow_of(n):
    """PTX: 0 times what is not finite is NaN."""
    lines = ["mov.f32 $0, 0f00000000; mov.f32 $2, 0f00000000;"]
    lines += [f"setp.geu.f32 any, ${2 * n}, 0f43800000; setp.geu.or.f32 any, ${2 * n + 2}, 0f43800000, any;"]
    lines += ["vote.sync.any.pred any, any, 0xffffffff; @!any bra.uni done;"]
    lines += [f"fma.rn.f32 ${i % 4 // 2 * 2}, ${n + i}, 0f00000000, ${i % 4 // 2 * 2};" for i in range(n)]
    return "{ .reg .pred any; " + " ".join(lines) + " done: }"


@gluon.jit
def as_product(x, like):
    """x [64, 4], a number of each thread for each of its rows, with the shape and layout of a product [64, N]."""
    x = gl.expand_dims(gl.expand_dims(x, 1), 3)
    x = x.broadcast_to([64, like.shape[1] // 8, 4, 2]).reshape(like.shape)
    return gl.convert_layout(x, like.type.layout, assert_trivial=True)


@gluon.jit
def first_of_rows(x, like):
    """[64, 4]: of a product's rows [64, N] the first number that each thread holds."""
    N: gl.constexpr = x.shape[1]
    x, _ = gl.split(x.reshape([64, N // 8, 4, 2]))
    x = x.permute([0, 2, 1])
    for _ in gl.static_range(log2(N // 8)):
        x, _ = gl.split(x.reshape([64, 4, x.shape[2] // 2, 2]))
    return gl.convert_layout(x.reshape([64, 4]), like.type.layout, assert_trivial=True)


@gluon.constexpr_function
def log2(n):
    return n.bit_length() - 1
