"""The ladder of `scripts.bench_training --long`: which models and rows fit, and how fast they train.

    python -m scripts.bench_training --long --out long-context --rungs llama-1b-16k llama-1b-64k-full
    python -m scripts.bench_training --long --out long-context --profile llama-1b-128k-full
    python -m scripts.bench_training --long --rungs llama-1b-64k-full --set memory.tile=4096    # a try: no --out
    python -m scripts.bench_training --long --rungs gpt-1.3b-16k --nanogpt nanoGPT              # a checkout of it

Each rung is a run of its own: the settings of a `train.py` command, the same model, data and loop, without evaluation,
samples and checkpoints. The record is written after every rung, and keeps the rungs that it has: a ladder may be
climbed in several calls. Out of memory is a result.

No speed is recorded for a wrong model: with four layers and rows of 16,384 tokens at most, each policy's losses and
gradient norms over three steps, and those of fp8 and of recorded steps, must be those of a run in bf16 that is not
compiled, records nothing and keeps everything.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from scripts.parser import parser_of
from scripts.record import ROOT, Panel, Record, Row, collect_facts, heading, line_chart, need_cuda
from training.numbers import whole_number
from training.profiled import exposed

from .peers import checkout
from .rungs import RUNGS, Rung

MOST_CHECKED = 16384
CHECKED = ["model.n_layers=4", "max_steps=3", "log_every=1", "learning_rate=1e-4"]  # at which no loss jumps
CHECKED_AT_ONCE = 6
TOLERANCES = {"losses": 0.005, "grad_norms": 0.02}
"""Relative: a compiled model rounds elsewhere."""
TOLERANCES_IN_FP8 = {"losses": 0.01, "grad_norms": 0.1}
IN_FP8_ONLY = ("precision=fp8", "precision.scaling=", "precision.weight_gradients=")
"""Settings that a run in bf16, with which one in fp8 is compared, goes without."""
POLICIES = ("none", "selective", "full", "offload")
K = TypeVar("K")
Small = tuple[tuple[str, ...], int]
"""A small run: its settings, and on how many GPUs."""


def main(argv: Sequence[str] | None = None, rungs: Mapping[str, Rung] = RUNGS) -> int:
    parser = parser_of("bench_training --long", __doc__)
    parser.add_argument("--rungs", nargs="+", choices=rungs, metavar="NAME", help="which (default: all)")
    parser.add_argument("--profile", nargs="+", choices=rungs, metavar="NAME", help="where a step of these spends time")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings beside those of the rungs")
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of nanoGPT: time its model.py, too")
    parser.add_argument("--no-check", action="store_true", help="the policies were checked in another call")
    parser.add_argument("--list", action="store_true", help="print the commands and end")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and OUT.svg, into the record that is there")
    args = parser.parse_args(argv)
    chosen = {name: rungs[name] for name in args.profile or args.rungs or rungs}
    if args.list:
        print("\n".join(f"{name:<30} {command(rung, args.set)}" for name, rung in chosen.items()))
        return 0
    if args.set and args.out:
        parser.refuse("--set measures another rung than the record's: leave out --out, or write a rung into rungs.py")
    device = need_cuda("bench_training")
    words = ["--long", *(sys.argv[1:] if argv is None else argv)]
    return climb(chosen, collect_facts("bench_training", words, device), args)


def climb(chosen: Mapping[str, Rung], facts: dict[str, Any], args: argparse.Namespace) -> int:
    """Measure these rungs; exit code 1 where one is wrong or failed."""
    names = [name for rung in RUNGS for name in (rung, beside(rung))]
    record = Record(args.out, facts, ("rung",), names, markdown, chart)
    settings = {name: [*rung.words, *args.set] for name, rung in chosen.items()}
    complaints = {} if args.no_check else complaints_about(settings)
    code = 0
    for name, rung in chosen.items():
        few = 4 if "cuda_graphs=true" in settings[name] else 2  # the third step is recorded
        steps = min(rung.steps, few) if args.profile else rung.steps
        timed = [*settings[name], f"max_steps={steps}", f"log_every={rung.window}"]
        wrong = complaints.get(name)
        found: Row = {"wrong": wrong} if wrong else run(timed, profile=bool(args.profile))
        found |= {"command": command(rung, args.set), "checked": name in complaints}
        if "profile" in found:
            print("\n".join([name, "", *profile_lines(found["profile"])]), flush=True)
            record.put({"rung": name, **record.row(name), "profile": {**found["profile"], **stamp(facts)}})
        else:
            before = {key: value for key, value in record.row(name).items() if key == "profile"}
            record.put({"rung": name, **before, **found, **stamp(facts)})
            print(cells({"rung": name, **found}), flush=True)
        code |= int(any(kind in found for kind in ("wrong", "failed", "refused")))
        if args.nanogpt and rung.nanogpt and not args.profile:
            words = [str(args.nanogpt), *settings[name]]
            peer: Row = {"rung": beside(name), **run(words, module="nanogpt"), "checked": True}
            record.put(
                {**peer, "command": shlex.join(["python", "-m", f"{__package__}.nanogpt", *words]), **stamp(facts)}
            )
            print(cells(peer), flush=True)
            code |= int("failed" in peer)
    return code


def beside(rung: str) -> str:
    """The name of nanoGPT's row."""
    return f"{rung}, nanoGPT"


