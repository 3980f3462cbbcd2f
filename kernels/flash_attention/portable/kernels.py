"""The portable kernels: forward, Δ, dQ, dK and dV.

Names: m counts queries, n keys; t is a query's position among the keys, t = m + S_k − S. Scores are kept as products,
capped and biased, which times `scale_log2` are scores in base 2. Tiles' shapes stand above them; M and N are the tile
sizes, D and DV the columns of Q and K and of V as tiles have them, powers of 2, HEAD_DIM and HEAD_DIM_V of which are
real.

With ENDS there are padding tokens: queries that see nothing, and keys outside of all that is seen. Whatever lies
there is read as 0, so that NaN stays where it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..intervals import keys_seen, queries_by_ends, queries_by_starts, queries_of_keys
from ..scores import LN2, LOG2E, exp_scores, score_gradient, softcap_tanh


@triton.jit
def _program(n_tiles, WIDTH: tl.constexpr):
    """(tile, head) of this program: head after head, or group after group of WIDTH heads; the last tile first.

    With a causal mask the last queries have the most work, and to begin with it keeps the GPU busy at the end. One
    head at a time keeps what it streams in the L2 cache: 568 against 521 TFLOP/s for all heads at once (H100,
    forward, D 128, causal, S 16k).
    """
    index = tl.program_id(0)
    group = index // (n_tiles * WIDTH)
    index = index % (n_tiles * WIDTH)
    return n_tiles - 1 - index // WIDTH, group * WIDTH + index % WIDTH


@triton.jit
def _queries(S, H: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr):
    """Of a program that has M queries of one head: the head among all, its batch and number there, the first query and
    all M; see `_program`."""
    tile, head = _program(tl.cdiv(S, M), WIDTH)
    b, h = head // H, head % H
    m0 = tile * M
    return head, b, h, m0, m0 + tl.arange(0, M)


@triton.jit
def _load(x, b, h, row, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, kept=None):
    """[ROWS, D]: rows from `row` on of head h of batch b; 0 past the last row and past HEAD_DIM.

    Args:
        x: what `_rows` made: a tensor descriptor, or (pointer, strides, rows) where the GPU has no TMA.
        kept: bool [ROWS], without TMA: which rows are read, and not 0. None for all.
    """
    if TMA:
        tile = x.load([b, h, row, 0]).reshape(ROWS, D)
    else:
        pointers, mask = _pointers(x, b, h, row, ROWS, D, HEAD_DIM)
        if kept is not None:
            mask = mask & kept[:, None]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def _store(x, b, h, row, tile, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr):
    """Write what `_load` would read."""
    if TMA:
        x.store([b, h, row, 0], tile.reshape(1, 1, ROWS, D))
    else:
        pointers, mask = _pointers(x, b, h, row, ROWS, D, HEAD_DIM)
        tl.store(pointers, tile, mask=mask)


@triton.jit
def _pointers(x, b, h, row, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    pointer, batch_stride, row_stride, head_stride, n_rows = x
    # 64 bits to the tile, 32 bits inside it: past 2³¹ elements, and few registers.
    pointer += tl.cast(b, tl.int64) * batch_stride + tl.cast(h, tl.int64) * head_stride
    pointer += tl.cast(row, tl.int64) * row_stride
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, D)[None, :]
    mask = r < n_rows - row
    if HEAD_DIM < D:
        mask = mask & (d < HEAD_DIM)
    return pointer + (r * row_stride + d), mask


@triton.jit
def _keys_of_tile(
    starts_ptr, ends_ptr, b, m0, S, S_k, window,
    M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """The keys [first, end) that each of M queries sees; those in [some_from, some_to) are seen by some query of the
    tile, those in [full_from, full_to) by all of them: the ends of its first and its last query say so."""
    m = tl.minimum(m0 + tl.arange(0, M), S - 1)
    m1 = tl.minimum(m0 + M, S) - 1
    start, start0, start1 = 0, 0, 0
    if STARTS:
        starts_ptr += b.to(tl.int64) * S
        start, start0, start1 = tl.load(starts_ptr + m), tl.load(starts_ptr + m0), tl.load(starts_ptr + m1)
    last, last0, last1 = 0, 0, 0
    if ENDS:
        ends_ptr += b.to(tl.int64) * S
        last, last0, last1 = tl.load(ends_ptr + m), tl.load(ends_ptr + m0), tl.load(ends_ptr + m1)
    shift = S_k - S
    first, end = keys_seen(m + shift, start, S_k, window, CAUSAL, WINDOW, STARTS, last, ENDS)
    some_from, full_to = keys_seen(m0 + shift, start0, S_k, window, CAUSAL, WINDOW, STARTS, last0, ENDS)
    full_from, some_to = keys_seen(m1 + shift, start1, S_k, window, CAUSAL, WINDOW, STARTS, last1, ENDS)
    return first, end, tl.maximum(some_from, 0), some_to, full_from, full_to


@triton.jit
def _keys_of_somebody(starts_ptr, ends_ptr, b, S, STARTS: tl.constexpr, ENDS: tl.constexpr):
    """[first, end) of all keys that are seen in batch b, as its first and its last query have them, with ENDS."""
    row = b.to(tl.int64) * S
    first, end = 0, 0
    if ENDS:
        end = tl.load(ends_ptr + row + S - 1)
        if STARTS:
            first = tl.load(starts_ptr + row)
    return first, end


@triton.jit
def _somebodys(n, first, end, ENDS: tl.constexpr):
    """Which keys are to be read, for `_load`; None for all, without ENDS."""
    kept = None
    if ENDS:
        kept = (n >= first) & (n < end)
    return kept


@triton.jit
def _alibi(slopes_ptr, h, m, shift, n, scale_log2):
    """ALiBi's bias of queries m with keys n, in the units of what `scale_log2` multiplies, and their distances."""
    slope = tl.load(slopes_ptr + h).to(tl.float32) * (LOG2E / scale_log2)
    distance = tl.abs(m + shift - n).to(tl.float32)
    return -slope * distance, distance


