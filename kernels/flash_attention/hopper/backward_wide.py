"""Flash attention's backward pass for Hopper where head_dim is above 128: dK and dV, and then dQ.

Wide tiles leave a program 64 keys, and it would add to dQ twice as often as backward_pass.py does: those sums in global
memory, not the products, then set the speed. So there are two kernels here, which compute the scores twice and
add nothing up in memory: seven products instead of five, in the same order in every run.

`dkdv_kernel`: a program owns 64 keys, and its two consumers share the columns: each has dK and dV of one half of
each part of head_dim. The scores cannot be shared that way (their sums run over all of head_dim), so each consumer
computes those of 32 of a tile's 64 queries, and they exchange P and dS through shared memory.

`dq_kernel`: a program owns 128 queries, 64 for each consumer. Tiles of 64 keys stream past; dS goes from the registers
into the product with K, which runs one step later, under the next scores.
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

from . import parts
from .backward_pass import CONSUMERS, M, Queries, load, locate, make_keys, next_tile
from .common import Mask, async_load, async_store, barriers, matrix, seen_by, sees, start_of, tanh
from .order import Order, place_of

OWN = gl.constexpr(32)  # of a tile's queries, those whose scores a consumer of `dkdv_kernel` computes


class Exchange(NamedTuple):
    """P and dS, [place, 64 keys, 64 queries], on their way between consumers: of two places, one is being read."""

    p: Any
    ds: Any
    full: Any


@gluon.jit
def multiply_scores(c: gl.constexpr, tiles, step, keys, CONFIG: gl.constexpr):
    """Start keys · rowsᵀ for the consumer's own rows of a tile of Q or dO."""
    rows = matrix(tiles, step % CONFIG.stages).slice(c * OWN, OWN, 0)
    return parts.multiply_transposed(parts.cut(keys, CONFIG), parts.cut(rows, CONFIG))


@gluon.jit
def halves(c: gl.constexpr, tile, CONFIG: gl.constexpr):
    """The consumer's half of each of a tile's parts."""
    cut = ()
    for i in gl.static_range(len(CONFIG.columns)):
        cut += (half(c, parts.part(tile, i, CONFIG)),)
    return cut


@gluon.jit
def half(c: gl.constexpr, part):
    COLUMNS: gl.constexpr = part.shape[1] // CONSUMERS
    return part.slice(c * COLUMNS, COLUMNS, 1)


@gluon.jit
def weigh(c: gl.constexpr, step, s, m0, n0, masked, queries, mask, CONFIG: gl.constexpr):
    """P, and the capped scores, of what `multiply_scores` gave."""
    N: gl.constexpr = CONFIG.n
    query: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    key: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    statistics = queries.statistics.index(step % CONFIG.stages)
    if CONFIG.softcap:
        s = tanh(s * mask.cap)
    lse = statistics.slice(c * OWN, OWN, 0).load(query)
    p = gl.exp2(s * mask.factor - gl.expand_dims(lse, 0))
    if masked:
        m = gl.expand_dims(m0 + c * OWN + gl.arange(0, OWN, query), 0)
        n = gl.expand_dims(n0 + gl.arange(0, N, key), 1)
        start = 0
        if CONFIG.starts:
            start = statistics.slice(2 * M + c * OWN, OWN, 0).load(query)
            start = gl.expand_dims(start.to(gl.int32, bitcast=True), 0)
        p = gl.where(sees(mask, m, start, n, CONFIG), p, 0.0)
    return p, s


@gluon.jit
def send(c: gl.constexpr, step, p, s, dp, queries, exchange, CONFIG: gl.constexpr):
    """Put the consumer's P and dS where both consumers read them."""
    query: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    delta = queries.statistics.index(step % CONFIG.stages).slice(M + c * OWN, OWN, 0).load(query)
    ds = p * (dp - gl.expand_dims(delta, 0))
    if CONFIG.softcap:
        ds *= 1 - s * s
    exchange.p.index(step % 2).slice(c * OWN, OWN, 1).store(p.to(exchange.p.dtype))
    exchange.ds.index(step % 2).slice(c * OWN, OWN, 1).store(ds.to(exchange.ds.dtype))
    fence_async_shared()
    mbarrier.arrive(exchange.full.index(0), count=1)


