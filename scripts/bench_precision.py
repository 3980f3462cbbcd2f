"""The loss of a run in each precision, beside the first, over several seeds.

    python -m scripts.bench_precision --out docs/benchmarks/fp8-loss
    python -m scripts.bench_precision "precision=bf16" "precision=fp8 precision.scaling=rowwise" --seeds 0 1

Each variant is the same `python train.py` command with other settings, in a process of its own. A seed fixes the first
weights and the order of the rows, so variants are compared seed by seed; what two seeds of the first variant differ by
is chance. Started again with the same --out, the command trains what is missing.
"""

from __future__ import annotations

import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.parser import parser_of, positive, whole
from scripts.record import ROOT, Panel, Record, Row, collect_facts, heading, line_chart, need_cuda, stop
from scripts.settings import train_config
from training.loggers.jsonl import read_metrics

VARIANTS = (
    "precision=bf16",
    "precision=fp8",
    "precision=fp8 precision.scaling=rowwise",
    "precision=fp8 precision.weight_gradients=bfloat16",
)
EVERY_RUN = (
    "model=gpt2-124m seq_len=16k data.document_mask=false attention=flash "
    "logger=none checkpoint.save=false sample_tokens=0"
)
QUARTERS = 4
FEWEST_STEPS = 40


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = parser_of("bench_precision", __doc__)
    parser.add_argument(
        "variants", nargs="*", default=VARIANTS, help="settings of train.py; the first is the reference"
    )
    parser.add_argument("--seeds", nargs="+", type=whole, default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--steps", type=positive, default=1000, help="optimizer steps of a run (default 1000)")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and OUT.svg")
    args = parser.parse_args(argv)
    if args.steps < FEWEST_STEPS:
        parser.refuse(f"--steps {args.steps}: each quarter needs a loss, every tenth step has one; use {FEWEST_STEPS}")
    for variant in args.variants:
        try:
            train_config(shlex.split(f"{EVERY_RUN} {variant}"))
        except ValueError as error:
            parser.refuse(str(error))
    facts = collect_facts("bench_precision", argv, need_cuda("bench_precision"))
    facts["run"] = f"python train.py {EVERY_RUN} max_steps={args.steps}"
    record = Record(args.out, facts, ("variant", "seed"), args.variants, page, chart)
    if others := {row["run"] for row in record.rows} - {facts["run"]}:
        parser.refuse(f"{args.out}.json is of {others.pop()}; choose another --out")
    # Variants of earlier calls stand below those of this one, whose first is the reference.
    record.names += dict.fromkeys(row["variant"] for row in record.rows if row["variant"] not in args.variants)
    for seed in args.seeds:
        for variant in args.variants:
            if record.row(variant, seed):
                continue
            print(f"{variant} seed={seed}", flush=True)
            row = {"variant": variant, "seed": seed, "run": facts["run"], "commit": facts["commit"]}
            record.put(row | train(variant, seed, args.steps))
    print(page(record.rows, facts, None))


def train(variant: str, seed: int, steps: int) -> Row:
    """Losses by step, of a run in a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*shlex.split(f"{EVERY_RUN} {variant}"), f"seed={seed}", f"max_steps={steps}", f"run_dir={folder}/run"]
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True)
        if done.returncode:
            stop(f"{variant} seed={seed} ended with exit code {done.returncode}: {done.stderr.strip()[-400:]}")
        metrics = list(read_metrics(Path(folder) / "run" / "metrics.jsonl"))
    return {name: [[row["step"], row[name]] for row in metrics if name in row] for name in ("train/loss", "val/loss")}


def mean_between(losses: Sequence[Sequence[float]], after: float, until: float) -> float:
    return statistics.mean(loss for step, loss in losses if after < step <= until)


def by_variant(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Rows by variant and seed; the first variant first."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["variant"], {})[row["seed"]] = row
    return found


def compared(first: dict[int, float], other: dict[int, float]) -> str:
    """The mean difference in %, and that of each seed that both have."""
    each = [100 * (other[seed] / first[seed] - 1) for seed in sorted(first.keys() & other.keys())]
    if not each:
        return "–"
    return f"{statistics.mean(each):+.2f} % ({', '.join(f'{x:+.2f}' for x in each)})"


def spread(losses: Sequence[float]) -> str:
    """The mean over seeds, and how far the seeds lie from it."""
    mean = statistics.mean(losses)
    return f"{mean:.4f} ± {100 * statistics.stdev(losses) / mean:.2f} %" if len(losses) > 1 else f"{mean:.4f}"


def page(rows: Sequence[Row], facts: dict[str, Any], plot: str | None) -> str:
    variants = by_variant(rows)
    first, *others = variants
    last = max(step for step, _ in rows[0]["train/loss"])
    edges = [last * i // QUARTERS for i in range(QUARTERS + 1)]
    lines = [
        *heading("The loss in each precision", facts),
        "Each run is one command, with another seed and the settings that its column names:", "",
        f"    {facts['run']}", "",
        "The text, the sources of Python's standard library, is read several times. In brackets: each seed's own",
        "difference. ±: one standard deviation between seeds. The training loss is that of each tenth step.", "",
    ]  # fmt: skip
    if plot:
        lines += [f"![{plot}]({plot})", ""]
    seeds = ", ".join(map(str, sorted(variants[first])))
    head = [f"`{first}`, seeds {seeds}", *(f"`{name}`" for name in others)]
    lines += [f"| training loss, steps | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for after, until in pairwise(edges):
        means = {
            name: {seed: mean_between(row["train/loss"], after, until) for seed, row in found.items()}
            for name, found in variants.items()
        }
        lines.append(f"| {after + 1} to {until} | {_cells(means)} |")
    lines += ["", f"| validation loss after step | {' | '.join(head)} |", "|---:|" + "---:|" * len(head)]
    for step in [step for step, _ in rows[0]["val/loss"] if step]:
        means = {
            name: {seed: dict(row["val/loss"])[step] for seed, row in found.items()} for name, found in variants.items()
        }
        lines.append(f"| {step} | {_cells(means)} |")
    return "\n".join(lines) + "\n"


def _cells(means: dict[str, dict[int, float]]) -> str:
    first, *others = means.values()
    return " | ".join([spread(list(first.values())), *(compared(first, other) for other in others)])


def chart(rows: Sequence[Row]) -> str | None:
    """Means over seeds; of the training loss, means since the point before."""
    variants = by_variant(rows)
    steps, edges = [step for step, _ in rows[0]["train/loss"]], [0]
    for part in (60, 120, 250, 500, 1000):
        if any(edges[-1] < step <= max(steps) * part // 1000 for step in steps):
            edges.append(max(steps) * part // 1000)
    training: dict[str, list[tuple[float, float]]] = {}
    validation: dict[str, list[tuple[float, float]]] = {}
    for variant, found in variants.items():
        name = variant.replace("precision=", "").replace("precision.", "")
        training[name] = [
            (float(until), statistics.mean(mean_between(row["train/loss"], after, until) for row in found.values()))
            for after, until in pairwise(edges)
        ]
        validation[name] = [
            (float(step), statistics.mean(dict(row["val/loss"])[step] for row in found.values()))
            for step, _ in rows[0]["val/loss"] if step
        ]  # fmt: skip
    panels = [Panel("training loss", training), Panel("validation loss", validation)]
    model = re.search(r"model=(\S+)", rows[0]["run"])
    return line_chart(f"{model[1] if model else ''}: loss against steps", "nats", [panels], list(training))


if __name__ == "__main__":
    main()
