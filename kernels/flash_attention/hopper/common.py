"""What the Hopper kernels share: masks, barriers, and words that not every Gluon has.

Gluon calls plain Triton functions once they are wrapped, so the mask and the soft cap are the portable kernels' own.
Values known when a kernel is compiled travel in one frozen dataclass, those known when it runs in named tuples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .. import intervals, scores

LOG2E = gl.constexpr(scores.LOG2E.value)
LN2 = gl.constexpr(scores.LN2.value)

keys_seen = gluon.jit(intervals.keys_seen.fn)
interval_sees = gluon.jit(intervals.sees.fn)
queries_of_keys = gluon.jit(intervals.queries_of_keys.fn)
tanh = gluon.jit(scores.tanh.fn)
weigh_raw = gluon.jit(scores.weigh.fn)
score_gradient = gluon.jit(scores.score_gradient.fn)


class Mask(NamedTuple):
    """The numbers of a mask, and how a raw product s becomes a score: factor · s, or factor · tanh(cap · s)."""

    S: Any
    S_k: Any
    window: Any
    starts_ptr: Any
    """int32 (B, S), where there are documents: the first key of each query's."""
    ends_ptr: Any
    """int32 (B, tiles of keys, 2), in the backward's kernels: what `queries_by_starts` says of each tile."""
    cap: Any
    factor: Any


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for, beside its tiles."""

    heads: int
    group: int
    """Query heads that share a key/value head."""
    causal: bool
    window: bool
    starts: bool
    softcap: bool


@gluon.jit
def start_of(mask, m, b, CONFIG: gl.constexpr):
    """The first key of query m's document, where there are documents; m is a number or a vector."""
    start = 0
    if CONFIG.starts:
        start = gl.load(mask.starts_ptr + b.to(gl.int64) * mask.S + m, mask=m < mask.S, other=0)
    return start


@gluon.jit
def seen_by(mask, m, b, CONFIG: gl.constexpr):
    """The keys [first, end) that query m of batch b sees."""
    start = start_of(mask, m, b, CONFIG)
    return keys_seen(m + (mask.S_k - mask.S), start, mask.S_k, mask.window, CONFIG.causal, CONFIG.window, CONFIG.starts)


@gluon.jit
def sees(mask, m, start, n, CONFIG: gl.constexpr):
    """Whether query m, of a document that begins at `start`, sees key n."""
    t = m + (mask.S_k - mask.S)
    return interval_sees(n, t, start, mask.S_k, mask.window, CONFIG.causal, CONFIG.window, CONFIG.starts)


@gluon.jit
def matrix(tiles, stage):
    """[rows, D]: one of several tiles in shared memory."""
    return tiles.index(stage).reshape([tiles.shape[3], tiles.shape[4]])


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers that COUNT arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


FREE_BARRIERS = gl.constexpr(5)
"""Of the 16 barriers at which a program's threads can meet, Triton uses the first: two, and one for each partition, of
which the forward pass has three at most besides the first."""


@gluon.jit
def meet(number, THREADS: gl.constexpr):
    """Wait at a barrier until THREADS threads have come or reported there, the callers among them."""
    SYNC: gl.constexpr = f"bar.sync $1, {THREADS}; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(SYNC, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def report(number, THREADS: gl.constexpr):
    """Be counted at a barrier, and go on. Unlike `mbarrier.arrive` it does not make the callers wait for each other."""
    ARRIVE: gl.constexpr = f"bar.arrive $1, {THREADS}; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(ARRIVE, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


class Queue(NamedTuple):
    """Work for programs that stay: items in order, each taken once. Only the producer asks for the next one."""

    n_items: Any
    taken_ptr: Any
    """int32: the items taken beyond each program's first. 0 before a launch and after it."""
    slots: Any
    """[2, 1] int32 in shared memory: what the producer took, for the program's other warps."""
    full: Any
    empty: Any


@gluon.jit
def make_queue(n_items, taken_ptr, READERS: gl.constexpr):
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], mbarrier.MBarrierLayout())
    return Queue(n_items, taken_ptr, slots, barriers(2, 1), barriers(2, READERS))


@gluon.jit
def next_item(queue, n):
    """Producer: take the program's n-th item and hand it on; n_items or more when there is none left."""
    item = gl.program_id(0)
    if n > 0:
        taken = gl.atomic_add(queue.taken_ptr, 1, sem="relaxed")
        # Each program asks until there is none left, so there are n_items questions. After the last the next launch
        # finds the 0 that this one found: to clear it anew each time takes 2 µs, as long as a tenth of a short row.
        if taken == queue.n_items - 1:
            gl.store(queue.taken_ptr, 0)
        item = gl.num_programs(0) + taken
    hand_on(queue, n, item)
    return item


@gluon.jit
def hand_on(queue, n, item):
    """Give the program's other warps its n-th item."""
    slot = n % 2
    mbarrier.wait(queue.empty.index(slot), (n // 2 & 1) ^ 1)
    queue.slots.index(slot).store(gl.full([1], item, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(queue.full.index(slot), count=1)


@gluon.jit
def receive_item(queue, n):
    """The other warps: the item that the producer took."""
    slot = n % 2
    mbarrier.wait(queue.full.index(slot), n // 2 & 1)
    item = gl.max(queue.slots.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(queue.empty.index(slot), count=1)
    return item


@gl._core.builtin
def _async_add(descriptor, coordinates, tile, _semantic=None):
    """TMA's reduction: add a float32 tile in shared memory to global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, tile.handle
    )


# Named as in Triton 3.8 and later. Older ones have other names for three of them, and only the
# instruction for the fourth.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
async_add = getattr(tma, "async_atomic_add", None) or _async_add
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def wait_until_added(PENDING: gl.constexpr):
    """Wait until all but the last PENDING tiles that this warp adds have been added; `tma.store_wait` waits until they
    have left shared memory."""
    WAIT: gl.constexpr = f"cp.async.bulk.wait_group {PENDING}; bar.warp.sync 0xffffffff; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fence_async_global():
    """Order this thread's accesses to global memory and TMA's."""
    FENCE: gl.constexpr = "fence.proxy.async.global; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(FENCE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_count(pointer, count):
    """Wait until an int32 in global memory, that others add to, has come to `count`: what they did before is there."""
    has = count - 1
    while has < count:
        has = gl.atomic_add(pointer, 0, sem="acquire")
    fence_async_global()
