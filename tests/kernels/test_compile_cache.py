"""What was compiled once is not compiled again, unless something that it is made of has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def helper(x):
    return x + 1

@triton.jit
def kernel(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), helper(tl.arange(0, N)))
"""
# Says what was read, and how often Triton compiled for it.
ASK = """
import json, sys
import compile_cache, triton
from kernel import kernel
from reader import read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

compiled, compile_it = [], triton.compile
triton.compile = lambda *args, **options: compiled.append(1) or compile_it(*args, **options)
for N in json.loads(sys.argv[1]):
    source = ASTSource(kernel, {"out_ptr": "*i32", "N": "constexpr"}, constexprs={"N": N})
    found = compile_cache.read_compiled(read, source, GPUTarget("cuda", 80, 32), {"num_warps": 4})
print(json.dumps([len(compiled), found["stores"]]))
"""


def test_a_changed_source_is_compiled_again_and_nothing_else_is(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folders = (str(tmp_path), str(Path(__file__).parent))
    environment |= {"PYTHONPATH": os.pathsep.join(folders), "FLASH_GPT_COMPILED": str(tmp_path / "compiled")}

    def ask(*sizes: int) -> list[int]:
        command = [sys.executable, "-c", ASK, json.dumps(sizes)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    write("kernel.py", KERNEL)
    write("reader.py", 'def read(compiled):\n    return {"stores": compiled.asm["ptx"].count("st.global")}\n')
    compiled, stores = ask(128, 128, 1024)
    assert compiled == 2
    assert stores > 0
    assert ask(128, 1024) == [0, stores]
    write("kernel.py", KERNEL + "# nothing that the kernel is made of\n")
    assert ask(128, 1024) == [0, stores]
    write("kernel.py", KERNEL.replace("x + 1", "x + 2"))  # in what the kernel calls
    assert ask(128, 1024) == [2, stores]
    write("reader.py", 'def read(compiled):\n    return {"stores": -1}\n')
    assert ask(128) == [1, -1]
    (whole,) = (file for file in (tmp_path / "compiled").iterdir() if '"stores": -1' in file.read_text())
    whole.write_text('{"stor')  # a file that was cut
    assert ask(128) == [1, -1]
    assert not list((tmp_path / "compiled").glob("*.part"))
