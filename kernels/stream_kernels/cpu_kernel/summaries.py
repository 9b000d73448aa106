"""The statistics in the nodes: made from keys or from the nodes below, and turned into scores.

A layer has bfloat16 vectors [KV heads, 1 + O, slots, head_dim], first all nodes' means, which are read in a row, then
their O outliers, of which some are; and spreads, float32 [KV heads, slots]. `statistics.NodeStatistics` defines them.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.intrinsics import bfloat16_to_float, float_as_int, pointer
from stream_kernels.cpu_kernel.keys import load_keys
from stream_kernels.cpu_kernel.nodes import FANOUT_BITS, NodeIndex
from stream_kernels.cpu_kernel.structures import ELEMENT_BYTES, ZERO, Floats, Geometry, Ints, Pages, Plan, Scratch

_REORDER = {"reassoc", "contract", "nsz"}
_HALF = np.float32(0.5)


class Summaries(NamedTuple):
    """Where the layers' node statistics are, and room to work on one node."""

    address: Ints
    """[L], of the vectors of a layer's slot 0."""
    spreads: NDArray[np.float32]
    """[L, KV heads, S]"""
    kv_heads: int
    slots: int
    node: Floats
    """[1 + O, D], a node's mean and outliers, widened."""
    made: Floats
    """[1 + O, D], those of the node being built."""
    candidates: Floats
    """[8 O, D], the children's outliers."""
    distance: Floats
    """[8 O], how far each is from the nearest of the mean and the outliers chosen."""


@jit()
def _to_bfloat16(value: np.float32) -> np.uint16:
    """The nearest bfloat16's bits, the even one of two as near."""
    bits = np.uint32(float_as_int(value))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@jit()
def mean_address(g: Geometry, m: Summaries, layer: int, slot: int, kv_head: int) -> int:
    """Of the mean in a slot; each outlier is `outlier_offset` bytes on."""
    address: int = m.address[layer] + 2 * g.head_dim * (kv_head * len(m.node) * m.slots + slot)
    return address


@jit()
def outlier_offset(g: Geometry, m: Summaries) -> int:
    return 2 * g.head_dim * m.slots


@jit()
def _load_node(g: Geometry, m: Summaries, address: int) -> None:
    for part in range(len(m.node)):
        stored = numba.carray(pointer(address + part * outlier_offset(g, m), types.uint16), (g.head_dim,))
        for c in range(g.head_dim):
            m.node[part, c] = bfloat16_to_float(stored[c])


@jit()
def _store_node(g: Geometry, m: Summaries, address: int) -> None:
    for part in range(len(m.made)):
        stored = numba.carray(pointer(address + part * outlier_offset(g, m), types.uint16), (g.head_dim,))
        for c in range(g.head_dim):
            stored[c] = _to_bfloat16(m.made[part, c])


@jit(fastmath=_REORDER)
def _summarise_keys(tile: Floats, count: int, head_dim: int, made: Floats, distance: Floats) -> np.float32:
    """Mean and outliers of the tile's first `count` keys, in `made`; returns their spread. Overwrites `distance`."""
    for t in range(count):
        distance[t] = ZERO
    for c in range(head_dim):
        mean = _mean(tile[c], count)
        made[0, c] = mean
        for t in range(count):
            distance[t] += (tile[c, t] - mean) * (tile[c, t] - mean)
    total = ZERO
    for t in range(count):
        total += distance[t]
    for part in range(1, len(made)):
        farthest = _farthest(distance, count)
        for c in range(head_dim):
            made[part, c] = tile[c, farthest]
        if part + 1 < len(made):
            for t in range(count):
                away = ZERO
                for c in range(head_dim):
                    away += (tile[c, t] - made[part, c]) * (tile[c, t] - made[part, c])
                distance[t] = min(distance[t], away)
    return total / np.float32(count)


@jit()
def _farthest(distance: Floats, count: int) -> int:
    """Index of the largest of the first `count`, the first of equal ones."""
    farthest = 0
    for i in range(1, count):
        if distance[i] > distance[farthest]:
            farthest = i
    return farthest


@jit(fastmath=_REORDER)
def _mean(values: Floats, count: int) -> np.float32:
    total = ZERO
    for t in range(count):
        total += values[t]
    return total / np.float32(count)


@jit(fastmath=_REORDER)
def add_deviations(tile: Floats, count: int, profile: Floats) -> None:
    """Adds to `profile` [D] the squared deviations of the tile's first `count` keys from their mean."""
    for c in range(len(profile)):
        mean = _mean(tile[c], count)
        total = ZERO
        for t in range(count):
            total += (tile[c, t] - mean) * (tile[c, t] - mean)
        profile[c] += total


@jit(fastmath=_REORDER)
def spread_scale(query: Floats, profile: Floats) -> np.float32:
    """Variance of the query's logits per spread of the keys: `statistics.spread_profile` applied."""
    along, total, square = ZERO, ZERO, ZERO
    for c in range(len(profile)):
        along += query[c] * query[c] * profile[c]
        square += query[c] * query[c]
        total += profile[c]
    return along / total if total > ZERO else square / np.float32(len(profile))


@jit()
def node_blocks(level: int, node: int, sink_blocks: int) -> int:
    """How many blocks a node counts: those it covers but sink blocks."""
    return ((node + 1) << (FANOUT_BITS * level)) - max(node << (FANOUT_BITS * level), sink_blocks)


@jit()
def build_nodes(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    m: Summaries,
    index: NodeIndex,
    table: int,
    pages: Pages,
    slots: NDArray[np.int32],
    jobs: NDArray[np.int32],
    count: int,
) -> None:
    """Builds the first `count` of `jobs` (level, slot, node; lower levels first) for every layer of a block table."""
    itemsize = ELEMENT_BYTES[g.key_type]
    for layer in range(g.layers):
        if plan.table[layer] != table:
            continue
        for kv_head in range(m.kv_heads):
            keys = plan.key_address[layer] + kv_head * plan.head_stride[layer] * itemsize
            for job in range(count):
                level, slot = jobs[job, 0], jobs[job, 1]
                node: Any = np.int64(jobs[job, 2])
                if level == 0:
                    first = node * g.block_size
                    load_keys(g, keys, plan.page_stride[layer], pages, first, g.block_size, s.tile, 0)
                    spread = _summarise_keys(s.tile, g.block_size, g.head_dim, m.made, s.logits[0])
                else:
                    children = slots[index.row_offset[level - 1] + (node << FANOUT_BITS) :]
                    spread = _join(g, m, layer, kv_head, level, node, children)
                _store_node(g, m, mean_address(g, m, layer, slot, kv_head))
                m.spreads[layer, kv_head, slot] = spread


@jit(fastmath=_REORDER)
def _join(
    g: Geometry, m: Summaries, layer: int, kv_head: int, level: int, node: int, children: NDArray[np.int32]
) -> np.float32:
    """m.made = mean and outliers of a node, from its eight children in slots `children`; returns the spread."""
    total = np.float32(node_blocks(level, node, g.sink_blocks))
    m.made[:] = ZERO
    for i in range(1 << FANOUT_BITS):
        blocks = node_blocks(level - 1, (node << FANOUT_BITS) + i, g.sink_blocks)
        if blocks > 0:
            _load_node(g, m, mean_address(g, m, layer, children[i], kv_head))
            share = np.float32(blocks) / total
            for c in range(g.head_dim):
                m.made[0, c] += share * m.node[0, c]
    spread, count = ZERO, 0
    for i in range(1 << FANOUT_BITS):
        blocks = node_blocks(level - 1, (node << FANOUT_BITS) + i, g.sink_blocks)
        if blocks <= 0:
            continue
        _load_node(g, m, mean_address(g, m, layer, children[i], kv_head))
        between = _square_distance(m.node[0], m.made[0])
        spread += np.float32(blocks) / total * (m.spreads[layer, kv_head, children[i]] + between)
        for part in range(1, len(m.node)):
            for c in range(g.head_dim):
                m.candidates[count, c] = m.node[part, c]
            m.distance[count] = _square_distance(m.node[part], m.made[0])
            count += 1
    for part in range(1, len(m.made)):
        farthest = _farthest(m.distance, count)
        for c in range(g.head_dim):
            m.made[part, c] = m.candidates[farthest, c]
        for i in range(count):
            m.distance[i] = min(m.distance[i], _square_distance(m.candidates[i], m.made[part]))
    return spread


@jit(fastmath=_REORDER)
def _square_distance(one: Floats, other: Floats) -> np.float32:
    total = ZERO
    for c in range(len(one)):
        total += (one[c] - other[c]) * (one[c] - other[c])
    return total


@jit()
def spread_limit(tokens: int) -> np.float32:
    """`statistics.spread_limit`."""
    return np.float32(math.sqrt(2.0 * math.log(max(tokens / 2.0, 2.0))))


@jit(fastmath={"contract"})
def log_mean_exp(centre: Floats, spread: Floats, count: int, limit: np.float32, softcap: np.float32) -> None:
    """Turns the first `count` (mean, variance) of logits into their log mean exponential, in `centre`.

    `statistics.log_mean_exp`, with the soft cap of `statistics.bulk_scores`. The arrays begin with what is wanted:
    where an index might be negative, numba looks at each, and no loop vectorises.
    """
    if softcap > ZERO:
        for i in range(count):
            slope = np.float32(math.tanh(centre[i] / softcap))
            centre[i] = softcap * slope
            slope = np.float32(1) - slope * slope
            spread[i] *= slope * slope
    square = limit * limit
    for i in range(count):
        variance = spread[i]
        beyond = limit * np.float32(math.sqrt(variance)) - _HALF * square
        centre[i] += _HALF * variance if variance < square else beyond
