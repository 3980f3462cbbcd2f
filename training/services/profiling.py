"""profile=true: a trace of chosen steps, a snapshot of the GPU's memory, and a summary of where both went."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch.profiler import ProfilerActivity as Activity
from torch.profiler import profile, record_function

from data import disk
from training.memory_profile import timeline
from training.parallel.sharding import local
from training.profiled import STEP, summary_of
from training.run import Run
from training.terminal import INDENT

from .base import Service

FOLDER, TRACE, SNAPSHOT, SUMMARY = "profile", "trace.json.gz", "memory.pickle", "summary.json"
MOST_EVENTS = 1_000_000
"""Allocations and frees in the snapshot; of more, the last."""


class Profiling(Service):
    """Steps profile_steps[0] to profile_steps[1], each from an idle device to an idle device, and outside of every
    measurement of throughput. Without profile=true it does nothing."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        """What summary.json holds: `training.profiled.summary` of the steps, and their memory."""
        self.is_on = False
        # What is open: from the first step to the last, beside a step, and around it alone.
        self.recording, self.pause, self.step = ExitStack(), ExitStack(), ExitStack()

    def begin(self, run: Run) -> None:
        if not run.config.profile or not run.world.is_first:
            return
        self.first, self.last = run.config.profile_steps
        self.on_gpu = run.world.device.type == "cuda"
        self.folder = run.folder / FOLDER
        self.is_on = run.progress.step < self.first
        if not self.is_on and not (self.folder / SUMMARY).exists():
            run.notify(f"profile    step {self.first:,} was trained earlier: nothing is profiled")

    def before_step(self, run: Run) -> None:
        if self.is_on and run.progress.step >= self.first:
            self._guarded(run, self._open)

    def after_step(self, run: Run) -> None:
        if self.is_on and run.progress.step >= self.first:
            self._guarded(run, self._close)

    def end(self, run: Run, status: str) -> None:
        with suppress(Exception):  # the run has said what it died of
            self._leave()

    def _guarded(self, run: Run, part: Callable[[Run], None]) -> None:
        """A profiler that fails ends no run: one line says so, and there is no more of it."""
        try:
            part(run)
        except Exception as error:
            self.is_on = False
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            run.notify(f"profile    nothing more is profiled, training goes on: {why}")
            with suppress(Exception):
                self._leave()

    def _leave(self) -> None:
        with self.pause, self.recording, self.step:
            pass

    def _open(self, run: Run) -> None:
        self.pause.enter_context(run.throughput.paused())
        if run.progress.step == self.first:
            if self.on_gpu:
                self.held = addresses(run)
                torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=MOST_EVENTS)
                self.recording.callback(torch.cuda.memory._record_memory_history, enabled=None)
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silent: it writes into the run's lines
            self.profiler = profile(activities=[Activity.CPU, Activity.CUDA] if self.on_gpu else [Activity.CPU])
            self.profiler.start()
            self.recording.callback(lambda: self.profiler.stop())
            run.throughput.synchronize()
        self.step.enter_context(record_function(f"{STEP}{run.progress.step}"))
        self.step.callback(run.throughput.synchronize)

    def _close(self, run: Run) -> None:
        self.step.close()
        if run.progress.step == self.last:
            self.is_on = False
            snapshot = torch.cuda.memory._snapshot() if self.on_gpu else None
            self.recording.close()
            self._write(run, snapshot)
            for line in table(self.found):
                run.notify(line)
            run.notify(f"{'':{INDENT}}{self.folder / TRACE}: open it in chrome://tracing or in Perfetto")
        self.pause.close()

    def _write(self, run: Run, snapshot: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / TRACE))
        with gzip.open(self.folder / TRACE, "rt", encoding="utf-8") as file:
            trace = json.load(file)
        memory = None
        if snapshot is not None:
            (self.folder / SNAPSHOT).write_bytes(pickle.dumps(snapshot))
            memory = timeline(snapshot, torch.cuda.current_device(), self.held)
        what = {"steps": [self.first, self.last], "device": run.world.device.type}
        self.found = {**what, **summary_of(trace, self.on_gpu), "memory": memory}
        disk.write_whole(self.folder / SUMMARY, json.dumps(self.found))


def addresses(run: Run) -> dict[int, str]:
    """The group of memory that a run holds between steps, by where it begins."""
    own = {"weights": [*run.model.parameters(), *run.model.buffers()], "optimizer": run.optimizer.tensors().values()}
    return {local(tensor).untyped_storage().data_ptr(): group for group, tensors in own.items() for tensor in tensors}


def table(found: dict[str, Any]) -> list[str]:
    """Ten rows: where the time of the steps went, and who had the memory at its peak; on a CPU the first six."""
    first, last = found["steps"]
    count = last - first + 1
    lines = [f"profile    {_steps(first, last)}, {found['span'] / count:.3f} s each"]
    for kind, share in found["shares"].items():
        lines.append(f"{'':{INDENT}}{kind:<20}{share:>8.1%}{share * found['span'] / count:>10.3f} s")
    memory = found["memory"]
    if memory is None:
        return [*lines, f"{'':{INDENT}}no memory snapshot: PyTorch records the memory of a GPU only"]
    total = sum(memory["peak"].values())
    for group, size in memory["peak"].items():
        lines.append(f"{'':{INDENT}}{group:<20}{size / total:>8.1%}{size:>10.2f} GiB of {total:.2f} at the peak")
    return lines


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
