"""The statistics in the nodes: made from keys or from the nodes below, stored in bfloat16, turned into scores.

A layer has [KV heads, slots, 2, head_dim] numbers: the mean and the variance of each node's keys.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.compiling import jit
from stream_kernels.cpu_kernel.intrinsics import LANES, bfloat16_to_float, dot_bfloat16, float_as_int, pointer
from stream_kernels.cpu_kernel.keys import load_keys
from stream_kernels.cpu_kernel.nodes import FANOUT_BITS, NodeIndex
from stream_kernels.cpu_kernel.structures import FLOAT32, ZERO, Floats, Geometry, Ints, Pages, Plan, Scratch

_REORDER = {"reassoc", "contract", "nsz"}
_HALF = np.float32(0.5)

# The usual numbers of query heads per KV head; sums of eight and a vector fit the registers of a machine with AVX2.
_dot_eight = dot_bfloat16(8)
_dot_seven = dot_bfloat16(7)
_dot_five = dot_bfloat16(5)
_dot_four = dot_bfloat16(4)
_dot_three = dot_bfloat16(3)
_dot_one = dot_bfloat16(1)


class Summaries(NamedTuple):
    """Where the layers' node statistics are, and room to work on one node."""

    address: Ints
    """[L], of a layer's slot 0."""
    kv_heads: int
    slots: int
    node: Floats
    """[2, D], a node's statistics, widened."""
    sums: Floats
    """[2, D]"""


@jit()
def _to_bfloat16(value: np.float32) -> np.uint16:
    """The nearest bfloat16's bits, the even one of two as near."""
    bits = np.uint32(float_as_int(value))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@jit()
def slot_address(g: Geometry, m: Summaries, layer: int, slot: int, kv_head: int) -> int:
    address: int = m.address[layer]
    return address + 4 * g.head_dim * (kv_head * m.slots + slot)


@jit()
def _load_node(g: Geometry, m: Summaries, address: int) -> None:
    stored = numba.carray(pointer(address, types.uint16), (2 * g.head_dim,))
    node = m.node.reshape(2 * g.head_dim)
    for c in range(2 * g.head_dim):
        node[c] = bfloat16_to_float(stored[c])


@jit()
def _store_node(g: Geometry, m: Summaries, address: int, values: Floats) -> None:
    stored = numba.carray(pointer(address, types.uint16), (2 * g.head_dim,))
    flat = values.reshape(2 * g.head_dim)
    for c in range(2 * g.head_dim):
        stored[c] = _to_bfloat16(flat[c])


@jit(fastmath=_REORDER)
def _moments(tile: Floats, channel: int, count: int) -> tuple[np.float32, np.float32]:
    """Mean and variance of the first `count` columns of a channel."""
    total = ZERO
    for t in range(count):
        total += tile[channel, t]
    mean = total / np.float32(count)
    square = ZERO
    for t in range(count):
        square += (tile[channel, t] - mean) * (tile[channel, t] - mean)
    return mean, square / np.float32(count)


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
    itemsize = 4 if g.key_type == FLOAT32 else 2
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
                    for c in range(g.head_dim):
                        m.sums[0, c], m.sums[1, c] = _moments(s.tile, c, g.block_size)
                else:
                    children = slots[index.row_offset[level - 1] + (node << FANOUT_BITS) :]
                    _join(g, m, layer, kv_head, level, node, children)
                _store_node(g, m, slot_address(g, m, layer, slot, kv_head), m.sums)


@jit()
def _join(
    g: Geometry, m: Summaries, layer: int, kv_head: int, level: int, node: int, children: NDArray[np.int32]
) -> None:
    """m.sums = the statistics of a node from those of its eight children, in `children`."""
    total = np.float32(node_blocks(level, node, g.sink_blocks))
    m.sums[:] = ZERO
    for step in range(2):  # the means' mean, then the variances and the means' distances from it
        for i in range(1 << FANOUT_BITS):
            blocks = node_blocks(level - 1, (node << FANOUT_BITS) + i, g.sink_blocks)
            if blocks <= 0:
                continue
            share = np.float32(blocks) / total
            _load_node(g, m, slot_address(g, m, layer, children[i], kv_head))
            if step == 0:
                for c in range(g.head_dim):
                    m.sums[0, c] += share * m.node[0, c]
            else:
                for c in range(g.head_dim):
                    distance = m.node[0, c] - m.sums[0, c]
                    m.sums[1, c] += share * (m.node[1, c] + distance * distance)


