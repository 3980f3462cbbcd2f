"""A matrix to 8 bits in Triton: each tile is read once and written as it is, transposed, or both.

Shape suffixes: R rows, K columns; tiles [M, N] of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

M, N, NUM_WARPS = 64, 128, 4
"""A tile: lines of 128 bytes in one direction and of 64 in the other."""


@triton.jit
def _scaled(x, scale_ptr, at, size, BY_LINE: tl.constexpr, AXIS: tl.constexpr):
    """x [M, N] times the reciprocal of its scale: one, or one for each row (AXIS 1) or column (AXIS 0)."""
    if BY_LINE:
        # Past the end 1, since 0 divided by 0 is NaN.
        return x * tl.expand_dims(tl.div_rn(1.0, tl.load(scale_ptr + at, mask=at < size, other=1.0)), AXIS)
    return x * tl.div_rn(1.0, tl.load(scale_ptr))


@triton.jit
def to_float8_kernel(
    x_ptr, values_ptr, transposed_ptr, row_scale_ptr, column_scale_ptr, R, K, x_stride, transposed_stride,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Pointers that are None are not wanted. Rows R and up to `transposed_stride` of the transpose are zeros."""
    tiles = tl.cdiv(K, N)
    r = tl.program_id(0) // tiles * M + tl.arange(0, M)
    k = tl.program_id(0) % tiles * N + tl.arange(0, N)
    rows = r.to(tl.int64)[:, None]
    is_there = (r < R)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + rows * x_stride + k[None, :], mask=is_there, other=0.0).to(tl.float32)
    if values_ptr is not None:
        values = _scaled(x, row_scale_ptr, r, R, BY_ROW, 1).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + rows * K + k[None, :], values, mask=is_there)
    if transposed_ptr is not None:
        turned = tl.trans(_scaled(x, column_scale_ptr, k, K, BY_COLUMN, 0).to(transposed_ptr.dtype.element_ty))
        places = k.to(tl.int64)[:, None] * transposed_stride + r[None, :]
        tl.store(transposed_ptr + places, turned, mask=(k < K)[:, None] & (r < transposed_stride)[None, :])


def to_float8(
    x_RK: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype, multiple: int
) -> list[Tensor]:
    """`float8.to_float8` on a GPU."""
    R, K = x_RK.shape
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    filled = triton.cdiv(R, multiple) * multiple
    values = None if row_scale is None else x_RK.new_empty((R, K), dtype=dtype)
    transposed = None if column_scale is None else x_RK.new_empty((K, filled), dtype=dtype)
    with torch.cuda.device_of(x_RK):
        to_float8_kernel[(triton.cdiv(filled, M) * triton.cdiv(K, N),)](
            x_RK, values, transposed, row_scale, column_scale, R, K, x_RK.stride(0), filled,
            BY_ROW=row_scale is not None and len(row_scale) > 1,
            BY_COLUMN=column_scale is not None and column_scale.shape[1] > 1,
            M=M, N=N, num_warps=NUM_WARPS,
        )  # fmt: skip
    return [x for x in (values, transposed) if x is not None]
