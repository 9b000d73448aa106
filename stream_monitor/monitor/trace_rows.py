"""The rows of one request: they wait with their token positions until their sentence is scored, then are folded.

To fold is to sum a row's mass by sentence, which leaves some dozen numbers of it. Folded rows stay apart (not summed
into their sentence), so that a row recomputed after preemption can replace the one it repeats.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import NO_SHARES, HeadShares
from stream_monitor.anchors.matrix import SentenceStarts, distinct
from stream_monitor.anchors.sentences import Span
from stream_monitor.monitor.request_heads import MAX_HEADS, RequestHeads
from stream_monitor.monitor.rows import Row, discard
from stream_monitor.monitor.sentence_row import SentenceRow

_ROW_BYTES = 560
"""Size of a row's Python objects, by tracemalloc on 64-bit CPython 3.11, for the memory bound."""
_NO_KEYS = np.zeros(0, np.uint32)
_NO_MASS = np.zeros(0, np.float32)
_NO_LAGS = np.zeros(0, np.int64)

_Part = tuple[Row, NDArray[np.uint32], NDArray[np.float32]]
"""A row, the sentences that it reads, and the mass on each."""


@dataclass(slots=True)
class _Folded:
    """Rows of one sentence, by position, and what they give to each sentence.

    Attributes:
        edges: of each row in the two below, and their end.
        columns: uint32 [n], ascending within a row. mass: float32 [n], summed over the row's heads.
    """

    rows: list[Row]
    edges: list[int]
    columns: NDArray[np.uint32]
    mass: NDArray[np.float32]

    def parts(self) -> list[_Part]:
        """Each row with its columns and mass."""
        return [
            (row, self.columns[low:high], self.mass[low:high])
            for row, (low, high) in zip(self.rows, pairwise(self.edges), strict=True)
        ]

    @classmethod
    def of_parts(cls, parts: Iterable[_Part]) -> "_Folded":
        """The opposite of `parts`; in any order."""
        ordered = sorted(parts, key=lambda part: part[0].position)
        edges = np.cumsum([0, *(len(columns) for _, columns, _ in ordered)]).tolist()
        return cls(
            [row for row, _, _ in ordered],
            edges,
            np.concatenate([_NO_KEYS, *(columns for _, columns, _ in ordered)]),
            np.concatenate([_NO_MASS, *(mass for _, _, mass in ordered)]),
        )

    def sentence_row(self) -> SentenceRow:
        """The row of the sentence matrix: the mean over heads of each row, then over the rows."""
        # Of ranks without watched heads there is nothing to average.
        count = sum(row.heads > 0 for row in self.rows)
        if not count:
            return _NO_ROW
        heads = [max(1, row.heads) for row in self.rows]
        sums = np.bincount(self.columns, self.mass / np.repeat(np.array(heads, np.float32), np.diff(self.edges)))
        columns = np.flatnonzero(sums)
        counted = [row for row in self.rows if row.heads]
        return SentenceRow(
            columns=columns.astype(np.uint32),
            shares=sums[columns] / count,
            unobserved=sum(row.unobserved / row.heads for row in counted) / count,
            rows=count,
            sink=sum(row.sink / row.heads for row in counted) / count,
            lags=np.array([row.lag for row in counted], np.int64),
            lag_shares=np.array([row.lag_mass / row.heads for row in counted]),
        )


_NO_ROW = SentenceRow(_NO_KEYS, np.zeros(0), float("nan"), 0, 0.0, _NO_LAGS, np.zeros(0))


