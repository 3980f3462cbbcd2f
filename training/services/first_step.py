"""Says, once the first step is done, where the time since the command went."""

from __future__ import annotations

from training.run import Run

from .base import Service


class FirstStep(Service):
    """One line after the first step: where the time before it went."""

    def __init__(self) -> None:
        self.is_said = False
        self.compiled_before: float | None = None

    def begin(self, run: Run) -> None:
        if run.runtime.compile:  # an earlier job of a sweep has compiled, too
            self.compiled_before = compile_seconds()

    def after_step(self, run: Run) -> None:
        if self.is_said:
            return
        self.is_said = True
        run.throughput.synchronize()
        line = f"first step {run.startup.describe(last='first step')}"
        if self.compiled_before is not None and (seconds := compile_seconds()) is not None:
            line += f"; {seconds - self.compiled_before:.1f} of them compiling"
        run.notify(line)


def compile_seconds() -> float | None:
    """What torch.compile has taken in this process, evaluation's share included; None where PyTorch does not say."""
    try:
        from torch._dynamo.utils import calculate_time_spent

        return calculate_time_spent()["total_wall_time"]
    except (ImportError, KeyError):  # it is no public interface
        return None
