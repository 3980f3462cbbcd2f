"""Attention over a cache equals its definition at every length. In Triton's interpreter, and on a GPU where there is
one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import attention, cached_pairs, flash_attention, flash_decode
from kernels.flash_attention import decode_kernels, portable
from kernels.flash_attention.decode_kernels import choose_splits
from kernels.flash_attention.testing import assert_rows_within_twice, assert_within_twice, expected_rounding
from kernels.reference import attend

ON_GPU = torch.cuda.is_available() and not portable.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.gpu if ON_GPU else pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A batch of rows of these lengths, the last S tokens of each being queries."""

    lengths: tuple[int, ...]
    capacity: int = 512
    S: int = 1
    heads: tuple[int, int] = (4, 2)
    D: int = 64
    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    sinks: bool = False
    dtype: torch.dtype = FP32
    splits: int | None = None

    def __str__(self) -> str:
        defaults = vars(Case(()))
        told = {name: value for name, value in vars(self).items() if value != defaults[name]}
        return " ".join(f"{name}={value}" for name, value in told.items()).replace("torch.", "")

    @property
    def options(self) -> dict[str, Any]:
        return {"window": self.window, "softcap": self.softcap, "scale": self.scale}


def make(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, caches whose unused slots are NaN, lengths, sinks. The caches are views, as those of one layer among many."""
    (H, G), B = case.heads, len(case.lengths)
    q = torch.randn(B, case.S, H, case.D).mul(2)
    k, v = torch.randn(2, B, 2, case.capacity, G, case.D)[:, :, 1]
    for b, length in enumerate(case.lengths):
        k[b, length:], v[b, length:] = math.nan, math.nan
    q, k, v = (x.to(case.dtype).to(DEVICE) for x in (q, k, v))
    sinks = torch.randn(H, device=DEVICE) if case.sinks else None
    return q, k, v, torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE), sinks


def definition(
    case: Case, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By `attend` under `cached_pairs`, which knows nothing of NaN that nobody sees."""
    visible = cached_pairs(lengths, case.S, case.capacity, case.window)
    k, v = k.nan_to_num(), v.nan_to_num()
    options = {"scale": case.scale, "softcap": case.softcap, "return_lse": True}
    out, lse = attend(q, k, v, visible, sinks=None if sinks is None else sinks.to(q.dtype), **options)
    return out, lse


def in_order(x: Tensor, length: int) -> Tensor:
    """(1, min(length, capacity), G, D): what a row's cache holds, the oldest first."""
    capacity = x.shape[1]
    positions = torch.arange(max(0, length - capacity), length, device=x.device)
    return x[:, positions % capacity]


def rounding(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """What a flash attention must expect of each query: (B, S, H); 0 for those before the row's first token."""
    expected = torch.zeros(q.shape[:3], dtype=torch.float64, device=DEVICE)
    for b, length in enumerate(case.lengths):
        if (S := min(case.S, length)) == 0:
            continue
        row_q, row_k, row_v = q[b : b + 1, -S:].double(), *(in_order(x[b : b + 1], length).double() for x in (k, v))
        options: dict[str, Any] = {"dtype": case.dtype, **case.options}
        row_sinks = None if sinks is None else sinks.double()
        found = expected_rounding(row_q, row_k, row_v, row_sinks, torch.zeros_like(row_q), None, **options)
        expected[b, -S:] = found["out"][0]
    return expected


CASES = [
    Case((1, 17, 512)),
    Case((512, 1, 300), D=40, heads=(3, 1), scale=0.3),
    Case((0, 2, 500), S=3, heads=(8, 2), sinks=True),
    Case((0, 1), splits=1),
    Case((512, 65), splits=1, sinks=True, softcap=3.0),
    Case((512, 64), D=128, heads=(4, 4), splits=7),
    Case((200, 511), window=50, softcap=20.0, splits=5),
    Case((200, 511, 3), window=1),
    Case((1000, 100), window=300, S=9, heads=(8, 1), sinks=True),  # a ring; 72 rows in tiles of 16
    Case((3000, 512, 77), capacity=80, window=77, S=4),  # smaller than a tile
    Case((700, 90), D=256, heads=(2, 1), window=600, dtype=FP16, capacity=610),
    Case((512, 333), dtype=FP16, heads=(8, 2), D=128),
    Case((512, 5), dtype=FP16, heads=(6, 2), D=80, S=2, sinks=True, softcap=10.0),
]
GPU_CASES = [
    Case((1, 5000, 8192, 0), capacity=8192, heads=(32, 8), D=128, dtype=BF16),
    Case((20000, 8191), capacity=8192, heads=(32, 8), D=64, window=8000, S=4, dtype=BF16),
    Case((4096,), capacity=4096, heads=(8, 1), D=256, S=16, dtype=BF16, sinks=True, softcap=30.0),
    Case(tuple(range(1, 300, 3)), capacity=300, heads=(8, 8), D=128, dtype=BF16),
    Case((4096, 4000), capacity=4096, heads=(8, 2), D=128),
]


@pytest.mark.parametrize("case", CASES + (GPU_CASES if ON_GPU else []), ids=str)
def test_error_is_within_twice_that_of_standard_attention(case):
    q, k, v, lengths, sinks = make(case)
    if case.splits is None:
        ours = flash_decode(q, k, v, lengths, sinks=sinks, return_lse=True, **case.options)
    else:
        scale = case.scale or 1 / math.sqrt(case.D)
        options = {**case.options, "scale": scale, "splits": case.splits}
        out, lse = decode_kernels.decode(q, k, v, lengths, sinks, **options)
        ours = out, lse.transpose(1, 2)
    truth = definition(case, q.double(), k.double(), v.double(), lengths, sinks)
    standard = definition(case, q, k, v, lengths, sinks)
    named = [dict(zip(("out", "lse"), pair, strict=True)) for pair in (ours, standard, truth)]
    assert named[0]["out"].dtype == case.dtype
    assert named[0]["lse"].shape == (len(case.lengths), case.heads[0], case.S)
    assert_within_twice(*named)
    assert_rows_within_twice(*named, {"out": rounding(case, q, k, v, sinks)})


def test_the_definition_is_that_of_a_row_by_itself():
    """`cached_pairs` against `attention`, whose keys lie in order."""
    case = Case((5, 64, 150), capacity=64, window=40, S=3)
    q, k, v, lengths, _ = make(case)
    out, _ = definition(case, q, k, v, lengths, None)
    for b, length in enumerate(case.lengths):
        row_k, row_v = (in_order(x[b : b + 1], length) for x in (k, v))
        expected = attention(q[b : b + 1], row_k, row_v, window=40)
        torch.testing.assert_close(out[b : b + 1], expected)


def test_it_is_flash_attention_where_all_rows_are_full():
    case = Case((100, 100), capacity=100, S=5, window=70)
    q, k, v, lengths, _ = make(case)
    expected = flash_attention(q, k, v, window=70)
    torch.testing.assert_close(flash_decode(q, k, v, lengths, window=70), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"sinks": True}, {"window": 300, "softcap": 5.0}], ids=str)
