"""Loggers: views of one stream of events. metrics.jsonl is the record; console, W&B and TensorBoard show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from training.loggers import tensorboard
from training.loggers.base import Logger, Loggers, RunInfo
from training.loggers.console import Console
from training.loggers.jsonl import JsonlLogger, read_metrics
from training.loggers.tensorboard import TensorBoardLogger
from training.loggers.wandb import WandbConfig, WandbLogger

__all__ = ["Logger", "LoggerConfig", "Loggers", "RunInfo", "WandbConfig", "build_loggers", "read_metrics"]


@dataclass
class LoggerConfig:
    """Which views a run has beside metrics.jsonl and the console, which are always there."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False

    def check(self) -> None:
        """Raises ValueError if a view needs what is not installed; needs no torch."""
        if self.tensorboard:
            tensorboard.check_installed()


def build_loggers(config: LoggerConfig, *, max_steps: int, notify: Callable[[str], None]) -> Loggers:
    """The loggers of a run, the record first. `notify` prints one line; other ranks than 0 hold Loggers([], notify).

    Raises ValueError if TensorBoard is asked for and not installed.
    """
    loggers: list[Logger] = [JsonlLogger(notify), Console(max_steps)]
    if config.tensorboard:
        loggers.append(TensorBoardLogger())
    if config.wandb.mode != "disabled":
        loggers.append(WandbLogger(config.wandb, notify))
    return Loggers(loggers, notify)
