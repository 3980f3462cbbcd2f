"""What training compiles at a time. No torch here."""

from __future__ import annotations

from .activations_config import FullConfig, MemoryConfig

COMPILE_UNIT = "model"
"""What torch.compile sees at a time, "model" or "block". Blocks start sooner and step slower, by 4 to 13 %
(docs/benchmarks/compile-unit-h200.md, by `scripts.bench_compile`). With parallel=data, gradients of one block are sent
while others compute. On two GPUs that gains less: llama-1b at 16k took 0.357 s a step as one graph, 0.365 by block."""


def compile_unit(memory: MemoryConfig, is_sharded: bool) -> str:
    """COMPILE_UNIT, or "block" where blocks are executed one by one: they compute again, or weights are gathered."""
    return "block" if is_sharded or isinstance(memory, FullConfig) else COMPILE_UNIT
