"""attention=flex: PyTorch's FlexAttention, with block masks computed directly from the document starts."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from kernels.reference import attend

from .base import AttentionBackend
from .config import AttentionConfig
from .spec import AttentionSpec

BLOCK = 128


class FlexAttention(AttentionBackend):
    """FlexAttention, always compiled on CUDA: by itself when the model is not."""

    name = "flex"
    takes_any_length = False

    def __init__(self, spec: AttentionSpec, config: AttentionConfig) -> None:
        super().__init__(spec, config)
        self._compiled = torch.compile(flex_attention, dynamic=False)
        self._without_documents: dict[int, BlockMask] = {}  # by length: never changes, so it is built once

    def describe(self) -> str:
        if self.spec.device == "cuda":
            return f"compiled FlexAttention, {BLOCK} × {BLOCK} block mask"
        return "FlexAttention forward, gradients from the specification (PyTorch has no flex backward on a CPU)"

    def prepare(self, starts_BS: Tensor | None, seq_len: int, num_keys: int | None = None) -> BlockMask | None:
        spec = self.spec
        if starts_BS is None and num_keys is not None:
            starts_BS = torch.zeros(1, seq_len, dtype=torch.int32, device=spec.device)
        if starts_BS is not None:
            return interval_block_mask(starts_BS, spec.window, spec.causal, num_keys)
        if not spec.causal and spec.window is None:
            return None
        if seq_len not in self._without_documents:
            zeros_1S = torch.zeros(1, seq_len, dtype=torch.int32, device=spec.device)
            self._without_documents[seq_len] = interval_block_mask(zeros_1S, spec.window, spec.causal)
        return self._without_documents[seq_len]

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: BlockMask | None) -> Tensor:
        if not q_BSHD.is_cuda:
            return _flex_on_cpu(q_BSHD, k_BSGD, v_BSGD, mask, self.spec)
        # Inside a compiled model the plain function; elsewhere uncompiled FlexAttention would write S × S scores.
        attend = flex_attention if torch.compiler.is_compiling() else self._compiled
        return _flex(attend, q_BSHD, k_BSGD, v_BSGD, mask, self.spec)


def _flex(attend: Any, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Any, spec: AttentionSpec) -> Tensor:
    out_BHSD: Tensor = attend(
        q_BSHD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGD.transpose(1, 2),
        score_mod=_soft_cap(spec.softcap) if spec.softcap > 0 else None,
        block_mask=mask,
        scale=spec.scale if spec.scale is not None else 1 / math.sqrt(spec.head_dim),
        enable_gqa=k_BSGD.shape[2] != q_BSHD.shape[2],
    )
    return out_BHSD.transpose(1, 2)


@torch.compiler.disable
def _flex_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Any, spec: AttentionSpec) -> Tensor:
    out: Tensor = _FlexOnCPU.apply(q, k, v, mask, spec)
    return out


class _FlexOnCPU(torch.autograd.Function):
    """FlexAttention forward; backward through the specification under the mask that the block mask's mask_mod gives,
    because PyTorch refuses FlexAttention's backward on a CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, spec: AttentionSpec) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.spec = mask, spec
        # PyTorch 2.15 takes a second soft cap for a variable, which its FlexAttention does not.
        with warnings.catch_warnings(), torch._dynamo.config.patch(specialize_float=True):
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
            return _flex(flex_attention, q.detach(), k.detach(), v.detach(), mask, spec).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        S, K = q.shape[1], k.shape[1]
        visible_BSK = torch.ones(1, S, K, dtype=torch.bool)
        if ctx.mask is not None:
            visible_BSK = create_mask(ctx.mask.mask_mod, ctx.mask.shape[0], 1, S, K, device="cpu")[:, 0]
        with torch.enable_grad():
            out = attend(q, k, v, visible_BSK, scale=ctx.spec.scale, softcap=ctx.spec.softcap)
            assert isinstance(out, Tensor)
            return *torch.autograd.grad(out, (q, k, v), grads[0]), None, None


def _soft_cap(c: float) -> Any:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return c * torch.tanh(score / c)

    return score_mod


def interval_block_mask(
    starts_BS: Tensor, window: int | None, causal: bool = True, num_keys: int | None = None
) -> BlockMask:
    """The block mask of rows in which query t sees keys [first[t], t], straight from the interval ends.

    `create_block_mask` evaluates all S² pairs. Because first[t] never decreases, a block's corners decide: block
    (i, j) holds a visible pair only if it reaches from first of its first query to its last query, and is entirely
    visible if its keys lie between first of its last query and its first query. That is (S / 128)² comparisons.

    Args:
        starts_BS: int32, nondecreasing along S; B = 1 gives a mask for any batch size.
        window: keys a query sees, itself included; None for all.
        num_keys: K ≥ S, of whose positions the queries are the last; None for S.
    """
    B, S = starts_BS.shape
    K, device = num_keys or S, starts_BS.device
    t_S = torch.arange(K - S, K, device=device, dtype=torch.int32)
    first_BS = starts_BS if window is None else torch.maximum(starts_BS, t_S - window + 1)
    last_S = t_S if causal else (torch.full_like(t_S, K - 1) if window is None else (t_S + window - 1).clamp_max(K - 1))

    # First and last query of each block of them, and key.
    head_M, head_N = (torch.arange(0, length, BLOCK, device=device) for length in (S, K))
    tail_M, tail_N = (head_M + BLOCK - 1).clamp_max(S - 1), (head_N + BLOCK - 1).clamp_max(K - 1)
    some_BMN = (head_N[None, None, :] <= last_S[tail_M][None, :, None]) & (
        tail_N[None, None, :] >= first_BS[:, head_M][:, :, None]
    )
    full_BMN = (tail_N[None, None, :] <= last_S[head_M][None, :, None]) & (
        head_N[None, None, :] >= first_BS[:, tail_M][:, :, None]
    )

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first = first_BS[0, q] if B == 1 else first_BS[b, q]
        return (k >= first) & (k <= last_S[q])

    def blocks(chosen_BMN: Tensor) -> tuple[Tensor, Tensor]:
        count_B1M = chosen_BMN.sum(-1, dtype=torch.int32)[:, None]
        order_B1MN = chosen_BMN.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)[:, None]
        return count_B1M.contiguous(), order_B1MN.contiguous()

    # The last, ragged blocks reach past S or K: never full, so that the kernel checks every position there.
    full_BMN = full_BMN & (head_N + BLOCK <= K)[None, None, :] & (head_M + BLOCK <= S)[None, :, None]
    return BlockMask.from_kv_blocks(
        *blocks(some_BMN & ~full_BMN), *blocks(full_BMN), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(S, K)
    )
