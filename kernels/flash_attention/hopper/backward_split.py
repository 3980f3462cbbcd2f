"""Flash attention's backward pass for Hopper where head_dim is above 128: dK and dV, and then dQ, in two kernels.

Wide tiles leave a program 64 keys, and it would add to dQ twice as often as backward_pass.py does: then additions in
global memory, not products, would set the speed. So these kernels compute the scores twice and accumulate nothing in
memory: seven products instead of five, in the same order in every run (L5).

`dkdv_kernel`: a program owns 64 keys. One consumer has P and dV, the other dS and dK: each computes two of the four
products, and the left side of its second is in its registers. P, which dS is made of, goes from one to the other (L22).

    time →        step i                                                                         step i + 1
    producer      TMA: Q and dO of the steps after, as stages become free
    P, dV         (1) of i + 1, (3) of i │ P of i + 1 → shared                                    │ (1) of i + 2 …
    dS, dK        (2) of i + 1, (4) of i │ P of i + 1 from shared, dS of i + 1                    │ (2) of i + 2 …

    Q             producer → both; freed after (1) by `dv_partition`, after (4) by `dk_partition`
    dO            producer → both; freed after (3) by `dv_partition`, after (2) by `dk_partition`
    P             `dv_partition` → `dk_partition`, in float32; two stages

`dq_kernel`: a program owns 128 queries, 64 for each consumer. Tiles of 64 keys stream past; dS goes from the registers
into the product with K, which runs one step later, under the next scores.

    producer      TMA: K and V of i + 1, as stages become free
    consumer      (1) of i, (2) of i, (5) of i − 1 in flight │ P and dS of i │ (1) of i + 1 …

    K             producer → both consumers; freed after (5), a step later than its (1) (`dq_partition`)
    V             producer → both consumers; freed after (2)

(1) S = Q Kᵀ  (2) dP = dO Vᵀ  (3) dV += Pᵀ dO  (4) dK += dSᵀ Q  (5) dQ += dS K, as in backward_pass.py; in `dkdv_kernel`
(1) and (2) are transposed. Up to head_dim 192 tiles are in panels of 64 columns (split_d.py), so that they take no room
for 256.
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
from .compiler import opaque_zero
from .key_tiles import CONSUMERS, M, load_queries, locate, needs_mask, next_query_tile, weights
from .mask import Mask, exp_scores, keys_of_queries, score_gradient, seen_by, sees, start_of
from .padding import Packed, load_pair, load_tile, tokens_of_sequences
from .pipeline import (
    Channel,
    allocate_barriers,
    allocate_tiles,
    store_panels,
)
from .scheduler import TileScheduler, tile_of
from .softcap import softcap_tanh

N = gl.constexpr(config.SPLIT_KEYS)
REGISTERS = gl.constexpr(config.SPLIT_REGISTERS)


# ---- dkdv_kernel


class Keys(NamedTuple):
    """K and V, which stay, and where dK and dV leave."""

    k: Any
    v: Any
    full: Any
    done: Any
    """Both consumers have read K and V for the last time."""


class Queries(NamedTuple):
    q: Any
    """A `Channel`; its barriers are those of the row statistics, too."""
    row_stats: Any
    dout: Any
    """A `Channel`."""
    p: Any
    """A `Channel`: P, times the derivative of a soft cap, `in_thread_order`."""


@gluon.jit
def multiply_keys(keys, tiles, stage, step, COLUMNS: gl.constexpr):
    """Start keys · rowsᵀ for a stage of Q or dO."""
    keys = split_d.of(keys, opaque_zero(step, 26), COLUMNS)
    return split_d.multiply_transposed(keys, split_d.of(tiles, stage, COLUMNS))


@gluon.jit
def store_over_keys(rows, tile, gradient, scale, tiles, keys, COLUMNS: gl.constexpr):
    """dV over V, or dK, scaled, over K, and from there to global memory, once both consumers have read K and V."""
    mbarrier.arrive(keys.done.index(0), count=1)
    mbarrier.wait(keys.done.index(0), 0)
    split_d.store(split_d.scale(gradient, scale), split_d.of(tiles, 0, COLUMNS))
    fence_async_shared()
    store_panels(rows, tile.b, tile.g, tile.n0, tiles, 0, len(COLUMNS))
    tma.store_wait(0)


@gluon.jit
def weigh_and_send(step, s, m0, n0, masked, queries, mask, CONFIG: gl.constexpr):
    """P of a step's scores, which the other consumer gets, too."""
    row_stats = queries.row_stats.index(step % CONFIG.query_stages)
    s = softcap_tanh(s, mask.tanh_scale, CONFIG.softcap)
    lse = row_stats.slice(0, M, 0).load(gl.SliceLayout(0, s.type.layout))
    p = weights(s, lse, m0, n0, 0, masked, row_stats, mask, CONFIG)
    # dP − delta is still to come, and dS is linear in it.
    sent = score_gradient(p, 1.0, 0.0, s, CONFIG.softcap)
    queries.p.acquire(step)
    queries.p.tiles.index(step % 2).store(split_d.in_thread_order(sent))
    mbarrier.arrive(queries.p.full.index(step % 2), count=1)
    return p.to(queries.q.tiles.dtype)


