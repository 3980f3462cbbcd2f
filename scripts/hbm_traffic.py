"""Bytes that attention moves through the GPU's memory, read from the hardware's counters.

    python -m scripts.hbm_traffic --out docs/benchmarks/hbm-traffic

Standard attention writes its S × S scores to memory and reads them back; flash attention does not. `ncu` (Nsight
Compute) counts what one forward, and one forward with backward, read and write, kernel by kernel, for `math`
(kernels/reference.py) and for `flash` with the portable kernels, on every GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import attention, flash_attention
from scripts.parser import parser_of, positive, row_length
from scripts.record import ROOT, collect_facts, heading, need_cuda, stop, write, write_json

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "math": attention, "flash": partial(flash_attention, implementation="triton")
}  # fmt: skip
BATCH, BYTES = 1, 2  # bf16
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "second": 1.0, "s": 1.0}
UNITS |= {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3}
SEPARATOR = "spin_kernel"  # what torch.cuda._sleep launches: stands before each measurement


@dataclass(frozen=True)
class Measurement:
    """One causal call on q, k, v (1, S, H, D) in bf16."""

    function: str
    seq_len: int
    heads: int
    head_dim: int
    backward: bool

    @property
    def fewest_bytes(self) -> int:
        """Bytes that the algorithm itself must move: every step reads its inputs and writes its outputs once.

        math is algorithms 0 and 3 of the FlashAttention paper (arXiv:2205.14135) with 2-byte scores: S and P are each
        written and read; backward reads P, writes dP, reads P and dP, writes dS and reads it twice. flash has tensors
        of S × D and of S only; its backward is three kernels: row statistic, dQ, and dK with dV (the portable ones).
        """
        rows = BATCH * self.heads * self.seq_len
        vectors, squares, statistics = 4, 0, 0  # q, k, v, out
        if self.function == "math":
            squares = 4
            if self.backward:
                vectors += 8  # dout twice, v, k, q; dv, dq, dk
                squares += 7
        else:
            statistics = 1  # LSE
            if self.backward:
                vectors += 2 + 5 + 6  # out, dout; q, k, v, dout, dq; q, k, v, dout, dk, dv
                statistics += 1 + 2 + 2  # the row statistic is written; both are read twice
        return rows * (vectors * self.head_dim * BYTES + squares * self.seq_len * BYTES + statistics * 4)

    @property
    def label(self) -> str:
        return f"{self.function}, {'forward + backward' if self.backward else 'forward'}, S {self.seq_len:,}"


def plan(seq_lens: Sequence[int], heads: int, head_dim: int) -> list[Measurement]:
    return [Measurement(f, S, heads, head_dim, b) for b, S, f in product((False, True), seq_lens, FUNCTIONS)]


# ---- the profiled process


def run_plan(measurements: Iterable[Measurement]) -> None:
    """Run each measurement once unseen, to warm up, and once inside the profiler, after a separator.

    PyTorch keeps the memory of earlier ones: what is given back the driver clears in the background, and its writes
    count as the next kernel's (270 MB more, after `math` at 16k).
    """
    for m in measurements:
        torch.manual_seed(0)
        shape = (BATCH, m.seq_len, m.heads, m.head_dim)
        q, k, v, dout = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        call(m, q, k, v, dout)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        call(m, q, k, v, dout)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def call(m: Measurement, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    leaves = [x.detach().requires_grad_(m.backward) for x in (q, k, v)]
    out = FUNCTIONS[m.function](*leaves)
    if m.backward:
        torch.autograd.grad(out, leaves, dout)


# ---- what ncu says


class Kernel(NamedTuple):
    name: str
    read: float
    written: float
    seconds: float


def parse_ncu(output: str) -> list[Kernel]:
    """The kernels in an `ncu --csv` report, in order of launch; lines before the table's header are not part of it.

    Raises:
        ValueError: there is no table, or a kernel lacks one of the three metrics or has a unit that is not known.
    """
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise ValueError("ncu printed no table of metrics")
    names: dict[int, str] = {}
    values: dict[int, dict[str, float]] = {}
    for row in csv.DictReader(line for line in lines[begin:] if line.startswith('"')):
        kernel, metric, unit = int(row["ID"]), row["Metric Name"], row["Metric Unit"]
        if unit not in UNITS:
            raise ValueError(f"ncu reports {metric} in {unit!r}, which is not a unit this script knows")
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            raise ValueError(
                f"ncu has no value for {metric} of {row['Kernel Name']}: {row['Metric Value']!r}"
            ) from None
        names[kernel] = row["Kernel Name"]
        values.setdefault(kernel, {})[metric] = value * UNITS[unit]
    try:
        return [Kernel(names[i], *(values[i][metric] for metric in (READ, WRITTEN, TIME))) for i in sorted(values)]
    except KeyError as metric:
        raise ValueError(f"ncu did not measure {metric} for every kernel") from None


def split(kernels: Iterable[Kernel]) -> list[list[Kernel]]:
    """The kernels after each separator."""
    parts: list[list[Kernel]] = []
    for kernel in kernels:
        if SEPARATOR in kernel.name:
            parts.append([])
        elif parts:
            parts[-1].append(kernel)
    return parts


def summarise(measurements: Sequence[Measurement], kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """One row per measurement: sums over its kernels.

    Raises:
        ValueError: the report holds another number of measurements, or one without a kernel.
    """
    parts = split(kernels)
    if len(parts) != len(measurements) or not all(parts):
        raise ValueError(
            f"ncu saw {len(parts)} measurements, {sum(map(bool, parts))} with kernels, of {len(measurements)}"
        )
    return [
        asdict(m)
        | {
            "kernels": len(part),
            "read_bytes": sum(kernel.read for kernel in part),
            "written_bytes": sum(kernel.written for kernel in part),
            "fewest_bytes": m.fewest_bytes,
            "seconds": sum(kernel.seconds for kernel in part),
        }
        for m, part in zip(measurements, parts, strict=True)
    ]


def why_no_counters(output: str) -> str | None:
    """What kept ncu from reading the counters, in one line; None if it did not complain."""
    if "ERR_NVGPUCTRPERM" in output:
        return (
            "no permission to read the GPU's hardware counters (ERR_NVGPUCTRPERM): run as root, or let the "
            "administrator allow it, https://developer.nvidia.com/ERR_NVGPUCTRPERM"
        )
    found = re.search(r"^==ERROR== (.+)$", output, re.MULTILINE)
    return f"ncu could not read the GPU's hardware counters: {found.group(1)}" if found else None


def profile(ncu: str, options: Sequence[str]) -> str:
    """Run this script's plan under ncu, which leaves the clocks alone; its report. Ends the script where it cannot."""
    command = [
        ncu, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only",
        "--metrics", f"{READ},{WRITTEN},{TIME}", "--print-units", "base", "--csv",
        sys.executable, "-m", "scripts.hbm_traffic", "--profiled", *options,
    ]  # fmt: skip
    env = os.environ | {"LC_ALL": "C"}  # decimal points
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    if done.returncode:
        reason = why_no_counters(done.stdout + done.stderr)
        if reason:
            stop(reason)
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


