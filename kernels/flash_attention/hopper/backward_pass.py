"""Flash attention's backward pass for Hopper, in Gluon: five products fused, with dQ summed by TMA.

A program owns a tile of keys: K and V stay in shared memory, dK and dV in the registers of two consumer warp groups,
64 keys each. Tiles of 64 queries stream past, loaded by a producer warp. Each step computes, transposed,

    Sᵀ = K Qᵀ     dPᵀ = V dOᵀ     P = exp2(S − LSE)     dS = P · (dP − delta)
    dV += Pᵀ dO     dK += dSᵀ Q     dQ += dS K

Pᵀ and dSᵀ are operands straight from registers. dQ needs dS of all keys: the two consumers exchange it through shared
memory, and use it one step later, so that neither waits for the other. What a step adds to dQ goes through shared
memory too, where a reducer warp hands it to TMA to be added to float32 sums in global memory: in any order, so the last
bits of dQ differ between runs, or, where they must not, in turns.

Only a few heads have a place for their sums at a time, so that these stay in the L2 cache. Items of work go head after
head. Two finisher warps turn the sums of an earlier head, to which all has been added, into dQ, scaled and rounded, and
clear their place for a later one. An item waits for earlier items only, and programs begin in the order of their ids.
A small kernel before this one, `prepare_kernel`, computes the rows' statistics, and clears the places for the first;
with documents another, `order.sort_kernel`, looks for the longest items, which must not come last.

docs/kernels/hopper.md has the measurements, and what was tried besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..intervals import queries_by_starts
from . import parts
from .common import (
    LOG2E,
    Kind,
    Mask,
    async_add,
    async_load,
    async_store,
    await_count,
    barrier,
    barriers,
    fence_async_global,
    make_queue,
    matrix,
    next_item,
    queries_of_keys,
    receive_item,
    score_gradient,
    sees,
    wait_until_added,
    weigh_raw,
)
from .order import Order, place_of

M = gl.constexpr(64)  # queries in a tile: more would need more registers than there are
CONSUMERS = gl.constexpr(2)
EXCHANGED = gl.constexpr(3)  # tiles of dS: one being read, one complete, one being written


@dataclass(frozen=True)
class Backward(Kind):
    """How the kernel cuts its work."""

    columns: tuple[int, ...]
    """The parts of head_dim: see parts.py."""
    width: int
    """Columns of a tile in shared memory: head_dim, padded."""
    n: int
    """Keys in a tile."""
    stages: int
    """Tiles of queries in shared memory."""
    key_stages: int
    """Tiles of keys in shared memory: with two, where they fit, the next item's arrive under this one's end."""
    chunk_stages: int
    """Chunks of complete sums in shared memory, 4 KiB each, on their way to dQ."""
    keys_in_registers: bool
    """K and V are read from registers, where head_dim leaves room: shared memory is what limits the kernel. At head_dim
    64, causal, 16k: 514 TFLOP/s instead of 499."""
    persistent: bool
    """Programs stay and take tile after tile from a queue, so that one tile's loads run under the end of the one
    before: 541 instead of 514 at head_dim 64. At head_dim 128 there is no place for two tiles of keys, and the loop is
    the slower: 602 instead of 630, causal, 16k."""
    deterministic: bool
    """Programs take turns to add to a tile of dQ."""
    staggered: bool
    """Each tile of keys begins with other queries, so that programs that run at once do not all add to the same tile of
    dQ. Without a mask, 4k and 16k: 523 and 543 instead of 504 and 530 at head_dim 64, 586 and 616 instead of 584 and
    606 at 128. Under a causal mask the diagonal does that."""

    @property
    def shares(self) -> tuple[int, int]:
        """Columns of dQ that each consumer computes: a part of head_dim, or half of the only one."""
        return (*self.columns,) if len(self.columns) == 2 else (self.width // 2, self.width // 2)

    @property
    def numbers(self) -> int:
        """float32 numbers that `prepare_kernel` writes for a tile of queries: two for each, or three and one unused."""
        return (4 if self.starts else 2) * M.value


class Keys(NamedTuple):
    """K and V of the program's tile, and where dK and dV leave."""

    k: Any
    v: Any
    full: Any
    done: Any
    """Both consumers have read K and V for the last time."""
    replaced: Any
    """Both have put dK and dV in their place. One for each place: where an item has one tile of queries, they do so for
    the next item before the reducer has looked."""
    empty: Any


