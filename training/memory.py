"""Memory: its peaks while it lasts, and what a run says when it ends."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from model.arithmetic import score_bytes
from model.memory import GIB, predict, state_bytes

from .capacity import as_typed, choose_policy, resolve_memory, smaller_batches, workload
from .config import TrainConfig
from .errors import OutOfMemory
from .parallel.world import World
from .runtime import Runtime

NOTICEABLY = 0.9
"""Fraction of the predicted peak that a policy must stay below to be of help."""
OF_CUDA_ITSELF = 2 * GIB
"""More than the driver, kernels and communication take of a card, beside what PyTorch reserves."""


def memory_metrics(world: World, replayed: int = 0) -> dict[str, float]:
    """Peak memory since the last call, of the rank that has most, then the peaks start anew; empty on a CPU.

    Args:
        replayed: bytes at the peak of what was replayed, which the allocator does not count.
    """
    if world.device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(world.device)
    torch.cuda.reset_peak_memory_stats(world.device)
    numbers = {
        "memory/peak_allocated_gib": max(stats["allocated_bytes.all.peak"], replayed) / GIB,
        "memory/peak_reserved_gib": stats["reserved_bytes.all.peak"] / GIB,
        "memory/alloc_retries": stats["num_alloc_retries"],
    }
    most = world.max(torch.tensor(list(numbers.values()), dtype=torch.float64)).tolist()
    return dict(zip(numbers, most, strict=True))


@contextmanager
def out_of_memory_explained(config: TrainConfig, runtime: Runtime) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into `OutOfMemory`, whose message is meant for a person."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        stats, (free, total) = torch.cuda.memory_stats(), torch.cuda.mem_get_info()
        reserved = stats["reserved_bytes.all.current"]
        held = (
            f"{stats['allocated_bytes.all.current'] / GIB:.1f} GiB allocated and {reserved / GIB:.1f} GiB reserved of "
            f"{total / GIB:.1f} GiB"
        )
        if (others := total - free - reserved) > OF_CUDA_ITSELF:
            held += f", {others / GIB:.1f} GiB held by other programs (nvidia-smi lists them)"
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        raise OutOfMemory(
            f"out of GPU memory: {held}, {wanted[1] if wanted else 'more'} wanted. {advice(config, runtime)}"
        ) from error
    except MemoryError as error:
        raise OutOfMemory(f"out of host memory: {error}") from error
    except RuntimeError as error:
        wanted = re.search(r"DefaultCPUAllocator.*?(\d+) bytes", str(error))
        if wanted is None:
            raise
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        held = f"{peak / GIB:.1f} GiB held at most, {int(wanted[1]) / GIB:.1f} GiB wanted"
        raise OutOfMemory(f"out of memory: {held}. {advice(config, runtime)}") from error


def advice(config: TrainConfig, runtime: Runtime) -> str:
    """The settings that reduce memory in this run, the most effective first."""
    config = resolve_memory(config, runtime)
    work, hints = workload(config, runtime), []
    now = predict(work)
    if work.writes_scores:
        scores = score_bytes(config.model, config.batch_size, config.seq_len)
        hints.append(
            f"attention=auto (math holds {scores / GIB:.1f} GiB of S × S scores per layer, several times over)"
        )
    if leaner := choose_policy(work, runtime, NOTICEABLY * now.total):
        peak = predict(replace(work, memory=leaner)).total
        hints.append(f"{as_typed(leaner)} ({peak / GIB:.1f} GiB instead of {now.total / GIB:.1f} by prediction)")
    if sizes := smaller_batches(config):
        tokens = config.plan.tokens_per_step
        hints.append(f"batch_size={sizes[0]} (tokens_per_step={tokens} keeps the step's size)")
    if not 0 < config.model.loss_chunk_size < work.tokens and work.tokens > 2048:
        hints.append(f"model.loss_chunk_size=2048 (now {work.tokens} × {config.model.vocab_size} logits exist at once)")
    hints.append(f"seq_len={config.seq_len // 2}")
    state = sum(state_bytes(work))
    hints.append(f"a smaller model= (weights, gradients and optimizer alone take {state / GIB:.1f} GiB)")
    return "What helps: " + ", ".join(hints)
