"""Products of queries with the vectors of nodes, the beam's every estimate."""

from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.intrinsics import (
    LANES,
    bfloat16_to_float,
    dot_bfloat16,
    dot_columns,
    pointer,
    prefetch,
)
from stream_kernels.cpu_kernel.structures import ZERO, Floats, Ints

_AHEAD = 32
"""Vectors asked for before they are needed: more than a memory access takes to arrive, also where a page must be looked
up first."""
_COLUMNS = 4 * LANES
"""Nodes widened at a time, where many queries share them."""
_MANY = 16
"""Queries from which it pays to widen nodes into the columns of a tile: no sum over the lanes of a vector then."""

_dot_columns_of_two = dot_columns(4, 2)
_dot_columns_of_one = dot_columns(4, 1)


def _projection(queries: int) -> Any:
    """Makes the products of nodes `begin` to `count` with `queries` queries at addresses, for vectors of whole lanes.

    The loop over nodes is here, so that what is the same for all of them is worked out once.
    """
    dot = dot_bfloat16(queries)

    def project(
        first: int,
        slots: NDArray[np.int32],
        nodes: Ints,
        begin: int,
        count: int,
        head_dim: int,
        query: int,
        query_bytes: int,
        out: int,
        out_bytes: int,
    ) -> None:
        for i in range(begin, count):
            if i + _AHEAD < count:
                coming: Any = first + 2 * head_dim * np.int64(slots[nodes[i + _AHEAD]])
                for line in range(0, 2 * head_dim, 64):
                    prefetch(coming + line)
            vector: Any = first + 2 * head_dim * np.int64(slots[nodes[i]])
            dot(vector, query, query_bytes, head_dim, out + 4 * i, out_bytes)

    return jit()(project)


# The usual numbers of query heads per KV head; sums of eight and a vector fit the registers of a machine with AVX2.
_project_eight = _projection(8)
_project_seven = _projection(7)
_project_five = _projection(5)
_project_four = _projection(4)
_project_three = _projection(3)
_project_one = _projection(1)


@jit()
def project_nodes(
    first: int,
    slots: NDArray[np.int32],
    nodes: Ints,
    count: int,
    head_dim: int,
    queries: Floats,
    heads: int,
    tile: Floats,
    products: Floats,
) -> None:
    """Products of `heads` queries [n, D] with one vector of each of the first `count` of `nodes`, in `products` [n, C].

    `first` is the address of that vector in slot 0 of the layer's KV head, `slots` the slots of the level's nodes;
    `tile` [D, W] is room to work, W at least 32. Only arrays and numbers are handed over: a named tuple of arrays costs
    a call as much as a node does.
    """
    if head_dim % LANES:
        _project_any(first, slots, nodes, count, head_dim, queries, heads, products)
        return
    row_bytes = 4 * products.shape[1]
    query_bytes = 4 * queries.shape[1]
    # Addresses are unsigned to numba, and an unsigned and a signed number add up to a float.
    query: Any
    out: Any
    query, out = np.int64(queries.ctypes.data), np.int64(products.ctypes.data)
    done = 0
    if heads >= _MANY:
        while done + _COLUMNS <= count:
            _widen(first, slots, nodes, done, head_dim, tile)
            _project_columns(tile, query, query_bytes, heads, head_dim, out + 4 * done, row_bytes)
            done += _COLUMNS
    left = heads
    while left > 0:
        if left >= 8:
            _project_eight(first, slots, nodes, done, count, head_dim, query, query_bytes, out, row_bytes)
            taken = 8
        elif left == 7:
            _project_seven(first, slots, nodes, done, count, head_dim, query, query_bytes, out, row_bytes)
            taken = 7
        elif left >= 5:
            _project_five(first, slots, nodes, done, count, head_dim, query, query_bytes, out, row_bytes)
            taken = 5
        elif left == 4:
            _project_four(first, slots, nodes, done, count, head_dim, query, query_bytes, out, row_bytes)
            taken = 4
        elif left == 3:
            _project_three(first, slots, nodes, done, count, head_dim, query, query_bytes, out, row_bytes)
            taken = 3
        else:
            _project_one(first, slots, nodes, done, count, head_dim, query, query_bytes, out, row_bytes)
            taken = 1
        left -= taken
        query += taken * query_bytes
        out += taken * row_bytes


@jit()
def _project_any(
    first: int,
    slots: NDArray[np.int32],
    nodes: Ints,
    count: int,
    head_dim: int,
    queries: Floats,
    heads: int,
    products: Floats,
) -> None:
    """`project_nodes` for head sizes that are no multiple of LANES."""
    for i in range(count):
        vector: Any = first + 2 * head_dim * np.int64(slots[nodes[i]])
        stored = numba.carray(pointer(vector, types.uint16), (head_dim,))
        for h in range(heads):
            products[h, i] = ZERO
            for c in range(head_dim):
                products[h, i] += queries[h, c] * bfloat16_to_float(stored[c])


@jit()
def _widen(first: int, slots: NDArray[np.int32], nodes: Ints, begin: int, head_dim: int, tile: Floats) -> None:
    """The vectors of 32 nodes from `begin` on, as float32 columns of the tile."""
    for column in range(_COLUMNS):
        address: Any = first + 2 * head_dim * np.int64(slots[nodes[begin + column]])
        stored = numba.carray(pointer(address, types.uint16), (head_dim,))
        for c in range(head_dim):
            tile[c, column] = bfloat16_to_float(stored[c])


@jit()
def _project_columns(
    tile: Floats, query: Any, query_bytes: int, heads: int, head_dim: int, out: Any, out_bytes: int
) -> None:
    """Products of the tile's first 32 columns with `heads` queries, all at addresses."""
    columns, row_bytes = np.int64(tile.ctypes.data), 4 * tile.shape[1]
    for h in range(0, heads - 1, 2):
        _dot_columns_of_two(
            query + h * query_bytes, query_bytes, columns, row_bytes, head_dim, out + h * out_bytes, out_bytes
        )
    if heads % 2:
        last = heads - 1
        _dot_columns_of_one(
            query + last * query_bytes, query_bytes, columns, row_bytes, head_dim, out + last * out_bytes, out_bytes
        )
