"""How the warps of a program hand tiles to one another: barriers, channels, and TMA.

Two kinds of barriers order them. An mbarrier lies in shared memory, counts arrivals or bytes that TMA brings, and has a
phase that flips each time it completes; whoever waits names the phase. A named barrier is one of 16 of the SM and
counts threads; arriving at one does not make the arriving threads wait for each other.
"""

# No `from __future__ import annotations`: the fields of aggregates are types, not text.

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

TRITON_NAMED_BARRIERS = gl.constexpr(5)
"""Named barriers 0 to 4 are Triton's: two, and one for each worker partition, of which the forward has three at
most."""
NAMED_BARRIERS = gl.constexpr(16)
WARP_GROUP = gl.constexpr(128)
"""Threads of a consumer: four warps, which a wgmma takes."""
PRODUCER_WARP = gl.constexpr(32)


@gluon.jit
def allocate_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N mbarriers that COUNT arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def barrier_sync(number, THREADS: gl.constexpr):
    """Wait at a named barrier until THREADS threads have arrived or wait there, the callers among them."""
    SYNC: gl.constexpr = f"bar.sync $1, {THREADS}; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(SYNC, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barrier_arrive(number, THREADS: gl.constexpr):
    """Arrive at a named barrier, and go on. Gluon's `mbarrier.arrive` synchronises the warp group first (L7)."""
    ARRIVE: gl.constexpr = f"bar.arrive $1, {THREADS}; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(ARRIVE, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def matrix(tiles, stage):
    """[rows, D]: one of several tiles in shared memory."""
    return tiles.index(stage).reshape([tiles.shape[3], tiles.shape[4]])


@gluon.jit
def load_panels(rows, b, h, row, full, tiles, stage, PANELS: gl.constexpr):
    """Start TMA's loads of a tile's panels of columns, for which `full` expects `bytes_of(PANELS, rows)`."""
    for i in gl.static_range(PANELS):
        async_load(rows, [b, h, row, i * rows.block_shape[3]], full, tiles.index(stage * PANELS + i))


@gluon.jit
def store_panels(rows, b, h, row, tiles, first, PANELS: gl.constexpr):
    """Start TMA's stores of a tile's panels from `first` on, of as many columns of each as `rows` has."""
    for i in gl.static_range(PANELS):
        tile = tiles.index(first + i).slice(0, rows.block_shape[3], 3)
        async_store(rows, [b, h, row, i * rows.block_shape[3]], tile)


@gluon.constexpr_function
def bytes_of(panels, rows):
    """Of so many tiles or panels as a descriptor has."""
    return panels * rows.block_shape[2] * rows.block_shape[3] * rows.dtype.primitive_bitwidth // 8


@gluon.jit
def allocate_tiles(rows, N_PANELS: gl.constexpr):
    return gl.allocate_shared_memory(rows.dtype, [N_PANELS] + rows.block_shape, rows.layout)


@gl._core.builtin
def _async_add(descriptor, coordinates, tile, _semantic=None):
    """TMA's reduction: add a float32 tile in shared memory to global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, tile.handle
    )


# Named as in Triton 3.8 and later. Older ones have other names, and for `async_add` the instruction alone.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
async_add = getattr(tma, "async_atomic_add", None) or _async_add
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@aggregate
class Channel:
    """Tiles in shared memory from a producer to consumers: the step-th is in stage step % STAGES.

    `full` completes once TMA has brought the tile, `empty` once all consumers have released it.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, tiles, full, empty):
        self.tiles = tiles
        self.full = full
        self.empty = empty

    @gluon.jit
    def slot(self, step):
        """The stage of the step's tile, and the phase that its barriers complete with it."""
        STAGES: gl.constexpr = self.full.shape[0]
        return step % STAGES, step // STAGES & 1

    @gluon.jit
    def acquire(self, step):
        """Producer: wait until all consumers have released the step's stage."""
        STAGES: gl.constexpr = self.full.shape[0]
        mbarrier.wait(self.empty.index(step % STAGES), (step // STAGES & 1) ^ 1)

    @gluon.jit
    def wait(self, step):
        """Consumer: wait until the step's tile is there."""
        STAGES: gl.constexpr = self.full.shape[0]
        mbarrier.wait(self.full.index(step % STAGES), step // STAGES & 1)

    @gluon.jit
    def wait_at(self, stage, phase):
        """The same, where the caller has the `slot`."""
        mbarrier.wait(self.full.index(stage), phase)

    @gluon.jit
    def release_at(self, stage):
        """Consumer: the producer may overwrite the stage."""
        mbarrier.arrive(self.empty.index(stage), count=1)


@aggregate
class NamedBarrierChannel:
    """The same, where consumers release a tile at a named barrier, which does not make their threads wait (L7)."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    release_barrier: gl.constexpr
    """The first of STAGES named barriers: each is what a `Channel` has as a stage's `empty`."""
    threads: gl.constexpr
    """Of all consumers and the producer: a stage is free once all have come to its barrier."""

    @gluon.constexpr_function
    def __init__(self, tiles, full, release_barrier, threads):
        self.tiles = tiles
        self.full = full
        self.release_barrier = gl.constexpr(release_barrier)
        self.threads = gl.constexpr(threads)

    @gluon.jit
    def acquire(self, step):
        """Producer: wait until all consumers have released the step's stage, and return it."""
        STAGES: gl.constexpr = self.full.shape[0]
        stage = step % STAGES
        if step >= STAGES:
            barrier_sync(self.release_barrier + stage, self.threads)
        return stage

    @gluon.jit
    def load(self, rows, b, h, row, step):
        """Producer: the step's tile, over one that all consumers have released."""
        PANELS: gl.constexpr = self.tiles.shape[0] // self.full.shape[0]
        stage = self.acquire(step)
        mbarrier.expect(self.full.index(stage), bytes_of(PANELS, rows))
        load_panels(rows, b, h, row, self.full.index(stage), self.tiles, stage, PANELS)

    @gluon.jit
    def wait(self, step, pred):
        """Consumer: wait until the step's tile is there, if `pred`."""
        STAGES: gl.constexpr = self.full.shape[0]
        mbarrier.wait(self.full.index(step % STAGES), step // STAGES & 1, pred=pred)

    @gluon.jit
    def release(self, step):
        """Consumer: it has read the step's tile."""
        barrier_arrive(self.release_barrier + step % self.full.shape[0], self.threads)


@gluon.jit
def wait_until_written(PENDING: gl.constexpr):
    """Wait until all but the last PENDING stores or additions of this warp are in global memory; `tma.store_wait` waits
    until they have left shared memory."""
    WAIT: gl.constexpr = f"cp.async.bulk.wait_group {PENDING}; bar.warp.sync 0xffffffff; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fence_async_global():
    """Order this thread's accesses to global memory and TMA's."""
    FENCE: gl.constexpr = "fence.proxy.async.global; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(FENCE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_count(pointer, count):
    """Wait until an int32 in global memory, which other programs add to, has come to `count`: what they wrote before is
    visible then."""
    has = count - 1
    while has < count:
        has = gl.atomic_add(pointer, 0, sem="acquire")
    fence_async_global()
