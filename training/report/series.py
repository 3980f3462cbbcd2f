"""Numbers over a run, of which any length fits into a page."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

MOST_POINTS = 2000
"""Of a series on the page: more than a panel has pixels."""


class Point(NamedTuple):
    """One point of a metric's curve."""

    step: int
    tokens: int
    time: float | None
    """Seconds since 1970; None in a record that an older version wrote."""
    value: float


class Series:
    """One metric of one run. Adding a point takes constant time and memory on average, however long the run is.

    Where points become too many, they are sorted into ranges of steps of one length, and each range keeps the smallest,
    the largest and the first that is not finite. What a line on the screen shows, stays.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.is_thinned = False

    def add(self, point: Point) -> None:
        self.points.append(point)
        if len(self.points) >= 4 * MOST_POINTS:
            self.thin()

    def thin(self) -> None:
        if len(self.points) > MOST_POINTS:
            steps, values = (np.array([point[i] for point in self.points]) for i in (0, 3))
            self.points = [self.points[i] for i in to_keep(steps, values, MOST_POINTS)]
            self.is_thinned = True

    def columns(self, began: float | None) -> dict[str, list[Any]]:
        """For the page: steps, tokens, seconds since `began`, values with six digits; what is not finite is None."""
        self.thin()
        return {
            "step": [point.step for point in self.points],
            "tokens": [point.tokens for point in self.points],
            "time": [_since(began, point.time) for point in self.points],
            "value": [float(f"{p.value:.6g}") if math.isfinite(p.value) else None for p in self.points],
        }


def to_keep(steps: np.ndarray, values: np.ndarray, most: int) -> list[int]:
    """Places of at most so many points, in order: the first and the last, and three of each range of steps.

    Args:
        steps: (N,), in order. values: (N,).
    """
    ranges = (steps - steps[0]) * ((most - 2) // 3) // (steps[-1] - steps[0] + 1)

    def first_of_each_range(places: np.ndarray) -> np.ndarray:
        return places[np.unique(ranges[places], return_index=True)[1]]

    finite = np.flatnonzero(np.isfinite(values))
    ascending = finite[np.argsort(values[finite])]
    ends = np.array([0, len(steps) - 1])
    others = np.flatnonzero(~np.isfinite(values))
    kept = [ends, *map(first_of_each_range, (ascending, ascending[::-1], others))]
    return [int(place) for place in np.unique(np.concatenate(kept))]


def _since(began: float | None, time: float | None) -> float | None:
    return None if began is None or time is None else round(time - began, 1)
