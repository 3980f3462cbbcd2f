"""Flash attention's forward pass for Hopper, in Gluon: one producer warp, and two or three consumer warp groups.

A program owns a tile of queries, 64 for each consumer, and streams past blocks of N keys that some of them see.

    time →         step i                                          step i + 1
    producer       TMA: K of i + 2 and V of i + 1, and further ahead as stages become free
    consumer 0     Q·Kᵀ of i + 1 and P·V of i │ softmax of i + 1 │ Q·Kᵀ of i + 2 and P·V of i + 1 │ …
    consumer 1     softmax of i               │ Q·Kᵀ and P·V     │ softmax of i + 1               │ …
    tensor cores   consumer 0's products      │ consumer 1's     │ consumer 0's                   │ …

Consumers start their products in turn (ping-pong), so that one's run under another's softmax (Shah et al. 2024,
arXiv:2407.08608, section 3.1). A consumer keeps two products in flight, the scores of the next block and the values of
this one (section 3.2 there). The softmax seldom looks for a row maximum: softmax.py.

Buffers, from their writer to who frees them:

    queries   64 rows per consumer   producer → their consumer, which writes its outputs over them and frees the stage
                                     once TMA has stored these (`release_queries`)
    keys      blocks of N            producer → all consumers; each frees a stage once its Q·Kᵀ is complete
    values    blocks of N            producer → all consumers; each frees a stage once its P·V is complete
                                     (`mma_partition`, or `release_early`), or in `skip_blocks` if only the others'
                                     queries see the block; the producer reuses it when all have

Programs are persistent and take work tile after work tile from a queue. One tile's loads run under the end of the one
before, and up to head_dim 192 its first scores do, too: under the last P·V, and under the store of the outputs (L8).
A work tile whose rows overflowed is computed a second time when there are no others left (`note_overflowed`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from . import config, softmax, split_d
from .compiler import new_value, wait_for_products
from .mask import LN2, Mask, keys_of_queries, seen_by
from .padding import Packed, load_tile, tokens_of_sequences
from .pipeline import (
    NAMED_BARRIERS,
    PRODUCER_WARP,
    TRITON_NAMED_BARRIERS,
    WARP_GROUP,
    NamedBarrierChannel,
    allocate_barriers,
    allocate_tiles,
    barrier_arrive,
    barrier_sync,
    bytes_of,
    load_panels,
    store_panels,
    wait_until_written,
)
from .scheduler import TileScheduler, make_queue, publish, receive, take, tile_of

QUERIES = gl.constexpr(config.QUERIES)

TURN_BARRIER = gl.constexpr(TRITON_NAMED_BARRIERS.value)
"""The named barriers: one for each consumer's turn, then one for each stage of keys, then one for each of values."""
TURN_THREADS = gl.constexpr(2 * WARP_GROUP.value)
"""At a turn's barrier: the consumer whose turn it is, and the one before it."""


class Queries(NamedTuple):
    """Tiles of 64 queries, `query_stages` for each consumer, later those of their outputs."""

    tiles: Any
    full: Any
    empty: Any
    """The outputs have left it."""
    overflowed: Any
    """[64] int32 for each: the work tile, in rows whose sum came to LIMIT or whose outputs are not finite, and −1 in
    the others."""


class Buffers(NamedTuple):
    q: Any
    """`Queries`."""
    k: Any
    v: Any
    """`NamedBarrierChannel`s of blocks of keys and of values."""
    done: Any
    """All consumers have come to the end of the queue for the first time."""


class QueryTile(NamedTuple):
    """A consumer's part of a work tile: 64 queries, and the blocks of keys that they see."""

    b: Any
    h: Any
    m0: Any
    i0: Any
    i1: Any
    """Blocks [i0, i1), one at least."""
    skip_before: Any
    skip_after: Any
    """How many blocks of the work tile only other consumers' queries see, before these and after them."""
    full_from: Any
    full_to: Any
    """The keys that all of the queries see."""
    online_until: Any
    """Blocks that begin before this key update `row_max`: at their end each query has seen a key."""
    first: Any
    width: Any
    """[64]: the keys that each of them sees."""


# ---- from a work tile to its queries and keys


@gluon.jit
def locate(work_tile, scheduler, CONFIG: gl.constexpr):
    """(b, h, m0) of a work tile."""
    head, tile = tile_of(work_tile, scheduler, CONFIG.group, CONFIG)
    m0 = (scheduler.n_tiles - 1 - tile) * (QUERIES * CONFIG.consumers)
    return head // CONFIG.heads, head % CONFIG.heads, m0


