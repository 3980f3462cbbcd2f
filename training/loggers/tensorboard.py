"""TensorBoard's view of a run: the same metric names, in <folder>/tensorboard."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from training.loggers.base import Logger, RunInfo
from training.metrics import in_table, markdown


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

        self._config, self._step = run.config, run.step
        self._last: dict[str, float] = {}
        # What a killed process wrote after the checkpoint is hidden, so that each step is shown once.
        purge_step = run.step + 1 if run.events else None
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)
        everything = json.dumps({**run.config, "facts": run.facts}, indent=2, default=str)
        self._writer.add_text("config", textwrap.indent(everything, "    "))  # indented: Markdown for "as it is"
        self._writer.add_text("metrics", markdown())

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        for name, value in {"tokens": tokens, **metrics}.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._step = step
        self._last |= metrics

    def sample(self, step: int, tokens: int, text: str) -> None:
        self._writer.add_text("sample", textwrap.indent(text, "    "), global_step=step)

    def finish(self, status: str) -> None:
        self._writer.add_text("status", status)
        if status == "finished" and (metrics := self._final()):  # once: a run that goes on is no second row
            self._writer.add_hparams(dict(flat(self._config)), metrics, run_name=".", global_step=self._step)
        self._writer.close()

    def _final(self) -> dict[str, float]:
        """The last values of the metrics that the table of a sweep has, and of the loss that is compared most."""
        names = ["val/loss", *(metric.name for metric in in_table())]
        values = {name: self._last[name] for name in names if name in self._last}
        return {f"final/{name}": value for name, value in values.items() if math.isfinite(value)}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """(dotted key, value) of every setting, as TensorBoard's table takes them."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str),
            )
