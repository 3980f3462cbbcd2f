"""The whole configuration of a run, typed. Each part's own settings stand beside the part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.config import SOURCES, TOKENIZERS, DataConfig, TokenizerConfig
from model.activations_config import MEMORY_POLICIES, MemoryConfig
from model.attention.config import ATTENTIONS, AttentionConfig
from model.config import ModelConfig
from model.precision_config import PRECISIONS, PrecisionConfig
from training.checkpoint.config import CheckpointConfig
from training.guard_config import BadStepConfig
from training.loggers import LoggerConfig
from training.optimizer_config import OPTIMIZERS, OptimizerConfig
from training.parallel.config import PARALLELISMS, ParallelConfig
from training.parallel.launch import Launch
from training.require import require
from training.schedule import SCHEDULES, ScheduleConfig

from .plan import Plan

OPTIMIZED_METRICS = ("val/loss", "val/bits_per_byte", "train/loss", "time/step_ms", "memory/peak_allocated_gib")
"""What a sweep may look for the smallest of."""

CHOICES: dict[str, dict[str, type[Any]]] = {
    "attention": dict(ATTENTIONS),
    "data": dict(SOURCES),
    "tokenizer": dict(TOKENIZERS),
    "optimizer": dict(OPTIMIZERS),
    "schedule": dict(SCHEDULES),
    "memory": dict(MEMORY_POLICIES),
    "precision": dict(PRECISIONS),
    "parallel": dict(PARALLELISMS),
}
"""Groups whose settings depend on the option that is chosen, by its name."""


@dataclass
class TrainConfig:
    """`configs/train.yaml`, where every field is explained."""

    attention: AttentionConfig
    model: ModelConfig
    memory: MemoryConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    logger: LoggerConfig
    checkpoint: CheckpointConfig
    bad_step: BadStepConfig
    seq_len: int
    batch_size: int
    tokens_per_step: int | None
    max_steps: int | None
    max_tokens: int
    learning_rate: float
    grad_clip: float
    z_loss: float
    label_smoothing: float
    seed: int
    device: str
    compile: Any
    cuda_graphs: Any
    check_memory: bool
    deterministic: bool
    log_every: int
    profile: bool
    profile_steps: list[int]
    eval_every: int
    eval_tokens: int
    sample_every: int
    sample_prompt: str
    sample_tokens: int
    optimized_metric: str
    run_dir: str
    resume: str
    init_from: str | None
    max_time: float | None

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "log_every", "eval_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        for name in ("eval_every", "sample_every", "sample_tokens", "grad_clip", "z_loss", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or more")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "use at least 0, less than 1")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "use 1 or more")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "use 1 or more")
        require(0 < self.learning_rate < 10, "learning_rate", self.learning_rate, "use a small positive number")
        require(self.device in ("auto", "cuda", "cpu"), "device", self.device, "use auto, cuda or cpu")
        for name in ("compile", "cuda_graphs"):
            require(getattr(self, name) in ("auto", True, False), name, getattr(self, name), "use auto, true or false")
        require(
            self.optimized_metric in OPTIMIZED_METRICS,
            "optimized_metric",
            self.optimized_metric,
            f"use {', '.join(OPTIMIZED_METRICS)}",
        )
        require(bool(self.resume), "resume", repr(self.resume), "use auto, none or the path of a run or a checkpoint")
        require(self.max_time is None or self.max_time > 0, "max_time", self.max_time, "use minutes, or null")
        # It is part of run_dir's default value.
        require("/" not in self.model.name, "model.name", self.model.name, "use a name without a slash")
        require(bool(self.model.name.strip()), "model.name", repr(self.model.name), "use a name, or leave it out")
        for name in ("run_dir", "resume", "init_from"):
            require("\0" not in (getattr(self, name) or ""), name, repr(getattr(self, name)), "name a folder")
        require(bool(self.run_dir), "run_dir", repr(self.run_dir), "name a folder")
        # null is no start from other weights; an empty value is a variable of the shell that was not set.
        require(self.init_from != "", "init_from", "''", "name a run or a checkpoint, or null")
        if self.init_from is not None and self.resume not in ("auto", "none"):
            raise ValueError(
                f"resume={self.resume} goes on with a run and init_from={self.init_from} begins a new one; "
                f"leave out one of them"
            )
        micro_batch = self.batch_size * self.seq_len
        require(micro_batch < 2**31, "batch_size × seq_len", micro_batch, "use less than 2³¹ tokens at once")
        if len(self.profile_steps) != 2 or not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps={self.profile_steps} must be the first and the last step; use [10,12]")
        if self.profile and self.profile_steps[1] > (last := self.plan.max_steps):
            raise ValueError(
                f"profile_steps={self.profile_steps} ends after the last step, {last}; "
                f"use profile_steps=[{max(1, last - 1)},{last}] or more steps"
            )
        self.schedule.check_length(self.plan.max_steps, self.plan.tokens_per_step)
        self.model.check_seq_len(self.seq_len)
        self.memory.check_model(self.model)
        self.precision.check_model(self.model)
        self.optimizer.check_rounding(self.precision.moments)
        self.data.check_rows(self.seq_len, self.tokenizer)
        vocab_size = self.tokenizer.vocab_size  # None: a file's, which the trainer looks at
        if vocab_size is not None and vocab_size > self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} is larger than model.vocab_size={self.model.vocab_size}; "
                f"lower the first or raise the second"
            )

    @property
    def plan(self) -> Plan:
        return Plan.of(
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            tokens_per_step=self.tokens_per_step,
            max_steps=self.max_steps,
            max_tokens=self.max_tokens,
            data_size=self.parallel.data_size(Launch.here().size),
        )
