"""The beam on a GPU: what `reference_beam.py` specifies, one unit per program."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_keys import (
    capped,
    from_bfloat16_bits,
    logaddexp,
    logsumexp,
    open_unit,
    products,
    read_blocks,
)
from stream_kernels.gpu_moments import expected_excess, fit_line, join_moments, no_moments, predicted_mean
from stream_kernels.gpu_selection import clear_top, keep_heaviest, largest, load_top, new_blocks, own_top, sortable
from stream_kernels.gpu_structures import Batch, BeamScratch, Cache, Fit, Plan, Pyramid, Results, TopScratch, Unit
from stream_kernels.gpu_summaries import node_blocks
from stream_kernels.gpu_unit import item_count, read_forced, spread_profile, store_unit, used_blocks


@triton.jit
def _node_at(place, parents, parent_count, orphans, SHAPE: tl.constexpr):
    """The node at each place of the list that a level scores: the children of the kept nodes, then from node `orphans`
    on those that no whole parent covers; ascending."""
    children = parent_count * SHAPE.fanout
    parent = tl.load(parents + place // SHAPE.fanout, mask=place < children, other=0)
    return tl.where(place < children, parent * SHAPE.fanout + place % SHAPE.fanout, orphans + place - children)


@triton.jit
def _node_place(unit: Unit, pyramid: Pyramid, node, level, wanted, SHAPE: tl.constexpr):
    """Index of each node's summary among all, int64 [nodes], and which of those wanted there are. A slot outside the
    pyramid marks the row as invalid."""
    slot = tl.load(
        pyramid.node_slots
        + unit.row.to(tl.int64) * pyramid.node_row_stride
        + tl.load(pyramid.level_offsets + level)
        + node,
        mask=wanted,
        other=0,
    )
    inside = (slot >= 0) & (slot < pyramid.slots)
    tl.store(unit.status + tl.zeros_like(node), 2, mask=wanted & (inside == 0))
    place = (unit.layer.to(tl.int64) * pyramid.slots + slot) * SHAPE.kv_heads + unit.kv_head
    return place, wanted & inside


@triton.jit
def _vector_logits(unit: Unit, pyramid: Pyramid, place, there, WHICH: tl.constexpr, SHAPE: tl.constexpr):
    """Logits of every head, not capped, and the nodes' means (`WHICH` 0) or outliers (1 on), [group_tile, nodes]."""
    TYPE: tl.constexpr = SHAPE.vector_type
    channel = tl.arange(0, SHAPE.dim_tile)
    at = place[:, None] * (SHAPE.vectors * SHAPE.head_dim) + WHICH * SHAPE.head_dim + channel[None, :]
    mask = there[:, None] & (channel < SHAPE.head_dim)[None, :]
    if TYPE == "bfloat16":
        vectors = tl.load(pyramid.summaries.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask, other=0.0)
    else:
        vectors = from_bfloat16_bits(tl.load(pyramid.summaries + at, mask=mask, other=0))
    return products(unit, vectors, TYPE, SHAPE)


@triton.jit
def _bulk_estimates(unit: Unit, pyramid: Pyramid, stretch, node, level, wanted, SHAPE: tl.constexpr):
    """`statistics.bulk_scores` as log-sum-exp of one of a node's blocks, on average, float32 [group_tile, nodes].

    `stretch` [group_tile] is the variance of a head's logits where the spread is 1.
    """
    place, there = _node_place(unit, pyramid, node, level, wanted, SHAPE)
    centre = _vector_logits(unit, pyramid, place, there, 0, SHAPE)
    variance = stretch[:, None] * tl.load(pyramid.spreads + place, mask=there, other=0.0)[None, :]
    if SHAPE.softcap:
        bounded = capped(centre, unit.softcap)
        ratio = tl.where(unit.softcap > 0.0, bounded / tl.where(unit.softcap > 0.0, unit.softcap, 1.0), 0.0)
        slope = 1.0 - ratio * ratio
        centre = bounded
        variance = variance * slope * slope
    # `statistics.log_mean_exp`
    keys = (node_blocks(node, level, SHAPE) * SHAPE.block_size).to(tl.float32)
    square = 2.0 * tl.log(tl.maximum(keys / 2.0, 2.0))[None, :]
    beyond = tl.sqrt(square) * tl.sqrt(tl.maximum(variance, 1e-12)) - 0.5 * square
    estimate = centre + tl.where(variance < square, 0.5 * variance, beyond)
    return estimate + tl.log(tl.full([], SHAPE.block_size, tl.float32))


