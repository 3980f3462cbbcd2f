"""Flash attention's backward pass for Hopper where head_dim is above 128: dK and dV, and then dQ, in two kernels.

Wide tiles leave a program 64 keys, and it would add to dQ twice as often as backward_pass.py does: then additions in
global memory, not products, would set the speed. So these kernels compute the scores twice and accumulate nothing in
memory: seven products instead of five, in the same order in every run (L5).

`dkdv_kernel`: a program owns 64 keys. Its two consumers share the columns: each has dK and dV of one half of each part
of head_dim. The scores cannot be shared that way (their sums run over all of head_dim), so each consumer computes those
of 32 of a tile's 64 queries, and they exchange P and dS through shared memory.

    time →        step i                                                                         step i + 1
    producer      TMA: Q and dO of i + 2, as stages become free
    consumer 0    (1) of i + 1, (4) of i, (2) of i + 1, (3) of i │ P and dS of i + 1 → shared │ (1) of i + 2 …
    consumer 1    the same for the other 32 queries, and the other halves of dK and dV

    Q, dO         producer → both consumers; Q is freed after (4), dO after (3) (`step_of_queries`)
    P, dS         both consumers → both; two stages: a consumer writes step i + 1 once both have written step i

`dq_kernel`: a program owns 128 queries, 64 for each consumer. Tiles of 64 keys stream past; dS goes from the registers
into the product with K, which runs one step later, under the next scores.

    producer      TMA: K and V of i + 1, as stages become free
    consumer      (1) of i, (2) of i, (5) of i − 1 in flight │ P and dS of i │ (1) of i + 1 …

    K             producer → both consumers; freed after (5), a step later than its (1) (`dq_partition`)
    V             producer → both consumers; freed after (2)

(1) S = Q Kᵀ  (2) dP = dO Vᵀ  (3) dV += Pᵀ dO  (4) dK += dSᵀ Q  (5) dQ += dS K, as in backward_pass.py.
"""

# mypy: disable-error-code="assignment"
# Triton's tuples grow where Python's types do not.
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

from . import config, split_d
from .backward_pass import Queries, load, make_keys
from .compiler import opaque_zero
from .dq_accumulator import CONSUMERS
from .key_tiles import M, locate, needs_mask, next_query_tile
from .mask import Mask, keys_of_queries, score_gradient, seen_by, sees, start_of, weigh
from .nobody import Packed, is_border, load_cleared, load_tile, tokens_of_sequences
from .pipeline import Channel, allocate_barriers, async_load, async_store, matrix
from .scheduler import TileScheduler, tile_of
from .softcap import capped

OWN = gl.constexpr(32)  # of a tile's queries, those whose scores a consumer of `dkdv_kernel` computes
REGISTERS = gl.constexpr(config.SPLIT_REGISTERS)

# ---- dkdv_kernel


class Exchange(NamedTuple):
    """P and dS, [stage, 64 keys, 64 queries], of both consumers' queries: of two stages one is being read."""

    p: Any
    ds: Any
    full: Any
    """Both consumers have written a step's."""


@gluon.jit
def multiply_scores(c: gl.constexpr, tiles, stage, keys, COLUMNS: gl.constexpr):
    """Start keys · rowsᵀ for the consumer's own rows of a tile of Q or dO."""
    rows = matrix(tiles, stage).slice(c * OWN, OWN, 0)
    return split_d.multiply_transposed(split_d.split(keys, COLUMNS), split_d.split(rows, COLUMNS))


@gluon.jit
def halves(c: gl.constexpr, tile, COLUMNS: gl.constexpr):
    """The consumer's half of each of a tile's parts."""
    parts = ()
    for i in gl.static_range(len(COLUMNS)):
        parts += (half(c, split_d.part(tile, i, COLUMNS)),)
    return parts


@gluon.jit
def half(c: gl.constexpr, part):
    COLUMNS: gl.constexpr = part.shape[1] // CONSUMERS
    return part.slice(c * COLUMNS, COLUMNS, 1)


