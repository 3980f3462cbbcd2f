"""Answers a request to stop: a signal, a STOP file, max_time. The run saves itself, if it saves at all, and ends."""

from __future__ import annotations

import shlex

from training.run import Run

from .base import Service
from .checkpointing import save


class Stopping(Service):
    """Saves and ends the run when it is asked to stop, on all ranks after the same step."""

    def begin(self, run: Run) -> None:
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        """Raises Interrupted, where the run was asked to stop and has not done everything anyway."""
        progress = run.progress
        is_done = progress.step == run.plan.max_steps and not progress.unfinished
        reason = run.stop_reason()
        if reason and not is_done:
            saved = save(run, wait=True)
            if saved is not None:
                run.notify(f"next       run_dir={shlex.quote(str(run.folder))} goes on from here")
            raise run.interrupt.end(saved, reason)