@gluon.jit
def dv_partition(dv_desc, scheduler, keys, queries, mask, CONFIG: gl.constexpr):
    """P and dV."""
    COLUMNS: gl.constexpr = CONFIG.columns
    COLUMNS_V: gl.constexpr = CONFIG.columns_v
    tile = locate(gl.program_id(0), scheduler, mask, CONFIG)
    n0, t0, t3 = tile.n0, tile.t0, tile.t3
    dv = split_d.zeros(split_d.of(keys.v, 0, COLUMNS_V))
    mbarrier.wait(keys.full.index(0), 0)
    if t0 < t3:
        t = t0
        queries.q.wait(0)
        s = multiply_keys(keys.k, queries.q.tiles, 0, t, COLUMNS)  # (1)
        s = warpgroup_mma_wait(0, deps=[s])
        p = weigh_and_send(0, s, t * M, n0, needs_mask(t, tile), queries, mask, CONFIG)
        queries.q.release_at(0)
        last = CONFIG.group * (t3 - t0) - 1
        for step in range(0, last):
            t = next_query_tile(t, tile, False)
            next_stage = (step + 1) % CONFIG.query_stages
            stage = step % CONFIG.dout_stages
            queries.q.wait(step + 1)
            s = multiply_keys(keys.k, queries.q.tiles, next_stage, t, COLUMNS)  # (1) of the next tile
            queries.dout.wait(step)
            dv = split_d.multiply(p, split_d.of(queries.dout.tiles, stage, COLUMNS_V), dv)  # (3) dV += Pᵀ dO
            s = warpgroup_mma_wait(len(CONFIG.columns_v), deps=[s])
            next_p = weigh_and_send(step + 1, s, t * M, n0, needs_mask(t, tile), queries, mask, CONFIG)
            queries.q.release_at(next_stage)
            dv = split_d.wait(0, dv)
            queries.dout.release_at(stage)
            p = next_p
        queries.dout.wait(last)
        stage = last % CONFIG.dout_stages
        dv = split_d.wait(0, split_d.multiply(p, split_d.of(queries.dout.tiles, stage, COLUMNS_V), dv))
        queries.dout.release_at(stage)

    store_over_keys(dv_desc, tile, dv, gl.to_tensor(1.0), keys.v, keys, COLUMNS_V)


@gluon.jit
def differentiate_received(step, dp, queries, CONFIG: gl.constexpr):
    """dS of a step, once the other consumer has sent its P."""
    query: gl.constexpr = gl.SliceLayout(0, dp.type.layout)
    ORDER: gl.constexpr = split_d.in_thread_order(dp).type.layout
    delta = queries.row_stats.index(step % CONFIG.query_stages).slice(M, M, 0).load(query)
    queries.p.wait(step)
    p = split_d.from_thread_order(queries.p.tiles.index(step % 2).load(ORDER), N)
    p = gl.convert_layout(p, dp.type.layout, assert_trivial=True)
    queries.p.release_at(step % 2)
    return (p * (dp - gl.expand_dims(delta, 0))).to(queries.q.tiles.dtype)


