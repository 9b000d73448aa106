"""PROMPT_DETACHMENT: the reasoning looks at the user's prompt less than it did."""

import math
from copy import copy

from stream_monitor.anchors.page_hinkley import RiseDetector
from stream_monitor.anchors.reference import Reference, Stratum
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.records import Role

_LEAST_SHARE = 1e-4
"""A smaller share counts as this: its logarithm would be noise."""


class PromptDetachment(RiseDetector):
    """Watches one request's sentences; raises an alarm when mass on the user's prompt stays below its reference.

    The prompt's share is that of all attention but the sink's, near sentences and the sentence's own included: of
    that, and not of what goes to sentences further back, depends what hiding the prompt changes
    (`benchmarks.causal`). The longer the output, the more else there is to look at, so it is divided by the prompt's
    share of the tokens; the logarithm goes through a Page-Hinkley test for a fall.

    Parameters
    ----------
    warm_up
        Scored sentences before the first alarm.
    delta
        Fall of the mean that is tolerated, nats.
    threshold
        Alarm when the summed fall passes it, nats.
    min_rows
        Captured rows a sentence needs.
    min_mass
        Share of attention that must be on something.
    reference
        Of a profile: values are then standardised by it, and `delta` and `threshold` are in standard deviations.

    Examples
    --------
    >>> detector = PromptDetachment(warm_up=4)
    >>> for index in range(20):
    ...     _ = detector.update(0.3 if index < 10 else 0.01, total=0.5, tokens=0.5, rows=3)
    ...     if detector.drift_detected:
    ...         print(index)
    11
    """

    def __init__(
        self,
        warm_up: int = 8,
        delta: float = 0.25,
        threshold: float = 4.0,
        min_rows: int = 2,
        min_mass: float = 0.02,
        reference: Reference | None = None,
    ) -> None:
        super().__init__(warm_up, delta, threshold)
        self.warm_up = warm_up
        self.min_rows = min_rows
        self.min_mass = min_mass
        self.normal = reference
        self.fall = 0.0
        self._scored = 0

    def unbroken(self) -> "PromptDetachment":
        """Right after an alarm: the same as if its threshold had not been passed, nor ever will be."""
        twin = copy(self)
        twin._test = self._test.unbroken()
        return twin

    def update(
        self,
        prompt: float,
        total: float,
        tokens: float,
        rows: int,
        support: int = 0,
        role: int = Role.REASONING,
    ) -> Verdict:
        """Take in one sentence.

        Args:
            prompt: share of the sentence's attention on the user's prompt.
            total: the same on all sentences, the prompt and itself included.
            tokens: share of the tokens before it that are the prompt's.
            rows: captured rows the sentence has.
            support: number of sentences that are far enough to be anchors.
            role: `summary.proto` Role of the sentence.
        """
        if rows < self.min_rows or total < self.min_mass or not 0 < tokens <= 1:
            return Verdict.INSUFFICIENT
        self.fall = -math.log(max(prompt / total, _LEAST_SHARE) / tokens)
        stratum = Stratum.of(rows, support, role)
        self._test.update(self.normal.standardise(self.fall, stratum) if self.normal else self.fall)
        self._scored += 1
        if self.drift_detected:
            self._scored = 0
            return Verdict.ALARM
        return Verdict.WARM_UP if self._scored < self.warm_up else Verdict.STEADY
