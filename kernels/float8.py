"""A matrix in 8 bits, as it is, transposed, or both at once: one operator, `flash_gpt::to_float8`.

Hopper's tensor cores read 8-bit factors along the dimension that a product sums over, so a training step needs most
matrices both ways. Inductor would write the transpose of a fused result byte by byte to places far apart; the kernel
(`float8_kernel.py`) turns a tile on the chip and writes whole lines.

Shape suffixes: R rows, K columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import define


def to_float8(
    x_RK: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype, multiple: int = 16
) -> list[Tensor]:
    """x divided by its scales and rounded to 8 bits: as it is where it has a row scale, transposed where it has a
    column scale. What overflows is the dtype's largest number on a GPU and may be NaN on a CPU.

    Args:
        x_RK: float, two-dimensional.
        row_scale: float32 (R, 1), or (1, 1) for all rows; None: x as it is is not wanted.
        column_scale: float32 (1, K), or (1, 1) for all columns; None: the transpose is not wanted.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        multiple: the rows of the transpose are filled up with zeros to a multiple of so many numbers.
    Returns:
        one or two contiguous tensors of `dtype`: (R, K), (K, R rounded up).
    """
    found: list[Tensor] = torch.ops.flash_gpt.to_float8.default(x_RK, row_scale, column_scale, dtype, multiple)
    return found


def _cast(
    x_RK: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype, multiple: int
) -> list[Tensor]:
    if x_RK.is_cuda:
        from .float8_kernel import to_float8

        return to_float8(x_RK, row_scale, column_scale, dtype, multiple)
    found = []
    if row_scale is not None:
        found.append((x_RK.float() * row_scale.reciprocal()).to(dtype))
    if column_scale is not None:
        bytes_RK = (x_RK.float() * column_scale.reciprocal()).to(dtype).view(torch.uint8)
        missing = -len(x_RK) % multiple
        found.append(F.pad(bytes_RK.t(), (0, missing)).contiguous().view(dtype))
    return found


def _cast_fake(
    x_RK: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype, multiple: int
) -> list[Tensor]:
    R, K = x_RK.shape
    shapes = [(R, K)] * (row_scale is not None)
    shapes += [(K, (R + multiple - 1) // multiple * multiple)] * (column_scale is not None)
    return [x_RK.new_empty(shape, dtype=dtype) for shape in shapes]


define(
    "to_float8",
    "(Tensor x, Tensor? row_scale, Tensor? column_scale, ScalarType dtype, int multiple) -> Tensor[]",
    _cast,
    _cast_fake,
)
