"""A progress bar where there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes how many bytes more are done.

    Args:
        size: bytes of all, where they are known.
    """
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich import progress
    from rich.console import Console

    columns: list[progress.ProgressColumn] = [progress.TextColumn(what), progress.BarColumn()]
    columns += [progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn()]
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=size)
        yield lambda amount: shown.advance(task, amount)
