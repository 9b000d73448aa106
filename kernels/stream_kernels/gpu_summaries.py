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
def _store(pyramid: Pyramid, layer, slot, kv_head, mean, outlier, spread, SHAPE: tl.constexpr):
    channel = tl.arange(0, SHAPE.dim_tile)
    place = (layer.to(tl.int64) * pyramid.slots + slot) * SHAPE.kv_heads + kv_head
    at = pyramid.summaries + place * (2 * SHAPE.head_dim) + channel
    inside = (slot >= 0) & (slot < pyramid.slots)
    mask = channel < tl.where(inside, SHAPE.head_dim, 0)
    tl.store(at, to_bfloat16_bits(mean), mask=mask)
    tl.store(at + SHAPE.head_dim, to_bfloat16_bits(outlier), mask=mask)
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
                + (position % SHAPE.page_size).to(tl.int64) * load_stride(cache.token_stride + layer, SHAPE)
                + kv_head * load_stride(cache.head_stride + layer, SHAPE)
            )
            first = key_pointer(tl.load(cache.address + layer), SHAPE)
            mask = inside[:, None] & (channel < SHAPE.head_dim)[None, :]
            keys = load_keys(first + place[:, None] + channel[None, :], mask, SHAPE)
            mean = tl.sum(keys, 0) / SHAPE.block_size
            away = keys - mean[None, :]
            distance = tl.sum(away * away, 1)
            spread = tl.sum(distance, 0) / SHAPE.block_size
            _store(pyramid, layer, tl.load(job + 1), kv_head, mean, _farthest(keys, distance), spread, SHAPE)


@triton.jit
def summarise_nodes_kernel(level, pyramid: Pyramid, jobs: Jobs, SHAPE: tl.constexpr):
    """Builds the nodes of `level`, which is above 0, among the jobs, from the stored statistics of their children."""
    channel = tl.arange(0, SHAPE.dim_tile)
    child = tl.arange(0, SHAPE.fanout)
    span = tl.full([], 1, tl.int32) << (3 * (level - 1))
    tasks = tl.minimum(tl.load(jobs.count), jobs.room) * (SHAPE.layers * SHAPE.kv_heads)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        kv_head = task % SHAPE.kv_heads
        layer = (task // SHAPE.kv_heads) % SHAPE.layers
        job = jobs.nodes + (task // (SHAPE.kv_heads * SHAPE.layers)) * 4
        if tl.load(job) == level:
            node = tl.load(job + 3) * SHAPE.fanout + child
            slot = tl.load(
                pyramid.node_slots
                + tl.load(job + 2).to(tl.int64) * pyramid.node_row_stride
                + tl.load(pyramid.level_offsets + level - 1)
                + node
            )
            inside = (slot >= 0) & (slot < pyramid.slots)
            place = (layer.to(tl.int64) * pyramid.slots + slot) * SHAPE.kv_heads + kv_head
            at = pyramid.summaries + place[:, None] * (2 * SHAPE.head_dim) + channel[None, :]
            mask = inside[:, None] & (channel < SHAPE.head_dim)[None, :]
            means = from_bfloat16_bits(tl.load(at, mask=mask, other=0))
            outliers = from_bfloat16_bits(tl.load(at + SHAPE.head_dim, mask=mask, other=0))
            spreads = tl.load(pyramid.spreads + place, mask=inside, other=0.0)
            blocks = span - tl.minimum(tl.maximum(SHAPE.sink_blocks - node * span, 0), span)
            share = blocks.to(tl.float32) / tl.maximum(tl.sum(blocks, 0), 1).to(tl.float32)
            mean = tl.sum(share[:, None] * means, 0)
            away = means - mean[None, :]
            spread = tl.sum(share * (spreads + tl.sum(away * away, 1)), 0)
            away = outliers - mean[None, :]
            distance = tl.where(blocks > 0, tl.sum(away * away, 1), -1.0)
            _store(pyramid, layer, tl.load(job + 1), kv_head, mean, _farthest(outliers, distance), spread, SHAPE)
