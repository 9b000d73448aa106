"""At which distances a model in a loop reads itself; see `anchors/lock.py`."""

import math

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import checked_jit

FAR_KEYS = 8
"""Keys by which a row is described. With one, what a row says of a loop is chance; with 16, most are read by chance."""
LEAST_LAG = 8
"""Nearer keys are read at all times, loop or not."""
MOST_LAG = 1024
"""A loop reads its last rounds; farther keys tell little of it."""
PERIODS = np.arange(3, 513)
"""That are tried, tokens. Of a longer one there are no two rounds within `MOST_LAG`."""
Lags = NDArray[np.uint16]
Parts = NDArray[np.float32]
Sentences = NDArray[np.uint32]

_EQUAL = 1e-6
"""Scores that are no farther apart are equal: what fits a period fits its divisors too."""


@checked_jit()
def newest_rows(
    lags: Lags,
    parts: Parts,
    sentences: Sentences,
    fresh_lags: NDArray[np.int64],
    fresh_mass: NDArray[np.float64],
    sentence: int,
    most: int,
) -> tuple[Lags, Parts, Sentences]:
    """The newest rows, with those of one more sentence that read anything far.

    Args:
        lags, parts: [held, FAR_KEYS], of the rows until now, and what each key counts, 1 in all of a row.
        sentences: [held], whose rows they are.
        fresh_lags, fresh_mass: [rows, FAR_KEYS], of the sentence's, and the attention on each.
        sentence: its number.
        most: rows to keep.

    Returns:
        The same three of all, in order.
    """
    rows, keys = fresh_lags.shape
    totals = np.zeros(rows)
    told = 0
    for row in range(rows):
        for key in range(keys):
            if LEAST_LAG <= fresh_lags[row, key] <= MOST_LAG:
                totals[row] += math.sqrt(fresh_mass[row, key])
        told += totals[row] > 0.0
    held = len(lags)
    count = min(most, held + told)
    all_lags, all_parts = np.zeros((count, keys), np.uint16), np.zeros((count, keys), np.float32)
    all_sentences = np.full(count, sentence, np.uint32)
    # Of the oldest row; those before place 0 go.
    place = count - told - held
    for row in range(held):
        if place >= 0:
            all_sentences[place] = sentences[row]
            for key in range(keys):
                all_lags[place, key], all_parts[place, key] = lags[row, key], parts[row, key]
        place += 1
    for row in range(rows):
        if totals[row] > 0.0:
            for key in range(keys):
                if place >= 0 and LEAST_LAG <= fresh_lags[row, key] <= MOST_LAG:
                    all_lags[place, key] = fresh_lags[row, key]
                    all_parts[place, key] = math.sqrt(fresh_mass[row, key]) / totals[row]
            place += 1
    return all_lags, all_parts, all_sentences


@checked_jit()
def best_period(lags: Lags, parts: Parts, chance: NDArray[np.float64]) -> tuple[float, int]:
    """The score of the best of `PERIODS` for these rows, and the longest one that has it.

    A lag fits a period if it is a multiple of it, or one less. The score is the part that fits, over what so few rows
    may fit by chance.

    Args:
        lags, parts: [rows, FAR_KEYS], of `newest_rows`.
        chance: [periods], part that fits by chance.
    """
    fitting = np.zeros(MOST_LAG + 2)
    for row in range(len(lags)):
        for key in range(lags.shape[1]):
            fitting[lags[row, key]] += parts[row, key]
    # With what lies one before.
    for lag in range(MOST_LAG + 1, 0, -1):
        fitting[lag] += fitting[lag - 1]
    scores = np.empty(len(PERIODS))
    for place in range(len(PERIODS)):
        fits = 0.0
        for lag in range(PERIODS[place], MOST_LAG + 2, PERIODS[place]):
            fits += fitting[lag]
        scores[place] = (fits / len(lags) - chance[place]) / (1.0 - chance[place])
    best = scores.max()
    place = len(PERIODS) - 1
    while scores[place] <= best - _EQUAL:
        place -= 1
    return best, PERIODS[place]