@jit()
def project_nodes(
    first_slot: int,
    slots: NDArray[np.int32],
    front: Ints,
    count: int,
    head_dim: int,
    queries: Floats,
    squares: Floats,
    heads: int,
    centre: Floats,
    spread: Floats,
) -> None:
    """Mean and variance of the logits of the first `count` nodes of `front`, for each head, in `centre` and `spread`.

    `first_slot` is the address of slot 0 of the layer's KV head, `slots` the slots of the level's nodes. Only arrays
    and numbers are handed over: a named tuple of arrays costs a call as much as a node does.
    """
    row_bytes = 4 * centre.shape[1]
    query_bytes = 4 * queries.shape[1]
    # Addresses are unsigned to numba, and an unsigned and a signed number add up to a float.
    query: Any
    square: Any
    at: Any
    out: Any
    query, square = np.int64(queries.ctypes.data), np.int64(squares.ctypes.data)
    at, out = np.int64(centre.ctypes.data), np.int64(spread.ctypes.data)
    for i in range(count):
        mean: Any = first_slot + 4 * head_dim * np.int64(slots[front[i]])
        if head_dim % LANES == 0:
            _project(mean, query, query_bytes, heads, head_dim, at + 4 * i, row_bytes)
            _project(mean + 2 * head_dim, square, query_bytes, heads, head_dim, out + 4 * i, row_bytes)
            continue
        stored = numba.carray(pointer(mean, types.uint16), (2 * head_dim,))
        for h in range(heads):
            centre[h, i], spread[h, i] = ZERO, ZERO
            for c in range(head_dim):
                centre[h, i] += queries[h, c] * bfloat16_to_float(stored[c])
                spread[h, i] += squares[h, c] * bfloat16_to_float(stored[head_dim + c])


@jit()
def _project(vector: int, query: int, query_bytes: int, heads: int, head_dim: int, out: int, out_bytes: int) -> None:
    """Products of the bfloat16 vector with `heads` queries, all at addresses."""
    while heads > 0:
        if heads >= 8:
            _dot_eight(vector, query, query_bytes, head_dim, out, out_bytes)
            done = 8
        elif heads == 7:
            _dot_seven(vector, query, query_bytes, head_dim, out, out_bytes)
            done = 7
        elif heads >= 5:
            _dot_five(vector, query, query_bytes, head_dim, out, out_bytes)
            done = 5
        elif heads == 4:
            _dot_four(vector, query, query_bytes, head_dim, out, out_bytes)
            done = 4
        elif heads == 3:
            _dot_three(vector, query, query_bytes, head_dim, out, out_bytes)
            done = 3
        else:
            _dot_one(vector, query, query_bytes, head_dim, out, out_bytes)
            done = 1
        heads -= done
        query += done * query_bytes
        out += done * out_bytes


@jit()
def spread_limit(tokens: int) -> np.float32:
    """`statistics.spread_limit`."""
    return np.float32(math.sqrt(2.0 * math.log(max(tokens / 2.0, 2.0))))


@jit(fastmath={"contract"})
def log_mean_exp(
    centre: Floats, spread: Floats, first: int, count: int, limit: np.float32, softcap: np.float32
) -> None:
    """Turns `count` (mean, variance) of logits from `first` on into their log mean exponential, in `centre`.

    `statistics.log_mean_exp`, with the soft cap of `statistics.node_scores`.
    """
    if softcap > ZERO:
        for i in range(first, first + count):
            slope = np.float32(math.tanh(centre[i] / softcap))
            centre[i] = softcap * slope
            slope = np.float32(1) - slope * slope
            spread[i] *= slope * slope
    square = limit * limit
    for i in range(first, first + count):
        variance = spread[i]
        beyond = limit * np.float32(math.sqrt(variance)) - _HALF * square
        centre[i] += _HALF * variance if variance < square else beyond
