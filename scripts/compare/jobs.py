"""The combinations, and what became of each: a training run in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from scripts.record import ROOT, write
from training.config.paths import in_quotes
from training.history import FACTS
from training.loggers.jsonl import read_metrics

Row = dict[str, Any]
Settings = dict[str, str]

QUIET = ["logger=none", "sample_tokens=0", "eval_every=0", "checkpoint.save=false"]
OUT_OF_MEMORY = 3  # train.py's exit code
KILLED = -9  # by the system, which is out of memory itself
TOO_LARGE = {"out of memory", "does not fit"}
"""Tried, and predicted by train.py, which then does not try."""
LAST = {"done", "refused", *TOO_LARGE}
"""Outcomes that stand; a job with another one is run again."""
NEEDS = re.compile(r" needs [\d,]+ GiB \(")  # so train.py refuses what will not fit


def combinations(swept: Mapping[str, Sequence[str]]) -> list[Settings]:
    """All of them, the shortest rows first: what a longer row costs is known before it is waited for."""
    found = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    return sorted(found, key=lambda settings: length(settings["seq_len"]))


def length(seq_len: str) -> float:
    """16384, 16_384 and 16k as a number; what is none comes last, and is train.py's to refuse."""
    text, unit = (seq_len[:-1], 1024) if seq_len[-1:] in ("k", "K") else (seq_len, 1)
    try:
        return float(text) * unit
    except ValueError:
        return float("inf")


def run_job(settings: Settings, folder: Path, steps: int, limit_s: float) -> Row:
    """Train, or take the result that an earlier start left in `folder`."""
    command = ["train.py", *(f"{key}={value}" for key, value in settings.items()), *QUIET]
    command += [f"max_steps={steps}", f"log_every={max(1, steps // 4)}"]
    if "eval_tokens" not in settings:
        command.append(f"eval_tokens={max(4096, int(min(length(settings['seq_len']), 2**30)))}")
    kept = folder / "result.json"
    if kept.exists():
        row: Row = json.loads(kept.read_text("utf-8"))
        if row["command"] == command and row["outcome"] in LAST:
            return row
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run"
    began = time.monotonic()
    code, peak_bytes = _train([*command, f"run_dir={in_quotes(str(run.absolute()))}"], folder, limit_s)
    row = {"settings": settings, "command": command, "seconds": time.monotonic() - began, **_outcome(code, folder)}
    if row["outcome"] == "done":
        row |= _figures(run, peak_bytes)
    write(kept, json.dumps(row, indent=1) + "\n")
    return row


def _train(command: list[str], folder: Path, limit_s: float) -> tuple[int | None, int]:
    """Exit code (None: it took longer than the limit) and peak bytes of the process."""
    with open(folder / "out.log", "wb") as out, open(folder / "err.log", "wb") as err:
        process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=out, stderr=err)
        deadline = time.monotonic() + limit_s
        try:
            while time.monotonic() < deadline:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    unit = 1 if sys.platform == "darwin" else 1024
                    return process.returncode, usage.ru_maxrss * unit
                time.sleep(0.05)
            return None, 0
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()


def _outcome(code: int | None, folder: Path) -> Row:
    """How it ended, and the line that says why."""
    if code == 0:
        return {"outcome": "done"}
    if code is None:
        return {"outcome": "too long", "why": "it took longer than --limit"}
    lines = [line for line in (folder / "err.log").read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    why = (errors or lines or ["it said nothing"])[-1]
    if code == KILLED:
        return {"outcome": "out of memory", "why": "the system killed it, most likely for want of memory"}
    refused = "does not fit" if NEEDS.search(why) else "refused"
    outcome = {2: refused, OUT_OF_MEMORY: "out of memory"}.get(code, "failed") if errors else "failed"
    return {"outcome": outcome, "why": why, "code": code}


def _figures(run: Path, peak_bytes: int) -> Row:
    """Medians over the windows between log lines, the first left out where there are others; losses at the end."""
    records = list(read_metrics(run / "metrics.jsonl"))
    windows = [record for record in records if "throughput/tokens_per_second" in record]
    windows = windows[1:] or windows

    def median(name: str) -> float | None:
        values = [window[name] for window in windows if name in window]
        return statistics.median(values) if values else None

    peaks = [record["memory/peak_allocated_gib"] for record in records if "memory/peak_allocated_gib" in record]
    facts = json.loads((run / FACTS).read_text("utf-8"))
    return {
        "seq_len": _seq_len(run),
        "tokens_per_second": median("throughput/tokens_per_second"),
        "step_ms": median("time/step_ms"),
        "mfu": median("throughput/mfu"),
        "peak_gib": max(peaks) if peaks else peak_bytes / 2**30,
        "peak_of": "GPU" if peaks else "process",
        "train_loss": [record["train/loss"] for record in records if "train/loss" in record][-1],
        "val_loss": [record["val/loss"] for record in records if "val/loss" in record][-1],
        "kernel": facts["attention"],
        "precision": facts["precision"],
        "device": facts["device"],
        "versions": facts["versions"],
        "commit": facts["git_commit"],
    }


def _seq_len(run: Path) -> int:
    from training.config.saved import saved_settings

    return int((saved_settings(run) or {})["seq_len"])
