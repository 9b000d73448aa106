"""UNTRUSTED_ANCHOR: a stretch labelled untrusted became what the output rests on most.

Shown are the sentences of the output and, before them, the **opening**: the row of the prompt's last token, from which
the first token of the output is sampled. A short answer that was hijacked may have no other row before it says so.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import SparseMass
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.records import Role

_LEAST_MASS = 1e-4
"""Less mass than this on either side counts as this: the ratio of two nothings says nothing."""


class Rivals(NamedTuple):
    """Shares of a sentence's attention.

    Attributes:
        untrusted: on the heaviest untrusted sentence. other: on the heaviest of all others.
        total: on all candidates together.
    """

    untrusted: float
    other: float
    total: float

    @classmethod
    def of(cls, near: SparseMass, roles: NDArray[np.uint8]) -> "Rivals":
        """Of the mass on candidates, uint8 [sentences] being the roles of all sentences."""
        if not len(near.columns):
            return cls(0.0, 0.0, 0.0)
        untrusted = roles[near.columns] == Role.UNTRUSTED
        return cls(near.shares[untrusted].max(initial=0.0), near.shares[~untrusted].max(initial=0.0), near.total)


def candidates(mass: SparseMass, roles: NDArray[np.uint8], limit: int) -> SparseMass:
    """What may be an anchor beside a document: all of the prompt, and the output's sentences below `limit`.

    A document's last sentences stand close before the first of an answer.
    """
    there = roles[mass.columns]
    output = (there == Role.REASONING) | (there == Role.ANSWER)
    return mass.where(~output | (mass.columns < limit))


class UntrustedAnchor:
    """Compares the heaviest untrusted sentence with the heaviest other one, or asks a probe (`untrusted_probe.py`).

    Parameters
    ----------
    threshold
        Alarm when the score passes it, once until it falls below again. 0: the untrusted one is the heavier.
    opening_threshold
        The same for the opening.
    min_rows
        Captured rows a sentence needs; the opening is a single row, and needs that.
    min_mass
        Share of attention that candidates must hold.

    Attributes
    ----------
    score
        Of the newest sentence that could be scored: logarithm of the ratio of the two masses, or the probe's log odds,
        mean of this sentence and the one before, or the opening: a sentence of few rows is noisy.
    drift_detected
        Whether the newest sentence raised an alarm.

    Examples
    --------
    >>> detector = UntrustedAnchor()
    >>> detector.update(untrusted=0.1, other=0.2, total=0.4, rows=4), round(detector.score, 2)
    (<Verdict.STEADY: 'steady'>, -0.69)
    >>> detector.update(untrusted=0.3, other=0.1, total=0.5, rows=4)
    <Verdict.ALARM: 'alarm'>
    """

    def __init__(
        self, threshold: float = 0.0, opening_threshold: float = 0.0, min_rows: int = 2, min_mass: float = 0.02
    ) -> None:
        self.threshold = threshold
        self.opening_threshold = opening_threshold
        self.min_rows = min_rows
        self.min_mass = min_mass
        self.score = -math.inf
        self.drift_detected = False
        self._above = False
        self._log_odds: float | None = None

    def update(
        self,
        untrusted: float,
        other: float,
        total: float,
        rows: int,
        opening: bool = False,
        log_odds: float | None = None,
    ) -> Verdict:
        """Take in one sentence of a request with an untrusted stretch, or its opening.

        Args:
            untrusted: share of its attention on the heaviest untrusted sentence.
            other: the same of the heaviest of all others.
            total: the same of all candidates together.
            rows: captured rows it has.
            opening: whether it is the opening.
            log_odds: by the probe; NaN if it cannot say, None without one.
        """
        self.drift_detected = False
        if (
            rows < (1 if opening else self.min_rows)
            or total < self.min_mass
            or (log_odds is not None and math.isnan(log_odds))
        ):
            return Verdict.INSUFFICIENT
        if log_odds is None:
            self.score = math.log(max(untrusted, _LEAST_MASS) / max(other, _LEAST_MASS))
        else:
            self.score = log_odds if self._log_odds is None else (log_odds + self._log_odds) / 2
            self._log_odds = log_odds
        above = self.score > (self.opening_threshold if opening else self.threshold)
        self.drift_detected = above and not self._above
        self._above = above
        return Verdict.ALARM if self.drift_detected else Verdict.STEADY