@gluon.jit
def blocks_seen(m0, M: gl.constexpr, b, mask, CONFIG: gl.constexpr):
    """The blocks of keys [i0, i1) that some of M queries see, one at least, and the keys [from, to) that all see."""
    some_from, some_to, full_from, full_to = keys_of_queries(mask, m0, M, b, CONFIG)
    i0 = gl.maximum(some_from, 0) // CONFIG.n
    return i0, gl.maximum(gl.cdiv(some_to, CONFIG.n), i0 + 1), full_from, full_to


@gluon.jit
def query_tile(work_tile, c: gl.constexpr, scheduler, mask, row_layout: gl.constexpr, CONFIG: gl.constexpr):
    """Consumer c's part of a work tile."""
    b, h, m0 = locate(work_tile, scheduler, CONFIG)
    all_i0, all_i1, _, _ = blocks_seen(m0, QUERIES * CONFIG.consumers, b, mask, CONFIG)
    m0 += c * QUERIES
    # Its own queries see fewer blocks than the work tile's, and have fewer edges in them.
    i0, i1, full_from, full_to = blocks_seen(gl.minimum(m0, mask.S - 1), QUERIES, b, mask, CONFIG)
    i0 = gl.maximum(gl.minimum(i0, all_i1 - 1), all_i0)
    i1 = gl.maximum(gl.minimum(i1, all_i1), i0 + 1)
    first, end = seen_by(mask, m0 + gl.arange(0, QUERIES, row_layout), b, CONFIG)
    first = gl.maximum(first, 0) + gl.zeros([QUERIES], gl.int32, row_layout)
    seen = gl.maximum(full_from, 0)
    online_until = gl.where(seen < full_to, seen + 1, mask.S_k)
    return QueryTile(
        b, h, m0, i0, i1, i0 - all_i0, all_i1 - i1, full_from, full_to, online_until, first, gl.maximum(end - first, 0)
    )


@gluon.jit
def stage_of(c: gl.constexpr, n, CONFIG: gl.constexpr):
    """Where consumer c's queries of the program's n-th work tile are."""
    return c * CONFIG.query_stages + n % CONFIG.query_stages


# ---- the producer: loads, and the list of work tiles to compute again


