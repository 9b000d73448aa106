"""One row of the sentence matrix."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class SentenceRow:
    """One row of the sentence matrix: the mean over the rows captured in a sentence.

    Attributes:
        columns: uint32 [n], sentences that got mass, ascending. shares: float64 [n].
        unobserved: mean share the search did not observe; NaN without rows.
        rows: captured rows.
        sink: mean share on the first token, which is in `shares` too.
        lags: int64 [rows], and lag_shares: float64 [rows], see `Row`.
    """

    columns: NDArray[np.uint32]
    shares: NDArray[np.float64]
    unobserved: float
    rows: int
    sink: float
    lags: NDArray[np.int64]
    lag_shares: NDArray[np.float64]


NO_ROW = SentenceRow(np.zeros(0, np.uint32), np.zeros(0), float("nan"), 0, 0.0, np.zeros(0, np.int64), np.zeros(0))
"""Of a sentence without rows."""