@gluon.jit
def dk_partition(dk_desc, scale, scheduler, keys, queries, mask, CONFIG: gl.constexpr):
    """dS and dK."""
    COLUMNS: gl.constexpr = CONFIG.columns
    COLUMNS_V: gl.constexpr = CONFIG.columns_v
    tile = locate(gl.program_id(0), scheduler, mask, CONFIG)
    t0, t3 = tile.t0, tile.t3
    dk = split_d.zeros(split_d.of(keys.k, 0, COLUMNS))
    mbarrier.wait(keys.full.index(0), 0)
    if t0 < t3:
        queries.dout.wait(0)
        dp = multiply_keys(keys.v, queries.dout.tiles, 0, t0, COLUMNS_V)  # (2)
        dp = warpgroup_mma_wait(0, deps=[dp])
        queries.dout.release_at(0)
        queries.q.wait(0)
        ds = differentiate_received(0, dp, queries, CONFIG)
        last = CONFIG.group * (t3 - t0) - 1
        for step in range(0, last):
            next_stage = (step + 1) % CONFIG.dout_stages
            stage = step % CONFIG.query_stages
            queries.dout.wait(step + 1)
            dp = multiply_keys(keys.v, queries.dout.tiles, next_stage, step, COLUMNS_V)  # (2) of the next tile
            dk = split_d.multiply(ds, split_d.of(queries.q.tiles, stage, COLUMNS), dk)  # (4) dK += dSᵀ Q
            dp = warpgroup_mma_wait(len(CONFIG.columns), deps=[dp])
            queries.dout.release_at(next_stage)
            queries.q.wait(step + 1)
            next_ds = differentiate_received(step + 1, dp, queries, CONFIG)
            dk = split_d.wait(0, dk)
            queries.q.release_at(stage)
            ds = next_ds
        stage = last % CONFIG.query_stages
        dk = split_d.wait(0, split_d.multiply(ds, split_d.of(queries.q.tiles, stage, COLUMNS), dk))
        queries.q.release_at(stage)

    store_over_keys(dk_desc, tile, dk, scale, keys.k, keys, COLUMNS)


@gluon.jit
def dkdv_load_partition(
    q_desc, k_desc, v_desc, dout_desc, stat_desc, scheduler, keys, queries, mask, packed, CONFIG: gl.constexpr
):
    PANELS: gl.constexpr = len(CONFIG.columns)
    PANELS_V: gl.constexpr = len(CONFIG.columns_v)
    query_tiles = gl.cdiv(mask.S, M)
    query_descs = q_desc, stat_desc, dout_desc
    tile = locate(gl.program_id(0), scheduler, mask, CONFIG)
    b, g, n0 = tile.b, tile.g, tile.n0
    tokens = tokens_of_sequences(b, mask.S, packed)
    full = keys.full.index(0)
    load_pair(k_desc, v_desc, b, g, n0, full, keys.k, keys.v, 0, PANELS, PANELS_V, tokens, packed)
    step = 0
    for i in range(0, CONFIG.group):
        h = g * CONFIG.group + i
        for t in range(tile.t0, tile.t3):
            load_queries(step, b, h, t, query_tiles, query_descs, queries, PANELS, PANELS_V, tokens, packed, CONFIG)
            step += 1


