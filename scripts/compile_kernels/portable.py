"""The portable attention kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

import triton
from triton.compiler import ASTSource

from kernels.flash_attention import portable
from kernels.flash_attention.config import Tiles, choose_tiles

from .configuration import ARCHITECTURES, Configuration, target_of

__all__ = ["ARCHITECTURES", "configurations"]

KERNELS = {"forward": portable.forward_kernel, "dq": portable.dq_kernel, "dkdv": portable.dkdv_kernel}
TILED_BY_KEYS = ("k", "v", "dk", "dv")

FLAGS = ("CAUSAL", "WINDOW", "STARTS", "SOFTCAP", "SINKS")
MASKS = {
    "causal": dict.fromkeys(FLAGS, False) | {"CAUSAL": True},
    "full": dict.fromkeys(FLAGS, False),
    "documents": dict.fromkeys(FLAGS, False) | {"CAUSAL": True, "STARTS": True},
    "full-capped": dict.fromkeys(FLAGS, False) | {"SOFTCAP": True, "SINKS": True},
    "dense-everything": dict.fromkeys(FLAGS, True) | {"WINDOW": False, "STARTS": False},
    "local-everything": dict.fromkeys(FLAGS, True),
}


def configuration(architecture: str, name: str, head_dim: int, mask: str, dtype: str, tiles: Tiles) -> Configuration:
    """One kernel for one GPU, with four query heads per key/value head.

    Args:
        name: forward, dq or dkdv. mask: of MASKS. dtype: in Triton's words (bf16, fp16, fp32), or tf32: fp32 with
            products in TF32.
    """
    row = {"kernel": name, "head_dim": head_dim, "mask": mask, "dtype": dtype, "tiles": asdict(tiles)}
    kernel, flags, target = KERNELS[name], MASKS[mask], target_of(architecture)
    D = triton.next_power_of_2(head_dim)
    precision, dtype = ("tf32", "fp32") if dtype == "tf32" else ("ieee", dtype)
    tma = target.backend == "cuda" and target.arch >= 90 and dtype != "fp32"
    constants: dict[str, Any] = {
        **flags, "H": 8, "GROUP": 4, "M": tiles.m, "N": tiles.n, "D": D, "HEAD_DIM": head_dim,
        "PRECISION": precision, "STAGES": tiles.num_stages, "TMA": tma,
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
                signature[p] = f"tensordesc<{dtype}[1, 1, {rows}, {D}]>"
            else:
                signature[p] = (f"*{dtype}", "i32", "i32", "i32", "i32")
                for j in range(4):  # pointer and strides, not the number of rows
                    attributes[(i, j)] = [["tt.divisibility", 16]]
        elif p.endswith("_ptr"):
            absent = (p == "starts_ptr" and not flags["STARTS"]) or (p == "sinks_ptr" and not flags["SINKS"])
            signature[p] = "constexpr" if absent else "*i32" if p == "starts_ptr" else "*fp32"
            if absent:
                constexprs[p] = None
            else:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[p] = "fp32" if p in ("cap", "factor", "scale") else "i32"
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
            yield configuration(
                architecture, name, head_dim, mask, dtype, tiles_for(name, head_dim, mask, dtype, capability)
            )
    for name in KERNELS:
        yield configuration(architecture, name, 80, "causal", "fp16", tiles_for(name, 80, "causal", "fp16", capability))


def tiles_for(name: str, head_dim: int, mask: str, dtype: str, capability: tuple[int, int]) -> Tiles:
    flags = MASKS[mask]
    return choose_tiles(name, head_dim, capability, float32=dtype in ("fp32", "tf32"), causal=flags["CAUSAL"],
                        local=flags["WINDOW"] or flags["STARTS"], softcap=flags["SOFTCAP"])  # fmt: skip