@triton.jit
def _at_most_1(p):
    """A row's largest weight, where a score of 10⁷ and more stands beside an LSE in float32, comes out above it."""
    return tl.minimum(p, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def forward_kernel(
    q_rows, k_rows, v_rows, out_rows, lse_ptr, starts_ptr, ends_ptr, sinks_ptr, slopes_ptr,
    S, S_k, window, tanh_scale, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out and LSE of M queries of one head."""
    head, b, h, m0, m = _queries(S, H, M, GROUP)
    first, end, some_from, some_to, full_from, full_to = _keys_of_tile(
        starts_ptr, ends_ptr, b, m0, S, S_k, window, M, CAUSAL, WINDOW, STARTS, ENDS
    )
    real_from, real_to = _keys_of_somebody(starts_ptr, ends_ptr, b, S, STARTS, ENDS)

    # [M, D]
    q = _load(q_rows, b, h, m0, M, D, HEAD_DIM, TMA)
    acc = tl.zeros([M, DV], tl.float32)
    # [M]; the softmax begins with nothing in its denominator, or with the sink.
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    if SINKS:
        row_max = tl.zeros([M], tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * (LOG2E / scale_log2)
        row_sum += 1
    for n0 in tl.range(some_from, some_to, N, num_stages=STAGES):
        kept = _somebodys(n0 + tl.arange(0, N), real_from, real_to, ENDS)
        # [N, D]
        k = _load(k_rows, b, h // GROUP, n0, N, D, HEAD_DIM, TMA, kept)
        # [M, N]
        s = tl.dot(q, k.T, input_precision=PRECISION)
        s = softcap_tanh(s, tanh_scale, SOFTCAP)
        if ALIBI:
            bias, _ = _alibi(slopes_ptr, h, m[:, None], S_k - S, n0 + tl.arange(0, N)[None, :], scale_log2)
            s += bias
        if (n0 < full_from) | (n0 + N > full_to):
            n = n0 + tl.arange(0, N)[None, :]
            s = tl.where((n >= first[:, None]) & (n < end[:, None]), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        # A row that has seen nothing yet has no maximum to subtract: −inf − (−inf) would be NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        # The difference first: a score of 10¹⁰ has no digits after the point, that of two such scores has.
        p = tl.exp2((s - pivot[:, None]) * scale_log2)
        rescale = tl.exp2((row_max - pivot) * scale_log2)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        # [N, DV]
        v = _load(v_rows, b, h // GROUP, n0, N, DV, HEAD_DIM_V, TMA, kept)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    row_sum = tl.where(row_sum == 0, 1.0, row_sum)  # saw nothing: out 0, LSE −inf + log 1
    _store(out_rows, b, h, m0, (acc / row_sum[:, None]).to(q.dtype), M, DV, HEAD_DIM_V, TMA)
    lse = (row_max * scale_log2 + tl.log2(row_sum)) * LN2
    # Large, and off by the rounding of its scores: not above what it should be, for `_at_most_1` (L19).
    lse = tl.where(tl.abs(lse) > 16384.0, lse - tl.abs(lse) * (1 / 2097152.0), lse)
    tl.store(lse_ptr + head.to(tl.int64) * S + m, lse, mask=m < S)


@triton.jit
def delta_kernel(
    out_rows, dout_rows, delta_ptr, dlse_ptr, S,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, DLSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """delta = Σ out · dout − dlse of M queries of one head: what p · (dp − delta) needs of a row's other keys."""
    head, b, h, m0, m = _queries(S, H, M, 1)
    out = _load(out_rows, b, h, m0, M, D, HEAD_DIM, TMA).to(tl.float32)
    dout = _load(dout_rows, b, h, m0, M, D, HEAD_DIM, TMA).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    row = head.to(tl.int64) * S + m
    if DLSE:
        delta -= tl.load(dlse_ptr + row, mask=m < S, other=0.0)
    tl.store(delta_ptr + row, delta, mask=m < S)


@triton.jit
def dq_kernel(
    q_rows, k_rows, v_rows, dout_rows, dq_rows, lse_ptr, delta_ptr, starts_ptr, ends_ptr, slopes_ptr, dslopes_ptr,
    S, S_k, window, tanh_scale, scale_log2, scale,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DSLOPES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dQ of M queries of one head; with DSLOPES also each query's part of the gradient of the head's slope."""
    head, b, h, m0, m = _queries(S, H, M, GROUP)
    first, end, some_from, some_to, full_from, full_to = _keys_of_tile(
        starts_ptr, ends_ptr, b, m0, S, S_k, window, M, CAUSAL, WINDOW, STARTS, ENDS
    )
    real_from, real_to = _keys_of_somebody(starts_ptr, ends_ptr, b, S, STARTS, ENDS)
    kept_rows = None
    if ENDS:
        kept_rows = first < end

    # [M, D] and [M, DV]
    q = _load(q_rows, b, h, m0, M, D, HEAD_DIM, TMA)
    dout = _load(dout_rows, b, h, m0, M, DV, HEAD_DIM_V, TMA, kept_rows)
    dq = tl.zeros([M, D], tl.float32)
    # [M]
    row = head.to(tl.int64) * S + m
    lse = tl.load(lse_ptr + row, mask=m < S, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + row, mask=m < S, other=0.0)
    if ENDS:
        delta = tl.where(kept_rows, delta, 0.0)
    dslope = tl.zeros([M], tl.float32)
    for n0 in tl.range(some_from, some_to, N, num_stages=STAGES):
        kept = _somebodys(n0 + tl.arange(0, N), real_from, real_to, ENDS)
        # [N, D] and [N, DV]
        k = _load(k_rows, b, h // GROUP, n0, N, D, HEAD_DIM, TMA, kept)
        v = _load(v_rows, b, h // GROUP, n0, N, DV, HEAD_DIM_V, TMA, kept)
        # [M, N]
        s = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        s = softcap_tanh(s, tanh_scale, SOFTCAP)
        biased = s
        if ALIBI:
            bias, distance = _alibi(slopes_ptr, h, m[:, None], S_k - S, n0 + tl.arange(0, N)[None, :], scale_log2)
            biased += bias
        p = _at_most_1(exp_scores(biased, lse[:, None], scale_log2))
        if (n0 < full_from) | (n0 + N > full_to):
            n = n0 + tl.arange(0, N)[None, :]
            p = tl.where((n >= first[:, None]) & (n < end[:, None]), p, 0.0)
        if DSLOPES:
            dslope -= tl.sum(score_gradient(p, dp, delta[:, None], s, False) * distance, 1)
        ds = score_gradient(p, dp, delta[:, None], s, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    _store(dq_rows, b, h, m0, (dq * scale).to(q.dtype), M, D, HEAD_DIM, TMA)
    if DSLOPES:
        tl.store(dslopes_ptr + row, dslope, mask=m < S)


@triton.jit
def dkdv_kernel(
    q_rows, k_rows, v_rows, dout_rows, dk_rows, dv_rows, lse_ptr, delta_ptr, starts_ptr, ends_ptr, slopes_ptr,
    S, S_k, window, tanh_scale, scale_log2, scale,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dK and dV of N keys of one key/value head, summed over the query heads that share it."""
    H_kv: tl.constexpr = H // GROUP
    tile, head = _program(tl.cdiv(S_k, N), 1)
    if CAUSAL:
        tile = tl.cdiv(S_k, N) - 1 - tile  # the first keys are seen by the most queries
    b, g = head // H_kv, head % H_kv
    n0 = tile * N
    n = n0 + tl.arange(0, N)
    n1 = tl.minimum(n0 + N, S_k) - 1
    # Rows [some_from, some_to) hold every query that sees some key of the tile; all of [full_from, full_to) see all.
    shift = S_k - S
    some_from, full_from, some_to, full_to = queries_of_keys(n0, n1, shift, S, S, window, CAUSAL, WINDOW)
    real_from, real_to = _keys_of_somebody(starts_ptr, ends_ptr, b, S, STARTS, ENDS)
    kept = _somebodys(n, real_from, real_to, ENDS)
    if ENDS:
        ends_ptr += b.to(tl.int64) * S
        by_end, all_by_end = queries_by_ends(ends_ptr, n0, n1, S, M)
        some_from, full_from = tl.maximum(some_from, by_end), tl.maximum(full_from, all_by_end)
    if STARTS:
        starts_ptr += b.to(tl.int64) * S
        by_start, all_by_start = queries_by_starts(starts_ptr, n0, n1, S, M)
        some_to, full_to = tl.minimum(some_to, by_start), tl.minimum(full_to, all_by_start)
    some_from = tl.maximum(some_from, 0)
    steps = tl.cdiv(tl.maximum(some_to - some_from, 0), M)

    # [N, D] and [N, DV]
    k = _load(k_rows, b, g, n0, N, D, HEAD_DIM, TMA, kept)
    v = _load(v_rows, b, g, n0, N, DV, HEAD_DIM_V, TMA, kept)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, DV], tl.float32)
    for step in tl.range(0, steps * GROUP, num_stages=STAGES):
        h = g * GROUP
        m0 = some_from + step * M
        if GROUP > 1:
            h += step // steps
            m0 = some_from + step % steps * M
        m = m0 + tl.arange(0, M)
        row = (b * H + h).to(tl.int64) * S + m
        kept_rows = None
        if ENDS:
            start = 0
            if STARTS:
                start = tl.load(starts_ptr + m, mask=m < S, other=0)
            last = tl.load(ends_ptr + m, mask=m < S, other=0)
            first, end = keys_seen(m + shift, start, S_k, window, CAUSAL, WINDOW, STARTS, last, ENDS)
            kept_rows = first < end
        # [M, D] and [M, DV]
        q = _load(q_rows, b, h, m0, M, D, HEAD_DIM, TMA, kept_rows)
        dout = _load(dout_rows, b, h, m0, M, DV, HEAD_DIM_V, TMA, kept_rows)
        # [M]; a row past the end has p = exp2(s − inf) = 0.
        lse = tl.load(lse_ptr + row, mask=m < S, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + row, mask=m < S, other=0.0)
        if ENDS:
            delta = tl.where(kept_rows, delta, 0.0)
        # [N, M]: transposed, so that the sums over queries are plain products
        s = tl.dot(k, q.T, input_precision=PRECISION)
        s = softcap_tanh(s, tanh_scale, SOFTCAP)
        biased = s
        if ALIBI:
            bias, _ = _alibi(slopes_ptr, h, m[None, :], shift, n[:, None], scale_log2)
            biased += bias
        p = _at_most_1(exp_scores(biased, lse[None, :], scale_log2))
        if (m0 < full_from) | (m0 + M > full_to):
            if not ENDS:
                start = 0
                if STARTS:
                    start = tl.load(starts_ptr + m, mask=m < S, other=0)
                first, end = keys_seen(m + shift, start, S_k, window, CAUSAL, WINDOW, STARTS)
            p = tl.where((n[:, None] >= first[None, :]) & (n[:, None] < end[None, :]), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        ds = score_gradient(p, dp, delta[None, :], s, SOFTCAP)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    _store(dk_rows, b, g, n0, (dk * scale).to(k.dtype), N, D, HEAD_DIM, TMA)
    _store(dv_rows, b, g, n0, dv.to(v.dtype), N, DV, HEAD_DIM_V, TMA)
