"""The k best of many scores, against a stable sort of numpy's."""

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.selection import least_of_best, sort_key, tie_of


@numba.njit  # Compiled code alone can call it.
def best(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether each score is among the k best, and the tie of each key."""
    keys, ties = np.empty(len(scores), np.int64), np.empty(len(scores), np.int64)
    for i in range(len(scores)):
        keys[i] = sort_key(scores[i], i)
        ties[i] = tie_of(keys[i])
    return keys >= least_of_best(keys, len(scores), k), ties


@pytest.mark.parametrize("count", [1, 2, 3, 100, 1280])
@pytest.mark.parametrize("kind", ["drawn", "few values", "all equal", "none", "huge"])
def test_the_best_are_those_of_a_stable_sort(count: int, kind: str) -> None:
    draw = np.random.default_rng(count)
    scores = {
        "drawn": draw.normal(size=count),
        "few values": draw.integers(0, 3, count),
        "all equal": np.full(count, -2.5),
        "none": np.where(draw.random(count) < 0.5, -np.inf, np.nan),
        "huge": draw.choice([3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0, np.inf], count),
    }[kind].astype(np.float32)
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf), kind="stable")
    for k in {1, (count + 1) // 2, count}:
        chosen, ties = best(scores, k)
        np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(order[:k]))
        np.testing.assert_array_equal(ties, np.arange(count))