@gluon.jit(do_not_specialize=["n_tiles", "log_interleaved", "S", "S_k", "window"])
def dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, stat_desc, dk_desc, dv_desc, starts_ptr, sequence_ends_ptr, query_ends_ptr,
    n_tiles, log_interleaved, S, S_k, window, tanh_scale, scale_log2, scale, CONFIG: gl.constexpr,
):  # fmt: skip
    """dK and dV."""
    PANELS: gl.constexpr = len(CONFIG.columns)
    PANELS_V: gl.constexpr = len(CONFIG.columns_v)
    QUERY_STAGES: gl.constexpr = CONFIG.query_stages
    DOUT_STAGES: gl.constexpr = CONFIG.dout_stages
    mask = Mask(S, S_k, window, None, query_ends_ptr, tanh_scale, scale_log2)
    scheduler = TileScheduler(n_tiles, gl.num_programs(0) // n_tiles, log_interleaved)
    k, v = allocate_tiles(k_desc, PANELS), allocate_tiles(v_desc, PANELS_V)
    keys = Keys(k, v, allocate_barriers(1, 1), allocate_barriers(1, CONSUMERS))
    q, dout = allocate_tiles(q_desc, QUERY_STAGES * PANELS), allocate_tiles(dout_desc, DOUT_STAGES * PANELS_V)
    row_stats = gl.allocate_shared_memory(gl.float32, [QUERY_STAGES] + stat_desc.block_shape, stat_desc.layout)
    p = gl.allocate_shared_memory(gl.float32, [2, N * M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = Queries(
        Channel(q, allocate_barriers(QUERY_STAGES, 1), allocate_barriers(QUERY_STAGES, CONSUMERS)),
        row_stats,
        Channel(dout, allocate_barriers(DOUT_STAGES, 1), allocate_barriers(DOUT_STAGES, CONSUMERS)),
        Channel(p, allocate_barriers(2, 1), allocate_barriers(2, 1)),
    )
    loaded = allocate_barriers(1, 1) if sequence_ends_ptr is not None else None
    packed = Packed(starts_ptr, sequence_ends_ptr, loaded)
    fence_async_shared()
    gl.warp_specialize(
        [
            (dv_partition, (dv_desc, scheduler, keys, queries, mask, CONFIG)),
            (dk_partition, (dk_desc, scale, scheduler, keys, queries, mask, CONFIG)),
            (
                dkdv_load_partition,
                (q_desc, k_desc, v_desc, dout_desc, stat_desc, scheduler, keys, queries, mask, packed, CONFIG),
            ),
        ],
        [4, 1],  # warps
        REGISTERS,
    )


# ---- dq_kernel


class Streams(NamedTuple):
    """Each consumer's Q and dO, and K and V that stream past."""

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
    i0 = gl.maximum(some_from, 0) // N
    return b, head % CONFIG.heads, m0, i0, gl.maximum(gl.cdiv(some_to, N), i0)


@gluon.jit
def dq_load_partition(q_desc, k_desc, v_desc, dout_desc, scheduler, streams, mask, packed, CONFIG: gl.constexpr):
    PANELS: gl.constexpr = len(CONFIG.columns)
    PANELS_V: gl.constexpr = len(CONFIG.columns_v)
    b, h, m0, i0, i1 = locate_queries(scheduler, mask, CONFIG)
    tokens = tokens_of_sequences(b, mask.S, packed)
    for c in gl.static_range(CONSUMERS):
        full = streams.queries_full.index(c)
        row = m0 + c * M
        load_pair(q_desc, dout_desc, b, h, row, full, streams.q, streams.dout, c, PANELS, PANELS_V, tokens, packed)
    g = h // CONFIG.group
    for i in range(i0, i1):
        step = i - i0
        stage = step % CONFIG.key_stages
        streams.k.acquire(step)
        load_tile(k_desc, b, g, i * N, streams.k.full.index(stage), streams.k.tiles, stage, PANELS, tokens, packed)
        stage = step % CONFIG.value_stages
        streams.v.acquire(step)
        load_tile(v_desc, b, g, i * N, streams.v.full.index(stage), streams.v.tiles, stage, PANELS_V, tokens, packed)


@gluon.jit
def differentiate(s, dp, AFTER: gl.constexpr, lse, delta, m, start, n0, masked, mask, CONFIG: gl.constexpr):
    """dS [64 queries, 64 keys], once dP is complete, which AFTER products were started after."""
    s = softcap_tanh(s, mask.tanh_scale, CONFIG.softcap)
    p = exp_scores(s, gl.expand_dims(lse, 1), mask.scale_log2)
    if masked:
        n = gl.expand_dims(n0 + gl.arange(0, N, gl.SliceLayout(0, s.type.layout)), 0)
        p = gl.where(sees(mask, gl.expand_dims(m, 1), start, n, CONFIG), p, 0.0)
    dp = warpgroup_mma_wait(AFTER, deps=[dp])
    return score_gradient(p, dp, gl.expand_dims(delta, 1), s, CONFIG.softcap)


@gluon.jit
def dq_partition(c: gl.constexpr, stat_ptr, dq_desc, scale, scheduler, streams, mask, CONFIG: gl.constexpr):
    """Consumer c: dQ of queries [64 c, 64 c + 64) of the tile."""
    COLUMNS: gl.constexpr = CONFIG.columns
    COLUMNS_V: gl.constexpr = CONFIG.columns_v
    K_PRODUCTS: gl.constexpr = len(CONFIG.columns)  # products for (1) or (5)
    V_PRODUCTS: gl.constexpr = len(CONFIG.columns_v)  # for (2)
    ROW_STATS: gl.constexpr = CONFIG.row_stats
    dtype: gl.constexpr = dq_desc.dtype
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
        streams.v.release_at(0)
        for i in range(i0 + 1, i1):
            step = i - i0
            stage = step % CONFIG.key_stages
            stage_v = step % CONFIG.value_stages
            previous = (step - 1) % CONFIG.key_stages
            k = split_d.of(streams.k.tiles, stage, COLUMNS)
            streams.k.wait(step)
            own = c + opaque_zero(i, 26)
            s = split_d.multiply_transposed(split_d.of(streams.q, own, COLUMNS), k)  # (1)
            streams.v.wait(step)
            dout = split_d.of(streams.dout, own, COLUMNS_V)
            v = split_d.of(streams.v.tiles, stage_v, COLUMNS_V)
            dp = split_d.multiply_transposed(dout, v)  # (2)
            # (5) dQ += dS K, of the step before
            dq = split_d.multiply(ds, split_d.of(streams.k.tiles, previous, COLUMNS), dq)
            s = warpgroup_mma_wait(V_PRODUCTS + K_PRODUCTS, deps=[s])
            masked = (i * N < full_from) | (i * N + N > full_to)
            next_ds = differentiate(s, dp, K_PRODUCTS, lse, delta, m, start, i * N, masked, mask, CONFIG)
            streams.v.release_at(stage_v)
            dq = split_d.wait(0, dq)
            streams.k.release_at(previous)
            ds = next_ds.to(dtype)
        stage = (i1 - 1 - i0) % CONFIG.key_stages
        dq = split_d.wait(0, split_d.multiply(ds, split_d.of(streams.k.tiles, stage, COLUMNS), dq))
    split_d.store(split_d.scale(dq, scale), q)
    fence_async_shared()
    store_panels(dq_desc, b, h, m0, streams.q, c * len(CONFIG.columns), len(CONFIG.columns))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_tiles", "log_interleaved", "S", "S_k", "window"])
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, stat_ptr, starts_ptr, sequence_ends_ptr,
    n_tiles, log_interleaved, S, S_k, window, tanh_scale, scale_log2, scale, CONFIG: gl.constexpr,
):  # fmt: skip
    """dQ."""
    PANELS: gl.constexpr = len(CONFIG.columns)
    PANELS_V: gl.constexpr = len(CONFIG.columns_v)
    KEY_STAGES: gl.constexpr = CONFIG.key_stages
    VALUE_STAGES: gl.constexpr = CONFIG.value_stages
    mask = Mask(S, S_k, window, starts_ptr, None, tanh_scale, scale_log2)
    scheduler = TileScheduler(n_tiles, gl.num_programs(0) // (n_tiles * CONFIG.group), log_interleaved)
    q, dout = allocate_tiles(q_desc, CONSUMERS * PANELS), allocate_tiles(dout_desc, CONSUMERS * PANELS_V)
    k, v = allocate_tiles(k_desc, KEY_STAGES * PANELS), allocate_tiles(v_desc, VALUE_STAGES * PANELS_V)
    queries_full = allocate_barriers(CONSUMERS, 1)
    k_channel = Channel(k, allocate_barriers(KEY_STAGES, 1), allocate_barriers(KEY_STAGES, CONSUMERS))
    v_channel = Channel(v, allocate_barriers(VALUE_STAGES, 1), allocate_barriers(VALUE_STAGES, CONSUMERS))
    streams = Streams(q, dout, queries_full, k_channel, v_channel)
    loaded = allocate_barriers(1, 1) if sequence_ends_ptr is not None else None
    packed = Packed(starts_ptr, sequence_ends_ptr, loaded)
    fence_async_shared()
    gl.warp_specialize(
        [
            (dq_partition, (0, stat_ptr, dq_desc, scale, scheduler, streams, mask, CONFIG)),
            (dq_partition, (1, stat_ptr, dq_desc, scale, scheduler, streams, mask, CONFIG)),
            (dq_load_partition, (q_desc, k_desc, v_desc, dout_desc, scheduler, streams, mask, packed, CONFIG)),
        ],
        [4, 1],  # warps
        REGISTERS,
    )
