"""ANCHOR_LOCK: the reasoning reads itself at constant distances, as a model in a loop does."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import Mass
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.compiled.periods import FAR_KEYS, PERIODS, best_period, newest_rows

_MOST_CHANCE = 0.99


class AnchorLock:
    """Watches the distances from each captured row to the far keys it reads most, see `compiled/periods.py`.

    In a loop of period b a row reads the token that came next last time, b - 1 tokens back, or its own copy, b back; or
    the same some rounds earlier. So its lags leave a remainder of b - 1 or 0. The score is the part of the keys whose
    lag fits the best b, over what so few rows may fit by chance: about 0 for lags at random, 1 where every key fits. A
    key counts by the root of its mass: in a loop many keys fit, each by little, and a few heavy ones that do not are
    read by heads that look at what is near. Each row counts alike, and as one trial, however many keys it has: what
    the heads of a row read depends on each other.

    Parameters
    ----------
    rows
        Newest captured rows that are looked at.
    min_rows
        Rows before the first score.
    threshold
        Alarm when the score passes it, once until it falls below again.

    Attributes
    ----------
    score
        Of the newest rows.
    period
        The best b, tokens.
    drift_detected
        Whether the newest sentence raised an alarm.

    Examples
    --------
    >>> detector = AnchorLock()
    >>> detector.update(np.random.default_rng(0).integers(8, 900, (30, 8)), np.full((30, 8), 0.1))
    <Verdict.STEADY: 'steady'>
    >>> detector.update(np.array([[19, 39, 20, 40, 59, 60, 79, 80]] * 40), np.full((40, 8), 0.1))
    <Verdict.ALARM: 'alarm'>
    >>> detector.period
    20
    """

    def __init__(self, rows: int = 40, min_rows: int = 12, threshold: float = 0.2) -> None:
        self.rows = rows
        self.min_rows = min_rows
        self.threshold = threshold
        self.score = 0.0
        self.period = 0
        self.drift_detected = False
        self._locked = False
        # Small types: every request keeps them.
        self._lags = np.zeros((0, FAR_KEYS), np.uint16)
        self._parts = np.zeros((0, FAR_KEYS), np.float32)
        self._sentences = np.zeros(0, np.uint32)
        self._newest = 0

    def update(self, lags: NDArray[np.integer], mass: NDArray[np.floating]) -> Verdict:
        """Take in the rows of one sentence, in order.

        Args:
            lags: int64 [rows, FAR_KEYS], tokens back to each row's heaviest far keys.
            mass: float64 [rows, FAR_KEYS], attention on each, in any unit; 0 where there is none.
        """
        self._newest += 1
        self._lags, self._parts, self._sentences = newest_rows(
            self._lags, self._parts, self._sentences, lags, mass, self._newest, self.rows
        )
        self.drift_detected = False
        if len(self._lags) < self.min_rows:
            return Verdict.INSUFFICIENT
        self.score, self.period = best_period(self._lags, self._parts, _chance(len(self._lags)))
        locked = self.score > self.threshold
        self.drift_detected = locked and not self._locked
        self._locked = locked
        return Verdict.ALARM if self.drift_detected else Verdict.STEADY

    @property
    def began(self) -> int:
        """How many sentences ago the rows began to fit the period.

        That is the row from which on they fit it most above halfway between chance and what the newest ones do.
        """
        fits = ((self._lags + 1) % self.period <= 1) * self._parts
        part = fits.sum(axis=1)
        above = part - (2 / self.period + part[-self.min_rows :].mean()) / 2
        since = int(above[::-1].cumsum().argmax())
        return self._newest - int(self._sentences[len(part) - 1 - since])


@cache
def _chance(rows: int) -> Mass:
    """Part of so many rows that fits each of `PERIODS` by chance: of b lags two fit, and two standard errors more."""
    mean = 2 / PERIODS
    limit: Mass = np.minimum(mean + 2 * np.sqrt(mean * (1 - mean) / rows), _MOST_CHANCE)
    return limit
