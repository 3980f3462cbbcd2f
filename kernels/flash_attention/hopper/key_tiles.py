"""A work tile of the backward: a tile of keys of one key head, and the tiles of queries that see it, in order."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import config
from .mask import exp_scores, queries_of_keys, sees
from .padding import is_border, load_cleared, load_tile
from .pipeline import async_load, bytes_of, load_panels
from .scheduler import is_interleaved, tile_of

M = gl.constexpr(config.QUERIES)
CONSUMERS = gl.constexpr(2)


class KeyTile(NamedTuple):
    b: Any
    g: Any
    n0: Any
    t0: Any
    t1: Any
    t2: Any
    t3: Any
    """The tiles of queries [t0, t3) see some of its keys, [t1, t2) all of them."""


@gluon.jit
def locate(work_tile, scheduler, mask, CONFIG: gl.constexpr):
    """The tile of keys that a work tile is.

    Key tiles are issued in ascending order (under a causal mask the first keys have the most queries); in deterministic
    mode in descending order, except where queries are taken so (`queries_descend`). With documents only the interleaved
    heads are sorted, longest first; sorting all heads was slower (L9).
    """
    HEADS_KV: gl.constexpr = CONFIG.heads // CONFIG.group
    head, tile = tile_of(work_tile, scheduler, 1, CONFIG)
    if CONFIG.deterministic:
        tile = gl.where(queries_descend(work_tile, scheduler, CONFIG), tile, scheduler.n_tiles - 1 - tile)
    b = head // HEADS_KV
    if scheduler.sorted_ptr is not None:
        interleaved = is_interleaved(work_tile, scheduler)
        tile = gl.load(scheduler.sorted_ptr + b * scheduler.n_tiles + tile, mask=interleaved, other=tile)
    n0 = tile * CONFIG.n
    n1 = gl.minimum(n0 + CONFIG.n, mask.S_k) - 1
    shift = mask.S_k - mask.S
    some_from, full_from, some_to, full_to = queries_of_keys(
        n0, n1, shift, mask.S, gl.cdiv(mask.S, M) * M, mask.window, CONFIG.causal, CONFIG.window
    )
    if CONFIG.starts:
        query_ends_ptr = mask.query_ends_ptr + 2 * (b * scheduler.n_tiles + tile)
        some_to, full_to = (
            gl.minimum(some_to, gl.load(query_ends_ptr)),
            gl.minimum(full_to, gl.load(query_ends_ptr + 1)),
        )
    if n0 + CONFIG.n > mask.S_k:
        full_to = 0  # keys that are not there: their zeros would count
    t0 = gl.maximum(some_from, 0) // M
    t3 = gl.maximum(gl.cdiv(some_to, M), t0)
    t1 = gl.minimum(gl.cdiv(gl.maximum(full_from, 0), M), t3)
    t2 = gl.maximum(full_to, 0) // M
    return KeyTile(b, head % HEADS_KV, n0, t0, t1, t2, t3)


@gluon.jit
def queries_descend(work_tile, scheduler, CONFIG: gl.constexpr):
    """Whether a work tile goes through its queries from the last one down; only in deterministic mode.

    There, heads are issued from the last keys to the first, so that no tile waits: the last keys are on the diagonal
    and add first, those before them arrive later. But under a causal mask their tiles are the shortest, and only the
    longest of the last head would be left at the end. So the last, interleaved heads are issued from the first keys,
    and each tile descends from the last query, one behind the other: 570 → 590 TFLOP/s at head_dim 128, 16k (L4).
    """
    if CONFIG.deterministic and CONFIG.causal and not (CONFIG.window or CONFIG.starts):
        return is_interleaved(work_tile, scheduler)
    return False


@gluon.jit
def first_query_tile(keys, descending, CONFIG: gl.constexpr):
    """The tile of queries with which a tile of keys begins."""
    t = keys.t0
    if CONFIG.staggered:
        t += keys.n0 // CONFIG.n % gl.maximum(keys.t3 - keys.t0, 1)
    return gl.where(descending, keys.t3 - 1, t)


@gluon.jit
def next_query_tile(t, keys, descending):
    """The one after t, up or down; after the last the first, for the rest of them or for the next head."""
    t0, t3 = keys.t0, keys.t3
    return gl.where(descending, gl.where(t == t0, t3 - 1, t - 1), gl.where(t + 1 == t3, t0, t + 1))


@gluon.jit
def needs_mask(t, keys):
    """Whether some query of tile t does not see some of the keys."""
    return (t < keys.t1) | (t >= keys.t2)


@gluon.jit
def load_queries(
    step, b, h, t, query_tiles, rows, queries, PANELS: gl.constexpr, PANELS_V: gl.constexpr, tokens, packed,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """Producer: the step's Q, with its row statistics, and its dO: query tile t of head h."""
    q_desc, stat_desc, dout_desc = rows
    ROW_STATS: gl.constexpr = stat_desc.block_shape[0]
    stage, _ = queries.q.slot(step)
    queries.q.acquire(step)
    full = queries.q.full.index(stage)
    if packed.sequence_ends_ptr is not None and is_border(t * M, M, tokens):
        load_cleared(q_desc, b, h, t * M, queries.q.tiles, stage, PANELS, tokens, packed)
        mbarrier.expect(full, ROW_STATS * 4)
    else:
        mbarrier.expect(full, bytes_of(PANELS, q_desc) + ROW_STATS * 4)
        load_panels(q_desc, b, h, t * M, full, queries.q.tiles, stage, PANELS)
    row = ((b * CONFIG.heads + h) * query_tiles + t) * ROW_STATS
    async_load(stat_desc, [row], full, queries.row_stats.index(stage))
    stage, _ = queries.dout.slot(step)
    queries.dout.acquire(step)
    full = queries.dout.full.index(stage)
    load_tile(dout_desc, b, h, t * M, full, queries.dout.tiles, stage, PANELS_V, tokens, packed)


@gluon.jit
def weights(s, lse, m0, n0, FIRST: gl.constexpr, masked, row_stats, mask, CONFIG: gl.constexpr):
    """P [keys, M queries], from products after a soft cap: of keys from n0 + FIRST on, and queries from m0 on."""
    query_layout: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    p = exp_scores(s, gl.expand_dims(lse, 0), mask.scale_log2)
    if masked:
        m = gl.expand_dims(m0 + gl.arange(0, M, query_layout), 0)
        n = gl.expand_dims(n0 + FIRST + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout)), 1)
        start = 0
        if CONFIG.starts:
            start = gl.expand_dims(row_stats.slice(2 * M, M, 0).load(query_layout).to(gl.int32, bitcast=True), 0)
        p = gl.where(sees(mask, m, start, n, CONFIG), p, 0.0)
    return p
