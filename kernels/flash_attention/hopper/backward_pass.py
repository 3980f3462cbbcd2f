"""Flash attention's backward pass for Hopper, in Gluon: five products fused, with dQ summed by TMA.

A program owns a tile of 128 keys: K and V stay on the chip (up to head_dim 64 in registers), dK and dV in the registers
of two consumer warp groups, 64 keys each. Tiles of 64 queries stream past. Each step computes, transposed, so that sums
over queries are plain products,

    (1) Sᵀ = K Qᵀ   (2) dPᵀ = V dOᵀ        P = exp2(S − LSE)    dS = P · (dP − delta)
    (3) dV += Pᵀ dO (4) dK += dSᵀ Q        (5) dQ += dS K

    time →        step i                                                                            step i + 1
    producer      TMA: Q, row statistics and dO of i + 1, as stages become free
    consumer 0    (1) (2) of i │ P and dS → shared │ (3) of i, (5) of i − 1, (4) of i │ dQ → staging │ (1) (2) …
    consumer 1    the same for its own 64 keys; it waits for the other consumer's dS of i − 1 only
    reducer       TMA adds dQ of i − 2 to its accumulator                                            │ of i − 1
    finisher      an earlier head's accumulator → dQ, scaled and rounded; clears it

Pᵀ and dSᵀ are operands straight from registers. dQ needs dS of all 128 keys: the consumers exchange it through shared
memory and use it one step later; with three buffers neither waits for the other (L3).

Buffers, from their writer to who frees them:

    K, V            producer → both consumers, which write dK and dV over them at the end; the reducer frees them once
                    TMA has stored these (`store_keys`)
    Q, dO, stats    producer → both consumers, which free a stage at the end of its step (`step_of_queries`)
    dS              both consumers → both; no barrier frees it: a consumer writes step i after both wrote
                    step i − 1, so both have read step i − 3
    dQ staging      each consumer → reducer, which frees it once TMA has read it (`add`)

dq_accumulator.py has the accumulators of dQ, who waits for whom, and the order of the sum. `preprocess_kernel` runs
before: row statistics and cleared memory; with documents `sort_kernel`, too, but in deterministic mode.
"""

from __future__ import annotations

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

from . import split_d
from .compiler import opaque_zero
from .dq_accumulator import (
    CONSUMERS,
    Chunks,
    DqAccumulators,
    DqStaging,
    add,
    finish_partition,
    send_dq,
    wait_for_accumulator,
)
from .key_tiles import M, first_query_tile, load_queries, locate, needs_mask, next_query_tile, queries_descend, weights
from .mask import Mask, score_gradient
from .padding import Packed, load_pair, tokens_of_sequences
from .pipeline import (
    Channel,
    allocate_barriers,
    allocate_tiles,
    async_store,
    matrix,
)
from .scheduler import TileScheduler, for_each_work_tile, make_queue, receive, take
from .softcap import softcap_tanh

OWN_KEYS = gl.constexpr(64)  # of a tile, each consumer's
DS_STAGES = gl.constexpr(3)  # tiles of dS: one being read, one complete, one being written
READERS = gl.constexpr(4)  # of the queue: two consumers, reducer, finisher

# ---- buffers


class Keys(NamedTuple):
    """K and V of a work tile, and where dK and dV leave; the program's n-th is in stage n % key_stages."""

    k: Any
    """A `Channel`; its barriers are V's, too."""
    v: Any
    done: Any
    """Both consumers have read K and V for the last time."""
    replaced: Any
    """Both have written dK and dV over them. One for each stage: where a work tile has one tile of queries, they do so
    for the next work tile before the reducer has looked."""


class Queries(NamedTuple):
    """Tiles of Q and dO, `Channel`s, and with Q the row statistics that `preprocess_kernel` wrote."""

    q: Any
    row_stats: Any
    dout: Any


class DsExchange(NamedTuple):
    """dS of both consumers' keys, [stage, keys, 64 queries]."""

    tiles: Any
    full: Any
    """Both consumers have written a step's."""


