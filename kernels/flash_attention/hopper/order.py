"""In which order the Hopper kernels do their work: nobody is waited for at the end, and little leaves the L2 cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Order(NamedTuple):
    """Of items of work, each a tile of a head.

    Group after group of heads (those that share keys), so that what is read stays in the L2 cache, and of a group first
    the first tile of each head. With a causal mask first tiles are the longest. After the last group's there would be
    too little else to do while they are computed; so the tiles of the last groups are mixed, and end when all ends.
    """

    n_tiles: Any
    """Of a head."""
    n_groups: Any
    """Of all batches."""
    log_mixed: Any
    """The last 2 ** log_mixed groups are mixed."""
    sorted_ptr: Any = None
    """int32 (B, n_tiles), in a backward with documents: the tiles of the mixed heads, the longest first. Documents make
    tiles long and short in any order, and for a long one that begins last everybody waits."""


@gluon.jit
def place_of(item, order, GROUP: gl.constexpr, CONFIG: gl.constexpr):
    """(head, tile) of an item, for groups of GROUP heads."""
    n_items = order.n_tiles * GROUP  # of a group
    group = item // n_items
    i = item - group * n_items
    tile = i // GROUP
    if CONFIG.causal:
        # Without a division, which takes 100 cycles, where everybody waits for the next item.
        first = order.n_groups - (1 << order.log_mixed)
        if item >= first * n_items:
            i = item - first * n_items
            group = first + (i // GROUP & ((1 << order.log_mixed) - 1))
            tile = i // GROUP >> order.log_mixed
    return group * GROUP + i % GROUP, tile


@triton.jit(do_not_specialize=["shift", "n_tiles"])
def sort_kernel(ends_ptr, sorted_ptr, shift, n_tiles, N: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr):
    """`Order.sorted_ptr`, by the ends of the queries that see each tile of N keys (`queries_by_starts`): of CHUNK
    tiles, how many come before. Query m is at position m + shift. A window shortens tiles, but makes none the longer of
    two.
    """
    chunks = tl.cdiv(n_tiles, CHUNK)
    first = tl.program_id(0) // chunks * n_tiles  # of the batch
    tile = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    length = length_of(tile, ends_ptr + 2 * first, shift, n_tiles, N, CAUSAL)[:, None]
    before = tl.zeros([CHUNK], tl.int32)
    for i in range(0, n_tiles, CHUNK):
        other = i + tl.arange(0, CHUNK)
        others = length_of(other, ends_ptr + 2 * first, shift, n_tiles, N, CAUSAL)[None, :]
        is_before = (others > length) | ((others == length) & (other[None, :] < tile[:, None]))
        before += tl.sum((is_before & (other < n_tiles)[None, :]).to(tl.int32), 1)
    tl.store(sorted_ptr + first + before, tile, mask=tile < n_tiles)


@triton.jit
def length_of(tile, ends_ptr, shift, n_tiles, N: tl.constexpr, CAUSAL: tl.constexpr):
    """How many queries see some key of each tile."""
    length = tl.load(ends_ptr + 2 * tile, mask=tile < n_tiles, other=0)
    if CAUSAL:
        length -= tl.maximum(tile * N - shift, 0)
    return length
