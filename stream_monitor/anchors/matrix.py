"""From block mass to sentence mass, and the scores read off the sentence matrix.

A block's mass goes whole to the sentence that holds its strongest key: an even spread over the block blurs exactly the
sentences that matter. What the search did not observe is kept beside and never renormalised away.
"""

import numpy as np
from numpy.typing import NDArray

ANCHOR_GAP = 4
"""A sentence's own neighbourhood is no anchor: only sentences at least this much earlier are (thought-anchors' δ)."""
NO_BLOCK = 0xFFFFFFFF

Positions = NDArray[np.int64]
Mass = NDArray[np.float64]


def forced_block_ids(positions: Positions, block_size: int, sink: int, recent: int) -> NDArray[np.int64]:
    """Ids of the always-kept blocks of rows at `positions` [R], sink first: int64 [R, sink + recent], -1 if absent.

    >>> forced_block_ids(np.array([4095, 39]), 32, 1, 2).tolist()
    [[0, 126, 127], [0, -1, 1]]
    """
    blocks = positions[:, None] // block_size + 1
    first = np.broadcast_to(np.arange(sink), (len(positions), sink))
    last = blocks - recent + np.arange(recent)
    return np.concatenate([np.where(first < blocks, first, -1), np.where(last >= sink, last, -1)], axis=1)


def sum_by_key(keys: Positions, mass: Mass) -> tuple[Positions, NDArray[np.float32]]:
    """Join equal keys: keys [n], mass [n] -> ascending distinct keys [m], their summed mass float32 [m]."""
    distinct, inverse = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(inverse, mass, len(distinct)).astype(np.float32)


def fold(
    keys: NDArray[np.uint32], mass: NDArray[np.float32], starts: Positions
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Mass at ascending token positions -> mass in sentences, given each sentence's first position.

    >>> columns, shares = fold(np.array([3, 9, 40], np.uint32), np.float32([0.2, 0.3, 0.5]), np.array([0, 8, 16]))
    >>> columns.tolist(), [round(float(share), 2) for share in shares]
    ([0, 1, 2], [0.2, 0.3, 0.5])
    """
    columns = np.searchsorted(starts, keys, side="right") - 1
    # Keys ascend and so do their sentences: equal ones stand together.
    firsts = np.flatnonzero(np.diff(columns, prepend=-1))
    shares = np.add.reduceat(mass, firsts) if len(firsts) else mass[:0]
    return columns[firsts].astype(np.uint32), shares


def anchor_mass(columns: NDArray[np.uint32], shares: Mass, sentence: int) -> Mass:
    """Mass that `sentence` gave each candidate j <= sentence - ANCHOR_GAP: float64 [candidates], not normalised."""
    size = max(0, sentence - ANCHOR_GAP + 1)
    kept = columns < size
    return np.bincount(columns[kept], shares[kept], size).astype(np.float64)


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
