"""The gate for refactors of kernels: a hash changes with an instruction and with nothing else, a difference ends with
1, and what was compiled once is not compiled again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from scripts.compile_kernels import __main__ as script
from scripts.compile_kernels.configuration import Configuration, name_of, target_of

ROOT = Path(__file__).parents[2]

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
import triton
from kernel import kernel
from reader import read
from scripts.compile_kernels import cache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

compiled, compile_it = [], triton.compile
triton.compile = lambda *args, **options: compiled.append(1) or compile_it(*args, **options)
for N in json.loads(sys.argv[1]):
    source = ASTSource(kernel, {"out_ptr": "*i32", "N": "constexpr"}, constexprs={"N": N})
    found = cache.read_compiled(read, source, GPUTarget("cuda", 80, 32), {"num_warps": 4})
print(json.dumps([len(compiled), found["stores"]]))
"""


@pytest.mark.slow
def test_a_changed_source_is_compiled_again_and_nothing_else_is(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folders = (str(tmp_path), str(ROOT))
    environment |= {"PYTHONPATH": os.pathsep.join(folders), "FLASH_GPT_COMPILED": str(tmp_path / "compiled")}

    def ask(*sizes: int) -> list[int]:
        command = [sys.executable, "-c", ASK, json.dumps(sizes)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    write("kernel.py", KERNEL)
    write("reader.py", 'def read(compiled, log):\n    return {"stores": compiled.asm["ptx"].count("st.global")}\n')
    compiled, stores = ask(128, 128, 1024)
    assert compiled == 2
    assert stores > 0
    assert ask(128, 1024) == [0, stores]
    write("kernel.py", KERNEL + "# nothing that the kernel is made of\n")
    assert ask(128, 1024) == [0, stores]
    write("kernel.py", KERNEL.replace("x + 1", "x + 2"))  # in what the kernel calls
    assert ask(128, 1024) == [2, stores]
    write("reader.py", 'def read(compiled, log):\n    return {"stores": -1}\n')
    assert ask(128) == [1, -1]
    (whole,) = (file for file in (tmp_path / "compiled").iterdir() if '"stores": -1' in file.read_text())
    whole.write_text('{"stor')  # a file that was cut
    assert ask(128) == [1, -1]
    assert not list((tmp_path / "compiled").glob("*.part"))


# Says the hashes of the kernel in each file that is named.
HASHES = """
import importlib, json, sys
from scripts.compile_kernels.cache import compile_anew
from scripts.compile_kernels.reading import read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for name in sys.argv[1:]:
    (kernel,) = (f for n, f in vars(importlib.import_module(name)).items() if n.endswith("kernel"))
    source = ASTSource(kernel, {"out_ptr": "*i32", "N": "constexpr"}, constexprs={"N": 128})
    found = read(*compile_anew(source, GPUTarget("cuda", 80, 32), {"num_warps": 4}))
    print(json.dumps([found["ptx"], found["code"], found["shared"], found["spilled"]]))
"""


def test_hashes_change_with_an_instruction_and_not_with_names_lines_or_comments(tmp_path: Path) -> None:
    renamed = KERNEL.replace("helper", "add_one").replace("def kernel", "def store_kernel")
    renamed = renamed.replace("@triton.jit", "# further down\n\n@triton.jit")
    for name, text in {"before": KERNEL, "renamed": renamed, "changed": KERNEL.replace("x + 1", "x + 2")}.items():
        (tmp_path / f"{name}.py").write_text(text)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-c", HASHES, "before", "renamed", "changed"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    before, after_renaming, after_change = (json.loads(line) for line in done.stdout.splitlines())
    assert before == after_renaming
    assert before[0] != after_change[0]
    assert before[1] != after_change[1]
    assert before[2:] == after_change[2:] == [0, 0]


def test_a_difference_is_named_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"family": "hopper", "kernel": "forward", "head_dim": 64, "softcap": softcap} for softcap in (True, False)]
    monkeypatch.setattr(
        script, "configurations", lambda: iter(Configuration(row, None, target_of("sm_90"), {}) for row in rows)
    )
    made = {"ptx": "aaaa", "code": "bbbb", "registers": 168, "shared": 1024, "spilled": 0}
    monkeypatch.setattr(script, "found", lambda configuration, ptx: made)
    file = tmp_path / "record.json"
    assert script.main(["--out", str(file)]) == 0
    assert script.main(["--against", str(file)]) == 0
    assert "2 compared" in capsys.readouterr().out
    record = json.loads(file.read_text())
    record["configurations"][name_of(rows[1])]["ptx"] = "another"
    file.write_text(json.dumps(record))
    assert script.main(["--against", str(file)]) == 1
    differing = [line for line in capsys.readouterr().out.splitlines() if "DIFFERENT" in line]
    assert len(differing) == 1
    assert differing[0].startswith("hopper forward D64 ")
    assert differing[0].endswith("ptx was another")
    assert script.main(["--only", "softcap", "--against", str(file)]) == 0
    removed = rows.pop(0)
    assert script.main(["--against", str(file)]) == 1
    assert f"{name_of(removed):<84} MISSING" in capsys.readouterr().out
    file.write_text(json.dumps({**record, "triton": "0.0"}))
    with pytest.raises(SystemExit) as refused:
        script.main(["--against", str(file)])
    assert refused.value.code == 2
    assert "of Triton 0.0, this is " in capsys.readouterr().err
