"""Where the time goes between the command and the first step."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .interrupt import STARTED

_runs = itertools.count()  # of this process: the jobs of a sweep


class StartUp:
    """Seconds of each stage of a run's start, in order; "imports" is all that came before the run was built."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds = {"imports": self.began - process_start() if next(_runs) == 0 else 0.0}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began

    def describe(self, last: str) -> str:
        """For people: "6.1 s after the command: imports 2.9, data 0.3, …", without stages that took no time.

        `last` is the stage that ends now.
        """
        total = time.monotonic() - self.began + self.seconds["imports"]
        self.seconds[last] = total - sum(self.seconds.values())
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items() if seconds >= 0.05)
        return f"{total:.1f} s after the command{': ' if stages else ''}{stages}"


def process_start() -> float:
    """When this process began, on `time.monotonic`'s clock; elsewhere than on Linux, when it was first asked."""
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine started
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return STARTED
