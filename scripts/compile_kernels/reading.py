"""What is read from a compiled kernel: hashes of its code, and what it takes of the GPU."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

INSTRUCTIONS = (
    "wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "cp.async.cg",
    "setmaxnreg", "v_mfma",
)  # fmt: skip


def read(compiled: Any, log: str) -> dict[str, Any]:
    """Hashes and resources of a kernel, for JSON.

    Args:
        compiled: Triton's CompiledKernel. log: what ptxas -v said while it was made.
    Returns:
        ptx: hash of the normalised PTX (or AMD's assembly). code: hash of the machine code.
        shared: bytes of shared memory. registers: per thread, at the launch. stack, spilled: bytes per thread.
        serialized: ptxas makes asynchronous products wait for one another.
        instructions: those of INSTRUCTIONS that it has. barriers: the named barriers that Triton chose for itself.
    """
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        spilled = number(r"\.private_segment_fixed_size: (\d+)", assembly)
        registers = number(r"\.vgpr_count: +(\d+)", assembly)
        text = normalised(assembly, comment=";")
        found = {"ptx": digest(text), "code": digest(text), "stack": spilled, "spilled": spilled, "serialized": False}
        barriers: list[int] = []
    else:
        assembly = compiled.asm["ptx"]
        found = {
            "ptx": digest(normalised(assembly)), "code": digest(machine_code(compiled.asm["cubin"])),
            "stack": number(r"(\d+) bytes stack frame", log), "spilled": number(r"(\d+) bytes spill stores", log),
            "serialized": "serialized" in log,
        }  # fmt: skip
        registers = number(r"Used (\d+) registers", log)
        # the kernels' own have their numbers in registers
        barriers = sorted(
            {int(n) for n in re.findall(r"\bbar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?\s+(\d+)", assembly)}
        )
    instructions = [name for name in INSTRUCTIONS if name in assembly]
    return found | {
        "registers": registers, "shared": shared, "instructions": instructions, "barriers": barriers,
    }  # fmt: skip


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, (pattern, text[-2000:])
    return int(found[1])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def normalised(assembly: str, comment: str = "//") -> str:
    """PTX, or AMD's assembly, without what no instruction depends on: comments, the lines of the source, debug sections
    with their labels, and the names of functions."""
    text = re.split(r"^\s*\.section\s+\.debug", assembly, maxsplit=1, flags=re.M)[0]
    text = re.sub(re.escape(comment) + ".*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\b.*", "", text, flags=re.M)
    text = re.sub(r"^\s*(\$L__|\.L)(tmp|func_begin|func_end|info_string|section)\w*:", "", text, flags=re.M)
    functions = re.findall(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", text)  # PTX
    functions += re.findall(r"^\s*\.(?:globl|type)\s+(\w+)", text, flags=re.M)  # AMD
    for i, name in enumerate(dict.fromkeys(functions)):
        text = re.sub(rf"\b{re.escape(name)}(?=\b|_param_)", f"function{i}", text)
    return "\n".join(line for line in map(str.rstrip, text.splitlines()) if line) + "\n"


def machine_code(cubin: bytes) -> str:
    """The instructions of a CUDA binary, as Triton's own cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    instructions = [line for line in text.splitlines() if line.lstrip().startswith("/*")]
    assert instructions, text
    return "\n".join(instructions)
