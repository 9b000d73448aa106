"""Two sparse distributions over sentences, compared."""

import math

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import checked_jit

Columns = NDArray[np.int64]
Shares = NDArray[np.float64]

_LEAST = 1e-300
"""Halved, a smaller share may be 0, and it adds nothing."""


@checked_jit()
def side_by_side(
    one_columns: Columns, one_shares: Shares, other_columns: Columns, other_shares: Shares
) -> tuple[Columns, Shares]:
    """All columns of both [n], ascending as theirs are, and the shares of each there [2, n]."""
    ones, others = len(one_columns), len(other_columns)
    columns, shares = np.empty(ones + others, np.int64), np.zeros((2, ones + others))
    one = other = count = 0
    while one < ones or other < others:
        first = one < ones and (other == others or one_columns[one] <= other_columns[other])
        second = other < others and (one == ones or other_columns[other] <= one_columns[one])
        columns[count] = one_columns[one] if first else other_columns[other]
        if first:
            shares[0, count] = one_shares[one]
            one += 1
        if second:
            shares[1, count] = other_shares[other]
            other += 1
        # What has no share in either is no column of theirs.
        if shares[0, count] + shares[1, count] != 0.0:
            count += 1
    return columns[:count].copy(), shares[:, :count].copy()


@checked_jit()
def jensen_shannon(p: Shares, q: Shares) -> float:
    """Jensen-Shannon divergence of two distributions [n] over the same support, in bits: 0 if equal, 1 if disjoint."""
    bits = 0.0
    for place in range(len(p)):
        middle = (p[place] + q[place]) / 2
        if p[place] > _LEAST:
            bits += p[place] * math.log2(p[place] / middle)
        if q[place] > _LEAST:
            bits += q[place] * math.log2(q[place] / middle)
    return max(0.0, bits / 2)


@checked_jit()
def compare(columns: Columns, both: Shares, end: int) -> tuple[float, float, float]:
    """What each of two `side_by_side` holds on the columns below `end`, and the divergence of both there, each made to
    sum to 1, which means nothing where one of them holds nothing."""
    known = 0
    one = other = 0.0
    while known < len(columns) and columns[known] < end:
        one += both[0, known]
        other += both[1, known]
        known += 1
    return one, other, jensen_shannon(both[1, :known] / other, both[0, :known] / one)
