"""Flash attention's forward pass for Hopper, in Gluon: TMA, asynchronous products, and warps with one task each.

A program is one producer warp, which loads tiles by TMA, and two or three consumer warp groups, each with 64 queries
of its own. Barriers in shared memory connect them: a tile is `full` when its bytes have arrived and `empty` when every
consumer has read it. A consumer keeps two products in flight, the scores of block i + 1 and the values of block i, and
computes one softmax under them (Shah et al. 2024, arXiv:2407.08608, section 3.2).

Programs stay and take tile after tile from a queue, the longest first, so that one tile's loads run under the end of
the one before. docs/kernels/hopper.md has the measurements.
"""

# mypy: disable-error-code="assignment"
# Triton's tuples grow where Python's types do not.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import (
    LN2,
    LOG2E,
    Kind,
    Mask,
    async_load,
    async_store,
    barriers,
    make_queue,
    next_item,
    receive_item,
    seen_by,
    sees,
    start_of,
    tanh,
)


@dataclass(frozen=True)
class Forward(Kind):
    """How the kernel cuts its work."""

    consumers: int
    """Warp groups with 64 queries each."""
    stages: int
    """Tiles of keys, and of values, in shared memory."""
    columns: tuple[int, ...]
    """How head_dim is cut into powers of two, which is what a product can have: 96 is 64 + 32. Tiles in shared memory
    have the next power of two, and what is beyond these columns is left alone."""
    own_out: bool
    """The outputs have shared memory of their own; otherwise they replace the queries, and the next must wait."""


class Ring(NamedTuple):
    """Tiles of keys or values in shared memory, and the barriers of each."""

    tiles: Any
    full: Any
    empty: Any


class Queries(NamedTuple):
    """Each consumer's 64 queries, and where it puts its outputs: in memory of their own, or over the queries."""

    q: Any
    out: Any
    full: Any
    empty: Any


