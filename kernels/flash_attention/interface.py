"""The public functions: flash attention for rows (B, S, H, D) and for packed sequences (T, H, D).

Everything a caller can get wrong is said here, once, in plain Python over shapes and dtypes: no value of a tensor is
read, so nothing waits for the GPU and torch.compile traces it without a break.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import op
from .documents import starts_from_cu_seqlens

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(mask(softcap(scale · q kᵀ))) v, without its S × S_k scores ever existing in memory.

    The method is FlashAttention-2's (Dao 2023, arXiv:2307.08691). `reference.attention` is the same function in plain
    PyTorch; `reference.visible_pairs` defines the mask. Differentiable once, through out and lse, in q, k, v and sinks.

    Args:
        q: (B, S, H, D) in float16, bfloat16 or float32, on a CUDA GPU; D a multiple of 8 from 16 to 256. Any strides
            with a contiguous last dimension: a view of a fused QKV projection is read where it is.
        k, v: (B, S_k, H_kv, D), dtype and device of q; H divisible by H_kv. S_k ≥ S: the queries are the last S of
            the S_k positions. Under autocast q, k and v are cast, as F.scaled_dot_product_attention does.
        causal: no query sees a later key.
        window: how many of the most recent keys a query sees, itself included (Hugging Face's `sliding_window`,
            flash-attn's left + 1); without causal as many to the other side. None for all.
        starts: int32 (B, S), nondecreasing along S: the first key that each query sees, for packed documents (see
            `starts_from_cu_seqlens` and `starts_from_separators`). None for 0. The values are not checked.
        softcap: c > 0 replaces a score s with c · tanh(s / c) (Gemma 2, arXiv:2408.00118); 0 for none.
        scale: multiplies the scores, above 0; 1/√D when None.
        sinks: (H,) floating point: a logit per query head that joins the softmax's denominator and has no value, so
            that a head can attend to nothing (gpt-oss). None for none.
        deterministic: ask for gradients that are bitwise the same on every run; torch.use_deterministic_algorithms asks
            for all calls. Only the Hopper kernels' dq, up to head_dim 128, is otherwise not.
        return_lse: also return the log-sum-exp.
        implementation: "hopper", for 16-bit inputs on sm_90; "triton", the portable kernels, on every GPU from sm_80,
            and in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1); "auto", hopper where it can, else triton.
    Returns:
        out (B, S, H, D), contiguous, in q's dtype. With return_lse (out, lse): lse (B, H, S) float32, the natural log
        of the softmax's denominator. A query that sees no key gives out 0, lse −inf (or its sink) and gradients 0.
    Raises:
        ValueError: inputs that do not fit together or are not supported, or a device that cannot run the kernels.
    """
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v)
    S_k, D = k.shape[1], k.shape[3]
    _check_causal(causal)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int | torch.SymInt)):
        raise ValueError(f"window={window!r}: use a whole number (of keys, the query's own included), or None for all")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a query sees at least itself; use 1 or more, or None for all keys")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap={softcap}: use a cap above 0, or 0 for none")
    if scale is None:
        scale = 1 / math.sqrt(D)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: use a number above 0 (to flip the scores' sign, pass -q)")
    if starts is not None:
        _check_starts(starts, q)
    if sinks is not None:
        _check_sinks(sinks, q)
    if implementation not in ("auto", *op.IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is unknown; use auto, {', '.join(op.IMPLEMENTATIONS)}")

    if window is not None and window >= S_k:
        window = None  # hides nothing; so no position plus window can pass 2³¹ either
    starts = None if starts is None else starts.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    out, lse = torch.ops.flash_gpt.flash_attention.default(
        q, k, v, starts, sinks, causal, window, softcap, scale, deterministic, implementation
    )
    return (out, lse) if return_lse else out


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    deterministic: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `flash_attention`, for code that keeps its inputs and results itself (context parallelism).

    Args:
        dout: (B, S, H, D), the gradient of out. out, lse: what `flash_attention(..., return_lse=True)` returned, lse
            contiguous. The rest: as it was given there; what is wrong with it was said there.
    Returns:
        dq (B, S, H, D), dk and dv (B, S_k, H_kv, D), contiguous.
    """
    S_k, D = k.shape[1], k.shape[3]
    window = None if window is not None and window >= S_k else window
    scale = 1 / math.sqrt(D) if scale is None else scale
    starts = None if starts is None else starts.contiguous()
    dq, dk, dv, _ = torch.ops.flash_gpt.flash_attention_backward.default(
        dout, None, q, k, v, out, lse, starts, None, causal, window, softcap, scale, deterministic, implementation
    )
    return dq, dk, dv


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal self-attention of sequences packed end to end, by the flash-attn package's conventions.

    The packed sequences are one row of documents: `flash_attention(q[None], ..., starts=starts_from_cu_seqlens(...))`.

    Args:
        q: (T, H, D). k, v: (T, H_kv, D). T tokens; those from cu_seqlens[N] on are padding, attended among themselves.
        cu_seqlens: int32 (N + 1,), nondecreasing from 0: sequence i holds the tokens [cu_seqlens[i], cu_seqlens[i+1]).
            Empty sequences are allowed, so a tensor of fixed size can repeat the end.
        max_seqlen: has its place in flash-attn's argument order and is not read: the loops end where each sequence
            does. So no caller needs to fetch a length from the GPU.
        causal: must stay True. In the non-causal form a query would stop seeing keys where its sequence ends, and the
            mask (first visible key, causal end) has no such second end.
        window, softcap, scale, sinks, deterministic, return_lse, implementation: as in `flash_attention`.
    Returns:
        out (T, H, D). With return_lse (out, lse): lse (H, T) float32.
    Raises:
        ValueError: as `flash_attention`; and causal=False.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{_shapes(q, k, v)}: flash_attention_varlen takes packed "
            "(tokens, heads, head_dim), as many tokens each; for (batch, sequence, heads, head_dim) use flash_attention"
        )
    _check_causal(causal)
    if not causal:
        raise ValueError(
            "causal=False: a query would see the sequences packed after its own; "
            "call flash_attention(..., causal=False) once per sequence, or on a batch of sequences of one length"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}; move it with .to(q.device)")
    result = flash_attention(
        q[None],
        k[None],
        v[None],
        window=window,
        starts=starts_from_cu_seqlens(cu_seqlens, q.shape[0]),
        softcap=softcap,
        scale=scale,
        sinks=sinks,
        deterministic=deterministic,
        return_lse=return_lse,
        implementation=implementation,
    )
    return result[0] if isinstance(result, Tensor) else (result[0][0], result[1][0])


def _why_not_supported(head_dim: int, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"flash_attention computes in float16, bfloat16 and float32, not {dtype}; cast q, k and v"
    if head_dim > 256:
        remedy = f"use {op.PACKAGE}.attention (plain PyTorch, S × S scores in memory)"
        return f"flash_attention takes a head_dim of at most 256, not {head_dim}; {remedy}"
    if head_dim % 8 or head_dim < 16:
        remedy = "pad q, k and v with zeros to the next one, pass scale=1/√(unpadded head_dim) and cut the output"
        return f"flash_attention takes a head_dim that is a multiple of 8 from 16 to 256, not {head_dim}; {remedy}"
    return None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as for PyTorch's own attention: operators are not on its list."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # autocast does not know meta
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{_shapes(q, k, v)} must be (batch, sequence, heads, head_dim) each")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{_shapes(q, k, v)} do not fit: (B, S, H, D) for q and (B, S_k, H_kv, D) for k and v "
            "(from PyTorch's (B, H, S, D) use .transpose(1, 2))"
        )
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(f"{_shapes(q, k, v)} have a dimension of size 0: nothing to attend to; skip the call")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads; "
            "dimension 2 holds the heads (from PyTorch's (B, H, S, D) use .transpose(1, 2))"
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} queries but {k.shape[1]} keys: the queries are the last of the keys' positions; "
            "pass a key for every query"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device} and v on {v.device}; move them to one device")
    reason = _why_not_supported(q.shape[3], q.dtype)
    if reason is not None:
        raise ValueError(reason)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(
                f"{name}'s last dimension is not contiguous (strides {x.stride()}); pass {name}.contiguous()"
            )


def _check_causal(causal: bool) -> None:
    if not isinstance(causal, bool):
        raise ValueError(f"causal={causal!r}: use True or False")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"


def _check_starts(starts: Tensor, q: Tensor) -> None:
    B, S = q.shape[:2]
    if starts.shape != (B, S):
        raise ValueError(
            f"starts {tuple(starts.shape)} must be ({B}, {S}), one for each query; "
            f"to use one row for the whole batch pass starts.expand({B}, {S})"
        )
    if starts.dtype != torch.int32:
        raise ValueError(f"starts is {starts.dtype}; pass starts.int()")
    if starts.device != q.device:
        raise ValueError(f"starts is on {starts.device}, q on {q.device}; move it with .to(q.device)")


def _check_sinks(sinks: Tensor, q: Tensor) -> None:
    if sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be ({q.shape[2]},): one logit per query head")
    if sinks.dtype not in DTYPES:
        raise ValueError(f"sinks is {sinks.dtype}; pass float32, float16 or bfloat16")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}, q on {q.device}; move it with .to(q.device)")
