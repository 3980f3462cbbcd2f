"""The kernel of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from triton.compiler import ASTSource

from kernels.cross_entropy_kernel import BLOCK, NUM_STAGES, NUM_WARPS, cross_entropy_kernel

from .configuration import Configuration, target_of

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
OPTIONS = {"plain": False, "everything": True}  # soft cap and label smoothing
TYPES = {"targets_ptr": "*i64", "losses_ptr": "*fp32", "V": "i32", "stride": "i32", "ignore_index": "i32"}


def configurations(architecture: str) -> Iterator[Configuration]:
    """Rows are a multiple of 16 logits apart."""
    for dtype, options in product(("bf16", "fp16", "fp32"), OPTIONS):
        constants: dict[str, Any] = dict.fromkeys(("SOFTCAP", "SMOOTHING"), OPTIONS[options])
        constants |= {"GRAD": True, "BLOCK": BLOCK, "STAGES": NUM_STAGES}
        names = [parameter.name for parameter in cross_entropy_kernel.params]
        types = TYPES | {"logits_ptr": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "fp32") for name in names}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("logits_ptr", "stride")}
        yield Configuration(
            {"kernel": "cross_entropy", "dtype": dtype, "options": options},
            ASTSource(cross_entropy_kernel, signature, constexprs=constants, attrs=aligned),
            target_of(architecture),
            {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES},
        )
