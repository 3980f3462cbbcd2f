"""One GPU or many: how fast a run is on N GPUs, beside one, and whether it is the same run.

    python -m scripts.bench_parallel --gpus 1 2 --out docs/benchmarks/parallel-h200-x2
    python -m scripts.bench_parallel --gpus 2 --lines data fsdp --profile --out docs/benchmarks/parallel-h200-x2
    python -m scripts.bench_parallel --list                   # the commands

Each line is a `train.py` command for any number of GPUs, started by torchrun, without evaluation, samples and
checkpoints. The record is written after every run and keeps what it has. Out of memory is a result.

No speed is recorded for a wrong run: with four layers and rows of 16,384 tokens at most, losses and gradient norms over
three steps on N GPUs must be those of one GPU with as many tokens a step.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench_training.ladder import (
    CHECKED,
    MOST_CHECKED,
    Small,
    compare,
    profile_lines,
    reason,
    run,
)
from scripts.parser import parser_of, positive
from scripts.record import Panel, Record, Row, collect_facts, heading, line_chart, need_cuda

BASE = "attention=flash tokenizer=bytes batch_size=1"
LLAMA_1B = "model=llama-1b"
WHOLE = f"{LLAMA_1B} data.document_mask=false"
PACKED = f"{LLAMA_1B} data=synthetic data.length=4096 data.documents=4000 data.document_mask=true"
"""Documents of 4,096 bytes."""
LONG = "precision=bf16-residual memory=full"
LLAMA_8B = f"model=llama-8b data.document_mask=false parallel=fsdp {LONG} precision.moments=bfloat16"


@dataclass(frozen=True)
class Line:
    settings: str
    """Of train.py, on any number of GPUs."""
    tokens: int = 0
    """Of a row, for each GPU that shares it."""
    steps: int = 6
    window: int = 1
    method: str = ""
    """Of context parallelism: all GPUs share each row. "": each has rows of its own."""
    row: int = 0
    """Tokens of the row however many share it, in place of `tokens` for each."""

    def seq_len(self, gpus: int) -> int:
        return self.row or self.tokens * (gpus if self.method else 1)

    def words(self, gpus: int) -> list[str]:
        shared = f"parallel.context={gpus} parallel.context_method={self.method}" if self.method and gpus > 1 else ""
        words = shlex.split(f"{BASE} {self.settings} seq_len={self.seq_len(gpus)} {shared}")
        return words if gpus > 1 else [word for word in words if not word.startswith("parallel=")]


def _context(name: str, settings: str, tokens: int = 0, **more: Any) -> dict[str, Line]:
    return {f"{name}-{method}": Line(settings, tokens, method=method, **more) for method in ("ulysses", "all-gather")}


LINES: dict[str, Line] = {
    "data": Line(f"{WHOLE} parallel=data", 16384, steps=30, window=5),
    "fsdp": Line(f"{WHOLE} parallel=fsdp", 16384, steps=30, window=5),
    **_context("row-32k-each", WHOLE, 32768),
    **_context("row-128k-each", f"{WHOLE} {LONG}", 131072, steps=3),
    **_context("packed-32k-each", PACKED, 32768),
    **_context("packed-256k", f"{PACKED} {LONG}", steps=4, row=262144),
    # Without the results of attention, which one GPU cannot keep.
    **_context("packed-1m", f"{PACKED} {LONG} memory.keep_attention=0", steps=2, row=1048576),
    "llama-8b-128k": Line(LLAMA_8B, steps=3, method="ulysses", row=131072),
    "llama-8b-1m": Line(
        f"{LLAMA_8B} memory.keep_attention=0.25 memory.head_groups=2", steps=1, method="ulysses", row=1048576
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_parallel", __doc__)
    parser.add_argument("--gpus", nargs="+", type=positive, default=[1, 2], help="numbers of GPUs (default 1 2)")
    parser.add_argument("--lines", nargs="+", choices=LINES, metavar="NAME", default=list(LINES), help="default: all")
    parser.add_argument("--profile", action="store_true", help="where a step spends its time, after the figures")
    parser.add_argument("--no-check", action="store_true", help="the numbers were checked in another call")
    parser.add_argument("--list", action="store_true", help="print the commands and end")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and OUT.svg, into the record that is there")
    args = parser.parse_args(argv)
    if args.list:
        for name in args.lines:
            print("\n".join(f"{name:<28} {command(LINES[name], gpus)}" for gpus in args.gpus))
        return 0
    words = sys.argv[1:] if argv is None else argv
    record = record_at(args.out, collect_facts("bench_parallel", words, need_cuda("bench_parallel")))
    several = [(name, gpus) for name in args.lines for gpus in args.gpus if gpus > 1]
    complaints = {} if args.no_check else complaints_about(several)
    code = 0
    for name in args.lines:
        for gpus in args.gpus:
            if gpus == 1 and alone(record.rows, LINES[name]):
                continue  # another line's, too
            wrong = complaints.get((name, gpus))
            found: Row = {"wrong": wrong} if wrong else measure(LINES[name], gpus, args.profile and gpus > 1)
            row = {"line": name, "gpus": gpus, **found, "command": command(LINES[name], gpus)}
            row |= {"checked": (name, gpus) in complaints, "commit": record.facts["commit"]}
            record.put(row)
            print(cells(row, alone(record.rows, LINES[name])), flush=True)
            if "profile" in found:
                print("\n".join(["", *profile_lines(found["profile"]), ""]), flush=True)
            code |= int(any(kind in found for kind in ("wrong", "failed", "refused")))
    return code


def measure(line: Line, gpus: int, profiles: bool) -> Row:
    return run([*line.words(gpus), f"max_steps={line.steps}", f"log_every={line.window}"], profiles, gpus)


def complaints_about(several: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str | None]:
    """How the first steps of each line, small, on so many GPUs differ from those of one; None: they do not."""
    return compare({(name, gpus): small_runs(LINES[name], gpus) for name, gpus in several}, "on one GPU")


def small_runs(line: Line, gpus: int) -> tuple[Small, Small]:
    """Settings of three steps of a model with few layers, and on how many GPUs: on all, and on one with as many tokens
    a step."""
    seq_len = min(line.seq_len(gpus), MOST_CHECKED)
    small = (*CHECKED, f"seq_len={seq_len}", f"tokens_per_step={seq_len * (1 if line.method else gpus)}")
    ours, theirs = ((word for word in line.words(n) if not word.startswith("seq_len=")) for n in (gpus, 1))
    return ((*ours, *small), gpus), ((*theirs, *small), 1)


def command(line: Line, gpus: int) -> str:
    launcher = ["python"] if gpus == 1 else ["torchrun", f"--nproc-per-node={gpus}"]
    return shlex.join([*launcher, "train.py", *line.words(gpus)])


def record_at(out: Path | None, facts: dict[str, Any]) -> Record:
    return Record(out, facts, ("line", "gpus"), list(LINES), markdown, chart)


def alone(rows: Sequence[Row], line: Line) -> Row | None:
    """What the line's command reached on one GPU, whichever line it was run for."""
    return next((row for row in rows if row["command"] == command(line, 1) and not reason(row)), None)


