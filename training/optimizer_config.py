"""What a user may choose about the optimizer: the fields of `configs/optimizer/*.yaml`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

SLOWEST_IN_BF16 = 0.98
"""Largest decay of a moment in bf16: docs/lab/2026-11-29-precision.md has what rounding did to slower ones."""


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

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

    def check_rounding(self, moments: str) -> None:
        """Refuse moments in bf16 that a step would hardly move.

        A step moves a moment by about 1 − decay of itself; rounding to bf16 loses up to 1/256 of it.

        Raises:
            ValueError: names the decay.
        """
        for name, (decay, remedy) in self._decays().items():
            if moments == "bfloat16" and decay > SLOWEST_IN_BF16:
                raise ValueError(
                    f"precision.moments=bfloat16 rounds away what a step adds with "
                    f"optimizer.{name}={getattr(self, name)}; use optimizer.{name}={remedy}, "
                    f"or precision.moments=float32"
                )

    @property
    def slowest_decay(self) -> float:
        """The largest decay of any moment."""
        return max(decay for decay, _ in self._decays().values())

    def _decays(self) -> dict[str, tuple[float, str]]:
        """The largest decay in each setting, and what is usual there."""
        return {"betas": (max(self.betas), "[0.9,0.95]")}


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) for the matrices of blocks, AdamW for all other parameters."""

    name: str = "muon"
    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum} must lie in [0, 1); use 0.95")

    def _decays(self) -> dict[str, tuple[float, str]]:
        return {**super()._decays(), "momentum": (self.momentum, "0.95")}


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {"adamw": OptimizerConfig, "muon": MuonConfig}
