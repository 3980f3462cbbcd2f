"""A sweep: its folder, which of the folders in it each job goes on in, and the table at the end.

A job is known by its settings, not by its number: started again with its values in another order, a sweep finds each
job's own folder.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .config import TrainConfig
from .config.saved import saved_settings
from .metrics import in_table
from .terminal import columns, plain, say

RECORD, TABLE = "sweep.jsonl", "comparison.txt"

# What a run can go on with another value of and still be that run: how long, how often to look, where to write.
# A sweep over one of them tells its jobs apart by it all the same.
NO_IDENTITY = (
    "bad_step",
    "checkpoint",
    "compile",
    "data.cache_dir",
    "device",
    "eval_every",
    "eval_tokens",
    "log_every",
    "logger",
    "max_steps",
    "max_time",
    "max_tokens",
    "optimized_metric",
    "resume",
    "run_dir",
    "sample_every",
    "sample_prompt",
    "sample_tokens",
)


@dataclass
class Sweep:
    """What the process that starts a sweep finds out before its first job; it goes to every job, wherever that runs."""

    id: str
    """Of this start of the sweep."""
    folder: str
    """Of multirun.yaml, the record of the jobs, and the table."""
    swept: list[str]
    """Settings that have several values."""
    total: int | None = None
    """Number of jobs; None where a sweeper decides as it goes."""
    refused: list[int] = field(default_factory=list)
    """Jobs that cannot work, as their line has said."""
    folders: dict[int, str] = field(default_factory=dict)
    """Run folders of the jobs that are known, where a folder was named for the sweep."""

    def folder_for(self, number: int, run_dir: str, config: TrainConfig) -> str:
        """The folder inside `run_dir` that holds the run with these settings, or the first that is free."""
        if number not in self.folders:
            self.folders[number] = self._find(number, run_dir, config)
        return self.folders[number]

    def _find(self, number: int, run_dir: str, config: TrainConfig) -> str:
        taken = set(self.folders.values())
        mine = dict(identity(asdict(config), self.swept))
        present = sorted(_job_folders(Path(run_dir)), key=lambda path: (len(path.name), path.name))
        for path in present:
            saved = saved_settings(path) if str(path) not in taken else None
            if saved is not None:
                theirs = dict(identity(saved, self.swept))
                # A setting that only one of them knows is one that another version had.
                if all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys()):
                    return str(path)
        used = taken | {str(path) for path in present}
        numbers = (str(Path(run_dir) / str(n)) for n in range(number, number + len(used) + 1))
        return next(path for path in numbers if path not in used)

    def header(self, number: int, overrides: list[str]) -> str:
        """The line above a job's own."""
        own = [word for word in overrides if word.partition("=")[0].lstrip("+") in self.swept]
        return f"job        {number + 1}{f'/{self.total}' if self.total else ''}   {' '.join(own or overrides)}"

    def record(self, number: int, overrides: list[str], code: int, metrics: Mapping[str, float] | None) -> None:
        """Note how a job ended. Several processes may do so at once: a line is one write."""
        finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}  # as JSON has no NaN
        row = {"sweep": self.id, "job": number, "settings": overrides, "code": code, "metrics": finite}
        path = Path(self.folder) / RECORD
        try:
            with open(path, "ab", buffering=0) as file:
                file.write((json.dumps(row) + "\n").encode())
        except OSError as error:
            say(f"sweep      job {number} is not in {path}: {error.strerror}")

    def rows(self) -> list[dict[str, Any]]:
        """Jobs that ended since this start, in the order of their numbers."""
        rows = []
        with suppress(OSError), open(Path(self.folder) / RECORD, encoding="utf-8") as file:
            for line in file:
                with suppress(ValueError):
                    rows.append(json.loads(line))
        return sorted((row for row in rows if row["sweep"] == self.id), key=lambda row: row["job"])

    def compare(self) -> list[int]:
        """Print and keep the table of the jobs; returns the exit codes of those that failed."""
        rows = self.rows()
        good = [(row["settings"], row["metrics"]) for row in rows if row["metrics"]]
        if len(good) > 1:
            say(comparison(good, columns() or 160))
            with suppress(OSError):
                (Path(self.folder) / TABLE).write_text(comparison(good) + "\n", encoding="utf-8")
        return [row["code"] for row in rows if row["code"]]


def identity(settings: Mapping[str, Any], swept: Iterable[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the settings that make a run what it is."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        is_swept = any(key == other or key.startswith(f"{other}.") for other in swept)
        if isinstance(value, Mapping):
            if key not in NO_IDENTITY or any(other == key or other.startswith(f"{key}.") for other in swept):
                yield from identity(value, swept, f"{key}.")
        elif is_swept or not any(key == other or key.startswith(f"{other}.") for other in NO_IDENTITY):
            yield key, value


def _job_folders(run_dir: Path) -> list[Path]:
    with suppress(OSError):
        return [Path(entry.path) for entry in os.scandir(run_dir) if entry.is_dir()]
    return []


def comparison(results: list[tuple[list[str], dict[str, float]]], width: int = 160) -> str:
    """A table, so many columns wide at most: a row a job, named by the settings that it does not share with all
    others."""
    metrics = in_table()
    table = Table("job", *(metric.title for metric in metrics), box=None)
    shared = set.intersection(*(set(overrides) for overrides, _ in results))
    for overrides, summary in results:
        cells = [metric.text(summary[metric.name]) if metric.name in summary else "–" for metric in metrics]
        table.add_row(plain(" ".join(o for o in overrides if o not in shared)), *cells)
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n")
