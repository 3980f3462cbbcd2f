"""The definitions agree with each other, with PyTorch, and with a loop written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import attention, online_softmax, safe_softmax, split_softmax, visible_pairs
from kernels.reference import tiled_attention, tiled_attention_backward

SOFTMAXES = [
    pytest.param(safe_softmax, id="safe"),
    pytest.param(lambda x, dim: split_softmax(x, dim, split_size=7), id="split"),
    pytest.param(lambda x, dim: online_softmax(x, dim, block_size=7), id="online"),
]


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmaxes_agree_with_torch_to_the_last_bits(softmax, dim):
    x = torch.randn(23, 11, 31, dtype=torch.float64) * 30
    torch.testing.assert_close(softmax(x, dim), torch.softmax(x, dim), rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_softmaxes_survive_what_overflows_exp(softmax):
    x = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4]], dtype=torch.float64)
    torch.testing.assert_close(softmax(x, -1), torch.softmax(x, -1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_masked_entries_get_nothing_and_a_masked_row_is_zero(softmax):
    x = torch.randn(4, 30, dtype=torch.float64)
    x[0, :9] = -math.inf  # a whole block of 7, and part of the next
    x[1, 20:] = -math.inf
    x[2] = -math.inf
    result = softmax(x, -1)
    torch.testing.assert_close(result[[0, 1, 3]], torch.softmax(x, -1)[[0, 1, 3]], rtol=1e-14, atol=1e-17)
    assert (result[2] == 0).all()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), block=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_block_size_does_not_matter(n, block, seed):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10
    expected = torch.softmax(x, -1)
    torch.testing.assert_close(split_softmax(x, -1, block), expected, rtol=1e-13, atol=1e-17)
    torch.testing.assert_close(online_softmax(x, -1, block), expected, rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("softmax", [split_softmax, online_softmax])
def test_a_block_size_of_zero_is_refused(softmax):
    with pytest.raises(ValueError, match="block size 0"):
        softmax(torch.randn(3), -1, 0)


def test_a_tile_size_of_zero_is_refused():
    x, visible = torch.randn(3, 8), visible_pairs(3, 3)[0]
    with pytest.raises(ValueError, match="block size 0"):
        tiled_attention(x, x, x, visible, tile_m=0)
    with pytest.raises(ValueError, match="block size -1"):
        tiled_attention_backward(x, x, x, x, x, x[:, 0], visible, tile_n=-1)


def attention_by_loops(q, k, v, *, causal, window, starts, softcap, scale, sinks) -> tuple[Tensor, Tensor]:
    """Attention, one query at a time, as the documentation words it."""
    (B, S, H, D), (K, G) = q.shape, k.shape[1:3]
    out, lse = torch.zeros_like(q), q.new_zeros(B, H, S)
    for b in range(B):
        for h in range(H):
            for i in range(S):
                t, g = i + K - S, h // (H // G)
                keys = [
                    s
                    for s in range(K)
                    if (s <= t or not causal)
                    and (window is None or (t - window < s < t + window))
                    and (starts is None or s >= starts[b, i])
                ]
                denominator = 0.0 if sinks is None else sinks[h].exp()
                for s in keys:
                    score = q[b, i, h] @ k[b, s, g] * (scale or 1 / math.sqrt(D))
                    if softcap:
                        score = softcap * torch.tanh(score / softcap)
                    out[b, i, h] += score.exp() * v[b, s, g]
                    denominator += score.exp()
                if denominator:
                    out[b, i, h] /= denominator
                lse[b, h, i] = math.log(denominator) if denominator else -math.inf
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(0.0, None), (2.0, 0.3)])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, 0.0, 1.5, 4.0], dtype=torch.float64)])
def test_attention_is_what_the_documentation_says(causal, window, documents, softcap, scale, sinks):
    B, S, K, H, G, D = 2, 7, 9, 4, 2, 8
    q = torch.randn(B, S, H, D, dtype=torch.float64)
    k, v = (torch.randn(B, K, G, D, dtype=torch.float64) for _ in range(2))
    starts = torch.tensor([[0, 0, 3, 3, 6, 6, 6], [0, 4, 4, 4, 4, 8, 20]], dtype=torch.int32) if documents else None
    options = {"causal": causal, "window": window, "starts": starts, "softcap": softcap, "scale": scale, "sinks": sinks}
    out, lse = attention(q, k, v, **options, return_lse=True)
    expected_out, expected_lse = attention_by_loops(q, k, v, **options)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-14)


def test_attention_equals_torch():
    q, k, v = (torch.randn(2, 50, heads, 16, dtype=torch.float64) for heads in (6, 3, 3))
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention(q, k, v), expected.transpose(1, 2), rtol=1e-13, atol=1e-15)


def test_attention_has_the_gradient_of_its_formula():
    q, k, v = (torch.randn(1, 5, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Any:
        # With sinks, the third query sees nothing; without, its lse would be −inf, which has no numerical derivative.
        starts = torch.tensor([[0, 0, 9 if sinks is not None else 2, 2, 2]], dtype=torch.int32)
        return attention(q, k, v, starts=starts, softcap=3.0, sinks=sinks, return_lse=True)

    torch.autograd.gradcheck(call, (q, k, v))
    torch.autograd.gradcheck(call, (q, k, v, sinks))


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    q, k, v = (torch.randn(1, 4, 1, 8, requires_grad=True) for _ in range(3))
    starts = torch.tensor([[0, 9, 0, 9]], dtype=torch.int32)
    out, lse = attention(q, k, v, starts=starts, return_lse=True)
    assert (out[0, [1, 3]] == 0).all()
    assert (lse[0, 0, [1, 3]] == -math.inf).all()
    out.sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert (q.grad[0, [1, 3]] == 0).all()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize(("tile_m", "tile_n"), [(4, 7), (7, 4), (1, 1), (64, 64)])
@pytest.mark.parametrize("mask", ["causal", "full", "window", "documents"])
def test_tiled_attention_and_its_backward_are_attention(tile_m, tile_n, mask):
    S, K, D = 17, 23, 8
    starts = torch.tensor([[0] * 5 + [9] * 4 + [15] * 5 + [99] * 3], dtype=torch.int32)  # the last 3 see nothing
    options = {
        "causal": {},
        "full": {"causal": False},
        "window": {"window": 5},
        "documents": {"causal": False, "starts": starts},
    }[mask]
    q, dout = (torch.randn(S, D, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(K, D, dtype=torch.float64) for _ in range(2))
    leaves = [x[None, :, None].requires_grad_() for x in (q, k, v)]
    expected_out, expected_lse = attention(*leaves, **options, scale=0.3, return_lse=True)
    expected = torch.autograd.grad(expected_out, leaves, dout[None, :, None])

    visible = visible_pairs(S, K, **options)[0]
    tiling = {"scale": 0.3, "tile_m": tile_m, "tile_n": tile_n}
    out, lse = tiled_attention(q, k, v, visible, **tiling)
    gradients = tiled_attention_backward(dout, q, k, v, out, lse, visible, **tiling)
    torch.testing.assert_close(out, expected_out[0, :, 0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, expected_lse[0, 0], rtol=1e-12, atol=1e-14)
    for actual, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, gradient[0, :, 0], rtol=1e-12, atol=1e-14)


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest] + [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)])
        return result


def test_tiled_attention_makes_nothing_larger_than_its_inputs():
    S, D = 96, 16
    q, k, v, dout = (torch.randn(S, D) for _ in range(4))
    visible = visible_pairs(S, S)[0]
    with LargestTensor() as mode:
        out, lse = tiled_attention(q, k, v, visible, tile_m=16, tile_n=16)
        tiled_attention_backward(dout, q, k, v, out, lse, visible, tile_m=16, tile_n=16)
    assert mode.largest == S * D
    with LargestTensor() as mode:
        attention(*(x[None, :, None] for x in (q, k, v)))
    assert mode.largest == S * S


def test_a_tile_that_nobody_sees_is_not_computed():
    q, k, v, dout = (torch.randn(32, 8) for _ in range(4))
    k[24:], v[24:] = math.nan, math.nan
    visible = visible_pairs(32, 32, causal=False)[0]
    visible[:, 24:] = False
    tiling = {"tile_m": 8, "tile_n": 8}
    out, lse = tiled_attention(q, k, v, visible, **tiling)
    gradients = tiled_attention_backward(dout, q, k, v, out, lse, visible, **tiling)
    assert all(x.isfinite().all() for x in (out, lse, *gradients))


def test_queries_are_the_last_positions():
    assert visible_pairs(2, 4)[0].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert visible_pairs(2, 4, window=2)[0].tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 2, 8), (1, 4, 2, 16)), {}, "do not fit"),
        (((1, 4, 3, 8), (1, 4, 2, 8)), {}, "not a multiple"),
        (((1, 5, 2, 8), (1, 4, 2, 8)), {}, "5 queries but 4 keys"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), {"window": 0}, "window=0"),
        (((1, 4, 2, 8), (1, 4, 1, 8)), {"sinks": torch.zeros(1)}, r"sinks \(1,\) must be \(2,\)"),
    ],
)
def test_impossible_shapes_are_refused(shapes, options, message):
    q, k = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)
