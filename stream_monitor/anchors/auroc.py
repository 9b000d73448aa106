"""How well a score tells two groups."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def auroc(positive: Sequence[float] | Scores, negative: Sequence[float] | Scores) -> float:
    """Area under the ROC curve: the probability that a positive's score is the higher one, ties half.

    >>> auroc([1.0, 2.0], [0.0, 1.0])
    0.875
    """
    one, other = np.asarray(positive)[:, None], np.asarray(negative)
    return float((one > other).mean() + 0.5 * (one == other).mean())