def markdown(rows: Sequence[Row], facts: dict[str, Any], plot: str | None) -> str:
    lines = [*heading("One GPU and several", facts), EXPLANATION, ""]
    several = (row for row in rows if row["gpus"] > 1 and not reason(row) and not row.get("checked"))
    if unchecked := ", ".join(f"{row['line']} on {row['gpus']}" for row in several):
        lines += [f"Not compared: {unchecked}.", ""]
    if plot:
        lines += [f"![{plot}]({plot})", ""]
    lines += [HEAD, *(cells(row, alone(rows, LINES[row["line"]])) for row in rows), "", "## Commands", ""]
    lines += [f"- {row['line']}, commit {row['commit']}: `{row['command']}`" for row in rows]
    for row in rows:
        if found := row.get("profile"):
            where = f"{row['line']}, rank 0 of {row['gpus']}"
            lines += ["", f"## Where a step's time goes: {where}", "", *profile_lines(found)]
    return "\n".join(lines) + "\n"


def chart(rows: Sequence[Row]) -> str | None:
    """Of each line the efficiency against the number of GPUs."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name, line in LINES.items():
        several = [row for row in rows if row["line"] == name and row["gpus"] > 1 and not reason(row)]
        if several and (one := alone(rows, line)):
            series[name] = [(1, 100.0), *sorted((row["gpus"], 100 * per_gpu(row) / per_gpu(one)) for row in several)]
    if not series:
        return None
    panel = Panel("of one GPU, by the number of GPUs", series)
    return line_chart("TFLOP/s of a GPU among several", "%", [[panel]], list(series))


def per_gpu(row: Row) -> float:
    """TFLOP/s of each GPU, for the pairs that the mask lets through."""
    rate: float = row["attended_tflops"] / row["gpus"]
    return rate


HEAD = (
    "| | GPUs | tokens a row | tokens/s | s per step | TFLOP/s a GPU | MFU | beside one GPU | peak GiB a GPU "
    "| predicted |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
EXPLANATION = """\
Each row is a run of its own: a `train.py` command, without evaluation, samples and checkpoints. A step is the median
over windows of steps without the first, which compiles, unless it is the only one. TFLOP/s count 6 for each weight and
token, 12 · heads · head_dim for each layer and (query, key) pair that the mask lets through, and no recomputation; MFU
counts the same. Peaks are of the GPU that has most. Losses and gradient norms of the first three steps of four layers
were compared with those of one GPU, with as many tokens a step. "beside one GPU": TFLOP/s a GPU, divided by those of
one GPU alone. That one has the same row where the line's name has the row's length, and else one GPU's share of it."""


def cells(row: Row, one: Row | None) -> str:
    """A row of the table; `one`: its line's on one GPU."""
    if why := reason(row):
        return f"| {row['line']} | {row['gpus']} | {why.replace('|', '/')} |{' |' * 7}"
    beside = f"{100 * per_gpu(row) / per_gpu(one):.1f} %" if one and row["gpus"] > 1 else "–"
    mfu = f"{100 * row['mfu'] * row['attended_tflops'] / row['tflops']:.1f} %" if row["mfu"] else "–"
    return (
        f"| {row['line']} | {row['gpus']} | {row['seq_len']:,} | {row['tokens_per_second']:,.0f} | {row['step_s']:.3f} "
        f"| {per_gpu(row):.0f} | {mfu} | {beside} | {row['peak_allocated_gib']:.1f} "
        f"| {row['predicted_gib']:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
