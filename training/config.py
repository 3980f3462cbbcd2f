"""The whole configuration of a run, typed: what Hydra composed becomes dataclasses once, or one line says why not.

No torch here: whatever can be wrong without a look at the machine is found in the first second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from data.config import SOURCES, TOKENIZERS, DataConfig, TokenizerConfig
from model.attention.config import ATTENTIONS, AttentionConfig
from model.config import ModelConfig

from .loggers import LoggerConfig
from .schedule import SCHEDULES, ScheduleConfig

PRECISIONS = ("auto", "bf16", "tf32", "fp32")


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must be two numbers in [0, 1)")
        if not self.weight_decay >= 0:  # `not`: NaN compares as False
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} is not possible; use 0 or more")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps={self.eps} is not possible; use a small positive number, such as 1e-8")


@dataclass
class MuonConfig(OptimizerConfig):
    name: str = "muon"
    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum} must lie in [0, 1)")


@dataclass
class CheckpointConfig:
    every: int = 250
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep_last: int = 2
    keep_every: int = 0
    keep_best: bool = True

    def __post_init__(self) -> None:
        # configs/train.yaml gives it eval_every's value, which may be the one that was typed.
        _require(self.every >= 0, "checkpoint.every", self.every, "use 0 or more (it follows eval_every)")
        _require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "use 0 or more")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "use 1 or more")


@dataclass
class BadStepConfig:
    """What happens to a step whose loss or gradients are not finite, or whose loss is a spike."""

    action: str = "stop"
    most_in_a_row: int = 10
    spike_sigma: float = 0.0
    spike_window: int = 128

    def __post_init__(self) -> None:
        _require(self.action in ("stop", "skip"), "bad_step.action", self.action, "use stop or skip")
        _require(self.most_in_a_row >= 1, "bad_step.most_in_a_row", self.most_in_a_row, "use 1 or more")
        _require(self.spike_sigma >= 0, "bad_step.spike_sigma", self.spike_sigma, "use 0 for none, or such as 6")
        _require(self.spike_window >= 2, "bad_step.spike_window", self.spike_window, "use 2 or more")


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {"adamw": OptimizerConfig, "muon": MuonConfig}


@dataclass
class TrainConfig:
    """`configs/train.yaml`, where every field is explained."""

    attention: AttentionConfig
    model: ModelConfig
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
    seed: int
    device: str
    precision: str
    compile: Any
    deterministic: bool
    log_every: int
    eval_every: int
    eval_tokens: int
    sample_every: int
    sample_prompt: str
    sample_tokens: int
    run_dir: str
    resume: str
    init_from: str | None
    max_time: float | None

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "log_every", "eval_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        for name in ("eval_every", "sample_every", "sample_tokens", "grad_clip", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or more")
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "use 1 or more")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "use 1 or more")
        _require(0 < self.learning_rate < 10, "learning_rate", self.learning_rate, "use a small positive number")
        _require(self.device in ("auto", "cuda", "cpu"), "device", self.device, "use auto, cuda or cpu")
        _require(self.precision in PRECISIONS, "precision", self.precision, f"use {', '.join(PRECISIONS)}")
        _require(self.compile in ("auto", True, False), "compile", self.compile, "use auto, true or false")
        _require(bool(self.resume), "resume", repr(self.resume), "use auto, none or the path of a run or a checkpoint")
        _require(self.max_time is None or self.max_time > 0, "max_time", self.max_time, "use minutes, or null")
        # It is part of run_dir's default value.
        _require("/" not in self.model.name, "model.name", self.model.name, "use a name without a slash")
        for name in ("run_dir", "resume", "init_from"):
            _require("\0" not in (getattr(self, name) or ""), name, repr(getattr(self, name)), "name a folder")
        _require(bool(self.run_dir), "run_dir", repr(self.run_dir), "name a folder")
        # null is no start from other weights; an empty value is a variable of the shell that was not set.
        _require(self.init_from != "", "init_from", "''", "name a run or a checkpoint, or null")
        micro_batch = self.batch_size * self.seq_len
        _require(micro_batch < 2**31, "batch_size × seq_len", micro_batch, "use less than 2³¹ tokens at once")
        if self.tokens_per_step is None:
            self.tokens_per_step = micro_batch
        if self.tokens_per_step < micro_batch or self.tokens_per_step % micro_batch:
            nearest = max(1, (self.tokens_per_step + micro_batch // 2) // micro_batch) * micro_batch
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of batch_size × seq_len = {micro_batch}; "
                f"use {nearest}, or null for one micro-batch"
            )
        self.model.check_seq_len(self.seq_len)
        vocab_size = self.tokenizer.vocab_size  # None: a file's, which the trainer looks at
        if vocab_size is not None and vocab_size > self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} is larger than model.vocab_size={self.model.vocab_size}; "
                f"lower the first or raise the second"
            )

    @property
    def step_tokens(self) -> int:
        assert self.tokens_per_step is not None
        return self.tokens_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps is not None else -(-self.max_tokens // self.step_tokens)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.step_tokens // (self.batch_size * self.seq_len)


def load_config(composed: DictConfig | Mapping[str, Any]) -> TrainConfig:
    """Turn a composed configuration into a checked `TrainConfig`.

    What depends on the machine is checked by `training.runtime`.

    Raises:
        ValueError: one line that names the field, the value and what to do instead.
    """
    try:
        # Resolved before anything is looked at: a secret may come out of ${oc.env:}.
        config = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
        raw: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    refuse_secrets(raw)
    schema = OmegaConf.structured(TrainConfig)
    groups: dict[str, Mapping[str, type[Any]]] = {
        "attention": ATTENTIONS,
        "data": SOURCES,
        "tokenizer": TOKENIZERS,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
    }
    for group, options in groups.items():
        chosen = raw.get(group)
        name = chosen.get("name") if isinstance(chosen, dict) else chosen
        if not isinstance(name, str) or name not in options:
            raise ValueError(f"{group}.name={name} is unknown; use {', '.join(options)}")
        schema[group] = OmegaConf.structured(options[name])
    try:
        loaded = OmegaConf.to_object(OmegaConf.merge(schema, raw))
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        schema.model, schema.logger = ModelConfig, LoggerConfig  # for their keys
        schema.checkpoint, schema.bad_step = CheckpointConfig, BadStepConfig
        raise ValueError(unknown_key(key, dotted_keys(schema))) from error
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    assert isinstance(loaded, TrainConfig)
    refuse_extremes(asdict(loaded))
    return loaded


REMEDIES = {
    "to Integer": "use a whole number",
    "to Float": "use a number",
    "valid bool": "use true or false",
    "not a ListConfig": "use a list: [a,b]",
    "value 'None'": "it needs a value",
}


def one_line(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value, and what to do instead."""
    reason = str(error.msg or error).splitlines()[0].removesuffix(".")
    remedy = next((remedy for words, remedy in REMEDIES.items() if words in reason), None)
    return f"{error.full_key}: {reason}; {remedy or 'python train.py --cfg job shows what it may be'}"


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a nested configuration: seq_len, model, model.dim, …"""
    for key in map(str, config):
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(config._get_node(key)) and not OmegaConf.is_missing(config, key):
            yield from dotted_keys(config[key], f"{prefix}{key}.")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The line for a key that does not exist, with its nearest neighbour."""
    known = list(known)
    named: dict[str, list[str]] = {}  # without their groups: dim=64 for model.dim=64, and lr=1e-3 for learning_rate
    for name in known:
        last = name.rpartition(".")[2]
        for short in {last, "".join(word[0] for word in last.split("_"))}:
            named.setdefault(short, []).append(name)
    near = named.get(key.rpartition(".")[2]) or get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "python train.py --cfg job shows every setting"
    return f"{key} is not a setting; {hint}"


