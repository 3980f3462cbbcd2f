"""Attention of packed sequences equals attention of each alone, and tokens of no sequence reach nobody. Runs on the GPU
where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import attention as reference
from kernels import flash_attention_varlen, intervals_from_cu_seqlens
from kernels.flash_attention import portable

DEVICE = "cuda" if torch.cuda.is_available() and not portable.INTERPRETED else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
H, G, D = 4, 2, 16


def tokens(T: int, heads: int, d: int = D) -> Tensor:
    return torch.randn(T, heads, d, device=DEVICE, requires_grad=True)


def offsets(lengths: list[int], first: int = 0) -> Tensor:
    return torch.tensor([first, *lengths], device=DEVICE).cumsum(0).int()


def alone(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, causal: bool, **options: Any) -> list[Tensor]:
    """out and LSE of every sequence for itself; of tokens outside 0 and, without sinks, −∞."""
    out = torch.zeros(len(q), H, v.shape[2], device=DEVICE)
    sinks = options.get("sinks")
    lse = torch.full((H, len(q)), -math.inf, device=DEVICE) if sinks is None else sinks[:, None].repeat(1, len(q))
    for (a, b), (c, d) in zip(pairwise(cu.tolist()), pairwise(cu_k.tolist()), strict=True):
        skipped = max(0, b - a - (d - c)) if causal else 0  # queries at positions before the first key
        if b - a > skipped and d > c:
            got, its_lse = reference(
                q[None, a + skipped : b],
                k[None, c:d],
                v[None, c:d],
                causal=causal,
                return_lse=True,
                **options,
            )
            out = torch.cat([out[: a + skipped], got[0], out[b:]])
            lse = torch.cat([lse[:, : a + skipped], its_lse[0], lse[:, b:]], 1)
    return [out, lse]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    grads = [torch.randn_like(x) for x in outputs]
    return list(torch.autograd.grad(outputs, inputs, grads, materialize_grads=True))


MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "causal window": {"causal": True, "window": 20},
    "window": {"causal": False, "window": 9},
}


@pytest.mark.parametrize("more", [{}, {"softcap": 3.0, "scale": 0.2, "sinks": True}], ids=["", "all"])
@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences_equal_each_alone(mask, more):
    """Empty ones too; and tokens before the first and after the last sequence are padding."""
    cu_seqlens = offsets([5, 0, 40, 1, 26, 0, 0], first=3)
    q, k, v = tokens(80, H), tokens(80, G), tokens(80, G)
    options = MASKS[mask] | more
    if more.get("sinks"):
        options["sinks"] = torch.randn(H, device=DEVICE)
    ours = list(flash_attention_varlen(q, k, v, cu_seqlens, 40, return_lse=True, **options))
    assert [x.shape for x in ours] == [(80, H, D), (H, 80)]
    theirs = alone(q, k, v, cu_seqlens, cu_seqlens, **options)
    for x, y in zip(ours + gradients(ours, [q, k, v]), theirs + gradients(theirs, [q, k, v]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_queries_and_keys_may_be_packed_apart(mask):
    """More of either, none of one of them, and padding tokens on both sides of both; V with a head_dim of its own."""
    cu_seqlens, cu_seqlens_k = offsets([7, 0, 20, 12, 3], first=2), offsets([30, 4, 0, 9, 25], first=5)
    q, k, v = tokens(50, H), tokens(80, G), tokens(80, G, 24)
    options = MASKS[mask]
    ours = list(flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, return_lse=True, **options))
    theirs = alone(q, k, v, cu_seqlens, cu_seqlens_k, **options)
    for x, y in zip(ours + gradients(ours, [q, k, v]), theirs + gradients(theirs, [q, k, v]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_lies_outside_reaches_nobody(causal, apart):
    """NaN in the padding tokens, and in the gradients that come to them."""
    T, cu_seqlens = 40, offsets([9, 16], first=6)
    more = {"cu_seqlens_k": cu_seqlens} if apart else {}
    clean = [torch.randn(T, heads, D, device=DEVICE) for heads in (H, G, G)]
    dirty = [x.clone() for x in clean]
    dout = torch.randn(T, H, D, device=DEVICE)
    for x in (*dirty, dirty_dout := dout.clone()):
        x[:6], x[31:] = math.nan, math.nan
    results = []
    for inputs, grad in ((clean, dout), (dirty, dirty_dout)):
        leaves = [x.requires_grad_() for x in inputs]
        out = flash_attention_varlen(*leaves, cu_seqlens, causal=causal, implementation="triton", **more)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
        assert (y[:6] == 0).all()
        assert (y[31:] == 0).all()
        assert (y[6:31] != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "D_v"), [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize("borders", [(40, 301), (0, 128), (70, 930), (300, 1000)], ids=str)
def test_in_16_bits_what_lies_outside_reaches_nobody(borders, D, D_v):
    """On Hopper by the Hopper kernels, whose producer overwrites it in shared memory."""
    first, end = borders
    cu_seqlens = torch.tensor([first, (first + end) // 2, end], dtype=torch.int32, device="cuda")
    shapes = (H, D), (G, D), (G, D_v), (H, D_v)
    clean = [torch.randn(1000, *shape, device="cuda").bfloat16() for shape in shapes]
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[:first], x[end:] = math.nan, math.inf
    results = []
    for *inputs, dout in (clean, dirty):
        leaves = [x.requires_grad_() for x in inputs]
        out, lse = flash_attention_varlen(*leaves, cu_seqlens, deterministic=True, return_lse=True)
        results.append([out.detach(), lse.detach().T, *torch.autograd.grad(out, leaves, dout)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
        assert (x[first:end] != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 192])
def test_in_16_bits_padding_tokens_get_nothing_too(D):
    """On Hopper by the Hopper kernels, which know them by their starts alone."""
    cu_seqlens = torch.tensor([40, 170, 301], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(380, heads, D, device="cuda").bfloat16().requires_grad_() for heads in (H, G, G))
    dout = torch.randn(380, H, D, device="cuda").bfloat16()
    out = flash_attention_varlen(q, k, v, cu_seqlens)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    theirs = [reference(*(x[None, a:b] for x in leaves))[0] for a, b in pairwise(cu_seqlens.tolist())]
    expected = torch.autograd.grad(torch.cat(theirs), leaves, dout[40:301].float())
    torch.testing.assert_close(out[40:301].float(), torch.cat(theirs), rtol=2e-2, atol=2e-2)
    for x, y in zip((out, *gradients), (None, *expected), strict=True):
        assert (x[:40] == 0).all()
        assert (x[301:] == 0).all()
        if y is not None:
            torch.testing.assert_close(x.float(), y, rtol=5e-2, atol=5e-2)


def test_slopes_are_of_distances_within_a_sequence():
    cu_seqlens = offsets([20, 13])
    q, k, v = tokens(33, H), tokens(33, G), tokens(33, G)
    slopes = torch.rand(H, device=DEVICE)
    ours = flash_attention_varlen(q, k, v, cu_seqlens, causal=False, alibi_slopes=slopes)
    theirs, _ = alone(q, k, v, cu_seqlens, cu_seqlens, causal=False, alibi_slopes=slopes)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_packed_sequences_need_no_longest_length():
    q, cu_seqlens = tokens(9, 2), offsets([4, 5])
    assert torch.equal(flash_attention_varlen(q, q, q, cu_seqlens), flash_attention_varlen(q, q, q, cu_seqlens, 5))


def test_the_ends_of_intervals_never_move_back():
    """What the kernels rely on, also where sequences have more queries than keys, or fewer."""
    torch.manual_seed(0)
    for causal in (True, False):
        for window in (None, 1, 3):
            lengths, lengths_k = torch.randint(0, 6, (2, 9)).tolist()
            starts, ends = intervals_from_cu_seqlens(
                offsets(lengths, 2), 50, offsets(lengths_k, 4), causal=causal, window=window
            )
            for bounds in (starts, ends):
                assert (bounds.diff() >= 0).all()
                assert bounds.dtype == torch.int32


PACKED = torch.zeros(8, 4, 16)
ROWS = torch.zeros(2, 8, 4, 16)
CU_SEQLENS = torch.tensor([0, 8], dtype=torch.int32)
REFUSED: dict[str, tuple[list[Tensor], Tensor, dict[str, Any], str]] = {
    "four dimensions": ([ROWS] * 3, CU_SEQLENS, {}, r"packed \(tokens, heads, head_dim\).*use flash_attention"),
    "tokens": (
        [PACKED, *[PACKED[:7]] * 2],
        CU_SEQLENS,
        {},
        r"k \(7, 4, 16\) .*as many tokens each, or in cu_seqlens_k",
    ),
    "keys": ([PACKED, PACKED, PACKED[:7]], CU_SEQLENS, {"cu_seqlens_k": CU_SEQLENS}, "do not fit"),
    "causal": ([PACKED] * 3, CU_SEQLENS, {"causal": None}, "causal=None: use True or False"),
    "window": ([PACKED] * 3, CU_SEQLENS, {"window": 4.0}, r"window=4\.0: use an int"),
    "int64": ([PACKED] * 3, CU_SEQLENS.long(), {}, r"cu_seqlens torch\.int64 \(2,\): pass int32 \(N \+ 1,\)"),
    "matrix": ([PACKED] * 3, CU_SEQLENS[None], {}, r"cu_seqlens torch\.int32 \(1, 2\)"),
    "matrix of keys": (
        [PACKED] * 3,
        CU_SEQLENS,
        {"cu_seqlens_k": CU_SEQLENS[None]},
        r"cu_seqlens_k torch\.int32 \(1, 2\)",
    ),
    "heads": (
        [PACKED, PACKED[:, :3], PACKED[:, :3]],
        CU_SEQLENS,
        {},
        "4 query heads are not a multiple of 3 key/value heads; dimension 1 holds the heads$",
    ),
    "values": (
        [PACKED, PACKED, PACKED[:, :2]],
        CU_SEQLENS,
        {},
        r"q \(8, 4, 16\), .* v \(8, 2, 16\) do not fit: \(T, H, D\) for q, .* \(T_k, H_kv, D_v\) for v$",
    ),
    "sequences": (
        [PACKED] * 3,
        CU_SEQLENS,
        {"cu_seqlens_k": torch.tensor([0, 4, 8], dtype=torch.int32)},
        r"cu_seqlens_k \(3,\) must be \(2,\)",
    ),
    "slopes": (
        [PACKED] * 3,
        CU_SEQLENS,
        {"cu_seqlens_k": CU_SEQLENS, "alibi_slopes": torch.zeros(4)},
        "alibi_slopes with cu_seqlens_k: .* call flash_attention per sequence",
    ),
    "device": (
        [PACKED] * 3,
        CU_SEQLENS.to("meta"),
        {},
        r"cu_seqlens is on meta, q on cpu; move it with \.to\(q\.device\)",
    ),
}


NO_ARGUMENTS = {
    "starts": ({"starts": CU_SEQLENS}, "starts: flash_attention_varlen has no starts: cu_seqlens says where"),
    "mask": ({"attn_mask": None}, "attn_mask: .*describe it by causal, window, cu_seqlens and cu_seqlens_k"),
    "unknown": ({"colour": "red"}, "flash_attention_varlen has no argument 'colour'"),
    "keys' lengths by place": ({"max_seqlen": CU_SEQLENS}, r"pass the keys' as cu_seqlens_k"),
    "list": ({"cu_seqlens_k": [0, 8]}, "cu_seqlens_k is of type list; pass a tensor"),
}


@pytest.mark.parametrize(("options", "message"), NO_ARGUMENTS.values(), ids=NO_ARGUMENTS)
def test_arguments_of_other_functions_are_refused_with_what_to_do(options, message):
    with pytest.raises(TypeError, match=message):
        flash_attention_varlen(PACKED, PACKED, PACKED, CU_SEQLENS, **options)


@pytest.mark.parametrize(("qkv", "cu_seqlens", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_packed_sequences_are_refused_with_what_to_do(qkv, cu_seqlens, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention_varlen(*qkv, cu_seqlens, 8, **options)
