"""Flash attention in portable Triton: forward and backward for any mask the contract knows, on any GPU from sm_80.

The method is FlashAttention-2's (Dao 2023, arXiv:2307.08691): one program owns a tile of queries (forward, dQ) or of
keys (dK and dV) and streams the other side past it, so nothing of size S × S ever exists. `kernels/reference.py` holds
the same algorithm in plain PyTorch; docs/flash-attention.md explains it.

Three choices shape the kernels (kernels.py), which this file launches:

- *Masks are intervals* (../intervals.py). So the ends of a tile's first and last row decide which tiles are visited at
  all and which need their elements masked.
- *The backward is split* into a kernel for dK and dV and one for dQ. Each element has one owner and a fixed order of
  summation: no atomics, bitwise the same on every run; and one alone runs where only its gradients are wanted. It costs
  7 matrix products where a fused kernel needs 5; in Triton the 5-product form, adding up dQ with TMA reductions, was
  slower still: 354 against 425 TFLOP/s (D 128, 16k).
- *Strides never enter the kernels.* On Hopper and newer, 16-bit tensors come as tensor descriptors made on the host
  (TMA); elsewhere, and where padding tokens are to be read as 0, `_load` and `_store` make pointers. Rows past the
  end read as zero and are not written.

docs/lab (L1) has the measurements behind these, and what was tried besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...device import capability_of
from ..checks import PLAIN
from ..config import Tiles, choose_tiles, why_not_so_wide
from ..problem import Problem, aligned, cdiv, dsinks_of, padded
from .kernels import delta_kernel, dkdv_kernel, dq_kernel, forward_kernel

INTERPRETED: bool = triton.knobs.runtime.interpret
MOST_PROGRAMS = 2**31 - 1
"""That a launch can have."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None,
    slopes: Tensor | None, *, causal: bool, window: int | None, softcap: float, scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and LSE of inputs that the interface has checked.

    Args:
        q: (B, S, H, D). k: (B, S_k, G, D). v: (B, S_k, G, D_v). starts, ends: int32 (B, S). sinks, slopes: (H,).
        tiles: instead of those that `choose_tiles` picks (for tuning).
    Returns:
        out (B, S, H, D_v), contiguous, in q's dtype; LSE (B, H, S), float32, natural log.
    """
    if _needs_upcast(q):
        q32, k32, v32 = q.float(), k.float(), v.float()
        out, lse = forward(
            q32, k32, v32, starts, ends, sinks, slopes,
            causal=causal, window=window, softcap=softcap, scale=scale, tiles=tiles,
        )  # fmt: skip
        return out.to(q.dtype), lse
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(B, S, H, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    problem = Problem(causal, window, starts, softcap, scale, ends, slopes)
    tiles = tiles or _tiles("forward", q, v, problem)
    tma = _uses_descriptors(q, v, problem)
    with torch.cuda.device_of(q):
        forward_kernel[_programs(cdiv(S, tiles.m), B * H)](
            _rows(q, tiles.m, tma), _rows(k, tiles.n, tma), _rows(v, tiles.n, tma), _rows(out, tiles.m, tma), lse,
            problem.starts, problem.ends, sinks, problem.slopes, S, S_k, *problem.scalars,
            H=H, GROUP=H // G, SINKS=sinks is not None, **problem.flags, **_options(q, v, tiles, tma),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None, slopes: Tensor | None, *,
    causal: bool, window: int | None, softcap: float, scale: float, deterministic: bool = True,
    wanted: Sequence[bool] = (True,) * 5,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dsinks and dslopes, bitwise the same on every run; None where not wanted or there is nothing.

    Args:
        dout: gradient of out. dlse: of LSE, float32, or None. The rest: what `forward` took and gave.
        deterministic: part of the contract; there is no other way here.
        wanted: of the five gradients, in this order. dk and dv are computed together.
    """
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    if _needs_upcast(q):
        low = q.dtype
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
        inputs = (q, k, v, out, lse, starts, ends, sinks, slopes)
        *gradients, dsinks, dslopes = backward(dout, dlse, *inputs, **options, wanted=wanted)
        return *(None if x is None else x.to(low) for x in gradients), dsinks, dslopes
    wants_q, wants_k, wants_v, wants_sinks, wants_slopes = wanted
    q, k, v, out, dout = aligned(q), aligned(k), aligned(v), aligned(out), aligned(dout)
    delta = _delta(out, dout, dlse)
    dk_dv: tuple[Tensor | None, Tensor | None] = (None, None)
    if wants_k or wants_v:
        dk_dv = dkdv(dout, q, k, v, lse, delta, starts, ends, slopes, **options)
    dq_dslopes: tuple[Tensor | None, Tensor | None] = (None, None)
    if wants_q or (wants_slopes and slopes is not None):
        dq_dslopes = dq(dout, q, k, v, lse, delta, starts, ends, slopes, **options, wants_slopes=wants_slopes)
    dsinks = None if sinks is None or not wants_sinks else dsinks_of(sinks, lse, delta)
    return dq_dslopes[0], *dk_dv, dsinks, dq_dslopes[1]


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """Σ out · dout − dlse of each row: (B, H, S) float32."""
    B, S, H, D = out.shape
    delta = torch.empty(B, H, S, dtype=torch.float32, device=out.device)
    rows = 64 if D <= 256 else 16
    tma = _uses_descriptors(out, out)
    with torch.cuda.device_of(out):
        delta_kernel[_programs(cdiv(S, rows), B * H)](
            _rows(out, rows, tma), _rows(dout, rows, tma), delta, None if dlse is None else dlse.contiguous(), S,
            H=H, M=rows, D=padded(D), HEAD_DIM=D, DLSE=dlse is not None, TMA=tma,
        )  # fmt: skip
    return delta


def dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, starts: Tensor | None,
    ends: Tensor | None = None, slopes: Tensor | None = None, *, causal: bool, window: int | None, softcap: float,
    scale: float, wants_slopes: bool = False, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients of q and of slopes, as `backward` calls it."""
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    problem = Problem(causal, window, starts, softcap, scale, ends, slopes)
    tiles = tiles or _tiles("dq", q, v, problem)
    tma = _uses_descriptors(q, v, problem)
    of_rows = None
    if slopes is not None and wants_slopes:
        of_rows = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        dq_kernel[_programs(cdiv(S, tiles.m), B * H)](
            _rows(q, tiles.m, tma), _rows(k, tiles.n, tma), _rows(v, tiles.n, tma), _rows(dout, tiles.m, tma),
            _rows(result, tiles.m, tma), lse, delta, problem.starts, problem.ends, problem.slopes, of_rows,
            S, S_k, *problem.scalars, scale,
            H=H, GROUP=H // G, DSLOPES=of_rows is not None, **problem.flags, **_options(q, v, tiles, tma),
        )  # fmt: skip
    if of_rows is None or slopes is None:
        return result, None
    return result, of_rows.sum((0, 2)).to(slopes.dtype)


def dkdv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, starts: Tensor | None,
    ends: Tensor | None = None, slopes: Tensor | None = None, *, causal: bool, window: int | None, softcap: float,
    scale: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v, as `backward` calls it."""
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    problem = Problem(causal, window, starts, softcap, scale, ends, slopes)
    tiles = tiles or _tiles("dkdv", q, v, problem)
    tma = _uses_descriptors(q, v, problem)
    with torch.cuda.device_of(q):
        dkdv_kernel[_programs(cdiv(S_k, tiles.n), B * G)](
            _rows(q, tiles.m, tma), _rows(k, tiles.n, tma), _rows(v, tiles.n, tma), _rows(dout, tiles.m, tma),
            _rows(dk, tiles.n, tma), _rows(dv, tiles.n, tma), lse, delta, problem.starts, problem.ends, problem.slopes,
            S, S_k, *problem.scalars, scale,
            H=H, GROUP=H // G, **problem.flags, **_options(q, v, tiles, tma),
        )  # fmt: skip
    return dk, dv


def _needs_upcast(q: Tensor) -> bool:
    """Triton's interpreter computes bf16 products wrongly, without an error."""
    return INTERPRETED and q.dtype == torch.bfloat16


def _programs(n_tiles: int, n_heads: int) -> tuple[int]:
    """The grid of a kernel.

    Raises:
        ValueError: there are more tiles than a launch can have programs.
    """
    if n_tiles * n_heads > MOST_PROGRAMS:
        raise ValueError(
            f"{n_heads} heads (batch · heads) of {n_tiles} tiles are more than the {MOST_PROGRAMS} programs that a GPU "
            "launches at once; call flash_attention for parts of the batch, and torch.cat what it returns"
        )
    return (n_tiles * n_heads,)


def _tiles(kernel: str, q: Tensor, v: Tensor, problem: Problem) -> Tiles:
    """Those of the table.

    Raises:
        ValueError: the GPU has no room for such a head_dim.
    """
    flags, head_dim, capability = problem.flags, max(q.shape[3], v.shape[3]), capability_of(q.device)
    is_float32 = q.dtype == torch.float32
    if reason := why_not_so_wide(head_dim, capability, float32=is_float32):
        raise ValueError(f"{reason}; {PLAIN}")
    return choose_tiles(
        kernel, head_dim, capability, float32=is_float32,
        causal=flags["CAUSAL"], local=flags["WINDOW"] or flags["STARTS"] or flags["ENDS"],
        softcap=flags["SOFTCAP"] or flags["ALIBI"], pointers=flags["ENDS"],
    )  # fmt: skip


def _rows(x_BSHD: Tensor, rows: int, tma: bool) -> Any:
    """x as the kernels read and write it, in tiles of so many rows of one head: see `_load`."""
    B, S, H, D = x_BSHD.shape
    b, s, h, d = x_BSHD.stride()
    if not tma:
        return x_BSHD, b, s, h, S
    return TensorDescriptor(x_BSHD, [B, H, S, D], [b, h, s, d], [1, 1, rows, padded(D)])


def _uses_descriptors(q: Tensor, v: Tensor, problem: Problem | None = None) -> bool:
    """Where there is TMA, and for 16 bits: Triton takes a descriptor on sm_80 apart into pointers of unknown strides,
    whose loads it neither vectorises nor pipelines, and its float32 products spill operands that come by TMA. A box of
    TMA has at most 256 columns, and no rows of padding that read as 0."""
    capability = capability_of(q.device)
    fits = max(q.shape[3], v.shape[3]) <= 256 and not (problem and problem.flags["ENDS"])
    return fits and q.element_size() == 2 and (capability is None or capability >= (9, 0))


def _options(q: Tensor, v: Tensor, tiles: Tiles, tma: bool) -> dict[str, Any]:
    """float32 inputs are multiplied as IEEE float32, unless PyTorch's own switch allows TF32."""
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {
        "M": tiles.m, "N": tiles.n, "D": padded(q.shape[3]), "HEAD_DIM": q.shape[3],
        "DV": padded(v.shape[3]), "HEAD_DIM_V": v.shape[3], "TMA": tma,
        "PRECISION": precision, "STAGES": tiles.num_stages, "num_warps": tiles.num_warps,
    }  # fmt: skip
