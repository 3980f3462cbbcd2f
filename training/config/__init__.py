"""The configuration of a run: its schema, how it is loaded, what must not be in it, and the numbers that follow.

No torch here: whatever can be wrong without a look at the machine is found in the first second.
"""

from __future__ import annotations

from training.checkpoint.config import CheckpointConfig
from training.guard_config import BadStepConfig
from training.optimizer_config import OPTIMIZERS, MuonConfig, OptimizerConfig

from .load import load_config
from .plan import Plan
from .schema import TrainConfig

__all__ = [
    "OPTIMIZERS",
    "BadStepConfig",
    "CheckpointConfig",
    "MuonConfig",
    "OptimizerConfig",
    "Plan",
    "TrainConfig",
    "load_config",
]
