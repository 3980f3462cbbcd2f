"""Numbers over a run, of which any length fits into a page."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any, NamedTuple

MOST_POINTS = 2000
"""Of a series on the page: more than a panel has pixels."""


class Point(NamedTuple):
    step: int
    tokens: int
    time: float | None
    """Seconds since 1970; None in a record that an older version wrote."""
    value: float


class Series:
    """One metric of one run. Adding a point takes constant time and memory, however long the run is.

    Where points become too many, they are sorted into ranges of steps of one length, and each range keeps the smallest,
    the largest and the first that is not finite. What a line on the screen shows, stays.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.is_thinned = False

    def add(self, point: Point) -> None:
        self.points.append(point)
        if len(self.points) >= 2 * MOST_POINTS:
            self.thin()

    def thin(self) -> None:
        if len(self.points) > MOST_POINTS:
            self.points, self.is_thinned = thinned(self.points, MOST_POINTS), True

    def columns(self, began: float | None) -> dict[str, list[Any]]:
        """For the page: steps, tokens, seconds since `began`, values with six digits; what is not finite is None."""
        self.thin()
        return {
            "step": [point.step for point in self.points],
            "tokens": [point.tokens for point in self.points],
            "time": [_since(began, point.time) for point in self.points],
            "value": [float(f"{p.value:.6g}") if math.isfinite(p.value) else None for p in self.points],
        }


def thinned(points: list[Point], most: int) -> list[Point]:
    """At most so many points, the first, the last, the smallest and the largest of all among them."""
    first, last = points[0], points[-1]
    ranges = max(1, (most - 2) // 3)
    length = (last.step - first.step) / ranges or 1.0
    kept = [first]
    for _, group in groupby(points[1:-1], lambda point: int((point.step - first.step) / length)):
        members = list(group)
        finite = [point for point in members if math.isfinite(point.value)]
        chosen = [point for point in members if not math.isfinite(point.value)][:1]
        if finite:
            chosen += [min(finite, key=lambda p: p.value), max(finite, key=lambda p: p.value)]
        kept += sorted(set(chosen), key=lambda point: point.step)
    return [*kept, last]


def _since(began: float | None, time: float | None) -> float | None:
    return None if began is None or time is None else round(time - began, 1)
