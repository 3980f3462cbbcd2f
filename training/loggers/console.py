"""What a person watches: one line per event, coloured on a terminal, plain text elsewhere.

step    200/2000   tokens   1.6M   loss  3.2145   lr 3.00e-04   grad  1.23   tok/s  98.3k   ...   ETA 0:12:40
step    200/2000   validation   loss  3.1010   bits/byte  1.2345
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TextIO

from rich.console import Console as Terminal
from rich.panel import Panel
from rich.text import Text

from data.live import columns_of
from data.progress import fitting
from training.loggers.base import Logger, RunInfo
from training.metrics import Metric, on_console, short
from training.terminal import plain

# A metric that an event lacks is left out: a CPU has no memory peak, an unknown card no MFU.
TRAIN = on_console(("train", "throughput", "memory"))
VALIDATION = on_console(("val",))
MOST_WANTED = (
    "step",
    "validation",
    "loss",
    "tok/s",
    "MFU",
    "peak",
    "recall",
    "lr",
    "grad",
    "tokens",
    "ETA",
    "attended",
)
"""Labels of what a narrow terminal shows, the last leaving first, and before them those that are not here. The time
left is in the live line, too."""
GAP = 3


class Console(Logger):
    """Writes to `stream` (standard output); max_steps gives the progress and the ETA."""

    name = "console"

    def __init__(self, max_steps: int, stream: TextIO | None = None) -> None:
        self.max_steps = max_steps
        self._stream = stream or sys.stdout
        self._terminal = Terminal(file=self._stream, highlight=False) if self._stream.isatty() else None
        self._first: tuple[int, float] | None = None

    def start(self, run: RunInfo) -> None:
        self._write(Text(plain(f"run        {run.folder}")))

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        if training := _fields(TRAIN, metrics):
            self._line(step, [("tokens", f"{short(tokens):>6}"), *training, *self._eta(step)])
        if validation := _fields(VALIDATION, metrics):
            self._line(step, [("validation", ""), *validation], style="bold cyan")

    def sample(self, step: int, tokens: int, text: str) -> None:
        # A young model writes any byte, escape codes included: they must not reach the terminal.
        text = "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)
        title = f"sample after step {step:,} ({short(tokens)} tokens)"
        if self._terminal:
            self._terminal.print(Panel(Text(text), title=title, title_align="left", border_style="dim"))
        else:
            self._write(Text(f"{title}:\n" + textwrap.indent(text, "    ", lambda line: True)))

    def finish(self, status: str) -> None:
        self._write(Text(f"run {status}"))

    def _eta(self, step: int) -> list[tuple[str, str]]:
        """Time left at the pace since the first line of this process: the first steps compile and warm up."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = step, now
            return []
        first_step, first_time = self._first
        left = max(self.max_steps - step, 0) * (now - first_time) / (step - first_step)
        return [("ETA", str(timedelta(seconds=round(left))))]

    def _line(self, step: int, fields: list[tuple[str, str]], style: str = "bold") -> None:
        width = max(6, len(str(self.max_steps)))
        fields = [("step", f"{step:>{width}}/{self.max_steps}"), *fields]
        if self._terminal:
            fields = fitting(fields, columns_of(self._stream), GAP, _width, _rank)
        line = Text()
        for label, value in fields:
            line.append(" " * GAP if line else "").append(label, style="dim" if value else style)
            line.append(f" {value}" if value else "", style=style)
        self._write(line)

    def _write(self, line: Text) -> None:
        if self._terminal:
            self._terminal.print(line, soft_wrap=True)
            return
        encoding = self._stream.encoding or "utf-8"  # an ASCII-only pipe must not end the console over one letter
        self._stream.write(line.plain.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


def _fields(columns: Sequence[Metric], metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Labels and values, without a rate that rounds to zero: it is a CPU's, and says nothing."""
    fields = [(column, metrics[column.name]) for column in columns if column.name in metrics]
    return [
        (column.label, text)
        for column, value in fields
        if (text := column.in_line(value)).strip(" .0") or column.name != "throughput/tflops"
    ]


def _width(field: tuple[str, str]) -> int:
    label, value = field
    return len(label) + (1 + len(value) if value else 0)


def _rank(field: tuple[str, str]) -> int:
    return MOST_WANTED.index(field[0]) if field[0] in MOST_WANTED else len(MOST_WANTED)
