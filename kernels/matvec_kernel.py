"""Products of a few rows with a matrix in Triton: each weight is read once, as fast as the memory gives them.

A program has all K weights of some outputs in its registers: one wide load, no loop, and with several programs on a
multiprocessor enough bytes in flight. Rows are multiplied one after the other, so the weights are read once for all.
RMSNorm costs a sum of squares: Σ w·(x·g)/rms = (Σ w·(x·g))/rms. With SwiGLU a tile's rows are gate, up, gate, up, …,
so that a program has both.

On Hopper and newer (programmatic dependent launch) a program loads its weights, which no kernel before it writes,
before it waits for the kernel that writes x: the memory is busy while that one ends.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tile(weight_ptr, n0, N, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr):
    """Weights [TILE_N, TILE_K] of the outputs from n0 on; with SwiGLU gate, up, gate, up, …: twice as many rows."""
    if SWIGLU:
        i = tl.arange(0, 2 * TILE_N)
        n = n0 + i // 2
        row = n + i % 2 * N
    else:
        n = n0 + tl.arange(0, TILE_N)
        row = n
    k = tl.arange(0, TILE_K)
    is_there = (n < N)[:, None] & (k < K)[None, :]
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(weight_ptr + at, mask=is_there, other=0.0, eviction_policy="evict_first")


@triton.jit
def _input(x_ptr, norm_ptr, r, eps, K: tl.constexpr, TILE_K: tl.constexpr):
    """Row r [1, TILE_K] in float32 and its factor: the norm is their product."""
    k = tl.arange(0, TILE_K)[None, :]
    x = tl.load(x_ptr + r * K + k, mask=k < K, other=0.0).to(tl.float32)
    factor = 1.0
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(x * x) / K + eps)
        x = x * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x, factor


@triton.jit
def _finish(
    y, bias_ptr, residual_ptr, out_ptr, n0, r, N, TILE_N: tl.constexpr, SWIGLU: tl.constexpr
):  # fmt: skip
    """Outputs of row r from n0 on, of their products y."""
    n = n0 + tl.arange(0, TILE_N)
    is_n = n < N
    if SWIGLU:
        y, up = tl.split(tl.reshape(y, [TILE_N, 2]))
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + n, mask=is_n, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)
    if SWIGLU:
        y = y * tl.sigmoid(y) * up
    if residual_ptr is not None:
        y += tl.load(residual_ptr + r * N + n, mask=is_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * N + n, y.to(out_ptr.dtype.element_ty), mask=is_n)


@triton.jit
def matvec_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, N, eps,
    R: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of outputs. TILE_K: K, or a power of 2 above. Pointers that are None are not wanted."""
    n0 = tl.program_id(0) * TILE_N
    step = tl.num_programs(0) * TILE_N
    if PDL == 1 or PDL == 3:
        if PDL == 3:
            LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
            if SWIGLU:
                i = tl.arange(0, 2 * TILE_N)
                n = n0 + i // 2
                row = n + i % 2 * N
            else:
                n = n0 + tl.arange(0, TILE_N)
                row = n
            k = tl.arange(0, TILE_K // LINE) * LINE
            address = weight_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
            address = tl.where((n < N)[:, None] & (k < K)[None, :], address, weight_ptr).to(tl.int64)
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)
        gdc_launch_dependents()
        gdc_wait()
    weight = _tile(weight_ptr, n0, N, K, TILE_N, TILE_K, SWIGLU)
    if PDL == 2:
        gdc_launch_dependents()
        gdc_wait()
    if R == 1:
        x, factor = _input(x_ptr, norm_ptr, 0, eps, K, TILE_K)
    for n0 in tl.range(n0, N, step, num_stages=1):
        ahead = _tile(weight_ptr, n0 + step, N, K, TILE_N, TILE_K, SWIGLU)
        for r in tl.static_range(R):
            if R > 1:
                x, factor = _input(x_ptr, norm_ptr, r, eps, K, TILE_K)
            y = tl.sum(weight.to(tl.float32) * x, 1) * factor
            _finish(y, bias_ptr, residual_ptr, out_ptr, n0, r, N, TILE_N, SWIGLU)
        weight = ahead


def matvec(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, swiglu: bool,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`matvec.matvec` on a GPU, of contiguous inputs."""
    K = x.shape[-1]
    N = len(weight) // 2 if swiglu else len(weight)
    out = x.new_empty((*x.shape[:-1], N), dtype=dtype)
    tile_k = triton.next_power_of_2(K)
    rows = max(2 if swiglu else 1, TILE // tile_k)
    tile_n = rows // 2 if swiglu else rows
    programs = min(triton.cdiv(N, tile_n), PER_SM * _multiprocessors(x.device))
    pdl = MODE if has_pdl(x.device) else 0
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(x):
        matvec_kernel[(programs,)](
            x, weight, bias, norm, residual, out, N, eps,
            R=x.numel() // K, K=K, TILE_N=tile_n, TILE_K=tile_k, SWIGLU=swiglu, PDL=pdl,
            num_warps=NUM_WARPS, **options,
        )  # fmt: skip
    return out


TILE, NUM_WARPS, PER_SM, MODE = 16384, 8, 2, 2


@cache
def _multiprocessors(device: torch.device) -> int:
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended: NVIDIA's from sm_90 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