@triton.jit
def _look_again(unit: Unit, pyramid: Pyramid, scratch: BeamScratch, level, count, SHAPE: tl.constexpr):
    """Raises the estimates of the `count` nodes in `scratch.again` to what their outliers say, if that is more."""
    vectors: tl.constexpr = SHAPE.vectors
    log_mass = scratch.log_mass + level * (SHAPE.group * SHAPE.nodes_tile)
    tile = tl.arange(0, SHAPE.nodes_read)
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    for first in range(0, count, SHAPE.nodes_read):
        wanted = first + tile < count
        position = tl.load(scratch.again + first + tile, mask=wanted, other=0)
        node = tl.load(scratch.again + SHAPE.nodes_tile + first + tile, mask=wanted, other=0)
        place, there = _node_place(unit, pyramid, node, level, wanted, SHAPE)
        logits = _vector_logits(unit, pyramid, place, there, 1, SHAPE)
        for which in tl.static_range(2, vectors):
            logits = tl.maximum(logits, _vector_logits(unit, pyramid, place, there, which, SHAPE))
        if SHAPE.softcap:
            logits = capped(logits, unit.softcap)
        # `statistics.outlier_scores`: the outlier has all the mass, so one of the node's blocks has its part of that.
        estimate = logits - tl.log(tl.maximum(node_blocks(node, level, SHAPE), 1).to(tl.float32))[None, :]
        at = log_mass + head * SHAPE.nodes_tile + position[None, :]
        mask = (head < SHAPE.group) & wanted[None, :]
        tl.store(at, tl.maximum(tl.load(at, mask=mask, other=0.0), estimate), mask=mask)


@triton.jit
def _top_norm(unit: Unit, scratch: BeamScratch, level, count, outside, SHAPE: tl.constexpr):
    """What shares are relative to, [group_tile]: `outside` and the estimated masses of the top level's nodes."""
    tile = tl.arange(0, SHAPE.nodes_scanned)
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    tl.debug_barrier()
    # Masses are summed element by element and over elements only once, after the loop.
    peak = tl.full([SHAPE.group_tile, SHAPE.nodes_scanned], float("-inf"), tl.float32)
    total = tl.full([SHAPE.group_tile, SHAPE.nodes_scanned], 0.0, tl.float32)
    for first in range(0, count, SHAPE.nodes_scanned):
        at = first + tile
        place = (level * SHAPE.group + head) * SHAPE.nodes_tile + at[None, :]
        mask = unit.present[:, None] & (at < count)[None, :]
        estimate = tl.load(scratch.log_mass + place, mask=mask, other=float("-inf"))
        weight = tl.load(scratch.weight + level * SHAPE.nodes_tile + at, mask=at < count, other=0.0)
        mass = estimate + weight[None, :]
        higher = tl.maximum(peak, mass)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - safe) + tl.exp(mass - safe)
        peak = higher
    return logaddexp(outside, logsumexp(peak + tl.log(total), 1))


@triton.jit
def _share(unit: Unit, scratch: BeamScratch, level, within, weight, norm, HEAD: tl.constexpr, SHAPE: tl.constexpr):
    """Logarithm of one head's share of each node of a level, by the estimates in `scratch`, [nodes_tile]."""
    place = (level * SHAPE.group + HEAD) * SHAPE.nodes_tile + tl.arange(0, SHAPE.nodes_tile)
    estimate = tl.load(scratch.log_mass + place, mask=within, other=float("-inf"))
    own = unit.present & (tl.arange(0, SHAPE.group_tile) == HEAD)
    # Of a head that there is not, nothing counts.
    return estimate + weight - tl.sum(tl.where(own, norm, 0.0), 0) + tl.max(tl.where(own, 0.0, float("-inf")), 0)


