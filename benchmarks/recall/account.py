"""From points measured to the figures that must hold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.recall.frontier import at_budget, interpolated
from benchmarks.recall.points import BEAM, Case, Measured

BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16)
"""Of the keys that dense attention reads."""

EQUAL = 1e-6
"""Recalls that differ by less are equal: float32 sums of the same blocks do."""


@dataclass(frozen=True)
class Margin:
    """How far `beam` is above the best rival of one case at one budget; below 0 it loses.

    Attributes:
        value: difference in recall.
        rival: the method that came nearest; empty where none can read as little as the budget.
    """

    value: float
    rival: str


def margin(case: Case, top_k: int, budget: float, figure: str = "inner", exactly: bool = False) -> Margin | None:
    """Of `beam` over all rivals; None where no method can read as little.

    With `exactly`, frontiers are interpolated at the budget itself in place of points within 10% of it.
    """
    value_at = interpolated if exactly else at_budget
    own = value_at(case.curve(BEAM, top_k, figure), budget)
    rivals = {
        name: value
        for name in case.methods()
        if name != BEAM and (value := value_at(case.curve(name, top_k, figure), budget)) is not None
    }
    if own is None and not rivals:
        return None
    if not rivals:
        return Margin(own or 0.0, "")
    best = max(rivals, key=lambda name: rivals[name])
    difference = (own or 0.0) - rivals[best]
    return Margin(0.0 if abs(difference) < EQUAL else difference, best)


@dataclass(frozen=True)
class Choice:
    """One setting of `beam` for all texts of a model and length.

    Attributes:
        setting: its description.
        worst: least inner recall of all texts.
        recalls: of each text.
        reads: most of all texts.
    """

    setting: str
    worst: float
    recalls: dict[str, float]
    reads: float


def one_setting(cases: Sequence[Case], top_k: int, bound: float) -> Choice | None:
    """The setting of `beam` with the best worst case among those that read at most `bound` on every text."""
    best = None
    for setting in dict.fromkeys(point.setting for point in cases[0].points if point.method == BEAM):
        measured = {case.text: _point(case, setting, top_k) for case in cases}
        reads = max(point.reads for point in measured.values())
        recalls = {text: point.figures.inner for text, point in measured.items()}
        choice = Choice(setting, min(recalls.values()), recalls, reads)
        if reads <= bound and (best is None or choice.worst > best.worst):
            best = choice
    return best


def _point(case: Case, setting: str, top_k: int) -> Measured:
    (point,) = (p for p in case.points if (p.method, p.setting, p.top_k) == (BEAM, setting, top_k))
    return point


def mean(values: Iterable[float]) -> float:
    """Of what there is; NaN of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def targets(group: int, tokens: int) -> list[tuple[float, float]]:
    """(reads, inner recall over the oracle's) that `beam` must reach at K = 8.

    Where many query heads share a KV head, they share its reads; longer contexts need a smaller part of their keys.
    """
    if group < 6:
        return [(0.12, 0.95)]
    most = 0.06 if tokens <= 16_384 else 0.04
    return [(most, 0.95), (most / 2, 0.90)]