@gluon.jit
def make_keys(k_desc, v_desc, STAGES: gl.constexpr):
    k, v = allocate_tiles(k_desc, STAGES), allocate_tiles(v_desc, STAGES)
    full = allocate_barriers(STAGES, 1)
    done = allocate_barriers(1, CONSUMERS)
    replaced = allocate_barriers(STAGES, CONSUMERS)
    return Keys(Channel(k, full, allocate_barriers(STAGES, 1)), v, done, replaced)


# ---- load_partition: one producer warp


@gluon.jit
def load_partition(
    q_desc, k_desc, v_desc, dout_desc, stat_desc, accumulators, queue, scheduler, keys, queries, mask, packed,
    CONFIG: gl.constexpr,
):  # fmt: skip
    descriptors = (q_desc, k_desc, v_desc, dout_desc, stat_desc)
    args = (descriptors, accumulators, scheduler, keys, queries, mask, packed)
    for_each_work_tile(take, wait_and_load, 0, False, queue, 0, 0, args, CONFIG)


@gluon.jit
def wait_and_load(c: gl.constexpr, work_tile, n, step, args, CONFIG: gl.constexpr):
    descriptors, accumulators, scheduler, keys, queries, mask, packed = args
    wait_for_accumulator(work_tile, accumulators, scheduler, CONFIG)
    return load(work_tile, n, step, descriptors, scheduler, keys, queries, mask, packed, CONFIG)


@gluon.jit
def load(work_tile, n, step, descriptors, scheduler, keys, queries, mask, packed, CONFIG: gl.constexpr):
    """The program's n-th work tile; returns the steps so far."""
    q_desc, k_desc, v_desc, dout_desc, stat_desc = descriptors
    query_descs = q_desc, stat_desc, dout_desc
    query_tiles = gl.cdiv(mask.S, M)
    tile = locate(work_tile, scheduler, mask, CONFIG)
    b, g, n0 = tile.b, tile.g, tile.n0
    descending = queries_descend(work_tile, scheduler, CONFIG)
    k_stage = n % CONFIG.key_stages
    full = keys.k.full.index(k_stage)
    keys.k.acquire(n)
    tokens = tokens_of_sequences(b, mask.S, packed)
    load_pair(k_desc, v_desc, b, g, n0, full, keys.k.tiles, keys.v, k_stage, 1, 1, tokens, packed)
    for i in range(0, CONFIG.group):
        h = g * CONFIG.group + i
        t = first_query_tile(tile, descending, CONFIG)
        for _ in range(tile.t0, tile.t3):
            load_queries(step, b, h, t, query_tiles, query_descs, queries, 1, 1, tokens, packed, CONFIG)
            t = next_query_tile(t, tile, descending)
            step += 1
    return step


# ---- mma_partition: two consumer warp groups


@gluon.jit
def mma_partition(
    c: gl.constexpr, scale, queue, scheduler, keys, queries, exchange, staging, mask, CONFIG: gl.constexpr
):
    """Keys [64 c, 64 c + 64) of each tile."""
    args = (scale, scheduler, keys, queries, exchange, staging, mask)
    for_each_work_tile(receive, compute, c, False, queue, 0, 0, args, CONFIG)


