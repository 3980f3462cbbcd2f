"""Flash attention's forward pass for Hopper, in Gluon: TMA, asynchronous products, and warps with one task each.

A program is one producer warp, which loads tiles by TMA, and two or three consumer warp groups, each with 64 queries
of its own. A barrier in shared memory says that a tile has arrived, and at one of the multiprocessor's the consumers
report that they have read it. A consumer keeps two products in flight, the scores of block i + 1 and the values of
block i, and computes one softmax under them (Shah et al. 2024, arXiv:2407.08608, section 3.2). Consumers start their
products in turns, so that one's products run under another's softmax (section 3.1 there).

softmax.py has the softmax. It seldom looks for a maximum; where it should have, the program computes the item again
when there are no others left.

Programs stay and take tile after tile from a queue (`Order`). One tile's loads run under the end of the one before, and
up to head_dim 128 its first scores do, too: under the last values, and under the store of the outputs.
docs/kernels/hopper.md has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from . import parts, softmax
from .common import (
    FREE_BARRIERS,
    LN2,
    Kind,
    Mask,
    async_load,
    async_store,
    barriers,
    hand_on,
    make_queue,
    meet,
    next_item,
    receive_item,
    report,
    seen_by,
    wait_until_added,
)
from .order import Order, place_of


@dataclass(frozen=True)
class Forward(Kind):
    """How the kernel cuts its work."""

    consumers: int
    """Warp groups with 64 queries each."""
    query_stages: int
    """Tiles of each consumer's queries in shared memory, which its outputs replace. With one of them the next queries
    wait for the outputs to leave."""
    key_stages: int
    value_stages: int
    """Tiles of keys, and of values, in shared memory. A tile of values is read a block after the keys of its own."""
    columns: tuple[int, ...]
    """The parts of head_dim: see parts.py."""


class Ring(NamedTuple):
    """Tiles of keys or values in shared memory, used in turn."""

    tiles: Any
    full: Any
    """A barrier for each: it has arrived."""
    read: Any
    """The first of as many of the multiprocessor's barriers: consumers have read it."""


class Queries(NamedTuple):
    """Tiles of 64 queries, `query_stages` for each consumer, later those of their outputs."""

    tiles: Any
    full: Any
    empty: Any
    """The outputs have left it."""
    failed: Any
    """[64] int32 for each: the item whose outputs left it, in rows whose sum came to LIMIT or whose outputs are not
    finite, and −1 in the others."""


class Tile(NamedTuple):
    """A consumer's part of an item: 64 queries, and the blocks of keys that they see."""

    b: Any
    h: Any
    m0: Any
    i0: Any
    i1: Any
    """Blocks [i0, i1), one at least."""
    before: Any
    after: Any
    """How many blocks the item has that only other consumers' queries see, before these and after them."""
    full_from: Any
    full_to: Any
    """The keys that all of the queries see."""
    settled: Any
    """Before a block that begins here or later each query has seen a key."""
    first: Any
    width: Any
    """[64]: the keys that each of them sees."""


@gluon.jit
def locate(item, order, CONFIG: gl.constexpr):
    """(b, h, m0) of an item."""
    head, tile = place_of(item, order, CONFIG.group, CONFIG)
    m0 = (order.n_tiles - 1 - tile) * (64 * CONFIG.consumers)
    return head // CONFIG.heads, head % CONFIG.heads, m0


@gluon.jit
def blocks_seen(m0, M: gl.constexpr, b, mask, N: gl.constexpr, CONFIG: gl.constexpr):
    """The blocks of N keys [i0, i1) that some of M queries see, one at least, and the keys [from, to) that all see."""
    some_from, full_to = seen_by(mask, m0, b, CONFIG)
    full_from, some_to = seen_by(mask, gl.minimum(m0 + M, mask.S) - 1, b, CONFIG)
    i0 = gl.maximum(some_from, 0) // N
    return i0, gl.maximum(gl.cdiv(some_to, N), i0 + 1), full_from, full_to


