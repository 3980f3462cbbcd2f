"""Python's cyclic garbage: collected at log lines, not in the middle of a step.

A full collection walks every object that PyTorch's modules and its compiler have made, half a million: 0.4 s, 0.9 s
after compiling (docs/lab/2026-11-29-speed.md). After the first step these are set aside, and one takes 0.03 ms.
"""

from __future__ import annotations

import gc

from training.run import Run

from .base import Service

MOST_STEPS = 100
"""Between two collections, however far apart log lines are."""


class Garbage(Service):
    """Python's garbage collection, at log lines only."""

    def __init__(self) -> None:
        self.is_on = False

    def after_step(self, run: Run) -> None:
        if not self.is_on:
            self.is_on = gc.isenabled()  # not where whoever called has switched it off
            if self.is_on:
                gc.collect()
                gc.freeze()
                gc.disable()
        elif run.due(min(run.config.log_every, MOST_STEPS)):
            gc.collect()

    def end(self, run: Run, status: str) -> None:
        if self.is_on:
            gc.enable()
            gc.unfreeze()
