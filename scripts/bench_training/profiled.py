"""Where the time of a training step goes on the GPU, by the names of its kernels."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from training.run import Run
from training.services import Service

KINDS: dict[str, str] = {
    # The first that matches. Inductor's kernels have the names of what they fuse in theirs: they are no attention.
    "attention": r"^(forward|backward|prepare|delta|sort|dq|dkdv)_kernel|^triton_tem_.*flex|"
    r"(?i:^(?!triton_).*(flash|fmha|attention|sdpa))",
    "optimizer": r"multi_tensor_apply|(?i:adam|muon)",
    "matrix products": r"(?i:gemm|nvjet|cutlass|cublas|splitk|matmul|triton_tem_.*mm)",
    "copies": r"^Memcpy|^Memset",
    "elementwise": r"",
}
"""Parts of a step, and regular expressions of kernel names. What nothing names is elementwise: norms, rotation,
activation functions, the loss between its products, sums."""
LONGEST = 12


class Event(NamedTuple):
    """A kernel or a copy on the GPU, in seconds on its clock."""

    name: str
    begin: float
    end: float

    @property
    def kind(self) -> str:
        return next(kind for kind, pattern in KINDS.items() if re.search(pattern, self.name))


def summary(events: Iterable[Event], span: float) -> dict[str, Any]:
    """Seconds of each kind in a step that took `span` seconds.

    Returns:
        seconds: of each kind, and "idle", in which neither a kernel nor a copy ran. Copies beside kernels count in
        full, so the sum may be more than the span. copies_alone: seconds in which a copy ran and no kernel.
        longest: (name, kind, seconds, calls) of the kernels that took most.
    """
    events = list(events)
    by_name: dict[str, list[Event]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event)
    by_kind, longest = dict.fromkeys(KINDS, 0.0), []
    for name, calls in by_name.items():
        kind, seconds = calls[0].kind, sum(call.end - call.begin for call in calls)
        by_kind[kind] += seconds
        longest.append((name, kind, seconds, len(calls)))
    longest = sorted(longest, key=lambda kernel: -kernel[2])[:LONGEST]
    busy = covered(events)
    computing = covered(event for event in events if event.kind != "copies")
    return {
        "span": span,
        "seconds": {**by_kind, "idle": max(0.0, span - busy)},
        "copies_alone": busy - computing,
        "longest": longest,
    }


def covered(events: Iterable[Event]) -> float:
    """Seconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.begin):
        total += max(0.0, event.end - max(event.begin, until))
        until = max(until, event.end)
    return total


def events_of(trace: Mapping[str, Any]) -> list[Event]:
    """The GPU's events of a trace in Chrome's format, whose times are microseconds."""
    return [
        Event(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


class ProfiledStep(Service):
    """Records one step with PyTorch's profiler, from an idle GPU to an idle GPU."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.found: dict[str, Any] = {}
        """`summary` of it."""

    def after_step(self, run: Run) -> None:
        if run.progress.step == self.step - 1:
            torch.cuda.synchronize()
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        elif run.progress.step == self.step:
            self._events[1].record()
            torch.cuda.synchronize()
            self._profile.stop()
            with tempfile.TemporaryDirectory() as folder:
                self._profile.export_chrome_trace(f"{folder}/trace.json")
                trace = json.loads(Path(folder, "trace.json").read_text())
            self.found = summary(events_of(trace), self._events[0].elapsed_time(self._events[1]) / 1000)


def profile_lines(found: Mapping[str, Any]) -> list[str]:
    """The table of a summary."""
    lines = ["| | seconds | of the step |", "|---|---:|---:|"]
    for kind, seconds in found["seconds"].items():
        lines.append(f"| {kind} | {seconds:.3f} | {100 * seconds / found['span']:.1f} % |")
    lines += [
        "",
        f"The step takes {found['span']:.3f} s; for {found['copies_alone']:.3f} s only copies run.",
        "",
    ]
    for name, kind, seconds, calls in found["longest"]:
        lines.append(f"- {seconds:.3f} s, {calls:,} calls, {kind}: `{name}`")
    return lines
