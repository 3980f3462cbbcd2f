"""The portable attention kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

import triton
from triton.compiler import ASTSource

from kernels.flash_attention import portable
from kernels.flash_attention.config import Tiles, choose_tiles, why_not_so_wide

from .configuration import ARCHITECTURES, Configuration, target_of

__all__ = ["ARCHITECTURES", "configurations"]

KERNELS = {"forward": portable.forward_kernel, "dq": portable.dq_kernel, "dkdv": portable.dkdv_kernel}
TILED_BY_KEYS = ("k", "v", "dk", "dv")
WIDE_AS_V = ("v", "out", "dout", "dv")
ASKED_BY = {
    "starts_ptr": "STARTS", "sinks_ptr": "SINKS", "ends_ptr": "ENDS", "slopes_ptr": "ALIBI", "dslopes_ptr": "DSLOPES",
}  # fmt: skip
"""The flag without which there is no such tensor."""

FLAGS = ("CAUSAL", "WINDOW", "STARTS", "SOFTCAP", "SINKS", "ENDS", "ALIBI", "DSLOPES")
NEWER = dict.fromkeys(("ENDS", "ALIBI", "DSLOPES"), False)
"""Flags whose kernels are compiled with masks of their own."""
MASKS = {
    "causal": dict.fromkeys(FLAGS, False) | {"CAUSAL": True},
    "full": dict.fromkeys(FLAGS, False),
    "documents": dict.fromkeys(FLAGS, False) | {"CAUSAL": True, "STARTS": True},
    "full-capped": dict.fromkeys(FLAGS, False) | {"SOFTCAP": True, "SINKS": True},
    "dense-everything": dict.fromkeys(FLAGS, True) | NEWER | {"WINDOW": False, "STARTS": False},
    "local-everything": dict.fromkeys(FLAGS, True) | NEWER,
    "alibi": dict.fromkeys(FLAGS, False) | {"CAUSAL": True, "ALIBI": True, "DSLOPES": True},
    "packed": dict.fromkeys(FLAGS, False) | {"WINDOW": True, "STARTS": True, "ENDS": True},
}
HEAD_DIMS_APART = ((192, 128), (576, 512))
"""Of Q and K, and of V."""


def configuration(
    architecture: str, name: str, head_dim: int, mask: str, dtype: str, tiles: Tiles, head_dim_v: int | None = None
) -> Configuration:
    """One kernel for one GPU, with four query heads per key/value head.

    Args:
        name: forward, dq or dkdv. mask: of MASKS. dtype: in Triton's words (bf16, fp16, fp32), or tf32: fp32 with
            products in TF32.
    """
    row = {"kernel": name, "head_dim": head_dim, "mask": mask, "dtype": dtype, "tiles": asdict(tiles)}
    if head_dim_v is not None:
        row["head_dim_v"] = head_dim_v
    head_dim_v = head_dim_v or head_dim
    kernel, flags, target = KERNELS[name], MASKS[mask], target_of(architecture)
    D, DV = triton.next_power_of_2(head_dim), triton.next_power_of_2(head_dim_v)
    precision, dtype = ("tf32", "fp32") if dtype == "tf32" else ("ieee", dtype)
    tma = target.backend == "cuda" and target.arch >= 90 and dtype != "fp32" and D <= 256 and not flags["ENDS"]
    constants: dict[str, Any] = {
        **flags, "H": 8, "GROUP": 4, "M": tiles.m, "N": tiles.n, "D": D, "HEAD_DIM": head_dim,
        "DV": DV, "HEAD_DIM_V": head_dim_v, "PRECISION": precision, "STAGES": tiles.num_stages, "TMA": tma,
    }  # fmt: skip
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    constexprs: dict[Any, Any] = {}
    for i, parameter in enumerate(kernel.params):
        p = parameter.name
        if p in constants:
            signature[p] = "constexpr"
            constexprs[p] = constants[p]
        elif p.endswith("_rows"):
            rows = tiles.n if p.removesuffix("_rows") in TILED_BY_KEYS else tiles.m
            if tma:
                columns = DV if p.removesuffix("_rows") in WIDE_AS_V else D
                signature[p] = f"tensordesc<{dtype}[1, 1, {rows}, {columns}]>"
            else:
                signature[p] = (f"*{dtype}", "i32", "i32", "i32", "i32")
                for j in range(4):  # pointer and strides, not the number of rows
                    attributes[(i, j)] = [["tt.divisibility", 16]]
        elif p.endswith("_ptr"):
            absent = p in ASKED_BY and not flags[ASKED_BY[p]]
            signature[p] = "constexpr" if absent else "*i32" if p in ("starts_ptr", "ends_ptr") else "*fp32"
            if absent:
                constexprs[p] = None
            else:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[p] = "fp32" if p in ("tanh_scale", "scale_log2", "scale") else "i32"
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return Configuration(row, source, target, options)


def configurations(architecture: str) -> Iterator[Configuration]:
    """Everything that `choose_tiles` can choose there.

    Architectures that share a table and an instruction set with another are compiled with every mask at once only. Only
    forward has tiles of its own for full attention, so a soft cap without anything else is compiled with these alone.
    """
    number = target_of(architecture).arch
    capability = divmod(number, 10) if isinstance(number, int) else (0, 0)
    few = architecture in ("sm_86", "sm_89", "gfx942")
    for name, head_dim in product(KERNELS, (64, 128, 256)):
        for mask, dtype in product(("local-everything",) if few else MASKS, ("bf16", "fp32", "tf32")):
            if dtype != "bf16" and (few or mask != "local-everything"):
                continue
            if mask == "full-capped" and name != "forward":
                continue
            if mask in ("alibi", "packed") and head_dim == 64:
                continue
            yield configuration(
                architecture, name, head_dim, mask, dtype, tiles_for(name, head_dim, mask, dtype, capability)
            )
    for name in KERNELS:
        yield configuration(architecture, name, 80, "causal", "fp16", tiles_for(name, 80, "causal", "fp16", capability))
        for head_dim, head_dim_v in HEAD_DIMS_APART:
            if why_not_so_wide(head_dim, capability, float32=False):
                continue
            tiles = tiles_for(name, head_dim, "causal", "bf16", capability)
            yield configuration(architecture, name, head_dim, "causal", "bf16", tiles, head_dim_v)


def tiles_for(name: str, head_dim: int, mask: str, dtype: str, capability: tuple[int, int]) -> Tiles:
    flags = MASKS[mask]
    return choose_tiles(name, head_dim, capability, float32=dtype in ("fp32", "tf32"), causal=flags["CAUSAL"],
                        local=flags["WINDOW"] or flags["STARTS"] or flags["ENDS"],
                        softcap=flags["SOFTCAP"] or flags["ALIBI"], pointers=flags["ENDS"])  # fmt: skip
