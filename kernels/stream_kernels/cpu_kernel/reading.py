"""The beam's exact reads: blocks in order of promise, while a regression of truth on estimate says that it pays."""

import math

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.beam_structures import BeamScratch
from stream_kernels.cpu_kernel.candidates import note_strongest, read_candidate
from stream_kernels.cpu_kernel.keys import prefetch_block
from stream_kernels.cpu_kernel.logits import add_mass
from stream_kernels.cpu_kernel.selection import least_of_best, tie_of
from stream_kernels.cpu_kernel.structures import MINUS_INFINITY, Floats, Geometry, Pages, Plan, Scratch

_MAX_RESIDUAL = 2.0
_LEAST_RESIDUAL = 1e-4

READ = -1
"""Marks in `Scratch.work` the nodes of the front that were read."""


@jit()
def read_on(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    min_gain: float,
    first_lot: int,
    b: BeamScratch,
    heads: int,
    layer: int,
    address: int,
    pages: Pages,
    count: int,
) -> int:
    """Reads blocks of the front in order of their score, while that is expected to pay; returns how many.

    Leaves the regression in `b.line`, and in `s.work` `READ` for every node of the front that was read.
    """
    most = min(count, g.width if g.rerank else g.top_k)
    worst = least_of_best(s.rank, count, most)
    chosen = 0
    for i in range(count):
        if s.rank[i] >= worst:
            b.order[chosen] = s.rank[i]
            chosen += 1
    b.order[:most].sort()  # ascending: the best is last
    for i in range(count):
        s.work[i] = 0
    b.sums[:heads] = 0.0
    b.best[:heads] = MINUS_INFINITY
    for h in range(heads):
        b.observed[h, 0], b.observed[h, 1] = s.outside[h, 0], s.outside[h, 1]
    taken, wanted = 0, min(most, first_lot)
    while True:
        while taken < wanted:
            i = tie_of(b.order[most - 1 - taken])
            s.work[i] = READ
            s.start[taken] = b.front[i] - g.sink_blocks
            if taken + 1 < most:
                following = b.front[tie_of(b.order[most - 2 - taken])] * g.block_size
                prefetch_block(g, address, plan.page_stride[layer], pages, following)
            read_candidate(g, plan, s, heads, layer, address, pages, taken)
            for h in range(heads):
                mass = s.peak[h, taken] + np.float32(math.log(s.weight[h, taken]))
                if mass >= b.best[h, g.top_k - 1]:  # else the head has K heavier ones
                    note_strongest(s.logits[h], s.peak[h], s.strongest[h], taken, g.block_size)
                _learn(b.sums[h], b.best[h], b.centre[h, i], mass)
                add_mass(b.observed, h, s.peak[h, taken], s.weight[h, taken])
            taken += 1
        for h in range(heads):
            _fit(b, h)
        wanted = min(most, taken + g.top_k)
        if wanted == taken:
            return taken
        if not _best_gain(g, s, b, heads, most, taken, wanted) >= min_gain * (wanted - taken):
            return taken


@jit()
def _learn(sums: NDArray[np.float64], best: Floats, estimate: np.float32, mass: np.float32) -> None:
    """Takes a block's estimated and exact log mass into a head's sums and, where it belongs, its best masses."""
    x, y = np.float64(estimate), np.float64(mass)
    sums[0] += 1.0
    sums[1] += x
    sums[2] += y
    sums[3] += x * x
    sums[4] += x * y
    sums[5] += y * y
    place = len(best) - 1
    if mass <= best[place]:
        return
    while place > 0 and best[place - 1] < mass:
        best[place] = best[place - 1]
        place -= 1
    best[place] = mass


@jit()
def _fit(b: BeamScratch, h: int) -> None:
    """b.line[h] = the least squares of y on x, slope between 0 and 1."""
    count = b.sums[h, 0]
    x, y = b.sums[h, 1] / count, b.sums[h, 2] / count
    xx, xy, yy = b.sums[h, 3] - count * x * x, b.sums[h, 4] - count * x * y, b.sums[h, 5] - count * y * y
    slope = min(1.0, max(0.0, xy / max(xx, 1e-6)))
    residual = max(0.0, yy - 2.0 * slope * xy + slope * slope * xx) / count
    b.line[h, 0], b.line[h, 1], b.line[h, 2], b.line[h, 3] = x, y, slope, min(residual, _MAX_RESIDUAL)


@jit()
def _best_gain(g: Geometry, s: Scratch, b: BeamScratch, heads: int, most: int, first: int, end: int) -> float:
    """Most that the heads of a row may expect to gain, summed, by reading places `first` to `end`."""
    best = 0.0
    for row in range(g.rows):
        gain = 0.0
        for h in range(row, heads, g.rows):
            gain += _expected_gain(g, s, b, h, most, first, end)
        best = max(best, gain)
    return best


@jit()
def _expected_gain(g: Geometry, s: Scratch, b: BeamScratch, h: int, most: int, first: int, end: int) -> float:
    """Share of its observed attention that head `h` may expect to gain by reading places `first` to `end`."""
    centre_x, centre_y, slope, residual = b.line[h, 0], b.line[h, 1], b.line[h, 2], b.line[h, 3]
    deviation = math.sqrt(max(residual, _LEAST_RESIDUAL))
    observed = np.float64(b.observed[h, 0]) + math.log(b.observed[h, 1])
    threshold = np.float64(b.best[h, g.top_k - 1])
    kept = math.exp(threshold - observed)
    gain = 0.0
    for place in range(first, end):
        i = tie_of(b.order[most - 1 - place])
        median = centre_y + slope * (np.float64(b.centre[h, i]) - centre_x)
        distance = (median - threshold) / deviation
        above = math.exp(median + 0.5 * deviation * deviation - observed) * _normal_cdf(distance + deviation)
        gain += max(0.0, above - kept * _normal_cdf(distance))
    return gain


@jit()
def _normal_cdf(x: float) -> float:
    """`statistics.normal_cdf`."""
    return 1.0 / (1.0 + math.exp(-1.702 * x))