@gluon.jit
def consume(
    c: gl.constexpr, LAST: gl.constexpr, step, m0, n0, masked, dk, dv, keys, queries, exchange, mask,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """One tile of queries, whose P and dS have been sent: adds to dK and dV. Unless LAST, also sends P and dS of the
    next tile, at m0."""
    PRODUCTS: gl.constexpr = len(CONFIG.columns)
    place = m0 >> 30  # 0, as in backward_pass.py
    k, v = matrix(keys.k, place), matrix(keys.v, place)
    stage = step % CONFIG.stages
    following = step + 1
    phase = following // CONFIG.stages & 1
    q, dout = halves(c, matrix(queries.q, stage), CONFIG), halves(c, matrix(queries.dout, stage), CONFIG)
    p = exchange.p.index(step % 2)
    ds = exchange.ds.index(step % 2)
    if LAST:
        mbarrier.wait(exchange.full.index(0), step & 1)
        dk = parts.multiply(ds, q, dk)
        dv = parts.multiply(p, dout, dv)
        dk = parts.wait(PRODUCTS, dk)
        dv = parts.wait(0, dv)
        mbarrier.arrive(queries.q_empty.index(stage), count=1)
    else:
        mbarrier.wait(queries.q_full.index(following % CONFIG.stages), phase)
        s = multiply_scores(c, queries.q, following, k, CONFIG)
        mbarrier.wait(exchange.full.index(0), step & 1)
        dk = parts.multiply(ds, q, dk)
        mbarrier.wait(queries.dout_full.index(following % CONFIG.stages), phase)
        dp = multiply_scores(c, queries.dout, following, v, CONFIG)
        dv = parts.multiply(p, dout, dv)
        s = warpgroup_mma_wait(3 * PRODUCTS, deps=[s])
        weights, s = weigh(c, following, s, m0, n0, masked, queries, mask, CONFIG)
        dk = parts.wait(2 * PRODUCTS, dk)
        mbarrier.arrive(queries.q_empty.index(stage), count=1)
        dp = warpgroup_mma_wait(PRODUCTS, deps=[dp])
        send(c, following, weights, s, dp, queries, exchange, CONFIG)
        dv = parts.wait(0, dv)
    mbarrier.arrive(queries.dout_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def dkdv_consumer(c: gl.constexpr, dk_rows, dv_rows, scale, order, keys, queries, exchange, mask, CONFIG: gl.constexpr):
    """The c-th halves of the parts of dK and dV."""
    PRODUCTS: gl.constexpr = len(CONFIG.columns)
    k, v = matrix(keys.k, 0), matrix(keys.v, 0)
    b, g, n0, t0, t1, t2, t3 = locate(gl.program_id(0), order, mask, CONFIG)
    k_halves, v_halves = halves(c, k, CONFIG), halves(c, v, CONFIG)
    dk, dv = parts.zeros(k_halves), parts.zeros(v_halves)
    mbarrier.wait(keys.full.index(0), 0)
    if t0 < t3:
        t = t0
        mbarrier.wait(queries.q_full.index(0), 0)
        s = multiply_scores(c, queries.q, 0, k, CONFIG)
        mbarrier.wait(queries.dout_full.index(0), 0)
        dp = multiply_scores(c, queries.dout, 0, v, CONFIG)
        s = warpgroup_mma_wait(PRODUCTS, deps=[s])
        p, s = weigh(c, 0, s, t * M, n0, (t < t1) | (t >= t2), queries, mask, CONFIG)
        dp = warpgroup_mma_wait(0, deps=[dp])
        send(c, 0, p, s, dp, queries, exchange, CONFIG)
        last = CONFIG.group * (t3 - t0) - 1
        for step in range(0, last):
            t = next_tile(t, t0, t3, False)
            masked = (t < t1) | (t >= t2)
            dk, dv = consume(c, False, step, t * M, n0, masked, dk, dv, keys, queries, exchange, mask, CONFIG)
        dk, dv = consume(c, True, last, t * M, n0, False, dk, dv, keys, queries, exchange, mask, CONFIG)

    mbarrier.arrive(keys.done.index(0), count=1)
    mbarrier.wait(keys.done.index(0), 0)
    parts.store(parts.scale(dk, scale), k_halves)
    parts.store(dv, v_halves)
    fence_async_shared()
    mbarrier.arrive(keys.replaced.index(0), count=1)
    if c == 0:
        mbarrier.wait(keys.replaced.index(0), 0)
        async_store(dk_rows, [b, g, n0, 0], keys.k.index(0))
        async_store(dv_rows, [b, g, n0, 0], keys.v.index(0))
        tma.store_wait(0)


@gluon.jit
def dkdv_producer(q_rows, k_rows, v_rows, dout_rows, stat_rows, order, keys, queries, mask, CONFIG: gl.constexpr):
    descriptors = (q_rows, k_rows, v_rows, dout_rows, stat_rows)
    n = 0
    step = 0
    load(gl.program_id(0), n, step, descriptors, order, keys, queries, mask, CONFIG)


@gluon.jit(do_not_specialize=["n_tiles", "log_mixed", "S", "S_k", "window"])
def dkdv_kernel(
    q_rows, k_rows, v_rows, dout_rows, stat_rows, dk_rows, dv_rows, ends_ptr,
    n_tiles, log_mixed, S, S_k, window, cap, factor, scale, CONFIG: gl.constexpr,
):  # fmt: skip
    """dK and dV; see `dkdv_consumer`."""
    dtype: gl.constexpr = q_rows.dtype
    STAGES: gl.constexpr = CONFIG.stages
    mask = Mask(S, S_k, window, None, ends_ptr, cap, factor)
    order = Order(n_tiles, gl.num_programs(0) // n_tiles, log_mixed)
    keys = make_keys(k_rows, v_rows, CONFIG.key_stages)
    q = gl.allocate_shared_memory(dtype, [STAGES] + q_rows.block_shape, q_rows.layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES] + q_rows.block_shape, q_rows.layout)
    statistics = gl.allocate_shared_memory(gl.float32, [STAGES] + stat_rows.block_shape, stat_rows.layout)
    queries = Queries(
        q, dout, statistics, barriers(STAGES, 1), barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS), barriers(STAGES, CONSUMERS),
    )  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONFIG.n, M], dtype)
    p = gl.allocate_shared_memory(dtype, [2, CONFIG.n, M], layout)
    ds = gl.allocate_shared_memory(dtype, [2, CONFIG.n, M], layout)
    exchange = Exchange(p, ds, barriers(1, CONSUMERS))
    fence_async_shared()
    gl.warp_specialize(
        [
            (dkdv_consumer, (0, dk_rows, dv_rows, scale, order, keys, queries, exchange, mask, CONFIG)),
            (dkdv_consumer, (1, dk_rows, dv_rows, scale, order, keys, queries, exchange, mask, CONFIG)),
            (dkdv_producer, (q_rows, k_rows, v_rows, dout_rows, stat_rows, order, keys, queries, mask, CONFIG)),
        ],
        [4, 1],
        [240, 24],
    )