@gluon.jit
def compute(c: gl.constexpr, work_tile, n, step, args, CONFIG: gl.constexpr):
    """dK and dV of a work tile, and its part of dQ; returns the steps so far."""
    scale, scheduler, keys, queries, exchange, staging, mask = args
    COLUMNS: gl.constexpr = CONFIG.columns
    stage = n % CONFIG.key_stages
    k, v = matrix(keys.k.tiles, stage), matrix(keys.v, stage)
    k_own, v_own = k.slice(c * OWN_KEYS, OWN_KEYS, 0), v.slice(c * OWN_KEYS, OWN_KEYS, 0)
    k_parts, v_parts = split_d.split(k_own, COLUMNS), split_d.split(v_own, COLUMNS)
    tile = locate(work_tile, scheduler, mask, CONFIG)
    descending = queries_descend(work_tile, scheduler, CONFIG)
    dk, dv = split_d.zeros(k_parts), split_d.zeros(v_parts)
    keys.k.wait(n)
    if tile.t0 < tile.t3:
        operands = k_own, v_own
        if CONFIG.keys_in_registers:
            layout: gl.constexpr = gl.DotOperandLayout(0, split_d.mma_layout(M), 2)
            operands = k_own.load(layout), v_own.load(layout)
        t = first_query_tile(tile, descending, CONFIG)
        dk, dv = step_of_queries(
            c, True, step, t * M, tile.n0, needs_mask(t, tile), dk, dv, operands, stage, keys, queries, exchange,
            staging, mask, CONFIG,
        )  # fmt: skip
        step += 1
        for _ in range(1, CONFIG.group * (tile.t3 - tile.t0)):
            t = next_query_tile(t, tile, descending)
            dk, dv = step_of_queries(
                c, False, step, t * M, tile.n0, needs_mask(t, tile), dk, dv, operands, stage, keys, queries, exchange,
                staging, mask, CONFIG,
            )  # fmt: skip
            step += 1
        wait_for_ds(step, exchange)
        dq = multiply_dq(c, step - 1, k, exchange, CONFIG)
        dq = warpgroup_mma_wait(0, deps=[dq])
        send_dq(c, step - 1, dq, staging)

    mbarrier.arrive(keys.done.index(0), count=1)
    mbarrier.wait(keys.done.index(0), n & 1)
    split_d.store(split_d.scale(dk, scale), k_parts)
    split_d.store(dv, v_parts)
    mbarrier.arrive(keys.replaced.index(stage), count=1)
    return step


@gluon.jit
def step_of_queries(
    c: gl.constexpr, FIRST: gl.constexpr, step, m0, n0, masked, dk, dv, operands, k_stage, keys, queries, exchange,
    staging, mask, CONFIG: gl.constexpr,
):  # fmt: skip
    """One tile of queries: adds to dK and dV, and sends dQ of the tile before (there is none when FIRST)."""
    dtype: gl.constexpr = queries.q.tiles.dtype
    gl.static_assert(CONFIG.keys_in_registers or CONFIG.key_stages == 1)
    if not CONFIG.keys_in_registers:
        k_stage = opaque_zero(m0, 30)
    k, v = matrix(keys.k.tiles, k_stage), matrix(keys.v, k_stage)
    COLUMNS: gl.constexpr = CONFIG.columns
    PRODUCTS: gl.constexpr = len(CONFIG.columns)
    query_layout: gl.constexpr = gl.SliceLayout(0, split_d.mma_layout(M))
    stage, phase = queries.q.slot(step)
    q = split_d.of(queries.q.tiles, stage, COLUMNS)
    dout = split_d.of(queries.dout.tiles, stage, COLUMNS)
    row_stats = queries.row_stats.index(stage)

    # [64 keys, M queries]: transposed
    k_operand, v_operand = operands
    if not CONFIG.keys_in_registers:
        k_operand = k.slice(c * OWN_KEYS, OWN_KEYS, 0)
        v_operand = v.slice(c * OWN_KEYS, OWN_KEYS, 0)
    queries.q.wait_at(stage, phase)
    s = split_d.multiply_transposed(split_d.split(k_operand, COLUMNS), q)  # (1) Sᵀ = K Qᵀ
    queries.dout.wait_at(stage, phase)
    dp = split_d.multiply_transposed(split_d.split(v_operand, COLUMNS), dout)  # (2) dPᵀ = V dOᵀ

    lse = row_stats.slice(0, M, 0).load(query_layout)
    s = warpgroup_mma_wait(PRODUCTS, deps=[s])
    s = softcap_tanh(s, mask.tanh_scale, CONFIG.softcap)
    p = weights(s, lse, m0, n0, c * OWN_KEYS, masked, row_stats, mask, CONFIG)
    weight = p.to(dtype)
    delta = row_stats.slice(M, M, 0).load(query_layout)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = score_gradient(p, dp, gl.expand_dims(delta, 0), s, CONFIG.softcap).to(dtype)

    if not FIRST:  # all have written dS of step − 1, and so have read that of step − 3, which this one replaces
        wait_for_ds(step, exchange)
    exchange.tiles.index(step % DS_STAGES).slice(c * OWN_KEYS, OWN_KEYS, 0).store(ds)
    mbarrier.arrive(exchange.full.index(0), count=1)
    dv = split_d.multiply(weight, dout, dv)  # (3) dV += Pᵀ dO
    if not FIRST:
        dq = multiply_dq(c, step - 1, k, exchange, CONFIG)  # (5) dQ = dS K, of the step before
    dk = split_d.multiply(ds, q, dk)  # (4) dK += dSᵀ Q
    if not FIRST:
        dq = warpgroup_mma_wait(PRODUCTS, deps=[dq])
        send_dq(c, step - 1, dq, staging)  # under (4)
    both = split_d.wait(0, dk + dv)
    queries.q.release_at(stage)  # and dO: they share the barrier
    return both[:PRODUCTS], both[PRODUCTS:]


