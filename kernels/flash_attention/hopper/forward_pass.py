"""Flash attention's forward pass for Hopper, in Gluon: TMA, asynchronous products, and warps with one task each.

A program is one producer warp, which loads tiles by TMA, and two or three consumer warp groups, each with 64 queries
of its own. A barrier in shared memory says that a tile has arrived, and at one of the multiprocessor's the consumers
report that they have read it. A consumer keeps two products in flight, the scores of block i + 1 and the values of
block i, and computes one softmax under them (Shah et al. 2024, arXiv:2407.08608, section 3.2). Consumers start their
products in turns, so that one's products run under another's softmax (section 3.1 there).

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
    FREE_BARRIERS,
    LN2,
    LOG2E,
    Kind,
    Mask,
    async_load,
    async_store,
    barriers,
    make_queue,
    meet,
    next_item,
    receive_item,
    report,
    seen_by,
    tanh,
)


@dataclass(frozen=True)
class Forward(Kind):
    """How the kernel cuts its work."""

    consumers: int
    """Warp groups with 64 queries each."""
    key_stages: int
    value_stages: int
    """Tiles of keys, and of values, in shared memory. A tile of values is read a block after the keys of its own."""
    columns: tuple[int, ...]
    """How head_dim is cut into powers of two, which is what a product can have: 96 is 64 + 32. Tiles in shared memory
    have the next power of two, and what is beyond these columns is left alone."""
    own_out: bool
    """The outputs have shared memory of their own; otherwise they replace the queries, and the next must wait."""


class Ring(NamedTuple):
    """Tiles of keys or values in shared memory, used in turn."""

    tiles: Any
    full: Any
    """A barrier for each: it has arrived."""
    read: Any
    """The first of as many of the multiprocessor's barriers: consumers have read it."""


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
    BYTES: gl.constexpr = 64 * keys.tiles.shape[4] * keys.tiles.dtype.primitive_bitwidth // 8
    CONSUMERS: gl.constexpr = CONFIG.consumers
    n = 0
    step = 0
    item = next_item(queue, n)
    while item < queue.n_items:
        b, h, m0 = locate(item, n_tiles, CONFIG)
        i0, i1, _, _ = blocks_seen(m0, 64 * CONSUMERS, b, mask, N, CONFIG)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(queries.empty.index(c), (n & 1) ^ 1)
            mbarrier.expect(queries.full.index(c), BYTES)
            async_load(q_rows, [b, h, m0 + c * 64, 0], queries.full.index(c), queries.q.index(c))
        for i in range(i0, i1):
            load_tile(k_rows, [b, h // CONFIG.group, i * N, 0], keys, step, CONFIG)
            load_tile(v_rows, [b, h // CONFIG.group, i * N, 0], values, step, CONFIG)
            step += 1
        n += 1
        item = next_item(queue, n)


@gluon.jit
def load_tile(rows, at, ring, step, CONFIG: gl.constexpr):
    """The step's tile, in the place of one that all consumers have read."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    BYTES: gl.constexpr = ring.tiles.shape[3] * ring.tiles.shape[4] * ring.tiles.dtype.primitive_bitwidth // 8
    stage = step % STAGES
    if step >= STAGES:
        meet(ring.read + stage, 32 + 128 * CONFIG.consumers)
    mbarrier.expect(ring.full.index(stage), BYTES)
    async_load(rows, at, ring.full.index(stage), ring.tiles.index(stage))


@gluon.jit
def await_tile(ring, step, wanted):
    """Wait until the step's tile has arrived, if it is wanted."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.full.index(step % STAGES), step // STAGES & 1, pred=wanted)


@gluon.jit
def tile_of(ring, step):
    """[N, D]: the step's tile."""
    return ring.tiles.index(step % ring.tiles.shape[0]).reshape([ring.tiles.shape[3], ring.tiles.shape[4]])


@gluon.jit
def release(ring, step, CONFIG: gl.constexpr):
    """The calling consumer has read the step's tile."""
    report(ring.read + step % ring.tiles.shape[0], 32 + 128 * CONFIG.consumers)


@gluon.jit
def take_turn(c: gl.constexpr):
    """Wait until the consumer before c has started its products."""
    meet(FREE_BARRIERS + c, 256)


@gluon.jit
def pass_turn(c: gl.constexpr, CONFIG: gl.constexpr):
    report(FREE_BARRIERS + (c + 1) % CONFIG.consumers, 256)


@gluon.jit
def part(tile, i: gl.constexpr, CONFIG: gl.constexpr):
    """The i-th part of the columns of a tile in shared memory."""
    FIRST: gl.constexpr = CONFIG.columns[0] * i
    return tile.slice(FIRST, CONFIG.columns[i], 1)


@gluon.jit
def multiply_scores(q, keys, step, scores: gl.constexpr, CONFIG: gl.constexpr):
    """Start q kᵀ of the step's keys."""
    N: gl.constexpr = keys.tiles.shape[3]
    k = tile_of(keys, step)
    s = gl.zeros([64, N], gl.float32, scores)
    s = warpgroup_mma(part(q, 0, CONFIG), part(k, 0, CONFIG).permute((1, 0)), s, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(CONFIG.columns)):
        s = warpgroup_mma(part(q, i, CONFIG), part(k, i, CONFIG).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def multiply_values(p, values, step, outs, CONFIG: gl.constexpr):
    """Start out + p v of the step's values: as many products as head_dim has parts."""
    v = tile_of(values, step)
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
def pass_over(c: gl.constexpr, n_blocks, step, keys, values, CONFIG: gl.constexpr):
    """Leave blocks to the other consumers; returns the steps so far."""
    for _ in range(n_blocks):
        take_turn(c)
        pass_turn(c, CONFIG)
        await_tile(keys, step, True)
        release(keys, step, CONFIG)
        await_tile(values, step, True)
        release(values, step, CONFIG)
        step += 1
    return step


@gluon.jit
def by_thread(x):
    """[64, 4]: sums over what each thread holds of a product's rows [64, N]; four threads share a row."""
    return gl.sum(gl.sum(x.reshape([64, x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def hide(s, n, first, width):
    """s, with −inf where a key n is not in its row's [first, first + width).

    In words of PTX, since ptxas would compare all of them before it chooses among any, and put the answers away bit by
    bit: 453 instructions with 160 registers where this takes 161.
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
def maximum(s, row_max, first, width, n0, full_from, full_to, mask, CONFIG: gl.constexpr):
    """The first half of a block's online softmax: the masked scores, the new maximum, what to subtract, and the factor
    for everything before."""
    N: gl.constexpr = s.shape[1]
    if CONFIG.softcap:
        s = tanh(s * mask.cap)
    if (n0 < full_from) | (n0 + N > full_to):
        n = gl.expand_dims(n0 + gl.arange(0, N, gl.SliceLayout(0, s.type.layout)), 0)
        s = hide(s, n, first, width)
    new_max = gl.maximum(row_max, gl.max(s, 1) * mask.factor)
    # A row that has seen nothing yet has no maximum to subtract: −inf − (−inf) would be NaN.
    pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    return s, new_max, pivot, gl.exp2(row_max - pivot)


@gluon.jit
def weigh(s, pivot, rescale, row_sum, dtype: gl.constexpr, mask):
    """The second half: p, and the new sums."""
    p = gl.exp2(s * mask.factor - gl.expand_dims(pivot, 1))
    # The four threads of a row add up at the very end: a shuffle less in every block.
    row_sum = row_sum * along_rows(rescale, row_sum) + by_thread(p)
    return p.to(dtype), row_sum


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
    if c == CONFIG.consumers - 1:
        pass_turn(c, CONFIG)  # the first one begins
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
        first, end = seen_by(mask, m, b, CONFIG)
        first = gl.maximum(first, 0) + gl.zeros([64], gl.int32, row)
        width = gl.maximum(end - first, 0)
        row_max = gl.full([64], float("-inf"), gl.float32, row)
        row_sum = by_thread(gl.zeros([64, N], gl.float32, scores))
        if sinks_ptr is not None:
            row_max = gl.full([64], 0.0, gl.float32, row) + gl.load(sinks_ptr + h).to(gl.float32) * LOG2E
            row_sum += 0.25
        outs = zero_outputs(CONFIG)
        step = pass_over(c, i0 - tile_i0, step, keys, values, CONFIG)
        mbarrier.wait(queries.full.index(c), n & 1)
        if i0 < i1:
            await_tile(keys, step, True)
            take_turn(c)
            s = multiply_scores(q, keys, step, scores, CONFIG)
            pass_turn(c, CONFIG)
            s = warpgroup_mma_wait(0, deps=[s])
            release(keys, step, CONFIG)
            s, row_max, pivot, rescale = maximum(s, row_max, first, width, i0 * N, full_from, full_to, mask, CONFIG)
            await_tile(keys, step + 1, i0 + 1 < i1)
            await_tile(values, step, True)
            p, row_sum = weigh(s, pivot, rescale, row_sum, dtype, mask)
            for i in range(i0 + 1, i1):
                take_turn(c)
                s = multiply_scores(q, keys, step + 1, scores, CONFIG)
                outs = multiply_values(p, values, step, outs, CONFIG)
                pass_turn(c, CONFIG)
                s = warpgroup_mma_wait(len(CONFIG.columns), deps=[s])
                release(keys, step + 1, CONFIG)
                s, row_max, pivot, rescale = maximum(s, row_max, first, width, i * N, full_from, full_to, mask, CONFIG)
                # Here, and not where the tiles are used: under the maximum it takes no time. And its branch ends the
                # straight code to whose front, above the maximum, ptxas would otherwise move the wait for p v.
                await_tile(keys, step + 2, i + 1 < i1)
                await_tile(values, step + 1, True)
                outs = wait_values(outs)
                release(values, step, CONFIG)
                # Before the exponentials, whose gaps these products fill.
                outs = scale_outputs(outs, rescale)
                p, row_sum = weigh(s, pivot, rescale, row_sum, dtype, mask)
                step += 1
            if CONFIG.own_out:
                mbarrier.arrive(queries.empty.index(c), count=1)
            outs = wait_values(multiply_values(p, values, step, outs, CONFIG))
            release(values, step, CONFIG)
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
        step = pass_over(c, tile_i1 - i1, step, keys, values, CONFIG)
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
    mask = Mask(S, S_k, window, starts_ptr, cap, factor)
    k = gl.allocate_shared_memory(dtype, [CONFIG.key_stages] + k_rows.block_shape, k_rows.layout)
    v = gl.allocate_shared_memory(dtype, [CONFIG.value_stages] + v_rows.block_shape, v_rows.layout)
    # Of the multiprocessor's barriers: one for each consumer's turn, and one for each tile.
    READ: gl.constexpr = FREE_BARRIERS + CONSUMERS
    gl.static_assert(READ + CONFIG.key_stages + CONFIG.value_stages <= 16)
    keys = Ring(k, barriers(CONFIG.key_stages, 1), READ)
    values = Ring(v, barriers(CONFIG.value_stages, 1), READ + CONFIG.key_stages)
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
