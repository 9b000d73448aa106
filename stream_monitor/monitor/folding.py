"""Folds rows: sums the mass of each by sentence, which leaves some dozen numbers of it, and that of all head by head.

Many sentences at once, of whatever requests: numpy spends as much on finding out what to do as on doing it for the few
rows of one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import Head, HeadShares
from stream_monitor.anchors.matrix import Positions, SentenceStarts, SparseMass, distinct
from stream_monitor.monitor.request_heads import MAX_HEADS, RequestHeads
from stream_monitor.monitor.rows import Row

_MOST_ENTRIES = 1 << 15
"""Of rows that are folded at once, about, so that their tables stay in the processor's caches."""
_NO_KEYS = np.zeros(0, np.uint32)
_NO_MASS = np.zeros(0, np.float32)
_NO_PLACES = np.zeros(0, np.int64)
_NO_WEIGHT = np.zeros(1)

_Some = TypeVar("_Some")

Part = tuple[Row, NDArray[np.uint32], NDArray[np.float32]]
"""A row, the sentences that it reads, and the mass on each."""


@dataclass(slots=True)
class Folded:
    """Rows of one sentence, by position, and what they give to each sentence.

    They are not summed into their sentence, so that a row recomputed after preemption can replace the one it repeats.

    Attributes:
        edges: of each row in the two below, and their end.
        columns: uint32 [n], ascending within a row. mass: float32 [n], summed over the row's heads.
    """

    rows: list[Row]
    edges: list[int]
    columns: NDArray[np.uint32]
    mass: NDArray[np.float32]

    def parts(self) -> list[Part]:
        """Each row with its columns and mass."""
        return [
            (row, self.columns[low:high], self.mass[low:high])
            for row, (low, high) in zip(self.rows, pairwise(self.edges), strict=True)
        ]

    @classmethod
    def of_parts(cls, parts: Iterable[Part]) -> "Folded":
        """The opposite of `parts`; in any order."""
        ordered = sorted(parts, key=lambda part: part[0].position)
        return cls(
            [row for row, _, _ in ordered],
            edges_of(len(columns) for _, columns, _ in ordered),
            np.concatenate([_NO_KEYS, *(columns for _, columns, _ in ordered)]),
            np.concatenate([_NO_MASS, *(mass for _, _, mass in ordered)]),
        )


class Unfolded(NamedTuple):
    """Rows of one sentence, by position.

    Attributes:
        starts, heads: of its request.
        receivers: the heads that count, see `RequestHeads.weights`.
    """

    rows: list[Row]
    starts: SentenceStarts
    heads: RequestHeads
    receivers: tuple[Head, ...] = ()


class Fold(NamedTuple):
    """What the rows of one sentence say.

    Attributes:
        folded: row by row.
        telling: rows whose heads are told apart.
        shares: of those head by head.
        mass: the mean of `shares` over the heads that count.
    """

    folded: Folded
    telling: int
    shares: HeadShares
    mass: SparseMass


def fold(sentences: Iterable[Unfolded]) -> list[Fold]:
    """Fold the rows of each of these sentences."""
    return [found for batch in batches(sentences, _entries) for found in _fold(batch)]


def _entries(sentence: Unfolded) -> int:
    return sum(len(row.keys) for row in sentence.rows)


class _Sums(NamedTuple):
    """Mass by group and by sentence read, where there is any.

    Attributes:
        edges: int64 [groups + 1], of each group in the two below.
        columns: int64 [n], of the sentences read that all groups share. mass: float64 [n].
    """

    edges: Positions
    columns: Positions
    mass: NDArray[np.float64]


class _Table:
    """Groups of entries (rows, or heads) of several sentences, each with a cell for whatever its sentence reads.

    Args:
        firsts: int64 [sentences + 1], where what each sentence reads begins among all that is read.
        groups: of each sentence.

    Attributes:
        of_sentence: where its groups begin.
        shifts: int64 [groups], from the place of what is read to its cell.
    """

    def __init__(self, firsts: Positions, groups: list[int]) -> None:
        owners = np.repeat(np.arange(len(groups)), groups)
        self.of_sentence = edges_of(groups)
        self._begins = np.concatenate([[0], np.cumsum(np.diff(firsts)[owners])])
        self.shifts = self._begins[:-1] - firsts[owners]

    def sums(self, cells: Positions, mass: NDArray[np.float32]) -> _Sums:
        """Of entries in these cells."""
        dense = np.bincount(cells, mass, self._begins[-1]).astype(np.float64, copy=False)
        # Of booleans, which takes a fourth of the time.
        used = (dense != 0).nonzero()[0]
        edges = used.searchsorted(self._begins)
        return _Sums(edges, used - np.repeat(self.shifts, np.diff(edges)), dense[used])