class TraceRows:
    """See the module.

    Args:
        starts: of the request's sentences, as they stand.
        heads: of the request.

    Attributes:
        bytes: memory, estimated.
        token_rows: rows from which a token was sampled.
        newest: highest position so far.
    """

    def __init__(self, starts: SentenceStarts, heads: RequestHeads) -> None:
        self.bytes = 0
        self.token_rows = 0
        self.newest = -1
        self._starts = starts
        self._heads = heads
        self._rows: dict[int, Row] = {}
        self._waiting: dict[int, Row] = {}
        self._folded: dict[int, _Folded] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def held(self, position: int) -> Row | None:
        """The row at a position."""
        return self._rows.get(position)

    def waiting_from(self, position: int) -> int:
        """Rows at a position or after it that are not folded."""
        return sum(at >= position for at in self._waiting)

    def waiting(self) -> int:
        """Rows that are not folded."""
        return len(self._waiting)

    def add(self, row: Row) -> None:
        """Let a row wait."""
        self._rows[row.position] = self._waiting[row.position] = row
        self.token_rows += row.token
        self.bytes += _ROW_BYTES + row.nbytes

    def close(self, index: int, span: Span) -> tuple[SentenceRow, HeadShares]:
        """Fold the rows that lie in a sentence, to score it: its row of the matrix, and its shares by head."""
        rows = self._in(span)
        if not rows:
            return self.sentence_row(index, span), NO_SHARES
        folded, shares = self._summed(rows)
        if any(row.by_head and row.heads for row in rows):
            self._heads.put(index, shares)
        self._put(index, folded)
        return self._folded[index].sentence_row(), shares

    def fold_late(self, end: int) -> None:
        """Fold the rows before a position, whose sentences were scored before, or are the prompt's."""
        late: dict[int, list[Row]] = {}
        for row in [row for row in self._waiting.values() if row.position < end]:
            late.setdefault(self._sentence(row.position), []).append(row)
        for index, rows in late.items():
            self._put(index, self._summed(rows)[0])

    def sentence_row(self, index: int, span: Span) -> SentenceRow:
        """The row of the matrix of a sentence, folded or not."""
        folded = self._folded.get(index)
        if rows := self._in(span):
            more = self._summed(rows)[0]
            folded = _Folded.of_parts([*folded.parts(), *more.parts()]) if folded else more
        return folded.sentence_row() if folded else _NO_ROW

    def pop(self, position: int) -> Row:
        """Take a row out. Of one that is folded, the first token of each sentence stands for its mass."""
        row = self._rows.pop(position)
        self.token_rows -= row.token
        if self._waiting.pop(position, None) is None:
            index = self._sentence(position)
            parts = self._drop(index)
            self._unfold([part for part in parts if part[0] is row])
            if others := [part for part in parts if part[0] is not row]:
                self._put(index, _Folded.of_parts(others))
        self.bytes -= _ROW_BYTES + row.nbytes
        return row

    def remove(self, position: int, reason: str) -> None:
        """Discard a row."""
        discard(self.pop(position), reason)

    def remove_from(self, position: int, reason: str) -> None:
        """Discard the rows at a position and after it."""
        for at in sorted(at for at in self._rows if at >= position):
            self.remove(at, reason)

    def remove_waiting(self, first: int, end: int | None, reason: str) -> None:
        """Discard rows that wait at positions [first, end)."""
        for at in sorted(at for at in self._waiting if at >= first and (end is None or at < end)):
            self.remove(at, reason)

    def unfold_from(self, sentence: int) -> None:
        """Rows of this sentence and of those after it wait again; their sentences are about to go."""
        for index in [index for index in self._folded if index >= sentence]:
            for row in self._unfold(self._drop(index)):
                self._waiting[row.position] = row

    def token_row_keys(self) -> tuple[list[int], list[int]]:
        """Positions, ascending, and attempts of the rows from which a token was sampled."""
        pairs = sorted((row.position, row.attempt) for row in self._rows.values() if row.token)
        return [position for position, _ in pairs], [attempt for _, attempt in pairs]

    def _sentence(self, position: int) -> int:
        return int(self._starts.of(np.array([position], np.uint32))[0])

    def _in(self, span: Span) -> list[Row]:
        return [self._waiting[at] for at in sorted(at for at in self._waiting if span.start <= at < span.end)]

    def _summed(self, rows: list[Row]) -> tuple[_Folded, HeadShares]:
        """What rows give to each sentence: each of them over its heads, and all of them head by head."""
        keys, mass = np.concatenate([row.keys for row in rows]), np.concatenate([row.mass for row in rows])
        read = columns, places = distinct(self._starts.of(keys))
        count, width = len(rows), len(columns)
        of_row = np.repeat(np.arange(count), [len(row.keys) for row in rows])
        dense = np.bincount(of_row * width + places, mass, count * width).reshape(count, width)
        at, used = np.nonzero(dense)
        edges = np.searchsorted(at, np.arange(count + 1)).tolist()
        folded = _Folded(rows, edges, columns[used].astype(np.uint32), dense[at, used].astype(np.float32))
        telling = sum(row.by_head and row.heads > 0 for row in rows)
        if not telling:
            return folded, NO_SHARES
        heads = np.concatenate([self._heads_of(row) for row in rows])
        # What lies on the context's first token, the attention sink, counts for no sentence.
        told = mass * (keys != 0)
        return folded, HeadShares.of_rows(heads, read, told, len(self._heads.heads), telling)

    def _heads_of(self, row: Row) -> NDArray[np.int64]:
        """Place of the head of each of its entries."""
        if not row.by_head:
            return np.full(len(row.keys), MAX_HEADS)
        if len(row.sources) == 1:
            return self._heads.of_entries(row.sources[0][0])
        return np.concatenate([self._heads.of_entries(rank) for rank, _ in row.sources])

    def _put(self, index: int, folded: _Folded) -> None:
        """Keep rows folded, which wait no longer."""
        for row in folded.rows:
            if self._waiting.pop(row.position, None) is not None:
                self.bytes -= row.nbytes
                row.keys, row.mass, row.by_head = _NO_KEYS, _NO_MASS, False
        if index in self._folded:
            folded = _Folded.of_parts([*self._drop(index), *folded.parts()])
        self._folded[index] = folded
        self.bytes += folded.columns.nbytes + folded.mass.nbytes

    def _drop(self, index: int) -> list[_Part]:
        """Take out what is folded of a sentence."""
        folded = self._folded.pop(index)
        self.bytes -= folded.columns.nbytes + folded.mass.nbytes
        return folded.parts()

    def _unfold(self, parts: list[_Part]) -> list[Row]:
        for row, columns, mass in parts:
            row.keys, row.mass = self._starts.positions[columns].astype(np.uint32), mass
            self.bytes += row.nbytes
        return [row for row, _, _ in parts]
