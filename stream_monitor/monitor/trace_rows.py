"""The rows of one request: they wait with their token positions until their sentence is scored, then are folded."""

import numpy as np

from stream_monitor.anchors.heads import Head
from stream_monitor.anchors.matrix import SentenceStarts
from stream_monitor.anchors.sentences import Span
from stream_monitor.monitor.folding import NO_KEYS, NO_MASS, Folded, Part, Unfolded, fold
from stream_monitor.monitor.request_heads import RequestHeads
from stream_monitor.monitor.rows import Row, discard
from stream_monitor.monitor.sentence_matrix import SentenceMatrix

_ROW_BYTES = 610
"""Size of a row's Python objects, by tracemalloc on 64-bit CPython 3.11, for the memory bound."""
_NOTHING = Folded([], [0], NO_KEYS, NO_MASS)


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
        self._folded: dict[int, Folded] = {}

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

    def unfolded(self, span: Span, receivers: tuple[Head, ...] = ()) -> Unfolded:
        """The rows that wait in a sentence, to be folded; see `Unfolded`."""
        rows = [self._waiting[at] for at in sorted(at for at in self._waiting if span.start <= at < span.end)]
        return Unfolded(rows, self._starts, self._heads, receivers)

    def keep(self, index: int, folded: Folded) -> Folded:
        """Keep rows of a sentence folded, which wait no longer; all of it that is folded."""
        if folded.rows:
            self._put(index, folded)
        return self._folded.get(index, _NOTHING)

    def fold_late(self, end: int, but: int) -> None:
        """Fold the rows before a position, whose sentences were scored before, or are the prompt's; the one at `but`
        is still to be scored."""
        late = self._waiting_before(end, but)
        for index, sentence in late.items():
            self._put(index, fold(sentence).folded)

    def matrix(self, spans: list[Span]) -> SentenceMatrix:
        """The matrix of the sentences, which are these, folded or not."""
        waiting = self._waiting_before(spans[-1].end if spans else 0)
        folded = self._folded.copy()
        for index, sentence in waiting.items():
            held = folded.get(index, _NOTHING)
            folded[index] = Folded.of_parts([*held.parts(), *fold(sentence).folded.parts()])
        return SentenceMatrix.of([folded.get(index, _NOTHING) for index in range(len(spans))])

    def pop(self, position: int) -> Row:
        """Take a row out. Of one that is folded, the first token of each sentence stands for its mass, and the others
        of its sentence wait to be folded anew: so many may be taken out at no more cost than one."""
        row = self._rows.pop(position)
        self.token_rows -= row.token
        if self._waiting.pop(position, None) is None:
            unfolded = self._unfold(self._drop(self._sentence(position)))
            self._waiting.update((other.position, other) for other in unfolded if other is not row)
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

    def _waiting_before(self, end: int, but: int = -1) -> dict[int, Unfolded]:
        """The rows that wait before a position, but for one at `but`, by the number of their sentence."""
        found: dict[int, Unfolded] = {}
        for at in sorted(at for at in self._waiting if at < end and at != but):
            index = self._sentence(at)
            found.setdefault(index, Unfolded([], self._starts, self._heads)).rows.append(self._waiting[at])
        return found

    def _put(self, index: int, folded: Folded) -> None:
        """Keep rows folded, which wait no longer."""
        for row in folded.rows:
            if self._waiting.pop(row.position, None) is not None:
                self.bytes -= row.nbytes
                row.keys, row.mass, row.by_head = NO_KEYS, NO_MASS, False
        if index in self._folded:
            folded = Folded.of_parts([*self._drop(index), *folded.parts()])
        self._folded[index] = folded
        self.bytes += folded.columns.nbytes + folded.mass.nbytes

    def _drop(self, index: int) -> list[Part]:
        """Take out what is folded of a sentence."""
        folded = self._folded.pop(index)
        self.bytes -= folded.columns.nbytes + folded.mass.nbytes
        return folded.parts()

    def _unfold(self, parts: list[Part]) -> list[Row]:
        for row, columns, mass in parts:
            row.keys, row.mass = self._starts.positions[columns].astype(np.uint32), mass
            self.bytes += row.nbytes
        return [row for row, _, _ in parts]
