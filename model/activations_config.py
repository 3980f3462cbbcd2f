"""What a layer keeps until its backward pass: the fields of `configs/memory/*.yaml`. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import ModelConfig


@dataclass
class MemoryConfig:
    """Everything that the backward pass reads is kept."""

    name: str = "none"

    def check_model(self, model: ModelConfig) -> None:
        """Raises ValueError when layers of this model cannot be computed so."""


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
    """A layer's input is kept, and attention's output and LSE; the rest is computed again, one tile at a time."""

    name: str = "full"
    keep_attention: float = 1.0
    """Fraction of those layers whose attention output and LSE stay, the last ones; the others attend again. The last
    ones, because a backward pass begins with them, while everything else is still held."""
    tile: int = 8192
    """Tokens whose norms and MLP exist at a time; 0 for all."""
    head_groups: int = 1
    """Into how many groups the heads are cut, which attend one after the other; a divisor of model.n_kv_heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.keep_attention <= 1:
            raise ValueError(f"memory.keep_attention={self.keep_attention} is no fraction; use 0 to 1")
        if self.tile < 0:
            raise ValueError(f"memory.tile={self.tile} is negative; use a number of tokens, or 0 for whole rows")
        if self.head_groups < 1:
            raise ValueError(f"memory.head_groups={self.head_groups} must be at least 1; 1 runs all heads at once")

    def keeps_attention(self, layer: int, n_layers: int) -> bool:
        """Whether attention's output and LSE stay in layer 0, 1, …, one of those that compute again."""
        count = self.of(n_layers)
        return layer >= count - math.ceil(self.keep_attention * count)

    def check_model(self, model: ModelConfig) -> None:
        assert model.n_kv_heads is not None
        if model.n_kv_heads % self.head_groups:
            raise ValueError(
                f"memory.head_groups={self.head_groups} does not divide model.n_kv_heads={model.n_kv_heads}; "
                f"use a divisor"
            )


@dataclass
class OffloadConfig(FullConfig):
    """As full; what layers keep lies in pinned host memory until the backward pass comes to it."""

    name: str = "offload"
    host: float = 1.0
    """Fraction of the layers that compute again which keep on the host, the first ones: they keep for the longest time.
    The last of all stays on the device, where it is needed at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.host <= 1:
            raise ValueError(
                f"memory.host={self.host} must lie above 0 and up to 1; use memory=full to keep on the GPU"
            )

    def on_host(self, n_layers: int) -> int:
        """How many layers keep on the host."""
        count = self.of(n_layers)
        return min(math.ceil(self.host * count), count - 1)


@dataclass
class AutoConfig(MemoryConfig):
    """The fastest of the others that fits this machine: `training.capacity.resolve_memory` says which."""

    name: str = "auto"


MEMORY_POLICIES: dict[str, type[MemoryConfig]] = {
    "none": MemoryConfig,
    "selective": SelectiveConfig,
    "full": FullConfig,
    "offload": OffloadConfig,
    "auto": AutoConfig,
}
