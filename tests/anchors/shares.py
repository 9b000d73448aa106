"""Attention head by head, made by hand."""

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import HeadShares


def head_shares(
    heads: NDArray[np.integer], columns: NDArray[np.integer], mass: NDArray[np.floating], rows: int = 1
) -> HeadShares:
    """Of entries of so many rows, in which equal (head, column) are joined."""
    dense = np.zeros((heads.max(initial=-1) + 1, columns.max(initial=-1) + 1))
    np.add.at(dense, (heads, columns), mass)
    head, column = dense.nonzero()
    return HeadShares(head.astype(np.uint8), column.astype(np.uint32), (dense[head, column] / rows).astype(np.float32))
