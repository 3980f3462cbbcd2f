"""What held the GPU's memory, from the allocations and frees of PyTorch's memory snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from model.memory import GIB

from .report.series import to_keep

GROUPS = ("weights", "optimizer", "forward pass", "gradients and rest")
"""Of blocks, by who holds or allocated them: parameters and buffers; moments, and what the optimizer's step allocates;
what the forward pass allocates, above all activations; everything else, above all the backward pass."""
MOST_POINTS, LARGEST, MOST_FRAMES = 400, 10, 4
Block = tuple[int, str, list[Mapping[str, Any]]]
"""Bytes, group, and the stack that allocated it."""


def timeline(snapshot: Mapping[str, Any], device: int, held: Mapping[int, str]) -> dict[str, Any]:
    """Memory by group over the recorded time.

    Args:
        snapshot: as `torch.cuda.memory._snapshot` returns it. held: the group of what was there before, by its address.

    Returns:
        ms: times of at most MOST_POINTS points, the peak among them. gib: {group: GiB at these}. peak: {group: GiB} at
        the highest total. largest: the blocks that were largest then: gib, group, frames (innermost first).
    """
    events = [event for event in snapshot["device_traces"][device] if event["action"] in ("alloc", "free_requested")]
    before = _before(snapshot, device, events)
    blocks: dict[int, Block] = {addr: (size, held.get(addr, GROUPS[-1]), []) for addr, size in before.items()}
    changes = np.zeros((len(events) + 1, len(GROUPS)), dtype=np.int64)
    for size, group, _ in blocks.values():
        changes[0, GROUPS.index(group)] += size
    first = dict(blocks)
    for i, event in enumerate(events, 1):
        size, group, _ = _step(blocks, event)
        changes[i, GROUPS.index(group)] = size if event["action"] == "alloc" else -size
    totals = changes.cumsum(0)
    peak = int(totals.sum(1).argmax())
    for event in events[:peak]:
        _step(first, event)
    largest = sorted(first.values(), key=lambda block: -block[0])[:LARGEST]
    times = np.array([event["time_us"] for event in events[:1] + events], dtype=np.int64)
    kept = to_keep(times, totals.sum(1), MOST_POINTS) if len(times) else []
    return {
        "ms": [round(float(times[i] - times[0]) / 1000, 3) for i in kept],
        "gib": {group: [round(totals[i, g] / GIB, 5) for i in kept] for g, group in enumerate(GROUPS)},
        "peak": {group: float(totals[peak, g] / GIB) for g, group in enumerate(GROUPS)},
        "largest": [{"gib": size / GIB, "group": group, "frames": _own(frames)} for size, group, frames in largest],
    }


def _step(blocks: dict[int, Block], event: Mapping[str, Any]) -> Block:
    """Apply an event to the live blocks; returns the block that came or went."""
    if event["action"] == "free_requested":
        return blocks.pop(event["addr"])
    frames = event.get("frames", [])
    block = event["size"], group_of(frames), frames
    blocks[event["addr"]] = block
    return block


def _before(snapshot: Mapping[str, Any], device: int, events: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Sizes of the blocks that were allocated when recording began, by address: those that are freed, or still there,
    and of which no allocation is recorded."""
    before: dict[int, int] = {}
    live = set()
    for event in events:
        if event["action"] == "alloc":
            live.add(event["addr"])
        elif event["addr"] in live:
            live.remove(event["addr"])
        else:
            before[event["addr"]] = event["size"]
    for segment in snapshot["segments"]:
        if segment.get("device", device) != device:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and block.get("address", address) not in live:
                before[block.get("address", address)] = block.get("requested_size", block["size"])
            address += block["size"]
    return before


def group_of(frames: Iterable[Mapping[str, Any]]) -> str:
    """By the files on the stack. PyTorch runs the backward pass in a thread of its own, where the step is not."""
    files = [frame["filename"] for frame in frames]
    if any(file.endswith("training/optimizer.py") for file in files):
        return "optimizer"
    return "forward pass" if any(file.endswith("training/step.py") for file in files) else GROUPS[-1]


def _own(frames: Iterable[Mapping[str, Any]]) -> list[str]:
    """The innermost frames, PyTorch's left out where there are others."""
    frames = list(frames)
    own = [frame for frame in frames if "/torch/" not in frame["filename"]] or frames
    return [f"{_short(frame['filename'])}:{frame['line']} {frame['name']}" for frame in own[:MOST_FRAMES]]


def _short(file: str) -> str:
    return "/".join(file.split("/")[-2:])
