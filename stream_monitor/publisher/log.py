"""One-line messages on the standard error stream that the publisher shares with its worker."""

import sys
import time


class Log:
    """Says each kind of thing at most once in `every` seconds; what was held back is counted in the next line."""

    def __init__(self, name: str, every: float = 60.0) -> None:
        self._name = name
        self._every = every
        self._last: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def say(self, kind: str, text: str) -> None:
        """Write `text` unless something of the same `kind` was said lately."""
        now = time.monotonic()
        if now - self._last.get(kind, -self._every) < self._every:
            self._held[kind] = self._held.get(kind, 0) + 1
            return
        self._last[kind] = now
        held = self._held.pop(kind, 0)
        suffix = f" ({held} more such messages held back)" if held else ""
        print(f"stream-monitor publisher {self._name}: {' '.join(text.split())}{suffix}", file=sys.stderr, flush=True)
