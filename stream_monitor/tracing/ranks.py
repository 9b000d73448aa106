"""Rank correlation (Spearman's), also given other ranks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64] | NDArray[np.int64]


def rank_correlation(one: Values, other: Values, given: Sequence[Values] = ()) -> float:
    """Of two series [N]; what their ranks owe to the ranks of the series `given` is taken from them first.

    NaN where nothing is left of one.
    """
    ranks = [_ranks(values) for values in (one, other)]
    known = np.stack([np.ones(len(one)), *map(_ranks, given)], axis=1)
    left, right = (own - known @ np.linalg.lstsq(known, own, rcond=None)[0] for own in ranks)
    scale = float(np.sqrt((left**2).sum() * (right**2).sum()))
    # A series that says nothing else leaves rounding errors, whose correlation means nothing.
    return float(left @ right) / scale if scale > 1e-9 * len(one) else float("nan")


def _ranks(values: Values) -> NDArray[np.float64]:
    """From 0 up; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[inverse])
