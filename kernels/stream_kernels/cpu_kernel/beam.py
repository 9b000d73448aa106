"""The beam: coarse to fine over the nodes, then exact reads in order of promise. `reference_beam.py` specifies it."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.candidates import note_strongest, read_candidate
from stream_kernels.cpu_kernel.compiling import jit
from stream_kernels.cpu_kernel.keys import prefetch_block
from stream_kernels.cpu_kernel.logits import (
    add_exponentials,
    add_mass,
    cap_logits,
    exp_below_zero,
    largest,
    largest_weighted,
    log_of,
    raise_to,
    weight_above,
    weighted_sum,
)
from stream_kernels.cpu_kernel.nodes import FANOUT_BITS, NodeIndex
from stream_kernels.cpu_kernel.selection import kth_largest, sort_key, tie_of
from stream_kernels.cpu_kernel.structures import MINUS_INFINITY, ZERO, Floats, Geometry, Ints, Pages, Plan, Scratch
from stream_kernels.cpu_kernel.summaries import (
    Summaries,
    log_mean_exp,
    mean_address,
    node_blocks,
    outlier_offset,
    project_nodes,
    spread_limit,
    spread_scale,
)

_MAX_RESIDUAL = 2.0
_LEAST_RESIDUAL = 1e-4
_READ = -1


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
    """[L, KV heads, 2, S, D], bfloat16: the vectors that the slots hold. Read through `summaries`."""
    min_gain: float
    first_lot: int
    outlier_256ths: int
    width: int
    """Nodes kept per level."""
    tops: NDArray[np.int32]
    """[N + 1], the level where the search starts, by the block before which it ends."""
    nodes: NodeIndex
    summaries: Summaries
    scratch: BeamScratch


@jit()
def search_nodes(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    beam: Beam,
    heads: int,
    layer: int,
    kv_head: int,
    address: int,
    pages: Pages,
    end: int,
) -> tuple[int, int]:
    """Reads candidates among blocks `g.sink_blocks` to `end`: fills `s.start`, `s.peak`, `s.weight`, `s.strongest`.

    Adds the estimated mass of the blocks not read to `s.left`. Returns the number of candidates and the keys read for
    scores. In a prompt `g.rows` rows search together and `heads` counts every row's, rows innermost.
    """
    b, softcap = beam.scratch, plan.softcap[layer]
    for h in range(heads):
        b.norm[h] = s.outside[h, 0] + np.float32(math.log(s.outside[h, 1]))
    if end - g.sink_blocks <= 2 * g.top_k:
        for i in range(end - g.sink_blocks):
            s.start[i] = i
            read_candidate(g, plan, s, heads, layer, address, pages, i)
            for h in range(heads):
                note_strongest(s.logits[h], s.peak[h], s.strongest[h], i, g.block_size)
        return end - g.sink_blocks, 0

    for h in range(heads):
        b.scale[h] = spread_scale(s.query[h], b.profile)
    level: int = beam.tops[end]
    count, reads, left = 0, 0, 0
    for node in range(end >> (FANOUT_BITS * level)):
        if node_blocks(level, node, g.sink_blocks) > 0:
            b.front[count] = node
            count += 1
    at_top = True
    while True:
        _estimate(g, s, beam.summaries, beam.nodes, b, heads, layer, kv_head, level, count, softcap)
        _unit_scores(g, s, b, heads, level, count, at_top)
        twice = (count * beam.outlier_256ths + 255) // 256
        if twice > 0:
            _look_at_outliers(g, s, beam.summaries, beam.nodes, b, heads, layer, kv_head, level, count, twice, softcap)
        reads += count + twice
        if level == 0:
            break
        at_top = False
        count, left = _look_into(g, s, b, heads, level, count, beam.width, left, end)
        level -= 1

    candidates = _read_on(g, plan, s, beam.min_gain, beam.first_lot, b, heads, layer, address, pages, count)
    unread = b.node_spread  # no longer needed for spreads
    for i in range(count):
        unread[i] = ZERO if s.work[i] == _READ else np.float32(1)
    for h in range(heads):
        centre_x, centre_y = b.line[h, 0], b.line[h, 1]
        slope, residual = b.line[h, 2], b.line[h, 3]
        origin = max(
            largest_weighted(b.centre[h], unread, count), largest_weighted(b.left_estimate[h], b.left_blocks, left)
        )
        if origin > MINUS_INFINITY:
            weight = weighted_sum(b.centre[h], unread, count, np.float32(slope), origin)
            weight += weighted_sum(b.left_estimate[h], b.left_blocks, left, np.float32(slope), origin)
            add_mass(s.left, h, np.float32(centre_y + slope * (origin - centre_x) + 0.5 * residual), weight)
    return candidates, reads


@jit()
def _estimate(
    g: Geometry,
    s: Scratch,
    m: Summaries,
    index: NodeIndex,
    b: BeamScratch,
    heads: int,
    layer: int,
    kv_head: int,
    level: int,
    count: int,
    softcap: np.float32,
) -> None:
    """b.centre = estimated log mass of one block of each node in `b.front`, on average, per head, outliers aside."""
    slots = b.slots[index.row_offset[level] :]
    project_nodes(mean_address(g, m, layer, 0, kv_head), slots, b.front, count, g.head_dim, s.query, heads, b.centre)
    spreads = m.spreads[layer, kv_head]
    for i in range(count):
        b.node_spread[i] = spreads[slots[b.front[i]]]
    for h in range(heads):
        for i in range(count):
            b.spread[h, i] = b.scale[h] * b.node_spread[i]
    # The first nodes may be short of sink blocks; what a node counts decides where its Gaussian's tail ends.
    short = 0
    while short < count and b.front[short] << (FANOUT_BITS * level) < g.sink_blocks:
        short += 1
    full = spread_limit(g.block_size << (FANOUT_BITS * level))
    block = np.float32(math.log(g.block_size))
    for h in range(heads):
        for i in range(short):
            tokens = g.block_size * node_blocks(level, b.front[i], g.sink_blocks)
            log_mean_exp(b.centre[h], b.spread[h], i, 1, spread_limit(tokens), softcap)
        log_mean_exp(b.centre[h], b.spread[h], short, count - short, full, softcap)
        for i in range(count):
            b.centre[h, i] += block


@jit()
def _unit_scores(g: Geometry, s: Scratch, b: BeamScratch, heads: int, level: int, count: int, at_top: bool) -> None:
    """s.rank = sort key of each node by the log of the heads' summed shares in its best row, ties to the lower node.

    At the top level, `b.norm` first takes in the nodes themselves.
    """
    full = np.float32(math.log(1 << (FANOUT_BITS * level)))
    for i in range(count):
        b.log_blocks[i] = full
    short = 0  # of sink blocks
    while short < count and b.front[short] << (FANOUT_BITS * level) < g.sink_blocks:
        b.log_blocks[short] = math.log(node_blocks(level, b.front[short], g.sink_blocks))
        short += 1
    if at_top:
        for h in range(heads):
            _take_in(b, h, count)
    weight = b.spread[0]  # no longer needed for variances
    _best_of_rows(b.row_best, s.score, weight, b.centre, b.norm, heads, g.rows, count)
    for i in range(count):
        s.rank[i] = sort_key(b.row_best[i] + b.log_blocks[i], i)


@jit()
def _best_of_rows(
    best: Floats, peak: Floats, weight: Floats, estimates: Floats, norm: Floats, heads: int, rows: int, count: int
) -> None:
    """best[i] = largest over the rows of the log of the summed shares exp(estimates[h, i] - norm[h]) of a row's heads.

    Rows are the inner axis of the `heads`; `peak` and `weight` are overwritten.
    """
    for i in range(count):
        best[i] = MINUS_INFINITY
    for row in range(rows):
        for i in range(count):
            peak[i], weight[i] = MINUS_INFINITY, ZERO
        for h in range(row, heads, rows):
            raise_to(peak, estimates[h], count, norm[h])
        for h in range(row, heads, rows):
            add_exponentials(weight, estimates[h], peak, count, norm[h])
        for i in range(count):
            best[i] = max(best[i], peak[i] + log_of(weight[i]))


@jit()
def _look_at_outliers(
    g: Geometry,
    s: Scratch,
    m: Summaries,
    index: NodeIndex,
    b: BeamScratch,
    heads: int,
    layer: int,
    kv_head: int,
    level: int,
    count: int,
    twice: int,
    softcap: np.float32,
) -> None:
    """Raises the estimates of the `twice` best nodes of the front to what their outliers say, and their sort keys."""
    for i in range(count):
        s.work[i] = s.rank[i]
    worst = kth_largest(s.work, count, twice)
    found = 0
    for i in range(count):
        if s.rank[i] >= worst:
            b.again[found], b.again_node[found] = i, b.front[i]
            found += 1
    slots = b.slots[index.row_offset[level] :]
    outlier = mean_address(g, m, layer, 0, kv_head) + outlier_offset(g, m)
    project_nodes(outlier, slots, b.again_node, found, g.head_dim, s.query, heads, b.spread)
    if softcap > ZERO:
        cap_logits(b.spread, heads, found, softcap)
    for h in range(heads):
        estimate, centre = b.spread[h], b.centre[h]
        for i in range(found):
            at = b.again[i]
            estimate[i] = max(centre[at], estimate[i] - b.log_blocks[at])
            centre[at] = estimate[i]
    # Neither spreads nor peaks of the level are needed any more.
    _best_of_rows(b.row_best, s.score, b.node_spread, b.spread, b.norm, heads, g.rows, found)
    for i in range(found):
        at = b.again[i]
        s.rank[at] = sort_key(b.row_best[i] + b.log_blocks[at], at)


@jit()
def _take_in(b: BeamScratch, h: int, count: int) -> None:
    """Adds the front's estimated mass to b.norm[h]."""
    mass, outside = b.spread[h], b.norm[h]
    for i in range(count):
        mass[i] = b.centre[h, i] + b.log_blocks[i]
    peak = max(outside, largest(mass, 0, count))
    b.norm[h] = peak + np.float32(math.log(weight_above(mass, 0, count, peak) + exp_below_zero(outside - peak)))


