"""Sentence matrices, in coordinate form, from what each sentence reads."""

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import checked_jit

Numbers = NDArray[np.uint32]
Places = NDArray[np.int64]
Shares = NDArray[np.float32]
Mass = NDArray[np.float64]


@checked_jit()
def sum_sentences(
    numbers: Places, edges: Places, columns: Numbers, mass: Mass, size: int
) -> tuple[Numbers, Numbers, Mass]:
    """Sum what each sentence reads.

    Args:
        numbers: [sentences], of each.
        edges: [sentences + 1], of each in the next two.
        columns, mass: [n], the sentences read, and what is read of each.
        size: all columns are below it.

    Returns:
        Sentence, column and sum of each cell that has one, ascending.
    """
    found_rows, found_columns = np.empty(len(columns), np.uint32), np.empty(len(columns), np.uint32)
    found_sums, sums = np.empty(len(columns)), np.zeros(size)
    count = 0
    for sentence in range(len(numbers)):
        for entry in range(edges[sentence], edges[sentence + 1]):
            sums[columns[entry]] += mass[entry]
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
        numbers, edges: as of `sum_sentences`.
        heads, columns, shares: [n], see `HeadShares`.
        totals: [heads, sentences], added to.
    """
    for sentence in range(len(numbers)):
        for entry in range(edges[sentence], edges[sentence + 1]):
            if columns[entry] + gap <= numbers[sentence]:
                totals[heads[entry], columns[entry]] += shares[entry]
