"""The definitions, in plain PyTorch: three ways to one softmax, attention, and flash attention's two loops.

These functions are the truth that every kernel is tested against, so they are written to be read;
docs/flash-attention.md explains them in their order here. The softmaxes follow the FlashAttention derivation (Dao et
al. 2022, arXiv:2205.14135, section 3.1; the online form is Milakov and Gimelshein 2018, arXiv:1805.02867): *safe*
subtracts the maximum, *split* computes maxima and sums block by block and merges them, *online* carries one running
maximum and sum from block to block. `attend` and `attention` say what attention is, `tiled_attention` and
`tiled_attention_backward` how flash attention computes it.

Shape suffixes: B batch, S queries, K keys, H query heads, G key/value heads, D head dimension; M queries and N keys of
one tile.
"""

# ruff: noqa: E741 (l is the papers' name for the sum)

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
    l = torch.zeros_like(m)
    for block in blocks:
        m_new = torch.maximum(m, block.amax(dim, keepdim=True))
        l = l * torch.exp(m - _finite(m_new)) + torch.exp(block - _finite(m_new)).sum(dim, keepdim=True)
        m = m_new
    return _divide(torch.exp(x - _finite(m)), l)


def _blocks(x: Tensor, dim: int, size: int) -> tuple[Tensor, ...]:
    return x.split(_positive(size), dim)


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, length, _positive(size))]


def _positive(size: int) -> int:
    if size < 1:
        raise ValueError(f"block size {size} is not positive; use 1 or more")
    return size


