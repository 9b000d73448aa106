"""From block mass to sentence mass, and the scores read off the sentence matrix.

A block's mass goes whole to the sentence that holds its strongest key: an even spread over the block blurs exactly the
sentences that matter. What the search did not observe is kept beside and never renormalised away.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ANCHOR_GAP = 4
"""A sentence's own neighbourhood is no anchor: only sentences at least this much earlier are (thought-anchors' δ)."""
NO_BLOCK = 0xFFFFFFFF
_NO_KEY = 1 << 31
"""Above every token position, and low enough to be shifted by the bits of a place in a row."""

Positions = NDArray[np.int64]
Mass = NDArray[np.float64]


class SparseMass(NamedTuple):
    """Mass of one sentence on others: what it costs to look at does not grow with the output.

    Attributes:
        columns: int64 [n], the sentences that got any, ascending.
        shares: float64 [n].
    """

    columns: Positions
    shares: Mass

    @classmethod
    def of(cls, dense: Mass) -> "SparseMass":
        """Of float64 [sentences]."""
        columns = np.flatnonzero(dense)
        return cls(columns, dense[columns])

    @property
    def total(self) -> float:
        """All of it."""
        return float(self.shares.sum())

    def heaviest(self) -> tuple[int, float] | None:
        """The sentence that got most, and its part of all of it; None where none got any."""
        if not len(self.shares) or not (total := self.total):
            return None
        place = int(np.argmax(self.shares))
        return int(self.columns[place]), float(self.shares[place]) / total

    def before(self, sentence: int) -> "SparseMass":
        """The part on sentences below a number."""
        end = int(np.searchsorted(self.columns, sentence))
        return SparseMass(self.columns[:end], self.shares[:end])

    def where(self, some: NDArray[np.bool_]) -> "SparseMass":
        """The part on some of the columns, bool [n]."""
        return SparseMass(self.columns[some], self.shares[some])


def forced_block_ids(positions: Positions, block_size: int, sink: int, recent: int) -> NDArray[np.int64]:
    """Ids of the always-kept blocks of rows at `positions` [R], sink first: int64 [R, sink + recent], -1 if absent.

    >>> forced_block_ids(np.array([4095, 39]), 32, 1, 2).tolist()
    [[0, 126, 127], [0, -1, 1]]
    """
    blocks = positions[:, None] // block_size + 1
    first = np.broadcast_to(np.arange(sink), (len(positions), sink))
    last = blocks - recent + np.arange(recent)
    return np.concatenate([np.where(first < blocks, first, -1), np.where(last >= sink, last, -1)], axis=1)


class Joined(NamedTuple):
    """Rows whose equal keys are joined.

    Attributes:
        keys: int64 [m], the distinct keys of each row, ascending, one row after the other.
        mass: float32 [m], their summed mass.
        edges: int64 [rows + 1], where each row begins, and the end of the last.
        places: int64 [used entries], in the order of the entries: each one's place among its row's distinct keys.
    """

    keys: Positions
    mass: NDArray[np.float32]
    edges: Positions
    places: Positions


def sum_by_key(keys: Positions, mass: Mass, used: NDArray[np.bool_]) -> Joined:
    """Join equal keys of each row: keys, mass and whether an entry counts at all, [rows, n] each.

    >>> joined = sum_by_key(np.array([[7, 3, 7]]), np.array([[0.2, 0.3, 0.5]]), np.ones((1, 3), bool))
    >>> joined.keys.tolist(), [round(float(mass), 2) for mass in joined.mass], joined.places.tolist()
    ([3, 7], [0.3, 0.7], [1, 0, 1])
    """
    bits = keys.shape[1].bit_length()
    # Each key carries its place in its low bits: numbers are sorted faster than indices, and rows faster than all at
    # once. What does not count goes last.
    packed = np.sort(np.where(used, keys, _NO_KEY) << bits | np.arange(keys.shape[1]), axis=1)
    ordered = packed >> bits
    first = ordered != _NO_KEY
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    places = np.empty_like(keys)
    np.put_along_axis(places, packed & ((1 << bits) - 1), np.cumsum(first, axis=1) - 1, axis=1)
    edges = np.concatenate([[0], np.cumsum(first.sum(axis=1))])
    summed = np.bincount((places + edges[:-1, None])[used], mass[used], edges[-1])
    return Joined(ordered[first], summed.astype(np.float32), edges, places[used])


def sentences_of(keys: NDArray[np.uint32], starts: Positions) -> Positions:
    """The sentence of each token position, given each sentence's first position.

    >>> sentences_of(np.array([3, 9, 40], np.uint32), np.array([0, 8, 16])).tolist()
    [0, 1, 2]
    """
    return np.searchsorted(starts, keys, side="right") - 1


def fold(
    columns: Positions, mass: NDArray[np.float32], edges: Positions
) -> tuple[NDArray[np.uint32], NDArray[np.float32], Positions]:
    """Join equal sentences of each row: ascending numbers [n], mass [n] -> distinct ones, summed mass, new edges.

    Args:
        columns, mass: of all rows, one after the other.
        edges: where each row begins, and the end of the last.

    >>> columns, shares, edges = fold(np.array([0, 1, 1, 1]), np.float32([0.2, 0.3, 0.5, 1.0]), np.array([0, 3, 4]))
    >>> columns.tolist(), [round(float(share), 2) for share in shares], edges.tolist()
    ([0, 1, 1], [0.2, 0.8, 1.0], [0, 2, 3])
    """
    if not len(columns):
        return columns.astype(np.uint32), mass, edges
    first = np.ones(len(columns), bool)
    np.not_equal(columns[1:], columns[:-1], out=first[1:])
    first[edges[edges < len(columns)]] = True
    firsts = first.nonzero()[0]
    return columns[firsts].astype(np.uint32), np.add.reduceat(mass, firsts), np.searchsorted(firsts, edges)


def vertical_scores(
    rows: NDArray[np.uint32], columns: NDArray[np.uint32], shares: Mass, observed: NDArray[np.bool_]
) -> Mass:
    """v[j] = mean over observed sentences i >= j + ANCHOR_GAP of share[i, j]; NaN without such.

    Args:
        rows, columns, shares: the matrix in coordinate form, [n] each.
        observed: bool [sentences], whether any row of the sentence was captured. Absent entries of observed rows are 0.
    """
    size = len(observed)
    far = rows.astype(np.int64) - columns >= ANCHOR_GAP
    total = np.bincount(columns[far], shares[far], size)
    later = np.cumsum(observed[::-1])[::-1]
    count = np.zeros(size)
    count[: max(0, size - ANCHOR_GAP)] = later[ANCHOR_GAP:]
    scores = np.full(size, np.nan)
    np.divide(total, count, out=scores, where=count > 0)
    return scores


def proximity_corrected(
    rows: NDArray[np.uint32], columns: NDArray[np.uint32], shares: Mass, observed: NDArray[np.bool_]
) -> Mass:
    """What each sentence got from observed sentences `ANCHOR_GAP` or more later, over what it would have got if only
    the distance counted: near sentences are read more, whatever they say. NaN without such sentences.

    What a distance gets is taken from the same matrix: the mean share of all pairs whose distance is as large, to a
    factor of two.

    Args:
        rows, columns, shares, observed: see `vertical_scores`.
    """
    size = len(observed)
    distance = rows.astype(np.int64) - columns
    far = distance >= ANCHOR_GAP
    got = np.bincount(columns[far], shares[far], size)
    before = np.concatenate([[0], np.cumsum(observed)])
    edges = [ANCHOR_GAP]
    while edges[-1] < size:
        edges.append(2 * edges[-1])
    expected = np.zeros(size)
    places = np.arange(size)
    for low, high in pairwise(edges):
        # Observed sentences that look at each from such a distance.
        lookers = before[np.minimum(places + high, size)] - before[np.minimum(places + low, size)]
        here = far & (distance >= low) & (distance < high)
        if pairs := lookers.sum():
            expected += lookers * (shares[here].sum() / pairs)
    scores = np.full(size, np.nan)
    np.divide(got, expected, out=scores, where=expected > 0)
    return scores
