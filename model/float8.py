"""Linear layers whose three products have factors in 8 bits: y = x Wᵀ, dx = dy W, and dW = dyᵀ x.

A factor is scaled so that its largest number is the largest of its format, rounded to 8 bits, and its scale is
multiplied back after the product, whose sums are float32 (Micikevicius et al. 2022, arXiv:2209.05433). x and W are in
E4M3 (3 bits of mantissa, up to 448), gradients in E5M2 (2 bits, up to 57344). Scales are those of the tensor at hand
(dynamic scaling): one for a tensor, or with scaling=rowwise one for each row of a factor.

Hopper's tensor cores read 8-bit factors along the dimension that is summed over. So each factor is stored with that
dimension last, and x, dy and W exist twice: as they are for one product, transposed for another. W is quantised once a
step from its float32 master (`refresh`), x and dy in each call.

The scales are plain PyTorch, written for Inductor: the largest number of each row first, which it fuses with the norm
or activation function that made the row, then that of all rows. One kernel then writes a factor both ways
(`kernels.float8`).

Shape suffixes: T tokens, I inputs, O outputs; R rows and K the summed dimension of any factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.float8 import to_float8

from .linear import Linear
from .precision_config import MULTIPLE, Float8Config, is_in_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
TINY = 1e-30
"""The largest number of a factor is taken to be at least this: zeros stay zeros, and no scale is 0 or infinite. The
gradients of a mean over millions of tokens are far above it."""


class Factor(NamedTuple):
    """A matrix in 8 bits, the dimension that a product sums over last."""

    values_RK: Tensor
    """Contiguous."""
    scale: Tensor
    """float32: what the values are multiplied with, (1, 1) or (R, 1)."""


def quantize(
    x_RK: Tensor, dtype: torch.dtype, rowwise: bool, as_is: bool = True, transposed: bool = False
) -> list[Tensor]:
    """Values and scale of x as a factor, of xᵀ as a factor, or of both: two or four tensors.

    NaN and infinities make the whole factor NaN, so that a bad step stays one that can be seen.
    """
    size_RK = x_RK.float().abs()
    row_scale = column_scale = None
    if not rowwise:
        scale_11 = _scale(size_RK.amax(dim=1, keepdim=True).amax(dim=0, keepdim=True), dtype)
        row_scale, column_scale = scale_11 if as_is else None, scale_11 if transposed else None
    else:
        row_scale = _scale(size_RK.amax(dim=1, keepdim=True), dtype) if as_is else None
        column_scale = _scale(size_RK.amax(dim=0, keepdim=True), dtype) if transposed else None
    values = to_float8(x_RK, row_scale, column_scale, dtype, MULTIPLE)
    scales = [row_scale, None if column_scale is None else column_scale.t().contiguous()]
    return list(chain.from_iterable(zip(values, (s for s in scales if s is not None), strict=True)))


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return largest.clamp(min=TINY) / LARGEST[dtype]


def product(
    a: Factor,
    b: Factor,
    dtype: torch.dtype,
    *,
    fast: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """a bᵀ (rows of a, rows of b) in `dtype`, and with a bias (rows of b), added before it is rounded.

    On a CPU the 8-bit factors are multiplied in float32: the same products, summed in another order.

    Args:
        fast: sums of a few products stay in the tensor cores' own accumulators, which keep fewer bits.
    """
    scale_b = b.scale.t()
    if a.values_RK.is_cuda:
        options: dict[str, Any] = {} if out is None else {"out": out}
        return torch._scaled_mm(
            a.values_RK, b.values_RK.t(), a.scale, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast, **options
        )
    with torch.autocast(a.values_RK.device.type, enabled=False):
        result = (a.values_RK.float() @ b.values_RK.float().t()) * a.scale * scale_b
    result = result if bias is None else result + bias
    return result.to(dtype) if out is None else out.copy_(result)


class Float8Linear(Linear):
    """`Linear` with 8-bit factors; `convert` makes it of a plain one."""

    forward_values: Tensor
    forward_scale: Tensor
    backward_values: Tensor
    backward_scale: Tensor
    config: Float8Config
    quantize: Callable[..., list[Tensor]]
    """`quantize`, compiled or not: of the weight."""

    @property
    def rowwise(self) -> bool:
        return self.config.scaling == "rowwise"

    @property
    def weight_OI(self) -> Factor:
        """For y = x Wᵀ."""
        return Factor(self.forward_values, self.forward_scale)

    @property
    def weight_IO(self) -> Factor:
        """For dx = dy W."""
        return Factor(self.backward_values, self.backward_scale)

    def requantize(self) -> None:
        factors = self.quantize(self.weight.detach(), E4M3, self.rowwise, transposed=True)
        for own, new in zip((*self.weight_OI, *self.weight_IO), factors, strict=True):
            own.copy_(new)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_TI = x.flatten(0, -2).to(dtype)
        if torch.is_grad_enabled():
            y_TO = _Float8Linear.apply(
                x_TI,
                self.weight,
                self.bias,
                *self.weight_OI,
                *self.weight_IO,
                self.rowwise,
                self.config.weight_gradients,
            )
        else:
            bias_O = None if self.bias is None else self.bias.to(dtype)
            y_TO = product(Factor(*quantize(x_TI, E4M3, self.rowwise)), self.weight_OI, dtype, fast=True, bias=bias_O)
        return y_TO.unflatten(0, x.shape[:-1])


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None,
        forward_values: Tensor, forward_scale: Tensor, backward_values: Tensor, backward_scale: Tensor,
        rowwise: bool, weight_gradients: str,
    ) -> Tensor:  # fmt: skip
        in_fp8 = weight_gradients == "fp8"
        x, *x_columns = _pairs(quantize(x_TI, E4M3, rowwise, transposed=in_fp8))
        ctx.save_for_backward(*(x_columns[0] if in_fp8 else (x_TI,)), backward_values, backward_scale)
        ctx.options = rowwise, in_fp8, x_TI.dtype, weight_OI.dtype, None if bias_O is None else bias_O.dtype
        bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
        return product(x, Factor(forward_values, forward_scale), x_TI.dtype, fast=True, bias=bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        rowwise, in_fp8, dtype, weight_dtype, bias_dtype = ctx.options
        *x, backward_values, backward_scale = ctx.saved_tensors
        dy, *dy_columns = _pairs(quantize(dy_TO, E5M2, rowwise, transposed=in_fp8))
        dx_TI = product(dy, Factor(backward_values, backward_scale), dtype)
        if in_fp8:
            dw_OI = weight_gradient(dy_columns[0], Factor(*x), rowwise).to(weight_dtype)
        else:
            dw_OI = (dy_TO.t() @ x[0]).to(weight_dtype)
        db_O = None if bias_dtype is None else dy_TO.sum(0, dtype=torch.float32).to(bias_dtype)
        return dx_TI, dw_OI, db_O, *(None for _ in range(6))


def weight_gradient(dy_OT: Factor, x_IT: Factor, rowwise: bool) -> Tensor:
    """dW = dyᵀ x, float32; row-wise products of PyTorch 2.11 round it to bf16."""
    return product(dy_OT, x_IT, torch.bfloat16 if rowwise else torch.float32).float()


def _pairs(tensors: Sequence[Tensor]) -> list[Factor]:
    return [Factor(*tensors[i : i + 2]) for i in range(0, len(tensors), 2)]


def convert(model: nn.Module, config: Float8Config, compile: bool) -> list[Float8Linear]:
    """Make the linear layers of a model's blocks 8-bit ones, where their sizes allow it; `refresh` fills them."""
    converted = []
    # Any size: layers have several, and each would be compiled for itself.
    chosen: Any = torch.compile(quantize, dynamic=True) if compile else quantize
    for layer in model.get_submodule("blocks").modules():
        if isinstance(layer, Linear) and is_in_fp8((layer.in_features, layer.out_features)):
            layer.__class__ = Float8Linear
            assert isinstance(layer, Float8Linear)
            layer.config, layer.quantize, layer.working = config, chosen, None
            weight_OI = layer.weight.detach()
            for name, like in (("forward", weight_OI), ("backward", weight_OI.t())):
                values = torch.empty(like.shape, dtype=E4M3, device=like.device)
                scale = torch.empty((len(like) if layer.rowwise else 1, 1), device=like.device)
                layer.register_buffer(f"{name}_values", values, persistent=False)
                layer.register_buffer(f"{name}_scale", scale, persistent=False)
            converted.append(layer)
    return converted
