"""What every strategy on a GPU does with a unit: forced blocks first, full reads of the candidates, results last."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_keys import logaddexp, logsumexp, read_blocks, read_keys
from stream_kernels.gpu_selection import empty_top, fold
from stream_kernels.gpu_structures import Batch, Plan, Results, Top, Unit


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
def _read_forced(unit: Unit, out: Results, place, first, end, SHAPE: tl.constexpr):
    """Reads blocks `first` to `end` and writes them from forced place `place` on; their log-sum-exp [group_tile]."""
    FORCED: tl.constexpr = SHAPE.sink_blocks + SHAPE.recent_blocks
    total = tl.full([SHAPE.group_tile], float("-inf"), tl.float32)
    column = tl.arange(0, SHAPE.top_tile)
    heads = head_place(unit, out, SHAPE)
    for start in range(first, end, SHAPE.top_tile):
        count = tl.minimum(end - start, SHAPE.top_tile)
        lse, key = read_blocks(unit, unit.pages, start, count, False, SHAPE)
        total = logaddexp(total, logsumexp(lse, 1))
        at = heads[:, None] * FORCED + (place + start - first + column)[None, :]
        mask = unit.present[:, None] & (column < count)[None, :]
        tl.store(out.forced_lse + at, lse, mask=mask)
        tl.store(out.forced_strongest + at, (key % SHAPE.block_size).to(tl.uint8), mask=mask)
    return total


@triton.jit
def read_forced(unit: Unit, plan: Plan, out: Results, SHAPE: tl.constexpr):
    """Reads and writes the forced blocks and the learned sinks.

    Returns:
        float32 [group_tile], log-sum-exp of what is read whatever the search does; and the keys read.
    """
    FORCED: tl.constexpr = SHAPE.sink_blocks + SHAPE.recent_blocks
    used = used_blocks(unit, SHAPE)
    heads = head_place(unit, out, SHAPE)
    sinks = tl.minimum(used, SHAPE.sink_blocks)
    window = used - SHAPE.recent_blocks
    recent = tl.maximum(window, SHAPE.sink_blocks)
    forced = tl.arange(0, SHAPE.forced_tile)
    absent = tl.where(forced < SHAPE.sink_blocks, forced >= sinks, window + forced - SHAPE.sink_blocks < recent)
    mask = unit.present[:, None] & (absent & (forced < FORCED))[None, :]
    at = heads[:, None] * FORCED + forced[None, :]
    tl.store(out.forced_lse + at, tl.full(at.shape, float("-inf"), tl.float32), mask=mask)
    tl.store(out.forced_strongest + at, tl.full(at.shape, 0, tl.uint8), mask=mask)
    outside = logaddexp(
        _read_forced(unit, out, 0, 0, sinks, SHAPE),
        _read_forced(unit, out, SHAPE.sink_blocks + recent - window, recent, used, SHAPE),
    )
    learned = tl.load(plan.sinks + unit.layer * SHAPE.query_heads + unit.slot, mask=unit.present, other=float("-inf"))
    learned = tl.where(unit.context > 0, learned, float("-inf"))
    tl.store(out.learned_sink_lse + heads, learned, mask=unit.present)
    # All of them are full but the last one of the context, which is always forced.
    keys = (sinks + tl.maximum(used - recent, 0)) * SHAPE.block_size - (used * SHAPE.block_size - unit.context)
    return logaddexp(outside, learned), keys


@triton.jit
def spread_profile(unit: Unit, first, end, SHAPE: tl.constexpr):
    """`statistics.spread_profile` of blocks `first` to `end`, the last of the context: float32 [dim_tile], of which the
    channels beyond `head_dim` mean nothing."""
    key = tl.arange(0, SHAPE.read_tile * SHAPE.block_size)
    variance = tl.full([SHAPE.dim_tile], 0.0, tl.float32)
    for start in range(first, end, SHAPE.read_tile):
        tokens = start * SHAPE.block_size + key
        keys, there = read_keys(unit, tokens, tokens < unit.context, SHAPE)
        keys = tl.reshape(keys, [SHAPE.read_tile, SHAPE.block_size, SHAPE.dim_tile])
        weight = tl.reshape(there.to(tl.float32), [SHAPE.read_tile, SHAPE.block_size])
        mean = tl.sum(keys, 1) / tl.maximum(tl.sum(weight, 1), 1.0)[:, None]
        away = (keys - mean[:, None, :]) * weight[:, :, None]
        variance += tl.sum(tl.sum(away * away, 1), 0)
    total = tl.sum(variance, 0)
    return tl.where(total > 0.0, variance / tl.where(total > 0.0, total, 1.0), 1.0 / SHAPE.head_dim)


@triton.jit
def read_candidates(unit: Unit, listed, first, count, LISTED: tl.constexpr, SHAPE: tl.constexpr):
    """The `Top` of `count` blocks, given as to `read_blocks`."""
    top = empty_top(SHAPE)
    for start in range(0, count, SHAPE.top_tile):
        lse, key = read_blocks(unit, listed, first + start, tl.minimum(count - start, SHAPE.top_tile), LISTED, SHAPE)
        top = fold(top, lse, key, SHAPE)
    return top


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
