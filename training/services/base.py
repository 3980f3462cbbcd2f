"""What a service is."""

from __future__ import annotations

from training.run import Run


class Service:
    """Called at four points of a run. It sees the run, never the loop, and decides itself whether something is due."""

    name = ""
    """What `Progress.unfinished` knows it by, for a service whose work a request to stop may cut."""

    def begin(self, run: Run) -> None:
        """Once, after the run is restored and before its first step."""

    def before_step(self, run: Run) -> None:
        """Before each step and its batches; `run.progress.step` is its number."""

    def after_step(self, run: Run) -> None:
        """After each step; `run.progress.step` is its number and `run.last` its result."""

    def end(self, run: Run, status: str) -> None:
        """Once, in the reverse order, whatever ended the run: status is "finished", "failed" or "interrupted"."""
