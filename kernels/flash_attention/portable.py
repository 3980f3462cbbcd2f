"""Flash attention in portable Triton: forward and backward for any mask the contract knows, on any GPU from sm_80.

The method is FlashAttention-2's (Dao 2023, arXiv:2307.08691): one program owns a tile of queries (forward, dQ) or of
keys (dK and dV) and streams the other side past it, so nothing of size S × S ever exists. `kernels/reference.py` holds
the same algorithm in plain PyTorch; docs/flash-attention.md explains it.

Three choices shape the code:

- *Masks are intervals.* Query t sees the keys [first, end) that `keys_seen` computes, and neither end ever moves back
  as t grows. So the ends of a tile's first and last row decide which tiles are visited at all and which need their
  elements masked.
- *The backward is split* into a kernel for dK and dV and one for dQ. Each element has one owner and a fixed order of
  summation: no atomics, bitwise the same on every run. It costs 7 matrix products where a fused kernel needs 5; in
  Triton the 5-product form, adding up dQ with TMA reductions, was slower still: 354 against 425 TFLOP/s (D 128, 16k).
- *Strides never enter the kernels.* On Hopper and newer, 16-bit tensors come as tensor descriptors made on the host
  (TMA); elsewhere `_load` and `_store` make pointers. Rows past the end read as zero and are not written.

docs/kernels/portable.md has the measurements behind these, and what was tried besides.

Names: m counts queries, n keys; t is a query's position among the keys, t = m + S_k − S. Scores are kept in base 2,
with the scale folded into log₂e. Tiles' shapes stand above them; M, N and D are the tile sizes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Tiles, choose_tiles
from .intervals import keys_seen, queries_by_starts, queries_of_keys
from .problem import Problem, aligned, cdiv, dsinks_of, padded
from .scores import LN2, LOG2E, capped, score_gradient, weigh

INTERPRETED: bool = triton.knobs.runtime.interpret


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
def _load(x, b, h, row, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, D]: rows from `row` on of head h of batch b; 0 past the last row and past HEAD_DIM.

    x is what `_rows` made: a tensor descriptor, or (pointer, strides, rows) where the GPU has no TMA.
    """
    if TMA:
        tile = x.load([b, h, row, 0]).reshape(ROWS, D)
    else:
        pointers, mask = _pointers(x, b, h, row, ROWS, D, HEAD_DIM)
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
    starts_ptr, b, m0, S, S_k, window,
    M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """The keys [first, end) that each of M queries sees; those in [some_from, some_to) are seen by some query of the
    tile, those in [full_from, full_to) by all of them: the ends of its first and its last query say so."""
    m = tl.minimum(m0 + tl.arange(0, M), S - 1)
    m1 = tl.minimum(m0 + M, S) - 1
    start, start0, start1 = 0, 0, 0
    if STARTS:
        starts_ptr += b.to(tl.int64) * S
        start, start0, start1 = tl.load(starts_ptr + m), tl.load(starts_ptr + m0), tl.load(starts_ptr + m1)
    shift = S_k - S
    first, end = keys_seen(m + shift, start, S_k, window, CAUSAL, WINDOW, STARTS)
    some_from, full_to = keys_seen(m0 + shift, start0, S_k, window, CAUSAL, WINDOW, STARTS)
    full_from, some_to = keys_seen(m1 + shift, start1, S_k, window, CAUSAL, WINDOW, STARTS)
    return first, end, tl.maximum(some_from, 0), some_to, full_from, full_to


