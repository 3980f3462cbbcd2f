"""Memory: its peaks while it lasts, and what a run says when it ends."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.activations_config import FullConfig
from model.memory import GIB

from .capacity import predicted
from .config import TrainConfig
from .errors import OutOfMemory


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory since the last call, then the peaks start anew; empty on a CPU."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "memory/peak_allocated_gib": stats["allocated_bytes.all.peak"] / GIB,
        "memory/peak_reserved_gib": stats["reserved_bytes.all.peak"] / GIB,
        "memory/alloc_retries": stats["num_alloc_retries"],
    }


@contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into `OutOfMemory`, whose message is meant for a person."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        stats = torch.cuda.memory_stats()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        held = (
            f"{stats['allocated_bytes.all.current'] / GIB:.1f} GiB allocated and "
            f"{stats['reserved_bytes.all.current'] / GIB:.1f} GiB reserved of {total / GIB:.1f} GiB"
        )
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        raise OutOfMemory(
            f"out of GPU memory: {held}, {wanted[1] if wanted else 'more'} wanted. {advice(config)}"
        ) from error
    except RuntimeError as error:
        wanted = re.search(r"DefaultCPUAllocator.*?(\d+) bytes", str(error))
        if wanted is None:
            raise
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        raise OutOfMemory(
            f"out of memory: {peak / GIB:.1f} GiB held at most, {int(wanted[1]) / GIB:.1f} GiB wanted. {advice(config)}"
        ) from error


def advice(config: TrainConfig) -> str:
    """The settings that reduce memory in this run, the most effective first."""
    plan, hints = predicted(config), []
    if plan.scores:
        hints.append(
            f"attention=auto (math holds {plan.scores / GIB:.1f} GiB of S × S scores per layer, several times over)"
        )
    memory = config.memory
    if not isinstance(memory, FullConfig):
        hints.append("memory=full (layers compute most of what they now keep again in backward: slower, the same loss)")
    elif memory.layers < 1:
        hints.append(f"memory.layers=1 (now {memory.layers:g})")
    if config.batch_size > 1:
        rows = config.plan.tokens_per_step // config.seq_len
        smaller = next(size for size in range(config.batch_size // 2, 0, -1) if rows % size == 0)
        hints.append(f"batch_size={smaller} (tokens_per_step={config.plan.tokens_per_step} keeps the step's size)")
    micro_batch = config.batch_size * config.seq_len
    if not 0 < config.model.loss_chunk_size < micro_batch and micro_batch > 2048:
        hints.append(f"model.loss_chunk_size=2048 (now {micro_batch} × {config.model.vocab_size} logits exist at once)")
    hints.append(f"seq_len={config.seq_len // 2}")
    hints.append(f"a smaller model= (weights, gradients and optimizer alone take {plan.state / GIB:.1f} GiB)")
    return "What helps: " + ", ".join(hints)
