"""A linear layer of one row, and what a transformer does before and after it: one operator, `flash_gpt::matvec`.

A product with one row is bound by the memory: each weight is read once for two operations. The kernel
(`matvec_kernel.py`) reads the weights as fast as the memory gives them, and does on the way what would be kernels of
their own around it: RMSNorm of its input, SwiGLU of its outputs, the sum with the residual stream.

Shape suffixes: K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import define


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + f(norm(x) weightᵀ + bias), summed in float32 and rounded once. It has no gradient.

    Args:
        x: (…, K), float, all of it one row: of two, cuBLAS takes less time.
        weight: (N, K), contiguous, float of any dtype; with `swiglu` (2N, K), the gates before what they gate. On a GPU
            the kernel launched just before must not write it (see `matvec_kernel`).
        bias: (N,) or (2N,).
        norm: (K,): x is divided by √(mean x² + eps) and multiplied with this first; None: x as it is.
        swiglu: f(gate, up) = silu(gate) · up; else f is the identity.
        residual: (…, N).
        dtype: of the result; None: x's.
    Returns:
        (…, N), contiguous.
    """
    out: Tensor = torch.ops.flash_gpt.matvec.default(
        x, weight, bias, norm, eps, swiglu, residual, x.dtype if dtype is None else dtype
    )
    return out


def matvec_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    swiglu: bool,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`matvec` in plain PyTorch, in float32, or in float64 where x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    y = F.linear(x, weight.to(wide), None if bias is None else bias.to(wide))
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual).to(dtype)


def _matvec(x: Tensor, *inputs: Any) -> Tensor:
    if not x.is_cuda:
        return matvec_reference(x, *inputs)
    from .matvec_kernel import matvec

    return matvec(x, *inputs)


def _matvec_fake(x: Tensor, weight: Tensor, *inputs: Any) -> Tensor:
    _, _, _, swiglu, _, dtype = inputs
    return x.new_empty((*x.shape[:-1], len(weight) // 2 if swiglu else len(weight)), dtype=dtype)


define(
    "matvec",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, float eps, bool swiglu, Tensor? residual, ScalarType dtype) "
    "-> Tensor",
    _matvec,
    _matvec_fake,
)
