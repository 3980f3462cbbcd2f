"""Linear layers that multiply with a low-precision copy of their weight, cast once a step for every micro-batch.

The float32 weight stays the parameter: the optimizer, checkpoints and gradients see nothing else. Autocast alone casts
the weight in every forward pass, and again where a layer is computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.matvec import matvec


def is_one_row(x: Tensor) -> bool:
    """Whether `matvec` is the way to multiply x (…, inputs): one row, on a GPU, without a gradient, as in decoding."""
    return not torch.is_grad_enabled() and x.is_cuda and x.numel() == x.shape[-1]


class Linear(nn.Linear):
    """`nn.Linear`, with a working copy of its weight once `keep_working_copies` gave it one."""

    working: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("working", None, persistent=False)

    def operand(self, dtype: torch.dtype | None = None) -> Tensor:
        """What to multiply with in place of the weight; its gradient, cast to float32, is the weight's.

        Args:
            dtype: of the result; None: the working copy's, and without one the weight itself, for autocast to cast.
        """
        if self.working is None or (dtype is not None and dtype != self.working.dtype):
            return self.weight if dtype is None else self.weight.to(dtype)
        working: Tensor = _Working.apply(self.weight, self.working)
        return working

    def forward(self, x: Tensor) -> Tensor:
        return self.of_one_row(x) if is_one_row(x) else F.linear(x, self.operand(), self.bias)

    def of_one_row(
        self, x: Tensor, *, norm: nn.RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """`forward` of one row, and what is around it, in one kernel: see `kernels.matvec`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps or 0.0)
        if residual is not None:
            dtype = torch.promote_types(dtype, residual.dtype)
        return matvec(x, self.operand(), self.bias, norm=scale, eps=eps, swiglu=swiglu, residual=residual, dtype=dtype)

    def requantize(self) -> None:
        """Make anew what `model.float8` keeps of the weight; here nothing."""


class _Working(torch.autograd.Function):
    """A cast whose result is there already. Its backward pass is that of the cast, so gradients are the same bits."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, working: Tensor) -> Tensor:
        return working.view_as(working)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].float(), None


def keep_working_copies(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every `Linear` of a model a working copy, 2 bytes a weight in bf16; `refresh` fills them."""
    for layer in _linears(model):
        layer.working = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False)


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Cast the weights into the working copies, in 16 or 8 bits, where there are any. Whoever has changed weights calls
    this.

    The weights' version counters do not tell: the fused AdamW of PyTorch leaves them as they are.
    """
    layers = _linears(model)
    pairs = [(layer.working, layer.weight) for layer in layers if layer.working is not None]
    if pairs:
        torch._foreach_copy_([working for working, _ in pairs], [weight for _, weight in pairs])
    for layer in layers:
        layer.requantize()


def _linears(model: nn.Module) -> list[Linear]:
    return [layer for layer in model.modules() if isinstance(layer, Linear)]
