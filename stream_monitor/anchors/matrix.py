"""From block mass to sentence mass, and the scores read off the sentence matrix.

A block's mass goes whole to the sentence that holds its strongest key: an even spread over the block blurs exactly the
sentences that matter. What the search did not observe is kept beside and never renormalised away.
"""

from array import array
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.compiled.folding import sentences_of

ANCHOR_GAP = 4
"""A sentence's own neighbourhood is no anchor: only sentences at least this much earlier are (thought-anchors' δ)."""
NO_BLOCK = 0xFFFFFFFF
_MOST_TOKENS = 1 << 20
"""Tokens of a request beyond which the sentence of a token is searched, not looked up: a table takes memory."""
_LONG_SENTENCE = 1 << 12
"""The same of a sentence, such as a prompt that is not known to have more than one: a few bytes tell of any length."""
_NO_TABLE = np.zeros(0, np.int32)

Positions = NDArray[np.int64]
Mass = NDArray[np.float64]


class AnchorShare(NamedTuple):
    """A sentence, and its part of the mass on all that may be anchors."""

    sentence: int
    share: float


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
        return float(np.add.reduce(self.shares))

    def heaviest(self) -> AnchorShare | None:
        """The sentence that got most, and its part of all of it; None where none got any."""
        if not len(self.shares) or not (total := self.total):
            return None
        place = int(np.argmax(self.shares))
        return AnchorShare(int(self.columns[place]), float(self.shares[place]) / total)

    def ranked(self, most: int) -> list[AnchorShare]:
        """The sentences that got most, so many at most, heaviest first."""
        total = self.total
        return ranked(self.columns, self.shares, self.shares / total, most) if total > 0 else []

    def before(self, sentence: int) -> "SparseMass":
        """The part on sentences below a number."""
        end = int(self.columns.searchsorted(sentence))
        return SparseMass(self.columns[:end], self.shares[:end])

    def where(self, some: NDArray[np.bool_]) -> "SparseMass":
        """The part on some of the columns, bool [n]."""
        return SparseMass(self.columns[some], self.shares[some])


def ranked(columns: Positions, by: Mass, shares: Mass, most: int) -> list[AnchorShare]:
    """The sentences for which `by` is largest and above 0, so many at most, in that order; the earlier of two equals.

    >>> ranked(np.array([2, 5, 9]), np.array([0.1, 0.0, 0.3]), np.array([0.5, 0.1, 0.4]), most=5)
    [AnchorShare(sentence=9, share=0.4), AnchorShare(sentence=2, share=0.5)]
    """
    order = np.argsort(-by, kind="stable")[:most]
    return [AnchorShare(int(columns[place]), float(shares[place])) for place in order if by[place] > 0]


def forced_block_ids(positions: Positions, block_size: int, sink: int, recent: int) -> NDArray[np.int64]:
    """Ids of the always-kept blocks of rows at `positions` [R], sink first: int64 [R, sink + recent], -1 if absent.

    >>> forced_block_ids(np.array([4095, 39]), 32, 1, 2).tolist()
    [[0, 126, 127], [0, -1, 1]]
    """
    blocks = positions[:, None] // block_size + 1
    first = np.broadcast_to(np.arange(sink), (len(positions), sink))
    last = blocks - recent + np.arange(recent)
    return np.concatenate([np.where(first < blocks, first, -1), np.where(last >= sink, last, -1)], axis=1)


class SentenceStarts:
    """First token of each sentence; and, looked up, the sentence of each token.

    Attributes:
        table: int32 [tokens or more], the sentence of each; nothing where they are searched.

    Examples
    --------
    >>> starts = SentenceStarts()
    >>> for start, end in (0, 8), (8, 16), (16, 50):
    ...     starts.append(start, end)
    >>> starts.of(np.array([3, 9, 40], np.uint32)).tolist()
    [0, 1, 2]
    """

    def __init__(self) -> None:
        self._starts = array("q")
        self.table = np.zeros(256, np.int32)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def nbytes(self) -> int:
        """Of the table of tokens."""
        return self.table.nbytes

    @property
    def positions(self) -> Positions:
        """int64 [sentences]. A copy: what is lent out could not grow."""
        return np.array(self._starts, np.int64)

    def append(self, start: int, end: int) -> None:
        """One more sentence, of the tokens [start, end)."""
        if len(self.table):
            if end > _MOST_TOKENS or end - start > _LONG_SENTENCE:
                self.release()
            else:
                if end > len(self.table):
                    self.table = np.concatenate([self.table, np.zeros(end, np.int32)])
                self.table[start:end] = len(self._starts)
        self._starts.append(start)

    def cut(self, count: int) -> None:
        """Keep so many sentences."""
        del self._starts[count:]

    def release(self) -> None:
        """Give the table of tokens away: sentences are searched from now on."""
        self.table = _NO_TABLE

    def of(self, keys: NDArray[np.uint32]) -> Positions:
        """The sentence of each of these tokens, all of which lie in sentences: int64 [n]."""
        found: Positions = sentences_of(keys, self.table, self.positions)
        return found


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
