"""What the backward needs to know of rows and tiles, and memory that must be 0, before its other kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from ..intervals import queries_by_starts
from ..scores import LOG2E


@triton.jit(do_not_specialize=["S", "S_k", "n_tiles", "n_accumulators", "n_heads"])
def preprocess_kernel(
    out_desc, dout_desc, lse_ptr, dlse_ptr, starts_ptr, sequence_ends_ptr, stat_ptr, query_ends_ptr,
    accum_ptr, added_ptr, cleared_ptr, semaphore_ptr,
    S, S_k, n_tiles, n_accumulators, n_heads,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SUMMED: tl.constexpr, ROW_STATS: tl.constexpr,
):  # fmt: skip
    """For M queries, one after the other: LSE in base 2; delta = Σ out · dout − dlse; the starts of their documents, as
    bits. For each tile of N keys: `queries_by_starts`. Clears the first heads' accumulators of dQ and all counters."""
    COLUMNS: tl.constexpr = 16  # that are cleared at once
    program = tl.program_id(0)
    head = program // n_tiles
    b, h = head // H, head % H
    m0 = program % n_tiles * M
    m = m0 + tl.arange(0, M)
    out = out_desc.load([b, h, m0, 0]).reshape(M, D).to(tl.float32)
    dout = dout_desc.load([b, h, m0, 0]).reshape(M, D).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    row = head.to(tl.int64) * S + m
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=m < S, other=0.0)
    if sequence_ends_ptr is not None:  # 0 for padding tokens, whose dout may be anything
        row0 = b.to(tl.int64) * S
        of_sequences = (m >= tl.load(starts_ptr + row0)) & (m < tl.load(sequence_ends_ptr + row0 + S - 1))
        delta = tl.where(of_sequences, delta, 0.0)
    # exp2(s − ∞) = 0 for rows past the end, and for rows that see nothing
    lse = tl.load(lse_ptr + row, mask=m < S, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    stat_ptr += program.to(tl.int64) * ROW_STATS
    tl.store(stat_ptr + tl.arange(0, M), lse)
    tl.store(stat_ptr + M + tl.arange(0, M), delta)
    if starts_ptr is not None:
        starts = tl.load(starts_ptr + b.to(tl.int64) * S + m, mask=m < S, other=0)
        tl.store(stat_ptr + 2 * M + tl.arange(0, M), starts.to(tl.float32, bitcast=True))
        if h == 0:
            key_tiles = tl.cdiv(S_k, N)
            for tile in range(program % n_tiles, key_tiles, n_tiles):
                n1 = tl.minimum(tile * N + N, S_k) - 1
                some_to, full_to = queries_by_starts(starts_ptr + b.to(tl.int64) * S, tile * N, n1, S, M)
                tl.store(query_ends_ptr + 2 * (b * key_tiles + tile), some_to)
                tl.store(query_ends_ptr + 2 * (b * key_tiles + tile) + 1, full_to)
    if semaphore_ptr is not None:
        tl.store(semaphore_ptr + program, 0)
    if accum_ptr is not None:
        if program < n_accumulators:
            accumulator_ptr = accum_ptr + program.to(tl.int64) * (M * SUMMED) + tl.arange(0, M * COLUMNS)
            for i in tl.static_range(0, SUMMED, COLUMNS):
                tl.store(accumulator_ptr + i * M, tl.zeros([M * COLUMNS], tl.float32))
        if program < n_heads:
            tl.store(added_ptr + program, 0)
            tl.store(cleared_ptr + program, 0)
