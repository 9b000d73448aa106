"""Block summaries on a GPU: builds nodes of the pyramid that `statistics.pyramid` specifies, from a list of jobs."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

from typing import Any, NamedTuple

import triton
import triton.language as tl

from stream_kernels.gpu_keys import from_bfloat16_bits, key_pointer, load_keys, load_stride, to_bfloat16_bits
from stream_kernels.gpu_structures import Batch, Cache, Pyramid


class Jobs(NamedTuple):
    """Nodes to build."""

    nodes: Any
    """int32 [jobs, 4]: level, slot, row, number of the node in its level."""
    count: Any
    """int32 [1]."""
    room: Any
    """Most there can be."""


@triton.jit
def _farthest(vectors, distance):
    """Of vectors [N, dim_tile] the first of those at the largest distance [N], [dim_tile]."""
    chosen = tl.arange(0, distance.shape[0]) == tl.argmax(distance, 0, tie_break_left=True)
    return tl.sum(tl.where(chosen[:, None], vectors, 0.0), 0)


@triton.jit
def _store(pyramid: Pyramid, layer, slot, kv_head, mean, vectors, distance, spread, SHAPE: tl.constexpr):
    """Stores a node whose outliers are among `vectors` [N, dim_tile], at `distance` [N] from the mean."""
    channel = tl.arange(0, SHAPE.dim_tile)
    place = (layer.to(tl.int64) * pyramid.slots + slot) * SHAPE.kv_heads + kv_head
    at = pyramid.summaries + place * (SHAPE.vectors * SHAPE.head_dim) + channel
    inside = (slot >= 0) & (slot < pyramid.slots)
    mask = channel < tl.where(inside, SHAPE.head_dim, 0)
    tl.store(at, to_bfloat16_bits(mean), mask=mask)
    stored: tl.constexpr = SHAPE.vectors
    for which in tl.static_range(1, stored):
        outlier = _farthest(vectors, distance)
        tl.store(at + which * SHAPE.head_dim, to_bfloat16_bits(outlier), mask=mask)
        away = vectors - outlier[None, :]
        distance = tl.minimum(distance, tl.sum(away * away, 1))
    tl.store(pyramid.spreads + place, spread, mask=inside)


@triton.jit
def summarise_blocks_kernel(cache: Cache, batch: Batch, pyramid: Pyramid, jobs: Jobs, SHAPE: tl.constexpr):
    """Builds the nodes of level 0 among the jobs, from the keys."""
    channel = tl.arange(0, SHAPE.dim_tile)
    token = tl.arange(0, SHAPE.block_size)
    tasks = tl.minimum(tl.load(jobs.count), jobs.room) * (SHAPE.layers * SHAPE.kv_heads)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        kv_head = task % SHAPE.kv_heads
        layer = (task // SHAPE.kv_heads) % SHAPE.layers
        job = jobs.nodes + (task // (SHAPE.kv_heads * SHAPE.layers)) * 4
        if tl.load(job) == 0:
            row = tl.load(job + 2)
            position = tl.load(job + 3) * SHAPE.block_size + token
            pages = (
                batch.block_tables
                + tl.load(cache.table + layer).to(tl.int64) * batch.table_stride
                + row.to(tl.int64) * batch.table_row_stride
            )
            page = tl.load(pages + position // SHAPE.page_size)
            inside = (page >= 0) & (page < tl.load(cache.num_pages + layer))
            place = (
                page.to(tl.int64) * load_stride(cache.page_stride + layer, SHAPE)
                + position % SHAPE.page_size * load_stride(cache.token_stride + layer, SHAPE)
                + kv_head.to(tl.int64) * load_stride(cache.head_stride + layer, SHAPE)
            )
            first = key_pointer(tl.load(cache.address + layer), SHAPE)
            mask = inside[:, None] & (channel < SHAPE.head_dim)[None, :]
            keys = load_keys(first + place[:, None] + channel[None, :], mask, "float32", SHAPE)
            mean = tl.sum(keys, 0) / SHAPE.block_size
            away = keys - mean[None, :]
            distance = tl.sum(away * away, 1)
            spread = tl.sum(distance, 0) / SHAPE.block_size
            _store(pyramid, layer, tl.load(job + 1), kv_head, mean, keys, distance, spread, SHAPE)


@triton.jit
def _children(pyramid: Pyramid, layer, row, kv_head, level, node, SHAPE: tl.constexpr):
    """Of a row's nodes: pointers to their means, which of them are stored at all, and their spreads."""
    slot = tl.load(
        pyramid.node_slots + row.to(tl.int64) * pyramid.node_row_stride + tl.load(pyramid.level_offsets + level) + node
    )
    inside = (slot >= 0) & (slot < pyramid.slots)
    place = (layer.to(tl.int64) * pyramid.slots + slot) * SHAPE.kv_heads + kv_head
    at = pyramid.summaries + place * (SHAPE.vectors * SHAPE.head_dim)
    return at, inside, tl.load(pyramid.spreads + place, mask=inside, other=0.0)