@gluon.jit
def tile_of(item, c: gl.constexpr, order, mask, N: gl.constexpr, row: gl.constexpr, CONFIG: gl.constexpr):
    """Consumer c's part of an item."""
    b, h, m0 = locate(item, order, CONFIG)
    all_i0, all_i1, _, _ = blocks_seen(m0, 64 * CONFIG.consumers, b, mask, N, CONFIG)
    m0 += c * 64
    # Its own queries see fewer blocks than the item's, and have fewer edges in them.
    i0, i1, full_from, full_to = blocks_seen(gl.minimum(m0, mask.S - 1), 64, b, mask, N, CONFIG)
    i0 = gl.maximum(gl.minimum(i0, all_i1 - 1), all_i0)
    i1 = gl.maximum(gl.minimum(i1, all_i1), i0 + 1)
    first, end = seen_by(mask, m0 + gl.arange(0, 64, row), b, CONFIG)
    first = gl.maximum(first, 0) + gl.zeros([64], gl.int32, row)
    seen = gl.maximum(full_from, 0)
    settled = gl.where(seen < full_to, seen + 1, mask.S_k)
    return Tile(
        b, h, m0, i0, i1, i0 - all_i0, all_i1 - i1, full_from, full_to, settled, first, gl.maximum(end - first, 0)
    )