# ---- the record


EXPLANATION = """\
One causal call on q, k and v of batch 1, {heads} heads, head_dim {head_dim}, bf16, after one to warm up: `math` is
kernels/reference.py in eager PyTorch, with a float32 softmax; `flash` is kernels/flash_attention, its portable kernels.
Bytes between the L2 cache and the GPU's memory, and time, are sums over the call's kernels. ncu empties the caches
before each kernel and leaves the clocks alone; what is still in the L2 cache when a kernel ends counts as not written.

"Fewest" is what the algorithm must move if every step read its inputs and wrote its outputs once, with 2-byte elements:
math, per head, 4 · S · D + 4 · S² (scores and probabilities, each written and read), backward 8 · S · D + 7 · S² more;
flash 4 · S · D and one float32 per row (LSE), backward 13 · S · D and five float32 per row more."""


def markdown(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    text = EXPLANATION.format(**{name: rows[0][name] for name in ("heads", "head_dim")})
    return "\n".join([*heading("Memory traffic of attention", facts), text, "", *table(rows)]) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows by pass and length, math above flash; the last columns are math's figures over flash's."""
    lines = [
        "| | kernels | read MB | written MB | fewest MB | moved ÷ fewest | ms | math ÷ flash, bytes | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by_call = {(row["function"], row["seq_len"], row["backward"]): row for row in rows}
    for row in rows:
        m = Measurement(**{name: row[name] for name in Measurement.__dataclass_fields__})
        ratios = ["", ""]
        standard = by_call.get(("math", m.seq_len, m.backward))
        if m.function == "flash" and standard:
            ratios = [f"{moved(standard) / moved(row):.1f}×", f"{standard['seconds'] / row['seconds']:.1f}×"]
        lines.append(
            f"| {m.label} | {row['kernels']} | {row['read_bytes'] / 1e6:,.1f} | {row['written_bytes'] / 1e6:,.1f} "
            f"| {row['fewest_bytes'] / 1e6:,.1f} | {moved(row) / row['fewest_bytes']:.1f} "
            f"| {1000 * row['seconds']:.3f} | {' | '.join(ratios)} |"
        )
    return lines


def moved(row: dict[str, Any]) -> float:
    return float(row["read_bytes"] + row["written_bytes"])


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of("hbm_traffic", __doc__)
    parser.add_argument(
        "--seq-len", nargs="+", type=row_length, default=[2048, 4096, 8192, 16384], help="default 2048 … 16384"
    )
    parser.add_argument("--heads", type=positive, default=8, help="default 8")
    parser.add_argument("--head-dim", type=positive, default=64, help="default 64")
    parser.add_argument("--ncu", default="ncu", help="where Nsight Compute is, if not on the PATH")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and, kernel by kernel, OUT.csv")
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)  # the process that ncu watches
    args = parser.parse_args(argv)
    device = need_cuda("hbm_traffic")
    measurements = plan(args.seq_len, args.heads, args.head_dim)
    if args.profiled:
        run_plan(measurements)
        return 0
    ncu = shutil.which(args.ncu)
    if ncu is None:
        stop(f"{args.ncu} is not there: install NVIDIA Nsight Compute, or say where it is with --ncu")
    options = ["--seq-len", *map(str, args.seq_len), "--heads", str(args.heads), "--head-dim", str(args.head_dim)]
    output = profile(ncu, options)
    if args.out:
        write(args.out.with_name(args.out.name + ".csv"), output)
    try:
        rows = summarise(measurements, parse_ncu(output))
    except ValueError as error:
        stop(why_no_counters(output) or str(error))
    facts = collect_facts("hbm_traffic", argv, device)
    if args.out:
        write_json(args.out, facts, rows)
        write(args.out.with_name(args.out.name + ".md"), markdown(rows, facts))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