class Streams(NamedTuple):
    """Each consumer's Q and dO, and the tiles of K and V that pass: two of K, which is used twice, and one of V."""

    q: Any
    dout: Any
    queries_full: Any
    k: Any
    v: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


@gluon.jit
def locate_queries(order, mask, CONFIG: gl.constexpr):
    """(b, h, m0) of the program, and the tiles of keys [i0, i1) that some of its queries see.

    Of a head the last queries first: with a causal mask they see the most keys.
    """
    M2: gl.constexpr = CONSUMERS * M
    head, tile = place_of(gl.program_id(0), order, CONFIG.group, CONFIG)
    b = head // CONFIG.heads
    m0 = (order.n_tiles - 1 - tile) * M2
    some_from, _ = seen_by(mask, m0, b, CONFIG)
    _, some_to = seen_by(mask, gl.minimum(m0 + M2, mask.S) - 1, b, CONFIG)
    i0 = gl.maximum(some_from, 0) // CONFIG.n
    return b, head % CONFIG.heads, m0, i0, gl.maximum(gl.cdiv(some_to, CONFIG.n), i0)


@gluon.jit
def dq_producer(q_rows, k_rows, v_rows, dout_rows, order, streams, mask, CONFIG: gl.constexpr):
    D: gl.constexpr = q_rows.block_shape[3]
    BYTES: gl.constexpr = q_rows.dtype.primitive_bitwidth // 8
    b, h, m0, i0, i1 = locate_queries(order, mask, CONFIG)
    for c in gl.static_range(CONSUMERS):
        full = streams.queries_full.index(c)
        mbarrier.expect(full, 2 * M * D * BYTES)
        async_load(q_rows, [b, h, m0 + c * M, 0], full, streams.q.index(c))
        async_load(dout_rows, [b, h, m0 + c * M, 0], full, streams.dout.index(c))
    for i in range(i0, i1):
        step = i - i0
        at = [b, h // CONFIG.group, i * CONFIG.n, 0]
        full = streams.k_full.index(step % 2)
        mbarrier.wait(streams.k_empty.index(step % 2), (step // 2 & 1) ^ 1)
        mbarrier.expect(full, CONFIG.n * D * BYTES)
        async_load(k_rows, at, full, streams.k.index(step % 2))
        full = streams.v_full.index(0)
        mbarrier.wait(streams.v_empty.index(0), (step & 1) ^ 1)
        mbarrier.expect(full, CONFIG.n * D * BYTES)
        async_load(v_rows, at, full, streams.v.index(0))


@gluon.jit
def differentiate(s, dp, AFTER: gl.constexpr, lse, delta, m, start, n0, masked, mask, CONFIG: gl.constexpr):
    """dS [64 queries, 64 keys], once dP is complete, which AFTER products were started after."""
    N: gl.constexpr = CONFIG.n
    if CONFIG.softcap:
        s = tanh(s * mask.cap)
    p = gl.exp2(s * mask.factor - gl.expand_dims(lse, 1))
    if masked:
        n = gl.expand_dims(n0 + gl.arange(0, N, gl.SliceLayout(0, s.type.layout)), 0)
        p = gl.where(sees(mask, gl.expand_dims(m, 1), start, n, CONFIG), p, 0.0)
    dp = warpgroup_mma_wait(AFTER, deps=[dp])
    ds = p * (dp - gl.expand_dims(delta, 1))
    if CONFIG.softcap:
        ds *= 1 - s * s
    return ds


@gluon.jit
def dq_consumer(c: gl.constexpr, stat_ptr, dq_rows, scale, order, streams, mask, CONFIG: gl.constexpr):
    """dQ of queries [64 c, 64 c + 64) of the tile."""
    N: gl.constexpr = CONFIG.n
    PRODUCTS: gl.constexpr = len(CONFIG.columns)
    NUMBERS: gl.constexpr = CONFIG.numbers
    dtype: gl.constexpr = dq_rows.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    row: gl.constexpr = gl.SliceLayout(1, scores)
    b, h, m0, i0, i1 = locate_queries(order, mask, CONFIG)
    m0 += c * M
    full_from, _ = seen_by(mask, gl.minimum(m0 + M, mask.S) - 1, b, CONFIG)
    _, full_to = seen_by(mask, gl.minimum(m0, mask.S - 1), b, CONFIG)
    query_tiles = gl.cdiv(mask.S, M)
    m = m0 + gl.arange(0, M, row)
    tile = (b * CONFIG.heads + h) * query_tiles + gl.minimum(m0 // M, query_tiles - 1)
    stat_ptr += tile.to(gl.int64) * NUMBERS + gl.arange(0, M, row)
    lse = gl.load(stat_ptr)
    delta = gl.load(stat_ptr + M)
    start = gl.expand_dims(start_of(mask, m, b, CONFIG), 1) if CONFIG.starts else 0
    q = parts.of(streams.q, c, CONFIG)
    dq = parts.zeros(q)
    mbarrier.wait(streams.queries_full.index(c), 0)
    if i0 < i1:
        mbarrier.wait(streams.k_full.index(0), 0)
        s = parts.multiply_transposed(q, parts.of(streams.k, 0, CONFIG))
        mbarrier.wait(streams.v_full.index(0), 0)
        dp = parts.multiply_transposed(parts.of(streams.dout, c, CONFIG), parts.of(streams.v, 0, CONFIG))
        s = warpgroup_mma_wait(PRODUCTS, deps=[s])
        masked = (i0 * N < full_from) | (i0 * N + N > full_to)
        ds = differentiate(s, dp, 0, lse, delta, m, start, i0 * N, masked, mask, CONFIG).to(dtype)
        mbarrier.arrive(streams.v_empty.index(0), count=1)
        for i in range(i0 + 1, i1):
            step = i - i0
            k = parts.of(streams.k, step % 2, CONFIG)
            mbarrier.wait(streams.k_full.index(step % 2), step // 2 & 1)
            place = c + (i >> 26)  # c, as in backward_pass.py
            s = parts.multiply_transposed(parts.of(streams.q, place, CONFIG), k)
            mbarrier.wait(streams.v_full.index(0), step & 1)
            dp = parts.multiply_transposed(parts.of(streams.dout, place, CONFIG), parts.of(streams.v, 0, CONFIG))
            dq = parts.multiply(ds, parts.of(streams.k, (step - 1) % 2, CONFIG), dq)
            s = warpgroup_mma_wait(2 * PRODUCTS, deps=[s])
            masked = (i * N < full_from) | (i * N + N > full_to)
            next_ds = differentiate(s, dp, PRODUCTS, lse, delta, m, start, i * N, masked, mask, CONFIG)
            mbarrier.arrive(streams.v_empty.index(0), count=1)
            dq = parts.wait(0, dq)
            mbarrier.arrive(streams.k_empty.index((step - 1) % 2), count=1)
            ds = next_ds.to(dtype)
        dq = parts.wait(0, parts.multiply(ds, parts.of(streams.k, (i1 - 1 - i0) % 2, CONFIG), dq))
    parts.store(parts.scale(dq, scale), q)
    fence_async_shared()
    async_store(dq_rows, [b, h, m0, 0], streams.q.index(c))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_tiles", "log_mixed", "S", "S_k", "window"])
def dq_kernel(
    q_rows, k_rows, v_rows, dout_rows, dq_rows, stat_ptr, starts_ptr,
    n_tiles, log_mixed, S, S_k, window, cap, factor, scale, CONFIG: gl.constexpr,
):  # fmt: skip
    """dQ; see `dq_consumer`."""
    dtype: gl.constexpr = q_rows.dtype
    mask = Mask(S, S_k, window, starts_ptr, None, cap, factor)
    order = Order(n_tiles, gl.num_programs(0) // (n_tiles * CONFIG.group), log_mixed)
    q = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_rows.block_shape, q_rows.layout)
    dout = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_rows.block_shape, q_rows.layout)
    k = gl.allocate_shared_memory(dtype, [2] + k_rows.block_shape, k_rows.layout)
    v = gl.allocate_shared_memory(dtype, [1] + k_rows.block_shape, k_rows.layout)
    streams = Streams(
        q, dout, barriers(CONSUMERS, 1), k, v,
        barriers(2, 1), barriers(2, CONSUMERS), barriers(1, 1), barriers(1, CONSUMERS),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (dq_consumer, (0, stat_ptr, dq_rows, scale, order, streams, mask, CONFIG)),
            (dq_consumer, (1, stat_ptr, dq_rows, scale, order, streams, mask, CONFIG)),
            (dq_producer, (q_rows, k_rows, v_rows, dout_rows, order, streams, mask, CONFIG)),
        ],
        [4, 1],
        [240, 24],
    )
