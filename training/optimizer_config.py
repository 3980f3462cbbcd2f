"""What a user may choose about the optimizer: the fields of `configs/optimizer/*.yaml`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must be two numbers in [0, 1); use [0.9,0.95]")
        if not self.weight_decay >= 0:  # `not`: NaN compares as False
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} is not possible; use 0 or more")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps={self.eps} is not possible; use a small positive number, such as 1e-8")


@dataclass
class MuonConfig(OptimizerConfig):
    name: str = "muon"
    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum} must lie in [0, 1); use 0.95")


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {"adamw": OptimizerConfig, "muon": MuonConfig}
