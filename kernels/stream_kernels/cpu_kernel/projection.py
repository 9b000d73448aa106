"""Products of queries with the vectors of nodes, the beam's every estimate."""

from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.compiling import jit
from stream_kernels.cpu_kernel.intrinsics import (
    LANES,
    bfloat16_to_float,
    dot_bfloat16,
    dot_columns,
    pointer,
    prefetch,
)
from stream_kernels.cpu_kernel.structures import ZERO, Floats, Ints

_AHEAD = 8
"""Vectors asked for before they are needed: about as many as a memory access takes to arrive."""
_COLUMNS = 4 * LANES
"""Nodes widened at a time, where many queries share them."""
_MANY = 16
"""Queries from which it pays to widen nodes into the columns of a tile: no sum over the lanes of a vector then."""

# The usual numbers of query heads per KV head; sums of eight and a vector fit the registers of a machine with AVX2.
_dot_eight = dot_bfloat16(8)
_dot_seven = dot_bfloat16(7)
_dot_five = dot_bfloat16(5)
_dot_four = dot_bfloat16(4)
_dot_three = dot_bfloat16(3)
_dot_one = dot_bfloat16(1)
_dot_columns_of_two = dot_columns(4, 2)
_dot_columns_of_one = dot_columns(4, 1)


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
    for i in range(done, count):
        if i + _AHEAD < count:
            coming: Any = first + 2 * head_dim * np.int64(slots[nodes[i + _AHEAD]])
            for line in range(0, 2 * head_dim, 64):
                prefetch(coming + line)
        vector: Any = first + 2 * head_dim * np.int64(slots[nodes[i]])
        if head_dim % LANES == 0:
            _project(vector, query, query_bytes, heads, head_dim, out + 4 * i, row_bytes)
            continue
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
