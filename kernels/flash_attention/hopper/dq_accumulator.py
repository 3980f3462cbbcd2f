"""dQ, summed over tiles of keys in global memory: accumulators for a few heads, in the L2 cache.

Every tile of keys adds to the dQ of the queries that see it, by TMA's reductions in float32 (`reduce_partition`). Only
`count` key heads have an accumulator at a time, that of head % count. Later work tiles convert an earlier head's
complete sums to dQ and clear its accumulator (`finish_partition`). Two counters for each key head order this:

    added_ptr     counts work tiles that have added all they have to; at n_tiles the head's sums are complete
    cleared_ptr   counts work tiles that have converted their share; at n_tiles the accumulator is free for head + count

A work tile waits only for earlier ones, and programs start in the order of their numbers, so nothing can deadlock
(L12). CUDA does not promise that order; every NVIDIA GPU has it.

The order of the sum. In the default mode tiles are added as they come, and the last bits of dQ differ between runs. In
deterministic mode (for one shape on one GPU) `semaphore_ptr` counts the key tiles that have been added to each tile of
queries, and a tile waits until all before it have: from the last keys that the queries see down to the first, or from
the first up where queries are taken from the last down (`queries_descend`, `additions_before`). An addition is two of
TMA's, each of 64 queries and one consumer's columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from . import split_d
from .key_tiles import CONSUMERS, M, first_query_tile, locate, next_query_tile, queries_descend
from .pipeline import (
    async_add,
    async_load,
    async_store,
    barrier,
    fence_async_global,
    wait_for_count,
    wait_until_written,
)
from .scheduler import for_each_work_tile, receive, tile_of

CHUNK_COLUMNS = gl.constexpr(16)
"""Columns of dQ in a chunk that is converted: 64 rows of it are 4 KiB of sums."""
CHUNK_ROW = gl.constexpr(32)
"""Sums are addressed in rows of 32 float32 numbers, 128 bytes: the unit of TMA's swizzle."""


class DqAccumulators(NamedTuple):
    count: Any
    """Key heads that have an accumulator at a time."""
    lag: Any
    """Work tiles of a head convert the sums of the head `lag` before, which nearly always are complete by then."""
    added_ptr: Any
    """int32, for each key head: how many of its work tiles have added all they have to."""
    cleared_ptr: Any
    """int32, for each key head: how many work tiles have converted their share of its sums, and cleared it."""
    semaphore_ptr: Any
    """int32, for each tile of queries, in deterministic mode: how many key tiles have been added to its dQ."""


class DqStaging(NamedTuple):
    """One step's dQ on its way from each consumer to the reducer."""

    tiles: Any
    """One for each consumer, with its columns."""
    full: Any
    empty: Any


class Chunks(NamedTuple):
    """Complete sums in float32 on their way to shared memory, and, rounded, out of it."""

    sums: Any
    full: Any
    rounded: Any


@gluon.jit
def wait_for_accumulator(work_tile, accumulators, scheduler, CONFIG: gl.constexpr):
    """Wait until the head that had the accumulator before has left it."""
    head, _ = tile_of(work_tile, scheduler, 1, CONFIG)
    if head >= accumulators.count:
        wait_for_count(accumulators.cleared_ptr + head - accumulators.count, scheduler.n_tiles)


