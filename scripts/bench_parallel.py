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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench_training.ladder import CHECKED, MOST_CHECKED, TOLERANCES, complaint, profile_lines, reason, run
from scripts.parser import parser_of, positive
from scripts.record import Panel, Record, Row, collect_facts, heading, line_chart, need_cuda

BASE = "attention=flash tokenizer=bytes batch_size=1"
LLAMA_1B = "model=llama-1b"
WHOLE, PACKED = f"{LLAMA_1B} data.document_mask=false", f"{LLAMA_1B} data.document_mask=true"
LONG = "precision=bf16-residual memory=full"


@dataclass(frozen=True)
class Line:
    settings: str
    """Of train.py, on any number of GPUs."""
    tokens: int
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


def _context(name: str, settings: str, tokens: int, **more: Any) -> dict[str, Line]:
    return {f"{name}-{method}": Line(settings, tokens, method=method, **more) for method in ("ulysses", "all-gather")}


LINES: dict[str, Line] = {
    "data": Line(f"{WHOLE} parallel=data", 16384, steps=30, window=5),
    "fsdp": Line(f"{WHOLE} parallel=fsdp", 16384, steps=30, window=5),
    **_context("row-32k-each", WHOLE, 32768),
    **_context("packed-32k-each", PACKED, 32768),
    **_context("row-128k-each", f"{WHOLE} {LONG}", 131072, steps=3),
    **_context("packed-128k-each", f"{PACKED} {LONG}", 131072, steps=4),
    **_context("packed-256k", f"{PACKED} {LONG}", 262144, steps=4, row=262144),
    "llama-8b-128k": Line(
        f"model=llama-8b data.document_mask=false parallel=fsdp {LONG} precision.moments=bfloat16",
        131072, steps=2, method="ulysses", row=131072,
    ),
}  # fmt: skip


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
    code = 0
    for name in args.lines:
        for gpus in args.gpus:
            if gpus == 1 and alone(record.rows, LINES[name]):
                continue  # another line's, too
            found = measure(LINES[name], gpus, checks=not args.no_check, profiles=args.profile and gpus > 1)
            row = {"line": name, **found, "commit": record.facts["commit"]}
            record.put(row)
            print(cells(row, alone(record.rows, LINES[name])), flush=True)
            if "profile" in found:
                print("\n".join(["", *profile_lines(found["profile"]), ""]), flush=True)
            code |= int(any(kind in found for kind in ("wrong", "failed", "refused")))
    return code


def measure(line: Line, gpus: int, checks: bool, profiles: bool) -> Row:
    words = line.words(gpus)
    is_checked = checks and gpus > 1
    wrong = difference(line, gpus) if is_checked else None
    timed = [*words, f"max_steps={line.steps}", f"log_every={line.window}"]
    found: Row = {"wrong": wrong} if wrong else run(timed, profiles, gpus)
    return {"gpus": gpus, "method": line.method, **found, "command": command(line, gpus), "checked": is_checked}


def difference(line: Line, gpus: int) -> str | None:
    """How the first steps of a small run on so many GPUs differ from those of one."""
    seq_len = min(line.seq_len(gpus), MOST_CHECKED)
    tokens = seq_len * (1 if line.method else gpus)
    small = [*CHECKED, f"seq_len={seq_len}", f"tokens_per_step={tokens}"]
    with ThreadPoolExecutor() as pool:  # not timed, so both at once
        ours = pool.submit(run, [*_without_length(line.words(gpus)), *small], gpus=gpus)
        theirs = pool.submit(run, [*_without_length(line.words(1)), *small])
        return complaint(ours.result(), theirs.result(), TOLERANCES)


def _without_length(words: Sequence[str]) -> Iterator[str]:
    return (word for word in words if not word.startswith("seq_len="))


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
    """Of each line TFLOP/s of a GPU against the number of GPUs."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name, line in LINES.items():
        several = [row for row in rows if row["line"] == name and row["gpus"] > 1]
        points = [(row["gpus"], per_gpu(row)) for row in several if not reason(row)]
        if points and (one := alone(rows, line)):
            series[name] = [(1, per_gpu(one)), *sorted(points)]
    if not series:
        return None
    panel = Panel("of a GPU, by the number of GPUs", series)
    return line_chart("One GPU and several", "TFLOP/s", [[panel]], list(series))


def per_gpu(row: Row) -> float:
    """TFLOP/s of each GPU, for the pairs that the mask lets through."""
    rate: float = row["attended_tflops"] / row["gpus"]
    return rate


HEAD = (
    "| | GPUs | tokens a row | tokens/s | s per step | TFLOP/s a GPU | beside one GPU | peak GiB a GPU | predicted |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
EXPLANATION = """\
Each row is a run of its own: a `train.py` command, without evaluation, samples and checkpoints. A step is the median
over windows of steps without the first, which compiles. TFLOP/s count 6 for each weight and token and 12 for each layer
and (query, key) pair that the mask lets through, and no recomputation. Peaks are of the GPU that has most. Losses and
gradient norms of the first three steps of four layers were compared with those of one GPU, with as many tokens a step.
"beside one GPU": TFLOP/s a GPU, divided by those of one GPU that trains its share of the tokens alone."""


def cells(row: Row, one: Row | None) -> str:
    """A row of the table; `one`: its line's on one GPU."""
    if why := reason(row):
        return f"| {row['line']} | {row['gpus']} | {why.replace('|', '/')} |{' |' * 6}"
    beside = f"{100 * per_gpu(row) / per_gpu(one):.1f} %" if one and row["gpus"] > 1 else "–"
    return (
        f"| {row['line']} | {row['gpus']} | {row['seq_len']:,} | {row['tokens_per_second']:,.0f} | {row['step_s']:.3f} "
        f"| {per_gpu(row):.0f} | {beside} | {row['peak_allocated_gib']:.1f} | {row['predicted_gib']:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