@gluon.jit
def producer(q_rows, k_rows, v_rows, lse_ptr, queue, order, queries, keys, values, done, mask, CONFIG: gl.constexpr):
    N: gl.constexpr = keys.tiles.shape[3]
    BYTES: gl.constexpr = 64 * keys.tiles.shape[4] * keys.tiles.dtype.primitive_bitwidth // 8
    CONSUMERS: gl.constexpr = CONFIG.consumers
    n = 0
    step = 0
    repeating = 0
    failed = -1
    item = next_item(queue, n)
    while item < queue.n_items:
        b, h, m0 = locate(item, order, CONFIG)
        i0, i1, _, _ = blocks_seen(m0, 64 * CONSUMERS, b, mask, N, CONFIG)
        for c in gl.static_range(CONSUMERS):
            stage = stage_of(c, n, CONFIG)
            mbarrier.wait(queries.empty.index(stage), (n // CONFIG.query_stages & 1) ^ 1)
            mbarrier.expect(queries.full.index(stage), BYTES)
            async_load(q_rows, [b, h, m0 + c * 64, 0], queries.full.index(stage), queries.tiles.index(stage))
        if repeating == 0:
            failed = note_failed(n, failed, lse_ptr, queries, order, mask, CONFIG)
        for i in range(i0, i1 - 1):
            load_tile(k_rows, [b, h // CONFIG.group, i * N, 0], keys, step, CONFIG)
            load_tile(v_rows, [b, h // CONFIG.group, i * N, 0], values, step, CONFIG)
            step += 1
        n += 1
        # Asked for before the last loads, so that nobody waits for it; earlier, and items would be shared less evenly.
        if repeating == 0:
            item = next_item(queue, n)
        load_tile(k_rows, [b, h // CONFIG.group, i1 * N - N, 0], keys, step, CONFIG)
        load_tile(v_rows, [b, h // CONFIG.group, i1 * N - N, 0], values, step, CONFIG)
        step += 1
        # In this loop, not in one around it, after which ptxas takes the branches of the last consumer, whose code has
        # nothing to do with it, for divergent: 100 instructions more in a step at head_dim 128.
        if (item >= queue.n_items) & (repeating == 0):
            mbarrier.wait(done.index(0), 0)
            for i in range(CONFIG.query_stages):
                failed = note_failed(n + i, failed, lse_ptr, queries, order, mask, CONFIG)
            hand_on(queue, n + 1, gl.where(failed < 0, queue.n_items, failed))
            repeating = 1
        if repeating:
            item = gl.where(failed < 0, queue.n_items, failed)
            failed = failed_before(failed, lse_ptr, order, mask, CONFIG)
            hand_on(queue, n + 2, item)


@gluon.jit
def note_failed(n, failed, lse_ptr, queries, order, mask, CONFIG: gl.constexpr):
    """Add the item that had the n-th one's places before it to the list of those to repeat, if it failed.

    `failed` is the last on the list, or −1 while there is none. Where an item's first LSE will be, it has the item
    before it on the list, so that there is room for any number of them.
    """
    CONSUMERS: gl.constexpr = CONFIG.consumers
    row: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    items = queries.failed.index(stage_of(0, n, CONFIG)).load(row)
    for c in gl.static_range(1, CONSUMERS):
        items = gl.maximum(items, queries.failed.index(stage_of(c, n, CONFIG)).load(row))
    item = gl.max(items, 0)
    if item >= 0:
        gl.store(first_lse(item, lse_ptr, order, mask, CONFIG), failed.to(gl.float32, bitcast=True))
        failed = item
    return failed


@gluon.jit
def failed_before(item, lse_ptr, order, mask, CONFIG: gl.constexpr):
    before = item
    if item >= 0:
        before = gl.load(first_lse(item, lse_ptr, order, mask, CONFIG)).to(gl.int32, bitcast=True)
    return before


@gluon.jit
def first_lse(item, lse_ptr, order, mask, CONFIG: gl.constexpr):
    b, h, m0 = locate(item, order, CONFIG)
    return lse_ptr + (b * CONFIG.heads + h).to(gl.int64) * mask.S + m0


@gluon.jit
def stage_of(c: gl.constexpr, n, CONFIG: gl.constexpr):
    """Where consumer c's queries of the program's n-th item are."""
    return c * CONFIG.query_stages + n % CONFIG.query_stages


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
def multiply_scores(c: gl.constexpr, n, step, queries, keys, CONFIG: gl.constexpr):
    """Start q kᵀ of consumer c's queries of the program's n-th item and the step's keys."""
    q = parts.of(queries.tiles, stage_of(c, n, CONFIG), CONFIG)
    return parts.multiply_transposed(q, parts.of(keys.tiles, step % CONFIG.key_stages, CONFIG))


@gluon.jit
def multiply_values(p, step, values, outs, CONFIG: gl.constexpr):
    """Start out + p v of the step's values."""
    return parts.multiply(p, parts.of(values.tiles, step % CONFIG.value_stages, CONFIG), outs)


@gluon.jit
def store(
    c: gl.constexpr, n, repeating, place, outs, pivot, row_sum, excess, out_rows, lse_ptr, queries, mask,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """out, over the queries of the program's n-th item and from there to global memory, and LSE."""
    item, b, h, m0 = place
    row: gl.constexpr = pivot.type.layout
    if queries.tiles.dtype == gl.bfloat16:  # float16 has no values so large
        # NaN, and so is all that the item leaves behind until it is repeated.
        row_sum = gl.where(repeating > 0, row_sum, row_sum + softmax.overflown(outs, row_sum))
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), row, assert_trivial=True)
    excess = gl.convert_layout(gl.sum(excess, 1), row, assert_trivial=True)
    stage = stage_of(c, n, CONFIG)
    row_sum = gl.where(row_sum == 0, 1.0, row_sum)  # saw nothing: out 0, LSE −inf + log 1
    parts.store(parts.scale(outs, 1 / (row_sum + excess)), parts.of(queries.tiles, stage, CONFIG))
    fence_async_shared()
    async_store(out_rows, [b, h, m0, 0], queries.tiles.index(stage))
    queries.failed.index(stage).store(gl.where(row_sum < softmax.LIMIT, -1, item))
    m = m0 + gl.arange(0, 64, row)
    lse = (pivot + gl.log2(row_sum)) * LN2
    gl.store(lse_ptr + (b * CONFIG.heads + h).to(gl.int64) * mask.S + m, lse, mask=m < mask.S)


@gluon.jit
def give_back(queries, c: gl.constexpr, n, CONFIG: gl.constexpr):
    """The place of the n-th item's queries, once its outputs have left it."""
    tma.store_wait(0)
    mbarrier.arrive(queries.empty.index(stage_of(c, n, CONFIG)), count=1)


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
def release_early(values, step, needed, CONFIG: gl.constexpr):
    """Wait for the product with the step's values, if needed, and say that they have been read."""
    if needed:
        # In words of PTX: Gluon's wait returns the product, and a product that comes out of a branch is copied there.
        WAIT: gl.constexpr = "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;"
        gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        release(values, step, CONFIG)


@gluon.jit
def begin(
    c: gl.constexpr, HELD: gl.constexpr, n, repeating, step, after, queue, order, queries, keys, values, mask,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """Start the first scores of the program's n-th item, once `after` blocks of the one before are passed over.

    Where HELD, the product with the values of the step before is in flight, and the caller waits for it later and says
    then that it has read them. But the producer waits for their place after as many blocks as there are places: before
    so many are passed over they are released here.

    Returns the item, n_items or more when there is none left; its tile; the step of the scores; these, nobody's when
    there is no item; and whether the values are still to be released.
    """
    N: gl.constexpr = keys.tiles.shape[3]
    PLACES: gl.constexpr = CONFIG.value_stages
    row: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    held = step - 1
    if HELD:
        release_early(values, held, after >= PLACES, CONFIG)
    step = pass_over(c, after, step, keys, values, CONFIG)
    item = receive_item(queue, n + 2 * repeating)
    there_is = item < queue.n_items
    tile = tile_of(gl.minimum(item, queue.n_items - 1), c, order, mask, N, row, CONFIG)
    before = gl.where(there_is, tile.before, 0)
    if HELD:
        release_early(values, held, (after < PLACES) & (after + before >= PLACES), CONFIG)
    step = pass_over(c, before, step, keys, values, CONFIG)
    stage = stage_of(c, n, CONFIG)
    mbarrier.wait(queries.full.index(stage), n // CONFIG.query_stages & 1, pred=there_is)
    await_tile(keys, step, there_is)
    take_turn(c)
    s = multiply_scores(c, n, step, queries, keys, CONFIG)
    pass_turn(c, CONFIG)
    return item, tile, step, s, after + before < PLACES


@gluon.jit
def consumer(
    c: gl.constexpr, out_rows, lse_ptr, sinks_ptr, queue, order, queries, keys, values, done, mask,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """Queries [64 c, 64 c + 64) of each tile."""
    N: gl.constexpr = keys.tiles.shape[3]
    dtype: gl.constexpr = keys.tiles.dtype
    JOINED: gl.constexpr = CONFIG.query_stages > 1  # a tile's end and the beginning of the next
    PRODUCTS: gl.constexpr = len(CONFIG.columns)
    n = 0
    step = 0
    repeating = 0
    if c == CONFIG.consumers - 1:
        pass_turn(c, CONFIG)  # the first one begins
    while repeating < 2:
        # Weights as float16 end at 65,504.
        careful = (repeating > 0) | (dtype == gl.float16)
        item, tile, step, s, _ = begin(
            c, False, n, repeating, step, 0, queue, order, queries, keys, values, mask, CONFIG
        )
        s = warpgroup_mma_wait(0, deps=[s])
        if item < queue.n_items:
            release(keys, step, CONFIG)
        while item < queue.n_items:
            pivot, row_sum, excess = softmax.nothing_seen(s, sinks_ptr, tile)
            s, pivot, subtract, rescale, row_sum = softmax.maximum(
                s, pivot, row_sum, tile, tile.i0 * N, True, dtype, mask, CONFIG
            )
            await_tile(keys, step + 1, tile.i0 + 1 < tile.i1)
            await_tile(values, step, True)
            p, block, row_sum = softmax.weigh(s, subtract, rescale, row_sum, dtype, mask)
            wanted = gl.where(dtype == gl.float16, softmax.outweighs(block, row_sum), 0)
            if JOINED:  # noqa: SIM102  # known to the compiler, unlike n
                if n > 0:
                    give_back(queries, c, n - 1, CONFIG)
            outs = parts.zeros(parts.of(values.tiles, 0, CONFIG))
            for i in range(tile.i0 + 1, tile.i1):
                take_turn(c)
                s = multiply_scores(c, n, step + 1, queries, keys, CONFIG)
                outs = multiply_values(p, step, values, outs, CONFIG)
                pass_turn(c, CONFIG)
                s = warpgroup_mma_wait(PRODUCTS, deps=[s])
                release(keys, step + 1, CONFIG)
                s, pivot, subtract, rescale, row_sum = softmax.maximum(
                    s, pivot, row_sum, tile, i * N, careful, dtype, mask, CONFIG
                )
                # Here, and not where the tiles are used: under the maximum it takes no time. And its branch ends the
                # straight code to whose front, above the maximum, ptxas would otherwise move the wait for p v.
                await_tile(keys, step + 2, i + 1 < tile.i1)
                await_tile(values, step + 1, True)
                # While p is still there, and long after it was asked whether it is wanted.
                excess += softmax.rounding_excess(p, block, wanted)
                outs = parts.wait(0, outs)
                release(values, step, CONFIG)
                # Before the exponentials, whose gaps these products fill.
                outs = parts.rescale(outs, rescale)
                excess *= parts.along_rows(rescale, excess)
                p, block, row_sum = softmax.weigh(s, subtract, rescale, row_sum, dtype, mask)
                # A block that was searched has no weight above 1, but in float16, where the pivot may stay behind.
                searched = careful | (i * N < tile.settled)
                wanted = gl.where((dtype == gl.float16) | ~searched, softmax.outweighs(block, row_sum), 0)
                step += 1

            outs = multiply_values(p, step, values, outs, CONFIG)
            excess += softmax.rounding_excess(p, block, wanted)
            place = item, tile.b, tile.h, tile.m0
            if not JOINED:
                outs = parts.wait(0, outs)
                release(values, step, CONFIG)
                store(c, n, repeating, place, outs, pivot, row_sum, excess, out_rows, lse_ptr, queries, mask, CONFIG)
                give_back(queries, c, n, CONFIG)
            n += 1
            item, tile, begun, s, held = begin(
                c, JOINED, n, repeating, step + 1, tile.after, queue, order, queries, keys, values, mask, CONFIG
            )
            if JOINED:
                outs = parts.wait(PRODUCTS, outs)
                if held:
                    release(values, step, CONFIG)
                store(
                    c, n - 1, repeating, place, outs, pivot, row_sum, excess, out_rows, lse_ptr, queries, mask, CONFIG
                )
            s = warpgroup_mma_wait(0, deps=[s])
            if item < queue.n_items:
                release(keys, begun, CONFIG)
            step = begun + 0  # a sum, since Gluon takes two names of one value for one
        repeating += 1
        if repeating == 1:
            mbarrier.arrive(done.index(0), count=1)
            wait_until_added(0)  # what may now be replaced
            if receive_item(queue, n + 1) >= queue.n_items:
                repeating = 2
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_items", "n_tiles", "log_mixed", "S", "S_k", "window"])
def forward_kernel(
    q_rows, k_rows, v_rows, out_rows, lse_ptr, starts_ptr, sinks_ptr, taken_ptr,
    n_items, n_tiles, log_mixed, S, S_k, window, cap, factor, CONFIG: gl.constexpr,
):  # fmt: skip
    """out and LSE; see `consumer`."""
    dtype: gl.constexpr = q_rows.dtype
    CONSUMERS: gl.constexpr = CONFIG.consumers
    mask = Mask(S, S_k, window, starts_ptr, None, cap, factor)
    k = gl.allocate_shared_memory(dtype, [CONFIG.key_stages] + k_rows.block_shape, k_rows.layout)
    v = gl.allocate_shared_memory(dtype, [CONFIG.value_stages] + v_rows.block_shape, v_rows.layout)
    # Of the multiprocessor's barriers: one for each consumer's turn, and one for each tile.
    READ: gl.constexpr = FREE_BARRIERS + CONSUMERS
    gl.static_assert(READ + CONFIG.key_stages + CONFIG.value_stages <= 16)
    keys = Ring(k, barriers(CONFIG.key_stages, 1), READ)
    values = Ring(v, barriers(CONFIG.value_stages, 1), READ + CONFIG.key_stages)
    QUERIES: gl.constexpr = CONSUMERS * CONFIG.query_stages
    q = gl.allocate_shared_memory(dtype, [QUERIES] + q_rows.block_shape, q_rows.layout)
    failed = gl.allocate_shared_memory(gl.int32, [QUERIES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(QUERIES):
        failed.index(i).store(gl.full([64], -1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    queries = Queries(q, barriers(QUERIES, 1), barriers(QUERIES, 1), failed)
    done = barriers(1, CONSUMERS)
    queue = make_queue(n_items, taken_ptr, CONSUMERS)
    order = Order(n_tiles, n_items // (n_tiles * CONFIG.group), log_mixed)
    fence_async_shared()

    # Registers per thread; the first partition has what the others leave.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (0, out_rows, lse_ptr, sinks_ptr, queue, order, queries, keys, values, done, mask, CONFIG)),
                (consumer, (1, out_rows, lse_ptr, sinks_ptr, queue, order, queries, keys, values, done, mask, CONFIG)),
                (producer, (q_rows, k_rows, v_rows, lse_ptr, queue, order, queries, keys, values, done, mask, CONFIG)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, out_rows, lse_ptr, sinks_ptr, queue, order, queries, keys, values, done, mask, CONFIG)),
                (consumer, (1, out_rows, lse_ptr, sinks_ptr, queue, order, queries, keys, values, done, mask, CONFIG)),
                (consumer, (2, out_rows, lse_ptr, sinks_ptr, queue, order, queries, keys, values, done, mask, CONFIG)),
                (producer, (q_rows, k_rows, v_rows, lse_ptr, queue, order, queries, keys, values, done, mask, CONFIG)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
