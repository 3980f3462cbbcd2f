"""The command: measure the cases, print as they come, write the record."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from scripts.parser import parser_of, positive, row_length
from scripts.record import collect_facts, need_cuda, write, write_json

from . import __doc__ as usage
from .cases import GROUPS, Case, choose_cases
from .check import Check, Inputs, make_inputs, poison_free_memory
from .peers import PACKAGES, PEERS, Implementation, LeftOut, build
from .report import Row, cell, charts, failures, markdown, tables
from .timing import Memory, call_ms, gpu_time

MOST_TOKENS_CALLED = 1024
"""Rows up to this length are also timed as calls from Python, which takes longer than the GPU does."""


def run_case(case: Case, peers: Sequence[str], device: torch.device, budget_ms: float) -> list[Row]:
    """One row per implementation: errors, memory and speed; or `wrong`, `refused` or `left_out` with a reason.

    All are checked first and then timed one right after the other, so that they meet the same card.
    """
    torch.compiler.reset()  # FlexAttention compiles for each case, and PyTorch gives up on a function after 8 times
    inputs = make_inputs(case, device)
    check = Check.of(case, inputs)
    rows: list[Row] = []
    right: list[tuple[Row, Implementation, Tensor]] = []
    for peer in peers:
        row: Row = {"peer": peer, **asdict(case)}
        rows.append(row)
        try:
            implementation = build(peer, case, inputs.starts, device)
            found, out = examine(case, implementation, inputs, check, device)
        except LeftOut as left_out:
            row["left_out"] = str(left_out)
            continue
        except Exception as error:  # whatever a peer raises is its answer
            row["refused"] = one_line(error)
            continue
        row |= found
        if "wrong" not in row:
            right.append((row, implementation, out))
    del check
    for row, implementation, out in right:
        try:
            row |= speeds(case, implementation, inputs, out, budget_ms)
        except torch.OutOfMemoryError as error:
            row["refused"] = one_line(error)
    return rows


def examine(
    case: Case, implementation: Implementation, inputs: Inputs, check: Check, device: torch.device
) -> tuple[Row, Tensor]:
    """Run it once, forward and backward: its errors and memory, or what is `wrong`; and its output with the graph."""
    poison_free_memory(inputs)
    memory = Memory(device)
    out = implementation.attend(*inputs.qkv)
    row: Row = {"forward_bytes": memory.peak()}
    grads: Sequence[Tensor] = ()
    if implementation.has_backward:
        grads = torch.autograd.grad(out, inputs.qkv, check.dout, retain_graph=True)
        row["backward_bytes"] = memory.peak()
    row["errors"] = check.errors(case, out, grads)
    wrong = check.complaint(row["errors"])
    if wrong is None and case.deterministic and grads:
        again = torch.autograd.grad(out, inputs.qkv, check.dout, retain_graph=True)
        if not all(torch.equal(x, y) for x, y in zip(grads, again, strict=True)):
            wrong = "two runs differ, though they were asked to be deterministic"
    return (row if wrong is None else {"wrong": wrong}), out


def speeds(case: Case, implementation: Implementation, inputs: Inputs, out: Tensor, budget_ms: float) -> Row:
    """Milliseconds and TFLOP/s on the GPU, and for short rows milliseconds of a call from Python."""
    forward = partial(implementation.attend, *inputs.qkv)
    calls: dict[str, tuple[Callable[[], Any], float]] = {"forward": (forward, case.flops)}
    if implementation.has_backward:
        backward = partial(torch.autograd.grad, out, inputs.qkv, inputs.dout, retain_graph=True)
        calls["backward"] = backward, 2.5 * case.flops
    row: Row = {}
    for direction, (call, flops) in calls.items():
        ms, waits = gpu_time(call, budget_ms)
        row |= {f"{direction}_ms": ms, f"{direction}_tflops": flops / ms / 1e9}
        if waits:
            row["waits"] = "the GPU waited for launches, and the time has those gaps in it"
        if case.seq_len <= MOST_TOKENS_CALLED:
            row[f"{direction}_call_ms"] = call_ms(call, budget_ms)
    return row


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("bench_attention", usage)
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="groups of cases (default: all)")
    parser.add_argument("--head-dim", nargs="+", type=positive, help="default 64 128 256")
    parser.add_argument(
        "--seq-len", nargs="+", type=row_length, help="of the causal and full grids; default 1024 … 65536"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="implementations; default all")
    parser.add_argument("--quick", action="store_true", help="causal, documents, D 64 128, S 4096 16384; short timings")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json, OUT.svg, OUT-ratio.svg, after every case")
    args = parser.parse_args(argv)
    quick = args.quick
    args.only = args.only or (["causal", "documents"] if quick else list(GROUPS))
    args.head_dim = args.head_dim or ([64, 128] if quick else [64, 128, 256])
    args.seq_len = args.seq_len or ([4096, 16384] if quick else [1024, 4096, 16384, 65536])
    args.budget_ms = 20.0 if quick else 60.0
    return args


def save(out: Path, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """The record of the cases so far, which a run that is stopped leaves behind."""
    write_json(out, facts, rows)
    plots = {out.name + ending: plot for ending, plot in charts(rows).items()}
    for name, plot in plots.items():
        write(out.with_name(name), plot)
    write(out.with_name(out.name + ".md"), markdown(rows, facts, list(plots)))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    device = need_cuda("bench_attention")
    # Backward is timed on one graph again and again, which a compiled backward that gives its buffers away refuses.
    torch._functorch.config.donated_buffer = False
    facts = collect_facts("bench_attention", sys.argv[1:] if argv is None else argv, device, PACKAGES)
    cases = choose_cases(args.only, args.head_dim, args.seq_len)
    rows: list[Row] = []
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        rows += (found := run_case(case, args.peers, device, args.budget_ms))
        torch.cuda.empty_cache()
        speeds = "  ".join(f"{row['peer']} {cell(row).replace(' ', '')}" for row in found if cell(row) != "–")
        clock = f"{time.perf_counter() - began:4.0f} s {number}/{len(cases)}"
        print(f"{clock}  D {case.head_dim} {case.label}: {speeds}", flush=True)
        if args.out:
            save(args.out, facts, rows)
    print("\n".join(line for line in tables(rows) if line))
    failed = failures(rows)
    for line in dict.fromkeys(failed):
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0
