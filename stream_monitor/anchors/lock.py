"""ANCHOR_LOCK: the reasoning reads itself at a constant distance, as a model in a loop does."""

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.verdict import Verdict

MIN_LAG = 8
"""Nearer keys are read at all times, loop or not."""
_SHORT = np.arange(3.0, 65.0)
"""Periods that are tried whatever the lags are."""
_MOST_CHANCE = 0.99


class AnchorLock:
    """Watches the distance from each captured row to the key it reads most, `MIN_LAG` or more tokens back.

    In a loop of period b a row reads the token that came next last time, b - 1 tokens back, or its own copy, b back; or
    the same some rounds earlier. So every lag leaves a remainder of b - 1 or 0. The score is the part of the rows' mass
    whose lag fits the best b, over what so few rows may fit by chance: below 0 for lags at random, 1 for a loop.

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
    >>> detector.update(np.random.default_rng(0).integers(8, 900, 30), np.full(30, 0.1))
    <Verdict.STEADY: 'steady'>
    >>> detector.update(np.array([19, 39, 20, 59] * 8), np.full(32, 0.1))
    <Verdict.ALARM: 'alarm'>
    >>> detector.period
    20
    """

    def __init__(self, rows: int = 32, min_rows: int = 12, threshold: float = 0.8) -> None:
        self.rows = rows
        self.min_rows = min_rows
        self.threshold = threshold
        self.score = 0.0
        self.period = 0
        self.drift_detected = False
        self._locked = False
        self._lags = np.zeros(0, np.int64)
        self._shares = np.zeros(0)

    def update(self, lags: NDArray[np.int64], shares: NDArray[np.float64]) -> Verdict:
        """Take in the rows of one sentence, in order.

        Args:
            lags: int64 [rows], tokens back to the heaviest far key; 0 for a row that has none.
            shares: float64 [rows], attention on it.
        """
        far = lags >= MIN_LAG
        self._lags = np.concatenate([self._lags, lags[far]])[-self.rows :]
        self._shares = np.concatenate([self._shares, shares[far]])[-self.rows :]
        self.drift_detected = False
        total = self._shares.sum()
        if len(self._lags) < self.min_rows or not total:
            return Verdict.INSUFFICIENT
        self._fit(total)
        locked = self.score > self.threshold
        self.drift_detected = locked and not self._locked
        self._locked = locked
        return Verdict.ALARM if self.drift_detected else Verdict.STEADY

    def _fit(self, total: np.floating) -> None:
        # Lags that leave b - 1 or 0 are those whose successors leave 0 or 1. Exact in floating point, and faster.
        next_lags = self._lags + 1.0
        short = _SHORT[: _SHORT.searchsorted(next_lags.max(), side="right")]
        periods = np.concatenate([short, next_lags - 1, next_lags])
        rest = next_lags / periods[:, None]
        np.floor(rest, out=rest)
        rest *= periods[:, None]
        np.subtract(next_lags, rest, out=rest)
        part = (rest <= 1) @ self._shares / total
        # Two lags in b fit by chance; as few rows as these may fit by three standard errors more.
        rows = total**2 / np.square(self._shares).sum()
        chance = 2 / periods
        chance = np.minimum(chance + 3 * np.sqrt(chance * (1 - chance) / rows), _MOST_CHANCE)
        scores = (part - chance) / (1 - chance)
        self.score = float(scores.max())
        # What fits a period fits its divisors too.
        self.period = int(periods[scores > self.score - 1e-9].max())