@triton.jit
def node_blocks(node, level, SHAPE: tl.constexpr):
    """Blocks that a node counts: all it covers but the sinks."""
    span = tl.full([], 1, tl.int32) << (3 * level)
    return span - tl.minimum(tl.maximum(SHAPE.sink_blocks - node * span, 0), span)


@triton.jit
def summarise_nodes_kernel(level, pyramid: Pyramid, jobs: Jobs, SHAPE: tl.constexpr):
    """Builds the nodes of `level`, which is above 0, among the jobs, from the stored statistics of their children."""
    channel = tl.arange(0, SHAPE.dim_tile)
    child = tl.arange(0, SHAPE.fanout)
    outlier = tl.arange(0, SHAPE.fanout * SHAPE.outliers_tile)
    tasks = tl.minimum(tl.load(jobs.count), jobs.room) * (SHAPE.layers * SHAPE.kv_heads)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        kv_head = task % SHAPE.kv_heads
        layer = (task // SHAPE.kv_heads) % SHAPE.layers
        job = jobs.nodes + (task // (SHAPE.kv_heads * SHAPE.layers)) * 4
        if tl.load(job) == level:
            row, first = tl.load(job + 2), tl.load(job + 3) * SHAPE.fanout
            at, inside, spreads = _children(pyramid, layer, row, kv_head, level - 1, first + child, SHAPE)
            mask = inside[:, None] & (channel < SHAPE.head_dim)[None, :]
            means = from_bfloat16_bits(tl.load(at[:, None] + channel[None, :], mask=mask, other=0))
            blocks = node_blocks(first + child, level - 1, SHAPE)
            share = blocks.to(tl.float32) / tl.maximum(tl.sum(blocks, 0), 1).to(tl.float32)
            mean = tl.sum(share[:, None] * means, 0)
            away = means - mean[None, :]
            spread = tl.sum(share * (spreads + tl.sum(away * away, 1)), 0)

            # The children's outliers, child by child, filled up to a power of two.
            owner, which = first + outlier // SHAPE.outliers_tile, outlier % SHAPE.outliers_tile
            held = which < SHAPE.outlier_keys
            at, inside, _ = _children(pyramid, layer, row, kv_head, level - 1, owner, SHAPE)
            at = at + (1 + which) * SHAPE.head_dim
            mask = (inside & held)[:, None] & (channel < SHAPE.head_dim)[None, :]
            outliers = from_bfloat16_bits(tl.load(at[:, None] + channel[None, :], mask=mask, other=0))
            away = outliers - mean[None, :]
            distance = tl.where(held & (node_blocks(owner, level - 1, SHAPE) > 0), tl.sum(away * away, 1), -1.0)
            _store(pyramid, layer, tl.load(job + 1), kv_head, mean, outliers, distance, spread, SHAPE)
