"""Packed sequences: values of padding tokens, before the first sequence and after the last, are read as 0; in the
backward Q, K and dO, too.

Their weight is 0 whatever they are, but 0 · NaN is NaN. TMA cannot leave rows out. So the producer, whose warp has the
time, waits for a tile at a border, overwrites its rows of padding, and only then tells the consumers. The consumers'
code, and all other tiles, are as they are without packed sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .pipeline import async_load, bytes_of, load_panels, reinterpret

LANES = gl.constexpr(gl.BlockedLayout([4], [32], [1], [0]))
CHUNK = gl.constexpr(128)
"""int32 numbers that a warp overwrites at once: four rows of 64 columns."""


class Packed(NamedTuple):
    """Where the tokens of packed sequences are; all None where a call has none."""

    starts_ptr: Any
    sequence_ends_ptr: Any
    """int32 (B, S): the first key of each query's sequence, and its end."""
    loaded: Any
    """A barrier of the producer's own: a tile at a border is there."""


@gluon.jit
def tokens_of_sequences(b, S, packed):
    """[first, end); of no meaning without packed sequences."""
    first, end = 0, 0
    if packed.sequence_ends_ptr is not None:
        row = b.to(gl.int64) * S
        first, end = gl.load(packed.starts_ptr + row), gl.load(packed.sequence_ends_ptr + row + S - 1)
    return first, end


@gluon.jit
def is_border(row, ROWS: gl.constexpr, tokens):
    """Whether some of the tokens from `row` on are padding."""
    return (row < tokens[0]) | (row + ROWS > tokens[1])


@gluon.jit
def load_tile(rows, b, h, row, full, tiles, stage, PANELS: gl.constexpr, tokens, packed):
    """Load one of several tiles of tokens, after which `full` completes."""
    ROWS: gl.constexpr = rows.block_shape[2]
    if packed.sequence_ends_ptr is not None and is_border(row, ROWS, tokens):
        load_cleared(rows, b, h, row, tiles, stage, PANELS, tokens, packed)
        mbarrier.arrive(full, count=1)
    else:
        mbarrier.expect(full, bytes_of(PANELS, rows))
        load_panels(rows, b, h, row, full, tiles, stage, PANELS)


@gluon.jit
def load_pair(
    x_desc, y_desc, b, h, row, full, x, y, stage, X_PANELS: gl.constexpr, Y_PANELS: gl.constexpr, tokens, packed
):
    """Load two tiles of the same tokens, after which `full` completes."""
    ROWS: gl.constexpr = x_desc.block_shape[2]
    if packed.sequence_ends_ptr is not None and is_border(row, ROWS, tokens):
        load_cleared(x_desc, b, h, row, x, stage, X_PANELS, tokens, packed)
        load_cleared(y_desc, b, h, row, y, stage, Y_PANELS, tokens, packed)
        mbarrier.arrive(full, count=1)
    else:
        mbarrier.expect(full, bytes_of(X_PANELS, x_desc) + bytes_of(Y_PANELS, y_desc))
        load_panels(x_desc, b, h, row, full, x, stage, X_PANELS)
        load_panels(y_desc, b, h, row, full, y, stage, Y_PANELS)


@gluon.jit
def load_cleared(rows, b, h, row, tiles, stage, PANELS: gl.constexpr, tokens, packed):
    """Load one of several tiles with 0 for padding tokens; it is there on return."""
    for i in gl.static_range(PANELS):
        load_cleared_panel(rows, [b, h, row, i * rows.block_shape[3]], tiles.index(stage * PANELS + i), tokens, packed)


@gluon.jit
def load_cleared_panel(rows, at, tile, tokens, packed):
    ROWS: gl.constexpr = rows.block_shape[2]
    CHUNKS: gl.constexpr = bytes_of(1, rows) // (4 * CHUNK)
    loaded = packed.loaded.index(0)
    mbarrier.expect(loaded, bytes_of(1, rows))
    async_load(rows, at, loaded, tile)
    mbarrier.wait(loaded, 0)
    mbarrier.arrive(loaded, count=1)  # completes phase 1: the next tile waits for phase 0, too
    # In shared memory 64 columns of a row are 128 bytes, in some order, and after them come those of the next row.
    chunks = reinterpret(tile, gl.int32, [CHUNKS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in range(CHUNKS):
        token = at[2] + i * 4 % ROWS + gl.arange(0, CHUNK, LANES) // 32
        chunk = chunks.index(i)
        chunk.store(gl.where((token >= tokens[0]) & (token < tokens[1]), chunk.load(LANES), 0))
    fence_async_shared()
