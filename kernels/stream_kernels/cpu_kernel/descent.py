"""The hierarchical search: branches are halved, scored by probe keys, and the best are kept."""

import numpy as np

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.keys import load_probes
from stream_kernels.cpu_kernel.logits import add_mass, largest, score_keys, weight_above
from stream_kernels.cpu_kernel.selection import least_of_best, sort_key
from stream_kernels.cpu_kernel.structures import EXACT, MINUS_INFINITY, Geometry, Pages, Plan, Scratch


@jit()
def descend(
    g: Geometry, plan: Plan, s: Scratch, heads: int, layer: int, address: int, pages: Pages, inner: int
) -> tuple[int, int]:
    """The descent: fills `start` with the candidates, ascending. Returns their number and the keys read."""
    if g.strategy == EXACT or inner <= g.top_k or (g.rerank and inner <= g.width):
        for b in range(inner):
            s.start[b] = b
        return inner, 0
    last_keep = g.width if g.rerank else g.top_k
    if inner <= g.width:
        for b in range(inner):
            s.start[b], s.end[b] = b, b + 1
        reads = _score_branches(g, plan, s, heads, layer, address, pages, inner)
        return _keep_branches(g, plan, s, heads, inner, last_keep), reads

    for b in range(g.width):
        s.start[b], s.end[b] = b * inner // g.width, (b + 1) * inner // g.width
    kept, reads = g.width, 0
    longest = -(-inner // g.width)
    while longest > 1:
        # Halves are written behind the branches and moved down: of a single block only one half is there to score.
        for b in range(kept - 1, -1, -1):
            s.start[g.width + b], s.end[g.width + b] = s.start[b], s.end[b]
        branches = 0
        for b in range(g.width, g.width + kept):
            start, end = s.start[b], s.end[b]
            middle = start + (end - start) // 2
            if middle > start:
                s.start[branches], s.end[branches] = start, middle
                branches += 1
            s.start[branches], s.end[branches] = middle, end
            branches += 1
        longest -= longest // 2
        reads += _score_branches(g, plan, s, heads, layer, address, pages, branches)
        kept = _keep_branches(g, plan, s, heads, branches, g.width if longest > 1 else last_keep)
    return kept, reads


@jit()
def _score_branches(
    g: Geometry, plan: Plan, s: Scratch, heads: int, layer: int, address: int, pages: Pages, branches: int
) -> int:
    """Peak and weight of every branch's probe keys per head, the unit's score per branch; returns the keys read."""
    probes = len(plan.probe_offsets)
    batch = s.tile.shape[1] // probes
    for first in range(0, branches, batch):
        count = min(batch, branches - first)
        for b in range(count):
            centre = s.start[first + b] + (s.end[first + b] - s.start[first + b]) // 2
            token = (g.sink_blocks + centre) * g.block_size
            load_probes(g, plan, address, plan.page_stride[layer], pages, token, s.tile, b * probes)
        score_keys(s, heads, count * probes, g.head_dim, plan.softcap[layer])
        for h in range(heads):
            for b in range(count):
                logits = s.logits[h, b * probes :]
                peak = largest(logits, probes)
                s.peak[h, first + b] = peak
                s.weight[h, first + b] = weight_above(logits, probes, peak)
    s.score[:branches] = MINUS_INFINITY
    for h in range(heads):
        best = largest(s.peak[h], branches)
        for b in range(branches):
            s.score[b] = max(s.score[b], s.peak[h, b] - best)
    return branches * probes


@jit()
def _keep_branches(g: Geometry, plan: Plan, s: Scratch, heads: int, branches: int, keep: int) -> int:
    """Keeps the `keep` best of `branches`, in their order; the mass of the others is estimated and added to `left`."""
    if branches <= keep:
        return branches
    for b in range(branches):
        s.rank[b] = sort_key(s.score[b], b)
    worst = least_of_best(s.rank, branches, keep)
    kept = 0
    for b in range(branches):
        if s.rank[b] >= worst:
            s.start[kept], s.end[kept] = s.start[b], s.end[b]
            kept += 1
        else:
            tokens_per_probe = np.float32((s.end[b] - s.start[b]) * g.block_size) / np.float32(len(plan.probe_offsets))
            for h in range(heads):
                add_mass(s.left, h, s.peak[h, b], s.weight[h, b] * tokens_per_probe)
    return kept