def visible_pairs(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which query sees which key: the one definition of every mask.

    The queries are the last `num_queries` of the `num_keys` positions. Query t (in key positions) sees key s when all
    that is asked for holds: s ≤ t (causal), s > t − window (the window's most recent keys, itself included; without
    causal also s < t + window), s ≥ starts[t] (the first key of t's document), and s < ends[t] (where its keys end).

    Args:
        causal: no query sees a later key.
        window: how many recent keys a query sees, itself included; None for all.
        starts: (B, S) int32, first visible key of each query; None for 0.
        ends: (B, S) int32, the key after the last visible one of each query; None for K.
        device: of the result; that of `starts` or `ends` where given.
    Returns:
        bool (B, S, K), or (1, S, K) without `starts` and `ends`; True where the pair is visible.
    """
    device = starts.device if starts is not None else ends.device if ends is not None else device
    t = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    s = torch.arange(num_keys, device=device)[None, :]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (s <= t)
    if window is not None:
        visible = visible & (s > t - window) & (s < t + window)
    visible = visible[None]
    if starts is not None:
        visible = visible & (s >= starts[:, :, None])
    return visible if ends is None else visible & (s < ends[:, :, None])


def cached_pairs(lengths_B: Tensor, num_queries: int, capacity: int, window: int | None = None) -> Tensor:
    """Which query sees which slot of a cache of keys, in which the key of position s lies in slot s mod capacity.

    A row has `lengths` tokens; its queries are the last of them. Slot j holds the latest position that it can.

    Args:
        lengths_B: (B,) integers: tokens of each row, the queries included. num_queries: S.
        window: how many recent keys a query sees, itself included; None for all that the cache holds.
    Returns:
        bool (B, S, capacity), causal.
    """
    last_B11 = (lengths_B.long() - 1)[:, None, None]
    t_BS1 = last_B11 + torch.arange(1 - num_queries, 1, device=lengths_B.device)[:, None]
    s_B1K = last_B11 - (last_B11 - torch.arange(capacity, device=lengths_B.device)) % capacity
    visible_BSK = (s_B1K >= 0) & (s_B1K <= t_BS1)
    return visible_BSK if window is None else visible_BSK & (s_B1K > t_BS1 - window)


def attend(
    q_BSHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    visible_BSK: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias_HSK: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Standard attention under an explicit mask: softmax(mask(softcap(scale · q kᵀ))) v.

    The two products run in the inputs' dtype, as in any textbook implementation; the softmax runs in float32 (float64
    for float64 inputs). Two tensors of S × K per head exist in memory: this is what flash attention removes.

    Args:
        q_BSHD: queries. k_BKGD, v_BKGD: keys and values; H must be divisible by G (grouped-query attention).
        visible_BSK: bool, broadcastable in B; True where a query sees a key.
        scale: multiplies the scores; 1/√D when None. softcap: c > 0 replaces a score s with c · tanh(s / c).
        sinks: (H,), one learnable logit per query head, that of a key without a value: it joins the softmax's
            denominator, Σ exp(s) + exp(sink), and a head can so attend to nothing. Neither scaled nor capped. (Xiao et
            al. 2023, arXiv:2309.17453, name the need; the learnable logit is gpt-oss's, arXiv:2508.10925.)
        bias_HSK: added to the scores, after the soft cap.
        return_lse: also return the natural log of the softmax's denominator.
    Returns:
        out (B, S, H, D), D as v has it, in q's dtype; 0 where a query sees nothing. With return_lse also lse (B, H, S),
        float32 (float64 for float64 inputs); where a query sees nothing, its sink, or −inf without sinks.
    """
    H, D = q_BSHD.shape[2:]
    K, G = k_BKGD.shape[1:3]
    accurate = torch.float64 if q_BSHD.dtype == torch.float64 else torch.float32
    q_BGRSD = q_BSHD.transpose(1, 2).unflatten(1, (G, H // G))
    k_BG1KD = k_BKGD.transpose(1, 2)[:, :, None]
    v_BG1KD = v_BKGD.transpose(1, 2)[:, :, None]
    visible_B11SK = visible_BSK[:, None, None]

    scores = (q_BGRSD @ k_BG1KD.transpose(-1, -2)).to(accurate) * (scale if scale is not None else 1 / math.sqrt(D))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias_HSK is not None:
        scores = scores + bias_HSK.to(accurate).unflatten(0, (G, H // G))
    # The lowest finite number, not −inf: torch.softmax (safe, and it saves one tensor for backward) would turn a row
    # of −inf into NaN. Such a row comes out uniform instead and is zeroed below, which also zeroes its gradient.
    lowest = torch.finfo(accurate).min
    scores = scores.masked_fill(~visible_B11SK, lowest)
    if sinks is not None:  # one more key, the last, whose probability is then dropped
        column_GR11 = sinks.to(accurate).unflatten(0, (G, H // G))[..., None, None]
        scores = torch.cat([scores, column_GR11.expand(*scores.shape[:-1], 1)], -1)
    sees_any_B11S1 = visible_B11SK.any(-1, keepdim=True)
    out_BGRSD = (torch.softmax(scores, -1)[..., :K].to(v_BKGD.dtype) @ v_BG1KD) * sees_any_B11S1
    out_BSHD = out_BGRSD.flatten(1, 2).transpose(1, 2)
    if not return_lse:
        return out_BSHD
    lse_BGRS = torch.logsumexp(scores, -1)
    lse_BGRS = lse_BGRS.masked_fill(lse_BGRS == lowest, NEG_INF)  # neither a key nor a sink
    return out_BSHD, lse_BGRS.flatten(1, 2)


def attention(
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with its mask described as data; see `visible_pairs` for the mask and `attend` for the arithmetic.

    Args:
        q: (B, S, H, D). k: (B, K, G, D). v: (B, K, G, D_v). H divisible by G. The queries are the last S of the K
            positions: K ≥ S, unless `causal` is False.
        causal, window, starts, ends: the mask. softcap, scale, sinks (H,): see `attend`.
        alibi_slopes: (H,): slope · |t − s| is subtracted from the score of query t with key s (Press et al. 2021,
            arXiv:2108.12409).
        return_lse: also return the log-sum-exp (B, H, S).
    Returns:
        out (B, S, H, D_v) in q's dtype. With return_lse (out, lse).
    Raises:
        ValueError: shapes that do not fit together, or a window below 1.
    """
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: (B, S, H, D) each")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries but {k.shape[1]} keys; the queries are the last of the keys' positions")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a query sees at least itself; use 1 or more, or None")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks {tuple(sinks.shape)} must be ({q.shape[2]},): one logit per query head")
    S, K = q.shape[1], k.shape[1]
    visible = visible_pairs(S, K, causal=causal, window=window, starts=starts, ends=ends, device=q.device)
    bias_HSK = None
    if alibi_slopes is not None:
        t_S1, s_K = torch.arange(K - S, K, device=q.device)[:, None], torch.arange(K, device=q.device)
        bias_HSK = -alibi_slopes[:, None, None] * (t_S1 - s_K).abs()
    return attend(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks, bias_HSK=bias_HSK, return_lse=return_lse)


def tiled_attention(
    q_SD: Tensor,
    k_KD: Tensor,
    v_KD: Tensor,
    visible_SK: Tensor,
    *,
    scale: float | None = None,
    tile_m: int = 64,
    tile_n: int = 64,
) -> tuple[Tensor, Tensor]:
    """Flash attention's forward: `attend` for one head, a tile of M queries by N keys at a time.

    The online softmax with one more thing to rescale, the output so far (Dao 2023, arXiv:2307.08691, section 3.1).
    Nothing of size S × K is made: the mask is data here for brevity, the kernels compute each tile's from positions.

    Args:
        q_SD: queries. k_KD, v_KD: keys and values, all in float32 or float64.
        visible_SK: bool; True where a query sees a key. A tile without a visible pair is not computed.
        scale: multiplies the scores; 1/√D when None. tile_m, tile_n: M and N, ≥ 1.
    Returns:
        out (S, D) and lse (S,) as `attend` does.
    Raises:
        ValueError: tile_m or tile_n is below 1.
    """
    scale = scale if scale is not None else 1 / math.sqrt(q_SD.shape[-1])
    out_SD, lse_S = torch.empty_like(q_SD), q_SD.new_empty(len(q_SD))
    for rows in _tiles(len(q_SD), tile_m):
        q_MD = q_SD[rows]
        acc_MD = torch.zeros_like(q_MD)
        m_M1 = q_MD.new_full((len(q_MD), 1), NEG_INF)
        l_M1 = torch.zeros_like(m_M1)
        for keys in _tiles(len(k_KD), tile_n):
            visible_MN = visible_SK[rows, keys]
            if not visible_MN.any():
                continue
            s_MN = (q_MD @ k_KD[keys].T * scale).masked_fill(~visible_MN, NEG_INF)
            m_new = torch.maximum(m_M1, s_MN.amax(-1, keepdim=True))
            p_MN = torch.exp(s_MN - _finite(m_new))
            rescale = torch.exp(m_M1 - _finite(m_new))
            l_M1 = l_M1 * rescale + p_MN.sum(-1, keepdim=True)
            acc_MD = acc_MD * rescale + p_MN @ v_KD[keys]
            m_M1 = m_new
        out_SD[rows] = _divide(acc_MD, l_M1)
        lse_S[rows] = (m_M1 + torch.log(l_M1)).squeeze(-1)
    return out_SD, lse_S


def tiled_attention_backward(
    dout_SD: Tensor,
    q_SD: Tensor,
    k_KD: Tensor,
    v_KD: Tensor,
    out_SD: Tensor,
    lse_S: Tensor,
    visible_SK: Tensor,
    *,
    scale: float | None = None,
    tile_m: int = 64,
    tile_n: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention's backward: probabilities are not kept but computed again, from the scores and lse.

    With P = exp(scores − lse): dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − Δ), dQ = scale · dS K, dK = scale · dSᵀ Q. Here Δ
    is the softmax's row sum Σ P ∘ dP in a form that needs no P, Σ dO ∘ O (Dao et al. 2022, arXiv:2205.14135, app. B).

    Args:
        dout_SD: the gradient of out. out_SD, lse_S: what `tiled_attention` returned for the rest.
    Returns:
        dq (S, D), dk (K, D), dv (K, D).
    Raises:
        ValueError: tile_m or tile_n is below 1.
    """
    scale = scale if scale is not None else 1 / math.sqrt(q_SD.shape[-1])
    dq_SD, dk_KD, dv_KD = torch.zeros_like(q_SD), torch.zeros_like(k_KD), torch.zeros_like(v_KD)
    delta_S1 = (dout_SD * out_SD).sum(-1, keepdim=True)
    for keys in _tiles(len(k_KD), tile_n):
        for rows in _tiles(len(q_SD), tile_m):
            visible_MN = visible_SK[rows, keys]
            if not visible_MN.any():
                continue
            s_MN = (q_SD[rows] @ k_KD[keys].T * scale).masked_fill(~visible_MN, NEG_INF)
            p_MN = torch.exp(s_MN - _finite(lse_S[rows, None]))
            dp_MN = dout_SD[rows] @ v_KD[keys].T
            ds_MN = p_MN * (dp_MN - delta_S1[rows])
            dv_KD[keys] += p_MN.T @ dout_SD[rows]
            dk_KD[keys] += ds_MN.T @ q_SD[rows] * scale
            dq_SD[rows] += ds_MN @ k_KD[keys] * scale
    return dq_SD, dk_KD, dv_KD
