"""What is read from a compiled kernel: hashes of its code, and what it takes of the GPU."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

INSTRUCTIONS = (
    "wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "cp.async.cg",
    "setmaxnreg", "v_mfma",
)  # fmt: skip

MOVES_BUFFERS = triton.__version__.startswith("3.6.")
"""Triton 3.6 places buffers in shared memory by how their values reach the partitions, which is no part of the code."""


def read(compiled: Any, log: str) -> dict[str, Any]:
    """Hashes and resources of a kernel, for JSON.

    Args:
        compiled: Triton's CompiledKernel. log: what ptxas -v said while it was made.
    Returns:
        ptx: hash of the normalised PTX (or AMD's assembly). code: hash of the machine code, which is the same for the
            same PTX without line information.
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
    """PTX, or AMD's assembly, without what no instruction depends on.

    Left out are comments, the lines of the source, debug sections with their labels, and labels that nothing jumps to.
    Functions, virtual registers and labels are renamed in the order in which they appear, and the registers' counts are
    left out: what remains says which instructions there are, in which order, and which result each of them takes. With
    Triton 3.6 addresses in shared memory are left out, too.
    """
    text = re.split(r"^\s*\.section\s+\.debug", assembly, maxsplit=1, flags=re.M)[0]
    text = re.sub(re.escape(comment) + ".*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\b.*", "", text, flags=re.M)
    text = re.sub(r"^\s*(\$L__|\.L)(tmp|func_begin|func_end|info_string|section)\w*:", "", text, flags=re.M)
    functions = re.findall(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", text)  # PTX
    functions += re.findall(r"^\s*\.(?:globl|type)\s+(\w+)", text, flags=re.M)  # AMD
    for i, name in enumerate(dict.fromkeys(functions)):
        text = re.sub(rf"\b{re.escape(name)}(?=\b|_param_)", f"function{i}", text)
    if MOVES_BUFFERS:
        text = re.sub(r"(add\.s32\s+%r\d+, %r\d+, |\[[^\]\s]*\+)\d{4,6}\b", r"\1ADDRESS", text)
    text = re.sub(r"^\s*\.reg\s+\.\w+\s+%\w+<\d+>;", "", text, flags=re.M)
    text = in_order(r"%[a-z]+\d+\b", text)
    jumps = Counter(re.findall(r"\$L__BB\w+", text))
    text = re.sub(r"^(\$L__BB\w+):", lambda label: label[0] if jumps[label[1]] > 1 else "", text, flags=re.M)
    text = in_order(r"\$L__BB\w+", text)
    return "\n".join(line for line in map(str.rstrip, text.splitlines()) if line) + "\n"


def in_order(pattern: str, text: str) -> str:
    """Names like %r12 numbered anew, each kind by itself, in the order in which they appear."""
    new: dict[str, str] = {}
    counts: Counter[str] = Counter()

    def renamed(found: re.Match[str]) -> str:
        if found[0] not in new:
            kind = found[0].rstrip("0123456789")
            new[found[0]] = f"{kind}{counts[kind]}"
            counts[kind] += 1
        return new[found[0]]

    return re.sub(pattern, renamed, text)


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
