"""The memory that a run will take, and whether its weights, gradients and optimizer fit into this machine at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from model.arithmetic import parameter_count
from model.memory import GIB, MemoryPlan, predict

from .config import TrainConfig
from .machine import Gpu

SHAPE = ("n_layers", "n_heads", "head_dim", "dim", "ffn_dim", "vocab_size", "n_positions")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def predicted(config: TrainConfig) -> MemoryPlan:
    """What this run will take, as far as its configuration tells."""
    return predict(
        config.model,
        optimizer=config.optimizer.name,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        writes_scores=writes_scores(config),
    )


def writes_scores(config: TrainConfig) -> bool:
    """Whether attention writes S × S scores to memory."""
    return "math" in (config.attention.name, getattr(config.attention, "kernel", None))


def check_capacity(config: TrainConfig, gpu: Gpu | None) -> None:
    """Refuse a model whose state alone is larger than the memory that it is trained in.

    Raises:
        ValueError: names the model's size, the bytes needed and the machine's memory.
    """
    needed = predicted(config).state
    there = host_memory() if gpu is None else gpu.memory
    if there is None or needed <= there:
        return
    parameters = parameter_count(config.model).total
    shape = ", ".join(f"model.{name}={getattr(config.model, name)}" for name in SHAPE)
    place = "this machine" if gpu is None else gpu.name
    raise ValueError(
        f"model.name={config.model.name} ({shape}) has {parameters:.3g} parameters, whose weights, gradients and "
        f"optimizer alone take {needed / GIB:,.0f} GiB; {place} has {there / GIB:,.1f} GiB of memory; "
        f"use a smaller one, such as model=tiny"
    )


def host_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's; None where nobody knows."""
    known = []
    with suppress(ValueError, OSError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in CGROUP_LIMITS:
        with suppress(ValueError, OSError):  # "max" is no number
            known.append(int(Path(limit).read_text()))
    return min(known, default=None)