@gluon.jit
def load_partition(q_desc, k_desc, v_desc, lse_ptr, queue, scheduler, buffers, mask, packed, CONFIG: gl.constexpr):
    queries, keys, values = buffers.q, buffers.k, buffers.v
    N: gl.constexpr = CONFIG.n
    CONSUMERS: gl.constexpr = CONFIG.consumers
    PANELS: gl.constexpr = split_d.n_panels(q_desc.block_shape[3], CONFIG.columns)
    n = 0
    step = 0
    repeating = 0
    redo = gl.to_tensor(-1)
    work_tile = take(queue, n)
    while work_tile < queue.n_work_tiles:
        b, h, m0 = locate(work_tile, scheduler, CONFIG)
        i0, i1, _, _ = blocks_seen(m0, QUERIES * CONSUMERS, b, mask, CONFIG)
        tokens = tokens_of_sequences(b, mask.S, packed)
        for c in gl.static_range(CONSUMERS):
            stage = stage_of(c, n, CONFIG)
            mbarrier.wait(queries.empty.index(stage), (n // CONFIG.query_stages & 1) ^ 1)
            full = queries.full.index(stage)
            mbarrier.expect(full, bytes_of(PANELS, q_desc))
            load_panels(q_desc, b, h, m0 + c * QUERIES, full, queries.tiles, stage, PANELS)
        if repeating == 0:
            redo = note_overflowed(n, redo, lse_ptr, queries, scheduler, mask, CONFIG)
        for i in range(i0, i1 - 1):
            keys.load(k_desc, b, h // CONFIG.group, i * N, step)
            load_values(v_desc, b, h // CONFIG.group, i * N, step, values, tokens, packed)
            step += 1
        n += 1
        # Taken before the last loads, so that no warp waits for it; earlier, and work would be shared less evenly (L8).
        if repeating == 0:
            work_tile = take(queue, n)
        keys.load(k_desc, b, h // CONFIG.group, i1 * N - N, step)
        load_values(v_desc, b, h // CONFIG.group, i1 * N - N, step, values, tokens, packed)
        step += 1
        # The second pass is in this loop, not in one around it: compiler.py (L11).
        if (work_tile >= queue.n_work_tiles) & (repeating == 0):
            mbarrier.wait(buffers.done.index(0), 0)
            for i in range(CONFIG.query_stages):
                redo = note_overflowed(n + i, redo, lse_ptr, queries, scheduler, mask, CONFIG)
            publish(queue, n + 1, gl.where(redo < 0, queue.n_work_tiles, redo))
            repeating = 1
        if repeating:
            work_tile = gl.where(redo < 0, queue.n_work_tiles, redo)
            redo = redo_before(redo, lse_ptr, scheduler, mask, CONFIG)
            publish(queue, n + 2, work_tile)


@gluon.jit
def load_values(v_desc, b, g, row, step, values, tokens, packed):
    """The step's values. Padding keys may be anything: `hide` replaces their scores."""
    PANELS: gl.constexpr = values.tiles.shape[0] // values.full.shape[0]
    stage = values.acquire(step)
    load_tile(v_desc, b, g, row, values.full.index(stage), values.tiles, stage, PANELS, tokens, packed)


@gluon.jit
def note_overflowed(n, redo, lse_ptr, queries, scheduler, mask, CONFIG: gl.constexpr):
    """Put the work tile that last used the n-th one's stages on the list of those to repeat, if a row overflowed.

    `redo` is the last on the list, −1 if there is none. The list is linked: where its first LSE will be, a work tile
    has the one before it, so no other memory is needed.
    """
    CONSUMERS: gl.constexpr = CONFIG.consumers
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    work_tiles = queries.overflowed.index(stage_of(0, n, CONFIG)).load(layout)
    for c in gl.static_range(1, CONSUMERS):
        work_tiles = gl.maximum(work_tiles, queries.overflowed.index(stage_of(c, n, CONFIG)).load(layout))
    work_tile = gl.max(work_tiles, 0)
    if work_tile >= 0:
        gl.store(first_lse(work_tile, lse_ptr, scheduler, mask, CONFIG), redo.to(gl.float32, bitcast=True))
        redo = work_tile
    return redo


@gluon.jit
def redo_before(work_tile, lse_ptr, scheduler, mask, CONFIG: gl.constexpr):
    before = work_tile
    if work_tile >= 0:
        before = gl.load(first_lse(work_tile, lse_ptr, scheduler, mask, CONFIG)).to(gl.int32, bitcast=True)
    return before


@gluon.jit
def first_lse(work_tile, lse_ptr, scheduler, mask, CONFIG: gl.constexpr):
    b, h, m0 = locate(work_tile, scheduler, CONFIG)
    return lse_ptr + (b * CONFIG.heads + h).to(gl.int64) * mask.S + m0


# ---- a consumer: products, softmax, outputs


@gluon.jit
def wait_for_turn(c: gl.constexpr):
    """Wait until the consumer before c has started its products."""
    barrier_sync(TURN_BARRIER + c, TURN_THREADS)


@gluon.jit
def pass_turn(c: gl.constexpr, CONFIG: gl.constexpr):
    barrier_arrive(TURN_BARRIER + (c + 1) % CONFIG.consumers, TURN_THREADS)


@gluon.jit
def multiply_scores(c: gl.constexpr, n, step, queries, keys, CONFIG: gl.constexpr):
    """Start Q·Kᵀ of consumer c's queries of the program's n-th work tile and the step's keys."""
    COLUMNS: gl.constexpr = CONFIG.columns
    q = split_d.of(queries.tiles, stage_of(c, n, CONFIG), COLUMNS)
    return split_d.multiply_transposed(q, split_d.of(keys.tiles, step % CONFIG.key_stages, COLUMNS))


@gluon.jit
def multiply_values(p, step, values, outs, CONFIG: gl.constexpr):
    """Start out + P·V of the step's values."""
    COLUMNS: gl.constexpr = CONFIG.columns_v
    return split_d.multiply(p, split_d.of(values.tiles, step % CONFIG.value_stages, COLUMNS), outs)


@gluon.jit
def store(c: gl.constexpr, n, repeating, origin, outs, sums, out_desc, lse_ptr, queries, mask, CONFIG: gl.constexpr):
    """The epilogue: out, over the queries of the program's n-th work tile and from there to global memory, and LSE."""
    work_tile, b, h, m0 = origin
    row_max, row_sum, excess = sums
    row_layout: gl.constexpr = row_max.type.layout
    COLUMNS: gl.constexpr = CONFIG.columns_v
    PANELS: gl.constexpr = split_d.n_panels(out_desc.block_shape[3], COLUMNS)
    if queries.tiles.dtype == gl.bfloat16:  # float16 has no values so large
        # NaN in rows that overflowed, and so are their out and LSE until the work tile is repeated.
        row_sum = gl.where(repeating > 0, row_sum, row_sum + softmax.not_finite(outs, row_sum))
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), row_layout, assert_trivial=True)
    excess = gl.convert_layout(gl.sum(excess, 1), row_layout, assert_trivial=True)
    stage = stage_of(c, n, CONFIG)
    row_sum = gl.where(row_sum == 0, 1.0, row_sum)  # saw nothing: out 0, LSE −inf + log 1
    outs = split_d.scale(outs, 1 / (row_sum + excess))
    first = stage * split_d.n_panels(queries.tiles.shape[4], CONFIG.columns)  # Q may have more panels than out
    split_d.store(outs, split_d.from_panel(queries.tiles, first, COLUMNS))
    fence_async_shared()
    store_panels(out_desc, b, h, m0, queries.tiles, first, PANELS)
    m = m0 + gl.arange(0, QUERIES, row_layout)
    # Rows past S may have seen no key before the other rows had, and so have subtracted −inf.
    queries.overflowed.index(stage).store(gl.where((row_sum < softmax.LIMIT) | (m >= mask.S), -1, work_tile))
    lse = (row_max + gl.log2(row_sum)) * LN2
    gl.store(lse_ptr + (b * CONFIG.heads + h).to(gl.int64) * mask.S + m, lse, mask=m < mask.S)


@gluon.jit
def release_queries(queries, c: gl.constexpr, n, CONFIG: gl.constexpr):
    """The producer may overwrite the n-th work tile's queries, once the outputs that replaced them are stored."""
    tma.store_wait(0)
    mbarrier.arrive(queries.empty.index(stage_of(c, n, CONFIG)), count=1)


@gluon.jit
def skip_blocks(c: gl.constexpr, n_blocks, step, keys, values, CONFIG: gl.constexpr):
    """Leave blocks to the other consumers: take part in turns and releases. Returns the steps so far."""
    for _ in range(n_blocks):
        wait_for_turn(c)
        pass_turn(c, CONFIG)
        keys.wait(step, True)
        keys.release(step)
        values.wait(step, True)
        values.release(step)
        step += 1
    return step


@gluon.jit
def release_early(values, step, needed):
    """Wait for the P·V with the step's values, if needed, and release them."""
    if needed:
        wait_for_products()
        values.release(step)


@gluon.jit
def begin(
    c: gl.constexpr, IN_FLIGHT: gl.constexpr, n, repeating, step, skip_after, queue, scheduler, buffers, mask,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """The prologue: skip `skip_after` blocks of the work tile before, and start the first scores of the program's n-th
    one.

    If IN_FLIGHT, the last P·V still runs, and the caller releases its V stage. A consumer that first skips as many
    blocks as there are V stages would wait forever for a block that needs this stage: then it is released here.

    Returns the work tile, n_work_tiles or more when there is none left; this consumer's part of it; the step of the
    scores; these, of no meaning when there is no work tile; and whether the V stage is still to be released.
    """
    queries, keys, values = buffers.q, buffers.k, buffers.v
    STAGES: gl.constexpr = CONFIG.value_stages
    row_layout: gl.constexpr = gl.SliceLayout(1, split_d.mma_layout(CONFIG.n))
    previous = step - 1
    if IN_FLIGHT:
        release_early(values, previous, skip_after >= STAGES)
    step = skip_blocks(c, skip_after, step, keys, values, CONFIG)
    work_tile = receive(queue, n + 2 * repeating)
    there_is = work_tile < queue.n_work_tiles
    tile = query_tile(gl.minimum(work_tile, queue.n_work_tiles - 1), c, scheduler, mask, row_layout, CONFIG)
    skip_before = gl.where(there_is, tile.skip_before, 0)
    if IN_FLIGHT:
        release_early(values, previous, (skip_after < STAGES) & (skip_after + skip_before >= STAGES))
    step = skip_blocks(c, skip_before, step, keys, values, CONFIG)
    stage = stage_of(c, n, CONFIG)
    mbarrier.wait(queries.full.index(stage), n // CONFIG.query_stages & 1, pred=there_is)
    keys.wait(step, there_is)
    wait_for_turn(c)
    s = multiply_scores(c, n, step, queries, keys, CONFIG)
    pass_turn(c, CONFIG)
    return work_tile, tile, step, s, skip_after + skip_before < STAGES


@gluon.jit
def mma_partition(c: gl.constexpr, out_desc, lse_ptr, sinks_ptr, queue, scheduler, buffers, mask, CONFIG: gl.constexpr):
    """Consumer c: queries [64 c, 64 c + 64) of each work tile."""
    queries, keys, values = buffers.q, buffers.k, buffers.v
    N: gl.constexpr = CONFIG.n
    dtype: gl.constexpr = keys.tiles.dtype
    JOINED: gl.constexpr = CONFIG.query_stages > 1  # one tile's epilogue and the next one's prologue
    COLUMNS_V: gl.constexpr = CONFIG.columns_v
    K_PRODUCTS: gl.constexpr = len(CONFIG.columns)
    V_PRODUCTS: gl.constexpr = len(CONFIG.columns_v)
    n = 0
    step = 0
    repeating = 0
    if c == CONFIG.consumers - 1:
        pass_turn(c, CONFIG)  # the first one begins
    while repeating < 2:
        # All blocks update `row_max`. Weights as float16 end at 65,504.
        online = (repeating > 0) | (dtype == gl.float16)
        work_tile, tile, step, s, _ = begin(c, False, n, repeating, step, 0, queue, scheduler, buffers, mask, CONFIG)
        s = warpgroup_mma_wait(0, deps=[s])
        if work_tile < queue.n_work_tiles:
            keys.release(step)
        while work_tile < queue.n_work_tiles:
            row_max, row_sum, excess = softmax.nothing_seen(s, sinks_ptr, tile)
            s, row_max, subtract, rescale = softmax.maximum(s, row_max, tile, tile.i0 * N, True, dtype, mask, CONFIG)
            keys.wait(step + 1, tile.i0 + 1 < tile.i1)
            values.wait(step, True)
            p, block, row_sum = softmax.exp_and_sum(s, subtract, rescale, row_sum, dtype, mask)
            outweighing = gl.where(dtype == gl.float16, softmax.outweighs(block, row_sum), 0)
            if JOINED:  # noqa: SIM102  # known to the compiler, unlike n
                if n > 0:
                    release_queries(queries, c, n - 1, CONFIG)
            outs = split_d.zeros(split_d.of(values.tiles, 0, COLUMNS_V))
            for i in range(tile.i0 + 1, tile.i1):
                wait_for_turn(c)
                s = multiply_scores(c, n, step + 1, queries, keys, CONFIG)
                outs = multiply_values(p, step, values, outs, CONFIG)
                pass_turn(c, CONFIG)
                s = warpgroup_mma_wait(V_PRODUCTS, deps=[s])
                keys.release(step + 1)
                s, row_max, subtract, rescale = softmax.maximum(s, row_max, tile, i * N, online, dtype, mask, CONFIG)
                # Here, and not where the tiles are used: under the maximum it takes no time, and its branch keeps the
                # wait for P·V below in its place: compiler.py (L7).
                keys.wait(step + 2, i + 1 < tile.i1)
                values.wait(step + 1, True)
                # While p is still there, and long after `outweighs` was asked.
                excess += softmax.rounding_excess(p, block, outweighing)
                outs = split_d.wait(0, outs)
                values.release(step)
                # Before the exponentials, whose gaps these products fill.
                outs = split_d.rescale(outs, rescale)
                excess *= split_d.along_rows(rescale, excess)
                p, block, row_sum = softmax.exp_and_sum(s, subtract, rescale, row_sum, dtype, mask)
                # A block that was searched has no weight above 1, but in float16, where row_max may stay behind.
                searched = online | (i * N < tile.online_until)
                outweighing = gl.where((dtype == gl.float16) | ~searched, softmax.outweighs(block, row_sum), 0)
                step += 1

            outs = multiply_values(p, step, values, outs, CONFIG)
            excess += softmax.rounding_excess(p, block, outweighing)
            origin, sums = (work_tile, tile.b, tile.h, tile.m0), (row_max, row_sum, excess)
            if not JOINED:
                outs = split_d.wait(0, outs)
                values.release(step)
                store(c, n, repeating, origin, outs, sums, out_desc, lse_ptr, queries, mask, CONFIG)
                release_queries(queries, c, n, CONFIG)
            n += 1
            work_tile, tile, begun, s, unreleased = begin(
                c, JOINED, n, repeating, step + 1, tile.skip_after, queue, scheduler, buffers, mask, CONFIG
            )
            if JOINED:
                outs = split_d.wait(K_PRODUCTS, outs)
                if unreleased:
                    values.release(step)
                store(c, n - 1, repeating, origin, outs, sums, out_desc, lse_ptr, queries, mask, CONFIG)
            s = warpgroup_mma_wait(0, deps=[s])
            if work_tile < queue.n_work_tiles:
                keys.release(begun)
            step = new_value(begun)
        repeating += 1
        if repeating == 1:
            mbarrier.arrive(buffers.done.index(0), count=1)
            wait_until_written(0)  # what may now be replaced
            if receive(queue, n + 1) >= queue.n_work_tiles:
                repeating = 2
    tma.store_wait(0)


# ---- the kernel


@gluon.jit(do_not_specialize=["n_work_tiles", "n_tiles", "log_interleaved", "S", "S_k", "window"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, starts_ptr, sequence_ends_ptr, sinks_ptr, taken_ptr,
    n_work_tiles, n_tiles, log_interleaved, S, S_k, window, tanh_scale, scale_log2, CONFIG: gl.constexpr,
):  # fmt: skip
    """out and LSE."""
    CONSUMERS: gl.constexpr = CONFIG.consumers
    mask = Mask(S, S_k, window, starts_ptr, None, tanh_scale, scale_log2)
    PANELS: gl.constexpr = split_d.n_panels(q_desc.block_shape[3], CONFIG.columns)
    PANELS_V: gl.constexpr = split_d.n_panels(v_desc.block_shape[3], CONFIG.columns_v)
    k = allocate_tiles(k_desc, CONFIG.key_stages * PANELS)
    v = allocate_tiles(v_desc, CONFIG.value_stages * PANELS_V)
    RELEASE: gl.constexpr = TURN_BARRIER + CONSUMERS
    THREADS: gl.constexpr = PRODUCER_WARP + WARP_GROUP * CONSUMERS
    gl.static_assert(RELEASE + CONFIG.key_stages + CONFIG.value_stages <= NAMED_BARRIERS)
    keys = NamedBarrierChannel(k, allocate_barriers(CONFIG.key_stages, 1), RELEASE, THREADS)
    values = NamedBarrierChannel(v, allocate_barriers(CONFIG.value_stages, 1), RELEASE + CONFIG.key_stages, THREADS)
    STAGES: gl.constexpr = CONSUMERS * CONFIG.query_stages
    q = allocate_tiles(q_desc, STAGES * PANELS)
    overflowed = gl.allocate_shared_memory(gl.int32, [STAGES, QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        overflowed.index(i).store(gl.full([QUERIES], -1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    queries = Queries(q, allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 1), overflowed)
    buffers = Buffers(queries, keys, values, allocate_barriers(1, CONSUMERS))
    queue = make_queue(n_work_tiles, taken_ptr, CONSUMERS)
    scheduler = TileScheduler(n_tiles, n_work_tiles // (n_tiles * CONFIG.group), log_interleaved)
    loaded = allocate_barriers(1, 1) if sequence_ends_ptr is not None else None
    packed = Packed(starts_ptr, sequence_ends_ptr, loaded)
    fence_async_shared()

    # Consumer 0, the first partition, has the registers that the others leave.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (mma_partition, (0, out_desc, lse_ptr, sinks_ptr, queue, scheduler, buffers, mask, CONFIG)),
                (mma_partition, (1, out_desc, lse_ptr, sinks_ptr, queue, scheduler, buffers, mask, CONFIG)),
                (load_partition, (q_desc, k_desc, v_desc, lse_ptr, queue, scheduler, buffers, mask, packed, CONFIG)),
            ],
            [4, 1],  # warps
            CONFIG.registers,
        )
    else:
        gl.warp_specialize(
            [
                (mma_partition, (0, out_desc, lse_ptr, sinks_ptr, queue, scheduler, buffers, mask, CONFIG)),
                (mma_partition, (1, out_desc, lse_ptr, sinks_ptr, queue, scheduler, buffers, mask, CONFIG)),
                (mma_partition, (2, out_desc, lse_ptr, sinks_ptr, queue, scheduler, buffers, mask, CONFIG)),
                (load_partition, (q_desc, k_desc, v_desc, lse_ptr, queue, scheduler, buffers, mask, packed, CONFIG)),
            ],
            [4, 4, 1],  # warps
            CONFIG.registers,
        )
