"""The kernel that writes matrices in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from triton.compiler import ASTSource

from kernels.float8_kernel import NUM_WARPS, M, N, to_float8_kernel

from .configuration import Configuration, target_of

ARCHITECTURES = ("sm_90", "sm_100", "sm_120")
WANTED = {"both": ("values", "transposed"), "as_is": ("values",)}
MATRICES = (("bf16", "e4m3"), ("bf16", "e5m2"), ("fp32", "e4m3"))
"""Inputs, gradients and weights."""
FORMATS = {"e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}


def configurations(architecture: str) -> Iterator[Configuration]:
    """Rows are a multiple of 16 numbers apart."""
    names = [parameter.name for parameter in to_float8_kernel.params]
    scales = {"values": "row_scale_ptr", "transposed": "column_scale_ptr"}
    for (dtype, form), wanted, by_line in product(MATRICES, WANTED, (False, True)):
        types = {"x_ptr": f"*{dtype}"} | {f"{each}_ptr": FORMATS[form] for each in WANTED[wanted]}
        types |= {scales[each]: "*fp32" for each in WANTED[wanted]}
        constants: dict[str, Any] = {"M": M, "N": N, "BY_ROW": by_line and "values" in WANTED[wanted]}
        constants["BY_COLUMN"] = by_line and "transposed" in WANTED[wanted]
        constants |= {name: None for name in names if name.endswith("_ptr") and name not in types}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants}
        scaling = "rowwise" if by_line else "tensorwise"
        yield Configuration(
            {"kernel": "to_float8", "dtype": dtype, "format": form, "wanted": wanted, "scaling": scaling},
            ASTSource(to_float8_kernel, signature, constexprs=constants, attrs=aligned),
            target_of(architecture),
            {"num_warps": NUM_WARPS},
        )
