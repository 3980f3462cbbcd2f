"""Which keys a query sees and which queries see a key: masks as intervals, for all kernels.

Query m of S stands at position t = m + S_k − S among the S_k keys. It sees the keys [first, end) of `keys_seen`, and
neither end ever moves back as m grows. So the first and the last query of a tile bound what the tile sees, and the
first and the last key of a tile bound who sees it: tiles out of reach are skipped, and only those that an end cuts are
masked.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keys_seen(
    t, start, S_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr,
    last=0, ENDS: tl.constexpr = False,
):  # fmt: skip
    """The interval [first, end) of keys that the query at position t sees; t, start and last, of `ends`, are
    numbers or vectors."""
    first = t * 0
    end = first + S_k
    if STARTS:
        first = start
    if WINDOW:
        first = tl.maximum(first, t - window + 1)
        end = tl.minimum(end, t + window)
    if CAUSAL:
        end = tl.minimum(end, t + 1)
    if ENDS:
        end = tl.minimum(end, last)
    return first, end


@triton.jit
def sees(n, t, start, S_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr):
    """Whether the query at position t sees key n: `keys_seen` as a predicate, for kernels that have no registers for
    the ends of each row's interval."""
    seen = n < S_k
    if CAUSAL:
        seen = n <= t
    if WINDOW:
        seen &= n > t - window
        if not CAUSAL:
            seen &= n < t + window
    if STARTS:
        seen &= n >= start
    return seen


@triton.jit
def queries_of_keys(n0, n1, shift, some_to, full_to, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which queries see the keys n0 to n1, starts and ends aside: (some_from, full_from, some_to, full_to).

    Queries [some_from, some_to) hold every one that sees some of these keys; each of [full_from, full_to) sees all of
    them. A query's position is its number plus `shift`. `some_to` and `full_to` come in as the ends of all queries; the
    first query may be past 0, or below it.
    """
    some_from, full_from = 0, 0
    if CAUSAL:
        some_from, full_from = n0 - shift, n1 - shift
    if WINDOW:
        if not CAUSAL:
            some_from, full_from = n0 - window + 1 - shift, n1 - window + 1 - shift
        some_to = tl.minimum(some_to, n1 + window - shift)
        full_to = tl.minimum(full_to, n0 + window - shift)
    return some_from, full_from, some_to, full_to


@triton.jit
def queries_by_starts(starts_ptr, n0, n1, S, M: tl.constexpr):
    """The same for documents: queries [0, some_to) hold every one whose document starts at n1 or before; each of
    [0, full_to) is of one that starts at n0 or before.

    To a tile's precision: one look at the first start of each tile of M queries, instead of a search row by row.
    """
    CHUNK: tl.constexpr = 1024
    some = 0
    full = 0
    for i in range(0, tl.cdiv(S, M), CHUNK):
        m = (i + tl.arange(0, CHUNK)) * M
        starts = tl.load(starts_ptr + m, mask=m < S, other=2147483647)
        some += tl.sum((starts <= n1).to(tl.int32), 0)
        full += tl.sum((starts <= n0).to(tl.int32), 0)
    return some * M, (full - 1) * M + 1


@triton.jit
def queries_by_ends(ends_ptr, n0, n1, S, M: tl.constexpr):
    """The same for the ends of what queries see: queries [some_from, S) hold every one whose keys end after n0; each of
    [full_from, S) has keys that end after n1. By the last end of each tile of M queries."""
    CHUNK: tl.constexpr = 1024
    none = 0
    not_all = 0
    for i in range(0, tl.cdiv(S, M), CHUNK):
        m = (i + tl.arange(0, CHUNK)) * M
        ends = tl.load(ends_ptr + tl.minimum(m + M, S) - 1, mask=m < S, other=2147483647)
        none += tl.sum((ends <= n0).to(tl.int32), 0)
        not_all += tl.sum((ends <= n1).to(tl.int32), 0)
    return none * M, (not_all + 1) * M - 1
