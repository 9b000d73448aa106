"""The host's side of block summaries: which node of which request has which slot, and what must be built."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.nodes import NO_SLOT, NodeIndex
from stream_kernels.search import SearchConfig
from stream_kernels.statistics import FANOUT, top_level

__all__ = ["NO_SLOT", "Levels", "allocate_index", "levels_for", "summary_bytes"]


@dataclass(frozen=True)
class Levels:
    """The pyramid that contexts of up to a length need."""

    count: int
    """Levels; the search never starts above the last."""
    most_scored: int
    """Most nodes of one level that one search scores."""
    tops: NDArray[np.int32]
    """[end + 1], the level where the search starts, where the blocks to search end before `end`."""


def levels_for(config: SearchConfig, max_context: int) -> Levels:
    """Starting levels of every context up to `max_context` tokens."""
    most = max(0, -(-max_context // config.block_size) - config.recent_blocks)
    end = torch.arange(most + 1)
    possible = 1
    while FANOUT**possible <= most:
        possible += 1
    tops = top_level(end, config.box_width, possible)
    scored = (end // FANOUT**tops).clamp(min=FANOUT * config.box_width + FANOUT - 1)
    return Levels(
        count=int(tops.max()) + 1,
        most_scored=max(1, min(most, int(scored.max()))),
        tops=tops.int().numpy(),
    )


def allocate_index(config: SearchConfig, levels: Levels, page_size: int, num_pages: int, max_context: int) -> NodeIndex:
    """An index with room for one node per block of the whole cache, and one per 8 nodes on every level above.

    More would be needed only where many requests share long prefixes and part inside a node; then the nodes needed
    longest ago make room and are built again when next needed.
    """
    blocks = max_context // config.block_size
    per_entry, entries = [], []
    for level in range(levels.count):
        span = config.block_size * FANOUT**level
        per_entry.append(-(-page_size // span))
        fair = min(num_pages, -(-num_pages * page_size // span))
        own = min(-(-max_context // page_size), max_context // span) + 1  # a row never lacks room by itself
        entries.append(max(fair, own))
    first_entry = np.concatenate([[0], np.cumsum(entries)]).astype(np.int64)
    slots = np.array(entries, np.int64) * np.array(per_entry, np.int64)
    row_nodes = [blocks // FANOUT**level for level in range(levels.count)]
    return NodeIndex(
        page_size=page_size,
        block_size=config.block_size,
        sink_blocks=config.sink_blocks,
        entry_of=np.full((levels.count, num_pages), -1, np.int32),
        owner=np.full(first_entry[-1], -1, np.int32),
        used=np.zeros(first_entry[-1], np.int64),
        first_entry=first_entry,
        first_slot=np.concatenate([[0], np.cumsum(slots)[:-1]]).astype(np.int64),
        nodes_per_entry=np.array(per_entry, np.int64),
        built=np.full(int(slots.sum()), -1, np.int64),
        hand=first_entry[:-1].copy(),
        searches=np.zeros(1, np.int64),
        generation=np.zeros(max(1, blocks), np.int64),
        row_offset=np.concatenate([[0], np.cumsum(row_nodes)]).astype(np.int64),
    )


def summary_bytes(
    config: SearchConfig, page_size: int, num_pages: int, max_context: int, layers: int, kv_heads: int, head_dim: int
) -> int:
    """Bytes that the summaries of a cache take: per node, layer and KV head a mean and the outliers in bfloat16 and a
    float32; and the index."""
    index = allocate_index(config, levels_for(config, max_context), page_size, num_pages, max_context)
    arrays = (part for part in index if isinstance(part, np.ndarray))
    return len(index.built) * layers * kv_heads * ((1 + config.outlier_keys) * head_dim * 2 + 4) + sum(
        array.nbytes for array in arrays
    )
