"""What the beam needs beyond what every strategy has: settings, the pyramid's nodes and working memory."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.nodes import NodeIndex
from stream_kernels.cpu_kernel.structures import Floats, Ints
from stream_kernels.cpu_kernel.summaries import Summaries


class BeamScratch(NamedTuple):
    """Working memory. n: heads of the largest unit; C: most nodes scored on a level; K: `top_k`."""

    profile: Floats
    """[D], how the recent keys' spread divides among the channels, in any unit."""
    scale: Floats
    """[n], variance of a head's logits per spread of keys."""
    slots: NDArray[np.int32]
    """[row nodes], the slot of each node of the row."""
    jobs: NDArray[np.int32]
    """[row nodes, 3], nodes to build."""
    front: Ints
    """[C], nodes being scored."""
    below: Ints
    """[C], the next level's."""
    centre: Floats
    """[n, C], estimated log mass of one block of each node, on average."""
    spread: Floats
    """[n, C], variances, then products with outliers."""
    node_spread: Floats
    """[C]"""
    again: Ints
    """[C], places in the front of the nodes whose outliers are looked at."""
    again_node: Ints
    """[C], which nodes these are."""
    left_estimate: Floats
    """[n, NL * C], `centre` of the nodes that were scored and not looked into."""
    left_blocks: Floats
    """[NL * C], how many blocks each counts."""
    log_blocks: Floats
    """[C], logarithm of the blocks each node counts."""
    order: Ints
    """[C], sort keys of the blocks to read, the best last."""
    observed: Floats
    """[n, 2], peak and weight of all that is read."""
    norm: Floats
    """[n], log-sum-exp that shares are relative to."""
    best: Floats
    """[n, K], largest exact masses so far, descending."""
    sums: NDArray[np.float64]
    """[n, 6], of the regression: count, x, y, xx, xy, yy."""
    line: NDArray[np.float64]
    """[n, 4], the regression: centre of x, of y, slope, residual variance."""
    row_best: Floats
    """[C], the largest score of a node in any row so far."""


class Beam(NamedTuple):
    """All that the beam needs beyond what every strategy has."""

    statistics: NDArray[np.uint16]
    """[L, KV heads, 1 + O, S, D], bfloat16: the vectors that the slots hold. Read through `summaries`."""
    min_gain: float
    first_lot: int
    outlier_256ths: int
    spread_weight: np.float32
    width: int
    """Nodes kept of the level above the blocks."""
    upper_width: int
    """The same of each level above that."""
    tops: NDArray[np.int32]
    """[N + 1], the level where the search starts, by the block before which it ends."""
    nodes: NodeIndex
    summaries: Summaries
    scratch: BeamScratch
