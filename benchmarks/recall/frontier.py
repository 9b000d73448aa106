"""The best a method reaches for a number of reads, from the points measured."""

from collections.abc import Iterable
from itertools import pairwise

Point = tuple[float, float]
"""Reads, and what they gave; more is better."""

TOLERANCE = 0.1
"""Reads within this part of a budget count as equal to it."""


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no cheaper or equally cheap one reaches, by ascending reads."""
    best: list[Point] = []
    for reads, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((reads, value))
    return best


def interpolated(points: Iterable[Point], reads: float) -> float | None:
    """The frontier at exactly `reads`, linear between its points; None below the first, level beyond the last."""
    line = frontier(points)
    if not line or reads < line[0][0]:
        return None
    for (left, low), (right, high) in pairwise(line):
        if reads < right:
            return low + (high - low) * (reads - left) / (right - left)
    return line[-1][1]


def at_budget(points: Iterable[Point], budget: float) -> float | None:
    """The best point within `TOLERANCE` of the budget, or one that is cheaper and better still.

    Where no point is that near, the frontier is interpolated at the budget itself. None if every point reads more.
    """
    points = list(points)
    if any(abs(reads - budget) <= TOLERANCE * budget for reads, _ in points):
        return max(value for reads, value in points if reads <= (1 + TOLERANCE) * budget)
    return interpolated(points, budget)


def within(points: Iterable[Point], bound: float) -> float | None:
    """The best point that reads at most `bound`; None if there is none."""
    return max((value for reads, value in points if reads <= bound), default=None)
