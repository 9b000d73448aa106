"""Reading a candidate block in full, for every head of a unit."""

from stream_kernels.cpu_kernel.compiling import jit
from stream_kernels.cpu_kernel.keys import in_place, key_address, load_keys
from stream_kernels.cpu_kernel.logits import first_equal, largest, score_columns, score_keys, weight_above
from stream_kernels.cpu_kernel.structures import Geometry, Pages, Plan, Scratch


@jit()
def read_candidate(
    g: Geometry, plan: Plan, s: Scratch, heads: int, layer: int, address: int, pages: Pages, candidate: int
) -> None:
    """Fills `s.peak`, `s.weight` and `s.strongest` of a candidate, which is inner block s.start[candidate]."""
    first = (g.sink_blocks + s.start[candidate]) * g.block_size
    page_stride, softcap = plan.page_stride[layer], plan.softcap[layer]
    if in_place(g, first):
        at = key_address(g, address, page_stride, pages, first)
        score_columns(s, heads, g.block_size, g.head_dim, softcap, at, 4 * g.token_group)
    else:
        load_keys(g, address, page_stride, pages, first, g.block_size, s.tile, 0)
        score_keys(s, heads, g.block_size, g.head_dim, softcap)
    for h in range(heads):
        peak = largest(s.logits[h], 0, g.block_size)
        s.peak[h, candidate] = peak
        s.weight[h, candidate] = weight_above(s.logits[h], 0, g.block_size, peak)
        s.strongest[h, candidate] = first_equal(s.logits[h], 0, g.block_size, peak)
