"""Products of one row: the kernel equals its plain twin, on the GPU where there is one, else in Triton's
interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_process import compiled

from kernels import matvec_kernel
from kernels.flash_attention.portable import INTERPRETED
from kernels.matvec import matvec, matvec_reference
from kernels.matvec_kernel import choose_tiles

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter is NumPy, which warns of what lanes past the end compute.
ignored = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
on_this_device = pytest.mark.gpu if DEVICE == "cuda" else ignored
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    K: int = 128
    N: int = 24
    norm: bool = False
    bias: bool = False
    swiglu: bool = False
    residual: bool = False
    weights: torch.dtype = FP32
    x: torch.dtype = FP32
    out: torch.dtype = FP32

    def __str__(self) -> str:
        defaults = vars(Case())
        told = {name: value for name, value in vars(self).items() if value != defaults[name]}
        return " ".join(f"{name}={value}" for name, value in told.items()).replace("torch.", "") or "plain"


def make(case: Case, device: str = DEVICE) -> tuple[Any, ...]:
    """The operator's arguments: numbers of many sizes; no weight of 0 or 1."""
    M = 2 * case.N if case.swiglu else case.N
    x = 3 * torch.randn(1, 1, case.K)
    weight = torch.randn(M, case.K) / case.K**0.5
    bias, norm, residual = torch.randn(M), 1 + 0.2 * torch.randn(case.K), torch.randn(1, 1, case.N)
    wanted = ((bias, case.bias), (norm, case.norm), (residual, case.residual))
    bias, norm, residual = (t.to(device) if is_wanted else None for t, is_wanted in wanted)
    x, weight = x.to(device, case.x), weight.to(device, case.weights)
    return x, weight, bias, norm, 1e-5, case.swiglu, residual, case.out


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in float64, and the result, too."""
    return *(t.double() if isinstance(t, Tensor) else t for t in arguments[:-1]), torch.float64


CASES = [
    Case(),
    Case(K=72, N=13, norm=True, bias=True, residual=True),
    Case(K=100, N=7, swiglu=True, bias=True, norm=True),
    Case(K=8, N=1, swiglu=True, residual=True),
    Case(K=300, N=130, weights=FP16, x=FP16, out=FP16, bias=True),
    Case(K=2048, N=6, weights=FP16, norm=True, swiglu=True, out=FP16),
]


@on_this_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_its_plain_twin(case):
    arguments = make(case)
    found = matvec_kernel.matvec(*arguments)
    assert (found.dtype, found.shape) == (case.out, (1, 1, case.N))
    limits = {"rtol": 1e-3, "atol": 1e-3} if case.out == FP16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, matvec_reference(*arguments), **limits)


@on_this_device
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_programs_go_through_many_tiles(case, monkeypatch):
    monkeypatch.setattr(matvec_kernel, "BYTES", 512)  # a row, or gate and up
    monkeypatch.setattr(matvec_kernel, "multiprocessors", lambda device: 1)
    arguments = make(case)
    torch.testing.assert_close(matvec_kernel.matvec(*arguments), matvec_reference(*arguments), rtol=1e-4, atol=1e-5)


def test_a_tile_has_as_many_rows_as_fit():
    assert choose_tiles(2048, 2, swiglu=False) == (8, 2048, 8)
    assert choose_tiles(2048, 4, swiglu=False) == (4, 2048, 8)
    assert choose_tiles(14336, 2, swiglu=False) == (1, 16384, 8)
    assert choose_tiles(16384, 2, swiglu=True) == (2, 16384, 16)  # both halves, with as many more threads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_twin_is_made_of_the_modules_of_a_transformer(case):
    arguments = doubled(make(case, "cpu"))
    x, weight, bias, norm, eps, swiglu, residual, _ = arguments
    if norm is not None:
        x = torch.nn.functional.rms_norm(x, (case.K,), norm, eps)
    y = torch.nn.functional.linear(x, weight, bias)
    if swiglu:
        y = torch.nn.functional.silu(y[..., : case.N]) * y[..., case.N :]
    expected = y if residual is None else residual + y
    torch.testing.assert_close(matvec_reference(*arguments), expected)


@on_this_device
def test_numbers_past_the_end_are_not_read():
    """In a buffer of NaN; rows of the weight are read whole, K of the next row would be NaN."""
    case = Case(K=40, N=5, norm=True, residual=True, swiglu=True)
    x, weight, bias, norm, eps, swiglu, residual, dtype = make(case)

    def within(t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + 4096,), float("nan"), device=DEVICE)
        buffer[: t.numel()] = t.flatten()
        return buffer[: t.numel()].view(t.shape)

    expected = matvec_reference(x, weight, bias, norm, eps, swiglu, residual, dtype)
    inside = [within(t) for t in (x, weight, norm, residual)]
    found = matvec_kernel.matvec(inside[0], inside[1], bias, inside[2], eps, swiglu, inside[3], dtype)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@on_this_device
def test_a_row_of_zeros_has_a_norm():
    arguments = make(Case(norm=True, bias=True))
    found = matvec(torch.zeros_like(arguments[0]), arguments[1], arguments[2], norm=arguments[3], eps=1e-5)
    torch.testing.assert_close(found[0, 0], arguments[2])


def test_the_operator_passes_opcheck():
    for case in (Case(), Case(norm=True, bias=True, swiglu=True, residual=True, out=FP16)):
        torch.library.opcheck(torch.ops.flash_gpt.matvec.default, make(case))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_configuration_compiles_and_does_not_spill(architecture):
    found = compiled("matvec", architecture)
    assert len(found) == 12
    for row in found:
        assert row["stack"] == 0, row
        assert row["registers"] <= 144 or row["dtype"] == "fp32", row


# ---- on a GPU, at real sizes

REAL = [
    Case(K=2048, N=3072, norm=True, weights=BF16, out=BF16),
    Case(K=2048, N=8192, norm=True, swiglu=True, weights=BF16, out=BF16),
    Case(K=8192, N=2048, residual=True, weights=BF16, x=BF16),
    Case(K=14336, N=4096, residual=True, weights=BF16, x=BF16),
    Case(K=2048, N=128256, weights=BF16, out=BF16),
    Case(K=4096, N=3000, bias=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_error_is_within_twice_that_of_separate_products(case):
    """Of PyTorch's own kernels under autocast, each of which rounds its result."""
    arguments = make(case, "cuda")
    truth = matvec_reference(*doubled(arguments))
    x, weight, bias, norm, eps, swiglu, residual, _ = arguments
    h = x if norm is None else torch.nn.functional.rms_norm(x.float(), (case.K,), norm, eps)
    h = torch.nn.functional.linear(h.to(case.weights), weight, bias)
    if swiglu:
        h = torch.nn.functional.silu(h[..., : case.N]) * h[..., case.N :]
    standard = (h if residual is None else residual + h).to(case.out)
    ours = matvec(x, weight, bias, norm=norm, eps=eps, swiglu=swiglu, residual=residual, dtype=case.out)
    error, allowed = ((y.double() - truth).norm().item() for y in (ours, standard))
    assert error <= 2 * allowed + 1e-6 * truth.norm().item(), (error, allowed)


@pytest.mark.gpu
def test_a_cuda_graph_of_a_chain_gives_what_each_gives_alone():
    """Each kernel may begin before the one before it has ended (PDL): none may read too early, or write."""
    weights = [torch.randn(2048, 2048, device="cuda", dtype=BF16) / 45 for _ in range(40)]
    norm = torch.ones(2048, device="cuda")
    x = torch.randn(1, 2048, device="cuda")

    def chain(wait: bool) -> Tensor:
        y = x
        for weight in weights:
            y = matvec(y, weight, norm=norm, eps=1e-5, residual=y)
            if wait:
                torch.cuda.synchronize()
        return y

    expected = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(wait=False)
    for _ in range(20):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, expected)