SECRET_KEY = re.compile(r"(api_?key|secret|password|passwd|credential|(^|_)token$)", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/\s:@]+:[^/\s@]+@|\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d_[\w-]{20,}")
OLD_WANDB_KEY = re.compile(r"[0-9a-f]{40}")  # as a commit's hash, which a revision may be


def refuse_secrets(items: Any, prefix: str = "") -> None:
    """A configuration is written to the run folder and to W&B, so nothing secret may be in it.

    Raises:
        ValueError: names the key, never the value.
    """
    for name, value in items.items() if isinstance(items, dict) else enumerate(items):
        key = str(name)
        if isinstance(value, dict | list):
            refuse_secrets(value, f"{prefix}{key}.")
        elif value and (
            SECRET_KEY.search(key)
            or SECRET_VALUE.search(str(value))
            or (OLD_WANDB_KEY.fullmatch(str(value)) and key != "revision")
        ):
            raise ValueError(
                f"{prefix}{key} looks like a secret, and the config is saved and uploaded with the run; "
                f"use the environment instead (WANDB_API_KEY, HF_TOKEN)"
            )


def refuse_extremes(items: Mapping[str, Any], prefix: str = "") -> None:
    """NaN, infinity and what 64 bits cannot hold are values of their types, and nothing that a run can use.

    Raises:
        ValueError: names the key and the value.
    """
    for key, value in items.items():
        if isinstance(value, Mapping):
            refuse_extremes(value, f"{prefix}{key}.")
        else:
            within = not isinstance(value, int | float) or abs(value) < 2**63  # of NaN nothing is true
            _require(within, f"{prefix}{key}", value, "use a finite number below 2⁶³")


def _require(ok: bool, name: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value} is not possible; {remedy}")
