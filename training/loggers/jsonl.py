"""The run's record in its folder: metrics.jsonl (the source of truth) and samples.md.

One JSON object a line: {"step": 10, "tokens": 81920, "time": 1795478392.41, "train/loss": 3.21, ...}. `time` is the
wall clock, in seconds since 1970. Strict JSON has no NaN, so a value that is not finite is written as the string "nan",
"inf" or "-inf"; `read_metrics` (or Python's float) turns it back.
A run resumed from a checkpoint repeats the steps after it; `training.run_folder` cuts their lines before.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from training.loggers.base import Logger, RunInfo

NOT_FINITE = {"nan", "inf", "-inf"}


class JsonlLogger(Logger):
    """Appends to <folder>/metrics.jsonl and <folder>/samples.md. What a full disk does not take waits until it does."""

    name = "jsonl"

    def __init__(self, notify: Callable[[str], None] = print) -> None:
        self._notify = notify

    def start(self, run: RunInfo) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        _cut_half_line(run.folder / "metrics.jsonl")
        self._metrics = Appender(run.folder / "metrics.jsonl", self._notify)
        self._samples = Appender(run.folder / "samples.md", self._notify)

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        head = {"step": step, "tokens": tokens, "time": round(time.time(), 3)}
        record = head | {name: _plain(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")

    def sample(self, step: int, tokens: int, text: str) -> None:
        # A fence longer than any run of backticks in the text cannot be closed by it.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        self._samples.write(f"## step {step:,} ({tokens:,} tokens)\n\n{fence}text\n{text}\n{fence}\n\n")

    def finish(self, status: str) -> None:
        for file in (self._metrics, self._samples):
            if file.waiting:
                file.write("")
            if file.waiting:
                self._notify(f"record     the last {len(file.waiting):,} bytes of {file.path} could not be written")


class Appender:
    """Appends to a file, at once; what cannot be written now is kept in `waiting` and comes before what is next."""

    def __init__(self, path: Path, notify: Callable[[str], None]) -> None:
        self.path, self.waiting = path, b""
        self._notify = notify

    def write(self, text: str) -> None:
        had_trouble = bool(self.waiting)
        self.waiting += text.encode("utf-8", "replace")
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]  # a disk may take half a line
        except OSError as error:
            if not had_trouble:
                why = f"{error.strerror}; free some space, or make it writable"
                self._notify(f"record     {self.path} waits in memory until it can be written: {why}")


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