@gluon.jit
def weigh_own(c: gl.constexpr, step, s, m0, n0, masked, queries, mask, CONFIG: gl.constexpr):
    """P, and the capped scores, of what `multiply_scores` gave."""
    N: gl.constexpr = CONFIG.n
    query: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    key: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    row_stats = queries.row_stats.index(step % CONFIG.stages)
    s = capped(s, mask.cap, CONFIG.softcap)
    lse = row_stats.slice(c * OWN, OWN, 0).load(query)
    p = weigh(s, gl.expand_dims(lse, 0), mask.factor)
    if masked:
        m = gl.expand_dims(m0 + c * OWN + gl.arange(0, OWN, query), 0)
        n = gl.expand_dims(n0 + gl.arange(0, N, key), 1)
        start = 0
        if CONFIG.starts:
            start = row_stats.slice(2 * M + c * OWN, OWN, 0).load(query)
            start = gl.expand_dims(start.to(gl.int32, bitcast=True), 0)
        p = gl.where(sees(mask, m, start, n, CONFIG), p, 0.0)
    return p, s


@gluon.jit
def send(c: gl.constexpr, step, p, s, dp, queries, exchange, CONFIG: gl.constexpr):
    """Put the consumer's P and dS where both consumers read them."""
    query: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    delta = queries.row_stats.index(step % CONFIG.stages).slice(M + c * OWN, OWN, 0).load(query)
    ds = score_gradient(p, dp, gl.expand_dims(delta, 0), s, CONFIG.softcap)
    exchange.p.index(step % 2).slice(c * OWN, OWN, 1).store(p.to(exchange.p.dtype))
    exchange.ds.index(step % 2).slice(c * OWN, OWN, 1).store(ds.to(exchange.ds.dtype))
    fence_async_shared()
    mbarrier.arrive(exchange.full.index(0), count=1)