@triton.jit
def _unit_scores(unit: Unit, scratch: BeamScratch, level, count, norm, SHAPE: tl.constexpr):
    """The unit's score of each of the `count` nodes of a level, by the estimates in `scratch`: the sum of its heads'
    shares, float32 [nodes_tile]; -inf for none."""
    place = tl.arange(0, SHAPE.nodes_tile)
    group: tl.constexpr = SHAPE.group
    within = place < count
    tl.debug_barrier()
    weight = tl.load(scratch.weight + level * SHAPE.nodes_tile + place, mask=within, other=0.0)
    # Head after head, so that a thread has all that its nodes' scores are made of.
    peak = tl.full([SHAPE.nodes_tile], float("-inf"), tl.float32)
    for head in tl.static_range(group):
        peak = tl.maximum(peak, _share(unit, scratch, level, within, weight, norm, head, SHAPE))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.full([SHAPE.nodes_tile], 0.0, tl.float32)
    for head in tl.static_range(group):
        total += tl.exp(_share(unit, scratch, level, within, weight, norm, head, SHAPE) - safe)
    return safe + tl.log(total)


@triton.jit
def _score_levels(
    unit: Unit, pyramid: Pyramid, scratch: BeamScratch, outside, stretch, end, top, most, SHAPE: tl.constexpr
):
    """Goes down the pyramid from level `top`, keeping `box_width` nodes of level 1 and `upper_width` of each above,
    and orders the best `most` nodes of level 0 for reading, in `scratch.order`.

    Returns:
        How many blocks may be read, and the key-equivalents read.
    """
    place = tl.arange(0, SHAPE.nodes_tile)
    tile = tl.arange(0, SHAPE.nodes_read)
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    norm = outside
    reads = tl.full([], 0, tl.int32)
    taken = tl.full([], 0, tl.int32)
    parent_count = tl.full([], 0, tl.int32)
    for step in range(top + 1):
        level = top - step
        parents = scratch.kept + (level + 1) * SHAPE.kept_tile
        orphans = tl.where(step == 0, 0, SHAPE.fanout * (end >> (3 * (level + 1))))
        count = parent_count * SHAPE.fanout + (end >> (3 * level)) - orphans
        tl.store(scratch.scored + level, count)
        log_mass = scratch.log_mass + level * (SHAPE.group * SHAPE.nodes_tile)
        for first in range(0, count, SHAPE.nodes_read):
            at = first + tile
            node = _node_at(at, parents, parent_count, orphans, SHAPE)
            blocks = node_blocks(node, level, SHAPE)
            estimate = _bulk_estimates(unit, pyramid, stretch, node, level, (at < count) & (blocks > 0), SHAPE)
            mask = (head < SHAPE.group) & (at < count)[None, :]
            tl.store(log_mass + head * SHAPE.nodes_tile + at[None, :], estimate, mask=mask)
            weight = tl.where(blocks > 0, tl.log(tl.maximum(blocks, 1).to(tl.float32)), float("-inf"))
            tl.store(scratch.weight + level * SHAPE.nodes_tile + at, weight, mask=at < count)
        if step == 0:
            norm = _top_norm(unit, scratch, level, count, outside, SHAPE)
        node = _node_at(place, parents, parent_count, orphans, SHAPE)
        blocks = node_blocks(node, level, SHAPE)
        front = (place < count) & (blocks > 0)
        scored = tl.sum(front.to(tl.int32), 0)
        twice = (scored * SHAPE.outlier_256ths + 255) // 256
        reads += scored + twice * SHAPE.outlier_keys
        kept = tl.where(level > 1, SHAPE.upper_width, tl.where(level > 0, SHAPE.box_width, most))
        # First by the nodes' bulk alone, to find those whose outliers are looked at; then by both.
        for again in range(2):
            key = sortable(_unit_scores(unit, scratch, level, count, norm, SHAPE), front)
            wanted = tl.where(again == 0, twice, kept)
            selected = largest(key, wanted)
            to = tl.cumsum(selected.to(tl.int32), 0) - 1
            if again == 0:
                tl.store(scratch.again + to, place, mask=selected)
                tl.store(scratch.again + SHAPE.nodes_tile + to, node, mask=selected)
                tl.debug_barrier()
                _look_again(unit, pyramid, scratch, level, twice, SHAPE)
            else:
                taken = tl.sum(selected.to(tl.int32), 0)
                weight = tl.log(tl.maximum(blocks, 1).to(tl.float32))
                weight = tl.where(front & ((selected == 0) | (level == 0)), weight, float("-inf"))
                tl.store(scratch.weight + level * SHAPE.nodes_tile + place, weight, mask=place < count)
                if level > 0:
                    tl.store(scratch.kept + level * SHAPE.kept_tile + to, node, mask=selected)
                else:
                    tl.store(scratch.chosen + to, place, mask=selected)
                    tl.store(scratch.chosen + SHAPE.candidates_tile + to, key, mask=selected)
        if level == 0:
            _order(scratch, parents, parent_count, orphans, taken, SHAPE)
        parent_count = taken
        tl.debug_barrier()
    return taken, reads


