"""The descent on a GPU: what `reference_descent.py` specifies, one unit per program."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_keys import key_logits, logaddexp, logsumexp, open_unit
from stream_kernels.gpu_selection import largest, own_top, sortable
from stream_kernels.gpu_structures import Batch, Cache, DescentScratch, Plan, Results, TopScratch, Unit
from stream_kernels.gpu_unit import item_count, read_candidates, read_forced, store_unit, used_blocks


@triton.jit
def _halves(span, half, single, SHAPE: tl.constexpr):
    """First block and end of halves `half` of the branches in `span`: two of each branch, in order. A single block has
    one half: itself."""
    wanted = half < 2 * SHAPE.candidates
    start = tl.load(span + half // 2, mask=wanted, other=0)
    stop = tl.load(span + SHAPE.candidates_tile + half // 2, mask=wanted, other=0)
    middle = tl.where(single, start, start + (stop - start) // 2)
    return tl.where(half % 2 == 0, start, middle), tl.where(half % 2 == 0, middle, stop)


@triton.jit
def _probe(unit: Unit, span, best_place, mass_place, single, SHAPE: tl.constexpr):
    """Scores every half by the keys of its centre block, into memory; the largest logit of each head, [group_tile]."""
    key = tl.arange(0, SHAPE.branches_read * SHAPE.probe_tile)
    branch = tl.arange(0, SHAPE.branches_read)
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    probe = key % SHAPE.probe_tile
    offset = probe * SHAPE.block_size // SHAPE.probe_keys + SHAPE.block_size // (2 * SHAPE.probe_keys)
    peak = tl.full([SHAPE.group_tile, SHAPE.branches_read], float("-inf"), tl.float32)
    for first in range(0, 2 * SHAPE.candidates, SHAPE.branches_read):
        start, stop = _halves(span, first + key // SHAPE.probe_tile, single, SHAPE)
        centre = SHAPE.sink_blocks + start + (stop - start) // 2
        wanted = (stop > start) & (probe < SHAPE.probe_keys)
        logits = key_logits(unit, centre * SHAPE.block_size + offset, wanted, SHAPE)
        logits = tl.reshape(logits, [SHAPE.group_tile, SHAPE.branches_read, SHAPE.probe_tile])
        best = tl.max(logits, 2)
        peak = tl.maximum(peak, best)
        # A dropped branch is taken to hold its probe keys' mean exponential at each of its tokens.
        start, stop = _halves(span, first + branch, single, SHAPE)
        tokens = tl.maximum(stop - start, 1) * SHAPE.block_size
        mass = logsumexp(logits, 2) + tl.log(tokens.to(tl.float32) / SHAPE.probe_keys)[None, :]
        at = head * (2 * SHAPE.candidates_tile) + (first + branch)[None, :]
        mask = (head < SHAPE.group) & (first + branch < 2 * SHAPE.candidates)[None, :]
        tl.store(best_place + at, best, mask=mask)
        tl.store(mass_place + at, mass, mask=mask)
    return tl.max(peak, 1)


@triton.jit
def _descend(unit: Unit, span, best_place, mass_place, inner, SHAPE: tl.constexpr):
    """Narrows the branches in `span` to single blocks.

    Returns:
        How many are left; estimated log-sum-exp of what was dropped, [group_tile]; and the keys read.
    """
    single = inner <= SHAPE.candidates
    branch = tl.arange(0, SHAPE.candidates_tile)
    within = branch < SHAPE.candidates
    even_start = tl.where(single, tl.minimum(branch, inner), branch * inner // SHAPE.candidates)
    even_stop = tl.where(single, tl.minimum(branch + 1, inner), (branch + 1) * inner // SHAPE.candidates)
    tl.store(span + branch, even_start, mask=within)
    tl.store(span + SHAPE.candidates_tile + branch, even_stop, mask=within)
    tl.debug_barrier()

    half = tl.arange(0, 2 * SHAPE.candidates_tile)
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    at = head * (2 * SHAPE.candidates_tile) + half[None, :]
    left = tl.minimum(inner, SHAPE.candidates)
    unread = tl.full([SHAPE.group_tile], float("-inf"), tl.float32)
    reads = tl.zeros_like(inner)
    length = (inner + SHAPE.candidates - 1) // SHAPE.candidates
    # Where all are single there is still one round: something has to choose among them.
    going = inner > 0
    while going:
        peak = _probe(unit, span, best_place, mass_place, single, SHAPE)
        start, stop = _halves(span, half, single, SHAPE)
        tl.debug_barrier()
        some = stop > start
        reads += tl.sum(some.to(tl.int32), 0) * SHAPE.probe_keys
        length = (length + 1) // 2
        going = length > 1
        keep = SHAPE.candidates
        if not SHAPE.rerank:
            keep = tl.where(going, SHAPE.candidates, SHAPE.top_k)
        mask = unit.present[:, None] & some[None, :]
        best = tl.load(best_place + at, mask=mask, other=float("-inf"))
        score = tl.max(tl.where(mask, best - peak[:, None], float("-inf")), 0)
        kept = largest(sortable(score, some), keep)
        mass = tl.load(mass_place + at, mask=mask & (kept == 0)[None, :], other=float("-inf"))
        unread = logaddexp(unread, logsumexp(mass, 1))
        # The kept ones move to the front, in order; all others become empty.
        left = tl.sum(kept.to(tl.int32), 0)
        to = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(span + to, start, mask=kept)
        tl.store(span + SHAPE.candidates_tile + to, stop, mask=kept)
        empty = within & (branch >= left)
        tl.store(span + branch, tl.zeros_like(branch), mask=empty)
        tl.store(span + SHAPE.candidates_tile + branch, tl.zeros_like(branch), mask=empty)
        tl.debug_barrier()
    return left, unread, reads


@triton.jit
def descent_kernel(
    cache: Cache,
    plan: Plan,
    batch: Batch,
    out: Results,
    tops: TopScratch,
    scratch: DescentScratch,
    SHAPE: tl.constexpr,
):
    """Searches all units of all rows and layers, program by program in turn."""
    program = tl.program_id(0)
    top_scratch = own_top(tops, program, SHAPE)
    span = scratch.span + program * (2 * SHAPE.candidates_tile)
    place = program.to(tl.int64) * (SHAPE.group * 2 * SHAPE.candidates_tile)
    branch = tl.arange(0, SHAPE.candidates_tile)
    items = item_count(batch, out, SHAPE)
    for item in range(program, items, tl.num_programs(0)):
        tl.debug_barrier()  # the last unit's reads of the scratch memory come before this one's writes
        unit = open_unit(item, cache, plan, batch, out, SHAPE)
        _, keys = read_forced(unit, plan, out, SHAPE)
        inner = tl.maximum(used_blocks(unit, SHAPE) - SHAPE.recent_blocks - SHAPE.sink_blocks, 0)
        few = SHAPE.candidates if SHAPE.rerank else SHAPE.top_k
        searched = tl.where(inner <= few, 0, inner)
        left, unread, reads = _descend(unit, span, scratch.best + place, scratch.mass + place, searched, SHAPE)
        left = tl.where(inner <= few, inner, left)
        # From here on `span` lists the candidates by their block ids.
        start = tl.load(span + branch, mask=branch < left, other=0)
        tl.debug_barrier()
        block = SHAPE.sink_blocks + tl.where(inner <= few, branch, start)
        tl.store(span + branch, block, mask=branch < left)
        tl.debug_barrier()
        top = read_candidates(unit, span, 0, left, top_scratch, True, SHAPE)
        store_unit(unit, out, top, unread, keys + reads + left * SHAPE.block_size, item % SHAPE.units, SHAPE)
