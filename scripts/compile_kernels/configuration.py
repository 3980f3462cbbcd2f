"""One kernel as it is compiled for one GPU: what every family of kernels yields, and what the command goes through."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


class Configuration(NamedTuple):
    row: dict[str, Any]
    """What it is: family, architecture, kernel, dtype, and what else tells it from the family's others."""
    source: Any
    """A Triton ASTSource, or Gluon's."""
    target: GPUTarget
    options: dict[str, Any]


def target_of(architecture: str) -> GPUTarget:
    """From sm_90 or gfx942."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def name_of(row: dict[str, Any]) -> str:
    """The words of a row: its values, numbers with their keys, and the keys of what is true."""
    letters = {"head_dim": "D", "seq_len": "S"}
    words = []
    for key, value in row.items():
        if isinstance(value, str):
            words.append(value)
        elif isinstance(value, bool):
            words += [key] * value
        elif isinstance(value, int):
            words.append(f"{letters.get(key, key)}{value}")
    return " ".join(words)
