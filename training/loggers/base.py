"""What a logger is, and the fan-out the trainer holds: one stream of events, several views of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunInfo:
    """One run: its folder, its resolved configuration (nested plain values), and facts that no configuration holds."""

    name: str
    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]  # parameter counts, versions, git commit, GPU name ...
    step: int = 0  # the checkpoint this process goes on from
    events: int = 0  # `log` and `sample` calls before it, over all processes of the run


class Logger(ABC):
    """A view of the event stream. `start` comes first, `finish` last; what is slow to import waits for `start`."""

    name: str

    @abstractmethod
    def start(self, run: RunInfo) -> None: ...

    @abstractmethod
    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Record metrics after `step` optimizer steps and `tokens` training tokens, counted from the first start."""

    @abstractmethod
    def sample(self, step: int, tokens: int, text: str) -> None:
        """Record a text the model wrote."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """Close everything; status is "finished", "failed" or "interrupted"."""


class Loggers:
    """Sends every event to every logger. A logger that raises is dropped with one line; training goes on without it."""

    def __init__(self, loggers: Iterable[Logger], notify: Callable[[str], None]) -> None:
        self.loggers = list(loggers)
        self.started = False
        self._notify = notify

    def start(self, run: RunInfo) -> None:
        self.started = True
        self._each(lambda logger: logger.start(run))

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda logger: logger.log(step, tokens, metrics))

    def sample(self, step: int, tokens: int, text: str) -> None:
        self._each(lambda logger: logger.sample(step, tokens, text))

    def finish(self, status: str) -> None:
        self._each(lambda logger: logger.finish(status))

    def _each(self, send: Callable[[Logger], None]) -> None:
        for logger in list(self.loggers):
            try:
                send(logger)
            except Exception as error:
                self.loggers.remove(logger)
                self._notify(f"logger {logger.name} is dropped, training goes on without it: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """An exception as one short line: other people's messages may span a page."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
