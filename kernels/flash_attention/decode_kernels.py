"""Flash decoding in Triton: few queries over many keys that lie in a cache, on any GPU from sm_80.

With one query a row there is no parallelism over queries, and one program per head would leave most of the GPU idle.
So the keys are split (flash-decoding, Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html): each program
takes one share of one row's keys and writes a partial output and its LSE; a second, small kernel merges the partial
outputs by their LSE. The method is bound by memory: K and V are read once, and all else is small beside that.

Three choices shape the code:

- *The grid does not know the lengths.* It follows from the cache's capacity and the GPU, and each program computes its
  share from the row's length on the device. So a CUDA graph that was captured at length 1 serves every length.
- *A cache is a ring.* The key of position s lies in slot s mod capacity. A cache that is longer than its rows never
  wraps; one that is bounded by a sliding window always does. One rule, one kernel.
- *A group is a tile.* The query heads that share a key/value head are rows of one tile, so no key is read twice.

Names: m counts rows of the tile (query · group + head of the group), n key positions. Scores are kept in base 2, with
the scale folded into log₂e. Tiles' shapes stand above them; M, N and D are the tile sizes.
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import capability_of, multiprocessors
from .config import DecodeTiles, choose_decode_tiles
from .portable import INTERPRETED
from .problem import cdiv, padded, scalars
from .scores import LN2, LOG2E, softcap_tanh


@triton.jit
def _share(length, S, capacity, window, splits, N: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr):
    """(first key that some query sees, keys in a split, splits that have keys, at least one) of a row."""
    first = tl.maximum(length - capacity, 0)
    if WINDOW:
        first = tl.maximum(first, length - S - window + 1)
    tiles = tl.cdiv(tl.maximum(length - first, 0), N)
    per_split = tl.maximum(tl.cdiv(tiles, splits), LEAST)
    return first, per_split * N, tl.maximum(tl.cdiv(tiles, per_split), 1)


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, sinks_ptr,
    B, S, capacity, window, tanh_scale, scale_log2, splits,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    G: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial out and LSE of M rows of one key/value head, over one split of its keys."""
    index = tl.program_id(0)
    split, index = index % splits, index // splits
    row_tiles = tl.cdiv(S * GROUP, M)
    tile, index = index % row_tiles, index // row_tiles
    g, b = index % G, (index // G).to(tl.int64)

    length = capacity
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
    first, keys, used = _share(length, S, capacity, window, splits, N, LEAST, WINDOW)
    if split >= used:
        return
    begin = first + split * keys
    end = tl.minimum(begin + keys, length)

    # [M]: query, head and position of each row; rows past the last see nothing.
    m = tile * M + tl.arange(0, M)
    query, h = m // GROUP, g * GROUP + m % GROUP
    is_row = m < S * GROUP
    t = tl.where(is_row, length - S + query, -1)
    oldest = t * 0
    if WINDOW:
        oldest = tl.maximum(oldest, t - window + 1)
    # [D]
    d = tl.arange(0, D)
    is_dim = d < HEAD_DIM
    # [M, D]
    q_offsets = b * q_batch + query.to(tl.int64) * q_row + h * q_head
    q = tl.load(q_ptr + q_offsets[:, None] + d[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
    acc = tl.zeros([M, D], tl.float32)
    # [M]; the first split begins with the sink in its denominator, which the merge then knows nothing of.
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    if SINKS:  # noqa: SIM102 (known when this compiles; split is not)
        if split == 0:
            row_max = tl.load(sinks_ptr + h, mask=is_row, other=0.0).to(tl.float32) * LOG2E
            row_sum += 1

    k_ptr += b * k_batch + g.to(tl.int64) * k_head
    v_ptr += b * v_batch + g.to(tl.int64) * v_head
    for n0 in tl.range(begin, end, N, num_stages=STAGES):
        # [N]
        n = n0 + tl.arange(0, N)
        is_key = n < end
        slot = n - n0 // capacity * capacity
        slot = tl.where(slot >= capacity, slot - capacity, slot).to(tl.int64)
        # [N, D]; 0 where there is no key: what lies in an unused slot may be NaN.
        is_loaded = is_key[:, None] & is_dim[None, :]
        k = tl.load(k_ptr + slot[:, None] * k_row + d[None, :], mask=is_loaded, other=0.0)
        # [M, N]
        s = tl.dot(q, k.T, input_precision=PRECISION)
        s = softcap_tanh(s, tanh_scale, SOFTCAP)
        is_seen = is_key[None, :] & (n[None, :] <= t[:, None])
        if WINDOW:
            is_seen = is_seen & (n[None, :] >= oldest[:, None])
        s = tl.where(is_seen, s * scale_log2, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        # A row that has seen nothing yet has no maximum to subtract: −inf − (−inf) would be NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - pivot[:, None])
        rescale = tl.exp2(row_max - pivot)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        # [N, D]
        v = tl.load(v_ptr + slot[:, None] * v_row + d[None, :], mask=is_loaded, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    row_sum = tl.where(row_sum == 0, 1.0, row_sum)  # saw nothing: out 0, LSE −inf + log 1
    row = ((split * B + b) * S + query) * (G * GROUP) + h
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * HEAD_DIM + d[None, :], out, mask=is_row[:, None] & is_dim[None, :])
    tl.store(lse_ptr + row, (row_max + tl.log2(row_sum)) * LN2, mask=is_row)


@triton.jit
def merge_kernel(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, lengths_ptr,
    B, S, capacity, window, splits,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, LEAST: tl.constexpr,
    WINDOW: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out and LSE of one query of one head, of the splits that have keys. SPLITS: splits, or a power of 2 above."""
    CHUNK: tl.constexpr = 16
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(B, tl.int64) * S * H
    length = capacity
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row // (S * H))
    _, _, used = _share(length, S, capacity, window, splits, N, LEAST, WINDOW)
    every = tl.arange(0, SPLITS)
    lse = tl.load(partial_lse_ptr + every * rows + row, mask=every < used, other=float("-inf")) * LOG2E
    most = tl.max(lse, 0)
    pivot = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp2(lse - pivot), 0)
    total = tl.where(total == 0, 1.0, total)
    # [D]
    d = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    for i0 in range(0, used, CHUNK):
        i = i0 + tl.arange(0, CHUNK)
        is_used = i < used
        weight = tl.exp2(tl.load(partial_lse_ptr + i * rows + row, mask=is_used, other=float("-inf")) * LOG2E - pivot)
        offsets = (i * rows + row)[:, None] * HEAD_DIM + d[None, :]
        partial = tl.load(partial_out_ptr + offsets, mask=is_used[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * partial, 0)
    tl.store(out_ptr + row * HEAD_DIM + d, (acc / total).to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + row, (most + tl.log2(total)) * LN2)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, sinks: Tensor | None, *,
    window: int | None, softcap: float, scale: float, splits: int | None = None, tiles: DecodeTiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and LSE of inputs that the interface has checked.

    Args:
        q: (B, S, H, D). k_cache, v_cache: (B, capacity, G, D). lengths: int32 (B,); None where every
            row is as long as the cache. sinks: (H,).
        splits, tiles: instead of those chosen for the GPU (for tuning and tests).
    Returns:
        out (B, S, H, D), contiguous, in q's dtype; LSE (B, S, H), float32, natural log.
    """
    if INTERPRETED and q.dtype == torch.bfloat16:  # Triton's interpreter computes bf16 products wrongly
        q32, k32, v32 = q.float(), k_cache.float(), v_cache.float()
        out, lse = decode(
            q32, k32, v32, lengths, sinks, window=window, softcap=softcap, scale=scale, splits=splits, tiles=tiles
        )
        return out.to(q.dtype), lse
    (B, S, H, D), (capacity, G) = q.shape, k_cache.shape[1:3]
    group = H // G
    tiles = tiles or choose_decode_tiles(D, S * group, q.element_size(), capability_of(q.device))
    programs = B * G * cdiv(S * group, tiles.m)
    splits = splits or choose_splits(programs, cdiv(capacity, tiles.n * tiles.least), multiprocessors(q.device))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, S, H, dtype=torch.float32, device=q.device)
    partial_out, partial_lse = out, lse
    if splits > 1:
        partial_out = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    shared = {"N": tiles.n, "D": padded(D), "HEAD_DIM": D, "LEAST": tiles.least, "WINDOW": window is not None}
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    with torch.cuda.device_of(q):
        split_kernel[(programs * splits,)](
            q, k_cache, v_cache, partial_out, partial_lse, lengths, sinks,
            B, S, capacity, *scalars(window, softcap, scale), splits,
            *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
            G=G, GROUP=group, M=tiles.m, SOFTCAP=softcap > 0, SINKS=sinks is not None, PRECISION=precision,
            STAGES=tiles.num_stages, num_warps=tiles.num_warps, **shared,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(B * S * H,)](
                partial_out, partial_lse, out, lse, lengths, B, S, capacity, window or 0, splits,
                H=H, SPLITS=padded(splits), num_warps=2, **shared,
            )  # fmt: skip
    return out, lse


MOST_SPLITS = 128
PROGRAMS_PER_MULTIPROCESSOR = 2
"""That many hold enough loads in flight to keep the memory busy: 2 · 2 stages · (K and V tile of 16 KiB)."""


def choose_splits(programs: int, most: int, multiprocessors: int) -> int:
    """How many splits fill the GPU: the fewest whose waves are within 5 % as full as those of the best number.

    Args:
        programs: without a split. most: splits that can have keys at all.
    """

    def busy(splits: int) -> float:
        waves = programs * splits / (PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
        return waves / ceil(waves)

    candidates = range(1, max(1, min(most, MOST_SPLITS)) + 1)
    best = max(map(busy, candidates))
    return next(splits for splits in candidates if busy(splits) >= 0.95 * best)
