"""ANCHOR_LOCK: the reasoning reads itself at constant distances, as a model in a loop does."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import Mass
from stream_monitor.anchors.verdict import Verdict

FAR_KEYS = 8
"""Keys by which a row is described. With one, what a row says of a loop is chance; with 16, most are read by chance."""
LEAST_LAG = 8
"""Nearer keys are read at all times, loop or not."""
MOST_LAG = 1024
"""A loop reads its last rounds; farther keys tell little of it."""
_PERIODS = np.arange(3, 513)
"""That are tried, tokens. Of a longer one there are no two rounds within `MOST_LAG`."""
_MULTIPLES = [np.arange(period, MOST_LAG + 2, period) for period in _PERIODS]
_ALL_MULTIPLES = np.concatenate(_MULTIPLES)
_FIRST_MULTIPLES = np.cumsum([0, *map(len, _MULTIPLES[:-1])])
"""Where those of each period begin among all of them."""
_MOST_CHANCE = 0.99


class AnchorLock:
    """Watches the distances from each captured row to the keys it reads most, `LEAST_LAG` to `MOST_LAG` tokens back.

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
        far = (lags >= LEAST_LAG) & (lags <= MOST_LAG)
        weight = np.sqrt(np.where(far, mass, 0.0))
        total = weight.sum(axis=1, keepdims=True)
        told = total[:, 0] > 0
        fresh = np.where(far, lags, 0)[told].astype(np.uint16), (weight[told] / total[told]).astype(np.float32)
        self._lags = np.concatenate([self._lags, fresh[0]])[-self.rows :]
        self._parts = np.concatenate([self._parts, fresh[1]])[-self.rows :]
        self._newest += 1
        self._sentences = np.append(self._sentences, np.full(len(fresh[0]), self._newest, np.uint32))[-self.rows :]
        self.drift_detected = False
        if len(self._lags) < self.min_rows:
            return Verdict.INSUFFICIENT
        self._fit()
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

    def _fit(self) -> None:
        rows = len(self._lags)
        by_lag = np.bincount(self._lags.ravel(), self._parts.ravel(), MOST_LAG + 2).astype(float, copy=False)
        chance = _chance(rows)
        scores = (_part_by_period(by_lag) / rows - chance) / (1 - chance)
        self.score = float(scores.max())
        # What fits a period fits its divisors too.
        self.period = int(_PERIODS[scores > self.score - 1e-6][-1])


@cache
def _chance(rows: int) -> Mass:
    """Part of so many rows that fits each of `_PERIODS` by chance: of b lags two fit, and two standard errors more."""
    mean = 2 / _PERIODS
    limit: Mass = np.minimum(mean + 2 * np.sqrt(mean * (1 - mean) / rows), _MOST_CHANCE)
    return limit


def _part_by_period(by_lag: Mass) -> Mass:
    """Sum of what lies on the lags that fit each of `_PERIODS`; of float64 [MOST_LAG + 2]."""
    pairs = by_lag.copy()
    # A multiple of the period, and one less.
    pairs[1:] += by_lag[:-1]
    part: Mass = np.add.reduceat(pairs.take(_ALL_MULTIPLES), _FIRST_MULTIPLES)
    return part
