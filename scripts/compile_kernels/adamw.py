"""AdamW's update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from triton.compiler import ASTSource

from kernels.adamw_kernel import BLOCK, NUM_WARPS, PER_LAUNCH, adamw_kernel

from .configuration import Configuration, target_of

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DECAYS = (0.9, 0.95)
TUPLES = ("param_ptrs", "grad_ptrs", "mean_ptrs", "square_ptrs", "count_ptrs")
MOMENTS = ("mean_ptrs", "square_ptrs")


def configurations(architecture: str) -> Iterator[Configuration]:
    names = [parameter.name for parameter in adamw_kernel.params]
    types = {"good_ptr": "*i1", "n": "i32", "eps": "fp32", "weight_decay": "fp32"}
    for moments, scaled in product(("fp32", "bf16"), (True, False)):
        constants: dict[str, Any] = {"BLOCK": BLOCK, "PER_LAUNCH": PER_LAUNCH}
        constants |= {f"DECAY{i}": decay for i, decay in enumerate(DECAYS, 1)}
        constants |= {f"LOG2_DECAY{i}": math.log2(decay) for i, decay in enumerate(DECAYS, 1)}
        constants |= {} if scaled else {"scale_ptr": None}
        signature: dict[str, Any] = {
            name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names
        }
        signature |= {name: (f"*{moments}" if name in MOMENTS else "*fp32",) * PER_LAUNCH for name in TUPLES}
        divisible = [["tt.divisibility", 16]]
        aligned: dict[tuple[int, ...], Any] = {
            (i,): divisible
            for i, name in enumerate(names)
            if name == "n" or (name.endswith("_ptr") and name not in constants)
        }
        aligned |= {(names.index(name), i): divisible for name in TUPLES for i in range(PER_LAUNCH)}
        yield Configuration(
            {"kernel": "adamw", "moments": moments, "scaled": scaled},
            ASTSource(adamw_kernel, signature, constexprs=constants, attrs=aligned),
            target_of(architecture),
            {"num_warps": NUM_WARPS},
        )
