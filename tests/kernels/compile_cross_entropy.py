"""Compile the kernel of the loss for a GPU that is not here, and read what the assembler says of it.

python tests/kernels/compile_cross_entropy.py sm_90        every configuration's resources, one line each
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from triton.compiler import ASTSource

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from compile_cache import read_compiled
from compile_only import resources, target_of

from kernels.cross_entropy_kernel import BLOCK, NUM_STAGES, NUM_WARPS, cross_entropy_kernel

OPTIONS = {"plain": False, "everything": True}  # soft cap and label smoothing
TYPES = {"targets_ptr": "*i64", "losses_ptr": "*fp32", "V": "i32", "stride": "i32", "ignore_index": "i32"}


def compile_kernel(architecture: str, dtype: str, options: str) -> dict[str, Any]:
    """What the compiler makes of it, as `resources` reads it; rows are a multiple of 16 logits apart."""
    constants: dict[str, Any] = dict.fromkeys(("SOFTCAP", "SMOOTHING"), OPTIONS[options])
    constants |= {"GRAD": True, "BLOCK": BLOCK, "STAGES": NUM_STAGES}
    names = [parameter.name for parameter in cross_entropy_kernel.params]
    types = TYPES | {"logits_ptr": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "fp32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("logits_ptr", "stride")}
    source = ASTSource(cross_entropy_kernel, signature, constexprs=constants, attrs=aligned)
    return read_compiled(resources, source, target_of(architecture), {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES})


if __name__ == "__main__":
    for dtype, options in product(("bf16", "fp16", "fp32"), OPTIONS):
        row = {"kernel": "cross_entropy", "dtype": dtype, "options": options}
        print(json.dumps(row | compile_kernel(sys.argv[1], dtype, options)), flush=True)