def _fold(sentences: list[Unfolded]) -> Iterator[Fold]:
    rows = [row for each in sentences for row in each.rows]
    keys = np.concatenate([_NO_KEYS, *(row.keys for row in rows)])
    mass = np.concatenate([_NO_MASS, *(row.mass for row in rows)])
    # What may be read is numbered through: the sentences of the first one's request, then those of the second one's.
    columns, begins = np.empty(len(keys), np.int64), edges_of(len(each.starts) for each in sentences)
    for each, begin, (low, high) in zip(sentences, begins, pairwise(edges_of(map(_entries, sentences))), strict=False):
        np.add(each.starts.of(keys[low:high]), begin, out=columns[low:high])
    found, places = distinct(columns)
    firsts = found.searchsorted(begins)
    read = (found - np.repeat(begins[:-1], np.diff(firsts))).astype(np.uint32)

    of_row = _Table(firsts, [len(each.rows) for each in sentences])
    by_row = of_row.sums(places + np.repeat(of_row.shifts, [len(row.keys) for row in rows]), mass)
    row_columns, row_mass = read[by_row.columns], by_row.mass.astype(np.float32)

    heads, counts, weights = [], [], []
    for each in sentences:
        heads.append([_heads_of(row, each.heads) for row in each.rows])
        # The last is for heads that are not told apart.
        counts.append(len(each.heads.heads) + 1)
        weights += [each.heads.weights(each.receivers), _NO_WEIGHT]
    of_head = _Table(firsts, counts)
    # What lies on the context's first token, the attention sink, counts for no sentence.
    by_head = of_head.sums(places + _shifts(of_head, heads), mass * (keys != 0))
    entries = np.diff(by_head.edges)
    telling = [sum(row.by_head and row.heads > 0 for row in each.rows) for each in sentences]
    # Where none tells heads apart all lies on the last head of each, which counts for nothing.
    divisors = np.repeat(np.maximum(telling, 1), counts)
    shares = (by_head.mass / np.repeat(divisors, entries)).astype(np.float32)
    head_columns = read[by_head.columns]
    head_places = np.repeat(np.concatenate([np.arange(count) for count in counts]).astype(np.uint8), entries)

    mean = np.bincount(by_head.columns, shares * np.repeat(np.concatenate(weights), entries), len(found)).astype(
        float, copy=False
    )
    used = mean.nonzero()[0]
    mean_edges, mean_columns, mean_shares = used.searchsorted(firsts), read[used].astype(np.int64), mean[used]

    for place, each in enumerate(sentences):
        edges = by_row.edges[of_row.of_sentence[place] : of_row.of_sentence[place + 1] + 1]
        of_rows = slice(edges[0], edges[-1])
        first, last = of_head.of_sentence[place], of_head.of_sentence[place + 1] - 1
        of_heads = slice(by_head.edges[first], by_head.edges[last])
        of_mean = slice(mean_edges[place], mean_edges[place + 1])
        # Copies: a view would keep the arrays of all sentences for as long as one of them is kept.
        yield Fold(
            Folded(each.rows, (edges - edges[0]).tolist(), row_columns[of_rows].copy(), row_mass[of_rows].copy()),
            telling[place],
            HeadShares(head_places[of_heads].copy(), head_columns[of_heads].copy(), shares[of_heads].copy()),
            SparseMass(mean_columns[of_mean].copy(), mean_shares[of_mean].copy()),
        )


def _heads_of(row: Row, heads: RequestHeads) -> NDArray[np.int64]:
    """Place of the head of each of its entries."""
    if not row.by_head:
        return np.full(len(row.keys), MAX_HEADS)
    if len(row.sources) == 1:
        return heads.of_entries(row.sources[0][0])
    return np.concatenate([_NO_PLACES, *(heads.of_entries(rank) for rank, _ in row.sources)])


def _shifts(table: _Table, heads: list[list[NDArray[np.int64]]]) -> Positions:
    """From the place of what each entry reads to its cell; `heads` of the rows of each sentence."""
    found = [_NO_PLACES]
    for places, (first, end) in zip(heads, pairwise(table.of_sentence), strict=True):
        shifts = table.shifts[first:end]
        # Rows of one rank share the array.
        apart = {id(of_row): of_row for of_row in places}
        shifted = {key: shifts[np.minimum(of_row, end - first - 1)] for key, of_row in apart.items()}
        found += [shifted[id(of_row)] for of_row in places]
    return np.concatenate(found)


def batches(sentences: Iterable[_Some], size: Callable[[_Some], int]) -> Iterator[list[_Some]]:
    """The same in parts of about `_MOST_ENTRIES`, or of one sentence."""
    batch: list[_Some] = []
    entries = 0
    for each in sentences:
        entries += size(each)
        if batch and entries > _MOST_ENTRIES:
            yield batch
            batch, entries = [], size(each)
        batch.append(each)
    if batch:
        yield batch


def edges_of(sizes: Iterable[int]) -> list[int]:
    """Where parts of these sizes begin, and where the last one ends."""
    return [0, *accumulate(sizes)]