@gluon.jit
def wait_for_ds(step, exchange):
    """Wait until both consumers have written dS of the step before."""
    mbarrier.wait(exchange.full.index(0), (step & 1) ^ 1)
    fence_async_shared()


@gluon.jit
def multiply_dq(c: gl.constexpr, step, k, exchange, CONFIG: gl.constexpr):
    """Start dS K of a step: consumer c's columns, all 128 keys."""
    FIRST: gl.constexpr = c * CONFIG.dq_columns[0]
    COLUMNS: gl.constexpr = CONFIG.dq_columns[c]
    ds = exchange.tiles.index(step % DS_STAGES).permute((1, 0))
    zeros = gl.zeros([M, COLUMNS], gl.float32, split_d.mma_layout(COLUMNS))
    return warpgroup_mma(ds, k.slice(FIRST, COLUMNS, 1), zeros, use_acc=False, is_async=True)


# ---- reduce_partition: one warp. dK and dV leave through it, too, so that no consumer waits for them


@gluon.jit
def reduce_partition(
    accum_desc, dk_desc, dv_desc, accumulators, queue, scheduler, keys, staging, mask, CONFIG: gl.constexpr
):
    args = (accum_desc, dk_desc, dv_desc, accumulators, scheduler, keys, staging, mask)
    for_each_work_tile(receive, add_and_store, 0, False, queue, 0, 0, args, CONFIG)


@gluon.jit
def add_and_store(c: gl.constexpr, work_tile, n, step, args, CONFIG: gl.constexpr):
    accum_desc, dk_desc, dv_desc, accumulators, scheduler, keys, staging, mask = args
    step = add(work_tile, step, accum_desc, accumulators, scheduler, staging, mask, CONFIG)
    store_keys(work_tile, n, dk_desc, dv_desc, scheduler, keys, mask, CONFIG)
    return step


