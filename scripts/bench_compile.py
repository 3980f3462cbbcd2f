"""Compiling the whole model beside compiling its blocks: time to the first step, and time of a step.

    python -m scripts.bench_compile                # gpt2-124m, 16,384 tokens, attention=flash, on a GPU
    python -m scripts.bench_compile device=cpu model=tiny seq_len=64 attention=sdpa max_steps=20    # a try-out anywhere

Every figure comes from a fresh process that runs what `python train.py …` runs. Each unit of compilation runs twice,
with an empty cache of compiled kernels (cold) and with the cache that the first run left (warm). A step is the median
over windows of ten steps after warm-up. Exit code 1 if the units end at different losses: then one of them is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.parser import parser_of
from scripts.record import ROOT
from scripts.settings import train_config
from training.runtime import resolve_runtime

DEFAULTS = ["model=gpt2-124m", "seq_len=16384", "attention=flash", "batch_size=1", "max_steps=60", "compile=true"]
DEFAULTS += ["log_every=10", "logger=none", "sample_tokens=0", "eval_tokens=16384"]
UNITS = ("model", "block")


def main() -> int:
    parser = parser_of("bench_compile", __doc__)
    parser.add_argument("overrides", nargs="*", help="settings of train.py, after the defaults")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--unit", choices=UNITS, help=argparse.SUPPRESS)  # the process that is measured
    parser.add_argument("--run-dir", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    overrides = [*DEFAULTS, *options.overrides]
    if options.unit:
        print(json.dumps(measured(options.unit, [*overrides, f"run_dir={options.run_dir}"])))
        return 0
    try:
        resolve_runtime(train_config(overrides))
    except ValueError as error:
        parser.refuse(str(error))

    rows = []
    print(
        f"{'unit':<6} {'cache':<5} {'first step s':>12} {'compiling s':>12} {'step ms':>9} {'peak GiB':>9} {'loss':>8}"
    )
    for unit in UNITS:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                row = {
                    "unit": unit,
                    "cache": cache,
                    **in_a_process(unit, f"{folder}/{cache}", folder, options.overrides),
                }
                rows.append(row)
                print(
                    f"{unit:<6} {cache:<5} {row['first_step_s']:>12.1f} {row['compiling_s']:>12.1f} "
                    f"{row['step_ms']:>9.2f} {row['peak_gib']:>9.2f} {row['loss']:>8.4f}",
                    flush=True,
                )
    if options.out:
        options.out.write_text(json.dumps({"overrides": overrides, "rows": rows}, indent=1) + "\n")
    losses = [row["loss"] for row in rows]
    if not max(losses) - min(losses) < 0.02 * max(losses):
        print(f"error: the runs end at losses from {min(losses):.4f} to {max(losses):.4f}", file=sys.stderr)
        return 1
    return 0


def in_a_process(unit: str, run_dir: str, cache: str, overrides: list[str]) -> dict[str, Any]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
    command = [sys.executable, "-m", "scripts.bench_compile", "--unit", unit, "--run-dir", run_dir, *overrides]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(unit: str, overrides: list[str]) -> dict[str, float]:
    """One run in this process."""
    from model import compile_unit
    from training.loggers.jsonl import read_metrics
    from training.services.first_step import compile_seconds
    from training.trainer import Trainer

    config = train_config(overrides)
    compile_unit.COMPILE_UNIT = unit
    trainer = Trainer(config, lambda line: None)
    trainer.fit()
    rows = [row for row in read_metrics(trainer.run.folder / "metrics.jsonl") if "train/loss" in row]
    steps = [row["time/step_ms"] for row in rows if "time/step_ms" in row]
    return {
        "first_step_s": sum(trainer.run.startup.seconds.values()),
        "compiling_s": compile_seconds() or math.nan,
        "step_ms": statistics.median(steps[1:] or steps),
        "peak_gib": max(row.get("memory/peak_allocated_gib", 0.0) for row in rows),
        "loss": rows[-1]["train/loss"],
    }


if __name__ == "__main__":
    sys.exit(main())