@gluon.jit
def make_keys(k_rows, v_rows, STAGES: gl.constexpr):
    k = gl.allocate_shared_memory(k_rows.dtype, [STAGES] + k_rows.block_shape, k_rows.layout)
    v = gl.allocate_shared_memory(v_rows.dtype, [STAGES] + v_rows.block_shape, v_rows.layout)
    return Keys(k, v, barriers(STAGES, 1), barriers(1, CONSUMERS), barriers(STAGES, CONSUMERS), barriers(STAGES, 1))


class Queries(NamedTuple):
    """Tiles of Q and dO, with what `prepare_kernel` says of their rows."""

    q: Any
    dout: Any
    statistics: Any
    q_full: Any
    dout_full: Any
    q_empty: Any
    dout_empty: Any


class Sums(NamedTuple):
    """dS on its way from consumer to consumer, and what it adds to dQ on its way to the sums in global memory."""

    ds: Any
    ds_full: Any
    dq: Any
    dq_full: Any
    dq_empty: Any


class Chunks(NamedTuple):
    """Sums in float32 that are complete, on their way to shared memory, and, rounded, out of it."""

    sums: Any
    full: Any
    rounded: Any


class Places(NamedTuple):
    """Sums of dQ in global memory: each head's have the place of those of the head `count` before."""

    count: Any
    lag: Any
    """Items of a head turn into dQ the sums of the head `lag` before, which nearly always are complete by then."""
    added_ptr: Any
    """int32, for each key head: how many of its items have added all they have to."""
    cleared_ptr: Any
    """int32, for each key head: how many items have done their share of turning its sums into dQ and clearing them."""
    turns_ptr: Any
    """int32, for each tile of queries, where programs take turns: how many items have added to its dQ."""


@gluon.jit
def locate(item, order, mask, CONFIG: gl.constexpr):
    """(b, g, n0) of an item; the tiles of queries [t0, t3) that see some of its keys, [t1, t2) that see all of them.

    Of a head the first keys first: with a causal mask the most queries see them. Where programs take turns, the last
    keys first, unless `falls`. With documents the mixed heads have those first that the most queries see: all heads,
    and it was the slower.
    """
    HEADS_KV: gl.constexpr = CONFIG.heads // CONFIG.group
    head, tile = place_of(item, order, 1, CONFIG)
    if CONFIG.deterministic:
        tile = gl.where(falls(item, order, CONFIG), tile, order.n_tiles - 1 - tile)
    b = head // HEADS_KV
    if order.sorted_ptr is not None:
        is_mixed = item >= (order.n_groups - (1 << order.log_mixed)) * order.n_tiles
        tile = gl.load(order.sorted_ptr + b * order.n_tiles + tile, mask=is_mixed, other=tile)
    n0 = tile * CONFIG.n
    n1 = gl.minimum(n0 + CONFIG.n, mask.S_k) - 1
    shift = mask.S_k - mask.S
    some_from, full_from, some_to, full_to = queries_of_keys(
        n0, n1, shift, mask.S, gl.cdiv(mask.S, M) * M, mask.window, CONFIG.causal, CONFIG.window
    )
    if CONFIG.starts:
        ends_ptr = mask.ends_ptr + 2 * (b * order.n_tiles + tile)
        some_to, full_to = gl.minimum(some_to, gl.load(ends_ptr)), gl.minimum(full_to, gl.load(ends_ptr + 1))
    if n0 + CONFIG.n > mask.S_k:
        full_to = 0  # keys that are not there: their zeros would count
    t0 = gl.maximum(some_from, 0) // M
    t3 = gl.maximum(gl.cdiv(some_to, M), t0)
    t1 = gl.minimum(gl.cdiv(gl.maximum(full_from, 0), M), t3)
    t2 = gl.maximum(full_to, 0) // M
    return b, head % HEADS_KV, n0, t0, t1, t2, t3


@gluon.jit
def falls(item, order, CONFIG: gl.constexpr):
    """Where programs take turns: whether an item's head begins with the first keys, and these with the last queries.

    To begin with the last keys lets nobody wait: they are on the diagonal, where those before them arrive later. But
    with a causal mask their items are the shortest, and of the last head only the longest would be left at the end. So
    the last, mixed heads begin with the first keys, whose items go down from the last queries one after the other:
    570 → 590 TFLOP/s at head_dim 128, 16k.
    """
    if CONFIG.deterministic and CONFIG.causal and not (CONFIG.window or CONFIG.starts):
        return item >= (order.n_groups - (1 << order.log_mixed)) * order.n_tiles
    return False


@gluon.jit
def first_tile(n0, t0, t3, down, CONFIG: gl.constexpr):
    """The tile of queries [t0, t3) with which the keys from n0 on begin."""
    t = t0
    if CONFIG.staggered:
        t += n0 // CONFIG.n % gl.maximum(t3 - t0, 1)
    return gl.where(down, t3 - 1, t)


