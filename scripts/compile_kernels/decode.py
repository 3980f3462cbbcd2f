"""The decoding kernels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
from triton.compiler import ASTSource

from kernels.flash_attention import decode_kernels
from kernels.flash_attention.config import choose_decode_tiles

from .configuration import ARCHITECTURES, Configuration, target_of

__all__ = ["ARCHITECTURES", "configurations"]

POINTERS = {"lengths_ptr": "*i32", "lse_ptr": "*fp32", "sinks_ptr": "*fp32", "partial_out_ptr": "*fp32",
            "partial_lse_ptr": "*fp32"}  # fmt: skip


def configurations(architecture: str) -> Iterator[Configuration]:
    """One query and many rows of a tile, without and with everything; merging."""
    for head_dim, dtype, rows in product((64, 128, 256), ("bf16", "fp32", "tf32"), (4, 64)):
        for everything in (False, True) if dtype == "bf16" else (True,):
            yield configuration(architecture, "split", head_dim, dtype, rows, everything)
    for head_dim in (64, 256):
        yield configuration(architecture, "merge", head_dim, "bf16", 4, everything=True)
    yield configuration(architecture, "split", 80, "fp16", 4, everything=False)


def configuration(
    architecture: str, kernel: str, head_dim: int, dtype: str, rows: int, everything: bool
) -> Configuration:
    """Rows of a tile are those of one query."""
    row = {"kernel": kernel, "head_dim": head_dim, "dtype": dtype, "rows": rows, "everything": everything}
    function = getattr(decode_kernels, f"{kernel}_kernel")
    precision, dtype = ("tf32", "fp32") if dtype == "tf32" else ("ieee", dtype)
    is_amd = architecture.startswith("gfx")
    tiles = choose_decode_tiles(head_dim, rows, 4 if dtype == "fp32" else 2, (0, 0) if is_amd else None)
    constants: dict[str, Any] = {
        "G": 8, "GROUP": rows, "H": 8 * rows, "M": tiles.m, "N": tiles.n, "D": triton.next_power_of_2(head_dim),
        "HEAD_DIM": head_dim, "WINDOW": everything, "SOFTCAP": everything, "SINKS": everything, "LEAST": tiles.least,
        "PRECISION": precision, "STAGES": tiles.num_stages, "SPLITS": decode_kernels.MOST_SPLITS, "S": 1,
        "PDL": architecture in ("sm_90", "sm_100", "sm_120"),
    }  # fmt: skip
    if not everything:
        constants["sinks_ptr"] = None
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "fp32" if name in ("tanh_scale", "scale_log2") else POINTERS.get(name, f"*{dtype}")
        is_stride = name.endswith(("_batch", "_row", "_head"))
        if is_stride or name in ("B", "S", "capacity", "window", "splits"):
            signature[name] = "i32"
        if is_stride or name.endswith("_ptr") or name == "capacity":
            attributes[(i,)] = [["tt.divisibility", 16]]
    constexprs = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(function, signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": tiles.num_warps if kernel == "split" else 2, "num_stages": tiles.num_stages}
    return Configuration(row, source, target_of(architecture), options)
