"""Reading a candidate block in full, for every head of a unit."""

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.keys import in_place, key_address, load_keys
from stream_kernels.cpu_kernel.logits import first_equal, largest, score_columns, score_keys, weight_above
from stream_kernels.cpu_kernel.structures import Floats, Geometry, Pages, Plan, Scratch


@jit()
def read_candidate(
    g: Geometry, plan: Plan, s: Scratch, heads: int, layer: int, address: int, pages: Pages, candidate: int
) -> None:
    """Fills `s.peak` and `s.weight` of a candidate, which is inner block s.start[candidate], from its `s.logits`."""
    first = (g.sink_blocks + s.start[candidate]) * g.block_size
    page_stride, softcap = plan.page_stride[layer], plan.softcap[layer]
    if in_place(g, first):
        at = key_address(g, address, page_stride, pages, first)
        score_columns(s, heads, g.block_size, g.head_dim, softcap, at, 4 * g.token_group)
    else:
        load_keys(g, address, page_stride, pages, first, g.block_size, s.tile, 0)
        score_keys(s, heads, g.block_size, g.head_dim, softcap)
    for h in range(heads):
        peak = largest(s.logits[h], g.block_size)
        s.peak[h, candidate] = peak
        s.weight[h, candidate] = weight_above(s.logits[h], g.block_size, peak)


@jit()
def note_strongest(logits: Floats, peaks: Floats, strongest: NDArray[np.uint8], candidate: int, count: int) -> None:
    """A head's part of `s.strongest`, while its `logits` are still those of the candidate."""
    strongest[candidate] = first_equal(logits, count, peaks[candidate])
