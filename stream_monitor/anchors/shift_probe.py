"""ANCHOR_SHIFT by a probe: heads, each for itself, read as where an output goes on with another subject.

There some heads read what was written before less, some their own sentence more, and most as ever, so that the mean of
them all hides it. Every head's attention is divided among four distances, and four sentences together are compared with
the twelve before them, a sentence counting by its captured rows: what few of them say is mostly chance.
"""

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import HeadShares
from stream_monitor.anchors.matrix import ANCHOR_GAP, Mass
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.verdict import Verdict

BEFORE, TOGETHER = 12, 4
"""Sentences that are compared: so many before, with so many at a place and behind it. Eight or ten before find fewer
joints, sixteen no more (by hand, on the requests of `benchmarks.shift_spliced`, by which what follows was chosen too).
"""
MOST_ROWS = 6
"""By which a sentence counts, as many as 24 tokens have at the default stride. All sentences alike, or each by all its
rows, find fewer."""
LEAST_SHARE = 0.003
"""Added to every share before its logarithm is taken."""
DISTANCES = 4
"""Sentences that may be anchors; nearer ones; the sentence itself; and what no sentence got, most of it the attention
sink's."""


def moves(readings: Mass, rows: NDArray[np.int64]) -> Mass:
    """What the score is a weighted sum of, bias aside: float64 [max(0, n - BEFORE - TOGETHER + 1), m], of each sentence
    that has so many before it.

    Args:
        readings: float64 [n, m], of a request's captured sentences.
        rows: int64 [n], captured rows of each, at least 1.
    """
    weight = np.minimum(rows, MOST_ROWS)[:, None]
    total, count = (np.pad(np.cumsum(one, 0), ((1, 0), (0, 0))) for one in (readings * weight, weight))
    ends = np.arange(BEFORE + TOGETHER, len(readings) + 1)

    def mean(first: NDArray[np.int64], end: NDArray[np.int64]) -> Mass:
        return np.asarray((total[end] - total[first]) / (count[end] - count[first]))

    middle = ends - TOGETHER
    return mean(middle, ends) - mean(middle - BEFORE, middle)


def log_reading(index: int, shares: HeadShares, heads: int) -> Mass:
    """What the probe is shown of a sentence: logarithms of each head's shares, float64 [DISTANCES * heads], NaN where
    no head was told apart, or no sentence stands far enough before it to be an anchor.

    Args:
        index: number of the sentence.
        shares: of the sentence, head by head.
        heads: of the request.
    """
    columns = shares.columns
    if not len(columns) or index < ANCHOR_GAP:
        return np.full(DISTANCES * heads, math.nan)
    distance = np.where(columns == index, 2, np.where(columns > index - ANCHOR_GAP, 1, 0))
    read = np.bincount(distance * heads + shares.heads, shares.shares, DISTANCES * heads).astype(float, copy=False)
    read = read.reshape(DISTANCES, heads)
    read[-1] = np.maximum(0.0, 1.0 - read.sum(0))
    return np.log(read + LEAST_SHARE).ravel()


class ProbedShift:
    """Watches one request's sentences; raises an alarm where they read as behind a change of subject.

    Parameters
    ----------
    probe
        Of a profile.
    threshold
        Alarm when the score passes it, once until it falls below again.

    Attributes
    ----------
    score
        Log odds by the probe of the newest `TOGETHER` sentences beside the `BEFORE` before them, each counting by its
        captured rows, at most `MOST_ROWS`.
    drift_detected
        Whether the newest sentence raised an alarm.

    Examples
    --------
    >>> detector = ProbedShift(Probe(heads=(), weights=(), bias=-1.0), threshold=2.0)
    >>> for index, reading in enumerate([0.5] * 16 + [4.5] * 4):
    ...     if detector.update(reading, rows=6) is Verdict.ALARM:
    ...         print(index, detector.score)
    19 3.0
    """

    def __init__(self, probe: Probe, threshold: float = math.inf) -> None:
        self.probe = probe
        self.threshold = threshold
        self.score = -math.inf
        self.drift_detected = False
        self._above = False
        self._newest: deque[tuple[float, int]] = deque(maxlen=BEFORE + TOGETHER)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Of the sentences that the score is of, int64 [BEFORE + TOGETHER]; fewer before there is one."""
        return np.array([rows for _, rows in self._newest], np.int64)

    def update(self, reading: float, rows: int) -> Verdict:
        """Take in one captured sentence.

        Args:
            reading: weighted sum of what the probe is shown; NaN where heads are missing.
            rows: captured rows it has.
        """
        self.drift_detected = False
        if math.isnan(reading):
            return Verdict.INSUFFICIENT
        self._newest.append((reading, min(rows, MOST_ROWS)))
        if len(self._newest) < BEFORE + TOGETHER:
            return Verdict.WARM_UP
        newest = list(self._newest)
        self.score = _mean(newest[BEFORE:]) - _mean(newest[:BEFORE]) + self.probe.bias
        above = self.score > self.threshold
        self.drift_detected = above and not self._above
        self._above = above
        return Verdict.ALARM if self.drift_detected else Verdict.STEADY


def _mean(readings: list[tuple[float, int]]) -> float:
    return sum(reading * rows for reading, rows in readings) / sum(rows for _, rows in readings)
