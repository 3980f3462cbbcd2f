"""A linear layer for code that computes its gradients by hand: `model.recompute`.

Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .float8 import E4M3, E5M2, Factor, Float8Linear, product, weight_gradient
from .linear import Linear

Quantize = Callable[..., list[Tensor]]


class Product(NamedTuple):
    """A linear layer, or rows of it, during one pass: its weight is cast once, its gradients add up in float32."""

    layer: Linear
    weight_OI: Tensor
    bias_O: Tensor | None
    sums: Sums

    @classmethod
    def of(cls, layer: Linear, dtype: torch.dtype) -> Product:
        return cls(layer, layer.operand(dtype).detach(), _bias(layer, dtype), Sums())

    @property
    def num_outputs(self) -> int:
        return len(self.weight_OI)

    def by_heads(self, heads: Sequence[int], groups: int) -> list[Product]:
        """Of the product for queries, keys and values that of each group: the same part of each of the three."""
        if groups == 1:
            return [self]
        return [
            self._replace(weight_OI=self.weight_OI[r], bias_O=None if self.bias_O is None else self.bias_O[r])
            for r in _rows_by_heads(self.weight_OI, heads, groups)
        ]

    def __call__(self, x_TI: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bias_O is None:
            return torch.mm(x_TI, self.weight_OI.T, out=out)
        return torch.addmm(self.bias_O, x_TI, self.weight_OI.T, out=out)

    def input_gradient(self, dy_TO: Tensor, columns: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Of some of the inputs (T, columns)."""
        return torch.mm(dy_TO, self.weight_OI[:, columns], out=out)

    def backward(self, dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        """Add the gradients of weight and bias to theirs; returns that of the inputs."""
        self.add_gradients(dy_TO, x_TI)
        return self.input_gradient(dy_TO)

    def add_gradients(self, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Add the gradients of weight and bias to theirs."""
        if self.layer.weight.requires_grad:
            grad_OI = self.sums.begun(self.layer.weight)
            if dy_TO.is_cuda:
                wider: dict[str, Any] = {} if grad_OI.dtype == dy_TO.dtype else {"out_dtype": grad_OI.dtype}
                torch.addmm(grad_OI, dy_TO.T, x_TI, out=grad_OI, **wider)
            else:  # a CPU cannot add up in a wider dtype than that of the factors
                grad_OI += dy_TO.T @ x_TI
        self.sums.add_bias_gradient(self.layer, dy_TO)

    def close(self) -> None:
        """After the last of the gradients of this pass."""
        self.sums.close()


class Float8Product(NamedTuple):
    """The same with factors in 8 bits: `model.float8`. Scales are those of the tile at hand."""

    layer: Float8Linear
    weight_OI: Factor
    weight_IO: Factor
    bias_O: Tensor | None
    quantize: Quantize
    sums: Sums

    @classmethod
    def of(cls, layer: Float8Linear, dtype: torch.dtype, quantize: Quantize) -> Float8Product:
        return cls(layer, layer.weight_OI, layer.weight_IO, _bias(layer, dtype), quantize, Sums())

    @property
    def num_outputs(self) -> int:
        return len(self.weight_OI.values_RK)

    def by_heads(self, heads: Sequence[int], groups: int) -> list[Float8Product]:
        """As `Product.by_heads`; for the product forward alone."""
        if groups == 1:
            return [self]
        values_OI, scale = self.weight_OI
        return [
            self._replace(
                weight_OI=Factor(values_OI[r], scale[r] if len(scale) > 1 else scale),
                bias_O=None if self.bias_O is None else self.bias_O[r],
            )
            for r in _rows_by_heads(values_OI, heads, groups)
        ]

    def __call__(self, x_TI: Tensor, out: Tensor | None = None) -> Tensor:
        x = Factor(*self.quantize(x_TI, E4M3, self.layer.rowwise))
        return product(x, self.weight_OI, x_TI.dtype, fast=True, bias=self.bias_O, out=out)

    def input_gradient(self, dy_TO: Tensor, columns: slice = slice(None), out: Tensor | None = None) -> Tensor:
        values_IO, scale = self.weight_IO
        weight = Factor(values_IO[columns], scale[columns] if len(scale) > 1 else scale)
        return product(Factor(*self.quantize(dy_TO, E5M2, self.layer.rowwise)), weight, dy_TO.dtype, out=out)

    def backward(self, dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        if self.layer.config.weight_gradients != "fp8":
            self.add_gradients(dy_TO, x_TI)
            return self.input_gradient(dy_TO)
        values_TO, scale_T, values_OT, scale_O = self.quantize(dy_TO, E5M2, self.layer.rowwise, transposed=True)
        self._add_gradients(dy_TO, Factor(values_OT, scale_O), x_TI)
        return product(Factor(values_TO, scale_T), self.weight_IO, dy_TO.dtype)

    def add_gradients(self, dy_TO: Tensor, x_TI: Tensor) -> None:
        if self.layer.config.weight_gradients == "fp8":
            dy = Factor(*self.quantize(dy_TO, E5M2, self.layer.rowwise, as_is=False, transposed=True))
            self._add_gradients(dy_TO, dy, x_TI)
        else:
            Product(self.layer, self.layer.weight, None, self.sums).add_gradients(dy_TO, x_TI)

    def _add_gradients(self, dy_TO: Tensor, dy_OT: Factor, x_TI: Tensor) -> None:
        if self.layer.weight.requires_grad:
            rowwise = self.layer.rowwise
            x_IT = Factor(*self.quantize(x_TI, E4M3, rowwise, as_is=False, transposed=True))
            grad_OI = self.sums.begun(self.layer.weight)
            grad_OI += weight_gradient(dy_OT, x_IT, rowwise)
        self.sums.add_bias_gradient(self.layer, dy_TO)

    def close(self) -> None:
        self.sums.close()


class Sums:
    """Gradients of a pass, added up in float32: in the parameter's own, or, of a bf16 parameter, in a tensor that
    `close` adds to it."""

    def __init__(self) -> None:
        self.of_bf16: dict[Tensor, Tensor] = {}

    def begun(self, parameter: Tensor) -> Tensor:
        """A parameter's gradient, to add to."""
        if parameter.dtype == torch.bfloat16:
            if parameter not in self.of_bf16:
                self.of_bf16[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
            return self.of_bf16[parameter]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def add_bias_gradient(self, layer: Linear, dy_TO: Tensor) -> None:
        if layer.bias is not None and layer.bias.requires_grad:
            grad_O = self.begun(layer.bias)
            grad_O += dy_TO.sum(0, dtype=grad_O.dtype)

    def close(self) -> None:
        for parameter, total in self.of_bf16.items():
            total = total.to(parameter.dtype)
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
        self.of_bf16.clear()


def product_of(layer: Linear, dtype: torch.dtype, quantize: Quantize) -> Product | Float8Product:
    """What multiplies with a layer's weight during one pass.

    Args:
        quantize: `float8.quantize`, compiled or not.
    """
    if isinstance(layer, Float8Linear):
        return Float8Product.of(layer, dtype, quantize)
    return Product.of(layer, dtype)


def _bias(layer: Linear, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().to(dtype)


def _rows_by_heads(weight_OI: Tensor, heads: Sequence[int], groups: int) -> list[Tensor]:
    """The outputs of each group: the same part of queries, keys and values."""
    rows_O = torch.arange(len(weight_OI), device=weight_OI.device)
    of_each = [part.flatten().chunk(groups) for part in rows_O.view(sum(heads), -1).split(list(heads))]
    return [torch.cat(parts) for parts in zip(*of_each, strict=True)]
