"""Products of queries with nodes: each way they are computed, against numpy."""

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.projection import project_nodes


@numba.njit  # Compiled code alone can call it.
def project(
    stored: NDArray[np.uint16],
    slots: NDArray[np.int32],
    nodes: NDArray[np.int64],
    queries: NDArray[np.float32],
    tile: NDArray[np.float32],
    products: NDArray[np.float32],
) -> None:
    first, dim, heads = stored.ctypes.data, stored.shape[1], len(queries)
    project_nodes(first, slots, nodes, len(nodes), dim, queries, heads, tile, products)


@pytest.mark.parametrize("dim", [16, 20, 64])
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 15, 16, 17, 96])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 70])
def test_products_are_numpys(dim: int, heads: int, count: int) -> None:
    draw = np.random.default_rng(0)
    stored = (draw.normal(size=(100, dim)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    vectors = (stored.astype(np.uint32) << 16).view(np.float32)
    slots = draw.permutation(100).astype(np.int32)
    nodes = np.sort(draw.permutation(100)[:count]).astype(np.int64)
    queries = draw.normal(size=(heads, dim)).astype(np.float32)
    products = np.full((heads, 71), np.nan, np.float32)
    project(stored, slots, nodes, queries, np.zeros((dim, 64), np.float32), products)
    np.testing.assert_allclose(products[:, :count], queries @ vectors[slots[nodes]].T, rtol=1e-4, atol=1e-4)
    assert np.isnan(products[:, count:]).all(), "written beyond the nodes"