@gluon.jit
def next_tile(t, t0, t3, down):
    """The one after t, up or down; after the last the first, for the rest of them or for the next head."""
    return gl.where(down, gl.where(t == t0, t3 - 1, t - 1), gl.where(t + 1 == t3, t0, t + 1))


@gluon.jit
def producer(
    q_rows, k_rows, v_rows, dout_rows, stat_rows, places, queue, order, keys, queries, mask, CONFIG: gl.constexpr
):
    descriptors = (q_rows, k_rows, v_rows, dout_rows, stat_rows)
    n = 0
    step = 0
    if CONFIG.persistent:
        item = next_item(queue, n)
        while item < queue.n_items:
            await_place(item, places, order, CONFIG)
            step = load(item, n, step, descriptors, order, keys, queries, mask, CONFIG)
            n += 1
            item = next_item(queue, n)
    elif gl.program_id(0) < queue.n_items:
        await_place(gl.program_id(0), places, order, CONFIG)
        load(gl.program_id(0), n, step, descriptors, order, keys, queries, mask, CONFIG)


@gluon.jit
def await_place(item, places, order, CONFIG: gl.constexpr):
    """Wait until the head that had the place of the item's before has left it."""
    head, _ = place_of(item, order, 1, CONFIG)
    if head >= places.count:
        await_count(places.cleared_ptr + head - places.count, order.n_tiles)


