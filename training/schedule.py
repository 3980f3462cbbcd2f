"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_WARMUP = 20  # steps


@dataclass
class ScheduleConfig:
    """Linear warm-up, then half a cosine down to min_ratio of the peak."""

    name: str = "cosine"
    warmup_steps: int | None = None
    """None for what warmup_tokens says or, without them, DEFAULT_WARMUP steps, fewer in a shorter run."""
    warmup_tokens: int | None = None
    min_ratio: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_tokens={self.warmup_tokens} are two "
                f"lengths of one warm-up; set one of them to null"
            )
        for name in ("warmup_steps", "warmup_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"schedule.{name}={getattr(self, name)} is negative; use 0 for no warm-up")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"schedule.min_ratio={self.min_ratio} must lie in [0, 1]; use 0.1, or 0 to end at 0")

    def warmup(self, tokens_per_step: int) -> int:
        """Warm-up in steps, in a run that is long enough for it."""
        if self.warmup_tokens is not None:
            return math.ceil(self.warmup_tokens / tokens_per_step)
        return DEFAULT_WARMUP if self.warmup_steps is None else self.warmup_steps

    def check_length(self, max_steps: int, tokens_per_step: int) -> None:
        """Raises ValueError where a warm-up that was asked for is longer than the run."""
        for name in ("warmup_steps", "warmup_tokens"):
            if getattr(self, name) is not None and (steps := self.warmup(tokens_per_step)) > max_steps:
                raise ValueError(
                    f"schedule.{name}={getattr(self, name)} is a warm-up of {steps} steps in a run of {max_steps}; "
                    f"use schedule.{name}=null, or raise max_steps"
                )

    def after_warmup(self, progress: float) -> float:
        """Fraction of the peak at `progress` ∈ [0, 1] of what follows the warm-up."""
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): linear to min_ratio over the last decay_fraction."""

    name: str = "wsd"
    min_ratio: float = 0.0
    decay_fraction: float = 0.2
    """Of the steps after the warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"schedule.decay_fraction={self.decay_fraction} must lie in (0, 1]; use 0.2")

    def after_warmup(self, progress: float) -> float:
        remaining = min(1.0, (1 - progress) / self.decay_fraction)
        return self.min_ratio + (1 - self.min_ratio) * remaining


SCHEDULES: dict[str, type[ScheduleConfig]] = {"cosine": ScheduleConfig, "wsd": WSDConfig}


def learning_rate(config: ScheduleConfig, step: int, max_steps: int, tokens_per_step: int, peak: float) -> float:
    """The learning rate of a step.

    Args:
        step: 1 … max_steps. peak: reached at the warm-up's last step; min_ratio of it at max_steps.
    """
    warmup = min(config.warmup(tokens_per_step), max_steps)
    if step <= warmup:
        return peak * step / warmup
    return peak * config.after_warmup((step - warmup) / max(1, max_steps - warmup))
