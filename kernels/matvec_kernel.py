"""The product of one row with a matrix in Triton: each weight is read once, as fast as the memory gives them.

A program holds the row in its registers and goes through tiles of weights. A tile is one wide load of whole rows of the
matrix, and the next one is under way while this one is multiplied: two programs have 128 KiB on the way to a
multiprocessor. RMSNorm costs a sum of squares, for its factor can be multiplied with the outputs. With SwiGLU the rows
of a tile are gate, up, gate, up, …, so that a program has both.

On Hopper and newer, programmatic dependent launch starts the kernel before the one that writes its input ends. It loads
its first weights at once, and waits for that one before it reads the input. So that one must not write the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import capability_of, multiprocessors
from .flash_attention.problem import cdiv, padded


@triton.jit
def _rows(m0, M, TILE_M: tl.constexpr, SWIGLU: tl.constexpr):
    """Which rows of the matrix a tile has, and which of them there are."""
    m = m0 + tl.arange(0, TILE_M)
    row = m // 2 + m % 2 * (M // 2) if SWIGLU else m
    return row, m < M


@triton.jit
def _weights(weight_ptr, m0, M, K: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr):
    """The tile [TILE_M, TILE_K] that begins with m0."""
    row, is_row = _rows(m0, M, TILE_M, SWIGLU)
    k = tl.arange(0, TILE_K)
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    is_there = is_row[:, None] & (k < K)[None, :]
    return tl.load(weight_ptr + at, mask=is_there, other=0.0, eviction_policy="evict_first")


@triton.jit
def _input(x_ptr, norm_ptr, eps, K: tl.constexpr, TILE_K: tl.constexpr):
    """The row [1, TILE_K] in float32, and a factor: the normalised row is their product."""
    k = tl.arange(0, TILE_K)[None, :]
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    factor = 1.0
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(x * x) / K + eps)
        x = x * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x, factor


@triton.jit
def matvec_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, M, eps,
    K: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row of K inputs with a matrix of M rows. Pointers that are None are not wanted."""
    first = tl.program_id(0) * TILE_M
    step = tl.num_programs(0) * TILE_M
    weight = _weights(weight_ptr, first, M, K, TILE_M, TILE_K, SWIGLU)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x, factor = _input(x_ptr, norm_ptr, eps, K, TILE_K)
    for m0 in tl.range(first, M, step, num_stages=1):
        ahead = _weights(weight_ptr, m0 + step, M, K, TILE_M, TILE_K, SWIGLU)
        y = tl.sum(weight.to(tl.float32) * x, 1) * factor
        row, is_row = _rows(m0, M, TILE_M, SWIGLU)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)
        if SWIGLU:
            gate, up = tl.split(tl.reshape(y, [TILE_M // 2, 2]))
            y = gate * tl.sigmoid(gate) * up
            N = M // 2
            n = m0 // 2 + tl.arange(0, TILE_M // 2)
        else:
            N = M
            n = m0 + tl.arange(0, TILE_M)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)
        weight = ahead


class Tiles(NamedTuple):
    m: int
    """Rows of the matrix in a tile."""
    k: int
    """Columns: all of them, and as many more as a power of 2 needs."""
    num_warps: int


BYTES = 32768
"""Of a tile. Half as much reads as fast, with twice as many programs."""
PROGRAMS_PER_MULTIPROCESSOR = 2
MOST_WEIGHTS = 64
"""Of a tile in a thread's registers, beside the next ones and as many inputs."""


def choose_tiles(K: int, element_size: int, swiglu: bool) -> Tiles:
    """As many whole rows as make `BYTES`."""
    tile_k = max(16, padded(K))
    least = 2 if swiglu else 1
    rows = max(least, BYTES // (tile_k * element_size))
    return Tiles(rows, tile_k, max(8, rows * tile_k // (32 * MOST_WEIGHTS)))


def matvec(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, swiglu: bool,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`matvec.matvec` on a GPU."""
    x, weight, residual = x.contiguous(), weight.contiguous(), None if residual is None else residual.contiguous()
    M, K = weight.shape
    out = x.new_empty((*x.shape[:-1], M // 2 if swiglu else M), dtype=dtype)
    tiles = choose_tiles(K, weight.element_size(), swiglu)
    programs = min(cdiv(M, tiles.m), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device))
    pdl = (capability_of(x.device) or (0, 0)) >= (9, 0)
    options = {"launch_pdl": True} if pdl else {}  # which AMD's compiler does not know
    with torch.cuda.device_of(x):
        matvec_kernel[(programs,)](
            x, weight, bias, norm, residual, out, M, eps,
            K=K, TILE_M=tiles.m, TILE_K=tiles.k, SWIGLU=swiglu, PDL=pdl,
            num_warps=tiles.num_warps, **options,
        )  # fmt: skip
    return out
