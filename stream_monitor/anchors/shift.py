"""ANCHOR_SHIFT: the distribution over anchors left its running reference."""

import math
from collections import deque
from copy import copy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import AnchorShare, Mass, Positions, SparseMass, ranked
from stream_monitor.anchors.page_hinkley import RiseDetector
from stream_monitor.anchors.reference import Reference, Stratum
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.compiled.divergence import compare, side_by_side
from stream_monitor.records import Role

_LEAST = 1e-300
"""Halved, a smaller share may be 0, and it adds nothing."""
_MOST = 256
"""Sentences that the reference holds, the heaviest: it stays small however long the output is."""
_NO_COLUMNS = np.zeros(0, np.int64)


class _Start(NamedTuple):
    """The reference before a sentence, how many candidates were compared with it, and sentences learned from."""

    reference: SparseMass
    compared: int
    learned: int


class Moved(NamedTuple):
    """Shares of some sentences, each summing to 1, before a shift and since.

    Attributes:
        columns: int64 [n], the sentences, ascending.
        before, since: float64 [n].
    """

    columns: Positions
    before: Mass
    since: Mass

    def lost(self, most: int) -> list[AnchorShare]:
        """Those that lost most, so many at most, and their shares before."""
        return ranked(self.columns, self.before - self.since, self.before, most)

    def gained(self, most: int) -> list[AnchorShare]:
        """Those that gained most, so many at most, and their shares since."""
        return ranked(self.columns, self.since - self.before, self.since, most)


