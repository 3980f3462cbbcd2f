"""The language model's head and its loss together, so that the logits of a long sequence never exist at once.

At 16k tokens and a vocabulary of 50k the float32 logits are 3.1 GiB and their gradient as much again: more than the
rest of a small GPT. Here the tokens pass through the head a chunk at a time, and each chunk's gradient is taken while
its logits are at hand (the idea of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989), so nothing is
recomputed and nothing of size tokens × vocabulary is kept.

Shape suffixes: N tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def linear_cross_entropy_reference(
    x_NE: Tensor, weight_VE: Tensor, targets_N: Tensor, *, softcap: float = 0.0, reduction: str = "sum"
) -> Tensor:
    """The definition: logits in full, then the cross-entropy. Same arguments as `linear_cross_entropy`."""
    logits_NV = F.linear(x_NE, weight_VE).float()
    if softcap > 0:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction=reduction)


def linear_cross_entropy(
    x_NE: Tensor,
    weight_VE: Tensor,
    targets_N: Tensor,
    *,
    softcap: float = 0.0,
    chunk_size: int = 4096,
    reduction: str = "sum",
) -> Tensor:
    """Σ over tokens of −log softmax(softcap(x Wᵀ))[target], with at most chunk_size × V logits in memory.

    Args:
        x_NE: float, the final hidden states. weight_VE: float, the head. Cast under autocast, as F.linear does.
        targets_N: int64 in [0, V); −100 is ignored.
        softcap: c > 0 replaces a logit z with c · tanh(z / c).
        chunk_size: tokens per chunk; 0 computes all logits at once.
        reduction: sum; or none: each token's loss (N,), 0 where it is ignored. Of these no gradient is taken while
            their logits are at hand, so that it keeps all logits.
    Returns:
        float32 scalar: the sum over tokens in nats. Divide by the number of tokens yourself: with gradient
        accumulation the right denominator is the whole step's token count, which no micro-batch knows.
    """
    if torch.is_autocast_enabled(x_NE.device.type):
        # Once here: autocast itself would cast the weight again for every chunk.
        dtype = torch.get_autocast_dtype(x_NE.device.type)
        x_NE, weight_VE = x_NE.to(dtype), weight_VE.to(dtype)
    if chunk_size == 0 or x_NE.shape[0] <= chunk_size:
        return linear_cross_entropy_reference(x_NE, weight_VE, targets_N, softcap=softcap, reduction=reduction)
    if reduction == "none" or not torch.is_grad_enabled():
        losses = [
            linear_cross_entropy_reference(x, weight_VE, targets, softcap=softcap, reduction=reduction)
            for x, targets in zip(x_NE.split(chunk_size), targets_N.split(chunk_size), strict=True)
        ]
        return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
    loss: Tensor = _ChunkedLinearCrossEntropy.apply(x_NE, weight_VE, targets_N, softcap, chunk_size)
    return loss


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NE: Tensor, weight_VE: Tensor, targets_N: Tensor, softcap: float, chunk_size: int
    ) -> Tensor:
        loss = x_NE.new_zeros((), dtype=torch.float32)
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=torch.float32)
        grad_x = []
        for x_CE, targets_C in zip(x_NE.split(chunk_size), targets_N.split(chunk_size), strict=True):
            logits_CV = (x_CE @ weight_VE.t()).float()
            if softcap > 0:
                logits_CV = softcap * torch.tanh(logits_CV / softcap)
            kept_C1 = (targets_C != IGNORE_INDEX)[:, None]
            target_C1 = targets_C.clamp_min(0)[:, None]
            log_probs_CV = logits_CV - logits_CV.logsumexp(-1, keepdim=True)
            loss = loss - (log_probs_CV.gather(1, target_C1) * kept_C1).sum()

            # d loss / d logits = softmax − onehot(target); through the soft cap it is scaled by 1 − (z / c)².
            columns = torch.arange(weight_VE.shape[0], device=x_NE.device)
            grad_CV = (log_probs_CV.exp() - (columns == target_C1).float()) * kept_C1
            if softcap > 0:
                grad_CV = grad_CV * (1 - (logits_CV / softcap) ** 2)
            grad_CV = grad_CV.to(x_NE.dtype)
            grad_x.append(grad_CV @ weight_VE)
            grad_weight_VE += grad_CV.t() @ x_CE
        ctx.save_for_backward(torch.cat(grad_x), grad_weight_VE.to(weight_VE.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_NE, grad_weight_VE = ctx.saved_tensors
        (grad_loss,) = grads
        return (
            grad_x_NE * grad_loss.to(grad_x_NE.dtype),
            grad_weight_VE * grad_loss.to(grad_x_NE.dtype),
            None,
            None,
            None,
        )
