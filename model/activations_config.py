"""What a layer keeps until its backward pass: the fields of `configs/memory/*.yaml`. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class MemoryConfig:
    """Everything that the backward pass reads is kept."""

    name: str = "none"


@dataclass
class SelectiveConfig(MemoryConfig):
    """Attention's output and LSE and the matrix products are kept, the rest is computed again."""

    name: str = "selective"
    layers: float = 1.0
    """Fraction of the layers that compute again, the first ones; the others keep everything."""

    def __post_init__(self) -> None:
        if not 0 < self.layers <= 1:
            raise ValueError(f"memory.layers={self.layers} must lie above 0 and up to 1; use memory=none for no layer")

    def of(self, n_layers: int) -> int:
        """How many of the layers that is, at least one."""
        return math.ceil(self.layers * n_layers)


@dataclass
class FullConfig(SelectiveConfig):
    """A layer's input is kept, and attention's output and LSE; the rest is computed again."""

    name: str = "full"
    keep_attention: bool = True
    """False: attention is computed again, too."""


MEMORY_POLICIES: dict[str, type[MemoryConfig]] = {
    "none": MemoryConfig,
    "selective": SelectiveConfig,
    "full": FullConfig,
}
