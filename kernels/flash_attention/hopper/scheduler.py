"""Which work tile a program computes, and when: little leaves the L2 cache, and all programs end at about the same
time."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .pipeline import allocate_barriers


class TileScheduler(NamedTuple):
    """The order of work tiles, each a tile of queries or keys of one head.

    Work tiles are issued group by group (the heads that share keys), so that a group's keys stay in the L2 cache;
    within a group the first tile of each head comes first, which under a causal mask is the longest. The last group's
    longest tiles would start when little other work is left, and most SMs would idle. So the tiles of the last groups
    are interleaved, and the last tiles issued are short (L9).
    """

    n_tiles: Any
    """Of a head."""
    n_groups: Any
    """Of all batches."""
    log_interleaved: Any
    """The last 2 ** log_interleaved groups are interleaved."""
    sorted_ptr: Any = None
    """int32 (B, n_tiles), in a backward with documents: the tiles of the interleaved heads, the longest first.
    Documents make tiles long and short in any order, and a long one that begins last would keep all other SMs idle."""


@gluon.jit
def tile_of(work_tile, scheduler, GROUP: gl.constexpr, CONFIG: gl.constexpr):
    """(head, tile) of a work tile, for groups of GROUP heads."""
    per_group = scheduler.n_tiles * GROUP
    group = work_tile // per_group
    i = work_tile - group * per_group
    tile = i // GROUP
    if CONFIG.causal:
        # No division, which takes 100 cycles, while all warps wait for the next work tile (L9).
        first = scheduler.n_groups - (1 << scheduler.log_interleaved)
        if work_tile >= first * per_group:
            i = work_tile - first * per_group
            group = first + (i // GROUP & ((1 << scheduler.log_interleaved) - 1))
            tile = i // GROUP >> scheduler.log_interleaved
    return group * GROUP + i % GROUP, tile


@gluon.jit
def is_interleaved(work_tile, scheduler):
    """Whether a work tile is of the last, interleaved heads; groups of one head."""
    return work_tile >= (scheduler.n_groups - (1 << scheduler.log_interleaved)) * scheduler.n_tiles


class WorkQueue(NamedTuple):
    """Work tiles for persistent programs, each taken once. Only the producer takes one; the other warps receive it."""

    n_work_tiles: Any
    taken_ptr: Any
    """int32: the work tiles taken beyond each program's first. 0 before a launch and after it."""
    slots: Any
    """[2, 1] int32 in shared memory: what the producer took, for the program's other warps."""
    full: Any
    empty: Any


@gluon.jit
def make_queue(n_work_tiles, taken_ptr, READERS: gl.constexpr):
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], mbarrier.MBarrierLayout())
    return WorkQueue(n_work_tiles, taken_ptr, slots, allocate_barriers(2, 1), allocate_barriers(2, READERS))


@gluon.jit
def take(queue, n):
    """Producer: take the program's n-th work tile and publish it; n_work_tiles or more when there is none left."""
    work_tile = gl.program_id(0)
    if n > 0:
        taken = gl.atomic_add(queue.taken_ptr, 1, sem="relaxed")
        # Each program asks until there is none left, so there are n_work_tiles requests. After the last one the counter
        # is 0 again for the next launch: to clear it anew each time takes 2 µs, as long as a tenth of a short row.
        if taken == queue.n_work_tiles - 1:
            gl.store(queue.taken_ptr, 0)
        work_tile = gl.num_programs(0) + taken
    publish(queue, n, work_tile)
    return work_tile


@gluon.jit
def publish(queue, n, work_tile):
    """Give the program's other warps its n-th work tile."""
    slot = n % 2
    mbarrier.wait(queue.empty.index(slot), (n // 2 & 1) ^ 1)
    queue.slots.index(slot).store(gl.full([1], work_tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(queue.full.index(slot), count=1)


@gluon.jit
def receive(queue, n):
    """The other warps: the program's n-th work tile."""
    slot = n % 2
    mbarrier.wait(queue.full.index(slot), n // 2 & 1)
    work_tile = gl.max(queue.slots.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(queue.empty.index(slot), count=1)
    return work_tile


@gluon.jit
def for_each_work_tile(
    get: gl.constexpr, work: gl.constexpr, c: gl.constexpr, EXTRA: gl.constexpr, queue, n_tiles, extra_heads,
    args, CONFIG: gl.constexpr,
):  # fmt: skip
    """`step = work(c, work_tile, n, step, args, CONFIG)` for each work tile of the program; n counts them, and `step`
    what a partition wants to count on from one to the next.

    A persistent program gets work tile after work tile, by `take` or `receive`; another one has that of its own number.
    Where EXTRA, `work` is also called with the numbers beyond the last work tile, n_tiles for each of `extra_heads`.

    The forward's loops are its own: a tile's prologue runs under the epilogue of the one before.

    `c` is the consumer's number, and a parameter of its own: inside of `args` it would be no constant.
    """
    n = 0
    step = 0
    if CONFIG.persistent:
        work_tile = get(queue, n)
        while work_tile < queue.n_work_tiles:
            step = work(c, work_tile, n, step, args, CONFIG)
            n += 1
            work_tile = get(queue, n)
        if EXTRA:
            work_tile = queue.n_work_tiles + gl.program_id(0)
            while work_tile < queue.n_work_tiles + extra_heads * n_tiles:
                step = work(c, work_tile, n, step, args, CONFIG)
                work_tile += gl.num_programs(0)
    elif EXTRA:  # noqa: SIM114  # known to the compiler
        work(c, gl.program_id(0), n, step, args, CONFIG)
    elif gl.program_id(0) < queue.n_work_tiles:
        work(c, gl.program_id(0), n, step, args, CONFIG)


SORT_CHUNK = 64
"""Tiles that a program of `sort_kernel` ranks."""


@triton.jit(do_not_specialize=["shift", "n_tiles"])
def sort_kernel(query_ends_ptr, sorted_ptr, shift, n_tiles, N: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr):
    """`TileScheduler.sorted_ptr`, by the ends of the queries that see each tile of N keys (`queries_by_starts`): for
    each of CHUNK tiles, how many come before it. Query m is at position m + shift. A window shortens tiles, but never
    makes the longer of two the shorter."""
    chunks = tl.cdiv(n_tiles, CHUNK)
    first = tl.program_id(0) // chunks * n_tiles  # of the batch
    tile = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    length = length_of(tile, query_ends_ptr + 2 * first, shift, n_tiles, N, CAUSAL)[:, None]
    before = tl.zeros([CHUNK], tl.int32)
    for i in range(0, n_tiles, CHUNK):
        other = i + tl.arange(0, CHUNK)
        others = length_of(other, query_ends_ptr + 2 * first, shift, n_tiles, N, CAUSAL)[None, :]
        is_before = (others > length) | ((others == length) & (other[None, :] < tile[:, None]))
        before += tl.sum((is_before & (other < n_tiles)[None, :]).to(tl.int32), 1)
    tl.store(sorted_ptr + first + before, tile, mask=tile < n_tiles)


@triton.jit
def length_of(tile, query_ends_ptr, shift, n_tiles, N: tl.constexpr, CAUSAL: tl.constexpr):
    """How many queries see some key of each tile."""
    length = tl.load(query_ends_ptr + 2 * tile, mask=tile < n_tiles, other=0)
    if CAUSAL:
        length -= tl.maximum(tile * N - shift, 0)
    return length
