"""A run: what the configuration asks for, built. The loop trains it; services see it, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data.corpus import load_corpus
from data.progress import doing

from .assemble import assemble
from .batches import Batches
from .capacity import as_typed, resolve_memory
from .checkpoint.saver import Saver
from .config import TrainConfig
from .facts import matmul_peak, run_facts
from .graphed_step import GraphedStep
from .graphs import uses_graphs
from .guard import Guard
from .interrupt import Interrupt
from .loggers import Loggers, build_loggers
from .metrics import METRICS
from .optimizer import Optimizer
from .parallel.context import shared_rows
from .parallel.together import Together
from .parallel.world import World
from .parts import Part, RandomNumbers, Weights
from .progress import Progress
from .records import Records
from .run_folder import check as check_run_folder
from .runtime import Runtime, attention_for
from .schedule import learning_rate
from .startup import StartUp
from .step import StepResult, TrainStep
from .throughput import Throughput


class Run:
    """Everything of one run, built in the order in which data flows through it.

    Raises:
        ValueError: something a person chose is impossible; one line says what to do.
    """

    def __init__(
        self, config: TrainConfig, runtime: Runtime, notify: Callable[[str], None], world: World | None = None
    ) -> None:
        self.startup = StartUp()
        doing("starting the device")
        self.world = world = world or World.start(runtime.device, config.parallel)
        notify = notify if world.is_first else _silently
        if config.memory.name == "auto":
            config = resolve_memory(config, runtime)
            notify(f"memory     auto is {as_typed(config.memory)}: the fastest that fits")
        self.config, self.runtime, self.notify = config, runtime, notify
        self.plan = config.plan
        _set_up_torch(config, runtime)
        self.attention = attention_for(config, runtime, world=world)  # a refusal comes now, not after the data is read
        if world.is_first:
            check_run_folder(config)
        self.folder = Path(config.run_dir)
        self.attention.compile_ahead()
        shared = shared_rows(self.attention)

        doing("reading the data")
        with self.startup.timed("data"):
            corpus = load_corpus(config.data, config.tokenizer, notify, config.model.vocab_size)
            self.batches = Batches(corpus, config, world, notify, shared)
        self.attention.bound_documents(self.batches.max_documents)
        doing("building the model")
        with self.startup.timed("model"):
            self.model = assemble(
                config.model,
                self.attention,
                world,
                seed=config.seed,
                compile=runtime.compile,
                memory=config.memory,
                parallel=config.parallel,
                residual_dtype=runtime.residual_dtype,
                working_dtype=runtime.working_dtype(config),
                precision=runtime.precision,
                z_loss=config.z_loss,
                label_smoothing=config.label_smoothing,
            )
        self.optimizer = Optimizer(self.model, config.optimizer, world.device, config.precision.moments)
        self.guard = Guard(config.bad_step, world, notify, self.folder / "bad-steps.jsonl")
        step = GraphedStep if uses_graphs(config, runtime) else TrainStep
        self.train_step = step(
            self.model,
            self.optimizer,
            self.guard,
            world,
            grad_clip=config.grad_clip,
            autocast=runtime.autocast,
            reduction=getattr(torch, config.precision.reduction),
            shared=shared,
        )
        self.last: StepResult
        """Of the step that was just trained."""

        self.progress = Progress(world.device)
        self.records = Records(self.folder, notify, is_ours=world.is_first)
        self.throughput = Throughput(
            config.model,
            config.seq_len,
            matmul_peak(config, runtime, world.size),
            synchronize=torch.cuda.synchronize if world.device.type == "cuda" else lambda: None,
        )
        self.interrupt = Interrupt(self.folder, config.max_time)
        self.together = Together.of(world.rank, world.size)
        # Saves have a thread of their own, so they have a group of their own.
        self.saver = Saver(self.folder, config.checkpoint, notify, Together.of(world.rank, world.size))
        self.loggers = Loggers([], notify)
        if world.is_first:
            self.loggers = build_loggers(config.logger, max_steps=self.plan.max_steps, notify=notify)
        self._metrics: dict[str, float] = {}

    @property
    def parts(self) -> list[Part]:
        """What a checkpoint is made of. The records are loaded last: they are files, and the rest is memory."""
        weights, random = Weights(self.model), RandomNumbers()
        return [weights, self.optimizer, self.guard, self.progress, random, self.batches, self.records]

    # ---- numbers of the plan

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.progress.step * self.plan.tokens_per_step

    def due(self, every: int, first: bool = False) -> bool:
        """Whether something done every so many steps (0: never) is due: always at the last step."""
        step = self.progress.step
        return step == self.plan.max_steps or (first and step == 1) or (every > 0 and step % every == 0)

    def learning_rate(self) -> float:
        config, plan = self.config, self.plan
        return learning_rate(
            config.schedule, self.progress.step, plan.max_steps, plan.tokens_per_step, config.learning_rate
        )

    def rows_of(self, step: int) -> list[int]:
        """Positions of the rows that a step read: `train_rows.at(seed, position)` is each of them."""
        rows = self.plan.tokens_per_step // self.config.seq_len
        return list(range((step - 1) * rows, step * rows))

    def facts(self) -> dict[str, Any]:
        """What no configuration holds: see `run_facts`."""
        return run_facts(self.config, self.runtime, self.attention, self.batches.corpus, self.world)

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

    def remaining_steps(self) -> Iterator[int]:
        """Count `progress.step` from the step after the one restored to the last."""
        for step in range(self.progress.step + 1, self.plan.max_steps + 1):
            self.progress.step = step
            yield step


def _silently(line: str) -> None:
    pass


def _set_up_torch(config: TrainConfig, runtime: Runtime) -> None:
    """Settings of the whole process; each job of a sweep makes its own."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(config.deterministic)
    torch.set_float32_matmul_precision("high" if runtime.precision.name == "tf32" else "highest")
