"""Sentence matrices, in coordinate form, from what each sentence reads."""

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import checked_jit

Numbers = NDArray[np.uint32]
Places = NDArray[np.int64]
Shares = NDArray[np.float32]
Mass = NDArray[np.float64]


@checked_jit()
def sum_rows(
    columns: Numbers, mass: Shares, edges: Places, divisors: Mass, sentences: Places, size: int
) -> tuple[Numbers, Numbers, Mass]:
    """Sum the rows of each sentence, each divided by a number.

    Args:
        columns, mass: [n], row after row.
        edges: [rows + 1], of each row in these.
        divisors: [rows].
        sentences: [sentences + 1], where each sentence's rows begin among all, and their end.
        size: all columns are below it.

    Returns:
        Sentence, column and sum of each cell that has one, ascending.
    """
    found_rows, found_columns = np.empty(len(columns), np.uint32), np.empty(len(columns), np.uint32)
    found_sums, sums = np.empty(len(columns)), np.zeros(size)
    count = 0
    for sentence in range(len(sentences) - 1):
        end = 0
        for row in range(sentences[sentence], sentences[sentence + 1]):
            for entry in range(edges[row], edges[row + 1]):
                sums[columns[entry]] += mass[entry] / divisors[row]
                end = max(end, int(columns[entry]) + 1)
        for column in range(end):
            if sums[column] != 0.0:
                found_rows[count], found_columns[count], found_sums[count] = sentence, column, sums[column]
                sums[column] = 0.0
                count += 1
    return found_rows[:count].copy(), found_columns[:count].copy(), found_sums[:count].copy()


@checked_jit()
def sum_heads(
    numbers: Places, edges: Places, heads: NDArray[np.uint8], columns: Numbers, shares: Shares, weights: Mass, size: int
) -> tuple[Numbers, Numbers, Mass]:
    """Sum the heads of each sentence, weighted.

    Args:
        numbers: [sentences], of each.
        edges: [sentences + 1], of each in the next three.
        heads, columns, shares: [n], see `HeadShares`.
        weights: [heads].
        size: all columns are below it.

    Returns:
        As `sum_rows`.
    """
    found_rows, found_columns = np.empty(len(columns), np.uint32), np.empty(len(columns), np.uint32)
    found_sums, sums = np.empty(len(columns)), np.zeros(size)
    count = 0
    for sentence in range(len(numbers)):
        for entry in range(edges[sentence], edges[sentence + 1]):
            sums[columns[entry]] += shares[entry] * weights[heads[entry]]
        for column in range(size):
            if sums[column] != 0.0:
                found_rows[count], found_columns[count], found_sums[count] = numbers[sentence], column, sums[column]
                sums[column] = 0.0
                count += 1
    return found_rows[:count].copy(), found_columns[:count].copy(), found_sums[:count].copy()


@checked_jit()
def sum_from_afar(
    numbers: Places, edges: Places, heads: NDArray[np.uint8], columns: Numbers, shares: Shares, gap: int, totals: Mass
) -> None:
    """Add up what each sentence gets of each head's attention from sentences at least `gap` later.

    Args:
        numbers, edges, heads, columns, shares: as of `sum_heads`.
        totals: [heads, sentences], added to.
    """
    for sentence in range(len(numbers)):
        for entry in range(edges[sentence], edges[sentence + 1]):
            if columns[entry] + gap <= numbers[sentence]:
                totals[heads[entry], columns[entry]] += shares[entry]
