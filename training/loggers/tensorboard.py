"""TensorBoard's view of a run: the same metric names, in <folder>/tensorboard."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from importlib.util import find_spec

from training.loggers.base import Logger, RunInfo
from training.metrics import markdown


def check_installed() -> None:
    """Raises ValueError if the tensorboard package is missing."""
    if find_spec("tensorboard") is None:
        raise ValueError("logger.tensorboard needs tensorboard: pip install tensorboard, or logger.tensorboard=false")


class TensorBoardLogger(Logger):
    """Raises ValueError at construction if the tensorboard package is missing."""

    name = "tensorboard"

    def __init__(self) -> None:
        check_installed()

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote after the checkpoint is hidden, so that each step is shown once.
        purge_step = run.step + 1 if run.events else None
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)
        everything = json.dumps({**run.config, "facts": run.facts}, indent=2, default=str)
        self._writer.add_text("config", textwrap.indent(everything, "    "))  # indented: Markdown for "as it is"
        self._writer.add_text("metrics", markdown())

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        for name, value in {"tokens": tokens, **metrics}.items():
            self._writer.add_scalar(name, value, global_step=step)

    def sample(self, step: int, tokens: int, text: str) -> None:
        self._writer.add_text("sample", textwrap.indent(text, "    "), global_step=step)

    def finish(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()