@gluon.jit
def load(item, n, step, descriptors, order, keys, queries, mask, CONFIG: gl.constexpr):
    """The program's n-th item; returns the steps so far."""
    q_rows, k_rows, v_rows, dout_rows, stat_rows = descriptors
    D: gl.constexpr = q_rows.block_shape[3]
    NUMBERS: gl.constexpr = stat_rows.block_shape[0]
    BYTES: gl.constexpr = q_rows.dtype.primitive_bitwidth // 8
    query_tiles = gl.cdiv(mask.S, M)
    b, g, n0, t0, _, _, t3 = locate(item, order, mask, CONFIG)
    down = falls(item, order, CONFIG)
    place = n % CONFIG.key_stages
    full = keys.full.index(place)
    mbarrier.wait(keys.empty.index(place), (n // CONFIG.key_stages & 1) ^ 1)
    mbarrier.expect(full, 2 * CONFIG.n * D * BYTES)
    async_load(k_rows, [b, g, n0, 0], full, keys.k.index(place))
    async_load(v_rows, [b, g, n0, 0], full, keys.v.index(place))
    for i in range(0, CONFIG.group):
        h = g * CONFIG.group + i
        t = first_tile(n0, t0, t3, down, CONFIG)
        for _ in range(t0, t3):
            stage = step % CONFIG.stages
            mbarrier.wait(queries.q_empty.index(stage), (step // CONFIG.stages & 1) ^ 1)
            full = queries.q_full.index(stage)
            mbarrier.expect(full, M * D * BYTES + NUMBERS * 4)
            async_load(q_rows, [b, h, t * M, 0], full, queries.q.index(stage))
            row = ((b * CONFIG.heads + h) * query_tiles + t) * NUMBERS
            async_load(stat_rows, [row], full, queries.statistics.index(stage))
            mbarrier.wait(queries.dout_empty.index(stage), (step // CONFIG.stages & 1) ^ 1)
            full = queries.dout_full.index(stage)
            mbarrier.expect(full, M * D * BYTES)
            async_load(dout_rows, [b, h, t * M, 0], full, queries.dout.index(stage))
            t = next_tile(t, t0, t3, down)
            step += 1
    return step


@gluon.jit
def turn_of(n0, t, n_tiles, down, mask, CONFIG: gl.constexpr):
    """How many tiles of keys add to the dQ of query tile t before those from n0 on: all after, up to the last one that
    t sees, or, where items go down, all before."""
    end = (t + 1) * M + (mask.S_k - mask.S)
    if not CONFIG.causal:
        end = end + mask.window - 1 if CONFIG.window else mask.S_k
    tile = n0 // CONFIG.n
    return gl.where(down, tile, gl.minimum(gl.cdiv(end, CONFIG.n), n_tiles) - 1 - tile)


@gluon.jit
def reducer(sum_rows, dk_rows, dv_rows, places, queue, order, keys, sums, mask, CONFIG: gl.constexpr):
    """Adds what the consumers put into `sums.dq` to the sums in global memory. dK and dV leave through it, too, so that
    no consumer waits for them."""
    n = 0
    step = 0
    if CONFIG.persistent:
        item = receive_item(queue, n)
        while item < queue.n_items:
            step = add(item, step, sum_rows, places, order, sums, mask, CONFIG)
            store_keys(item, n, dk_rows, dv_rows, order, keys, mask, CONFIG)
            n += 1
            item = receive_item(queue, n)
    elif gl.program_id(0) < queue.n_items:
        add(gl.program_id(0), step, sum_rows, places, order, sums, mask, CONFIG)
        store_keys(gl.program_id(0), n, dk_rows, dv_rows, order, keys, mask, CONFIG)


@gluon.jit
def store_keys(item, n, dk_rows, dv_rows, order, keys, mask, CONFIG: gl.constexpr):
    """dK and dV of the program's n-th item, once they have taken the place of K and V."""
    b, g, n0, _, _, _, _ = locate(item, order, mask, CONFIG)
    place = n % CONFIG.key_stages
    mbarrier.wait(keys.replaced.index(place), n // CONFIG.key_stages & 1)
    fence_async_shared()
    async_store(dk_rows, [b, g, n0, 0], keys.k.index(place))
    async_store(dv_rows, [b, g, n0, 0], keys.v.index(place))
    tma.store_wait(0)
    mbarrier.arrive(keys.empty.index(place), count=1)


@gluon.jit
def add(item, step, sum_rows, places, order, sums, mask, CONFIG: gl.constexpr):
    """What an item adds to dQ; returns the steps so far."""
    ROWS: gl.constexpr = sum_rows[0].block_shape[0] + sum_rows[1].block_shape[0]
    query_tiles = gl.cdiv(mask.S, M)
    b, g, n0, t0, _, _, t3 = locate(item, order, mask, CONFIG)
    down = falls(item, order, CONFIG)
    head = b * (CONFIG.heads // CONFIG.group) + g
    n_steps = CONFIG.group * (t3 - t0)
    t = first_tile(n0, t0, t3, down, CONFIG)
    first = head % places.count * (CONFIG.group * query_tiles)
    tile = first + t
    before = tile - 1  # not `tile`: the compiler would take the two for one, here and in the loop
    had = 0
    turns_ptr = places.turns_ptr
    if CONFIG.deterministic:
        turns_ptr += (head - head % places.count) * (CONFIG.group * query_tiles)
        had = gl.load(turns_ptr + tile, mask=n_steps > 0, other=0, volatile=True)
    for i in range(0, n_steps):
        now = tile
        turn = turn_of(n0, t, order.n_tiles, down, mask, CONFIG)
        t = next_tile(t, t0, t3, down)
        if CONFIG.group > 1:
            first = gl.where((i + 1) % (t3 - t0) == 0, first + query_tiles, first)
        tile = first + t
        if CONFIG.deterministic:
            while had < turn:
                had = gl.load(turns_ptr + now, volatile=True)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(sums.dq_full.index(c), step & 1)
            fence_async_shared()
            async_add(sum_rows[c], [now * ROWS + c * sum_rows[0].block_shape[0], 0], sums.dq[c])
        if CONFIG.deterministic:
            # For the next step, under this one: the answer takes half as long as a step. Not an atomic's, for which
            # Triton waits at once, to share it among the threads: 491 TFLOP/s instead of 457 at head_dim 64.
            had = gl.load(turns_ptr + tile, mask=i + 1 < n_steps, other=0, volatile=True)
        for c in gl.static_range(CONSUMERS):
            tma.store_wait(CONSUMERS - 1 - c)
            mbarrier.arrive(sums.dq_empty.index(c), count=1)
        if CONFIG.deterministic:
            wait_until_added(CONSUMERS)  # what left a step ago: to arrive takes longer than to leave
            gl.atomic_add(turns_ptr + before, 1, mask=i > 0, sem="relaxed")
        before = now
        step += 1
    wait_until_added(0)
    if CONFIG.deterministic:
        gl.atomic_add(turns_ptr + before, 1, mask=n_steps > 0, sem="relaxed")
    gl.atomic_add(places.added_ptr + head, 1, sem="release")
    return step


@gluon.jit
def finisher(sum_ptr, chunk_rows, dq_rows, scale, places, queue, order, chunks, mask, CONFIG: gl.constexpr):
    """Turns sums into dQ. After the last head, `places.lag` more are left: there are items for their sake."""
    n = 0
    read = 0
    if CONFIG.persistent:
        item = receive_item(queue, n)
        while item < queue.n_items:
            read = finish(item, read, sum_ptr, chunk_rows, dq_rows, scale, places, order, chunks, mask, CONFIG)
            n += 1
            item = receive_item(queue, n)
        item = queue.n_items + gl.program_id(0)
        while item < queue.n_items + places.lag * order.n_tiles:
            read = finish(item, read, sum_ptr, chunk_rows, dq_rows, scale, places, order, chunks, mask, CONFIG)
            item += gl.num_programs(0)
    else:
        finish(gl.program_id(0), read, sum_ptr, chunk_rows, dq_rows, scale, places, order, chunks, mask, CONFIG)
    tma.store_wait(0)


@gluon.jit
def finish(item, read, sum_ptr, chunk_rows, dq_rows, scale, places, order, chunks, mask, CONFIG: gl.constexpr):
    """An item's share of the head `places.lag` before its own: some tiles of queries, in chunks of 16 columns, from the
    order of `send_dq`. Returns the chunks read so far."""
    HEADS_KV: gl.constexpr = CONFIG.heads // CONFIG.group
    ROWS: gl.constexpr = chunk_rows.block_shape[0]
    COLUMNS: gl.constexpr = dq_rows.block_shape[3]
    STAGES: gl.constexpr = CONFIG.chunk_stages
    SUMMED: gl.constexpr = CONFIG.shares[0] + CONFIG.shares[1]
    PER_TILE: gl.constexpr = SUMMED // COLUMNS
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    head = item // order.n_tiles - places.lag
    if head >= 0:
        query_tiles = gl.cdiv(mask.S, M)
        tiles = CONFIG.group * query_tiles
        share = gl.cdiv(tiles, order.n_tiles)
        tile = item % order.n_tiles * share
        n_chunks = gl.minimum(share, tiles - tile) * PER_TILE
        b = head // HEADS_KV
        h = head % HEADS_KV * CONFIG.group + tile // query_tiles
        t = tile % query_tiles
        column = 0
        row = (head % places.count * tiles + tile) * (PER_TILE * ROWS)
        offsets = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1) * 32
        offsets += gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, layout)), 0)
        sum_ptr += row.to(gl.int64) * 32
        await_count(places.added_ptr + head, order.n_tiles)
        for i in gl.static_range(STAGES):
            load_chunk(chunk_rows, row + i * ROWS, read + i, i < n_chunks, chunks)
        for i in range(0, n_chunks):
            mbarrier.wait(chunks.full.index(read % STAGES), read // STAGES & 1)
            dq = chunks.sums.index(read % STAGES).load(layout)
            gl.store(sum_ptr + offsets, gl.zeros([ROWS, 32], gl.float32, layout))
            dq = dq.reshape([COLUMNS // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([M, COLUMNS])
            tma.store_wait(1)
            rounded = chunks.rounded.index(read % 2)
            rounded.reshape([M, COLUMNS]).store((dq * scale).to(dq_rows.dtype))
            fence_async_shared()
            async_store(dq_rows, [b, h, t * M, column], rounded)
            load_chunk(chunk_rows, row + (i + STAGES) * ROWS, read + STAGES, i + STAGES < n_chunks, chunks)
            read += 1
            sum_ptr += ROWS * 32
            column += COLUMNS
            t = gl.where(column == SUMMED, t + 1, t)
            column = gl.where(column == SUMMED, 0, column)
            h = gl.where(t == query_tiles, h + 1, h)
            t = gl.where(t == query_tiles, 0, t)
        fence_async_global()
        barrier()
        gl.atomic_add(places.cleared_ptr + head, 1, sem="release")
    return read


@gluon.jit
def load_chunk(chunk_rows, row, n, wanted, chunks):
    """The n-th chunk, from a row on, if it is wanted."""
    STAGES: gl.constexpr = chunks.sums.shape[0]
    full = chunks.full.index(n % STAGES)
    mbarrier.expect(full, chunk_rows.block_shape[0] * chunk_rows.block_shape[1] * 4, pred=wanted)
    async_load(chunk_rows, [row, 0], full, chunks.sums.index(n % STAGES), pred=wanted)


@gluon.jit
def multiply_dq(c: gl.constexpr, step, k, sums, CONFIG: gl.constexpr):
    """Start dS K of a step, once both consumers have put their part of dS there; consumer c's share of the columns."""
    FIRST: gl.constexpr = c * CONFIG.shares[0]
    COLUMNS: gl.constexpr = CONFIG.shares[c]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    ds = sums.ds.index(step % EXCHANGED).permute((1, 0))
    zeros = gl.zeros([M, COLUMNS], gl.float32, layout)
    return warpgroup_mma(ds, k.slice(FIRST, COLUMNS, 1), zeros, use_acc=False, is_async=True)


@gluon.jit
def send_dq(c: gl.constexpr, step, dq, sums):
    """Hand a step's dQ to the reducer, in the order in which the threads hold it.

    A thread has 2 neighbouring columns of rows r and r + 8: 4 numbers, which it writes at once, and a warp's go to
    512 bytes in a row. `finish` undoes the order.

    Here and for dS the fence between these stores and TMA's or a product's reading is the reader's, who comes later: a
    writer's waits until all is stored. Head_dim 128, causal, 4k: 576 instead of 561; 96, 16k: 581 instead of 550.
    """
    COLUMNS: gl.constexpr = dq.shape[1]
    mbarrier.wait(sums.dq_empty.index(c), (step & 1) ^ 1)
    dq = dq.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([M * COLUMNS // 32, 32])
    sums.dq[c].store(dq)
    mbarrier.arrive(sums.dq_full.index(c), count=1)


@gluon.jit
def consume(
    c: gl.constexpr, FIRST: gl.constexpr, step, m0, n0, masked, dk, dv, operands, place, keys, queries, sums, mask,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """One tile of queries: adds to dK and dV, and sends dQ of the tile before (there is none when FIRST)."""
    dtype: gl.constexpr = keys.k.dtype
    if not CONFIG.keys_in_registers:
        # 0. But the compiler cannot know that K and V are in the same place in all steps, and does not keep some forty
        # addresses for it, part of them in memory: 615 TFLOP/s became 640 (head_dim 128, causal, 16k).
        place = m0 >> 30
    k, v = matrix(keys.k, place), matrix(keys.v, place)
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    PRODUCTS: gl.constexpr = len(CONFIG.columns)
    query: gl.constexpr = gl.SliceLayout(0, scores)
    stage = step % CONFIG.stages
    phase = step // CONFIG.stages & 1
    q, dout = parts.of(queries.q, stage, CONFIG), parts.of(queries.dout, stage, CONFIG)
    statistics = queries.statistics.index(stage)

    # [64, M]: transposed, so that the sums over queries are plain products
    k_operand, v_operand = operands
    if not CONFIG.keys_in_registers:
        k_operand, v_operand = k.slice(c * 64, 64, 0), v.slice(c * 64, 64, 0)
    mbarrier.wait(queries.q_full.index(stage), phase)
    s = parts.multiply_transposed(parts.cut(k_operand, CONFIG), q)
    mbarrier.wait(queries.dout_full.index(stage), phase)
    dp = parts.multiply_transposed(parts.cut(v_operand, CONFIG), dout)

    lse = statistics.slice(0, M, 0).load(query)
    s = warpgroup_mma_wait(PRODUCTS, deps=[s])
    p, s = weigh_raw(s, gl.expand_dims(lse, 0), mask.cap, mask.factor, CONFIG.softcap)
    if masked:
        m = gl.expand_dims(m0 + gl.arange(0, M, query), 0)
        n = gl.expand_dims(n0 + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, scores)), 1)
        start = 0
        if CONFIG.starts:
            start = gl.expand_dims(statistics.slice(2 * M, M, 0).load(query).to(gl.int32, bitcast=True), 0)
        p = gl.where(sees(mask, m, start, n, CONFIG), p, 0.0)
    weight = p.to(dtype)
    delta = statistics.slice(M, M, 0).load(query)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = score_gradient(p, dp, gl.expand_dims(delta, 0), s, CONFIG.softcap).to(dtype)

    if not FIRST:  # the other consumer has used dS of the step before the last, whose place this one takes
        mbarrier.wait(sums.ds_full.index(0), (step & 1) ^ 1)
        fence_async_shared()
    sums.ds.index(step % EXCHANGED).slice(c * 64, 64, 0).store(ds)
    mbarrier.arrive(sums.ds_full.index(0), count=1)
    dv = parts.multiply(weight, dout, dv)
    if not FIRST:
        dq = multiply_dq(c, step - 1, k, sums, CONFIG)
    dk = parts.multiply(ds, q, dk)
    if not FIRST:
        dq = warpgroup_mma_wait(PRODUCTS, deps=[dq])
        send_dq(c, step - 1, dq, sums)  # under the product for dK
    both = parts.wait(0, dk + dv)
    mbarrier.arrive(queries.q_empty.index(stage), count=1)
    return both[:PRODUCTS], both[PRODUCTS:]


@gluon.jit
def consumer(c: gl.constexpr, scale, queue, order, keys, queries, sums, mask, CONFIG: gl.constexpr):
    """Keys [64 c, 64 c + 64) of each tile."""
    n = 0
    step = 0
    if CONFIG.persistent:
        item = receive_item(queue, n)
        while item < queue.n_items:
            step = compute(c, item, n, step, scale, order, keys, queries, sums, mask, CONFIG)
            n += 1
            item = receive_item(queue, n)
    elif gl.program_id(0) < queue.n_items:
        item = gl.program_id(0)
        compute(c, item, n, step, scale, order, keys, queries, sums, mask, CONFIG)


@gluon.jit
def compute(c: gl.constexpr, item, n, step, scale, order, keys, queries, sums, mask, CONFIG: gl.constexpr):
    """dK and dV of an item, and its part of dQ; returns the steps so far."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    place = n % CONFIG.key_stages
    k, v = matrix(keys.k, place), matrix(keys.v, place)
    k_own, v_own = k.slice(c * 64, 64, 0), v.slice(c * 64, 64, 0)
    k_parts, v_parts = parts.cut(k_own, CONFIG), parts.cut(v_own, CONFIG)
    _, _, n0, t0, t1, t2, t3 = locate(item, order, mask, CONFIG)
    down = falls(item, order, CONFIG)
    dk, dv = parts.zeros(k_parts), parts.zeros(v_parts)
    mbarrier.wait(keys.full.index(place), n // CONFIG.key_stages & 1)
    if t0 < t3:
        operands = k_own, v_own
        if CONFIG.keys_in_registers:
            layout: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
            operands = k_own.load(layout), v_own.load(layout)
        t = first_tile(n0, t0, t3, down, CONFIG)
        masked = (t < t1) | (t >= t2)
        dk, dv = consume(c, True, step, t * M, n0, masked, dk, dv, operands, place, keys, queries, sums, mask, CONFIG)
        step += 1
        for _ in range(1, CONFIG.group * (t3 - t0)):
            t = next_tile(t, t0, t3, down)
            masked = (t < t1) | (t >= t2)
            dk, dv = consume(
                c, False, step, t * M, n0, masked, dk, dv, operands, place, keys, queries, sums, mask, CONFIG
            )
            step += 1
        mbarrier.wait(sums.ds_full.index(0), (step & 1) ^ 1)
        fence_async_shared()
        dq = multiply_dq(c, step - 1, k, sums, CONFIG)
        dq = warpgroup_mma_wait(0, deps=[dq])
        send_dq(c, step - 1, dq, sums)

    mbarrier.arrive(keys.done.index(0), count=1)
    mbarrier.wait(keys.done.index(0), n & 1)
    parts.store(parts.scale(dk, scale), k_parts)
    parts.store(dv, v_parts)
    mbarrier.arrive(keys.replaced.index(place), count=1)
    return step


@gluon.jit(do_not_specialize=["count", "lag", "n_items", "n_tiles", "log_mixed", "S", "S_k", "window"])
def backward_kernel(
    q_rows, k_rows, v_rows, dout_rows, stat_rows, sum0_rows, sum1_rows, chunk_rows, dq_rows, dk_rows, dv_rows,
    sum_ptr, ends_ptr, sorted_ptr, taken_ptr, added_ptr, cleared_ptr, turns_ptr, count, lag,
    n_items, n_tiles, log_mixed, S, S_k, window, cap, factor, scale, CONFIG: gl.constexpr,
):  # fmt: skip
    """dQ, dK and dV; see `consumer` and `finisher`."""
    dtype: gl.constexpr = q_rows.dtype
    STAGES: gl.constexpr = CONFIG.stages
    mask = Mask(S, S_k, window, None, ends_ptr, cap, factor)
    keys = make_keys(k_rows, v_rows, CONFIG.key_stages)
    q = gl.allocate_shared_memory(dtype, [STAGES] + q_rows.block_shape, q_rows.layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES] + q_rows.block_shape, q_rows.layout)
    statistics = gl.allocate_shared_memory(gl.float32, [STAGES] + stat_rows.block_shape, stat_rows.layout)
    empty = barriers(STAGES, CONSUMERS)  # of both: a consumer is done with q and dout at the same time
    queries = Queries(q, dout, statistics, barriers(STAGES, 1), barriers(STAGES, 1), empty, empty)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONFIG.n, M], dtype)
    ds = gl.allocate_shared_memory(dtype, [EXCHANGED, CONFIG.n, M], ds_layout)
    dq0 = gl.allocate_shared_memory(gl.float32, sum0_rows.block_shape, sum0_rows.layout)
    dq1 = gl.allocate_shared_memory(gl.float32, sum1_rows.block_shape, sum1_rows.layout)
    sums = Sums(ds, barriers(1, CONSUMERS), (dq0, dq1), barriers(CONSUMERS, 1), barriers(CONSUMERS, 1))
    complete = gl.allocate_shared_memory(gl.float32, [CONFIG.chunk_stages] + chunk_rows.block_shape, chunk_rows.layout)
    rounded = gl.allocate_shared_memory(dtype, [2] + dq_rows.block_shape, dq_rows.layout)
    chunks = Chunks(complete, barriers(CONFIG.chunk_stages, 1), rounded)
    places = Places(count, lag, added_ptr, cleared_ptr, turns_ptr)
    queue = make_queue(n_items, taken_ptr, 4)
    order = Order(n_tiles, n_items // n_tiles, log_mixed, sorted_ptr)
    # Registers per thread, of 504 for three times four warps. At head_dim 64 the consumers can spare some, which the
    # finisher uses: 506 and 345 instead of 499 and 339 at 4k and 1k, causal.
    FEW: gl.constexpr = 40 if CONFIG.keys_in_registers else 24
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (0, scale, queue, order, keys, queries, sums, mask, CONFIG)),
            (consumer, (1, scale, queue, order, keys, queries, sums, mask, CONFIG)),
            (
                producer,
                (q_rows, k_rows, v_rows, dout_rows, stat_rows, places, queue, order, keys, queries, mask, CONFIG),
            ),
            (reducer, ((sum0_rows, sum1_rows), dk_rows, dv_rows, places, queue, order, keys, sums, mask, CONFIG)),
            (finisher, (sum_ptr, chunk_rows, dq_rows, scale, places, queue, order, chunks, mask, CONFIG)),
        ],
        [4, 1, 1, 2],
        [(504 - FEW) // 2, FEW, FEW, FEW],
    )


@triton.jit(do_not_specialize=["S", "S_k", "n_tiles", "n_places", "n_heads"])
def prepare_kernel(
    out_rows, dout_rows, lse_ptr, dlse_ptr, starts_ptr, stat_ptr, ends_ptr, sum_ptr, added_ptr, cleared_ptr, turns_ptr,
    S, S_k, n_tiles, n_places, n_heads,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SUMMED: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Of M queries, one after the other: LSE in base 2; delta = Σ out · dout − dlse; the starts of their documents, as
    bits. Of each tile of N keys: `queries_by_starts`. Places for sums of dQ, and everybody's counts, begin at 0."""
    program = tl.program_id(0)
    head = program // n_tiles
    b, h = head // H, head % H
    m0 = program % n_tiles * M
    m = m0 + tl.arange(0, M)
    out = out_rows.load([b, h, m0, 0]).reshape(M, D).to(tl.float32)
    dout = dout_rows.load([b, h, m0, 0]).reshape(M, D).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    row = head.to(tl.int64) * S + m
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=m < S, other=0.0)
    # exp2(s − ∞) = 0 for rows past the end, and for rows that see nothing
    lse = tl.load(lse_ptr + row, mask=m < S, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    stat_ptr += program.to(tl.int64) * NUMBERS
    tl.store(stat_ptr + tl.arange(0, M), lse)
    tl.store(stat_ptr + M + tl.arange(0, M), delta)
    if starts_ptr is not None:
        starts = tl.load(starts_ptr + b.to(tl.int64) * S + m, mask=m < S, other=0)
        tl.store(stat_ptr + 2 * M + tl.arange(0, M), starts.to(tl.float32, bitcast=True))
        if h == 0:
            key_tiles = tl.cdiv(S_k, N)
            for tile in range(program % n_tiles, key_tiles, n_tiles):
                n1 = tl.minimum(tile * N + N, S_k) - 1
                some_to, full_to = queries_by_starts(starts_ptr + b.to(tl.int64) * S, tile * N, n1, S, M)
                tl.store(ends_ptr + 2 * (b * key_tiles + tile), some_to)
                tl.store(ends_ptr + 2 * (b * key_tiles + tile) + 1, full_to)
    if turns_ptr is not None:
        tl.store(turns_ptr + program, 0)
    if sum_ptr is not None:
        if program < n_places:
            place_ptr = sum_ptr + program.to(tl.int64) * (M * SUMMED) + tl.arange(0, M * 16)
            for i in tl.static_range(0, SUMMED, 16):
                tl.store(place_ptr + i * M, tl.zeros([M * 16], tl.float32))
        if program < n_heads:
            tl.store(added_ptr + program, 0)
            tl.store(cleared_ptr + program, 0)
