"""AdamW's update of parameters in Triton (Loshchilov and Hutter 2017, arXiv:1711.05101): one pass over memory.

A launch updates several parameters of one size: a transformer has many small ones, as many of a size as layers. The
gradient is scaled where it is read, so clipping needs no pass of its own. Moments are float32, or bf16, rounded to the
nearest once a step; arithmetic is float32. What differs from step to step lies on the device, so the host waits for
nothing, and a CUDA graph may hold the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 1024, 4
"""Numbers of a program: 8 a thread. On an H200 4.21 TB/s, of 4.14 that a copy reaches; 2,048: 4.05."""
PER_LAUNCH = 16
"""Parameters of a launch, at most: gpt2-124m's update takes 0.85 ms on an H200, and 1.19 with one a launch (L29)."""


@triton.jit
def _bias_correction(count, LOG2_DECAY: tl.constexpr):
    """1 − decay^count, computed in float64: with a decay near 1 it is a difference of near numbers."""
    return (1.0 - tl.exp2(count.to(tl.float64) * LOG2_DECAY)).to(tl.float32)


@triton.jit
def _chosen(pointers, which, PER_LAUNCH: tl.constexpr):
    """pointers[which]."""
    chosen = pointers[0]
    for i in tl.static_range(1, PER_LAUNCH):
        chosen = tl.where(which == i, pointers[i], chosen)
    return chosen


@triton.jit
def adamw_kernel(
    param_ptrs, grad_ptrs, mean_ptrs, square_ptrs, count_ptrs, learning_rate_ptr, scale_ptr, good_ptr,
    n, eps, weight_decay,
    DECAY1: tl.constexpr, DECAY2: tl.constexpr, LOG2_DECAY1: tl.constexpr, LOG2_DECAY2: tl.constexpr,
    BLOCK: tl.constexpr, PER_LAUNCH: tl.constexpr,
):  # fmt: skip
    """A program updates a block of one parameter. `…_ptrs` are tuples of PER_LAUNCH pointers; a count is the number of
    this step, from 1 on. A scale_ptr that is None is 1."""
    if tl.load(good_ptr):
        which = tl.program_id(1)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        param_ptr = _chosen(param_ptrs, which, PER_LAUNCH)
        mean_ptr = _chosen(mean_ptrs, which, PER_LAUNCH)
        square_ptr = _chosen(square_ptrs, which, PER_LAUNCH)
        param = tl.load(param_ptr + at, mask=inside)
        grad = tl.load(_chosen(grad_ptrs, which, PER_LAUNCH) + at, mask=inside)
        mean = tl.load(mean_ptr + at, mask=inside).to(tl.float32)
        square = tl.load(square_ptr + at, mask=inside).to(tl.float32)
        count = tl.load(_chosen(count_ptrs, which, PER_LAUNCH))
        learning_rate = tl.load(learning_rate_ptr)
        if scale_ptr is not None:
            grad *= tl.load(scale_ptr)
        mean = DECAY1 * mean + (1 - DECAY1) * grad
        square = DECAY2 * square + (1 - DECAY2) * grad * grad
        step_size = learning_rate / _bias_correction(count, LOG2_DECAY1)
        root = tl.sqrt_rn(square) / tl.sqrt_rn(_bias_correction(count, LOG2_DECAY2))
        param -= learning_rate * weight_decay * param
        param -= step_size * mean / (root + eps)
        tl.store(param_ptr + at, param, mask=inside)
        tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), mask=inside)
        tl.store(square_ptr + at, square.to(square_ptr.dtype.element_ty), mask=inside)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    counts: Sequence[Tensor],
    learning_rate: Tensor,
    scale: Tensor | None,
    good: Tensor,
    *,
    decays: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update parameters and their moments in place.

    Args:
        params, grads: of one size: float32, contiguous.
        means, squares: the moments, float32 or bf16, of that size.
        counts: float32 scalars on the device: for each parameter the number of this step, from 1 on.
        learning_rate: float32 scalar on the device.
        scale: float32 scalar on the device, by which the gradients are multiplied; None: 1.
        good: bool scalar on the device. Where it is False nothing changes.
        decays: of the two moments, in [0, 1).
    """
    n = params[0].numel()
    if n == 0:  # shards of parameters with fewer rows than ranks
        return
    tensors = params, grads, means, squares
    assert all(x.is_contiguous() and x.numel() == n for xs in tensors for x in xs)
    # 2^-1000 to the power of any count is 0 in float32, as 0 would be.
    log2_decays = [math.log2(decay) if decay else -1000.0 for decay in decays]
    with torch.cuda.device_of(params[0]):
        for at in range(0, len(params), PER_LAUNCH):
            some = [xs[at : at + PER_LAUNCH] for xs in (*tensors, counts)]
            # One kernel for any number of parameters: programs of those that fill up are not started.
            pointers = [(*xs, *[xs[0]] * (PER_LAUNCH - len(xs))) for xs in some]
            adamw_kernel[(triton.cdiv(n, BLOCK), len(some[0]))](
                *pointers, learning_rate, scale, good, n, eps, weight_decay,
                DECAY1=decays[0], DECAY2=decays[1], LOG2_DECAY1=log2_decays[0], LOG2_DECAY2=log2_decays[1],
                BLOCK=BLOCK, PER_LAUNCH=PER_LAUNCH, num_warps=NUM_WARPS,
            )  # fmt: skip
