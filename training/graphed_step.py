"""A step that the GPU repeats by itself: recorded as CUDA graphs once, then replayed.

Three functions are recorded: the first micro-batch of a step, whose backward pass makes the gradients; a further one,
whose backward pass adds to them; and the update: norm, clipping, guard, optimizer, the weights' copies. What differs
from step to step (tokens, targets, documents, their number, the learning rate, the step's number) lies in tensors that
are written before a replay; what must last (parameters, moments, the guard's window) is written in place. All else
lives in one pool of memory that the three share: they are replayed in the order in which they were recorded.

The first steps of a process run the same functions without a graph: they compile, choose kernels, and make the
optimizer's moments. So a run that goes on takes the same steps as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from data.loader import Batch

from .step import StepResult, TrainStep

STEPS_BEFORE = 2
"""Recorded is the step after these; the third is the last that no throughput is measured of."""

Function = Callable[[], None]


class Recorder(Protocol):
    """What makes a function one that is replayed."""

    peak: int
    """Bytes: the most that was allocated while it recorded. The allocator does not see a replay use them again."""

    def rehearse(self, function: Function) -> None:
        """Run it as it will be recorded, without recording."""

    def record(self, function: Function) -> Function:
        """What replays it. Recording runs nothing on the device."""


class CudaGraphs:
    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, function: Function) -> None:
        """On the stream that records: workspaces of its matrix products then lie outside of the pool."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def record(self, function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        # thread_local: the loader's thread goes on to pin memory and to copy.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        self.peak = max(self.peak, before, torch.cuda.max_memory_allocated(self.device))
        return graph.replay


class GraphedStep(TrainStep):
    """`TrainStep` for batches of one shape.

    Args:
        recorder: None for CUDA graphs.
    """

    def __init__(self, *args: Any, recorder: Recorder | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recorder: Recorder = recorder or CudaGraphs(self.device)
        self.steps = 0
        self.replays: dict[str, Function] = {}
        self.batch: Batch | None = None

        def scalar(dtype: torch.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=self.device)

        # What a step is told, and what it tells. Made here: nothing recorded may keep what it allocates.
        self.number, self.num_targets, self.learning_rate = map(scalar, (torch.float64, torch.float32, torch.float32))
        self.found_loss, self.found_norm, self.found_good = map(scalar, (torch.float32, torch.float32, torch.bool))

    @property
    def replayed_peak(self) -> int:
        return self.recorder.peak

    def __call__(self, micro_batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        num_tokens, num_targets, pairs = self.counts(micro_batches)
        self.steps += 1
        self.number.fill_(step)
        self.num_targets.fill_(num_targets)
        self.learning_rate.fill_(learning_rate)
        for number, batch in enumerate(micro_batches):
            self._take(batch)
            self._run("further" if number else "first", self._further if number else self._first)
        self._run("update", self._update)
        loss, grad_norm, good = self.found_loss.clone(), self.found_norm.clone(), self.found_good.clone()
        return StepResult(loss, grad_norm, good, learning_rate, num_tokens, pairs)

    def _first(self) -> None:
        assert self.batch is not None
        self.found_loss.copy_(self.backward(self.batch, self.num_targets))

    def _further(self) -> None:
        assert self.batch is not None
        self.found_loss.add_(self.backward(self.batch, self.num_targets))

    def _update(self) -> None:
        grad_norm, good = self.update(self.found_loss, self.number, self.learning_rate)
        self.found_norm.copy_(grad_norm)
        self.found_good.copy_(good)

    def _take(self, batch: Batch) -> None:
        """Copy a batch to where the recorded functions read it."""
        if self.batch is None:
            self.batch = batch.map(torch.clone)
        for own, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            assert own.shape == new.shape, "all batches of a run have one shape"
            own.copy_(new)

    def _run(self, name: str, function: Function) -> None:
        if self.steps < STEPS_BEFORE:
            function()
        elif self.steps == STEPS_BEFORE:
            self.recorder.rehearse(function)
        else:
            if name not in self.replays:
                self.replays[name] = self._recorded(function)
            self.replays[name]()

    def _recorded(self, function: Function) -> Function:
        try:
            return self.recorder.record(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError("the step could not be recorded as a CUDA graph; use cuda_graphs=false") from error


def _tensors(batch: Batch) -> list[Tensor]:
    values = (getattr(batch, field.name) for field in fields(batch))
    return [value for value in values if isinstance(value, Tensor)]
