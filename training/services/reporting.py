"""Writes report.html, the picture of the run: at each evaluation and at the end. The first service ends last."""

from __future__ import annotations

import time

from training.report import RunReader, write_page
from training.run import Run

from .base import Service

REPORT = "report.html"
MOST_OF_THE_TIME = 0.01
"""Share of a run's time that pages before its end may take: an evaluation sooner than that goes without."""


class Reporting(Service):
    """report.html, after evaluations and at the end."""

    def __init__(self) -> None:
        self.evaluated = -1
        """The step of the last evaluation that was seen."""
        self.reader: RunReader | None = None
        self.events = 0
        """Of the record, when this process began."""
        self.has_warned = False
        self.not_before = 0.0

    def begin(self, run: Run) -> None:
        self.reader = RunReader(run.folder)
        self.events = run.progress.events

    def after_step(self, run: Run) -> None:
        """An evaluation is on the page one step later: it comes after this service."""
        evaluated, _ = run.progress.val_loss
        if evaluated == self.evaluated or time.monotonic() < self.not_before:
            return
        self.evaluated = evaluated
        with run.throughput.paused():
            began = time.monotonic()
            self.write(run)
            now = time.monotonic()
        self.not_before = now + (now - began) / MOST_OF_THE_TIME

    def end(self, run: Run, status: str) -> None:
        if run.progress.events > self.events:  # of a finished run that is started again there is nothing new
            self.write(run)

    def write(self, run: Run) -> None:
        """A page that cannot be written ends no run: one line says so, once."""
        if self.reader is None or not run.world.is_first:
            return
        try:
            write_page(run.folder / REPORT, [self.reader.read()])
        except Exception as error:
            if not self.has_warned:
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                run.notify(f"report     {run.folder / REPORT} is not written, training goes on without it: {why}")
            self.has_warned = True
