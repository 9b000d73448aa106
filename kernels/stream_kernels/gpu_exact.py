"""The exact search on a GPU: every inner block is a candidate."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_keys import open_unit
from stream_kernels.gpu_selection import own_top
from stream_kernels.gpu_structures import Batch, Cache, Plan, Results, TopScratch
from stream_kernels.gpu_unit import item_count, read_candidates, read_forced, store_unit, used_blocks


@triton.jit
def exact_kernel(cache: Cache, plan: Plan, batch: Batch, out: Results, tops: TopScratch, SHAPE: tl.constexpr):
    """Searches all units of all rows and layers, program by program in turn."""
    top_scratch = own_top(tops, tl.program_id(0), SHAPE)
    items = item_count(batch, out, SHAPE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tl.debug_barrier()  # the last unit's reads of the scratch memory come before this one's writes
        unit = open_unit(item, cache, plan, batch, out, SHAPE)
        _, keys = read_forced(unit, plan, out, SHAPE)
        inner = tl.maximum(used_blocks(unit, SHAPE) - SHAPE.recent_blocks - SHAPE.sink_blocks, 0)
        top = read_candidates(unit, unit.pages, SHAPE.sink_blocks, inner, top_scratch, False, SHAPE)
        unread = tl.full([SHAPE.group_tile], float("-inf"), tl.float32)
        store_unit(unit, out, top, unread, keys + inner * SHAPE.block_size, item % SHAPE.units, SHAPE)
