"""What a run says at its end: how good, how fast and how large it was, and what to do next. Needs no torch."""

from __future__ import annotations

import math
import resource
import shlex
import sys
from pathlib import Path

from model.memory import GIB

from .loggers.jsonl import read_metrics
from .metrics import METRICS, short
from .terminal import INDENT


def closing_lines(folder: Path, columns: int | None = None) -> list[str]:
    """The summary of a run that finished, over all of its processes, from metrics.jsonl. Without a line for what the
    record does not hold, or cannot be read for.

    Args:
        columns: of the terminal; None: there is none. A command that is longer is continued in the next line.
    """
    best: tuple[float, int] | None = None
    tokens = seconds = peak = mfu = 0.0
    before = 0.0
    try:
        for record in read_metrics(folder / "metrics.jsonl"):
            loss = record.get("val/loss", math.nan)
            if math.isfinite(loss) and (best is None or loss < best[0]):
                best = loss, int(record["step"])
            if "train/loss" in record:
                if speed := record.get("throughput/tokens_per_second"):
                    tokens += (new := record["tokens"] - before)
                    seconds += new / speed
                    mfu += new / speed * record.get("throughput/mfu", math.nan)
                before = record["tokens"]
            peak = max(peak, record.get("memory/peak_allocated_gib", 0.0))
    except (OSError, ValueError, KeyError, TypeError):
        best, seconds, peak = None, 0.0, 0.0
    lines = []
    if best is not None:
        lines.append(f"best       validation loss {METRICS['val/loss'].text(best[0])} at step {best[1]:,}")
    if seconds > 0:
        of_peak = "" if math.isnan(mfu) else f", MFU {METRICS['throughput/mfu'].text(mfu / seconds)}"
        lines.append(f"speed      {short(tokens / seconds)} tokens/s on average{of_peak}")
    lines.append(
        f"memory     {peak:.1f} GiB at most" if peak else f"memory     {host_peak():.1f} GiB of host memory at most"
    )
    run = shlex.quote(str(folder))
    commands: list[tuple[str, ...]] = [("python -m scripts.report", run)]
    if (folder / "model.safetensors").exists():
        commands.insert(0, ("python -m scripts.generate", run, '"Once upon a time"'))
    lines += [
        head.ljust(INDENT) + _command(command, columns) for head, command in zip(("next", ""), commands, strict=False)
    ]
    return lines


def _command(parts: tuple[str, ...], columns: int | None) -> str:
    """As it can be copied: a line that was broken elsewhere would be two commands."""
    line = " ".join(parts)
    is_long = columns is not None and INDENT + len(line) > columns
    return f" \\\n{' ' * INDENT}    ".join(parts) if is_long else line


def host_peak() -> float:
    """The most memory that this process held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
