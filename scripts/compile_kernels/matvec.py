"""The products of one row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from triton.compiler import ASTSource

from kernels.matvec_kernel import choose_tiles, matvec_kernel

from .configuration import Configuration, target_of

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
PRODUCTS = {"qkv": ("norm",), "out": ("residual",), "gate_up": ("norm", "swiglu", "bias")}
"""What is around a product."""
TYPES = {"x_ptr": "*fp32", "norm_ptr": "*fp32", "residual_ptr": "*fp32", "out_ptr": "*fp32", "M": "i32", "eps": "fp32"}


def configurations(architecture: str) -> Iterator[Configuration]:
    """Of 2,048 inputs and of so many that a tile has one row and a gap at its end."""
    target = target_of(architecture)
    names = [parameter.name for parameter in matvec_kernel.params]
    for around, K, dtype in product(PRODUCTS, (2048, 14336), ("bf16", "fp32")):
        swiglu = "swiglu" in PRODUCTS[around]
        tiles = choose_tiles(K, 4 if dtype == "fp32" else 2, swiglu)
        constants: dict[str, Any] = {
            "K": K, "TILE_M": tiles.m, "TILE_K": tiles.k, "SWIGLU": swiglu,
            "PDL": target.backend == "cuda" and target.arch >= 90,
        }  # fmt: skip
        constants |= {f"{name}_ptr": None for name in ("bias", "norm", "residual") if name not in PRODUCTS[around]}
        types = TYPES | {"weight_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants and name != "eps"
        }
        yield Configuration(
            {"kernel": "matvec", "product": around, "K": K, "dtype": dtype},
            ASTSource(matvec_kernel, signature, constexprs=constants, attrs=aligned),
            target,
            {"num_warps": tiles.num_warps},
        )
