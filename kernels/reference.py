"""The definitions, in plain PyTorch: three ways to one softmax, and attention.

These functions are the truth that every kernel is tested against, so they are written to be read. The softmaxes
follow the FlashAttention derivation (Dao et al. 2022, arXiv:2205.14135, section 3.1; the online form is Milakov and
Gimelshein 2018, arXiv:1805.02867): *safe* subtracts the maximum, *split* computes maxima and sums block by block and
merges them, *online* carries one running maximum and sum from block to block.

Shape suffixes: B batch, S queries, K keys, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def _finite(m: Tensor) -> Tensor:
    """The maximum to subtract: 0 where everything is masked, because −inf − (−inf) would be NaN."""
    return m.masked_fill(m == NEG_INF, 0.0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0: a softmax over nothing is zero, not NaN."""
    return numerator / denominator.masked_fill(denominator == 0, 1.0)


def safe_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Softmax with the maximum subtracted first, so that exp never overflows.

    m = max(x), l = Σ exp(x − m), softmax(x) = exp(x − m) / l. A slice that is −inf throughout gives zeros.

    Args:
        x: any shape, floating point. dim: the dimension to normalise over.
    Returns:
        The same shape and dtype as x.
    """
    m = _finite(x.amax(dim, keepdim=True))
    e = torch.exp(x - m)
    return _divide(e, e.sum(dim, keepdim=True))


def split_softmax(x: Tensor, dim: int = -1, split_size: int = 128) -> Tensor:
    """Softmax from independent blocks: each has its own maximum mᵢ and sum lᵢ; merging them is exact.

    m = max mᵢ, l = Σ lᵢ · exp(mᵢ − m), and block i of the result is exp(xᵢ − mᵢ) · exp(mᵢ − m) / l.

    Args:
        x: any shape, floating point. dim: the dimension to normalise over. split_size: elements per block, ≥ 1.
    Returns:
        The same shape and dtype as x.
    Raises:
        ValueError: split_size is below 1.
    """
    blocks = _blocks(x, dim, split_size)
    maxima = [block.amax(dim, keepdim=True) for block in blocks]
    numerators = [torch.exp(block - _finite(m_i)) for block, m_i in zip(blocks, maxima, strict=True)]
    sums = [numerator.sum(dim, keepdim=True) for numerator in numerators]

    m = _finite(torch.cat(maxima, dim).amax(dim, keepdim=True))
    weights = [torch.exp(m_i - m) for m_i in maxima]
    denominator = sum(weight * l_i for weight, l_i in zip(weights, sums, strict=True))
    merged = [numerator * weight for numerator, weight in zip(numerators, weights, strict=True)]
    return _divide(torch.cat(merged, dim), torch.as_tensor(denominator))


def online_softmax(x: Tensor, dim: int = -1, block_size: int = 128) -> Tensor:
    """Softmax with a running maximum and sum: the form that lets attention see its scores once, block by block.

    For each block: m' = max(m, max(block)), l' = l · exp(m − m') + Σ exp(block − m'). What was summed before is
    rescaled when the maximum grows. A second pass over x writes exp(x − m) / l.

    Args:
        x: any shape, floating point. dim: the dimension to normalise over. block_size: elements per block, ≥ 1.
    Returns:
        The same shape and dtype as x.
    Raises:
        ValueError: block_size is below 1.
    """
    blocks = _blocks(x, dim, block_size)
    m = torch.full_like(blocks[0].amax(dim, keepdim=True), NEG_INF)
    l = torch.zeros_like(m)  # noqa: E741 (the paper's name)
    for block in blocks:
        m_new = torch.maximum(m, block.amax(dim, keepdim=True))
        l = l * torch.exp(m - _finite(m_new)) + torch.exp(block - _finite(m_new)).sum(dim, keepdim=True)  # noqa: E741
        m = m_new
    return _divide(torch.exp(x - _finite(m)), l)


def _blocks(x: Tensor, dim: int, size: int) -> tuple[Tensor, ...]:
    if size < 1:
        raise ValueError(f"block size {size} is not positive; use 1 or more")
    return x.split(size, dim)


def visible_pairs(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which query sees which key: the one definition of every mask.

    The queries are the last `num_queries` of the `num_keys` positions. Query t (in key positions) sees key s when all
    that is asked for holds: s ≤ t (causal), s > t − window (the window's most recent keys, itself included; without
    causal also s < t + window), and s ≥ starts[t] (the first key of t's document).

    Args:
        causal: no query sees a later key.
        window: how many recent keys a query sees, itself included; None for all.
        starts: (B, S) int32, first visible key of each query; None for 0.
        device: of the result; that of `starts` where given.
    Returns:
        bool (B, S, K), or (1, S, K) without `starts`; True where the pair is visible.
    """
    device = starts.device if starts is not None else device
    t = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    s = torch.arange(num_keys, device=device)[None, :]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (s <= t)
    if window is not None:
        visible = visible & (s > t - window) & (s < t + window)
    if starts is None:
        return visible[None]
    return visible & (s >= starts[:, :, None])


