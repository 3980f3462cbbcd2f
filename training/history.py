"""When the processes of a run began and ended: what facts.json says of its time. Needs no torch.

Times are seconds since 1970, as in metrics.jsonl. `processes` has an entry for each process that trained; `restarts` is
how many came after the first. A process that was killed could not write its end: it has none, and its status is killed.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data import disk

FACTS = "facts.json"


def begin(folder: Path, facts: dict[str, Any], step: int) -> None:
    """Write facts.json for a process that goes on from `step`, with what it says of the processes before.

    Raises:
        OSError: it cannot be written.
    """
    before = [
        {**process, "status": "killed"} if process["status"] == "running" else process
        for process in _processes(folder / FACTS)
    ]
    _write(folder, facts, [*before, {"started": time.time(), "ended": None, "step": step, "status": "running"}])


def end(folder: Path, status: str) -> None:
    """Note how this process ended: "finished", "failed" or "interrupted".

    Raises:
        OSError: it cannot be written.
    """
    facts = json.loads((folder / FACTS).read_text("utf-8"))
    *before, process = facts["processes"]
    _write(folder, facts, [*before, {**process, "ended": time.time(), "status": status}])


def _write(folder: Path, facts: dict[str, Any], processes: list[dict[str, Any]]) -> None:
    started, ended = processes[0]["started"], processes[-1]["ended"]
    times = {
        "started": started,
        "ended": ended,
        "duration_seconds": ended and ended - started,
        "status": processes[-1]["status"],
        "restarts": len(processes) - 1,
        "processes": processes,
    }
    disk.write_whole(folder / FACTS, json.dumps(facts | times, indent=2) + "\n")


def _processes(path: Path) -> list[dict[str, Any]]:
    """None of a folder that is new, or whose facts.json is an older version's or damaged."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        processes = json.loads(path.read_text("utf-8"))["processes"]
        if all({"started", "ended", "step", "status"} <= process.keys() for process in processes):
            return list(processes)
    return []