@gluon.jit
def store_keys(work_tile, n, dk_desc, dv_desc, scheduler, keys, mask, CONFIG: gl.constexpr):
    """dK and dV of the program's n-th work tile, once they have replaced K and V; frees the stage of all four."""
    tile = locate(work_tile, scheduler, mask, CONFIG)
    stage = n % CONFIG.key_stages
    mbarrier.wait(keys.replaced.index(stage), n // CONFIG.key_stages & 1)
    fence_async_shared()
    async_store(dk_desc, [tile.b, tile.g, tile.n0, 0], keys.k.tiles.index(stage))
    async_store(dv_desc, [tile.b, tile.g, tile.n0, 0], keys.v.index(stage))
    tma.store_wait(0)
    keys.k.release_at(stage)


# ---- the kernel


@gluon.jit(do_not_specialize=["count", "lag", "n_work_tiles", "n_tiles", "log_interleaved", "S", "S_k", "window"])
def backward_kernel(
    q_desc, k_desc, v_desc, dout_desc, stat_desc, accum0_desc, accum1_desc, chunk_desc, dq_desc, dk_desc, dv_desc,
    accum_ptr, starts_ptr, sequence_ends_ptr, query_ends_ptr, sorted_ptr, taken_ptr, added_ptr, cleared_ptr,
    semaphore_ptr, count, lag, n_work_tiles, n_tiles, log_interleaved, S, S_k, window, tanh_scale, scale_log2, scale,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """dQ, dK and dV."""
    dtype: gl.constexpr = q_desc.dtype
    STAGES: gl.constexpr = CONFIG.stages
    mask = Mask(S, S_k, window, None, query_ends_ptr, tanh_scale, scale_log2)
    keys = make_keys(k_desc, v_desc, CONFIG.key_stages)
    q, dout = allocate_tiles(q_desc, STAGES), allocate_tiles(dout_desc, STAGES)
    row_stats = gl.allocate_shared_memory(gl.float32, [STAGES] + stat_desc.block_shape, stat_desc.layout)
    empty = allocate_barriers(STAGES, CONSUMERS)  # of both: a consumer is done with Q and dO at the same time
    q_channel = Channel(q, allocate_barriers(STAGES, 1), empty)
    queries = Queries(q_channel, row_stats, Channel(dout, allocate_barriers(STAGES, 1), empty))
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONFIG.n, M], dtype)
    ds = gl.allocate_shared_memory(dtype, [DS_STAGES, CONFIG.n, M], ds_layout)
    dq0 = gl.allocate_shared_memory(gl.float32, accum0_desc.block_shape, accum0_desc.layout)
    dq1 = gl.allocate_shared_memory(gl.float32, accum1_desc.block_shape, accum1_desc.layout)
    exchange = DsExchange(ds, allocate_barriers(1, CONSUMERS))
    staging = DqStaging((dq0, dq1), allocate_barriers(CONSUMERS, 1), allocate_barriers(CONSUMERS, 1))
    complete = gl.allocate_shared_memory(gl.float32, [CONFIG.chunk_stages] + chunk_desc.block_shape, chunk_desc.layout)
    rounded = gl.allocate_shared_memory(dtype, [2] + dq_desc.block_shape, dq_desc.layout)
    chunks = Chunks(complete, allocate_barriers(CONFIG.chunk_stages, 1), rounded)
    accumulators = DqAccumulators(count, lag, added_ptr, cleared_ptr, semaphore_ptr)
    queue = make_queue(n_work_tiles, taken_ptr, READERS)
    scheduler = TileScheduler(n_tiles, n_work_tiles // n_tiles, log_interleaved, sorted_ptr)
    loaded = allocate_barriers(1, 1) if sequence_ends_ptr is not None else None
    packed = Packed(starts_ptr, sequence_ends_ptr, loaded)
    fence_async_shared()
    accum_desc = (accum0_desc, accum1_desc)
    gl.warp_specialize(
        [
            (mma_partition, (0, scale, queue, scheduler, keys, queries, exchange, staging, mask, CONFIG)),
            (mma_partition, (1, scale, queue, scheduler, keys, queries, exchange, staging, mask, CONFIG)),
            (
                load_partition,
                (
                    q_desc, k_desc, v_desc, dout_desc, stat_desc, accumulators, queue, scheduler, keys, queries, mask,
                    packed, CONFIG,
                ),
            ),
            (
                reduce_partition,
                (accum_desc, dk_desc, dv_desc, accumulators, queue, scheduler, keys, staging, mask, CONFIG),
            ),
            (
                finish_partition,
                (accum_ptr, chunk_desc, dq_desc, scale, accumulators, queue, scheduler, chunks, mask, CONFIG),
            ),
        ],
        [4, 1, 1, 2],  # warps
        CONFIG.registers,
    )  # fmt: skip