@triton.jit
def _order(scratch: BeamScratch, parents, parent_count, orphans, count, SHAPE: tl.constexpr):
    """Sorts the chosen blocks by score: each one's rank is the number of those before it."""
    tl.debug_barrier()
    mine = tl.arange(0, SHAPE.candidates_tile)
    position = tl.load(scratch.chosen + mine, mask=mine < count, other=0)
    key = tl.load(scratch.chosen + SHAPE.candidates_tile + mine, mask=mine < count, other=0)
    rank = tl.full([SHAPE.candidates_tile], 0, tl.int32)
    for first in range(0, count, 16):
        other = (first + tl.arange(0, 16))[:, None]
        their = tl.load(scratch.chosen + SHAPE.candidates_tile + other, mask=other < count, other=-0x80000000)
        before = (their > key[None, :]) | ((their == key[None, :]) & (other < mine[None, :]))
        rank += tl.sum((before & (other < count)).to(tl.int32), 0)
    block = _node_at(position, parents, parent_count, orphans, SHAPE)
    tl.store(scratch.order + rank, block, mask=mine < count)
    tl.store(scratch.order + SHAPE.candidates_tile + rank, position, mask=mine < count)


@triton.jit
def _estimates(unit: Unit, scratch: BeamScratch, first, count, SHAPE: tl.constexpr):
    """Estimated log-sum-exp of `count` blocks from the `first` in the order of reading, [group_tile, top_tile]."""
    column = tl.arange(0, SHAPE.top_tile)
    position = tl.load(scratch.order + SHAPE.candidates_tile + first + column, mask=column < count, other=0)
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    mask = unit.present[:, None] & (column < count)[None, :]
    return tl.load(scratch.log_mass + head * SHAPE.nodes_tile + position[None, :], mask=mask, other=0.0)


@triton.jit
def _read_by_gain(unit: Unit, scratch: BeamScratch, tops: TopScratch, outside, most, SHAPE: tl.constexpr):
    """Reads blocks in their order: `first_lot`, then top_k at a time while that is expected to be worth it.

    Returns:
        The `Top`, the regression of truth on estimate over all blocks read, and how many those are.
    """
    rest = clear_top(tops, SHAPE)
    head = tl.arange(0, SHAPE.group_tile)
    moments = no_moments(SHAPE)
    observed = outside
    taken = tl.full([], 0, tl.int32)
    column = tl.arange(0, SHAPE.top_tile)[None, :]
    going = most > 0
    while going:
        count = tl.minimum(most - taken, SHAPE.top_k)
        lse, key = read_blocks(unit, scratch.order + taken, count, True, SHAPE)
        lse = new_blocks(tops, lse, key, SHAPE)
        moments = join_moments(moments, _estimates(unit, scratch, taken, count, SHAPE), lse, column < count, count)
        observed = logaddexp(observed, logsumexp(lse, 1))
        rest = keep_heaviest(tops, rest, SHAPE)
        taken += count

        more = tl.minimum(most - taken, SHAPE.top_k)
        tl.debug_barrier()
        threshold = tl.load(tops.lse + head * (2 * SHAPE.top_tile) + SHAPE.top_k - 1)
        estimate = _estimates(unit, scratch, taken, more, SHAPE)
        excess = expected_excess(fit_line(moments, SHAPE), estimate, threshold, observed)
        gain = tl.sum(tl.sum(tl.where(unit.present[:, None] & (column < more), excess, 0.0), 1), 0)
        going = (more > 0) & ((taken < SHAPE.first_lot) | (gain >= SHAPE.min_gain * more))
    top = load_top(tops, rest, SHAPE)
    return top, fit_line(moments, SHAPE), taken


