"""Keeps what the capture costs below what the operator allows, by sampling fewer rows."""

MAX_FACTOR = 64
"""Most by which the stride is multiplied."""
_WINDOW_STEPS = 128
"""Steps between two decisions."""
_LONGEST_STEP_NS = 1_000_000_000
"""What lies between two steps counts as time of the engine up to here; beyond, it was idle."""
_RECOVERY = 1 / 3
"""Below this part of the bound the rate is doubled again: half the stride costs at most twice as much."""


class Governor:
    """Measures the time that the hooks and taps take of the runner thread, as a share of its steps.

    What the search takes beside decoding is counted only where it has no CPU of its own (`add_shared`): elsewhere it
    cannot be told from the engine's own time without a second engine. Used by the runner thread alone.

    Args:
        max_overhead: share of the engine's time that the capture may take; 0 never changes the rate.
    """

    def __init__(self, max_overhead: float) -> None:
        self._max_overhead = max_overhead
        self.factor = 1
        """By which the stride is multiplied now."""
        self.hook_ns: dict[str, int] = {}
        """Nanoseconds on the runner thread, by hook, since the start."""
        self.overhead = 0.0
        """Share of the engine's time in the last whole window."""
        self._last = 0
        self._steps = 0
        self._busy = 0
        self._spent = 0
        self._shared = 0.0

    @property
    def hook_seconds(self) -> float:
        """Sum of `hook_ns`, in seconds."""
        return sum(self.hook_ns.values()) / 1e9

    def add(self, hook: str, ns: int) -> None:
        """A hook took this long."""
        self.hook_ns[hook] = self.hook_ns.get(hook, 0) + ns
        self._spent += ns

    def add_shared(self, total_seconds: float) -> None:
        """The search has run this long since the start, on the engine's own CPUs."""
        self._spent += int((total_seconds - self._shared) * 1e9)
        self._shared = total_seconds

    def next_step(self, now_ns: int) -> None:
        """A step begins at this reading of a clock that never goes back."""
        if self._last:
            self._busy += min(now_ns - self._last, _LONGEST_STEP_NS)
        self._last = now_ns
        self._steps += 1
        if self._steps >= _WINDOW_STEPS and self._busy:
            self.overhead = self._spent / self._busy
            self._steps = self._busy = self._spent = 0
            self._decide()

    def _decide(self) -> None:
        if not self._max_overhead:
            return
        if self.overhead > self._max_overhead:
            self.factor = min(2 * self.factor, MAX_FACTOR)
        elif self.overhead < self._max_overhead * _RECOVERY:
            self.factor = max(self.factor // 2, 1)
