"""ANCHOR_SHIFT by a probe: heads, each for itself, read as where an output goes on with another subject.

There some heads read what was written before less, some their own sentence more, and most as ever, so that the mean of
them all hides it. Every head's attention is divided among four distances, and four sentences together are compared with
the eight before them.
"""

import math
from collections import deque

import numpy as np

from stream_monitor.anchors.heads import HeadShares
from stream_monitor.anchors.matrix import ANCHOR_GAP, Mass
from stream_monitor.anchors.probe import LEAST_SHARE
from stream_monitor.anchors.verdict import Verdict

BEFORE, TOGETHER = 8, 4
"""Sentences that are compared: so many before, with so many at a place and behind it."""
DISTANCES = 4
"""Sentences that may be anchors; nearer ones; the sentence itself; and what no sentence got, most of it the attention
sink's."""


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
    bias
        Of the probe.
    threshold
        Alarm when the score passes it, once until it falls below again.

    Attributes
    ----------
    score
        Log odds by the probe of the newest `TOGETHER` sentences beside the `BEFORE` before them.
    drift_detected
        Whether the newest sentence raised an alarm.

    Examples
    --------
    >>> detector = ProbedShift(bias=-1.0, threshold=2.0)
    >>> for index, reading in enumerate([0.5] * 12 + [4.5] * 4):
    ...     if detector.update(reading) is Verdict.ALARM:
    ...         print(index, detector.score)
    15 3.0
    """

    def __init__(self, bias: float, threshold: float = math.inf) -> None:
        self.bias = bias
        self.threshold = threshold
        self.score = -math.inf
        self.drift_detected = False
        self._above = False
        self._newest: deque[float] = deque(maxlen=BEFORE + TOGETHER)

    def update(self, reading: float) -> Verdict:
        """Take in one captured sentence: the weighted sum of what the probe is shown; NaN where heads are missing."""
        self.drift_detected = False
        if math.isnan(reading):
            return Verdict.INSUFFICIENT
        self._newest.append(reading)
        if len(self._newest) < BEFORE + TOGETHER:
            return Verdict.WARM_UP
        newest = list(self._newest)
        self.score = sum(newest[BEFORE:]) / TOGETHER - sum(newest[:BEFORE]) / BEFORE + self.bias
        above = self.score > self.threshold
        self.drift_detected = above and not self._above
        self._above = above
        return Verdict.ALARM if self.drift_detected else Verdict.STEADY
