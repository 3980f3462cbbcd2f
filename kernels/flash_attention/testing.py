"""How wrong an attention kernel may be: the 2x rule, for whole tensors and for every row.

The truth is `kernels.reference.attention` in float64. A tensor is within the rule if its error is at most twice that of
standard attention in the inputs' dtype (Dao et al. 2022, arXiv:2205.14135, section 4.3 and its tests). A norm over a
whole tensor hides a few bad rows, so each row is judged, too: of out and dq each query's, of dk and dv each key's.

A single row of standard attention may by luck be nearly exact. So a row is granted `LUCK` times the rounding error
that any flash attention must expect there, beside twice the error that standard attention has. `expected_rounding`
derives it from the truth: in a row where one key has all the weight nothing needs rounding, and nothing is granted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import visible_pairs

Results = dict[str, Tensor]
"""Of `out`, `lse`, `dq`, `dk`, `dv`, `dsinks` and `dslopes` those that are known."""

LUCK = 6
"""Standard deviations that a row may be off by: of a million rows about one in 500 runs is."""


def random_starts(B: int, S: int, probability: float) -> Tensor:
    """Documents of random length: `starts` (B, S), int32, where each token begins one with this probability."""
    begins = torch.rand(B, S) < probability
    return torch.where(begins, torch.arange(S), 0).cummax(1).values.int()


def assert_within_twice(
    ours: Results, standard: Results, truth: Results, slack: dict[str, float] | None = None
) -> None:
    """The 2x rule for whole tensors.

    Where many queries see one key, gradients are differences of equal numbers: standard attention may get exactly 0
    and we a rounding error, so a little float32 noise is allowed beside it.

    Args:
        ours, standard: results of the kernel, and of standard attention in the same dtype. truth: in float64.
        slack: by tensor, error that is allowed beside.
    Raises:
        AssertionError: names the tensor, its error and the limit.
    """
    size = max(_finite(x).norm().item() for x in truth.values())
    noise = 16 * torch.finfo(torch.float32).eps * size
    for name, exact in truth.items():
        got = ours[name]
        assert got.shape == exact.shape, name
        assert not got.isnan().any(), f"{name} has NaN"
        assert (got.isinf() == exact.isinf()).all(), f"{name} is infinite elsewhere"
        error, allowed = ((_finite(x) - _finite(exact)).norm().item() for x in (got, standard[name]))
        limit = 2 * allowed + noise + (slack or {}).get(name, 0.0)
        assert error <= limit, f"{name}: error {error:.2e}, standard attention's is {allowed:.2e} (limit {limit:.2e})"


def assert_rows_within_twice(ours: Results, standard: Results, truth: Results, expected: Results) -> None:
    """The 2x rule for every row, (B, S, H) of them in out and dq and (B, S_k, G) in dk and dv.

    Args:
        expected: `expected_rounding` of the same inputs.
    Raises:
        AssertionError: names the tensor, its worst row, and how many rows are beyond the limit.
    """
    for name, granted in expected.items():
        error, allowed = ((x[name].double() - truth[name]).norm(dim=-1) for x in (ours, standard))
        limit = 2 * allowed + LUCK * granted
        beyond = error > limit  # of NaN nothing is true: `assert_within_twice` finds it
        if beyond.any():
            excess = (error - limit).masked_fill(~beyond, -math.inf)
            b, s, h = (int(i) for i in torch.unravel_index(excess.argmax(), error.shape))
            raise AssertionError(
                f"{name}[{b}, {s}, {h}]: error {error[b, s, h]:.2e}, standard attention's is {allowed[b, s, h]:.2e}, "
                f"expected rounding {granted[b, s, h]:.2e}; {int(beyond.sum())} of {beyond.numel()} rows are beyond"
            )


def expected_rounding(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, dout: Tensor, dlse: Tensor | None, *, dtype: torch.dtype,
    causal: bool = True, window: int | None = None, starts: Tensor | None = None, ends: Tensor | None = None,
    softcap: float = 0.0, scale: float | None = None, alibi_slopes: Tensor | None = None,
) -> Results:  # fmt: skip
    """The rounding error that a flash attention must expect in each row, as a standard deviation of its norm.

    Rounded to `dtype` are: before they multiply V, the weights except the row's largest, which is 1; out, which the
    backward begins with; P and dS, before they multiply dO, K and Q; the gradients. Float32 sums are off by some ulps.
    Numbers below the smallest that arithmetic on a GPU keeps may become 0.

    Args:
        q (B, S, H, D), k (B, S_k, G, D), v (B, S_k, G, D_v), dout (B, S, H, D_v), dlse (B, H, S), sinks (H,): float64,
            with values of `dtype`. The rest is `kernels.attention`'s mask, and its slopes.
    Returns:
        out and dq (B, S, H), dk and dv (B, S_k, G), float64.
    """
    (S, H, D), (S_k, G) = q.shape[1:], k.shape[1:3]
    unit, ulps = torch.finfo(dtype).eps / math.sqrt(12), 4 * torch.finfo(torch.float32).eps
    # float16 keeps its subnormal numbers, float32 and bfloat16 lose theirs.
    smallest = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    scale = scale if scale is not None else 1 / math.sqrt(D)
    visible = visible_pairs(S, S_k, causal=causal, window=window, starts=starts, ends=ends, device=q.device)[:, None]

    def by_head(x: Tensor) -> Tensor:  # (B, S, H or G, D) → (B, H, S, D)
        return x.transpose(1, 2).repeat_interleave(H // x.shape[2], 1)

    def by_row(x: Tensor, heads: int) -> Tensor:  # variances (B, H, S) → standard deviations (B, S, heads)
        return x.unflatten(1, (heads, -1)).sum(2).transpose(1, 2).sqrt()

    def squares(x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True)

    def lost(x: Tensor) -> Tensor:
        return x.abs().clamp(max=smallest)

    def rounding(x: Tensor) -> Tensor:
        return (x.to(dtype).double() - x).square() + lost(x).square()

    q, k, v, dout = (by_head(x) for x in (q, k, v, dout))
    scores = q @ k.mT * scale
    slope = torch.ones_like(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap).square()
    if alibi_slopes is not None:
        distance = (torch.arange(S_k - S, S_k, device=q.device)[:, None] - torch.arange(S_k, device=q.device)).abs()
        scores = scores - alibi_slopes[:, None, None] * distance
    scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None, None])
    p = torch.exp(scores - lse).masked_fill(~visible, 0)  # 0, not NaN, where a query sees nothing
    out, dp = p @ v, dout @ v.mT
    delta = (dout * out).sum(-1, keepdim=True)
    dp_slope = (dp - delta + (0 if dlse is None else dlse[..., None])) * slope
    ds = p * dp_slope
    p_error = (ulps * (1 + scores.masked_fill(~visible, 0).abs())).square()  # of exp(score − lse), relative
    p_variance = p.square() * p_error + lost(p).square()
    rounded = (p.masked_fill(p == p.amax(-1, keepdim=True), 0) * unit).square() + p_variance

    out_error = rounding(out)
    delta_variance = (dout.square() * out_error).sum(-1, keepdim=True) + (rounded * dp.square()).sum(-1, keepdim=True)
    delta_variance += ulps**2 * squares(dout) * squares(out)
    ds_variance = ds.square() * unit**2 + lost(ds).square() + p_variance * dp_slope.square()
    ds_variance += (ulps * p).square() * squares(dout) * squares(v).mT
    weight = p * slope
    dq, dk, dv = scale * (ds @ k), scale * (ds.mT @ q), p.mT @ dout
    dk_variance = ds_variance.mT @ squares(q) + weight.square().mT @ (delta_variance * squares(q))
    variances = {
        "out": squares(out_error.sqrt()) + rounded @ squares(v) + ulps**2 * squares(out),
        "dq": scale**2 * (ds_variance @ squares(k) + delta_variance * squares(weight @ k)),
        "dk": scale**2 * dk_variance,
        "dv": (rounding(p) + p_variance).mT @ squares(dout),
    }
    for name, gradient in (("dq", dq), ("dk", dk), ("dv", dv)):
        variances[name] = variances[name] + rounding(gradient).sum(-1, keepdim=True)
    return {name: by_row(x.squeeze(-1), G if name in ("dk", "dv") else H) for name, x in variances.items()}


def _finite(x: Tensor) -> Tensor:
    return x.double().masked_fill(x.isinf(), 0)
