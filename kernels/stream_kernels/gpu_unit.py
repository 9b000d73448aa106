"""What every strategy on a GPU does with a unit: forced blocks first, full reads of the candidates, results last."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_keys import logaddexp, logsumexp, read_blocks, read_keys
from stream_kernels.gpu_selection import clear_top, keep_heaviest, load_top, new_blocks
from stream_kernels.gpu_structures import Batch, Plan, Results, Top, TopScratch, Unit


@triton.jit
def item_count(batch: Batch, out: Results, SHAPE: tl.constexpr):
    """(Row, layer, unit) items of a call; never more rows than there is room for."""
    return tl.minimum(tl.load(batch.rows), out.rows) * (SHAPE.layers * SHAPE.units)


@triton.jit
def used_blocks(unit: Unit, SHAPE: tl.constexpr):
    """Blocks of the row's context, the ragged last one included."""
    return (unit.context + SHAPE.block_size - 1) // SHAPE.block_size


@triton.jit
def head_place(unit: Unit, out: Results, SHAPE: tl.constexpr):
    """Index of each of the unit's heads in an output of [L, rows, H], int64 [group_tile]."""
    return (unit.layer.to(tl.int64) * out.rows + unit.row) * SHAPE.query_heads + unit.slot


@triton.jit
def read_forced(unit: Unit, plan: Plan, out: Results, SHAPE: tl.constexpr):
    """Reads and writes the forced blocks and the learned sinks.

    Returns:
        float32 [group_tile], log-sum-exp of what is read whatever the search does; and the keys read.
    """
    FORCED: tl.constexpr = SHAPE.sink_blocks + SHAPE.recent_blocks
    used = used_blocks(unit, SHAPE)
    heads = head_place(unit, out, SHAPE)
    window = used - SHAPE.recent_blocks
    column = tl.arange(0, SHAPE.top_tile)
    outside = tl.full([SHAPE.group_tile], float("-inf"), tl.float32)
    for first in range(0, FORCED, SHAPE.top_tile):
        blocks = (first, SHAPE.sink_blocks, window - SHAPE.sink_blocks)
        lse, key = read_blocks(unit, blocks, tl.minimum(FORCED - first, SHAPE.top_tile), False, SHAPE)
        outside = logaddexp(outside, logsumexp(lse, 1))
        at = heads[:, None] * FORCED + (first + column)[None, :]
        mask = unit.present[:, None] & (first + column < FORCED)[None, :]
        tl.store(out.forced_lse + at, lse, mask=mask)
        tl.store(out.forced_strongest + at, (key % SHAPE.block_size).to(tl.uint8), mask=mask)
    learned = tl.load(plan.sinks + unit.layer * SHAPE.query_heads + unit.slot, mask=unit.present, other=float("-inf"))
    learned = tl.where(unit.context > 0, learned, float("-inf"))
    tl.store(out.learned_sink_lse + heads, learned, mask=unit.present)
    # All of them are full but the last one of the context, which is always forced.
    sinks = tl.minimum(used, SHAPE.sink_blocks)
    recent = tl.maximum(window, SHAPE.sink_blocks)
    keys = (sinks + tl.maximum(used - recent, 0)) * SHAPE.block_size - (used * SHAPE.block_size - unit.context)
    return logaddexp(outside, learned), keys


@triton.jit
def spread_profile(unit: Unit, first, end, SHAPE: tl.constexpr):
    """`statistics.spread_profile` of blocks `first` to `end`, the last of the context: float32 [dim_tile], of which the
    channels beyond `head_dim` mean nothing."""
    key = tl.arange(0, SHAPE.profile_tile * SHAPE.block_size)
    variance = tl.full([SHAPE.dim_tile], 0.0, tl.float32)
    for start in range(first, end, SHAPE.profile_tile):
        tokens = start * SHAPE.block_size + key
        keys, there = read_keys(unit, tokens, tokens < unit.context, "float32", SHAPE)
        keys = tl.reshape(keys, [SHAPE.profile_tile, SHAPE.block_size, SHAPE.dim_tile])
        weight = tl.reshape(there.to(tl.float32), [SHAPE.profile_tile, SHAPE.block_size])
        mean = tl.sum(keys, 1) / tl.maximum(tl.sum(weight, 1), 1.0)[:, None]
        away = (keys - mean[:, None, :]) * weight[:, :, None]
        variance += tl.sum(tl.sum(away * away, 1), 0)
    total = tl.sum(variance, 0)
    return tl.where(total > 0.0, variance / tl.where(total > 0.0, total, 1.0), 1.0 / SHAPE.head_dim)


@triton.jit
def read_candidates(unit: Unit, listed, first, count, scratch: TopScratch, LISTED: tl.constexpr, SHAPE: tl.constexpr):
    """The `Top` of `count` blocks: those in `listed`, or from block `first` of the context on."""
    rest = clear_top(scratch, SHAPE)
    for start in range(0, count, SHAPE.top_tile):
        blocks = listed + start if LISTED else (first + start, 0, 0)
        lse, key = read_blocks(unit, blocks, tl.minimum(count - start, SHAPE.top_tile), LISTED, SHAPE)
        new_blocks(scratch, lse, key, SHAPE)
        rest = keep_heaviest(scratch, rest, SHAPE)
    return load_top(scratch, rest, SHAPE)


@triton.jit
def store_unit(unit: Unit, out: Results, top: Top, unread, keys_read, unit_number, SHAPE: tl.constexpr):
    """Writes what a search found. `unread` is the estimated log-sum-exp of the blocks not read, [group_tile]."""
    heads = head_place(unit, out, SHAPE)
    column = tl.arange(0, SHAPE.top_tile)[None, :]
    at = heads[:, None] * SHAPE.top_k + column
    mask = unit.present[:, None] & (column < SHAPE.top_k)
    none = top.lse == float("-inf")
    tl.store(out.block_ids + at, tl.where(none, -1, top.key // SHAPE.block_size), mask=mask)
    tl.store(out.block_lse + at, top.lse, mask=mask)
    tl.store(out.strongest + at, tl.where(none, 0, top.key % SHAPE.block_size).to(tl.uint8), mask=mask)
    tl.store(out.unobserved_lse + heads, logaddexp(unread, top.rest), mask=unit.present)
    place = (unit.layer.to(tl.int64) * out.rows + unit.row) * SHAPE.units + unit_number
    tl.store(out.unit_keys_read + place, keys_read.to(tl.float32))
