"""The search for one unit (query heads that share a KV head) of one row: forced blocks, candidates, what is kept."""

import math

import numpy as np

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.beam import search_nodes
from stream_kernels.cpu_kernel.beam_structures import Beam
from stream_kernels.cpu_kernel.candidates import note_strongest, read_candidate
from stream_kernels.cpu_kernel.descent import descend
from stream_kernels.cpu_kernel.keys import load_keys
from stream_kernels.cpu_kernel.logits import add_mass, first_equal, largest, score_keys, weight_above
from stream_kernels.cpu_kernel.selection import least_of_best, sort_key
from stream_kernels.cpu_kernel.structures import (
    BEAM,
    ELEMENT_BYTES,
    MINUS_INFINITY,
    ZERO,
    Geometry,
    Pages,
    Plan,
    Scratch,
    Summary,
)
from stream_kernels.cpu_kernel.summaries import add_deviations


@jit()
def search_unit(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    beam: Beam,
    summary: Summary,
    layer: int,
    row: int,
    unit: int,
    context: int,
    pages: Pages,
) -> int:
    """Searches for one unit, whose queries are in `s.query`, and writes its heads' results. Returns the keys read."""
    ids, lse, strongest, forced_lse, forced_strongest, unobserved, _, _ = summary
    slots = plan.unit_slots[plan.unit_first[unit] : plan.unit_first[unit + 1]]
    heads = len(slots)
    page_stride = plan.page_stride[layer]
    itemsize = ELEMENT_BYTES[g.key_type]
    address = plan.key_address[layer] + plan.unit_kv_head[unit] * plan.head_stride[layer] * itemsize
    reads = 0
    for h in range(heads):
        s.left[h, 0], s.left[h, 1] = MINUS_INFINITY, ZERO
        s.outside[h, 0], s.outside[h, 1] = MINUS_INFINITY, ZERO
        add_mass(s.outside, h, plan.sinks[layer, slots[h]], np.float32(1))

    blocks = -(-context // g.block_size)
    beam.scratch.profile[:] = ZERO
    for i in range(g.sink_blocks + g.recent_blocks):
        block = i if i < g.sink_blocks else blocks - g.recent_blocks + i - g.sink_blocks
        if block >= blocks or (i >= g.sink_blocks and block < g.sink_blocks):
            continue
        count = min(g.block_size, context - block * g.block_size)
        load_keys(g, address, page_stride, pages, block * g.block_size, count, s.tile, 0)
        score_keys(s, heads, count, g.head_dim, plan.softcap[layer])
        reads += count
        if g.strategy == BEAM and i >= g.sink_blocks:
            add_deviations(s.tile, count, beam.scratch.profile)
        for h in range(heads):
            peak = largest(s.logits[h], count)
            weight = weight_above(s.logits[h], count, peak)
            add_mass(s.outside, h, peak, weight)
            forced_lse[layer, row, slots[h], i] = peak + np.float32(math.log(weight))
            forced_strongest[layer, row, slots[h], i] = first_equal(s.logits[h], count, peak)

    inner = blocks - g.sink_blocks - g.recent_blocks
    if inner <= 0:
        return reads
    if g.strategy == BEAM:
        end = blocks - g.recent_blocks
        candidates, search_reads = search_nodes(
            g, plan, s, beam, heads, layer, plan.unit_kv_head[unit], address, pages, end
        )
    else:
        candidates, search_reads = descend(g, plan, s, heads, layer, address, pages, inner)
        for candidate in range(candidates):
            read_candidate(g, plan, s, heads, layer, address, pages, candidate)
            for h in range(heads):
                note_strongest(s.logits[h], s.peak[h], s.strongest[h], candidate, g.block_size)
    reads += search_reads + candidates * g.block_size

    keep = min(g.top_k, candidates)
    for h in range(heads):
        slot = slots[h]
        for b in range(candidates):
            s.score[b] = s.peak[h, b] + np.float32(math.log(s.weight[h, b]))
            s.rank[b] = sort_key(s.score[b], s.start[b])
        worst = least_of_best(s.rank, candidates, keep)
        kept = 0
        for b in range(candidates):
            if s.rank[b] < worst:
                add_mass(s.left, h, s.peak[h, b], s.weight[h, b])
                continue
            # Insertion into the heaviest-first list; `work` holds the candidates' positions.
            place = kept
            while place > 0 and s.rank[s.work[place - 1]] < s.rank[b]:
                s.work[place] = s.work[place - 1]
                place -= 1
            s.work[place] = b
            kept += 1
        for i in range(kept):
            b = s.work[i]
            ids[layer, row, slot, i] = g.sink_blocks + s.start[b]
            lse[layer, row, slot, i] = s.score[b]
            strongest[layer, row, slot, i] = s.strongest[h, b]
        unobserved[layer, row, slot] = s.left[h, 0] + np.float32(math.log(s.left[h, 1]))
    return reads
