"""The output head and its loss in one operator, so that the logits of a long sequence never exist at once.

At 16k tokens and a vocabulary of 50k the float32 logits take 3.1 GiB, and their gradient as much again: more than the
rest of a small GPT. Here the tokens pass through the head a chunk at a time, and the gradient of a chunk is computed
while its logits exist (the idea of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989). So nothing is
recomputed, and nothing of size tokens × vocabulary is kept. There is one buffer for a chunk, in which the gradient
replaces the logits (`cross_entropy_kernel.py`), and the gradients of the inputs, which the backward pass only scales.

The weight's gradient is a sum over chunks. It is float32 from the first product to the parameter: rounded to bf16 after
each chunk, its error would grow with the number of chunks.

The loop is one PyTorch operator, `flash_gpt::linear_cross_entropy`: one node in a compiled graph, whatever the length.

Shape suffixes: N tokens, C tokens of a chunk, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .flash_attention.op import why_not_on
from .operators import define

IGNORE_INDEX = -100
ALIGNMENT = 64
"""The stride of the buffer's rows is a multiple of so many logits: any vocabulary is read and multiplied as fast."""


def linear_cross_entropy(
    x_NE: Tensor,
    weight_VE: Tensor,
    targets_N: Tensor,
    *,
    operand_VE: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_size: int = 2048,
    reduction: str = "sum",
) -> Tensor:
    """Σ over tokens of −log softmax(softcap(x Wᵀ))[target], with at most chunk_size × V logits in memory.

    Where the tokens fit one chunk, the logits are left to autograd, and to torch.compile.

    Args:
        x_NE: floating point, the final hidden states; under autocast they are cast to its dtype.
        weight_VE: floating point, the head. It is multiplied in x's dtype. Its gradient is summed in float32 and has
            the weight's dtype: for a float32 weight under autocast it is never rounded to bf16.
        targets_N: int64, in [0, V) or ignore_index.
        operand_VE: the weight cast to x's dtype, if the caller has it; None: it is cast here. Its gradient goes to
            weight_VE directly. Where the tokens fit one chunk it goes through the cast, which autograd must know.
        ignore_index: the target of tokens that count neither in the loss nor in the gradients.
        softcap: c > 0 replaces a logit z with c · tanh(z / c).
        z_loss: adds z_loss · log² Σ exp(logits) per token, which keeps logits from drifting (Chowdhery et al. 2022,
            arXiv:2204.02311, section 5, with 1e-4).
        label_smoothing: in [0, 1), the part of the target's probability that all V share, as F.cross_entropy has it
            (Szegedy et al. 2016, arXiv:1512.00567).
        chunk_size: tokens per chunk; 0 computes all logits at once. The sum that is the weight's gradient passes
            through memory once a chunk, which at 2048 costs about a tenth of the products.
        reduction: "sum", or "none": each token's loss (N,), 0 where it is ignored. With gradients "none" keeps all
            logits.
    Returns:
        float32 (float64 for float64 inputs) scalar: the sum over tokens in nats. Differentiable once. The caller
        divides by the number of tokens: with gradient accumulation that is the count of the whole step, which no
        micro-batch knows.
    Raises:
        ValueError: an argument that is out of range, or shapes that do not fit.
    """
    _check(x_NE, weight_VE, targets_N, operand_VE, softcap, z_loss, label_smoothing, chunk_size, reduction)
    if torch.is_autocast_enabled(x_NE.device.type):
        x_NE = x_NE.to(torch.get_autocast_dtype(x_NE.device.type))
    wants_x = torch.is_grad_enabled() and x_NE.requires_grad
    wants_weight = torch.is_grad_enabled() and weight_VE.requires_grad
    per_token = reduction == "none"
    if chunk_size == 0 or x_NE.shape[0] <= chunk_size or (per_token and (wants_x or wants_weight)):
        return linear_cross_entropy_reference(
            x_NE,
            weight_VE.to(x_NE.dtype) if operand_VE is None else operand_VE,
            targets_N,
            ignore_index=ignore_index,
            softcap=softcap,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    loss: Tensor = torch.ops.flash_gpt.linear_cross_entropy.default(
        x_NE, weight_VE, operand_VE, targets_N, chunk_size, ignore_index, softcap, z_loss, label_smoothing,
        per_token, wants_x, wants_weight,
    )[0]  # fmt: skip
    return loss


def linear_cross_entropy_reference(
    x_NE: Tensor,
    weight_VE: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """The definition: logits in full, then the cross-entropy. Arguments as those of `linear_cross_entropy`."""
    logits_NV = F.linear(x_NE, weight_VE)
    logits_NV = logits_NV.to(_accumulator(logits_NV))
    if softcap > 0:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    loss = F.cross_entropy(
        logits_NV, targets_N, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss > 0:
        squares_N = torch.where(targets_N == ignore_index, 0.0, logits_NV.logsumexp(-1).square())
        loss = loss + z_loss * (squares_N if reduction == "none" else squares_N.sum())
    return loss


# ---- the operator


def _run(
    x_NE: Tensor, weight_VE: Tensor, operand_VE: Tensor | None, targets_N: Tensor, chunk_size: int,
    ignore_index: int, softcap: float, z_loss: float, label_smoothing: float,
    per_token: bool, wants_x: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, d loss / dx, d loss / dweight); of a gradient that is not wanted a tensor without elements."""
    (N, E), V = x_NE.shape, weight_VE.shape[0]
    accumulator, cross_entropy_ = _accumulator(x_NE), _cross_entropy_on(x_NE)
    operand_VE = weight_VE.to(x_NE.dtype) if operand_VE is None else operand_VE
    losses_N = x_NE.new_empty(N, dtype=accumulator)
    grad_x_NE = x_NE.new_empty((N, E) if wants_x else 0)
    grad_weight_VE = weight_VE.new_empty((V, E) if wants_weight else 0, dtype=accumulator)
    logits = x_NE.new_empty(min(chunk_size, N), -(-V // ALIGNMENT) * ALIGNMENT)[:, :V]
    for first in range(0, N, chunk_size):
        rows = slice(first, first + chunk_size)
        x_CE = x_NE[rows]
        logits_CV = torch.mm(x_CE, operand_VE.t(), out=logits[: x_CE.shape[0]])
        cross_entropy_(
            logits_CV, targets_N[rows], losses_N[rows], ignore_index=ignore_index, softcap=softcap, z_loss=z_loss,
            label_smoothing=label_smoothing, with_gradient=wants_x or wants_weight,
        )  # fmt: skip
        if wants_x:
            torch.mm(logits_CV, operand_VE, out=grad_x_NE[rows])
        if wants_weight:
            _add_product(grad_weight_VE, logits_CV.t(), x_CE, is_first=first == 0)
    return losses_N if per_token else losses_N.sum(), grad_x_NE, grad_weight_VE


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total += a @ b, or = for the first; on NVIDIA's GPUs a product of bf16 is not rounded before it is added."""
    if total.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if is_first else 1, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _cross_entropy_on(x: Tensor) -> Callable[..., None]:
    """The Triton kernel where it can run; elsewhere its plain twin."""
    if not x.is_cuda or x.dtype == torch.float64 or why_not_on(x.device) is not None:
        return cross_entropy_
    from . import cross_entropy_kernel

    return cross_entropy_kernel.cross_entropy_


def cross_entropy_(
    logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor,
    *, ignore_index: int, softcap: float, z_loss: float, label_smoothing: float, with_gradient: bool,
) -> None:  # fmt: skip
    """`cross_entropy_kernel.cross_entropy_` in plain PyTorch, for any device and dtype."""
    z_CV = logits_CV.to(losses_C.dtype)
    if softcap > 0:
        z_CV = softcap * torch.tanh(z_CV / softcap)
    kept_C1 = (targets_C != ignore_index)[:, None]
    target_C1 = torch.where(kept_C1, targets_C[:, None], 0)
    lse_C1 = z_CV.logsumexp(-1, keepdim=True)
    log_probs_CV = z_CV - lse_C1
    losses_C1 = -log_probs_CV.gather(1, target_C1)
    if label_smoothing > 0:
        losses_C1 = (1 - label_smoothing) * losses_C1 - label_smoothing * log_probs_CV.mean(-1, keepdim=True)
    if z_loss > 0:
        losses_C1 = losses_C1 + z_loss * lse_C1.square()
    losses_C.copy_(torch.where(kept_C1, losses_C1, 0.0)[:, 0])
    if not with_gradient:
        return
    # d loss / d logits = softmax · (1 + 2 · z_loss · lse) − (1 − smoothing) · onehot − smoothing / V; through the soft
    # cap it is scaled by 1 − (z / c)².
    grad_CV = log_probs_CV.exp_()
    if z_loss > 0:
        grad_CV *= 1 + 2 * z_loss * lse_C1
    if label_smoothing > 0:
        grad_CV -= label_smoothing / grad_CV.shape[1]
    grad_CV.scatter_(1, target_C1, grad_CV.gather(1, target_C1) - (1 - label_smoothing))
    if softcap > 0:
        grad_CV *= 1 - (z_CV / softcap) ** 2
    logits_CV.copy_(grad_CV.masked_fill_(~kept_C1, 0.0))


def _fake(
    x_NE: Tensor, weight_VE: Tensor, operand_VE: Any, targets_N: Any, chunk_size: int, ignore_index: int,
    softcap: float, z_loss: float, label_smoothing: float, per_token: bool, wants_x: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    accumulator = _accumulator(x_NE)
    return (
        x_NE.new_empty(x_NE.shape[:1] if per_token else (), dtype=accumulator),
        x_NE.new_empty(x_NE.shape if wants_x else 0),
        weight_VE.new_empty(weight_VE.shape if wants_weight else 0, dtype=accumulator),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, weight_VE: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, *grads = torch.ops.flash_gpt.linear_cross_entropy.default(x_NE, weight_VE, *inputs)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.wanted, ctx.num_options = (x_NE.dtype, weight_VE.dtype), inputs[-2:], len(inputs)
        return loss, *grads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None, None]
        if grad_loss is not None:
            # Two dimensions: a GPU would round a factor without any to bf16 first.
            factor_11 = grad_loss.reshape(1, 1)
            is_kept = torch._C._autograd._get_current_graph_task_keep_graph()  # for another backward pass
            for i, grad in enumerate(ctx.saved_tensors):
                if ctx.wanted[i]:
                    # In place, except in a graph, whose compiler decides that.
                    scale = Tensor.mul if is_kept or type(grad) is not Tensor else Tensor.mul_
                    grads[i] = scale(grad, factor_11).to(ctx.dtypes[i])
        return *grads, *(None for _ in range(ctx.num_options))


def _flops(
    x_shape: Any, weight_shape: Any, operand: Any, targets: Any, chunk_size: Any, ignore_index: Any, softcap: Any,
    z_loss: Any, label_smoothing: Any, per_token: Any, wants_x: bool, wants_weight: bool, **_: Any,
) -> int:  # fmt: skip
    """One product forward, and one for each gradient."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1] * (1 + wants_x + wants_weight)


define(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor? operand, Tensor targets, SymInt chunk_size, int ignore_index, float softcap, "
    "float z_loss, float label_smoothing, bool per_token, bool wants_x, bool wants_weight) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    derivative=_LinearCrossEntropy.apply,
    flops=_flops,
)


def _accumulator(x: Tensor) -> torch.dtype:
    """What losses and gradients are summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    x_NE: Tensor, weight_VE: Tensor, targets_N: Tensor, operand_VE: Tensor | None, softcap: float, z_loss: float,
    label_smoothing: float, chunk_size: int, reduction: str,
) -> None:  # fmt: skip
    if x_NE.dim() != 2 or weight_VE.dim() != 2 or x_NE.shape[1] != weight_VE.shape[1]:
        raise ValueError(
            f"x {tuple(x_NE.shape)} and weight {tuple(weight_VE.shape)} do not fit: (tokens, width) and "
            "(vocabulary, width); flatten batch and sequence first"
        )
    if targets_N.dim() != 1 or targets_N.shape[0] != x_NE.shape[0] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets {tuple(targets_N.shape)}, {targets_N.dtype}, must be int64 ({x_NE.shape[0]},): one for each token"
        )
    if operand_VE is not None and operand_VE.shape != weight_VE.shape:
        raise ValueError(f"operand {tuple(operand_VE.shape)} is no copy of weight {tuple(weight_VE.shape)}")
    for name, value in (("softcap", softcap), ("z_loss", z_loss), ("chunk_size", chunk_size)):
        if value < 0:
            raise ValueError(f"{name}={value} is negative; use 0 to switch it off")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; use sum or none")
