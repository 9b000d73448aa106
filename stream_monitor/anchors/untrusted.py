"""UNTRUSTED_ANCHOR: a stretch labelled untrusted became what the output rests on most."""

import math

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.verdict import Verdict

_LEAST_MASS = 1e-4
"""Less mass than this on either side counts as this: the ratio of two nothings says nothing."""


class UntrustedAnchor:
    """Compares the heaviest untrusted sentence with the heaviest other one.

    Parameters
    ----------
    threshold
        Alarm when the score passes it, once until it falls below again. 0: the untrusted one is the heavier.
    min_rows
        Captured rows a sentence needs.
    min_mass
        Share of attention that candidates must hold.

    Attributes
    ----------
    score
        Logarithm of the ratio of the two masses, of the newest sentence that could be scored.
    drift_detected
        Whether the newest sentence raised an alarm.

    Examples
    --------
    >>> detector = UntrustedAnchor()
    >>> untrusted = np.array([False, True, False])
    >>> detector.update(np.array([0.2, 0.1, 0.1]), untrusted, rows=4), round(detector.score, 2)
    (<Verdict.STEADY: 'steady'>, -0.69)
    >>> detector.update(np.array([0.1, 0.3, 0.1]), untrusted, rows=4)
    <Verdict.ALARM: 'alarm'>
    """

    def __init__(self, threshold: float = 0.0, min_rows: int = 2, min_mass: float = 0.02) -> None:
        self.threshold = threshold
        self.min_rows = min_rows
        self.min_mass = min_mass
        self.score = -math.inf
        self.drift_detected = False
        self._above = False

    def update(self, mass: NDArray[np.float64], untrusted: NDArray[np.bool_], rows: int) -> Verdict:
        """Take in one sentence.

        Args:
            mass: float64 [candidates], share of its attention on each.
            untrusted: bool [candidates].
            rows: captured rows it has.
        """
        self.drift_detected = False
        if rows < self.min_rows or mass.sum() < self.min_mass or not untrusted.any() or untrusted.all():
            return Verdict.INSUFFICIENT
        heaviest = max(float(mass[untrusted].max()), _LEAST_MASS)
        self.score = math.log(heaviest / max(float(mass[~untrusted].max()), _LEAST_MASS))
        above = self.score > self.threshold
        self.drift_detected = above and not self._above
        self._above = above
        return Verdict.ALARM if self.drift_detected else Verdict.STEADY
