"""Compile the Hopper kernels without a GPU, and read what the assembler says of them.

python tests/kernels/compile_hopper.py        every configuration, one line each
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from compile_cache import read_compiled

from kernels.flash_attention import hopper
from kernels.flash_attention.hopper import backward_pass, backward_wide, forward_pass, host, order
from kernels.flash_attention.hopper.common import Kind

TARGET = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MASKS = {
    "causal": (True, False, False),
    "full": (False, False, False),
    "documents": (True, False, True),
    "everything": (False, True, True),
}


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """What the compiler makes of a kernel, as `resources` reads it."""
    signature = {p.name: "constexpr" if p.name in constants else types[p.name] for p in kernel.params}
    pointers = [(i,) for i, p in enumerate(kernel.params) if signature[p.name].startswith("*")]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel, signature, constexprs=constants, attrs={i: [["tt.divisibility", 16]] for i in pointers}
    )
    return read_compiled(resources, source, TARGET, {"num_warps": 4})


def resources(compiled: Any) -> dict[str, Any]:
    """Bytes of shared memory, of stack, instructions, whether the products wait for one another ("serialized"), and the
    barriers that Triton chose for itself."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source_file = Path(folder, "kernel.ptx")
        source_file.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name", "sm_90a", source_file, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack = re.search(r"(\d+) bytes stack frame", said)
    assert stack, said
    names = ("wgmma.mma_async", "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "setmaxnreg")
    return {
        "triton": triton.__version__,
        "shared": compiled.metadata.shared,
        "stack": int(stack[1]),
        "serialized": "serialized" in said,
        "instructions": [name for name in names if name in ptx],
        # the kernels' own have their numbers in registers
        "barriers": sorted({int(n) for n in re.findall(r"\bbar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?\s+(\d+)", ptx)}),
    }


def type_of(descriptor: Any) -> str:
    """The type of a descriptor as the host makes it, in Triton's words."""
    layout = f",{descriptor.layout!r}" if hasattr(descriptor, "layout") else ""
    return f"tensordesc<{NAMES[descriptor.base.dtype]}{descriptor.block_shape}{layout}>"


def rows(n_rows: int, head_dim: int, dtype: str, *, n_columns: int | None = None, gluon: bool = True) -> str:
    x = torch.empty(1, n_rows, 1, head_dim, dtype=DTYPES[dtype])
    return type_of(host.rows(x, n_rows, n_columns) if gluon else host.plain_rows(x, n_rows))


def compile_forward(
    kind: Kind, head_dim: int, seq_len: int, dtype: str, sinks: bool, window: int | None = None
) -> dict[str, Any]:
    config, n = hopper.forward_config(kind, head_dim, seq_len, window)
    types = dict.fromkeys(("n_items", "n_tiles", "log_mixed", "S", "S_k", "window"), "i32")
    types |= {"cap": "fp32", "factor": "fp32"}
    types |= {"lse_ptr": "*fp32", "starts_ptr": "*i32", "sinks_ptr": "*fp32", "taken_ptr": "*i32"}
    types |= {name: rows(64, head_dim, dtype) for name in ("q_rows", "out_rows")}
    types |= {name: rows(n, head_dim, dtype) for name in ("k_rows", "v_rows")}
    absent: dict[str, Any] = {} if kind.starts else {"starts_ptr": None}
    if not sinks:
        absent["sinks_ptr"] = None
    return compile_kernel(forward_pass.forward_kernel, {"CONFIG": config} | absent, types)


def compile_backward(
    kernel: Any, kind: Kind, head_dim: int, dtype: str, *, deterministic: bool = False
) -> dict[str, Any]:
    config = hopper.backward_config(kind, head_dim, deterministic)
    m, n = backward_pass.M.value, config.n
    scalars = dict.fromkeys(("cap", "factor", "scale"), "fp32")
    types = dict.fromkeys(("count", "lag", "n_items", "n_tiles", "log_mixed", "S", "S_k", "window"), "i32") | scalars
    types |= dict.fromkeys(("starts_ptr", "ends_ptr", "sorted_ptr", "taken_ptr"), "*i32")
    types |= dict.fromkeys(("added_ptr", "cleared_ptr", "turns_ptr"), "*i32")
    types |= {name: rows(m, head_dim, dtype) for name in ("q_rows", "dout_rows", "dq_rows")}
    types |= {name: rows(n, head_dim, dtype) for name in ("k_rows", "v_rows", "dk_rows", "dv_rows")}
    types |= {"stat_ptr": "*fp32", "sum_ptr": "*fp32"}
    if kernel is backward_pass.backward_kernel:
        for i, columns in enumerate(config.shares):
            types[f"sum{i}_rows"] = type_of(host.numbers(torch.empty(m * columns), m * columns // 32, 32))
        types["chunk_rows"] = type_of(host.numbers(torch.empty(1024), 32, 32))
        types["dq_rows"] = rows(m, head_dim, dtype, n_columns=16)
    absent = {} if kind.starts else {"starts_ptr" if kernel is backward_wide.dq_kernel else "ends_ptr": None}
    if kernel is backward_pass.backward_kernel:
        if not deterministic:
            absent["turns_ptr"] = None
        if deterministic or not kind.starts:
            absent["sorted_ptr"] = None
    types["stat_rows"] = type_of(host.numbers(torch.empty(config.numbers), config.numbers))
    return compile_kernel(kernel, {"CONFIG": config} | absent, types)


def compile_prepare(head_dim: int, dtype: str) -> dict[str, Any]:
    m = backward_pass.M.value
    width = hopper.padded(head_dim)
    constants = {"H": 8, "M": m, "N": 128, "D": width, "SUMMED": width, "NUMBERS": 4 * m}
    types = dict.fromkeys(("lse_ptr", "dlse_ptr", "stat_ptr", "sum_ptr"), "*fp32")
    types |= dict.fromkeys(("starts_ptr", "ends_ptr", "added_ptr", "cleared_ptr", "turns_ptr"), "*i32")
    types |= dict.fromkeys(("out_rows", "dout_rows"), rows(m, head_dim, dtype, gluon=False))
    types |= dict.fromkeys(("S", "S_k", "n_tiles", "n_places", "n_heads"), "i32")
    return compile_kernel(backward_pass.prepare_kernel, constants, types)


def compile_sort() -> dict[str, Any]:
    types = {"ends_ptr": "*i32", "sorted_ptr": "*i32", "shift": "i32", "n_tiles": "i32"}
    return compile_kernel(order.sort_kernel, {"N": 128, "CHUNK": 64, "CAUSAL": True}, types)


def configurations() -> Iterator[dict[str, Any]]:
    """Everything that the Hopper kernels can be asked for, as far as the compiler can tell; with every mask in bf16."""
    for head_dim, (mask, (causal, window, starts)), softcap in product((64, 128, 256), MASKS.items(), (False, True)):
        if softcap and mask in ("full", "documents"):
            continue
        kind = Kind(8, 4, causal, window, starts, softcap)
        row = {"head_dim": head_dim, "mask": mask, "softcap": softcap, "dtype": "bf16"}
        for seq_len in (1024, 4096) if head_dim == 64 else (4096,):
            yield row | {"kernel": "forward"} | compile_forward(kind, head_dim, seq_len, "bf16", sinks=softcap)
        if head_dim == 64 and window:
            yield (
                row | {"kernel": "forward"} | compile_forward(kind, head_dim, 4096, "bf16", sinks=softcap, window=1024)
            )
        if head_dim > 128:
            for kernel in (backward_wide.dkdv_kernel, backward_wide.dq_kernel):
                yield row | {"kernel": kernel.__name__} | compile_backward(kernel, kind, head_dim, "bf16")
        else:
            kernel = backward_pass.backward_kernel
            yield row | {"kernel": "backward"} | compile_backward(kernel, kind, head_dim, "bf16")
            yield row | {"kernel": "turns"} | compile_backward(kernel, kind, head_dim, "bf16", deterministic=True)
    for head_dim in (40, 96, 192):
        kind = Kind(8, 1, True, False, False, False)
        row = {"head_dim": head_dim, "mask": "causal", "softcap": False, "dtype": "fp16"}
        yield row | {"kernel": "forward"} | compile_forward(kind, head_dim, 4096, "fp16", sinks=True)
        yield row | {"kernel": "prepare"} | compile_prepare(head_dim, "fp16")
        if head_dim > 128:
            for kernel in (backward_wide.dkdv_kernel, backward_wide.dq_kernel):
                yield row | {"kernel": kernel.__name__} | compile_backward(kernel, kind, head_dim, "fp16")
        else:
            yield row | {"kernel": "backward"} | compile_backward(backward_pass.backward_kernel, kind, head_dim, "fp16")
    yield {"mask": "documents", "softcap": False, "kernel": "sort"} | compile_sort()


if __name__ == "__main__":
    for row in configurations():
        print(json.dumps(row), flush=True)
