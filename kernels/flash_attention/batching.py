"""What torch.vmap makes of the operators: one call in which its dimension is part of the batch.

Where it cannot be, since sinks or slopes are mapped over, or their gradients are asked for, which a call sums over its
batch: a call for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Rule = tuple[tuple[Tensor, ...], tuple[int | None, ...]]
"""Results, and the dimension of each that is mapped over."""


def forward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Rule:
    """vmap's rule for `flash_gpt::flash_attention`."""
    operator = torch.ops.flash_gpt.flash_attention.default
    if any(dim is not None for dim in in_dims[5:7]):
        return _one_by_one(operator, info.batch_size, in_dims, inputs)
    n = info.batch_size
    return _unfold(operator(*_fold(inputs[:5], in_dims[:5], n), *inputs[5:]), n, _batch(inputs[0], in_dims[0]))


def backward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Rule:
    """vmap's rule for `flash_gpt::flash_attention_backward`."""
    operator = torch.ops.flash_gpt.flash_attention_backward.default
    wanted = inputs[-1]
    if any(dim is not None for dim in in_dims[9:11]) or wanted[3] or wanted[4]:
        return _one_by_one(operator, info.batch_size, in_dims, inputs)
    n = info.batch_size
    return _unfold(operator(*_fold(inputs[:9], in_dims[:9], n), *inputs[9:]), n, _batch(inputs[0], in_dims[0]))


def _batch(x: Tensor, dim: int | None) -> int:
    """Rows of one call: x is (B, …), mapped over along `dim` or not."""
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def _fold(tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...], n: int) -> list[Tensor | None]:
    """Each (B, …), mapped over along `dim` or the same for all n: (n · B, …)."""

    def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x.flatten(0, 1)
        return x if x.stride(-1) == 1 else x.contiguous()

    return [fold(x, dim) for x, dim in zip(tensors, dims, strict=True)]


def _unfold(results: tuple[Tensor, ...], n: int, batch: int) -> Rule:
    """Results (n · batch, …). One without elements, of a gradient that is not wanted, is so for each."""
    mapped = tuple(x.unflatten(0, (n, batch)) if x.dim() > 1 else x.expand(n, *x.shape) for x in results)
    return mapped, (0,) * len(mapped)


def _one_by_one(operator: Any, n: int, dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> Rule:
    calls = [
        operator(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, dims, strict=True)))
        for i in range(n)
    ]
    results = tuple(torch.stack(xs) for xs in zip(*calls, strict=True))
    return results, (0,) * len(results)
