"""The beam: coarse to fine over the nodes, then exact reads in order of promise. `reference_beam.py` specifies it."""

import math

import numpy as np

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.beam_structures import Beam, BeamScratch
from stream_kernels.cpu_kernel.candidates import note_strongest, read_candidate
from stream_kernels.cpu_kernel.logits import (
    add_exponentials,
    add_mass,
    cap_logits,
    exp_below_zero,
    largest,
    log_of,
    raise_to,
    weight_above,
    weighted_sum,
)
from stream_kernels.cpu_kernel.nodes import FANOUT_BITS, NodeIndex
from stream_kernels.cpu_kernel.projection import project_nodes
from stream_kernels.cpu_kernel.reading import READ, read_on
from stream_kernels.cpu_kernel.selection import least_of_best, sort_key
from stream_kernels.cpu_kernel.structures import MINUS_INFINITY, ZERO, Floats, Geometry, Pages, Plan, Scratch
from stream_kernels.cpu_kernel.summaries import (
    Summaries,
    log_mean_exp,
    mean_address,
    node_blocks,
    outlier_offset,
    spread_limit,
    spread_scale,
)

_NOTHING = np.float32(-1e30)
"""Log mass of what was read, where the rest is summed: low, and finite, so that a slope of 0 times it is 0."""


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
        b.scale[h] = beam.spread_weight * spread_scale(s.query[h], b.profile)
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
        reads += count + twice * (len(beam.summaries.node) - 1)
        if level == 0:
            break
        at_top = False
        width = beam.width if level == 1 else beam.upper_width
        count, left = _look_into(g, s, b, heads, level, count, width, left, end)
        level -= 1

    candidates = read_on(g, plan, s, beam.min_gain, beam.first_lot, b, heads, layer, address, pages, count)
    unread = b.node_spread  # no longer needed for spreads
    for i in range(count):
        unread[i] = np.float32(1)
        if s.work[i] == READ:
            unread[i] = ZERO
            for h in range(heads):
                b.centre[h, i] = _NOTHING
    for h in range(heads):
        centre_x, centre_y = b.line[h, 0], b.line[h, 1]
        slope, residual = b.line[h, 2], b.line[h, 3]
        origin = max(largest(b.centre[h], count), largest(b.left_estimate[h], left))
        if origin > _NOTHING:
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
    means = mean_address(g, m, layer, 0, kv_head)
    project_nodes(means, slots, b.front, count, g.head_dim, s.query, heads, s.tile, b.centre)
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
            log_mean_exp(b.centre[h, i:], b.spread[h, i:], 1, spread_limit(tokens), softcap)
        log_mean_exp(b.centre[h, short:], b.spread[h, short:], count - short, full, softcap)
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
    worst = least_of_best(s.rank, count, twice)
    found = 0
    for i in range(count):
        if s.rank[i] >= worst:
            b.again[found], b.again_node[found] = i, b.front[i]
            found += 1
    slots = b.slots[index.row_offset[level] :]
    outlier = mean_address(g, m, layer, 0, kv_head)
    for _ in range(1, len(m.node)):
        outlier += outlier_offset(g, m)
        project_nodes(outlier, slots, b.again_node, found, g.head_dim, s.query, heads, s.tile, b.spread)
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
    peak = max(outside, largest(mass, count))
    b.norm[h] = peak + np.float32(math.log(weight_above(mass, count, peak) + exp_below_zero(outside - peak)))


@jit()
def _look_into(
    g: Geometry, s: Scratch, b: BeamScratch, heads: int, level: int, count: int, width: int, left: int, end: int
) -> tuple[int, int]:
    """Replaces `b.front` by the children of its `width` best nodes and by what no whole parent covers.

    The other nodes are left. Returns how many nodes are in front now, and how many were left so far.
    """
    worst = least_of_best(s.rank, count, min(width, count))
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
    for i in range(found):
        b.front[i] = b.below[i]
    return found, left
