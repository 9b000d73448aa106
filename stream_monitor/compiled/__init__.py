"""The loops that a monitor spends its time in, compiled (numba): each is called with the few numbers of one sentence or
of one message's rows, for which numpy takes longer to find out what to do than to do it.

This folder imports nothing of ours from outside, see `stream_kernels/compiling.py`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_monitor.compiled.decoding import decode_rows, heaviest_far_keys
from stream_monitor.compiled.divergence import compare, jensen_shannon, side_by_side
from stream_monitor.compiled.folding import fold_rows, sentences_of
from stream_monitor.compiled.matrices import sum_from_afar, sum_sentences
from stream_monitor.compiled.periods import FAR_KEYS, PERIODS, best_period, newest_rows


def prepare() -> None:
    """Have all of them compiled, or read from the disk, for the types that they are called with: seconds in which
    nothing else is done, so that it is not a request that waits for them."""
    number, whole = np.zeros(1, np.int64), np.ones(1)
    # Of one row with a head, and of that a kept and a forced block.
    keys, mass = np.zeros((1, 2), np.uint32), np.zeros((1, 2), np.float32)
    ids, offsets, logs = np.zeros((1, 1, 1), np.uint32), _lent((1, 1, 1), np.uint8), _lent((1, 1, 1), np.uint16)
    forced, rest, shares = np.zeros((1, 1), np.int64), _lent((1, 1), np.uint16), np.ones(1 << 16, np.float32)
    decode_rows(number, 1, ids, offsets, logs, forced, offsets, logs, rest, rest, shares, 1.0, keys, mass, whole)
    heaviest_far_keys(keys, mass, number, keys.copy(), mass.copy())
    table = np.zeros(1, np.int32)
    sentences_of(keys[0], table, number)
    entries, edges = (keys[0], mass[0]), np.array([0, 2])
    fold_rows(table, number, *entries, edges, np.zeros(2, np.uint16), whole, 1)
    sum_sentences(number, edges, keys[0], np.zeros(2), 1)
    sum_from_afar(number, edges, np.zeros(2, np.uint8), *entries, 4, np.zeros((1, 1)))
    columns, both = side_by_side(number, whole, number, whole)
    compare(columns, both, 1)
    jensen_shannon(whole, whole)
    none = np.zeros((0, FAR_KEYS), np.uint16), np.zeros((0, FAR_KEYS), np.float32), np.zeros(0, np.uint32)
    lags, parts, _ = newest_rows(*none, np.full((1, FAR_KEYS), 10), np.ones((1, FAR_KEYS)), 1, 1)
    best_period(lags, parts, np.zeros(len(PERIODS)))


def _lent(shape: tuple[int, ...], kind: type) -> NDArray[Any]:
    """Zeros that cannot be written, like what is read from a message: another type to numba."""
    zeros: NDArray[Any] = np.zeros(shape, kind)
    zeros.flags.writeable = False
    return zeros
