"""Where the nodes of the summary pyramid live, and which of them still describe their keys.

A node is keyed by the physical page that holds its last token: every request whose block table has that page at that
place shares it. It is valid while no page it covers was given away or rewritten after the node was built. What is not
valid is built again when a row next needs it, so the nodes are a cache that may be of any size and forget anything.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.compiling import jit
from stream_kernels.cpu_kernel.structures import Ints, Pages

FANOUT_BITS = 3
"""Nodes of level l + 1 cover 2**3 = 8 nodes of level l."""

NO_SLOT = -1


class NodeIndex(NamedTuple):
    """State of the nodes of one block table's layers: NL levels, P pages, E entries, S slots.

    An entry is the room for the nodes whose last token lies in one page: several where a page is longer than a node.
    """

    page_size: int
    block_size: int
    sink_blocks: int
    entry_of: NDArray[np.int32]
    """[NL, P], the entry of a page at a level, -1 for none."""
    owner: NDArray[np.int32]
    """[E], the page of an entry, -1 for none."""
    used: Ints
    """[E], the last call of `resolve` that needed an entry."""
    first_entry: Ints
    """[NL + 1], where a level's entries begin."""
    first_slot: Ints
    """[NL], the slot of a level's first entry."""
    nodes_per_entry: Ints
    """[NL]"""
    built: Ints
    """[S], the generation whose keys a slot describes, -1 for none."""
    hand: Ints
    """[NL], the entry that is looked at next when room is needed."""
    calls: Ints
    """[1], calls of `resolve` so far."""
    generation: Ints
    """[N], working memory: the latest generation among a node's pages."""
    row_offset: Ints
    """[NL + 1], where a level's nodes begin in a row of slots."""


@jit()
def resolve(
    index: NodeIndex,
    pages: Pages,
    end: int,
    generations: Ints,
    snapshot: int,
    slots: NDArray[np.int32],
    jobs: NDArray[np.int32],
) -> int:
    """Finds a slot for every whole node over blocks 0 to `end` of a row, and lists those that must be built.

    Args:
        pages: the row's block table; pages that hold a token below `end * block_size` are in range.
        generations: of every page; empty where nothing guards them.
        snapshot: the row's generation, at least that of each of its pages.
        slots: filled with the slot of node j of level l at row_offset[l] + j; -1 where it holds sink blocks alone.
        jobs: [J, 3], filled with (level, slot, j), lower levels first. Nodes listed count as built by this snapshot.

    Returns:
        The number of jobs, or -1 if there is no room for all nodes of the row at a time.
    """
    index.calls[0] += 1
    wanted = 0
    for level in range(len(index.hand)):
        span_bits = FANOUT_BITS * level
        span_tokens = index.block_size << span_bits
        for j in range(end >> span_bits):
            _note_generation(index, level, j, pages, generations)
            at = index.row_offset[level] + j
            slots[at] = NO_SLOT
            if (j + 1) << span_bits <= index.sink_blocks:
                continue
            last = (j + 1) * span_tokens - 1
            page = pages[last // index.page_size]
            entry = index.entry_of[level, page]
            if entry < 0:
                entry = _claim(index, level, page)
                if entry < 0:
                    forget(index, jobs, wanted)
                    return -1
            index.used[entry] = index.calls[0]
            within = last % index.page_size // span_tokens if span_tokens < index.page_size else 0
            slot = index.first_slot[level] + (entry - index.first_entry[level]) * index.nodes_per_entry[level] + within
            slots[at] = slot
            if index.built[slot] < index.generation[j]:
                index.built[slot] = snapshot
                jobs[wanted, 0], jobs[wanted, 1], jobs[wanted, 2] = level, slot, j
                wanted += 1
    return wanted


@jit()
def forget(index: NodeIndex, jobs: NDArray[np.int32], count: int) -> None:
    """The first `count` of `jobs` do not count as built after all."""
    for job in range(count):
        index.built[jobs[job, 1]] = -1


@jit()
def _note_generation(index: NodeIndex, level: int, j: int, pages: Pages, generations: Ints) -> None:
    """index.generation[j] = the latest generation among the pages of node j, from its pages or, in place, its children.

    In place is safe: node j is written after its children 8j to 8j + 7 were read.
    """
    latest = np.int64(0)
    if level:
        for child in range(j << FANOUT_BITS, (j + 1) << FANOUT_BITS):
            latest = max(latest, index.generation[child])
    elif len(generations):
        first = j * index.block_size
        for page in range(first // index.page_size, (first + index.block_size - 1) // index.page_size + 1):
            latest = max(latest, generations[pages[page]])
    index.generation[j] = latest


@jit()
def _claim(index: NodeIndex, level: int, page: int) -> int:
    """An entry for `page`: a free one, else one that this call does not need; -1 if it needs them all."""
    first, end = index.first_entry[level], index.first_entry[level + 1]
    for _ in range(end - first):
        entry = index.hand[level]
        index.hand[level] = entry + 1 if entry + 1 < end else first
        if index.used[entry] == index.calls[0]:
            continue
        if index.owner[entry] >= 0:
            index.entry_of[level, index.owner[entry]] = -1
        index.owner[entry] = page
        index.entry_of[level, page] = entry
        count = index.nodes_per_entry[level]
        slot = index.first_slot[level] + (entry - first) * count
        index.built[slot : slot + count] = -1
        return int(entry)
    return -1
