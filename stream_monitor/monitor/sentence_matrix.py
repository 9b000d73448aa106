"""The sentence matrix of a request, and what else the rows captured in a sentence say."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import Mass
from stream_monitor.compiled.matrices import sum_sentences
from stream_monitor.compiled.periods import FAR_KEYS
from stream_monitor.monitor.folding import NO_KEYS, NO_MASS, Folded, edges_of
from stream_monitor.monitor.rows import FAR_KEY, Row


class Captured(NamedTuple):
    """Of the rows captured in one sentence, those of ranks without watched heads left out.

    Attributes:
        rows: how many.
        unobserved: mean share the search did not observe; NaN without rows.
        lags: int64 [rows, FAR_KEYS], tokens from each row back to the far keys it reads most, and lag_mass: float64
            [rows, FAR_KEYS], attention on each, summed over heads; see `Row`.
    """

    rows: int
    unobserved: float
    lags: NDArray[np.int64]
    lag_mass: Mass

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Captured":
        """Of all rows of one sentence, by position."""
        counted = [row for row in rows if row.heads]
        if not counted:
            return _NOTHING
        far = np.frombuffer(b"".join(row.far_keys for row in counted), FAR_KEY).reshape(len(counted), FAR_KEYS)
        return cls(
            len(counted),
            sum(row.unobserved / row.heads for row in counted) / len(counted),
            far["lag"].astype(np.int64),
            far["mass"].astype(float),
        )


_NOTHING = Captured(0, float("nan"), np.zeros((0, FAR_KEYS), np.int64), np.zeros((0, FAR_KEYS)))


class SentenceMatrix(NamedTuple):
    """Each row of the matrix is the mean over heads of each row captured in a sentence, then over these rows.

    Attributes:
        rows, columns: uint32 [n], sentences that read and that are read, in order. shares: float64 [n].
        captured: int64 [sentences], rows of each.
        unobserved: float64 [sentences], mean share the search did not observe; NaN without rows.
    """

    rows: NDArray[np.uint32]
    columns: NDArray[np.uint32]
    shares: Mass
    captured: NDArray[np.int64]
    unobserved: Mass

    @classmethod
    def of(cls, sentences: Sequence[Folded]) -> "SentenceMatrix":
        """Of these sentences, the first of which is number 0."""
        rows = [row for each in sentences for row in each.rows]
        of_row = np.repeat(np.arange(len(sentences)), [len(each.rows) for each in sentences])
        heads = np.array([row.heads for row in rows], np.int64)
        captured = np.bincount(of_row, heads > 0, len(sentences)).astype(np.int64)
        # Of ranks without watched heads there is nothing to average.
        divisors = np.maximum(heads, 1).astype(float)
        unobserved = np.full(len(sentences), np.nan)
        total = np.bincount(of_row, np.array([row.unobserved for row in rows]) / divisors, len(sentences))
        np.divide(total, captured, out=unobserved, where=captured > 0)

        columns = np.concatenate([NO_KEYS, *(each.columns for each in sentences)])
        entries = [high - low for each in sentences for low, high in pairwise(each.edges)]
        read_by, read, sums = sum_sentences(
            np.arange(len(sentences)),
            np.array(edges_of(len(each.columns) for each in sentences)),
            columns,
            np.concatenate([NO_MASS, *(each.mass for each in sentences)]) / np.repeat(divisors, entries),
            int(columns.max(initial=0)) + 1,
        )
        return cls(read_by, read, sums / captured[read_by], captured, unobserved)