@gluon.jit
def step_of_queries(
    c: gl.constexpr, LAST: gl.constexpr, step, m0, n0, masked, dk, dv, keys, queries, exchange, mask,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """One tile of queries, whose P and dS have been sent: adds to dK and dV. Unless LAST, also sends P and dS of the
    next tile, at m0."""
    COLUMNS: gl.constexpr = CONFIG.columns
    COLUMNS_V: gl.constexpr = CONFIG.columns_v
    K_PRODUCTS: gl.constexpr = len(CONFIG.columns)  # products for (1) or (4)
    V_PRODUCTS: gl.constexpr = len(CONFIG.columns_v)  # for (2) or (3)
    k_stage = opaque_zero(m0, 30)
    k, v = matrix(keys.k.tiles, k_stage), matrix(keys.v, k_stage)
    stage = step % CONFIG.stages
    following = step + 1
    phase = following // CONFIG.stages & 1
    q = halves(c, matrix(queries.q.tiles, stage), COLUMNS)
    dout = halves(c, matrix(queries.dout.tiles, stage), COLUMNS_V)
    p = exchange.p.index(step % 2)
    ds = exchange.ds.index(step % 2)
    if LAST:
        mbarrier.wait(exchange.full.index(0), step & 1)
        dk = split_d.multiply(ds, q, dk)  # (4)
        dv = split_d.multiply(p, dout, dv)  # (3)
        dk = split_d.wait(V_PRODUCTS, dk)
        dv = split_d.wait(0, dv)
        queries.q.release(stage)
    else:
        next_stage = following % CONFIG.stages
        queries.q.wait_at(next_stage, phase)
        s = multiply_scores(c, queries.q.tiles, next_stage, k, COLUMNS)  # (1) of the next tile
        mbarrier.wait(exchange.full.index(0), step & 1)
        dk = split_d.multiply(ds, q, dk)  # (4) dK += dSᵀ Q
        queries.dout.wait_at(next_stage, phase)
        dp = multiply_scores(c, queries.dout.tiles, next_stage, v, COLUMNS_V)  # (2) of the next tile
        dv = split_d.multiply(p, dout, dv)  # (3) dV += Pᵀ dO
        s = warpgroup_mma_wait(K_PRODUCTS + 2 * V_PRODUCTS, deps=[s])
        weights, s = weigh_own(c, following, s, m0, n0, masked, queries, mask, CONFIG)
        dk = split_d.wait(2 * V_PRODUCTS, dk)
        queries.q.release(stage)
        dp = warpgroup_mma_wait(V_PRODUCTS, deps=[dp])
        send(c, following, weights, s, dp, queries, exchange, CONFIG)
        dv = split_d.wait(0, dv)
    queries.dout.release(stage)
    return dk, dv


@gluon.jit
def dkdv_partition(
    c: gl.constexpr, dk_rows, dv_rows, scale, scheduler, keys, queries, exchange, mask, CONFIG: gl.constexpr
):
    """Consumer c: the c-th halves of the parts of dK and dV."""
    COLUMNS: gl.constexpr = CONFIG.columns
    COLUMNS_V: gl.constexpr = CONFIG.columns_v
    k, v = matrix(keys.k.tiles, 0), matrix(keys.v, 0)
    tile = locate(gl.program_id(0), scheduler, mask, CONFIG)
    b, g, n0, t0, t3 = tile.b, tile.g, tile.n0, tile.t0, tile.t3
    k_halves, v_halves = halves(c, k, COLUMNS), halves(c, v, COLUMNS_V)
    dk, dv = split_d.zeros(k_halves), split_d.zeros(v_halves)
    keys.k.wait_at(0, 0)
    if t0 < t3:
        t = t0
        queries.q.wait_at(0, 0)
        s = multiply_scores(c, queries.q.tiles, 0, k, COLUMNS)
        queries.dout.wait_at(0, 0)
        dp = multiply_scores(c, queries.dout.tiles, 0, v, COLUMNS_V)
        s = warpgroup_mma_wait(len(CONFIG.columns_v), deps=[s])
        p, s = weigh_own(c, 0, s, t * M, n0, needs_mask(t, tile), queries, mask, CONFIG)
        dp = warpgroup_mma_wait(0, deps=[dp])
        send(c, 0, p, s, dp, queries, exchange, CONFIG)
        last = CONFIG.group * (t3 - t0) - 1
        for step in range(0, last):
            t = next_query_tile(t, tile, False)
            masked = needs_mask(t, tile)
            dk, dv = step_of_queries(c, False, step, t * M, n0, masked, dk, dv, keys, queries, exchange, mask, CONFIG)
        dk, dv = step_of_queries(c, True, last, t * M, n0, False, dk, dv, keys, queries, exchange, mask, CONFIG)

    mbarrier.arrive(keys.done.index(0), count=1)
    mbarrier.wait(keys.done.index(0), 0)
    split_d.store(split_d.scale(dk, scale), k_halves)
    split_d.store(dv, v_halves)
    fence_async_shared()
    mbarrier.arrive(keys.replaced.index(0), count=1)
    if c == 0:
        mbarrier.wait(keys.replaced.index(0), 0)
        async_store(dk_rows, [b, g, n0, 0], keys.k.tiles.index(0))
        async_store(dv_rows, [b, g, n0, 0], keys.v.index(0))
        tma.store_wait(0)


@gluon.jit
def dkdv_load_partition(
    q_rows, k_rows, v_rows, dout_rows, stat_rows, scheduler, keys, queries, mask, packed, CONFIG: gl.constexpr
):
    descriptors = (q_rows, k_rows, v_rows, dout_rows, stat_rows)
    n = 0
    step = 0
    load(gl.program_id(0), n, step, descriptors, scheduler, keys, queries, mask, packed, CONFIG)


@gluon.jit(do_not_specialize=["n_tiles", "log_interleaved", "S", "S_k", "window"])
def dkdv_kernel(
    q_rows, k_rows, v_rows, dout_rows, stat_rows, dk_rows, dv_rows, starts_ptr, sequence_ends_ptr, ends_ptr,
    n_tiles, log_interleaved, S, S_k, window, cap, factor, scale, CONFIG: gl.constexpr,
):  # fmt: skip
    """dK and dV."""
    dtype: gl.constexpr = q_rows.dtype
    STAGES: gl.constexpr = CONFIG.stages
    mask = Mask(S, S_k, window, None, ends_ptr, cap, factor)
    scheduler = TileScheduler(n_tiles, gl.num_programs(0) // n_tiles, log_interleaved)
    keys = make_keys(k_rows, v_rows, CONFIG.key_stages)
    q = gl.allocate_shared_memory(dtype, [STAGES] + q_rows.block_shape, q_rows.layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES] + dout_rows.block_shape, dout_rows.layout)
    row_stats = gl.allocate_shared_memory(gl.float32, [STAGES] + stat_rows.block_shape, stat_rows.layout)
    q_full, dout_full = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 1)
    q_empty, dout_empty = allocate_barriers(STAGES, CONSUMERS), allocate_barriers(STAGES, CONSUMERS)
    queries = Queries(Channel(q, q_full, q_empty), row_stats, Channel(dout, dout_full, dout_empty))
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONFIG.n, M], dtype)
    p = gl.allocate_shared_memory(dtype, [2, CONFIG.n, M], layout)
    ds = gl.allocate_shared_memory(dtype, [2, CONFIG.n, M], layout)
    exchange = Exchange(p, ds, allocate_barriers(1, CONSUMERS))
    loaded = allocate_barriers(1, 1) if sequence_ends_ptr is not None else None
    packed = Packed(starts_ptr, sequence_ends_ptr, loaded)
    fence_async_shared()
    gl.warp_specialize(
        [
            (dkdv_partition, (0, dk_rows, dv_rows, scale, scheduler, keys, queries, exchange, mask, CONFIG)),
            (dkdv_partition, (1, dk_rows, dv_rows, scale, scheduler, keys, queries, exchange, mask, CONFIG)),
            (
                dkdv_load_partition,
                (q_rows, k_rows, v_rows, dout_rows, stat_rows, scheduler, keys, queries, mask, packed, CONFIG),
            ),
        ],
        [4, 1],  # warps
        REGISTERS,
    )


