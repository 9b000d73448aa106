"""The account of rows of one engine rank, as exported: exact in sum, never going backwards.

The rank's publisher sends cumulative counts, so the newest message is the account and nothing is ever added twice, also
after a restart of the monitor. Rows that the monitor takes in and then discards move from `captured` to `discarded`.
A counter must not fall, though, so a move waits until newly captured rows cover it; the sum is exact throughout.
"""

from collections import Counter
from collections.abc import Iterable

from stream_monitor.v1alpha1 import summary_pb2

TOKEN = "token"
CHUNK = "chunk"
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
            self._move(phase, captured)
            moved = {reason: count for (where, reason), count in self._moved.items() if where == phase}
            result[phase, "captured", ""] = captured - sum(moved.values())
            for reason, count in moved.items():
                result[phase, "discarded", reason] += count
        return list(result.items())

    def _move(self, phase: str, captured: int) -> None:
        """Carry discarded rows over, as far as `captured` less all moves does not fall below what was exported."""
        room = captured - self._captured[phase] - sum(n for (where, _), n in self._moved.items() if where == phase)
        for key, count in self._discarded.items():
            if key[0] == phase:
                step = max(0, min(count - self._moved[key], room))
                self._moved[key] += step
                room -= step
        exported = captured - sum(n for (where, _), n in self._moved.items() if where == phase)
        self._captured[phase] = max(self._captured[phase], exported)
