"""The run's record in its folder: metrics.jsonl (the source of truth) and samples.md.

One JSON object a line: {"step": 10, "tokens": 81920, "train/loss": 3.21, ...}. Strict JSON has no NaN, so a value that
is not finite is written as the string "nan", "inf" or "-inf"; `read_metrics` (or Python's float) turns it back.
A run resumed from a checkpoint repeats the steps after it; `training.run_folder` cuts their lines before.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path

from training.loggers.base import Logger, RunInfo

NOT_FINITE = {"nan", "inf", "-inf"}


class JsonlLogger(Logger):
    """Appends to <folder>/metrics.jsonl and <folder>/samples.md, flushing every line."""

    name = "jsonl"

    def start(self, run: RunInfo) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self._samples = run.folder / "samples.md"
        metrics = run.folder / "metrics.jsonl"
        _cut_half_line(metrics)
        self._metrics: TextIOWrapper = open(metrics, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        record = {"step": step, "tokens": tokens} | {name: _plain(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")

    def sample(self, step: int, tokens: int, text: str) -> None:
        # A fence longer than any run of backticks in the text cannot be closed by it.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        with open(self._samples, "a", encoding="utf-8", errors="replace") as file:
            file.write(f"## step {step:,} ({tokens:,} tokens)\n\n{fence}text\n{text}\n{fence}\n\n")

    def finish(self, status: str) -> None:
        self._metrics.close()


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The records of a metrics.jsonl, in order, with "nan", "inf" and "-inf" turned back into floats."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield {name: float(value) if value in NOT_FINITE else value for name, value in json.loads(line).items()}


def _plain(value: float) -> float | str:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else str(number)


def _cut_half_line(path: Path) -> None:
    """A killed process may leave half a line; the next record would be glued to it and neither would parse."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