@triton.jit
def _unread(unit: Unit, scratch: BeamScratch, fit: Fit, top, taken, SHAPE: tl.constexpr):
    """Estimated log-sum-exp of the nodes that were scored and not looked into, after `taken` blocks were read."""
    column = tl.arange(0, SHAPE.candidates_tile)
    position = tl.load(scratch.order + SHAPE.candidates_tile + column, mask=column < taken, other=0)
    nothing = tl.full([SHAPE.candidates_tile], float("-inf"), tl.float32)
    tl.store(scratch.weight + position, nothing, mask=column < taken)
    tl.debug_barrier()
    tile = tl.arange(0, SHAPE.nodes_scanned)
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    peak = tl.full([SHAPE.group_tile, SHAPE.nodes_scanned], float("-inf"), tl.float32)
    total = tl.full([SHAPE.group_tile, SHAPE.nodes_scanned], 0.0, tl.float32)
    for level in range(top + 1):
        for first in range(0, tl.load(scratch.scored + level), SHAPE.nodes_scanned):
            at = first + tile
            within = at < tl.load(scratch.scored + level)
            place = (level * SHAPE.group + head) * SHAPE.nodes_tile + at[None, :]
            estimate = tl.load(scratch.log_mass + place, mask=unit.present[:, None] & within[None, :], other=0.0)
            weight = tl.load(scratch.weight + level * SHAPE.nodes_tile + at, mask=within, other=float("-inf"))
            mass = predicted_mean(fit, estimate) + weight[None, :]
            higher = tl.maximum(peak, mass)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - safe) + tl.exp(mass - safe)
            peak = higher
    return logsumexp(peak + tl.log(total), 1)


@triton.jit
def _own(scratch: BeamScratch, program, SHAPE: tl.constexpr):
    """The part of the working memory that belongs to a program."""
    wide = program.to(tl.int64)
    return BeamScratch(
        scratch.log_mass + wide * (SHAPE.levels * SHAPE.group * SHAPE.nodes_tile),
        scratch.weight + wide * (SHAPE.levels * SHAPE.nodes_tile),
        scratch.scored + wide * SHAPE.levels,
        scratch.again + wide * (2 * SHAPE.nodes_tile),
        scratch.kept + wide * ((SHAPE.levels + 1) * SHAPE.kept_tile),
        scratch.chosen + wide * (2 * SHAPE.candidates_tile),
        scratch.order + wide * (2 * SHAPE.candidates_tile),
    )


@triton.jit
def beam_kernel(
    cache: Cache,
    plan: Plan,
    batch: Batch,
    pyramid: Pyramid,
    out: Results,
    tops: TopScratch,
    scratch: BeamScratch,
    SHAPE: tl.constexpr,
):
    """Searches all units of all rows and layers, program by program in turn."""
    own = _own(scratch, tl.program_id(0), SHAPE)
    top_scratch = own_top(tops, tl.program_id(0), SHAPE)
    column = tl.arange(0, SHAPE.candidates_tile)
    items = item_count(batch, out, SHAPE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tl.debug_barrier()  # the last unit's reads of the scratch memory come before this one's writes
        unit = open_unit(item, cache, plan, batch, out, SHAPE)
        outside, keys = read_forced(unit, plan, out, SHAPE)
        used = used_blocks(unit, SHAPE)
        end = tl.maximum(used - SHAPE.recent_blocks, 0)
        inner = tl.maximum(end - SHAPE.sink_blocks, 0)
        few = inner <= 2 * SHAPE.top_k
        top_level = tl.where(few, -1, tl.load(pyramid.tops + end))
        most = SHAPE.candidates if SHAPE.rerank else SHAPE.top_k
        # Few blocks are all read, in any order, without a look at their summaries.
        unsorted = column < tl.where(few, inner, 0)
        tl.store(own.order + column, SHAPE.sink_blocks + column, mask=unsorted)
        tl.store(own.order + SHAPE.candidates_tile + column, column, mask=unsorted)
        # Read once more, from a cache close by; where no node is scored, not at all.
        profile = spread_profile(unit, tl.where(few, used, tl.maximum(end, SHAPE.sink_blocks)), used, SHAPE)
        query = unit.query * unit.scale
        stretch = SHAPE.spread_weight * tl.sum(query * query * profile[None, :], 1)
        scored, reads = _score_levels(unit, pyramid, own, outside, stretch, end, top_level, most, SHAPE)
        tl.debug_barrier()
        found, fit, taken = _read_by_gain(unit, own, top_scratch, outside, tl.where(few, inner, scored), SHAPE)
        unread = _unread(unit, own, fit, top_level, taken, SHAPE)
        store_unit(unit, out, found, unread, keys + reads + taken * SHAPE.block_size, item % SHAPE.units, SHAPE)
