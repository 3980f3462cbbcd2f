"""Saves the parts of the run, in the background, and at the end the trained weights alone."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.checkpoint import folder as checkpoints
from training.checkpoint.state import Written, written
from training.checkpoint.weights import save_weights
from training.hardware import versions
from training.run import Run

from .base import Service


class Checkpointing(Service):
    """Saves every `checkpoint.every` steps, and the weights alone when the run is finished. `checkpoint.save=false`:
    nothing."""

    def __init__(self) -> None:
        self.has_memory = False

    def after_step(self, run: Run) -> None:
        if not run.config.checkpoint.save:
            return
        if not self.has_memory:  # now the optimizer's moments are there, and no step is measured yet
            self.has_memory = True
            run.saver.reserve(_written(run).tensors)
        run.add_metrics(run.saver.metrics())
        if run.due(run.config.checkpoint.every):
            save(run)

    def end(self, run: Run, status: str) -> None:
        """Raises SaveFailed where a run that finished could not save what it trained."""
        try:
            if status == "finished" and run.config.checkpoint.save:
                save_weights(run.model, run.folder, run.together)
                run.saver.finish(raises=True)
        finally:
            run.saver.finish()


def save(run: Run, wait: bool = False) -> Path | None:
    """A checkpoint of this step, unless it is there; with `wait`, come back when it is.

    Returns:
        where it is; None with checkpoint.save=false.
    Raises:
        NonFiniteError: the run must stop, and is not saved over a good one. SaveFailed: with `wait`.
    """
    if not run.config.checkpoint.save:
        return None
    progress = run.progress
    path = checkpoints.path_of(run.folder, progress.step)
    if progress.saved == progress.step:
        return path
    run.guard.report(run.rows_of)
    step, val_loss = progress.val_loss
    facts: dict[str, Any] = {
        "step": progress.step,
        "tokens": run.tokens,
        "world_size": run.world.size,
        "val_loss": val_loss if step == progress.step and math.isfinite(val_loss) else None,
        "versions": versions(),
    }
    run.saver.save(_written(run), facts, wait)
    progress.saved = progress.step
    return path


def _written(run: Run) -> Written:
    return written(run.parts, asdict(run.config), run.world.rank, run.world.size)
