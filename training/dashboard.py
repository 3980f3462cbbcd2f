"""The workspace of W&B as plain data: sections and panels from METRICS, and its translation into W&B's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from .metrics import METRICS, Metric

SECTIONS = {"learning": ("train", "val"), "throughput": ("throughput",), "memory": ("memory",)}
SECTIONS |= {"time": ("time", "checkpoint")}
"""Names of the workspace's sections, and which of METRICS' sections they hold: all of them."""
BY_ATTENTION = ("val/loss", "throughput/tokens_per_second", "throughput/mfu", "memory/peak_allocated_gib")
ATTENTION = "attention.name"
"""In a run's configuration."""
X = "tokens"


def workspace(entity: str, project: str, name: str) -> dict[str, Any]:
    """Everything that the workspace shows, JSON-able."""
    sections = [
        {
            "name": section,
            "is_open": section in ("learning", "throughput"),
            "panels": [panel for part in parts for panel in _panels(part)],
        }
        for section, parts in SECTIONS.items()
    ]
    attention = [_line([METRICS[metric]], groupby=ATTENTION) for metric in BY_ATTENTION]
    sections.append({"name": "by attention", "is_open": True, "panels": attention})
    return {"entity": entity, "project": project, "name": name, "x": X, "sections": sections}


def _panels(section: str) -> Iterator[dict[str, Any]]:
    """A panel for each metric, and one for those that differ in a range alone, such as the losses by tokens read."""
    metrics = [metric for metric in METRICS.values() if metric.section == section]
    for _, alike in groupby(metrics, lambda metric: (metric.unit, metric.meaning)):
        yield _line(list(alike))


def _line(metrics: list[Metric], groupby: str | None = None) -> dict[str, Any]:
    first = metrics[0]
    better = f"{first.better} is better" if first.better else ""
    name = first.name if len(metrics) == 1 else f"{first.name.rpartition('_')[0]}_…"
    return {
        "title": ", ".join(filter(None, (name, better))),
        "x": X,
        "y": [metric.name for metric in metrics],
        "title_y": first.unit or None,
        "groupby": groupby,
    }


def translated(plain: dict[str, Any], existing: Any = None) -> Any:
    """The workspace as wandb_workspaces has it, to be saved: a new one, or `existing` with new sections and name.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def panel(line: dict[str, Any]) -> Any:
        group = {"groupby": wr.Config(line["groupby"])} if line["groupby"] else {}
        return wr.LinePlot(title=line["title"], x=line["x"], y=line["y"], title_y=line["title_y"], **group)

    sections = [
        ws.Section(name=each["name"], is_open=each["is_open"], panels=[panel(line) for line in each["panels"]])
        for each in plain["sections"]
    ]
    if existing is not None:
        existing.name, existing.sections = plain["name"], sections
        existing.settings.x_axis = plain["x"]
        return existing
    return ws.Workspace(
        entity=plain["entity"],
        project=plain["project"],
        name=plain["name"],
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=plain["x"]),
    )
