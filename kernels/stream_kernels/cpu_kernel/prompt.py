"""The beam for a block of a prompt's rows, which search together. `prompt_beam.py` specifies it."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import cached_jit
from stream_kernels.cpu_kernel.beam import search_nodes
from stream_kernels.cpu_kernel.beam_structures import Beam
from stream_kernels.cpu_kernel.logits import log_of
from stream_kernels.cpu_kernel.structures import MINUS_INFINITY, ZERO, Floats, Geometry, Ints, Pages, Plan, Scratch


@cached_jit()
def search_query_block(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    beam: Beam,
    pages: Pages,
    queries: Floats,
    outside: Floats,
    profiles: Floats,
    end: int,
    ids: Ints,
    lse: Floats,
    unread: Floats,
    reads: NDArray[np.int64],
) -> None:
    """Searches blocks `g.sink_blocks` to `end` for every unit, whose nodes are built.

    Args:
        pages: int32 [N], where each block is.
        queries: float32 [U, m, D], scaled, rows innermost.
        outside: float32 [U, m], log-sum-exp of what is read whatever the search does.
        profiles: float32 [U, D], of `statistics.spread_profile`.
        ids: int64 [U, C], filled with the blocks read.
        lse: float32 [U, m, C], filled with their log-sum-exps.
        unread: float32 [U, m], filled with the estimated log-sum-exp of the blocks not read.
        reads: int64 [U, 2], filled with the number of candidates and the keys read for scores.
    """
    heads = queries.shape[1]
    for unit in range(len(plan.unit_kv_head)):
        kv_head = plan.unit_kv_head[unit]
        address: Any = plan.key_address[0] + kv_head * plan.head_stride[0] * 4
        for h in range(heads):
            s.query[h] = queries[unit, h]
            s.left[h, 0], s.left[h, 1] = MINUS_INFINITY, ZERO
            s.outside[h, 0], s.outside[h, 1] = outside[unit, h], np.float32(1)
        beam.scratch.profile[:] = profiles[unit]
        candidates, searched = search_nodes(g, plan, s, beam, heads, 0, kv_head, address, pages, end)
        reads[unit, 0], reads[unit, 1] = candidates, searched
        for c in range(candidates):
            ids[unit, c] = g.sink_blocks + s.start[c]
        for h in range(heads):
            for c in range(candidates):
                lse[unit, h, c] = s.peak[h, c] + log_of(s.weight[h, c])
            unread[unit, h] = s.left[h, 0] + np.float32(math.log(s.left[h, 1]))
