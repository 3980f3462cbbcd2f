"""Speed, measured so that the numbers can be trusted.

A window runs from one log line to the next. It begins and ends with the device idle, leaves out evaluation and
samples, and the first steps of a run (compilation, kernel selection, allocator growth) belong to no window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from model.arithmetic import train_flops_per_token
from model.config import ModelConfig

Peak = Callable[[float], float]


class Throughput:
    """Counts tokens, attended pairs and seconds between reports.

    Args:
        model, seq_len: for the FLOPs per token.
        peak_flops: the card's dense peak in FLOP/s, by the keys that a token sees on average; None for an unknown card,
            which then has no MFU.
        warmup_steps: first steps of the run that are not measured.
        synchronize: waits for the device. clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: ModelConfig,
        seq_len: int,
        peak_flops: Peak | None,
        *,
        warmup_steps: int = 3,
        synchronize: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.seq_len, self.peak_flops = model, seq_len, peak_flops
        self.warmup_steps, self.synchronize, self.clock = warmup_steps, synchronize, clock
        self.total_tokens, self.total_seconds = 0, 0.0
        self._steps_seen = 0
        self._is_paused = False
        self._begin()

    def _begin(self) -> None:
        self._steps = self._tokens = self._pairs = 0
        self._waited = self._excluded = 0.0
        self._began = self.clock()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent here is the loop waiting for its next batch."""
        began = self.clock()
        yield
        if not self._is_paused:
            self._waited += self.clock() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here (evaluation, samples, steps under a profiler) is in no window, and no step counts."""
        self.synchronize()
        began = self.clock()
        self._is_paused = True
        yield
        self._is_paused = False
        self.synchronize()
        self._excluded += self.clock() - began

    def count_step(self, tokens: int, pairs: int) -> None:
        """One optimizer step is under way: its tokens, and the (query, key) pairs its masks let through."""
        if self._is_paused:
            return
        self._steps_seen += 1
        if self._steps_seen == self.warmup_steps:
            self.synchronize()
        if self._steps_seen <= self.warmup_steps:
            self._begin()
            return
        self._steps += 1
        self._tokens += tokens
        self._pairs += pairs

    def report(self) -> dict[str, float]:
        """Metrics of the window that ends now; empty when all of it was warm-up."""
        self.synchronize()
        seconds = self.clock() - self._began - self._excluded
        if self._steps == 0:
            return {}
        tokens_per_second = self._tokens / seconds
        keys_attended = self._pairs / self._tokens

        def flops(keys_per_token: float) -> float:
            return tokens_per_second * train_flops_per_token(self.model, keys_per_token)

        attended_fraction = keys_attended / ((self.seq_len + 1) / 2)
        metrics = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tflops": flops(self.seq_len / 2) / 1e12,
            "throughput/attended_fraction": attended_fraction,
            "time/step_ms": 1000 * seconds / self._steps,
            "time/data_wait_fraction": self._waited / seconds,
        }
        if self.peak_flops is not None:
            metrics["throughput/mfu"] = flops(self.seq_len / 2) / self.peak_flops(self.seq_len / 2)
            metrics["throughput/mfu_palm"] = flops(self.seq_len) / self.peak_flops(self.seq_len)
            if attended_fraction < 0.999:  # documents or a window: the two conventions count pairs nobody computes
                metrics["throughput/mfu_attended"] = flops(keys_attended) / self.peak_flops(keys_attended)
        self.total_tokens += self._tokens
        self.total_seconds += seconds
        self._begin()
        return metrics