@jit()
def _look_into(
    g: Geometry, s: Scratch, b: BeamScratch, heads: int, level: int, count: int, width: int, left: int, end: int
) -> tuple[int, int]:
    """Replaces `b.front` by the children of its `width` best nodes and by what no whole parent covers.

    The other nodes are left. Returns how many nodes are in front now, and how many were left so far.
    """
    for i in range(count):
        s.work[i] = s.rank[i]
    worst = kth_largest(s.work, count, min(width, count))
    found, first_left = 0, left
    for i in range(count):
        node = b.front[i]
        if s.rank[i] < worst:
            s.start[left - first_left] = i
            b.left_blocks[left] = np.float32(node_blocks(level, node, g.sink_blocks))
            left += 1
            continue
        for child in range(node << FANOUT_BITS, (node + 1) << FANOUT_BITS):
            if node_blocks(level - 1, child, g.sink_blocks) > 0:
                b.below[found] = child
                found += 1
    for h in range(heads):
        estimates, centre = b.left_estimate[h], b.centre[h]
        for i in range(left - first_left):
            estimates[first_left + i] = centre[s.start[i]]
    whole = end >> (FANOUT_BITS * level)
    for child in range(whole << FANOUT_BITS, end >> (FANOUT_BITS * (level - 1))):
        if node_blocks(level - 1, child, g.sink_blocks) > 0:
            b.below[found] = child
            found += 1
    b.front[:found] = b.below[:found]
    return found, left


@jit()
def _read_on(
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

    Leaves the regression in `b.line`, and in `s.work` `_READ` for every node of the front that was read.
    """
    most = min(count, g.width if g.rerank else g.top_k)
    for i in range(count):
        s.work[i] = s.rank[i]
    worst = kth_largest(s.work, count, most)
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
            s.work[i] = _READ
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
