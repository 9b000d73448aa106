"""What a detector's statistic is like on traffic without cause, by what it depends on anyway.

Few captured rows make a sentence's distribution noisy, many candidates make it wide, and an answer reads otherwise than
reasoning: a value is high only against others of its **stratum**.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from stream_monitor.records import Role

ROWS, SUPPORT = (3, 5, 9), (16, 64, 256)
"""Where classes of captured rows and of candidate sentences begin, the first beginning at 0."""
LEAST = 30
"""Values that a stratum needs; with fewer, those of all strata together stand for it."""
ALL = "all"

Moments = tuple[int, float, float]
"""Number of values, their mean and their standard deviation."""


class Stratum(NamedTuple):
    """Of one sentence.

    Attributes:
        rows: captured rows. support: sentences it may rest on. answer: whether it is of the answer, not of reasoning.
    """

    rows: int
    support: int
    answer: bool

    @classmethod
    def of(cls, rows: int, support: int, role: int) -> "Stratum":
        """Of a sentence with this `summary.proto` Role."""
        return cls(rows, support, role == Role.ANSWER)

    @property
    def name(self) -> str:
        """As profiles have it.

        >>> Stratum(6, 40, False).name
        'rows 5+, candidates 16+, reasoning'
        """
        rows, support = (
            max((edge for edge in edges if edge <= value), default=0)
            for edges, value in ((ROWS, self.rows), (SUPPORT, self.support))
        )
        return f"rows {rows}+, candidates {support}+, {'answer' if self.answer else 'reasoning'}"


class Reference:
    """Turns values of a statistic into standard deviations above the mean of their stratum.

    Args:
        moments: stratum's name, or `ALL`, to its moments.
    """

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self._moments = moments

    def standardise(self, value: float, stratum: Stratum) -> float:
        """0 where nothing is known to compare with."""
        _, mean, deviation = self._moments.get(stratum.name) or self._moments.get(ALL) or (0, value, 1.0)
        return (value - mean) / deviation if deviation > 0 else 0.0


def measure(values: Iterable[tuple[Stratum, float]]) -> dict[str, Moments]:
    """Moments of each stratum with `LEAST` values, and of all values together if there are so many."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for stratum, value in values:
        by_name[stratum.name].append(value)
        by_name[ALL].append(value)
    return {
        name: (len(found), float(np.mean(found)), float(np.std(found)))
        for name, found in sorted(by_name.items())
        if len(found) >= LEAST
    }
