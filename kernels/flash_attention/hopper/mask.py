"""Which keys a query sees, in the Hopper kernels: intervals.py and scores.py, with what a kernel knows of the mask."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import intervals, scores

# Gluon calls plain Triton functions once they are wrapped.
LOG2E = gl.constexpr(scores.LOG2E.value)
LN2 = gl.constexpr(scores.LN2.value)

keys_seen = gluon.jit(intervals.keys_seen.fn)
interval_sees = gluon.jit(intervals.sees.fn)
queries_of_keys = gluon.jit(intervals.queries_of_keys.fn)
exp_scores = gluon.jit(scores.exp_scores.fn)
score_gradient = gluon.jit(scores.score_gradient.fn)


class Mask(NamedTuple):
    """The scalars of a mask and of the scores (scores.py)."""

    S: Any
    S_k: Any
    window: Any
    starts_ptr: Any
    """int32 (B, S), where there are documents: the first key of each query's."""
    query_ends_ptr: Any
    """int32 (B, tiles of keys, 2), in the backward's kernels: `queries_by_starts` of each tile of keys."""
    tanh_scale: Any
    """scale / soft cap, which a tanh's argument is multiplied by."""
    scale_log2: Any


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
def keys_of_queries(mask, m0, M: gl.constexpr, b, CONFIG: gl.constexpr):
    """The keys [some_from, some_to) that some of M queries see, and [full_from, full_to) that all see: the ends of the
    first and of the last one say so."""
    some_from, full_to = seen_by(mask, m0, b, CONFIG)
    full_from, some_to = seen_by(mask, gl.minimum(m0 + M, mask.S) - 1, b, CONFIG)
    return some_from, some_to, full_from, full_to


@gluon.jit
def sees(mask, m, start, n, CONFIG: gl.constexpr):
    """Whether query m, of a document that begins at `start`, sees key n."""
    t = m + (mask.S_k - mask.S)
    return interval_sees(n, t, start, mask.S_k, mask.window, CONFIG.causal, CONFIG.window, CONFIG.starts)
