"""How far a long piece of work has come, in the terminal's last line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from data.live import LINE

if TYPE_CHECKING:
    from rich.text import Text

T = TypeVar("T")
LEAST_BAR, MOST_BAR = 6, 30

doing = LINE.doing


def fitting(items: Sequence[T], columns: int, gap: int, width: Callable[[T], int], rank: Callable[[T], int]) -> list[T]:
    """Items that stand beside one another in so many columns: those of the highest rank leave first, 0 stays."""
    kept = list(items)
    while kept and sum(map(width, kept)) + gap * (len(kept) - 1) > columns and max(map(rank, kept)) > 0:
        kept.remove(max(kept, key=rank))
    return kept


def bar_line(
    done: float | None, fields: Sequence[tuple[str, int]], columns: int, before: str = "", bar_rank: int = 1
) -> Text:
    """A bar, as wide as there is room, and fields, each with its rank for `fitting`.

    Args:
        done: from 0 to 1; None: not known, and without a bar. before: text that stands before the bar.
    """
    from rich.text import Text

    bar = "\0" * LEAST_BAR
    items = [(before, 0)] * bool(before) + [(bar, bar_rank)] * (done is not None) + list(fields)
    line, gap = Text(), 2
    kept = fitting(items, columns, gap, lambda item: len(item[0]), lambda item: item[1])
    room = columns - sum(len(text) for text, _ in kept) - gap * (len(kept) - 1)
    for text, _ in kept:
        line.append(" " * gap if line else "")
        if text == bar:
            width = min(MOST_BAR, LEAST_BAR + room)
            full = round(width * min(max(done or 0.0, 0.0), 1.0))
            line.append("━" * full, style="bold cyan").append("─" * (width - full), style="dim")
        else:
            line.append(text)
    return line


def clock(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


@contextmanager
def bar(what: str, size: int | None, unit: str = "MB") -> Iterator[Callable[[int], None]]:
    """Gives a function that takes how much more is done; any thread may call it.

    Args:
        size: of all, where it is known: in bytes, or in `unit` where that is not MB.
    """
    began, lock, done = time.monotonic(), threading.Lock(), 0

    def advance(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount

    def draw(columns: int) -> Text:
        scale, form = (1e6, ",.1f") if unit == "MB" else (1, ",.0f")
        seconds = time.monotonic() - began
        of = f"/{size / scale:{form}}" if size else ""
        fields = [(f"{done / scale:{form}}{of} {unit}", 0)]
        if seconds >= 2 and not done:
            fields.append((f"{seconds:.0f} s", 2))
        elif seconds >= 1:
            fields.append((f"{done / scale / seconds:,.1f} {unit}/s", 3))
            if size:
                fields.append((f"{clock((size - done) * seconds / done)} left", 2))
        return bar_line(done / size if size else None, fields, columns, before=what, bar_rank=1)

    LINE.show(draw)
    try:
        yield advance
    finally:
        LINE.hide(draw)
