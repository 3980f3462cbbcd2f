"""Attention of a few queries over a cache of keys and values: the public function, and its PyTorch operator.

Another function than `flash_attention`, because it promises other things: rows of different lengths, which only the
device knows; a cache that is a ring; and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import define
from . import op
from .checks import autocast, check_by_head, check_qkv, check_scaling, check_tensor, check_window, shapes


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last S tokens of each row over the keys and values that the row has so far.

    The method is flash-decoding (Dao et al. 2023): keys are split over the GPU, partial outputs are merged by their
    LSE. `reference.attend` under `reference.cached_pairs` is the same function in plain PyTorch.

    The host never waits for the GPU, and the grid follows from shapes alone: a CUDA graph captured at one length serves
    all lengths.

    Args:
        q: (B, S, H, D) in float16, bfloat16 or float32: the tokens at positions lengths − S to lengths − 1. The kernels
            are made for S from 1 to 16. D a multiple of 8 from 16 to 256; a contiguous last dimension.
        k_cache, v_cache: (B, capacity, G, D), dtype and device of q; H divisible by G. They already hold keys and
            values of the S tokens. Position s is in slot s mod capacity: with lengths above the capacity the cache is a
            ring, which needs `window` + S − 1 slots. Unused slots are not read.
        lengths: int32 (B,), on the device of q: tokens of each row, the S new ones included. The values are not
            checked; queries at negative positions see nothing.
        window: how many of the latest keys a query sees, its own included; None for all.
        softcap, scale, sinks, return_lse: as in `flash_attention`.
    Returns:
        out (B, S, H, D), contiguous, in q's dtype. With return_lse (out, lse): lse (B, H, S) float32, natural log. A
        query that sees no key has out 0, lse −inf (or its sink).
    Raises:
        ValueError: inputs that do not fit together or are not supported, a device that cannot run the kernels, or
            inputs that require gradients.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    check_qkv(q, k_cache, v_cache)
    if q.numel() == 0 or k_cache.numel() == 0:
        raise ValueError(f"{shapes(q, k_cache, v_cache)} have a dimension of size 0: skip the call")
    if q.shape[3] != v_cache.shape[3] or q.shape[3] > 256:
        raise ValueError(f"{shapes(q, k_cache, v_cache)}: flash_decode has one head_dim for all, of at most 256")
    if q.shape[1] > k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} queries but {k_cache.shape[1]} slots: the cache holds their keys, too")
    B, _S, _H, D = q.shape
    check_tensor("lengths", lengths)
    if lengths.shape != (B,) or lengths.dtype != torch.int32 or lengths.device != q.device:
        found = f"{tuple(lengths.shape)}, {lengths.dtype} on {lengths.device}"
        raise ValueError(f"lengths is {found}; pass ({B},), int32 on {q.device}: the tokens that each row has")
    check_window(window)
    scale = check_scaling(softcap, scale, D)
    if sinks is not None:
        check_by_head("sinks", sinks, q)
        sinks = sinks.contiguous()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, sinks)):
        raise ValueError("flash_decode has no gradient; call it under torch.no_grad(), or train with flash_attention")
    out, lse = torch.ops.flash_gpt.flash_decode.default(
        q, k_cache, v_cache, lengths.contiguous(), sinks, window, softcap, scale
    )
    return (out, lse.transpose(1, 2)) if return_lse else out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, sinks: Tensor | None, window: int | None,
    softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    reason = op.why_not_on(q.device)
    if reason is not None:
        raise ValueError(reason.replace("flash_attention", "flash_decode"))
    from .decode_kernels import decode

    return decode(q, k_cache, v_cache, lengths, sinks, window=window, softcap=softcap, scale=scale)


def _decode_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


define(
    "flash_decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? sinks, SymInt? window, float softcap, "
    "float scale) -> (Tensor, Tensor)",
    _decode,
    _decode_fake,
)
