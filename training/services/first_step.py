"""Says, once the first step is done, where the time since the command went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Service

if TYPE_CHECKING:
    from training.run import Run


class FirstStep(Service):
    def __init__(self) -> None:
        self.is_said = False

    def after_step(self, run: Run) -> None:
        if self.is_said:
            return
        self.is_said = True
        run.throughput.synchronize()
        compiling = f"; {compile_seconds():.1f} of them compiling" if run.runtime.compile else ""
        run.notify(f"first step {run.startup.describe(last='first step')}{compiling}")


def compile_seconds() -> float:
    """What torch.compile has taken in this process, evaluation's share included."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
