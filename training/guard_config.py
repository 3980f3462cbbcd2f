"""What a user may choose about bad steps: the section `bad_step` of `configs/train.yaml`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from training.require import require


@dataclass
class BadStepConfig:
    """What happens to a step whose loss or gradients are not finite, or whose loss is a spike."""

    action: str = "stop"
    most_in_a_row: int = 10
    spike_sigma: float = 0.0
    spike_window: int = 128

    def __post_init__(self) -> None:
        require(self.action in ("stop", "skip"), "bad_step.action", self.action, "use stop or skip")
        require(self.most_in_a_row >= 1, "bad_step.most_in_a_row", self.most_in_a_row, "use 1 or more")
        require(self.spike_sigma >= 0, "bad_step.spike_sigma", self.spike_sigma, "use 0 for none, or such as 6")
        require(self.spike_window >= 2, "bad_step.spike_window", self.spike_window, "use 2 or more")