class AnchorShift(RiseDetector):
    """Watches one request's sentences; raises an alarm when they rest on other anchors than before.

    Each sentence's anchor distribution (its mass on sentences at least four earlier, normalised) is compared with an
    exponentially weighted reference by Jensen-Shannon divergence, in bits, and the divergence goes through a
    Page-Hinkley test. Every sentence brings one more candidate anchor; mass on candidates that the reference does not
    know, or has known for so few sentences that it still has too little of theirs, is no evidence of a shift. So the
    comparison is on the others, the common support, and that mass is kept apart as `entering`. After an alarm the
    reference starts anew from the sentence that raised it.

    Parameters
    ----------
    warm_up
        Scored sentences before the first alarm.
    weight
        Weight of the newest sentence in the reference, in (0, 1].
    settle
        Sentences for which the reference must have known a candidate that came up since it began.
    delta
        Rise of the mean divergence that is tolerated, bits.
    threshold
        Alarm when the summed excess divergence passes it, bits.
    min_rows
        Captured rows a sentence needs.
    min_mass
        Share of attention that the common support must hold before normalising it means anything; also the part of the
        reference that must lie there.
    reference
        Of a profile: divergences are then standardised by it, and `delta` and `threshold` are in standard deviations.
    lately
        Sentences that `moved_lately` is of.

    Examples
    --------
    >>> detector = AnchorShift(warm_up=4)
    >>> for index in range(12):
    ...     mass = np.zeros(index + 8)
    ...     mass[0 if index < 8 else 5] = 0.5
    ...     _ = detector.update(SparseMass.of(mass), len(mass), rows=3)
    ...     if detector.drift_detected:
    ...         print(index, round(detector.divergence, 2))
    8 1.0
    """

    def __init__(
        self,
        warm_up: int = 8,
        weight: float = 0.2,
        settle: int = 10,
        delta: float = 0.05,
        threshold: float = 0.5,
        min_rows: int = 2,
        min_mass: float = 0.01,
        reference: Reference | None = None,
        lately: int = 0,
    ) -> None:
        super().__init__(warm_up, delta, threshold)
        self.warm_up = warm_up
        self.weight = weight
        self.settle = settle
        self.min_rows = min_rows
        self.min_mass = min_mass
        self.normal = reference
        self.divergence = math.nan
        self.entering = 0.0
        self.reference = SparseMass.of(np.zeros(0))
        # Candidates that the reference knew after each of its newest sentences, `settle` of them at most.
        self._known: list[int] = []
        # As the newest rise began, and before each of the newest sentences.
        self._rise = _Start(self.reference, 0, 0)
        self._starts = deque[_Start](maxlen=lately)
        # Sentences that the reference has learned from.
        self._learned = 0
        # The reference and what it knows as they were but for the newest alarm.
        self._unbroken = self.reference, self._known
        self._scored = 0

    def update(self, mass: SparseMass, candidates: int, rows: int, role: int = Role.REASONING) -> Verdict:
        """Take in one sentence.

        Args:
            mass: share of the sentence's attention on each earlier sentence.
            candidates: number of the sentences it may rest on; all columns are below it.
            rows: captured rows the sentence has.
            role: `summary.proto` Role of the sentence.
        """
        total = mass.total
        if rows < self.min_rows or total < self.min_mass:
            return Verdict.INSUFFICIENT
        current = SparseMass(mass.columns, mass.shares / total)
        if not self._known:
            self.reference, self._known = current, [candidates]
            return Verdict.WARM_UP
        common = min(self._known[0], candidates)
        self._known = [*self._known, candidates][-self.settle :]
        columns, both = side_by_side(*self.reference, *current)
        held, shared, divergence = compare(columns, both, common)
        self.entering = 1.0 - shared
        before = self.reference
        if total * shared < self.min_mass or held < self.min_mass:
            self._learn(columns, both)
            return Verdict.INSUFFICIENT
        self.divergence = divergence
        stratum = Stratum.of(rows, candidates, role)
        self._test.update(self.normal.standardise(self.divergence, stratum) if self.normal else self.divergence)
        self._scored += 1
        start = _Start(before, common, self._learned)
        self._starts.append(start)
        if not self.began:
            self._rise = start
        self._learn(columns, both)
        if self.drift_detected:
            self._unbroken = self.reference, self._known
            self.reference, self._known = current, [candidates]
            self._scored = 0
            self._starts.clear()
            return Verdict.ALARM
        return Verdict.WARM_UP if self._scored < self.warm_up else Verdict.STEADY

    def moved(self) -> Moved:
        """What the sentences since the rise began rest on, the newest counting most, beside what was rested on until
        then; of the sentences that were compared then."""
        return self._moved(self._rise)

    def moved_lately(self) -> Moved:
        """The same of the newest `lately` sentences that were compared, or of those since the newest alarm."""
        return self._moved(self._starts[0]) if self._starts else Moved(_NO_COLUMNS, np.zeros(0), np.zeros(0))

    def _moved(self, start: "_Start") -> Moved:
        columns, both = side_by_side(*start.reference, *(self._unbroken[0] if self.drift_detected else self.reference))
        known = columns.searchsorted(start.compared)
        before, learned = both[:, :known]
        # The reference is a weighted mean of the one before and the sentences since.
        part = (1.0 - self.weight) ** (self._learned - start.learned)
        since = np.maximum(learned - part * before, 0.0)
        before, since = (shares / max(float(np.add.reduce(shares)), _LEAST) for shares in (before, since))
        return Moved(columns[:known], before, since)

    def unbroken(self) -> "AnchorShift":
        """Right after an alarm: the same as if its threshold had not been passed, nor ever will be."""
        twin = copy(self)
        twin._test = self._test.unbroken()
        twin._starts = copy(self._starts)
        twin.reference, twin._known = self._unbroken
        return twin

    def _learn(self, columns: Positions, both: NDArray[np.float64]) -> None:
        """From the reference and the newest sentence side by side."""
        shares = (1.0 - self.weight) * both[0] + self.weight * both[1]
        if len(shares) > _MOST:
            kept = shares > np.partition(shares, -_MOST - 1)[-_MOST - 1]
            columns, shares = columns[kept], shares[kept]
        self.reference = SparseMass(columns, shares)
        self._learned += 1
