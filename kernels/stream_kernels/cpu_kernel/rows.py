"""The whole call: every row, layer and unit, with the guards against pages that are out of range or were reused."""

from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from stream_kernels.compiling import cached_jit, jit
from stream_kernels.cpu_kernel.beam_structures import Beam
from stream_kernels.cpu_kernel.intrinsics import acquire_fence, pointer
from stream_kernels.cpu_kernel.keys import load_query
from stream_kernels.cpu_kernel.nodes import forget, resolve
from stream_kernels.cpu_kernel.structures import (
    BEAM,
    ELEMENT_BYTES,
    MINUS_INFINITY,
    ROW_INVALID,
    ROW_OK,
    ROW_RACED,
    ZERO,
    Geometry,
    Ints,
    Pages,
    Plan,
    Scratch,
    Summary,
)
from stream_kernels.cpu_kernel.summaries import build_nodes
from stream_kernels.cpu_kernel.unit import search_unit


@cached_jit()
def search_rows(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    beam: Beam,
    queries: Ints,
    tables: Ints,
    context_lens: NDArray[np.int32],
    generations_address: int,
    generations_count: int,
    snapshots: Ints,
    summary: Summary,
    status: NDArray[np.uint8],
) -> None:
    """Searches every row, layer and unit.

    `queries` int64 [4]: address, then the strides of layer, row and head in elements. `generations_address` points at
    int64 [generations_count], which another thread may write; 0 of them means unguarded. `status` uint8 [R].
    """
    generations = numba.carray(pointer(generations_address, types.int64), (generations_count,))
    for row in range(len(context_lens)):
        context: Any = np.int64(context_lens[row])
        _clear_row(summary, g, row)
        status[row] = _row_status(g, plan, row, context, tables, generations, snapshots[row])
        if status[row] != ROW_OK or context == 0:
            continue
        for table in plan.used_tables:
            if not _search_table(
                g, plan, s, beam, queries, tables, table, context, generations, snapshots[row], summary, row
            ):
                status[row] = ROW_INVALID
        if status[row] != ROW_OK:
            _clear_row(summary, g, row)
            continue
        # A page may have been handed to another request while its keys were read: then nothing of the row is kept.
        acquire_fence()
        status[row] = _row_status(g, plan, row, context, tables, generations, snapshots[row])
        if status[row] != ROW_OK:
            _clear_row(summary, g, row)


@jit()
def _search_table(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    beam: Beam,
    queries: Ints,
    tables: Ints,
    table: int,
    context: int,
    generations: Ints,
    snapshot: int,
    summary: Summary,
    row: int,
) -> bool:
    """Searches one row in the layers of one block table; False if its nodes have no room."""
    _, _, _, _, _, _, learned_sink, keys_read = summary
    itemsize = ELEMENT_BYTES[g.query_type]
    pages = _row_pages(tables, table, row)
    end = -(-context // g.block_size) - g.recent_blocks
    if g.strategy == BEAM and end - g.sink_blocks > 2 * g.top_k:
        slots, jobs = beam.scratch.slots, beam.scratch.jobs
        beam.nodes.searches[0] += 1
        wanted = resolve(beam.nodes, pages, end, generations, snapshot, slots, jobs)
        if wanted < 0:
            return False
        build_nodes(g, plan, s, beam.summaries, beam.nodes, table, pages, slots, jobs, wanted)
        # The row's last look at its pages comes too late for what was built of one given away meanwhile: under the same
        # last page another row may have another page there, with the right keys since before. It would pass for valid.
        acquire_fence()
        if _pages_status(g, pages, context, generations, snapshot) != ROW_OK:
            forget(beam.nodes, jobs, wanted)
    for layer in range(g.layers):
        if plan.table[layer] != table:
            continue
        reads = 0
        for unit in range(len(plan.unit_kv_head)):
            first = plan.unit_first[unit]
            for h in range(plan.unit_first[unit + 1] - first):
                head = plan.slot_head[plan.unit_slots[first + h]]
                element = layer * queries[1] + row * queries[2] + head * queries[3]
                load_query(queries[0] + element * itemsize, g.query_type, plan.scale[layer], s.query[h], g.head_dim)
            reads += search_unit(g, plan, s, beam, summary, layer, row, unit, context, pages)
        for head in range(plan.sinks.shape[1]):
            learned_sink[layer, row, head] = plan.sinks[layer, head]
        keys_read[layer, row] = np.float32(reads) / np.float32(g.query_heads)
    return True


@jit()
def _row_status(g: Geometry, plan: Plan, row: int, context: int, tables: Ints, generations: Ints, snapshot: int) -> int:
    """Whether a row can be read: its context and pages are in range and no page was reused since its snapshot.

    `tables` [tables, 3] are address, row stride and columns of each block table, the last two in elements.
    """
    if context < 0 or context > g.max_context:
        return ROW_INVALID
    for table in plan.used_tables:
        if -(-context // g.page_size) > tables[table, 2]:
            return ROW_INVALID
        status = _pages_status(g, _row_pages(tables, table, row), context, generations, snapshot)
        if status != ROW_OK:
            return status
    return ROW_OK


@jit()
def _pages_status(g: Geometry, pages: Pages, context: int, generations: Ints, snapshot: int) -> int:
    for i in range(-(-context // g.page_size)):
        if not 0 <= pages[i] < g.num_pages:
            return ROW_INVALID
        if len(generations) and generations[pages[i]] > snapshot:
            return ROW_RACED
    return ROW_OK


@jit()
def _row_pages(tables: Ints, table: int, row: int) -> Pages:
    """A row's block table, int32 [max_pages]."""
    address = tables[table, 0] + 4 * row * tables[table, 1]
    pages: Pages = numba.carray(pointer(address, types.int32), (tables[table, 2],))
    return pages


@jit()
def _clear_row(summary: Summary, g: Geometry, row: int) -> None:
    ids, lse, strongest, forced_lse, forced_strongest, unobserved, learned_sink, keys_read = summary
    ids[:, row] = -1
    lse[:, row] = MINUS_INFINITY
    strongest[:, row] = 0
    forced_lse[:, row] = MINUS_INFINITY
    forced_strongest[:, row] = 0
    unobserved[:, row] = MINUS_INFINITY
    learned_sink[:, row] = MINUS_INFINITY
    keys_read[:, row] = ZERO
