"""A sequential test for a rise of the mean."""

from copy import copy


class PageHinkley:
    """Page-Hinkley test, upward only, after E. S. Page, Continuous Inspection Schemes, Biometrika 41 (1954).

    The same recursion as river.drift.PageHinkley with mode="up", which the tests take as the oracle.

    Parameters
    ----------
    min_instances
        Values before the first alarm.
    delta
        Rise of the mean that is tolerated, in the unit of the values.
    threshold
        Alarm when the summed excess passes it, in the unit of the values.
    alpha
        Forgetting factor of the sum, in (0, 1].

    Attributes
    ----------
    drift_detected
        Whether the newest value raised an alarm.
    statistic
        The summed excess.
    since_lowest
        Values since the sum was lowest: at an alarm, the values that made it rise.

    Examples
    --------
    >>> test = PageHinkley(min_instances=5, delta=0.1, threshold=1.0)
    >>> for index, value in enumerate([0.2] * 20 + [0.9] * 5):
    ...     test.update(value)
    ...     if test.drift_detected:
    ...         print(index)
    21
    """

    def __init__(
        self, min_instances: int = 30, delta: float = 0.005, threshold: float = 50.0, alpha: float = 1.0
    ) -> None:
        self.min_instances = min_instances
        self.delta = delta
        self.threshold = threshold
        self.alpha = alpha
        self._reset()

    def _reset(self) -> None:
        self.drift_detected = False
        self.statistic = 0.0
        self._count = 0
        self._mean = 0.0
        self._sum = 0.0
        self._lowest = float("inf")
        self.since_lowest = 0

    def unbroken(self) -> "PageHinkley":
        """A copy that goes on from here without alarms, as if this one had raised none."""
        twin = copy(self)
        twin.threshold, twin.drift_detected = float("inf"), False
        return twin

    def update(self, x: float) -> None:
        """Take in one value; starts afresh after an alarm."""
        if self.drift_detected:
            self._reset()
        self._count += 1
        self._mean += (x - self._mean) / self._count
        self._sum = self.alpha * self._sum + x - self._mean - self.delta
        self.since_lowest += 1
        if self._sum <= self._lowest:
            self._lowest, self.since_lowest = self._sum, 0
        self.statistic = self._sum - self._lowest
        self.drift_detected = self._count >= self.min_instances and self.statistic > self.threshold


class RiseDetector:
    """What detectors have in common whose score is the sum of a Page-Hinkley test.

    Parameters
    ----------
    min_instances, delta, threshold
        Of the test.
    """

    def __init__(self, min_instances: int, delta: float, threshold: float) -> None:
        self._test = PageHinkley(min_instances, delta, threshold)

    @property
    def drift_detected(self) -> bool:
        """Whether the newest sentence raised an alarm."""
        return self._test.drift_detected

    @property
    def score(self) -> float:
        """The sum; an alarm when above `threshold`."""
        return self._test.statistic

    @property
    def threshold(self) -> float:
        """Of the score."""
        return self._test.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._test.threshold = value

    @property
    def began(self) -> int:
        """At an alarm, how many scored sentences ago the rise began."""
        return max(0, self._test.since_lowest - 1)
