"""A linear layer for code that computes its gradients by hand: `model.recompute`.

Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .linear import Linear


class Product(NamedTuple):
    """A linear layer, or rows of it, during one pass: its weight is cast once, its gradients add up in float32.

    The sum is the parameter's gradient, or, of a bf16 parameter, a tensor that `close` adds to it.
    """

    layer: Linear
    weight_OI: Tensor
    bias_O: Tensor | None
    sums: dict[Tensor, Tensor]
    """Of bf16 parameters."""

    @classmethod
    def of(cls, layer: Linear, dtype: torch.dtype) -> Product:
        bias_O = None if layer.bias is None else layer.bias.detach().to(dtype)
        return cls(layer, layer.operand(dtype).detach(), bias_O, {})

    def by_heads(self, heads: Sequence[int], groups: int) -> list[Product]:
        """Of the product for queries, keys and values that of each group: the same part of each of the three."""
        if groups == 1:
            return [self]
        rows_O = torch.arange(len(self.weight_OI), device=self.weight_OI.device)
        of_each = [part.flatten().chunk(groups) for part in rows_O.view(sum(heads), -1).split(list(heads))]
        rows = [torch.cat(parts) for parts in zip(*of_each, strict=True)]
        return [
            self._replace(weight_OI=self.weight_OI[r], bias_O=None if self.bias_O is None else self.bias_O[r])
            for r in rows
        ]

    def __call__(self, x_TI: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bias_O is None:
            return torch.mm(x_TI, self.weight_OI.T, out=out)
        return torch.addmm(self.bias_O, x_TI, self.weight_OI.T, out=out)

    def input_gradient(self, dy_TO: Tensor, columns: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Of some of the inputs (T, columns)."""
        return torch.mm(dy_TO, self.weight_OI[:, columns], out=out)

    def add_gradients(self, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Add the gradients of weight and bias to theirs."""
        if self.layer.weight.requires_grad:
            grad_OI = self._begun(self.layer.weight)
            if dy_TO.is_cuda:
                wider: dict[str, Any] = {} if grad_OI.dtype == dy_TO.dtype else {"out_dtype": grad_OI.dtype}
                torch.addmm(grad_OI, dy_TO.T, x_TI, out=grad_OI, **wider)
            else:  # a CPU cannot add up in a wider dtype than that of the factors
                grad_OI += dy_TO.T @ x_TI
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            grad_O = self._begun(self.layer.bias)
            grad_O += dy_TO.sum(0, dtype=grad_O.dtype)

    def close(self) -> None:
        """After the last of the gradients of this pass."""
        for parameter, total in self.sums.items():
            total = total.to(parameter.dtype)
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
        self.sums.clear()

    def _begun(self, parameter: Tensor) -> Tensor:
        """A parameter's gradient, to add to."""
        if parameter.dtype == torch.bfloat16:
            if parameter not in self.sums:
                self.sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
            return self.sums[parameter]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad
