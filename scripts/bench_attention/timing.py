"""How fast is it, and how much memory does it take?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

FASTEST_CLOCK = 2.0e9  # Hz; hardly a GPU spins faster, so that many cycles last a second or more
LONGEST_SPIN = 2**25  # cycles: about 20 ms
RETRIES = 4


class Timing(NamedTuple):
    ms: float
    waits: bool
    """The GPU had to wait for launches, and the time has those gaps in it."""


@cache
def l2_flush() -> Tensor:
    """More than any L2 cache holds: to zero it empties the cache."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def gpu_time(run: Callable[[], Any], budget_ms: float) -> Timing:
    """Median time of a call on the GPU, over repetitions that fill the budget, L2 emptied before each.

    Before each call the GPU is kept spinning for longer than the host takes to launch all of the call's kernels, so
    that a slow host does not enter: what is measured is how long the GPU computes. Whether that came true is asked of
    the first event, which the GPU must not have reached when the last launch is made; what came late is not counted.
    Only where everything comes late (a call that waits for the GPU itself) the gaps are part of the answer.
    """
    run()  # whatever is compiled or chosen at the first call
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    spin = min(int(FASTEST_CLOCK * (time.perf_counter() - began)), LONGEST_SPIN)
    (first,) = _times(run, 1, spin)
    if first.ms > 1000:
        return first  # long enough to be steady
    repetitions = min(100, max(5, round(budget_ms / first.ms)))
    _times(run, repetitions // 4, spin)  # warm up
    for _ in range(RETRIES):
        timings = _times(run, repetitions, spin)
        punctual = [timing.ms for timing in timings if not timing.waits]
        if len(punctual) > repetitions // 2:
            return Timing(statistics.median(punctual), waits=False)
        spin = min(2 * spin, LONGEST_SPIN)
    return Timing(statistics.median(timing.ms for timing in timings), waits=True)


def _times(run: Callable[[], Any], repetitions: int, spin: int) -> list[Timing]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    late = []
    for began, ended in events:
        l2_flush().zero_()
        torch.cuda._sleep(spin)
        began.record()
        run()
        late.append(began.query())
        ended.record()
    torch.cuda.synchronize()
    return [Timing(began.elapsed_time(ended), waits) for (began, ended), waits in zip(events, late, strict=True)]


def call_ms(run: Callable[[], Any], budget_ms: float) -> float:
    """Wall-clock time of a call among others like it, launched one after the other: what a program without CUDA graphs
    pays, which is Python's time where that is longer than the GPU's."""

    def per_call(calls: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began) / calls

    calls = min(100, max(5, round(budget_ms / per_call(5) / 3)))
    return statistics.median(per_call(calls) for _ in range(3))


class Memory:
    """Peak bytes beyond what was allocated at the beginning; 0 where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before if self.is_cuda else 0
