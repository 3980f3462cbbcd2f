"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from types import TracebackType

from .checkpoint.restore import restore
from .config import TrainConfig
from .parallel.world import World
from .run import Run
from .run_folder import RunFolder
from .runtime import Runtime, resolve_runtime
from .services import Service, build_services


class Trainer:
    """One run: built by the constructor, trained by `fit`.

    Raises:
        ValueError: something a person chose is impossible; one line says what to do.
    """

    def __init__(
        self,
        config: TrainConfig,
        notify: Callable[[str], None] = print,
        runtime: Runtime | None = None,
        world: World | None = None,
    ) -> None:
        self.run = Run(config, runtime or resolve_runtime(config), notify, world)
        self.services: list[Service] = build_services()

    def fit(self) -> dict[str, float]:
        """Train to the last step; returns the last value of every metric.

        Raises:
            ValueError: the run folder cannot be written, or resume and init_from name what does not fit.
            NonFiniteError, SaveFailed, Interrupted: see `training.errors`.
        """
        run = self.run
        with self._opened():
            for step in run.remaining_steps():
                for service in self.services:
                    service.before_step(run)
                with run.throughput.waiting_for_data():
                    micro_batches = run.batches.next(run.plan.accumulation)
                run.last = run.train_step(micro_batches, step, run.learning_rate())
                run.progress.add(run.last)
                run.throughput.count_step(run.last.num_tokens, run.last.visible_pairs)
                for service in self.services:
                    service.after_step(run)
        return run.progress.summary

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Hold the run folder, restore what there is to go on from, begin the services; at the end, end them.

        Services begin in their order and end in the reverse, each whatever became of the others.
        """
        run = self.run
        with ExitStack() as stack:
            stack.enter_context(run.interrupt)  # to the very end: a second SIGTERM cuts nothing short
            self.run_folder = stack.enter_context(closing(RunFolder(run.config, run.together)))
            restore(run, self.run_folder)
            run.batches.open()
            stack.callback(run.batches.close)
            for service in self.services:
                stack.push(partial(_end, run, service))
                service.begin(run)
            yield


def _end(
    run: Run, service: Service, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
) -> None:
    status = "finished" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
    service.end(run, status)
