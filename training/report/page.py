"""The page: a template, a style, two scripts and the runs, in one file that loads nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from data import disk
from training.metrics import METRICS, Metric

HERE = Path(__file__).parent


def write_page(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write the page of these runs (`RunReader.read`), whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    disk.write_whole(path, page(runs), flush=False)  # the record makes it again


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The HTML. Whatever text the runs hold is data in it, never markup."""
    title = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs of flash-gpt"
    found = {name for run in runs for name in run["metrics"]}
    names = [name for name in METRICS if name in found] + sorted(found - METRICS.keys())  # those an older version had
    content = {
        "made": time.time(),
        "metrics": [_metric(name) for name in names],
        "ranges": {name: part for name in names if (part := _range(name))},
        "runs": runs,
    }
    parts = {
        "title": escape(title),
        "style": _read("uplot/uPlot.min.css") + _read("page.css"),
        "licence": _read("uplot/LICENSE"),
        "data": json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "uplot": _read("uplot/uPlot.iife.min.js"),
        "charts": _read("charts.js"),
        "profile": _read("profile.js"),
        "script": _read("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html"))


def _range(name: str) -> dict[str, Any] | None:
    """What val/loss_at_16k is a part of, and the end of its range of tokens: one line through the ranges, not a panel
    each."""
    found = re.fullmatch(r"(.+)_at_(\d+)([kmg]?)", name)
    if found is None:
        return None
    return {"of": found[1], "end": int(found[2]) * 1024 ** " kmg".index(found[3] or " ")}


def _metric(name: str) -> dict[str, Any]:
    metric = METRICS.get(name) or Metric(name, "", "not in this version's list of metrics")
    return {
        "name": name,
        "section": metric.section,
        "unit": metric.unit,
        "meaning": metric.meaning,
        "better": metric.better,
        "form": metric.form,
        "headline": metric.title,
    }


def _read(name: str) -> str:
    return (HERE / name).read_text("utf-8")