def test_flash_attention_of_few_queries_is_decoding_and_has_its_gradient(options, monkeypatch):
    calls = []
    inner = decode_kernels.decode
    monkeypatch.setattr(decode_kernels, "decode", lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs))
    options = {**options, "sinks": torch.randn(2, device=DEVICE)} if "sinks" in options else options
    leaves = [torch.randn(1, S, heads, 16, device=DEVICE) for S, heads in ((3, 2), (1040, 1), (1040, 1))]
    ours = [x.clone().requires_grad_() for x in leaves]
    truth = [x.double().requires_grad_() for x in leaves]
    dout = torch.randn(1, 3, 2, 16, device=DEVICE)
    out, lse = flash_attention(*ours, return_lse=True, **options)
    assert len(calls) == 1
    expected, expected_lse = attention(*truth, return_lse=True, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(out, ours, dout)
    for found, right in zip(gradients, torch.autograd.grad(expected, truth, dout.double()), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    flash_attention(*ours, implementation="triton", **options)
    assert len(calls) == 1


@pytest.mark.parametrize("splits", [1, 4, 16])
def test_the_grid_is_that_of_the_capacity_whatever_the_lengths(splits, monkeypatch):
    """Splits beyond a row's keys write nothing, and what their memory held (here NaN) is not merged."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(*_shape(shape), math.nan, **kwargs))
    for lengths in ((1, 512), (512, 100), (0, 300)):
        case = Case(lengths)
        q, k, v, lengths_B, _ = make(case)
        out, lse = decode_kernels.decode(q, k, v, lengths_B, None, window=None, softcap=0.0, scale=0.125, splits=splits)
        assert not out.isnan().any()
        expected, expected_lse = definition(case, q, k, v, lengths_B, None)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse.transpose(1, 2), expected_lse, rtol=1e-4, atol=1e-5)


def _shape(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return shape if isinstance(shape[0], tuple | torch.Size) else (shape,)


def test_splits_fill_the_gpu_and_no_more():
    assert choose_splits(8, most=1000, multiprocessors=132) == 32  # 256 of 264 programs that run at once
    assert choose_splits(8, most=4, multiprocessors=132) == 4  # a short cache
    assert choose_splits(264, most=1000, multiprocessors=132) == 1
    assert choose_splits(10_000, most=1000, multiprocessors=132) == 1
    assert choose_splits(270, most=1000, multiprocessors=132) > 1  # a second wave of 6 programs


Q, KV = torch.empty(2, 1, 4, 64, device="meta"), torch.empty(2, 32, 2, 64, device="meta")
LENGTHS = torch.empty(2, dtype=torch.int32, device="meta")


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ((Q, KV, KV, LENGTHS.long()), {}, "lengths is"),
        ((Q, KV, KV, LENGTHS[:1]), {}, r"pass \(2,\), int32"),
        ((Q, KV, KV, LENGTHS), {"window": 0}, "window=0"),
        ((Q, KV, KV, LENGTHS), {"softcap": -1.0}, "softcap=-1.0"),
        ((Q, KV, KV, LENGTHS), {"scale": 0.0}, "scale=0.0"),
        ((Q, KV, KV, LENGTHS), {"sinks": torch.empty(3, device="meta")}, "sinks"),
        ((Q, KV[:, :, :1].expand(2, 32, 3, 64), KV[:, :, :1].expand(2, 32, 3, 64), LENGTHS), {}, "multiple of 3"),
        ((Q.double(), KV.double(), KV.double(), LENGTHS), {}, "float64"),
        ((Q.clone().requires_grad_(), KV, KV, LENGTHS), {}, "no gradient"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(inputs, options, said):
    with pytest.raises(ValueError, match=said):
        flash_decode(*inputs, **options)


def test_the_operator_passes_opcheck():
    q, k, v, lengths, sinks = make(Case((5, 30), capacity=32, sinks=True))
    torch.library.opcheck(torch.ops.flash_gpt.flash_decode.default, (q, k, v, lengths, sinks, 9, 2.0, 0.25))


@pytest.mark.gpu
@pytest.mark.skipif(portable.INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")
@pytest.mark.parametrize("batch", [1, 8, 200])
def test_a_cuda_graph_captured_at_length_1_serves_length_10_000(batch):
    q = torch.randn(batch, 1, 8, 128, dtype=BF16, device="cuda")
    k, v = torch.randn(2, batch, 10_000, 2, 128, dtype=BF16, device="cuda")
    lengths = torch.ones(batch, dtype=torch.int32, device="cuda")
    flash_decode(q, k, v, lengths)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_decode(q, k, v, lengths)
    for length in (1, 10_000, 4_097, 10_000):
        lengths.fill_(length)
        lengths[: batch // 2] = length // 2 + 1
        graph.replay()
        assert torch.equal(out, flash_decode(q, k, v, lengths))
        expected = attend(q.double(), k.double(), v.double(), cached_pairs(lengths, 1, 10_000))
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(portable.INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")
def test_a_cache_of_more_than_2_to_the_31_elements():
    capacity, D = 2**24 + 64, 128
    k, v = (torch.zeros(1, capacity, 1, D, dtype=BF16, device="cuda") for _ in range(2))
    q = torch.ones(1, 1, 1, D, dtype=BF16, device="cuda")
    k[0, -1], v[0, -1] = 10, 7
    lengths = torch.tensor([capacity], dtype=torch.int32, device="cuda")
    assert (flash_decode(q, k, v, lengths) == 7).all()
