"""What a user may choose about checkpoints: the section `checkpoint` of `configs/train.yaml`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from training.require import require


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    save: bool = True
    """False: the run saves nothing, neither checkpoints nor its weights."""
    every: int = 250
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep_last: int = 2
    keep_every: int = 0
    keep_best: bool = True

    def __post_init__(self) -> None:
        # configs/train.yaml gives it eval_every's value, which may be the one that was typed.
        require(self.every >= 0, "checkpoint.every", self.every, "use 0 or more (it follows eval_every)")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "use 0 or more")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "use 1 or more")