def is_checked(words: Sequence[str]) -> bool:
    """Whether more than the plain step is at work in a run."""
    has_policy = any(word.startswith("memory=") and word != "memory=none" for word in words)
    return has_policy or is_in_fp8(words) or "cuda_graphs=true" in words


def is_in_fp8(words: Sequence[str]) -> bool:
    return "precision=fp8" in words


def command(rung: Rung, more: Sequence[str] = ()) -> str:
    return shlex.join(["python", "train.py", *rung.words, *more])


def run(words: Sequence[str], profile: bool = False, gpus: int = 1, module: str = "measure") -> Row:
    """`measure.measured` in a process of its own, or in one for each GPU; or another module of this package."""
    flags = ["--profile"] if profile else []
    launcher = [] if gpus == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    command = [sys.executable, *launcher, "-m", f"{__package__}.{module}", *flags, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:  # a bug, or the system took it for its memory: −9
        print(done.stderr[-3000:], file=sys.stderr)
        lines = done.stderr.strip().splitlines() or [""]
        told = [line for line in lines if line.startswith("error: ")]  # a rank's, before what torchrun says of it
        return {"failed": f"exit code {done.returncode}: {(told or lines)[-1]}"}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def complaints_about(settings: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """What is wrong with the numbers of each rung that is checked, on a small model of its kind; None: nothing."""
    pairs = {name: small_runs(words) for name, words in settings.items() if is_checked(words)}
    return compare(pairs, "where everything is kept")


def compare(pairs: Mapping[K, tuple[Small, Small]], other: str) -> dict[K, str | None]:
    """What is wrong with the first small run of each pair, beside the second, the `other`; None: nothing.

    They are not timed, so several share the GPUs.
    """
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
        each = dict.fromkeys(chain.from_iterable(pairs.values()))
        rows = {(words, gpus): pool.submit(run, words, gpus=gpus) for words, gpus in each}
        return {
            key: complaint(rows[ours].result(), rows[theirs].result(), tolerances(ours[0]), other)
            for key, (ours, theirs) in pairs.items()
        }


def tolerances(words: Sequence[str]) -> Mapping[str, float]:
    return TOLERANCES_IN_FP8 if is_in_fp8(words) else TOLERANCES


def small_runs(words: Sequence[str]) -> tuple[Small, Small]:
    """Settings of three steps of a model with few layers: as these say, and those of a plain run, which keeps
    everything, is not compiled, records nothing, and computes in bf16 where these say fp8."""
    *_, seq_len = (whole_number(word[len("seq_len=") :], "seq_len") for word in words if word.startswith("seq_len="))
    rest = [word for word in words if not word.startswith("seq_len=")]
    small = (*rest, *CHECKED, f"seq_len={min(int(seq_len), MOST_CHECKED)}")
    left_out = ("memory=", "memory.", "cuda_graphs=", *(IN_FP8_ONLY if is_in_fp8(words) else ()))
    plain = (word for word in small if not word.startswith(left_out))
    return (small, 1), ((*plain, "memory=none", "compile=false"), 1)


def complaint(ours: Row, theirs: Row, limits: Mapping[str, float], other: str) -> str | None:
    """How the first figures differ from those of another run, such as "where everything is kept"."""
    for what, tolerance in limits.items():
        if what not in ours or what not in theirs:
            return f"not checked: {reason(ours) or reason(theirs)}"
        for step, (found, expected) in enumerate(zip(ours[what], theirs[what], strict=True), 1):
            if not abs(found - expected) <= tolerance * abs(expected):
                return f"{what} of step {step}: {found:.5f}, and {expected:.5f} {other}"
    return None


def reason(row: Row) -> str | None:
    """Why a row has no figures."""
    kinds = ("wrong", "failed", "refused", "out_of_memory")
    return next((f"{kind.replace('_', ' ')}: {row[kind]}" for kind in kinds if kind in row), None)


def stamp(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"commit": facts["commit"], "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}


EXPLANATION = """\
Each row is a run of its own: a `train.py` command, without evaluation, samples and checkpoints. A step is the median
over windows of steps. The first step, which compiles and pins memory, is in no window, unless it is the only one.
TFLOP/s and MFU count 6N + 6·L·d·S per token, and no recomputation. Peaks are over the whole run; that of a first step
alone lacks the moments, which its update makes. Before it was timed, each policy, fp8 and recorded steps were compared,
over three steps of four layers, in losses and gradient norms with a run in bf16 that is not compiled, records nothing
and keeps everything. nanoGPT is its own model.py, on random tokens: torch.compile, SDPA, all logits at once."""


def markdown(rows: Sequence[Row], facts: dict[str, Any], plot: str | None = None) -> str:
    lines = [*heading("Whole steps: what fits, and how fast it trains", facts), EXPLANATION, ""]
    if plot:
        lines += [f"![{plot}]({plot})", ""]
    lines += [
        "| | tokens/s | s per step | steps | TFLOP/s | MFU | peak GiB | predicted | reserved | on the host |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(cells(row) for row in rows if "command" in row),
        "",
        "## Commands",
        "",
    ]
    for row in rows:
        if "command" in row:
            unchecked = not row["checked"] and is_checked(shlex.split(row["command"]))
            checked = "; numbers not checked in this call" if unchecked else ""
            lines.append(f"- {row['rung']}, {row['measured']}, commit {row['commit']}{checked}: `{row['command']}`")
    for row in rows:
        if found := row.get("profile"):
            where = f"{found['measured']}, commit {found['commit']}"
            lines += ["", f"## Where a step's time goes: {row['rung']}", "", where, "", *profile_lines(found)]
    return "\n".join(lines) + "\n"


def cells(row: Row) -> str:
    if why := reason(row):
        return f"| {row['rung']} | {why.replace('|', '/')} |{' |' * 8}"
    only = " (the first)" if row["step_s"] == row.get("first_step_s") else ""
    mfu = "–" if row.get("mfu") is None else f"{100 * row['mfu']:.1f} %"
    memory = ("peak_allocated_gib", "predicted_gib", "peak_reserved_gib", "pinned_gib")
    return (
        f"| {row['rung']} | {row['tokens_per_second']:,.0f} | {row['step_s']:.3f} | {row['steps']}{only} "
        f"| {row['tflops']:.0f} | {mfu} | {' | '.join(f'{row[part]:.1f}' if part in row else '–' for part in memory)} |"
    )


def chart(rows: Sequence[Row], model: str = "llama-1b") -> str | None:
    """How far each policy comes with this model, and how fast it is there."""
    panels = []
    figures = {"tokens/s": "tokens_per_second", "TFLOP/s": "tflops", "peak GiB": "peak_allocated_gib"}
    for title, figure in figures.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.get("model") == model and figure in row:
                series.setdefault(row["policy"], []).append((row["seq_len"], row[figure]))
        panels.append(Panel(title, series))
    if not panels[0].series:
        return None
    names = [policy for policy in POLICIES if policy in panels[0].series]
    return line_chart(f"{model}, one row a step, against its tokens", model, [panels], names)


def profile_lines(found: Mapping[str, Any]) -> list[str]:
    """The table of a summary."""
    lines = ["| | seconds | of the step |", "|---|---:|---:|"]
    for kind, seconds in found["seconds"].items():
        if seconds:
            lines.append(f"| {kind} | {seconds:.3f} | {100 * seconds / found['span']:.1f} % |")
    alone = [f"for {seconds:.3f} s nothing but {kind}" for kind, seconds in exposed(found).items() if seconds]
    lines += ["", "; ".join([f"The step takes {found['span']:.3f} s", *alone]) + ".", ""]
    for name, kind, seconds, calls in found["longest"]:
        lines.append(f"- {seconds:.3f} s, {calls:,} calls, {kind}: `{name}`")
    return lines
