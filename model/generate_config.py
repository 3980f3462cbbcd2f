"""How the next token is chosen. No torch here, so a mistake is found before it loads."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingConfig:
    """Filters apply in this order, each to what the one before left."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 50
    """Only these many candidates, the most probable; 0 for all."""
    top_p: float = 1.0
    """Only the most probable that together have this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Only candidates with this share of the most probable one's probability (Nguyen et al. 2024, arXiv:2407.01082)."""

    def __post_init__(self) -> None:
        for name, is_valid, remedy in (
            ("temperature", 0 <= self.temperature < math.inf, "use 0 (the most probable token) or more"),
            ("top_k", self.top_k >= 0, "use 1 or more, or 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "use a probability above 0; 1 for all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "use a share of 0 (all tokens) to 1"),
        ):
            if not is_valid:
                raise ValueError(f"{name}={getattr(self, name)}: {remedy}")
