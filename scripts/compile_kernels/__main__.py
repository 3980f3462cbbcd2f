"""Compile every kernel for every GPU it is meant for, on a CPU, and hash what the compiler makes of it.

    python -m scripts.compile_kernels --out before.json         # record
    python -m scripts.compile_kernels --against before.json     # after a refactor: the same machine code, or exit 1
    python -m scripts.compile_kernels --only hopper backward D128 causal --ptx ptx

Each line has a configuration's name; hashes of the normalised PTX and of the machine code; registers per thread at the
launch; bytes of shared memory; bytes per thread spilled. In the PTX, comments, source lines, debug sections and the
names of functions, virtual registers and labels do not count. The machine code follows from the PTX, but ptxas may
choose registers by the names of virtual ones. Addresses in shared memory do not count with Triton 3.6, which moves
buffers without a reason in the code. A kernel is compiled again only if its source, Triton or the reader has
changed (docs/testing.md).

Exit codes: 0 all equal, 1 some differ, 2 the comparison cannot be made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from scripts.parser import Parser, parser_of

from . import adamw, cross_entropy, decode, float8, hopper, matvec, portable
from .cache import compile_anew, read_compiled
from .configuration import Configuration, name_of
from .reading import MOVES_BUFFERS, normalised, read

FAMILIES: dict[str, Any] = {
    "portable": portable, "hopper": hopper, "decode": decode, "cross_entropy": cross_entropy, "float8": float8,
    "matvec": matvec, "adamw": adamw,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("compile_kernels", __doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="configurations with all of these words")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a record of all that was read")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a record that --out wrote")
    parser.add_argument("--ptx", type=Path, metavar="FOLDER", help="write the normalised PTX of each configuration")
    options = parser.parse_args(arguments)
    chosen = [c for c in configurations() if set(options.only) <= set(name_of(c.row).split())]
    if not chosen:
        parser.refuse(f"no configuration has the words {' '.join(options.only)}; leave out --only to see all")
    before = reference(parser, options.against) if options.against else {}

    rows = {}
    differing = 0
    for configuration in chosen:
        name = name_of(configuration.row)
        rows[name] = configuration.row | found(configuration, options.ptx)
        verdict = compared(rows[name], before.get(name)) if options.against else ""
        differing += bool(verdict)
        print(line(name, rows[name]) + verdict, flush=True)
    for name in before.keys() - {name_of(c.row) for c in configurations()}:
        differing += 1
        print(f"{name:<84} MISSING here")
    if options.out:
        options.out.write_text(json.dumps({"triton": triton.__version__, "configurations": rows}, indent=1) + "\n")
    if options.against:
        print(f"{len(rows)} compared with {options.against}: {differing or 'none'} differ")
    return 1 if differing else 0


def configurations() -> Iterator[Configuration]:
    for family, module in FAMILIES.items():
        for architecture in module.ARCHITECTURES:
            for configuration in module.configurations(architecture):
                row = {"family": family, "architecture": architecture} | configuration.row
                yield configuration._replace(row=row)


def found(configuration: Configuration, ptx: Path | None) -> dict[str, Any]:
    if ptx is None:
        return read_compiled(read, configuration.source, configuration.target, configuration.options)
    compiled, log = compile_anew(configuration.source, configuration.target, configuration.options)
    if "ptx" in compiled.asm:
        ptx.mkdir(parents=True, exist_ok=True)
        (ptx / f"{name_of(configuration.row).replace(' ', '-')}.ptx").write_text(normalised(compiled.asm["ptx"]))
    return read(compiled, log)


def line(name: str, row: dict[str, Any]) -> str:
    resources = f"{row['registers']:>4} registers {row['shared']:>7} shared {row['spilled']:>4} spilled"
    return f"{name:<84} {row['ptx']} {row['code']} {resources}"


def compared(row: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Nothing if the kernel is what it was; else what differs."""
    if before is None:
        return "  NEW"
    compares = ("ptx", "registers", "shared", "spilled") + (() if MOVES_BUFFERS else ("code",))
    keys = [key for key in compares if row[key] != before[key]]
    return f"  DIFFERENT: {', '.join(f'{key} was {before[key]}' for key in keys)}" if keys else ""


def reference(parser: Parser, file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        parser.refuse(f"{file} is no record of this script ({error}); write one with --out")
    if record["triton"] != triton.__version__:
        parser.refuse(f"{file} is of Triton {record['triton']}, this is {triton.__version__}; write one with --out")
    return record["configurations"]


if __name__ == "__main__":
    sys.exit(main())
