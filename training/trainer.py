"""The training loop."""

from __future__ import annotations

from collections.abc import Callable

from .config import TrainConfig
from .run import Run
from .runtime import Runtime, resolve_runtime


class Trainer:
    """One run: built by the constructor, trained by `fit`.

    Raises:
        ValueError: something a person chose is impossible; one line says what to do.
    """

    def __init__(
        self, config: TrainConfig, notify: Callable[[str], None] = print, runtime: Runtime | None = None
    ) -> None:
        self.run = Run(config, runtime or resolve_runtime(config), notify)

    def fit(self) -> dict[str, float]:
        """Train to the last step; returns the last value of every metric.

        Raises:
            ValueError: the run folder cannot be written, or resume and init_from name what does not fit.
            NonFiniteError, SaveFailed, Interrupted: see `training.errors`.
        """
        run = self.run
        with run.opened():
            for step in run.remaining_steps():
                with run.throughput.waiting_for_data():
                    micro_batches = run.batches.next(run.plan.accumulation)
                run.last = run.train_step(micro_batches, step, run.learning_rate())
                run.progress.add(run.last)
                run.throughput.count_step(run.last.num_tokens, run.last.visible_pairs)
                for service in run.services:
                    service.after_step(run)
        return run.progress.summary
