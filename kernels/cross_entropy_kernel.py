"""Cross-entropy of a chunk of logits and its gradient, in Triton: the gradient takes the logits' place.

One program owns one row, the logits of one token. It reads the row twice: first for the running maximum and the sum of
exponentials against it (the online softmax of Milakov and Gimelshein 2018, arXiv:1805.02867), then, with the row still
in the L2 cache, to write d loss / d logits over it. Arithmetic is float32 whatever the logits' dtype. No atomics: each
row is summed in a fixed order.

Shape suffixes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .flash_attention.scores import LN2, LOG2E, tanh

BLOCK, NUM_WARPS, NUM_STAGES = 4096, 8, 3
"""Logits that a program reads at a time: 16 a thread take 70 registers on sm_90, so that three programs share an SM."""


@triton.jit
def _load(row_ptr, v0, V, stride, cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] logits from v0 on, capped, in float32; and their columns. Past V they are −inf.

    The mask of the load is the row's stride, not V: a multiple of 16 keeps the loads wide, whatever V is.
    """
    columns = v0 + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + columns, mask=columns < stride, other=0.0).to(tl.float32)
    if SOFTCAP:
        z = cap * tanh(z / cap)
    return tl.where(columns < V, z, float("-inf")), columns


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, V, stride, ignore_index, cap, z_loss, smoothing,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The loss of one token; with GRAD, its gradient over its logits, and 0 over what pads the row to its stride."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRAD:
            for v0 in tl.range(0, stride, BLOCK):
                columns = v0 + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
                tl.store(row_ptr + columns, zeros, mask=columns < stride)
    else:
        # A target outside [0, V) has no logit: its loss is NaN.
        z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        if SOFTCAP:
            z_target = cap * tanh(z_target / cap)
        top = float("-inf")
        sums = tl.zeros([BLOCK], tl.float32)
        totals = tl.zeros([BLOCK], tl.float32)  # of the logits themselves
        for v0 in tl.range(0, V, BLOCK, num_stages=STAGES):
            z, columns = _load(row_ptr, v0, V, stride, cap, SOFTCAP, BLOCK)
            new_top = tl.maximum(top, tl.max(z, 0))
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − −inf is NaN
            sums = sums * tl.exp2((top - pivot) * LOG2E) + tl.exp2((z - pivot) * LOG2E)
            if SMOOTHING:
                totals += tl.where(columns < V, z, 0.0)
            top = new_top
        total = tl.sum(sums, 0)
        log_total = tl.log2(total) * LN2
        lse = top + log_total
        loss = log_total + (1 - smoothing) * (top - z_target) + z_loss * lse * lse
        if SMOOTHING:
            loss += smoothing * (top - tl.sum(totals, 0) / V)
        tl.store(losses_ptr + row, loss)

        if GRAD:
            # softmax · (1 + 2 · z_loss · lse) − (1 − smoothing) · onehot − smoothing / V, through the soft cap
            factor = (1 + 2 * z_loss * lse) / total
            for v0 in tl.range(0, V, BLOCK, num_stages=STAGES):
                z, columns = _load(row_ptr, v0, V, stride, cap, SOFTCAP, BLOCK)
                grad = tl.exp2((z - top) * LOG2E) * factor
                if SMOOTHING:
                    grad -= smoothing / V
                grad = tl.where(columns == target, grad - (1 - smoothing), grad)
                if SOFTCAP:
                    grad *= 1 - (z / cap) * (z / cap)
                grad = tl.where(columns < V, grad, 0.0)
                tl.store(row_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=columns < stride)


def cross_entropy_(
    logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor,
    *, ignore_index: int, softcap: float, z_loss: float, label_smoothing: float, with_gradient: bool,
) -> None:  # fmt: skip
    """Write each token's loss into losses_C and, with_gradient, d loss / d logits over the logits.

    Args:
        logits_CV: bf16, fp16 or float32; columns side by side. What lies between a row's end and the next row is
            overwritten.
        targets_C: int64. losses_C: float32, contiguous.
    """
    C, V = logits_CV.shape
    with torch.cuda.device_of(logits_CV):
        cross_entropy_kernel[(C,)](
            logits_CV, targets_C.contiguous(), losses_C, V, logits_CV.stride(0),
            ignore_index, softcap, z_loss, label_smoothing,
            SOFTCAP=softcap > 0, SMOOTHING=label_smoothing > 0, GRAD=with_gradient, BLOCK=BLOCK, STAGES=NUM_STAGES,
            num_warps=NUM_WARPS,
        )  # fmt: skip