# ---- dq_kernel


class Streams(NamedTuple):
    """Each consumer's Q and dO, and K and V that stream past: two stages of K, which is used twice, and one of V."""

    q: Any
    dout: Any
    queries_full: Any
    k: Any
    v: Any
    """`Channel`s."""


@gluon.jit
def locate_queries(scheduler, mask, CONFIG: gl.constexpr):
    """(b, h, m0) of the program, and the tiles of keys [i0, i1) that some of its queries see.

    A head's last queries are issued first: under a causal mask they see the most keys.
    """
    M2: gl.constexpr = CONSUMERS * M
    head, tile = tile_of(gl.program_id(0), scheduler, CONFIG.group, CONFIG)
    b = head // CONFIG.heads
    m0 = (scheduler.n_tiles - 1 - tile) * M2
    some_from, some_to, _, _ = keys_of_queries(mask, m0, M2, b, CONFIG)
    i0 = gl.maximum(some_from, 0) // CONFIG.n
    return b, head % CONFIG.heads, m0, i0, gl.maximum(gl.cdiv(some_to, CONFIG.n), i0)


@gluon.jit
def dq_load_partition(q_rows, k_rows, v_rows, dout_rows, scheduler, streams, mask, packed, CONFIG: gl.constexpr):
    D: gl.constexpr = q_rows.block_shape[3]
    D_V: gl.constexpr = v_rows.block_shape[3]
    BYTES: gl.constexpr = q_rows.dtype.primitive_bitwidth // 8
    b, h, m0, i0, i1 = locate_queries(scheduler, mask, CONFIG)
    tokens = tokens_of_sequences(b, mask.S, packed)
    for c in gl.static_range(CONSUMERS):
        full = streams.queries_full.index(c)
        if packed.ends_ptr is not None and is_border(m0 + c * M, M, tokens):
            load_cleared(q_rows, [b, h, m0 + c * M, 0], streams.q.index(c), tokens, packed)
            load_cleared(dout_rows, [b, h, m0 + c * M, 0], streams.dout.index(c), tokens, packed)
            mbarrier.arrive(full, count=1)
        else:
            mbarrier.expect(full, M * (D + D_V) * BYTES)
            async_load(q_rows, [b, h, m0 + c * M, 0], full, streams.q.index(c))
            async_load(dout_rows, [b, h, m0 + c * M, 0], full, streams.dout.index(c))
    for i in range(i0, i1):
        step = i - i0
        at = [b, h // CONFIG.group, i * CONFIG.n, 0]
        full = streams.k.full.index(step % 2)
        streams.k.acquire(step)
        load_tile(k_rows, at, full, streams.k.tiles, step % 2, tokens, packed)
        full = streams.v.full.index(0)
        streams.v.acquire(step)
        load_tile(v_rows, at, full, streams.v.tiles, 0, tokens, packed)


@gluon.jit
def differentiate(s, dp, AFTER: gl.constexpr, lse, delta, m, start, n0, masked, mask, CONFIG: gl.constexpr):
    """dS [64 queries, 64 keys], once dP is complete, which AFTER products were started after."""
    N: gl.constexpr = CONFIG.n
    s = capped(s, mask.cap, CONFIG.softcap)
    p = weigh(s, gl.expand_dims(lse, 1), mask.factor)
    if masked:
        n = gl.expand_dims(n0 + gl.arange(0, N, gl.SliceLayout(0, s.type.layout)), 0)
        p = gl.where(sees(mask, gl.expand_dims(m, 1), start, n, CONFIG), p, 0.0)
    dp = warpgroup_mma_wait(AFTER, deps=[dp])
    return score_gradient(p, dp, gl.expand_dims(delta, 1), s, CONFIG.softcap)


@gluon.jit
def dq_partition(c: gl.constexpr, stat_ptr, dq_rows, scale, scheduler, streams, mask, CONFIG: gl.constexpr):
    """Consumer c: dQ of queries [64 c, 64 c + 64) of the tile."""
    N: gl.constexpr = CONFIG.n
    COLUMNS: gl.constexpr = CONFIG.columns
    COLUMNS_V: gl.constexpr = CONFIG.columns_v
    K_PRODUCTS: gl.constexpr = len(CONFIG.columns)  # products for (1) or (5)
    V_PRODUCTS: gl.constexpr = len(CONFIG.columns_v)  # for (2)
    ROW_STATS: gl.constexpr = CONFIG.row_stats
    dtype: gl.constexpr = dq_rows.dtype
    row: gl.constexpr = gl.SliceLayout(1, split_d.mma_layout(N))
    b, h, m0, i0, i1 = locate_queries(scheduler, mask, CONFIG)
    m0 += c * M
    full_from, _ = seen_by(mask, gl.minimum(m0 + M, mask.S) - 1, b, CONFIG)
    _, full_to = seen_by(mask, gl.minimum(m0, mask.S - 1), b, CONFIG)
    query_tiles = gl.cdiv(mask.S, M)
    m = m0 + gl.arange(0, M, row)
    tile = (b * CONFIG.heads + h) * query_tiles + gl.minimum(m0 // M, query_tiles - 1)
    stat_ptr += tile.to(gl.int64) * ROW_STATS + gl.arange(0, M, row)
    lse = gl.load(stat_ptr)
    delta = gl.load(stat_ptr + M)
    start = gl.expand_dims(start_of(mask, m, b, CONFIG), 1) if CONFIG.starts else 0
    q = split_d.of(streams.q, c, COLUMNS)
    dq = split_d.zeros(q)
    mbarrier.wait(streams.queries_full.index(c), 0)
    if i0 < i1:
        streams.k.wait_at(0, 0)
        s = split_d.multiply_transposed(q, split_d.of(streams.k.tiles, 0, COLUMNS))  # (1) S = Q Kᵀ
        streams.v.wait_at(0, 0)
        dout = split_d.of(streams.dout, c, COLUMNS_V)
        v = split_d.of(streams.v.tiles, 0, COLUMNS_V)
        dp = split_d.multiply_transposed(dout, v)  # (2) dP = dO Vᵀ
        s = warpgroup_mma_wait(V_PRODUCTS, deps=[s])
        masked = (i0 * N < full_from) | (i0 * N + N > full_to)
        ds = differentiate(s, dp, 0, lse, delta, m, start, i0 * N, masked, mask, CONFIG).to(dtype)
        streams.v.release(0)
        for i in range(i0 + 1, i1):
            step = i - i0
            k = split_d.of(streams.k.tiles, step % 2, COLUMNS)
            streams.k.wait(step)
            own = c + opaque_zero(i, 26)
            s = split_d.multiply_transposed(split_d.of(streams.q, own, COLUMNS), k)  # (1)
            streams.v.wait(step)
            dout = split_d.of(streams.dout, own, COLUMNS_V)
            v = split_d.of(streams.v.tiles, 0, COLUMNS_V)
            dp = split_d.multiply_transposed(dout, v)  # (2)
            # (5) dQ += dS K, of the step before
            dq = split_d.multiply(ds, split_d.of(streams.k.tiles, (step - 1) % 2, COLUMNS), dq)
            s = warpgroup_mma_wait(V_PRODUCTS + K_PRODUCTS, deps=[s])
            masked = (i * N < full_from) | (i * N + N > full_to)
            next_ds = differentiate(s, dp, K_PRODUCTS, lse, delta, m, start, i * N, masked, mask, CONFIG)
            streams.v.release(0)
            dq = split_d.wait(0, dq)
            streams.k.release((step - 1) % 2)
            ds = next_ds.to(dtype)
        dq = split_d.wait(0, split_d.multiply(ds, split_d.of(streams.k.tiles, (i1 - 1 - i0) % 2, COLUMNS), dq))
    split_d.store(split_d.scale(dq, scale), q)
    fence_async_shared()
    async_store(dq_rows, [b, h, m0, 0], streams.q.index(c))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_tiles", "log_interleaved", "S", "S_k", "window"])
def dq_kernel(
    q_rows, k_rows, v_rows, dout_rows, dq_rows, stat_ptr, starts_ptr, sequence_ends_ptr,
    n_tiles, log_interleaved, S, S_k, window, cap, factor, scale, CONFIG: gl.constexpr,
):  # fmt: skip
    """dQ."""
    dtype: gl.constexpr = q_rows.dtype
    mask = Mask(S, S_k, window, starts_ptr, None, cap, factor)
    scheduler = TileScheduler(n_tiles, gl.num_programs(0) // (n_tiles * CONFIG.group), log_interleaved)
    q = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_rows.block_shape, q_rows.layout)
    dout = gl.allocate_shared_memory(dtype, [CONSUMERS] + dout_rows.block_shape, dout_rows.layout)
    k = gl.allocate_shared_memory(dtype, [2] + k_rows.block_shape, k_rows.layout)
    v = gl.allocate_shared_memory(dtype, [1] + v_rows.block_shape, v_rows.layout)
    queries_full = allocate_barriers(CONSUMERS, 1)
    k_channel = Channel(k, allocate_barriers(2, 1), allocate_barriers(2, CONSUMERS))
    v_channel = Channel(v, allocate_barriers(1, 1), allocate_barriers(1, CONSUMERS))
    streams = Streams(q, dout, queries_full, k_channel, v_channel)
    loaded = allocate_barriers(1, 1) if sequence_ends_ptr is not None else None
    packed = Packed(starts_ptr, sequence_ends_ptr, loaded)
    fence_async_shared()
    gl.warp_specialize(
        [
            (dq_partition, (0, stat_ptr, dq_rows, scale, scheduler, streams, mask, CONFIG)),
            (dq_partition, (1, stat_ptr, dq_rows, scale, scheduler, streams, mask, CONFIG)),
            (dq_load_partition, (q_rows, k_rows, v_rows, dout_rows, scheduler, streams, mask, packed, CONFIG)),
        ],
        [4, 1],  # warps
        REGISTERS,
    )
