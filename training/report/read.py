"""A run folder as the page shows it: docs/run-folder.md says what the files are."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.checkpoint import folder as checkpoints
from training.config.saved import saved_settings
from training.history import FACTS
from training.run_folder import LOCK, run_nearby

from .series import Point, Series

METRICS = "metrics.jsonl"
PROFILE = "profile/summary.json"
MOST_SAMPLES, MOST_BAD_STEPS = 30, 200  # the newest; each of a sample's letters is in the page
SAMPLE = re.compile(
    r"^## step (?P<step>[\d,]+) \((?P<tokens>[\d,]+) tokens\)\n\n(?P<fence>`{3,})text\n(?P<text>.*?)\n(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


def runs_at(path: Path) -> list[Path]:
    """The run folder at `path`, or those of the sweep that lies there.

    Raises:
        ValueError: there is none; one line.
    """
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        near = run_nearby(path) or "runs/2026-11-22_10-18-00_gpt2-124m_sdpa_16384"
        raise ValueError(f"{path} {what}; name a run folder, such as {near}")
    if (path / METRICS).is_file():
        return [path]
    jobs = sorted((job for job in path.iterdir() if (job / METRICS).is_file()), key=lambda job: (len(job.name), job))
    if not jobs:
        what = f"has no {METRICS} yet" if (path / LOCK).exists() else "holds no run"
        raise ValueError(f"{path} {what}; name a run folder that holds {METRICS}, or the folder of a sweep")
    return jobs


class RunReader:
    """Reads a run again and again while it grows; a line of metrics.jsonl is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin()

    def _begin(self) -> None:
        self.offset = self.events = self.unreadable = 0
        self.clock = Series()
        self.series: dict[str, Series] = defaultdict(Series)

    def read(self) -> dict[str, Any]:
        """What the page shows of this run, JSON-able.

        Raises:
            OSError, ValueError: a file of the folder cannot be read.
        """
        for line in self._new_lines():
            self._add(line)
        facts = _object(self.folder / FACTS) or {}
        began = facts.get("started") or next((p.time for p in self.clock.points if p.time is not None), None)
        samples = list(SAMPLE.finditer(_text(self.folder / "samples.md")))
        bad_lines = _text(self.folder / "bad-steps.jsonl").splitlines()
        bad_steps = [json.loads(line) for line in bad_lines if line.endswith("}")]
        every = [self.clock, *self.series.values()]
        return {
            "name": self.folder.resolve().name,
            "events": self.events,
            "unreadable": self.unreadable,
            "began": began,
            "clock": self.clock.columns(began),
            "metrics": {name: series.columns(began) for name, series in self.series.items()},
            "is_thinned": any(series.is_thinned for series in every),
            "config": dict(flat(saved_settings(self.folder) or {})),
            "facts": dict(flat({name: value for name, value in facts.items() if name != "processes"})),
            "processes": facts.get("processes", []),
            "checkpoints": sorted(int(path.name.rpartition("-")[2]) for path in checkpoints.candidates(self.folder)),
            "bad_steps": [_bad_step(step) for step in bad_steps[-MOST_BAD_STEPS:]],
            "num_bad_steps": len(bad_steps),
            "samples": [_sample(found) for found in samples[-MOST_SAMPLES:]],
            "num_samples": len(samples),
            "profile": _object(self.folder / PROFILE),
        }

    def _new_lines(self) -> Iterator[bytes]:
        """Whole lines that were not there before; all, where the file has become shorter."""
        with open(self.folder / METRICS, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.offset:
                self._begin()
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    return
                self.offset += len(line)
                yield line

    def _add(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            step, tokens, time = event.pop("step"), event.pop("tokens"), event.pop("time", None)
            values = {name: float(value) for name, value in event.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            self.unreadable += 1
            return
        self.events += 1
        self.clock.add(Point(step, tokens, time, time or 0.0))
        for name, value in values.items():
            self.series[name].add(Point(step, tokens, time, value))


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> Any:
    """As JSON has it: no list inside, no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _text(path: Path) -> str:
    """Of a file that need not be there."""
    with suppress(FileNotFoundError):
        return path.read_text("utf-8", "replace")
    return ""


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file.

    Raises:
        ValueError: it holds something else; names it.
    """
    if not (text := _text(path)):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); remove it to see the rest") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; remove it to see the rest")
    return found


def _sample(found: re.Match[str]) -> dict[str, Any]:
    step, tokens = (int(found[name].replace(",", "")) for name in ("step", "tokens"))
    return {"step": step, "tokens": tokens, "text": found["text"]}


def _bad_step(step: dict[str, Any]) -> dict[str, Any]:
    rows = step.get("rows") or []
    shown = f"{rows[0]:,} to {rows[-1]:,}" if rows else ""
    return {"step": step["step"], "loss": step.get("loss"), "grad_norm": step.get("grad_norm"), "rows": shown}
