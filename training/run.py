"""A run: what the configuration asks for, built. The loop trains it; services see it, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data.corpus import load_corpus

from .assemble import assemble
from .batches import Batches
from .checkpoint.restore import restore
from .checkpoint.saver import Saver
from .config import TrainConfig
from .facts import matmul_peak, run_facts
from .guard import Guard
from .interrupt import Interrupt
from .loggers import build_loggers
from .metrics import METRICS
from .optimizer import Optimizer
from .parallel.world import World
from .parts import Part, RandomNumbers, Weights
from .progress import Progress
from .records import Records
from .run_folder import RunFolder
from .run_folder import check as check_run_folder
from .runtime import Runtime, attention_for
from .schedule import learning_rate
from .services import Service, build_services
from .startup import StartUp
from .step import StepResult, TrainStep
from .throughput import Throughput


class Run:
    """Everything of one run, built in the order in which data flows through it.

    Raises:
        ValueError: something a person chose is impossible; one line says what to do.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, notify: Callable[[str], None]) -> None:
        self.config, self.runtime, self.notify = config, runtime, notify
        self.startup = StartUp()
        _set_up_torch(config, runtime)
        self.attention = attention_for(config, runtime)  # a refusal comes now, not after the data is read
        check_run_folder(config)
        self.folder = Path(config.run_dir)
        self.world = world = World.start(runtime.device)

        with self.startup.timed("data"):
            corpus = load_corpus(config.data, config.tokenizer, notify, config.model.vocab_size)
            self.batches = Batches(corpus, config, world, notify)
        self.attention.bound_documents(self.batches.max_documents)
        with self.startup.timed("model"):
            self.model = assemble(config.model, self.attention, world.device, seed=config.seed, compile=runtime.compile)
        self.optimizer = Optimizer(self.model, config.optimizer, world.device)
        self.guard = Guard(config.bad_step, world, notify, self.folder / "bad-steps.jsonl")
        self.train_step = TrainStep(
            self.model, self.optimizer, self.guard, world, grad_clip=config.grad_clip, autocast=runtime.autocast
        )
        self.last: StepResult
        """Of the step that was just trained."""

        self.progress = Progress(world.device)
        self.records = Records(self.folder, notify)
        self.throughput = Throughput(
            config.model,
            config.seq_len,
            matmul_peak(runtime),
            synchronize=torch.cuda.synchronize if world.device.type == "cuda" else lambda: None,
        )
        self.interrupt = Interrupt(self.folder, config.max_time)
        self.saver = Saver(self.folder, config.checkpoint, notify)
        self.loggers = build_loggers(config.logger, max_steps=self.num_steps, notify=notify)
        self.services: list[Service] = build_services()
        self._metrics: dict[str, float] = {}

    @property
    def parts(self) -> list[Part]:
        """What a checkpoint is made of. The records are loaded last: they are files, and the rest is memory."""
        weights, random = Weights(self.model), RandomNumbers()
        return [weights, self.optimizer, self.guard, self.progress, random, self.batches, self.records]

    # ---- numbers of the plan

    @property
    def num_steps(self) -> int:
        return self.config.num_steps

    @property
    def accumulation(self) -> int:
        """Micro-batches in a step."""
        return self.config.accumulation

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.progress.step * self.config.step_tokens

    def due(self, every: int, first: bool = False) -> bool:
        """Whether something done every so many steps (0: never) is due: always at the last step."""
        step = self.progress.step
        return step == self.num_steps or (first and step == 1) or (every > 0 and step % every == 0)

    def learning_rate(self) -> float:
        config = self.config
        step = self.progress.step
        return learning_rate(config.schedule, step, self.num_steps, config.step_tokens, config.learning_rate)

    def rows_of(self, step: int) -> list[int]:
        """Positions of the rows that a step read: `train_rows.at(seed, position)` is each of them."""
        rows = self.config.step_tokens // self.config.seq_len
        return list(range((step - 1) * rows, step * rows))

    def facts(self) -> dict[str, Any]:
        """What no configuration holds: see `run_facts`."""
        return run_facts(self.config, self.runtime, self.attention, self.batches.corpus)

    # ---- what services share

    def log(self, metrics: dict[str, float]) -> None:
        """One event of the record, at this step."""
        assert metrics.keys() <= METRICS.keys(), "training.metrics defines every metric"
        self.progress.events += 1
        self.progress.summary.update(metrics)
        self.loggers.log(self.progress.step, self.tokens, metrics)

    def log_sample(self, text: str) -> None:
        self.progress.events += 1
        self.loggers.sample(self.progress.step, self.tokens, text)

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """To be logged with the next log line."""
        self._metrics |= metrics

    def take_metrics(self) -> dict[str, float]:
        taken, self._metrics = self._metrics, {}
        return taken

    def stop_reason(self) -> str:
        """Why the run shall stop, on any rank; "" while it shall not."""
        return self.world.first_reason(self.interrupt.reason())

    # ---- from the first moment to the last

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the run folder, restore what there is to go on from, begin the services; at the end, end them.

        Services begin in their order and end in the reverse, each whatever became of the others.
        """
        with ExitStack() as stack:
            stack.enter_context(self.interrupt)  # to the very end: a second SIGTERM cuts nothing short
            self.run_folder = stack.enter_context(closing(RunFolder(self.config)))
            restore(self, self.run_folder)
            self.batches.open()
            stack.callback(self.batches.close)
            for service in self.services:
                stack.push(partial(_end, self, service))
                service.begin(self)
            yield

    def remaining_steps(self) -> Iterator[int]:
        """Count `progress.step` from the step after the one restored to the last."""
        for step in range(self.progress.step + 1, self.num_steps + 1):
            self.progress.step = step
            yield step


def _end(
    run: Run, service: Service, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
) -> None:
    status = "finished" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
    service.end(run, status)


def _set_up_torch(config: TrainConfig, runtime: Runtime) -> None:
    """Of the process, so of the next job of a sweep, too, unless it says otherwise."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(config.deterministic)
    torch.set_float32_matmul_precision("high" if runtime.precision == "tf32" else "highest")
