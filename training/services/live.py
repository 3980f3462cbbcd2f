"""The live line of a run: a bar, and the figures of the last log line. A step costs it two assignments."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from data.live import LINE
from data.progress import bar_line, clock
from training.metrics import METRICS
from training.run import Run

from .base import Service

if TYPE_CHECKING:
    from rich.text import Text

FIGURES = (
    ("train/loss", "loss {}", 1),
    ("throughput/tokens_per_second", "{} tok/s", 4),
    ("throughput/mfu", "MFU {}", 5),
    ("memory/peak_allocated_gib", "{}", 6),
)
"""Metrics, as they are shown, and their ranks: that of the highest leaves a narrow terminal first."""
TIME_RANK, BAR_RANK = 2, 3


class Live(Service):
    """The live line on a terminal."""

    def begin(self, run: Run) -> None:
        self.run, self.step, self.began = run, run.progress.step, time.monotonic()
        self.first: tuple[int, float] | None = None
        """The first step of this process and when it was done: it compiles, and the pace is of those after it."""
        if run.world.is_first and self.step < run.plan.max_steps:
            LINE.show(self.draw)

    def after_step(self, run: Run) -> None:
        self.step = run.progress.step
        self.first = self.first or (self.step, time.monotonic())

    def end(self, run: Run, status: str) -> None:
        LINE.end()

    def draw(self, columns: int) -> Text:
        """Called by the thread that draws: what it reads is on the host, and whole."""
        summary, last = self.run.progress.summary, self.run.plan.max_steps
        fields = [(f"{self.step:,}/{last:,}", 0)]
        if self.first is None:
            what = "the first step, which compiles" if self.run.runtime.compile else "the first step"
            fields.append((f"{what} … {time.monotonic() - self.began:.0f} s", 1))
        for name, form, rank in FIGURES:
            if name in summary:
                fields.append((form.format(METRICS[name].in_line(summary[name]).strip()), rank))
        if (left := self.seconds_left()) is not None:
            fields.append((f"{clock(left)} left", TIME_RANK))
        return bar_line(self.step / last, fields, columns, bar_rank=BAR_RANK)

    def seconds_left(self) -> float | None:
        if self.first is None or self.step == self.first[0]:
            return None
        steps, seconds = self.step - self.first[0], time.monotonic() - self.first[1]
        return (self.run.plan.max_steps - self.step) * seconds / steps
