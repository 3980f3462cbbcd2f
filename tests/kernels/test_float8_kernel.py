"""A matrix in 8 bits, as it is and transposed: the kernel equals its plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_process import compiled

from kernels import float8, float8_kernel
from kernels.flash_attention.portable import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter is NumPy, which warns of what lanes past the end compute.
ignored = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
on_this_device = pytest.mark.gpu if DEVICE == "cuda" else ignored
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def matrix_and_scales(shape: tuple[int, int], dtype: torch.dtype, by_line: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of numbers of many sizes, between which lies what the kernel must not read."""
    wide = torch.full((shape[0], shape[1] + 16), float("nan"), device=DEVICE)
    x = wide[:, : shape[1]]
    x.copy_(torch.randn(shape) * torch.logspace(-6, 0, shape[1]))
    largest = torch.finfo(dtype).max
    rows, columns = (x.abs().amax(dim, keepdim=True) / largest for dim in (1, 0))
    return (x, rows, columns) if by_line else (x, rows.amax(0, keepdim=True), columns.amax(1, keepdim=True))


def plain(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.cpu() * scale.cpu().reciprocal()).to(dtype)


@on_this_device
@pytest.mark.parametrize("dtype", [E4M3, E5M2] if DEVICE == "cuda" else [torch.float16], ids=str)
@pytest.mark.parametrize("by_line", [False, True])
@pytest.mark.parametrize("shape", [(70, 300), (64, 128), (5, 16)], ids=str)
def test_equals_its_plain_twin(shape: tuple[int, int], dtype: torch.dtype, by_line: bool) -> None:
    """Bit for bit. Triton's interpreter casts to 8 bits wrongly; there the same kernel casts to 16."""
    x, rows, columns = matrix_and_scales(shape, dtype, by_line)
    expected = plain(x, rows, dtype), plain(x, columns, dtype).t()
    for wanted in ((0, 1), (0,), (1,)):
        scales = [scale if i in wanted else None for i, scale in enumerate((rows, columns))]
        for i, found in zip(wanted, float8_kernel.to_float8(x, *scales, dtype, 16), strict=True):
            filled = found.float().cpu()
            assert (found.dtype, found.is_contiguous()) == (dtype, True)
            assert filled.shape[1] == (shape[1] if i == 0 else -(-shape[0] // 16) * 16)
            width = expected[i].shape[1]
            assert torch.equal(filled[:, :width], expected[i].float())
            assert filled[:, width:].eq(0).all()


@pytest.mark.gpu
@FORMATS
def test_a_scale_that_is_nan_makes_all_nan(dtype: torch.dtype) -> None:
    x, rows, columns = matrix_and_scales((20, 32), dtype, by_line=False)
    for found in float8.to_float8(x, rows * torch.nan, columns * torch.nan, dtype):
        assert found[:, :20].float().isnan().all()


@FORMATS
def test_the_operator_is_one_for_pytorch(dtype: torch.dtype) -> None:
    x, rows, columns = matrix_and_scales((21, 48), dtype, by_line=True)
    operator = torch.ops.flash_gpt.to_float8.default
    for scales in ((rows, columns), (rows, None), (None, columns)):
        torch.library.opcheck(operator, (x, *scales, dtype, 16), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "sm_120"])
def test_every_configuration_compiles_and_does_not_spill(architecture: str) -> None:
    found = compiled("to_float8", architecture)
    assert len(found) == 12
    for row in found:
        assert row["stack"] <= 8, row  # two registers, on sm_120
        assert row["registers"] <= 128, row