@gluon.jit
def locate(item, n_tiles, CONFIG: gl.constexpr):
    """(b, h, m0) of an item.

    Head after head, or group after group that shares keys, so that they stay in the L2 cache; the last tile first.
    """
    in_group = item % (n_tiles * CONFIG.group)
    head = item // (n_tiles * CONFIG.group) * CONFIG.group + in_group % CONFIG.group
    m0 = (n_tiles - 1 - in_group // CONFIG.group) * (64 * CONFIG.consumers)
    return head // CONFIG.heads, head % CONFIG.heads, m0


@gluon.jit
def blocks_seen(m0, M: gl.constexpr, b, mask, N: gl.constexpr, CONFIG: gl.constexpr):
    """The blocks of N keys [i0, i1) that some of M queries see, and the keys [from, to) that all of them see."""
    some_from, full_to = seen_by(mask, m0, b, CONFIG)
    full_from, some_to = seen_by(mask, gl.minimum(m0 + M, mask.S) - 1, b, CONFIG)
    i0 = gl.maximum(some_from, 0) // N
    return i0, gl.maximum(gl.cdiv(some_to, N), i0), full_from, full_to


@gluon.jit
def producer(q_rows, k_rows, v_rows, queue, n_tiles, queries, keys, values, mask, CONFIG: gl.constexpr):
    N: gl.constexpr = keys.tiles.shape[3]
    D: gl.constexpr = keys.tiles.shape[4]
    BYTES: gl.constexpr = keys.tiles.dtype.primitive_bitwidth // 8
    CONSUMERS: gl.constexpr = CONFIG.consumers
    n = 0
    step = 0
    item = next_item(queue, n)
    while item < queue.n_items:
        b, h, m0 = locate(item, n_tiles, CONFIG)
        i0, i1, _, _ = blocks_seen(m0, 64 * CONSUMERS, b, mask, N, CONFIG)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(queries.empty.index(c), (n & 1) ^ 1)
            mbarrier.expect(queries.full.index(c), 64 * D * BYTES)
            async_load(q_rows, [b, h, m0 + c * 64, 0], queries.full.index(c), queries.q.index(c))
        for i in range(i0, i1):
            stage = step % CONFIG.stages
            phase = step // CONFIG.stages & 1
            at = [b, h // CONFIG.group, i * N, 0]
            mbarrier.wait(keys.empty.index(stage), phase ^ 1)
            mbarrier.expect(keys.full.index(stage), N * D * BYTES)
            async_load(k_rows, at, keys.full.index(stage), keys.tiles.index(stage))
            mbarrier.wait(values.empty.index(stage), phase ^ 1)
            mbarrier.expect(values.full.index(stage), N * D * BYTES)
            async_load(v_rows, at, values.full.index(stage), values.tiles.index(stage))
            step += 1
        n += 1
        item = next_item(queue, n)


@gluon.jit
def part(tile, i: gl.constexpr, CONFIG: gl.constexpr):
    """The i-th part of the columns of a tile in shared memory."""
    FIRST: gl.constexpr = CONFIG.columns[0] * i
    return tile.slice(FIRST, CONFIG.columns[i], 1)


@gluon.jit
def multiply_scores(q, keys, step, scores: gl.constexpr, CONFIG: gl.constexpr):
    """Start q kᵀ of the step's keys, once they are there."""
    N: gl.constexpr = keys.tiles.shape[3]
    D: gl.constexpr = keys.tiles.shape[4]
    stage = step % CONFIG.stages
    mbarrier.wait(keys.full.index(stage), step // CONFIG.stages & 1)
    k = keys.tiles.index(stage).reshape([N, D])
    s = gl.zeros([64, N], gl.float32, scores)
    s = warpgroup_mma(part(q, 0, CONFIG), part(k, 0, CONFIG).permute((1, 0)), s, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(CONFIG.columns)):
        s = warpgroup_mma(part(q, i, CONFIG), part(k, i, CONFIG).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def multiply_values(p, values, step, outs, CONFIG: gl.constexpr):
    """Start out + p v of the step's values, once they are there."""
    N: gl.constexpr = values.tiles.shape[3]
    D: gl.constexpr = values.tiles.shape[4]
    stage = step % CONFIG.stages
    mbarrier.wait(values.full.index(stage), step // CONFIG.stages & 1)
    v = values.tiles.index(stage).reshape([N, D])
    sums = ()
    for i in gl.static_range(len(CONFIG.columns)):
        sums += (multiply_part(p, part(v, i, CONFIG), outs[i]),)
    return sums


@gluon.jit
def multiply_part(p, v, out):
    weights: gl.constexpr = gl.DotOperandLayout(0, out.type.layout, 2)
    return warpgroup_mma(gl.convert_layout(p, weights), v, out, is_async=True)


@gluon.jit
def wait_values(outs):
    """What `multiply_values` started, complete."""
    outs = warpgroup_mma_wait(0, deps=outs)
    return outs if isinstance(outs, gl.tuple) else (outs,)


@gluon.jit
def zero_outputs(CONFIG: gl.constexpr):
    """A tuple of [64, columns] for the parts of head_dim; the functions below take and return such tuples."""
    outs = ()
    for i in gl.static_range(len(CONFIG.columns)):
        outs += (zero_part(CONFIG.columns[i]),)
    return outs


@gluon.jit
def zero_part(COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.zeros([64, COLUMNS], gl.float32, layout)


@gluon.jit
def scale_outputs(outs, factor):
    """Each row times its factor [64]."""
    products = ()
    for i in gl.static_range(len(outs)):
        products += (outs[i] * along_rows(factor, outs[i]),)
    return products


@gluon.jit
def store_outputs(outs, tile, CONFIG: gl.constexpr):
    for i in gl.static_range(len(CONFIG.columns)):
        part(tile, i, CONFIG).store(outs[i].to(tile.dtype))


@gluon.jit
def pass_over(n_blocks, step, keys, values, CONFIG: gl.constexpr):
    """Leave blocks to the other consumers; returns the steps so far."""
    for _ in range(n_blocks):
        stage = step % CONFIG.stages
        phase = step // CONFIG.stages & 1
        mbarrier.wait(keys.full.index(stage), phase)
        mbarrier.arrive(keys.empty.index(stage), count=1)
        mbarrier.wait(values.full.index(stage), phase)
        mbarrier.arrive(values.empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit
def by_thread(x):
    """[64, 4]: sums over what each thread holds of a product's rows [64, N]; four threads share a row."""
    return gl.sum(gl.sum(x.reshape([64, x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def softmax(s, row_max, row_sum, m0, start, n0, full_from, full_to, mask, CONFIG: gl.constexpr):
    """One block of the online softmax: p, the new maximum and sum, and the factor for everything before."""
    scores: gl.constexpr = s.type.layout
    N: gl.constexpr = s.shape[1]
    if CONFIG.softcap:
        s = tanh(s * mask.cap)
    if (n0 < full_from) | (n0 + N > full_to):
        m = gl.expand_dims(m0 + gl.arange(0, 64, gl.SliceLayout(1, scores)), 1)
        n = gl.expand_dims(n0 + gl.arange(0, N, gl.SliceLayout(0, scores)), 0)
        s = gl.where(sees(mask, m, start, n, CONFIG), s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * mask.factor)
    # A row that has seen nothing yet has no maximum to subtract: −inf − (−inf) would be NaN.
    pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(s * mask.factor - gl.expand_dims(pivot, 1))
    rescale = gl.exp2(row_max - pivot)
    # The four threads of a row add up at the very end: a shuffle less in every block.
    row_sum = row_sum * along_rows(rescale, row_sum) + by_thread(p)
    return p, new_max, row_sum, rescale


@gluon.jit
def along_rows(x, like):
    """x [64] as a factor for the rows of `like`; each thread has the rows it needs."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True), 1)


@gluon.jit
def consumer(
    c: gl.constexpr, out_rows, lse_ptr, sinks_ptr, queue, n_tiles, queries, keys, values, mask, CONFIG: gl.constexpr
):
    """Queries [64 c, 64 c + 64) of each tile."""
    N: gl.constexpr = keys.tiles.shape[3]
    D: gl.constexpr = keys.tiles.shape[4]
    dtype: gl.constexpr = keys.tiles.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    row: gl.constexpr = gl.SliceLayout(1, scores)
    q = queries.q.index(c).reshape([64, D])
    n = 0
    step = 0
    item = receive_item(queue, n)
    while item < queue.n_items:
        b, h, m0 = locate(item, n_tiles, CONFIG)
        tile_i0, tile_i1, _, _ = blocks_seen(m0, 64 * CONFIG.consumers, b, mask, N, CONFIG)
        m0 += c * 64
        # Its own queries see fewer blocks than the tile's, and have fewer edges in them.
        i0, i1, full_from, full_to = blocks_seen(gl.minimum(m0, mask.S - 1), 64, b, mask, N, CONFIG)
        i0 = gl.maximum(gl.minimum(i0, tile_i1), tile_i0)
        i1 = gl.maximum(gl.minimum(i1, tile_i1), i0)
        m = m0 + gl.arange(0, 64, row)
        start = gl.expand_dims(start_of(mask, m, b, CONFIG), 1) if CONFIG.starts else 0
        row_max = gl.full([64], float("-inf"), gl.float32, row)
        row_sum = by_thread(gl.zeros([64, N], gl.float32, scores))
        if sinks_ptr is not None:
            row_max = gl.full([64], 0.0, gl.float32, row) + gl.load(sinks_ptr + h).to(gl.float32) * LOG2E
            row_sum += 0.25
        outs = zero_outputs(CONFIG)
        step = pass_over(i0 - tile_i0, step, keys, values, CONFIG)
        mbarrier.wait(queries.full.index(c), n & 1)
        if i0 < i1:
            s = multiply_scores(q, keys, step, scores, CONFIG)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(keys.empty.index(step % CONFIG.stages), count=1)
            p, row_max, row_sum, rescale = softmax(
                s, row_max, row_sum, m0, start, i0 * N, full_from, full_to, mask, CONFIG
            )
            p = p.to(dtype)
            for i in range(i0 + 1, i1):
                s = multiply_scores(q, keys, step + 1, scores, CONFIG)
                outs = multiply_values(p, values, step, outs, CONFIG)
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(keys.empty.index((step + 1) % CONFIG.stages), count=1)
                p, row_max, row_sum, rescale = softmax(
                    s, row_max, row_sum, m0, start, i * N, full_from, full_to, mask, CONFIG
                )
                outs = wait_values(outs)
                mbarrier.arrive(values.empty.index(step % CONFIG.stages), count=1)
                outs = scale_outputs(outs, rescale)
                p = p.to(dtype)
                step += 1
            if CONFIG.own_out:
                mbarrier.arrive(queries.empty.index(c), count=1)
            outs = wait_values(multiply_values(p, values, step, outs, CONFIG))
            mbarrier.arrive(values.empty.index(step % CONFIG.stages), count=1)
            step += 1
        elif CONFIG.own_out:
            mbarrier.arrive(queries.empty.index(c), count=1)

        row_sum = gl.convert_layout(gl.sum(row_sum, 1), row, assert_trivial=True)
        row_sum = gl.where(row_sum == 0, 1.0, row_sum)  # saw nothing: out 0, LSE −inf + log 1
        if CONFIG.own_out:
            tma.store_wait(0)  # the tile before has left its memory
        store_outputs(scale_outputs(outs, 1 / row_sum), queries.out.index(c).reshape([64, D]), CONFIG)
        fence_async_shared()
        async_store(out_rows, [b, h, m0, 0], queries.out.index(c))
        lse = (row_max + gl.log2(row_sum)) * LN2
        gl.store(lse_ptr + (b * CONFIG.heads + h).to(gl.int64) * mask.S + m, lse, mask=m < mask.S)
        if not CONFIG.own_out:
            tma.store_wait(0)
            mbarrier.arrive(queries.empty.index(c), count=1)
        step = pass_over(tile_i1 - i1, step, keys, values, CONFIG)
        n += 1
        item = receive_item(queue, n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_items", "n_tiles", "S", "S_k", "window"])
def forward_kernel(
    q_rows, k_rows, v_rows, out_rows, lse_ptr, starts_ptr, sinks_ptr, taken_ptr,
    n_items, n_tiles, S, S_k, window, cap, factor, CONFIG: gl.constexpr,
):  # fmt: skip
    """out and LSE; see `consumer`."""
    dtype: gl.constexpr = q_rows.dtype
    CONSUMERS: gl.constexpr = CONFIG.consumers
    STAGES: gl.constexpr = CONFIG.stages
    mask = Mask(S, S_k, window, starts_ptr, cap, factor)
    k = gl.allocate_shared_memory(dtype, [STAGES] + k_rows.block_shape, k_rows.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES] + v_rows.block_shape, v_rows.layout)
    keys = Ring(k, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    values = Ring(v, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    q = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_rows.block_shape, q_rows.layout)
    out = q
    if CONFIG.own_out:
        out = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_rows.block_shape, q_rows.layout)
    queries = Queries(q, out, barriers(CONSUMERS, 1), barriers(CONSUMERS, 1))
    queue = make_queue(n_items, taken_ptr, CONSUMERS)
    fence_async_shared()

    # Registers per thread; the first partition has what the others leave.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (0, out_rows, lse_ptr, sinks_ptr, queue, n_tiles, queries, keys, values, mask, CONFIG)),
                (consumer, (1, out_rows, lse_ptr, sinks_ptr, queue, n_tiles, queries, keys, values, mask, CONFIG)),
                (producer, (q_rows, k_rows, v_rows, queue, n_tiles, queries, keys, values, mask, CONFIG)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, out_rows, lse_ptr, sinks_ptr, queue, n_tiles, queries, keys, values, mask, CONFIG)),
                (consumer, (1, out_rows, lse_ptr, sinks_ptr, queue, n_tiles, queries, keys, values, mask, CONFIG)),
                (consumer, (2, out_rows, lse_ptr, sinks_ptr, queue, n_tiles, queries, keys, values, mask, CONFIG)),
                (producer, (q_rows, k_rows, v_rows, queue, n_tiles, queries, keys, values, mask, CONFIG)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
