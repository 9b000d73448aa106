"""The account of rows of one engine rank, as exported: exact in sum, never going backwards.

The rank's publisher sends cumulative counts, so the newest message is the account and nothing is ever added twice, also
after a restart of the monitor. Rows that the monitor takes in and then discards move from `captured` to `discarded`.
A counter must not fall, though, so a move waits until newly captured rows cover it; the sum is exact throughout.
What an engine had in hand when it ended without a word gets the outcome that nobody else can give it.
"""

from collections import Counter
from collections.abc import Iterable

from stream_monitor.v1alpha1 import summary_pb2

TOKEN = "token"
CHUNK = "chunk"
ENGINE_SILENT = "engine_silent"
Cell = tuple[str, str, str]
"""Phase (token or chunk), outcome, reason."""


def add_cells(total: Counter[Cell], cells: Iterable[tuple[Cell, int]]) -> None:
    """Add counts cell by cell."""
    for cell, count in cells:
        total[cell] += count


class RankLedger:
    """One rank's account. Unit: row x layer x query head of that rank."""

    def __init__(self) -> None:
        self.newest = summary_pb2.Ledger()
        self._discarded: Counter[tuple[str, str]] = Counter()
        self._moved: Counter[tuple[str, str]] = Counter()
        self._captured: Counter[str] = Counter()
        self._closed: Counter[str] = Counter()

    def close(self) -> None:
        """The rank is gone, and nothing more is to be expected of it: rows without an outcome are dropped."""
        for phase, rows in ((TOKEN, self.newest.token_rows), (CHUNK, self.newest.chunk_rows)):
            self._closed[phase] = max(self._closed[phase], _without_outcome(rows))

    def discard(self, phase: str, reason: str, heads: int) -> None:
        """Count one row that was taken in and then discarded here."""
        self._discarded[phase, reason] += heads

    def cells(self) -> list[tuple[Cell, int]]:
        """Every cell as exported now. expected = the sum of all others, whenever nothing is in flight."""
        result: Counter[Cell] = Counter()
        for phase, rows in ((TOKEN, self.newest.token_rows), (CHUNK, self.newest.chunk_rows)):
            captured = 0
            for cell in rows:
                if cell.outcome == "captured":
                    captured += cell.count
                else:
                    result[phase, cell.outcome, cell.reason] += cell.count
            if closed := self._closed[phase]:
                result[phase, "dropped", ENGINE_SILENT] = closed
                # It came back, and said what became of them; what was told of them stands.
                told_twice = closed - max(0, _without_outcome(rows))
                captured = max(captured - told_twice, self._exported(phase))
            self._move(phase, captured)
            moved = {reason: count for (where, reason), count in self._moved.items() if where == phase}
            result[phase, "captured", ""] = captured - sum(moved.values())
            for reason, count in moved.items():
                result[phase, "discarded", reason] += count
        return list(result.items())

    def _exported(self, phase: str) -> int:
        """Captured rows that were exported as that or as moved away."""
        return self._captured[phase] + sum(n for (where, _), n in self._moved.items() if where == phase)

    def _move(self, phase: str, captured: int) -> None:
        """Carry discarded rows over, as far as `captured` less all moves does not fall below what was exported."""
        room = captured - self._exported(phase)
        for key, count in self._discarded.items():
            if key[0] == phase:
                step = max(0, min(count - self._moved[key], room))
                self._moved[key] += step
                room -= step
        exported = captured - sum(n for (where, _), n in self._moved.items() if where == phase)
        self._captured[phase] = max(self._captured[phase], exported)


def _without_outcome(rows: Iterable[summary_pb2.RowCount]) -> int:
    """Expected rows less all others."""
    return sum(cell.count if cell.outcome == "expected" else -cell.count for cell in rows)