def attend(
    q_BSHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    visible_BSK: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Standard attention under an explicit mask: softmax(mask(softcap(scale · q kᵀ))) v.

    The two products run in the inputs' dtype, as in any textbook implementation; the softmax runs in float32 (float64
    for float64 inputs). Two tensors of S × K per head exist in memory: this is what flash attention removes.

    Args:
        q_BSHD: queries. k_BKGD, v_BKGD: keys and values; H must be divisible by G (grouped-query attention).
        visible_BSK: bool, broadcastable in B; True where a query sees a key.
        scale: multiplies the scores; 1/√D when None. softcap: c > 0 replaces a score s with c · tanh(s / c).
        return_lse: also return the natural log of the softmax's denominator.
    Returns:
        out (B, S, H, D) in q's dtype; 0 where a query sees nothing. With return_lse also lse (B, H, S), float32
        (float64 for float64 inputs); −inf where a query sees nothing.
    """
    H, D = q_BSHD.shape[2:]
    G = k_BKGD.shape[2]
    accurate = torch.float64 if q_BSHD.dtype == torch.float64 else torch.float32
    q_BGRSD = q_BSHD.transpose(1, 2).unflatten(1, (G, H // G))
    k_BG1KD = k_BKGD.transpose(1, 2)[:, :, None]
    v_BG1KD = v_BKGD.transpose(1, 2)[:, :, None]
    visible_B11SK = visible_BSK[:, None, None]

    scores = (q_BGRSD @ k_BG1KD.transpose(-1, -2)).to(accurate) * (scale if scale is not None else 1 / math.sqrt(D))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # The lowest finite number, not −inf: torch.softmax (safe, and it saves one tensor for backward) would turn a row
    # of −inf into NaN. Such a row comes out uniform instead and is zeroed below, which also zeroes its gradient.
    scores = scores.masked_fill(~visible_B11SK, torch.finfo(accurate).min)
    sees_any_B11S1 = visible_B11SK.any(-1, keepdim=True)
    out_BGRSD = (torch.softmax(scores, -1).to(v_BKGD.dtype) @ v_BG1KD) * sees_any_B11S1
    out_BSHD = out_BGRSD.flatten(1, 2).transpose(1, 2)
    if not return_lse:
        return out_BSHD
    lse_BGRS = torch.logsumexp(scores, -1).masked_fill(~sees_any_B11S1.squeeze(-1), NEG_INF)
    return out_BSHD, lse_BGRS.flatten(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with its mask described as data; see `visible_pairs` for the mask and `attend` for the arithmetic.

    Args:
        q: (B, S, H, D). k, v: (B, K, G, D) with H divisible by G and K ≥ S: the queries are the last S positions.
        causal, window, starts: the mask. softcap, scale: see `attend`.
        return_lse: also return the log-sum-exp (B, H, S).
    Raises:
        ValueError: shapes that do not fit together, or a window below 1.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: (B, S, H, D) each")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries but {k.shape[1]} keys; the queries are the last of the keys' positions")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a query sees at least itself; use 1 or more, or None")
    visible = visible_pairs(q.shape[1], k.shape[1], causal=causal, window=window, starts=starts, device=q.device)
    return attend(q, k, v, visible, scale=scale, softcap=softcap, return_lse=return_lse)
