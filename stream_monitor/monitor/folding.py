"""Folds rows: the mass of each by sentence, which leaves some dozen numbers of it, and that of all head by head."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import Head, HeadShares
from stream_monitor.anchors.matrix import SentenceStarts, SparseMass
from stream_monitor.compiled.folding import fold_rows
from stream_monitor.monitor.request_heads import MAX_HEADS, RequestHeads
from stream_monitor.monitor.rows import Row

NO_KEYS = np.zeros(0, np.uint32)
NO_MASS = np.zeros(0, np.float32)
_NO_PLACES = np.zeros(0, np.uint16)

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
            np.concatenate([NO_KEYS, *(columns for _, columns, _ in ordered)]),
            np.concatenate([NO_MASS, *(mass for _, _, mass in ordered)]),
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


def fold(sentence: Unfolded) -> Fold:
    """Fold the rows of a sentence."""
    rows, heads = sentence.rows, sentence.heads
    keys = np.concatenate([NO_KEYS, *(row.keys for row in rows)])
    # Those that a rank is the first to bring have a place from here on.
    places = np.concatenate([_NO_PLACES, *(_heads_of(row, heads) for row in rows)])
    # Where none tells heads apart all is beyond the last head, which counts for nothing.
    telling = sum(row.by_head and row.heads > 0 for row in rows)
    edges, columns, mass, head_places, head_columns, shares, mean_columns, mean_shares = fold_rows(
        sentence.starts.table,
        sentence.starts.positions,
        keys,
        np.concatenate([NO_MASS, *(row.mass for row in rows)]),
        np.array(edges_of(len(row.keys) for row in rows)),
        places,
        heads.weights(sentence.receivers),
        telling,
    )
    return Fold(
        Folded(rows, edges.tolist(), columns, mass),
        telling,
        HeadShares(head_places, head_columns, shares),
        SparseMass(mean_columns, mean_shares),
    )


def _heads_of(row: Row, heads: RequestHeads) -> NDArray[np.uint16]:
    """Place of the head of each of its entries."""
    if not row.by_head:
        return np.full(len(row.keys), MAX_HEADS, np.uint16)
    if len(row.sources) == 1:
        return heads.of_entries(row.sources[0][0])
    return np.concatenate([_NO_PLACES, *(heads.of_entries(rank) for rank, _ in row.sources)])


def edges_of(sizes: Iterable[int]) -> list[int]:
    """Where parts of these sizes begin, and where the last one ends."""
    return [0, *accumulate(sizes)]
