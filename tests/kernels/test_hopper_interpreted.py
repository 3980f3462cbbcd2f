"""The Hopper kernels, run on a CPU by `gluon_interpreter`, give float64's results: their arithmetic, and which tile
goes from whom to whom and when."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import gluon_interpreter

from kernels import attention, intervals_from_cu_seqlens

BF16 = torch.bfloat16
HEAD_DIMS = [
    (64, 64), (192, 128),
    *(pytest.param(D, D, marks=pytest.mark.slow) for D in (96, 128, 136, 192, 256)),
]  # fmt: skip


@cache
def hopper() -> Any:
    return gluon_interpreter.hopper(multiprocessors=3)


def inputs(S: int, D: int, D_v: int, heads: tuple[int, int] = (2, 1)) -> tuple[Tensor, ...]:
    """q, k, v and dout."""
    torch.manual_seed(0)
    shapes = (heads[0], D), (heads[1], D), (heads[1], D_v), (heads[0], D_v)
    return tuple(torch.randn(1, S, *shape).to(BF16) for shape in shapes)


def run(tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """out, lse, dq, dk and dv."""
    q, k, v, dout = tensors
    deterministic = options.pop("deterministic", False)
    starts, ends = options.pop("starts", None), options.pop("ends", None)
    options = {"causal": True, "window": None, "softcap": 0.0, "scale": 1 / math.sqrt(q.shape[3])} | options
    out, lse = hopper().forward(q, k, v, starts, ends, None, **options)
    gradients = hopper().backward(
        dout, None, q, k, v, out, lse, starts, ends, None, **options, deterministic=deterministic
    )
    return [out, lse, *gradients[:3]]


def assert_right(got: list[Tensor], tensors: tuple[Tensor, ...], **options: Any) -> None:
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    out, lse = attention(*leaves, **options, return_lse=True)
    expected = [out, lse, *torch.autograd.grad(out, leaves, tensors[3].double())]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=2e-2, atol=1e-2 * y.abs().max().item())


@pytest.mark.parametrize(("D", "D_v"), HEAD_DIMS)
def test_results_are_those_of_float64(D, D_v):
    tensors = inputs(200, D, D_v)
    assert_right(run(tensors), tensors)


OPTIONS = [{"causal": False}, {"window": 50}, {"softcap": 3.0}, {"deterministic": True}]


@pytest.mark.slow
@pytest.mark.parametrize(("D", "D_v"), [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_are_those_of_float64_with_other_masks_and_grouped_heads(D, D_v, options):
    tensors = inputs(256, D, D_v, heads=(4, 2))
    masks = {name: value for name, value in options.items() if name != "deterministic"}
    assert_right(run(tensors, **options), tensors, **masks)


@pytest.mark.parametrize(("D", "D_v"), HEAD_DIMS)
@pytest.mark.parametrize("borders", [(40, 151), pytest.param((128, 190), marks=pytest.mark.slow)], ids=str)
def test_what_lies_outside_of_packed_sequences_reaches_nobody(D, D_v, borders):
    first, end = borders
    cu_seqlens = torch.tensor([first, (first + end) // 2, end], dtype=torch.int32)
    starts, ends = intervals_from_cu_seqlens(cu_seqlens, 192, causal=True)
    clean = inputs(192, D, D_v, heads=(1, 1))
    dirty = tuple(x.clone() for x in clean)
    for x in dirty:
        x[:, :first], x[:, end:] = math.nan, math.inf
    # deterministic: dQ's sums in one order
    got, expected = (run(tensors, starts=starts, ends=ends, deterministic=True) for tensors in (dirty, clean))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    for x in (got[0], *got[2:]):
        assert (x[:, :first] == 0).all()
        assert (x[:, end:] == 0).all()
        assert (x[:, first:end] != 0).any()


def test_a_last_tile_that_the_queries_fill_in_part_is_computed_once(monkeypatch):
    forward_pass = vars(hopper())["launches"].forward_kernel.__globals__
    store, stored = forward_pass["store_panels"], []
    monkeypatch.setitem(forward_pass, "store_panels", lambda *args: stored.append(args) or store(*args))
    q, k, v, _ = inputs(280, 64, 64, heads=(1, 1))
    out, _ = hopper().forward(q, k, v, None, None, None, causal=True, window=50, softcap=0.0, scale=0.125)
    expected = attention(*(x.double() for x in (q, k, v)), window=50)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())
    assert len(stored) == 6, "two consumers' outputs of three tiles"
