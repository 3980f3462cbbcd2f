"""The public functions: flash attention for rows (B, S, H, D) and for packed sequences (T, H, D)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import op
from .checks import (
    NO,
    NO_VARLEN,
    are_same,
    autocast,
    check_bounds,
    check_by_head,
    check_causal,
    check_qkv,
    check_scaling,
    check_tensor,
    check_window,
    holds,
    refuse,
    shapes,
)
from .documents import intervals_from_cu_seqlens


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: str = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(mask(softcap(scale · q kᵀ))) v, without its S × S_k scores ever existing in memory.

    The method is FlashAttention-2's (Dao 2023, arXiv:2307.08691). `reference.attention` is the same function in plain
    PyTorch; `reference.visible_pairs` defines the mask. Differentiable once, through out and lse, in q, k, v, sinks and
    alibi_slopes; a gradient that nothing asks for is not computed. torch.func's grad and vmap work, jvp does not.

    Args:
        q: (B, S, H, D) in float16, bfloat16 or float32, on a CUDA GPU; D a multiple of 8 from 16 to 576, in float32 to
            256. Any strides with a contiguous last dimension: a view of a fused QKV projection is read where it is.
        k: (B, S_k, H_kv, D), dtype and device of q; H divisible by H_kv. The queries are the last S of the S_k
            positions: S_k ≥ S, unless `causal` is False.
        v: (B, S_k, H_kv, D_v), D_v like D, but not always D (192 and 128, 576 and 512 in latent attention). Under
            autocast q, k and v are cast as in F.scaled_dot_product_attention; float64 is not cast.
        causal: no query sees a later key.
        window: how many of the latest keys a query sees, its own included (Hugging Face's `sliding_window`,
            flash-attn's left + 1); without causal as many on the other side, too. None for all.
        starts: int32 (B, S), nondecreasing along S: the first key that each query sees, for packed documents (see
            `starts_from_cu_seqlens` and `starts_from_separators`). None for 0. The values are not checked.
        ends: int32 (B, S), nondecreasing along S, with causal=False: query t sees the keys [starts[t], ends[t]). None
            for S_k. The values are not checked.
        softcap: c > 0 replaces a score s with c · tanh(s / c) (Gemma 2, arXiv:2408.00118); 0 for none.
        scale: multiplies the scores, above 0; 1/√D when None.
        sinks: (H,) floating point: a logit per query head that joins the softmax's denominator and has no value, so
            that a head can attend to nothing (gpt-oss). None for none.
        alibi_slopes: (H,) floating point: slope · |t − s| is subtracted from the score of query t with key s, after the
            soft cap (ALiBi, arXiv:2108.12409; flash-attn's convention). None for none.
        deterministic: gradients with the same bits on every run. torch.use_deterministic_algorithms(True) sets it for
            all calls. Without it only one gradient may differ: dq of the Hopper kernels, up to head_dim 128.
        return_lse: also return the log-sum-exp.
        implementation: which kernels run.
            "hopper": 16-bit inputs on sm_90; D up to 256, D_v like D or 128 with D 192; without ends, alibi_slopes,
            S above S_k.
            "triton": the portable kernels, on every GPU from sm_80, and in Triton's interpreter on CPU tensors
            (TRITON_INTERPRET=1).
            "auto": hopper where it can, else triton; gradients by triton where only those of q, or only those of k and
            v, are wanted; the kernels of `flash_decode` where at most 16 queries see 1,024 keys or more, without
            starts, ends and alibi_slopes.
    Returns:
        out (B, S, H, D_v), contiguous, in q's dtype. With return_lse (out, lse): lse (B, H, S) float32, the natural log
        of the softmax's denominator. A query that sees no key has out 0, lse −inf (or its sink) and gradients 0. An
        empty batch, no queries and no keys are allowed.
    Raises:
        ValueError: inputs that do not fit together or are not supported, or a device that cannot run the kernels.
        TypeError: an unknown argument; one that other libraries have (dropout_p, attn_mask, …) names what to use.

    NaN and infinity in a key or value also reach queries that do not see it, if their tile has queries that do, or an
    edge of the mask: a masked key has the weight 0, and 0 · NaN is NaN. PyTorch's kernels do the same.

    The backward pass computes a weight from its score and lse, a float32. With scores above 2¹⁴, gradients are exact
    for rows in which one key has all the weight; others are off by the rounding of lse, 1 % at 2¹⁴ and more with larger
    scores. out is exact; only the Hopper kernels overflow with scores of 10⁹ and more: for these pass
    implementation="triton".
    """
    if others:
        refuse("flash_attention", others, NO)
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    check_causal(causal)
    if starts is not None:
        check_bounds("starts", starts, q)
    if ends is not None:
        check_bounds("ends", ends, q)
        if causal:
            raise ValueError("ends with causal=True: pass causal=False, and ends of at most a query's position + 1")
    out, lse = _attend(
        q, k, v, starts, ends, sinks, alibi_slopes, causal, window, softcap, scale, deterministic, implementation
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
        dout: (B, S, H, D_v), the gradient of out.
        out, lse: what `flash_attention(..., return_lse=True)` returned.
        q, k, v and the rest: as they were given there, under the same autocast. Shapes are not checked again.
    Returns:
        dq (B, S, H, D), dk (B, S_k, H_kv, D) and dv (B, S_k, H_kv, D_v), contiguous.
    Raises:
        ValueError: dout has not the shape and dtype of out, or another dtype than q, k and v.
    """
    q, k, v = autocast(q, k, v)
    check_causal(causal)
    check_window(window)
    if q.dtype != out.dtype:
        raise ValueError(f"q is {q.dtype}, out {out.dtype}; pass q, k and v as flash_attention had them")
    if not are_same(dout.shape, out.shape) or dout.dtype != out.dtype:
        raise ValueError(
            f"dout {tuple(dout.shape)} in {dout.dtype} is the gradient of out, {tuple(out.shape)} in {out.dtype}; pass "
            "one of its shape, with .to(out.dtype)"
        )
    starts = None if starts is None else starts.contiguous()
    scale = check_scaling(softcap, scale, q.shape[3])
    wanted = [True, True, True, False, False]  # of q, k, v, sinks, alibi_slopes
    dq, dk, dv, _, _ = op.differentiate(
        dout, None, q, k, v, out, lse.contiguous(), starts, None, None, None, causal, window, softcap, scale,
        deterministic, implementation, wanted,
    )  # fmt: skip
    return dq, dk, dv


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: str = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences packed end to end, by the flash-attn package's conventions.

    The packed sequences are one row, and `intervals_from_cu_seqlens` says which of its keys each query sees. Tokens
    before cu_seqlens[0] and from cu_seqlens[N] on belong to no sequence: out 0, gradients 0. They are read as 0: what
    lies there, NaN included, reaches no token of a sequence.

    Args:
        q: (T, H, D). k: (T_k, H_kv, D). v: (T_k, H_kv, D_v). Without `cu_seqlens_k` T_k is T.
        cu_seqlens: int32 (N + 1,), nondecreasing: sequence i holds the tokens [cu_seqlens[i], cu_seqlens[i+1]). Empty
            sequences are allowed, so a tensor of fixed size can repeat the end. The values are not checked.
        max_seqlen: accepted for the argument order of flash-attn's packed functions, and not read: the loops end where
            each sequence does, so no caller needs to fetch a length from the GPU.
        cu_seqlens_k: int32 (N + 1,), where the keys of each sequence lie, if they are packed apart (cross-attention, a
            cached prefix): queries of sequence i see keys of sequence i. None for cu_seqlens.
        causal: the queries of a sequence are the last of its keys' positions, and see no later key. In a sequence with
            more queries than keys the first queries see nothing.
        window, softcap, scale, sinks, alibi_slopes, deterministic, return_lse, implementation: as in `flash_attention`;
            no alibi_slopes with cu_seqlens_k. The Hopper kernels do causal self-attention alone.
    Returns:
        out (T, H, D_v). With return_lse (out, lse): lse (H, T) float32.
    Raises:
        ValueError, TypeError: as `flash_attention`.
    """
    if others:
        refuse("flash_attention_varlen", others, NO_VARLEN)
    if isinstance(max_seqlen, Tensor) and max_seqlen.dim() > 0:
        raise TypeError("max_seqlen is a tensor of lengths; pass the keys' as cu_seqlens_k=...")
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, packed=True)
    if cu_seqlens_k is None and not holds(q.shape[0] == k.shape[0]):
        raise ValueError(
            f"{shapes(q, k, v)}: pass as many tokens each, or in cu_seqlens_k where the keys' sequences lie"
        )
    if cu_seqlens_k is not None and alibi_slopes is not None:
        raise ValueError(
            "alibi_slopes with cu_seqlens_k: the distances are not those of the row; call flash_attention per sequence"
        )
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if x is None:
            continue
        check_tensor(name, x)
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; move it with .to(q.device)")
    check_causal(causal)
    check_window(window)
    starts, ends = intervals_from_cu_seqlens(cu_seqlens, q.shape[0], cu_seqlens_k, causal=causal, window=window)
    if cu_seqlens_k is not None:
        causal, window = False, None  # the intervals have it all
    rows = q[None], k[None], v[None]
    out, lse = _attend(
        *rows, starts, ends, sinks, alibi_slopes, causal, window, softcap, scale, deterministic, implementation
    )
    return (out[0], lse[0]) if return_lse else out[0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None,
    alibi_slopes: Tensor | None, causal: bool, window: int | None, softcap: float, scale: float | None,
    deterministic: bool, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator on rows (B, S, H, D), called with what it may be called with."""
    if causal and not holds(q.shape[1] <= k.shape[1]):
        raise ValueError(
            f"{q.shape[1]} queries but {k.shape[1]} keys: with a causal mask the queries are the last of the keys' "
            "positions; pass a key for every query, or causal=False"
        )
    check_window(window)
    scale = check_scaling(softcap, scale, q.shape[3])
    for name, x in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if x is not None:
            check_by_head(name, x, q)
    if implementation not in ("auto", *op.IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is unknown; use auto, {', '.join(op.IMPLEMENTATIONS)}")
    starts, ends, sinks, slopes = (None if x is None else x.contiguous() for x in (starts, ends, sinks, alibi_slopes))
    return op.attend(
        q, k, v, starts, ends, sinks, slopes, causal, window, softcap, scale, deterministic, implementation
    )