@gluon.jit
def send_dq(c: gl.constexpr, step, dq, staging):
    """Hand a step's dQ to the reducer, in the order in which the threads hold it, which `finish` undoes.

    The fence between these stores and TMA's reading is the reader's: compiler.py (L3).
    """
    COLUMNS: gl.constexpr = dq.shape[1]
    mbarrier.wait(staging.empty.index(c), (step & 1) ^ 1)
    staging.tiles[c].store(split_d.in_thread_order(dq).reshape([M * COLUMNS // CHUNK_ROW, CHUNK_ROW]))
    mbarrier.arrive(staging.full.index(c), count=1)


@gluon.jit
def additions_before(n0, t, n_tiles, descending, mask, CONFIG: gl.constexpr):
    """How many tiles of keys are added to the dQ of query tile t before the one at n0: all later ones that t sees, or,
    where query tiles descend, all earlier ones."""
    end = (t + 1) * M + (mask.S_k - mask.S)
    if not CONFIG.causal:
        end = end + mask.window - 1 if CONFIG.window else mask.S_k
    tile = n0 // CONFIG.n
    return gl.where(descending, tile, gl.minimum(gl.cdiv(end, CONFIG.n), n_tiles) - 1 - tile)


@gluon.jit
def add(work_tile, step, accum_desc, accumulators, scheduler, staging, mask, CONFIG: gl.constexpr):
    """Add what a work tile's consumers put into `staging` to the accumulator; returns the steps so far."""
    ROWS: gl.constexpr = accum_desc[0].block_shape[0] + accum_desc[1].block_shape[0]
    query_tiles = gl.cdiv(mask.S, M)
    keys = locate(work_tile, scheduler, mask, CONFIG)
    descending = queries_descend(work_tile, scheduler, CONFIG)
    head = keys.b * (CONFIG.heads // CONFIG.group) + keys.g
    n_steps = CONFIG.group * (keys.t3 - keys.t0)
    t = first_query_tile(keys, descending, CONFIG)
    first = head % accumulators.count * (CONFIG.group * query_tiles)
    tile = first + t
    previous = tile - 1  # not `tile`: the compiler would take the two for one, here and in the loop
    added = 0
    semaphore_ptr = accumulators.semaphore_ptr
    if CONFIG.deterministic:
        semaphore_ptr += (head - head % accumulators.count) * (CONFIG.group * query_tiles)
        added = gl.load(semaphore_ptr + tile, mask=n_steps > 0, other=0, volatile=True)
    for i in range(0, n_steps):
        now = tile
        before = additions_before(keys.n0, t, scheduler.n_tiles, descending, mask, CONFIG)
        t = next_query_tile(t, keys, descending)
        if CONFIG.group > 1:
            first = gl.where((i + 1) % (keys.t3 - keys.t0) == 0, first + query_tiles, first)
        tile = first + t
        if CONFIG.deterministic:
            while added < before:
                added = gl.load(semaphore_ptr + now, volatile=True)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(staging.full.index(c), step & 1)
            fence_async_shared()
            async_add(accum_desc[c], [now * ROWS + c * accum_desc[0].block_shape[0], 0], staging.tiles[c])
        if CONFIG.deterministic:
            # For the next step, under this one: the answer takes half as long as a step. A load and no atomic:
            # compiler.py (L4). 491 TFLOP/s instead of 457 at head_dim 64.
            added = gl.load(semaphore_ptr + tile, mask=i + 1 < n_steps, other=0, volatile=True)
        for c in gl.static_range(CONSUMERS):
            tma.store_wait(CONSUMERS - 1 - c)
            mbarrier.arrive(staging.empty.index(c), count=1)
        if CONFIG.deterministic:
            wait_until_written(CONSUMERS)  # what left a step ago: to arrive takes longer than to leave
            # Relaxed: whoever waits for it reads no sum, and the addition itself is complete.
            gl.atomic_add(semaphore_ptr + previous, 1, mask=i > 0, sem="relaxed")
        previous = now
        step += 1
    wait_until_written(0)
    if CONFIG.deterministic:
        gl.atomic_add(semaphore_ptr + previous, 1, mask=n_steps > 0, sem="relaxed")
    gl.atomic_add(accumulators.added_ptr + head, 1, sem="release")
    return step


@gluon.jit
def finish_partition(
    accum_ptr, chunk_desc, dq_desc, scale, accumulators, queue, scheduler, chunks, mask, CONFIG: gl.constexpr
):
    """Converts sums to dQ. No work tiles follow those of the last `lag` heads, so extra numbers convert their sums."""
    args = (accum_ptr, chunk_desc, dq_desc, scale, accumulators, scheduler, chunks, mask)
    for_each_work_tile(receive, finish, 0, True, queue, scheduler.n_tiles, accumulators.lag, args, CONFIG)
    tma.store_wait(0)


@gluon.jit
def finish(c: gl.constexpr, work_tile, n, n_read, args, CONFIG: gl.constexpr):
    """A work tile's share of the head issued `lag` heads before: some tiles of queries, in chunks of 16 columns, from
    the order of `send_dq`. Returns the chunks read so far."""
    accum_ptr, chunk_desc, dq_desc, scale, accumulators, scheduler, chunks, mask = args
    HEADS_KV: gl.constexpr = CONFIG.heads // CONFIG.group
    ROWS: gl.constexpr = chunk_desc.block_shape[0]
    COLUMNS: gl.constexpr = dq_desc.block_shape[3]
    STAGES: gl.constexpr = CONFIG.chunk_stages
    SUMMED: gl.constexpr = CONFIG.dq_columns[0] + CONFIG.dq_columns[1]
    PER_TILE: gl.constexpr = SUMMED // COLUMNS
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    head = work_tile // scheduler.n_tiles - accumulators.lag
    if head >= 0:
        query_tiles = gl.cdiv(mask.S, M)
        tiles = CONFIG.group * query_tiles
        share = gl.cdiv(tiles, scheduler.n_tiles)
        tile = work_tile % scheduler.n_tiles * share
        n_chunks = gl.minimum(share, tiles - tile) * PER_TILE
        b = head // HEADS_KV
        h = head % HEADS_KV * CONFIG.group + tile // query_tiles
        t = tile % query_tiles
        column = 0
        row = (head % accumulators.count * tiles + tile) * (PER_TILE * ROWS)
        offsets = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1) * CHUNK_ROW
        offsets += gl.expand_dims(gl.arange(0, CHUNK_ROW, gl.SliceLayout(0, layout)), 0)
        accum_ptr += row.to(gl.int64) * CHUNK_ROW
        wait_for_count(accumulators.added_ptr + head, scheduler.n_tiles)
        for i in gl.static_range(STAGES):
            load_chunk(chunk_desc, row + i * ROWS, n_read + i, i < n_chunks, chunks)
        for i in range(0, n_chunks):
            mbarrier.wait(chunks.full.index(n_read % STAGES), n_read // STAGES & 1)
            dq = chunks.sums.index(n_read % STAGES).load(layout)
            gl.store(accum_ptr + offsets, gl.zeros([ROWS, CHUNK_ROW], gl.float32, layout))
            dq = split_d.from_thread_order(dq, COLUMNS)
            tma.store_wait(1)
            rounded = chunks.rounded.index(n_read % 2)
            rounded.reshape([M, COLUMNS]).store((dq * scale).to(dq_desc.dtype))
            fence_async_shared()
            async_store(dq_desc, [b, h, t * M, column], rounded)
            load_chunk(chunk_desc, row + (i + STAGES) * ROWS, n_read + STAGES, i + STAGES < n_chunks, chunks)
            n_read += 1
            accum_ptr += ROWS * CHUNK_ROW
            column += COLUMNS
            t = gl.where(column == SUMMED, t + 1, t)
            column = gl.where(column == SUMMED, 0, column)
            h = gl.where(t == query_tiles, h + 1, h)
            t = gl.where(t == query_tiles, 0, t)
        fence_async_global()
        barrier()
        gl.atomic_add(accumulators.cleared_ptr + head, 1, sem="release")
    return n_read


@gluon.jit
def load_chunk(chunk_desc, row, n, pred, chunks):
    """The n-th chunk, from a row on, if `pred`."""
    STAGES: gl.constexpr = chunks.sums.shape[0]
    full = chunks.full.index(n % STAGES)
    mbarrier.expect(full, chunk_desc.block_shape[0] * chunk_desc.block_shape[1] * 4, pred=pred)
    async_load(chunk_desc, [row, 0], full, chunks.sums.index(n % STAGES), pred=pred)
