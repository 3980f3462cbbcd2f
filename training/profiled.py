"""Where the time of a training step goes, by the names of what ran: a GPU's kernels, or a CPU's operators."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

KINDS: dict[str, str] = {
    # The first that matches. Inductor's kernels have the names of what they fuse in theirs: they are no attention.
    "attention": r"^(forward|backward|preprocess|delta|sort|dq|dkdv)_kernel|^triton_tem_.*flex|"
    r"(?i:^(?!triton_).*(flash|fmha|attention|sdpa))",
    "communication": r"^(nccl|gloo:|c10d::)",
    "optimizer": r"^Optimizer\.step|multi_tensor_apply|(?i:adam|muon)",
    "matrix products": r"(?i:gemm|nvjet|cutlass|cublas|splitk|matmul|triton_tem_.*mm)|"
    r"^aten::(add|b|badd)?(mm|bmm|linear)$",
    "copies": r"^Memcpy|^Memset|^aten::(copy_|_to_copy|to|clone|contiguous)$",
    "elementwise": r"",
}
"""Parts of a step, and regular expressions of kernel names. What nothing names is elementwise: norms, rotation,
activation functions, the loss between its products, sums."""
BESIDE = ("communication", "copies")
"""What runs beside the others: of a moment in which several kinds run, the share goes to one that is not here, and then
to the first."""
LONGEST = 12
STEP, OPTIMIZER = "step ", "Optimizer.step"
"""Beginnings of the names of ranges in a trace: ours around a step, and PyTorch's around an optimizer."""


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


class Event(NamedTuple):
    """A kernel or a copy on the GPU, or an operator on the CPU, in seconds on its clock."""

    name: str
    begin: float
    end: float
    part: str = ""
    """The kind of what it runs for, where that says more than its name."""
    calls: int = 1
    """0: an operator that goes on after one that it called."""

    @property
    def kind(self) -> str:
        return self.part or kind_of(self.name)


def summary(events: Iterable[Event], span: float) -> dict[str, Any]:
    """Seconds of each kind in a step that took `span` seconds, or in several.

    Returns:
        seconds: of each kind, and "idle", in which nothing of them ran; "communication" where there is any. It
            and copies beside other kernels count in full, so the sum may be more than the span.
        shares: of the span, with each moment counted once (see `BESIDE`): their sum is 1.
        longest: (name, kind, seconds, calls) of the kernels that took most.
    """
    events = sorted(events, key=lambda event: event.begin)
    by_name: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        by_name.setdefault((event.name, event.part), []).append(event)
    kinds = [kind for kind in KINDS if kind != "communication" or any(event.kind == kind for event in events)]
    by_kind, longest = dict.fromkeys(kinds, 0.0), []
    for (name, _), calls in by_name.items():
        kind, seconds = calls[0].kind, sum(call.end - call.begin for call in calls)
        by_kind[kind] += seconds
        longest.append((name, kind, seconds, sum(call.calls for call in calls)))
    longest = sorted(longest, key=lambda kernel: -kernel[2])[:LONGEST]
    idle = max(0.0, span - covered(events))
    once, until = dict.fromkeys(kinds, 0.0), float("-inf")
    for event in events:
        if (kind := event.kind) not in BESIDE:
            once[kind] += max(0.0, event.end - max(event.begin, until))
            until = max(until, event.end)
    beside = [kind for kind in BESIDE if kind in kinds]
    for i, kind in enumerate(beside):
        once[kind] = covered(event for event in events if event.kind not in beside[i + 1 :]) - sum(once.values())
    return {
        "span": span,
        "seconds": {**by_kind, "idle": idle},
        "shares": {kind: seconds / span for kind, seconds in {**once, "idle": idle}.items()} if span else {},
        "longest": longest,
    }


def exposed(found: Mapping[str, Any]) -> dict[str, float]:
    """Of a summary the seconds in which only communication ran, and only copies."""
    return {kind: found["shares"][kind] * found["span"] for kind in BESIDE if kind in found["shares"]}


def covered(events: Iterable[Event]) -> float:
    """Seconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.begin):
        total += max(0.0, event.end - max(event.begin, until))
        until = max(until, event.end)
    return total


# ---- traces in Chrome's format, whose times are microseconds


def summary_of(trace: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """`summary` of the steps in a trace; what ran between them is left out.

    Raises:
        ValueError: no step is in it, or nothing that ran in one.
    """
    steps = [
        Event(range["name"], *_seconds(range))
        for range in trace["traceEvents"]
        if range.get("cat") == "user_annotation" and range["name"].startswith(STEP)
    ]
    if not steps:
        raise ValueError("the trace holds no step")
    events = events_of(trace) if on_gpu else operators_of(trace)
    inside = [
        event._replace(begin=max(event.begin, step.begin), end=min(event.end, step.end))
        for event in events
        for step in steps
        if event.begin < step.end and event.end > step.begin
    ]
    if not inside:
        raise ValueError("the profiler saw nothing run (KINETO_LOG_LEVEL=0 before the command lets it say why)")
    return summary(inside, sum(step.end - step.begin for step in steps))


def events_of(trace: Mapping[str, Any]) -> list[Event]:
    """The GPU's events. What was launched inside of an optimizer is the optimizer's, whatever its name."""
    events = trace["traceEvents"]
    optimizers = [(event["tid"], *_seconds(event)) for event in events if _is_optimizer(event)]
    launched = {
        event.get("args", {}).get("correlation")
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and any(tid == event["tid"] and begin <= _seconds(event)[0] < end for tid, begin, end in optimizers)
    }
    return [
        Event(
            event["name"], *_seconds(event), "optimizer" if event.get("args", {}).get("correlation") in launched else ""
        )
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def operators_of(trace: Mapping[str, Any]) -> list[Event]:
    """The CPU's operators, each without the time of those that it calls."""
    by_thread: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "cpu_op" or _is_optimizer(event):
            by_thread[event["tid"]].append(event)
    return [event for operators in by_thread.values() for event in _own_times(operators)]


def _own_times(operators: list[Mapping[str, Any]]) -> Iterator[Event]:
    """Of one thread. What runs inside of attention or of an optimizer is a part of it."""
    opened: list[Event] = []  # the outermost first, each from where its own time goes on
    for operator in [*sorted(operators, key=lambda each: (each["ts"], -each["dur"])), None]:
        begin = operator["ts"] / 1e6 if operator else float("inf")
        while opened:
            current = opened[-1]
            if (until := min(current.end, begin)) > current.begin:
                yield current._replace(end=until)
                opened[-1] = current._replace(begin=until, calls=0)
            if current.end > begin:
                break
            opened.pop()
            if opened:
                opened[-1] = opened[-1]._replace(begin=max(opened[-1].begin, current.end))
        if operator:
            parent = opened[-1].part if opened else ""
            part = parent if parent in ("attention", "optimizer") else kind_of(operator["name"])
            opened.append(Event(operator["name"], *_seconds(operator), part))


def _is_optimizer(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(OPTIMIZER)


def _seconds(event: Mapping[str, Any]) -> tuple[float, float]:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