@triton.jit
def forward_kernel(
    q_rows, k_rows, v_rows, out_rows, lse_ptr, starts_ptr, sinks_ptr,
    S, S_k, window, cap, factor,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out and LSE of M queries of one head."""
    tile, head = _program(tl.cdiv(S, M), GROUP)
    b, h = head // H, head % H
    m0 = tile * M
    m = m0 + tl.arange(0, M)
    first, end, some_from, some_to, full_from, full_to = _keys_of_tile(
        starts_ptr, b, m0, S, S_k, window, M, CAUSAL, WINDOW, STARTS
    )

    # [M, D]
    q = _load(q_rows, b, h, m0, M, D, HEAD_DIM, TMA)
    acc = tl.zeros([M, D], tl.float32)
    # [M]; the softmax begins with nothing in its denominator, or with the sink.
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    if SINKS:
        row_max = tl.zeros([M], tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        row_sum += 1
    for n0 in tl.range(some_from, some_to, N, num_stages=STAGES):
        # [N, D]
        k = _load(k_rows, b, h // GROUP, n0, N, D, HEAD_DIM, TMA)
        # [M, N]
        s = tl.dot(q, k.T, input_precision=PRECISION)
        s = capped(s, cap, SOFTCAP)
        if (n0 < full_from) | (n0 + N > full_to):
            n = n0 + tl.arange(0, N)[None, :]
            s = tl.where((n >= first[:, None]) & (n < end[:, None]), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        # A row that has seen nothing yet has no maximum to subtract: −inf − (−inf) would be NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * factor - pivot[:, None])
        rescale = tl.exp2(row_max - pivot)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        # [N, D]
        v = _load(v_rows, b, h // GROUP, n0, N, D, HEAD_DIM, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    row_sum = tl.where(row_sum == 0, 1.0, row_sum)  # saw nothing: out 0, LSE −inf + log 1
    _store(out_rows, b, h, m0, (acc / row_sum[:, None]).to(q.dtype), M, D, HEAD_DIM, TMA)
    tl.store(lse_ptr + head.to(tl.int64) * S + m, (row_max + tl.log2(row_sum)) * LN2, mask=m < S)


@triton.jit
def delta_kernel(
    out_rows, dout_rows, delta_ptr, dlse_ptr, S,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, DLSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """delta = Σ out · dout − dlse of M queries of one head: what p · (dp − delta) needs of a row's other keys."""
    tile, head = _program(tl.cdiv(S, M), 1)
    b, h = head // H, head % H
    m0 = tile * M
    m = m0 + tl.arange(0, M)
    out = _load(out_rows, b, h, m0, M, D, HEAD_DIM, TMA).to(tl.float32)
    dout = _load(dout_rows, b, h, m0, M, D, HEAD_DIM, TMA).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    row = head.to(tl.int64) * S + m
    if DLSE:
        delta -= tl.load(dlse_ptr + row, mask=m < S, other=0.0)
    tl.store(delta_ptr + row, delta, mask=m < S)


@triton.jit
def dq_kernel(
    q_rows, k_rows, v_rows, dout_rows, dq_rows, lse_ptr, delta_ptr, starts_ptr,
    S, S_k, window, cap, factor, scale,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dQ of M queries of one head."""
    tile, head = _program(tl.cdiv(S, M), GROUP)
    b, h = head // H, head % H
    m0 = tile * M
    m = m0 + tl.arange(0, M)
    first, end, some_from, some_to, full_from, full_to = _keys_of_tile(
        starts_ptr, b, m0, S, S_k, window, M, CAUSAL, WINDOW, STARTS
    )

    # [M, D]
    q = _load(q_rows, b, h, m0, M, D, HEAD_DIM, TMA)
    dout = _load(dout_rows, b, h, m0, M, D, HEAD_DIM, TMA)
    dq = tl.zeros([M, D], tl.float32)
    # [M]
    row = head.to(tl.int64) * S + m
    lse = tl.load(lse_ptr + row, mask=m < S, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + row, mask=m < S, other=0.0)
    for n0 in tl.range(some_from, some_to, N, num_stages=STAGES):
        # [N, D]
        k = _load(k_rows, b, h // GROUP, n0, N, D, HEAD_DIM, TMA)
        v = _load(v_rows, b, h // GROUP, n0, N, D, HEAD_DIM, TMA)
        # [M, N]
        s = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        s = capped(s, cap, SOFTCAP)
        p = weigh(s, lse[:, None], factor)
        if (n0 < full_from) | (n0 + N > full_to):
            n = n0 + tl.arange(0, N)[None, :]
            p = tl.where((n >= first[:, None]) & (n < end[:, None]), p, 0.0)
        ds = score_gradient(p, dp, delta[:, None], s, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    _store(dq_rows, b, h, m0, (dq * scale).to(q.dtype), M, D, HEAD_DIM, TMA)


@triton.jit
def dkdv_kernel(
    q_rows, k_rows, v_rows, dout_rows, dk_rows, dv_rows, lse_ptr, delta_ptr, starts_ptr,
    S, S_k, window, cap, factor, scale,
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
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
    if STARTS:
        starts_ptr += b.to(tl.int64) * S
        by_start, all_by_start = queries_by_starts(starts_ptr, n0, n1, S, M)
        some_to, full_to = tl.minimum(some_to, by_start), tl.minimum(full_to, all_by_start)
    some_from = tl.maximum(some_from, 0)
    steps = tl.cdiv(tl.maximum(some_to - some_from, 0), M)

    # [N, D]
    k = _load(k_rows, b, g, n0, N, D, HEAD_DIM, TMA)
    v = _load(v_rows, b, g, n0, N, D, HEAD_DIM, TMA)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    for step in tl.range(0, steps * GROUP, num_stages=STAGES):
        h = g * GROUP
        m0 = some_from + step * M
        if GROUP > 1:
            h += step // steps
            m0 = some_from + step % steps * M
        m = m0 + tl.arange(0, M)
        row = (b * H + h).to(tl.int64) * S + m
        # [M, D]
        q = _load(q_rows, b, h, m0, M, D, HEAD_DIM, TMA)
        dout = _load(dout_rows, b, h, m0, M, D, HEAD_DIM, TMA)
        # [M]; a row past the end has p = exp2(s − inf) = 0.
        lse = tl.load(lse_ptr + row, mask=m < S, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + row, mask=m < S, other=0.0)
        # [N, M]: transposed, so that the sums over queries are plain products
        s = tl.dot(k, q.T, input_precision=PRECISION)
        s = capped(s, cap, SOFTCAP)
        p = weigh(s, lse[None, :], factor)
        if (m0 < full_from) | (m0 + M > full_to):
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
    _store(dv_rows, b, g, n0, dv.to(v.dtype), N, D, HEAD_DIM, TMA)


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, sinks: Tensor | None, *,
    causal: bool, window: int | None, softcap: float, scale: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and LSE of inputs that the interface has checked.

    Args:
        q: (B, S, H, D). k, v: (B, S_k, G, D). starts: int32 (B, S). sinks: (H,).
        tiles: instead of those that `choose_tiles` picks (for tuning).
    Returns:
        out (B, S, H, D), contiguous, in q's dtype; LSE (B, H, S), float32, natural log.
    """
    if _needs_upcast(q):
        q32, k32, v32 = q.float(), k.float(), v.float()
        out, lse = forward(
            q32, k32, v32, starts, sinks, causal=causal, window=window, softcap=softcap, scale=scale, tiles=tiles
        )
        return out.to(q.dtype), lse
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    problem = Problem(causal, window, starts, softcap, scale)
    tiles = tiles or _tiles("forward", q, problem)
    with torch.cuda.device_of(q):
        forward_kernel[(cdiv(S, tiles.m) * B * H,)](
            _rows(q, tiles.m), _rows(k, tiles.n), _rows(v, tiles.n), _rows(out, tiles.m), lse, problem.starts, sinks,
            S, S_k, *problem.scalars,
            H=H, GROUP=H // G, SINKS=sinks is not None, **problem.flags, **_options(q, tiles),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, sinks: Tensor | None, *, causal: bool, window: int | None, softcap: float, scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv and dsinks (None without sinks), bitwise the same on every run.

    Args:
        dout: gradient of out. dlse: of LSE, float32, or None. The rest: what `forward` took and gave.
        deterministic: part of the contract; there is no other way here.
    """
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    if _needs_upcast(q):
        dout32, q32, k32, v32, out32 = (x.float() for x in (dout, q, k, v, out))
        dq32, dk32, dv32, dsinks = backward(dout32, dlse, q32, k32, v32, out32, lse, starts, sinks, **options)
        return dq32.to(q.dtype), dk32.to(q.dtype), dv32.to(q.dtype), dsinks
    q, k, v, out, dout = aligned(q), aligned(k), aligned(v), aligned(out), aligned(dout)
    delta = _delta(out, dout, dlse)
    dk, dv = dkdv(dout, q, k, v, lse, delta, starts, **options)
    dsinks = None if sinks is None else dsinks_of(sinks, lse, delta)
    return dq(dout, q, k, v, lse, delta, starts, **options), dk, dv, dsinks


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """Σ out · dout − dlse of each row: (B, H, S) float32."""
    B, S, H, D = out.shape
    delta = torch.empty(B, H, S, dtype=torch.float32, device=out.device)
    rows = 64
    with torch.cuda.device_of(out):
        delta_kernel[(cdiv(S, rows) * B * H,)](
            _rows(out, rows), _rows(dout, rows), delta, None if dlse is None else dlse.contiguous(), S,
            H=H, M=rows, D=padded(D), HEAD_DIM=D, DLSE=dlse is not None, TMA=_uses_descriptors(out),
        )  # fmt: skip
    return delta


def dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, starts: Tensor | None, *,
    causal: bool, window: int | None, softcap: float, scale: float, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of q, as `backward` calls it."""
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    problem = Problem(causal, window, starts, softcap, scale)
    tiles = tiles or _tiles("dq", q, problem)
    with torch.cuda.device_of(q):
        dq_kernel[(cdiv(S, tiles.m) * B * H,)](
            _rows(q, tiles.m), _rows(k, tiles.n), _rows(v, tiles.n), _rows(dout, tiles.m), _rows(result, tiles.m),
            lse, delta, problem.starts, S, S_k, *problem.scalars, scale,
            H=H, GROUP=H // G, **problem.flags, **_options(q, tiles),
        )  # fmt: skip
    return result


def dkdv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, starts: Tensor | None, *,
    causal: bool, window: int | None, softcap: float, scale: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v, as `backward` calls it."""
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    problem = Problem(causal, window, starts, softcap, scale)
    tiles = tiles or _tiles("dkdv", q, problem)
    with torch.cuda.device_of(q):
        dkdv_kernel[(cdiv(S_k, tiles.n) * B * G,)](
            _rows(q, tiles.m), _rows(k, tiles.n), _rows(v, tiles.n), _rows(dout, tiles.m),
            _rows(dk, tiles.n), _rows(dv, tiles.n), lse, delta, problem.starts,
            S, S_k, *problem.scalars, scale,
            H=H, GROUP=H // G, **problem.flags, **_options(q, tiles),
        )  # fmt: skip
    return dk, dv


def _tiles(kernel: str, q: Tensor, problem: Problem) -> Tiles:
    return choose_tiles(
        kernel, q.shape[3], _capability(q.device), float32=q.dtype == torch.float32,
        causal=problem.flags["CAUSAL"], local=problem.flags["WINDOW"] or problem.flags["STARTS"],
        softcap=problem.flags["SOFTCAP"],
    )  # fmt: skip


def _needs_upcast(q: Tensor) -> bool:
    """Triton's interpreter computes bf16 products wrongly, without an error."""
    return INTERPRETED and q.dtype == torch.bfloat16


def _rows(x_BSHD: Tensor, rows: int) -> Any:
    """x as the kernels read and write it, in tiles of so many rows of one head: see `_load`."""
    B, S, H, D = x_BSHD.shape
    b, s, h, d = x_BSHD.stride()
    if not _uses_descriptors(x_BSHD):
        return x_BSHD, b, s, h, S
    return TensorDescriptor(x_BSHD, [B, H, S, D], [b, h, s, d], [1, 1, rows, padded(D)])


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of the GPU; None in the interpreter, and (0, 0) for a GPU that is not NVIDIA's, whatever PyTorch calls it."""
    if device.type == "cpu":
        return None
    return torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)


def _uses_descriptors(x: Tensor) -> bool:
    """Where there is TMA, and for 16 bits: Triton takes a descriptor on sm_80 apart into pointers of unknown strides,
    whose loads it neither vectorises nor pipelines, and its float32 products spill operands that come by TMA."""
    capability = _capability(x.device)
    return x.element_size() == 2 and (capability is None or capability >= (9, 0))


def _options(q: Tensor, tiles: Tiles) -> dict[str, Any]:
    """float32 inputs are multiplied as IEEE float32, unless PyTorch's own switch allows TF32."""
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {
        "M": tiles.m, "N": tiles.n, "D": padded(q.shape[3]), "HEAD_DIM": q.shape[3], "TMA": _uses_descriptors(q),
        "PRECISION": precision, "STAGES": tiles.num_stages, "num_warps": tiles.num_warps,
    }  # fmt: skip
