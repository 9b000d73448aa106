"""Where the nodes of the summary pyramid live, and which of them still describe their keys.

A node is keyed by the physical page that holds its last token: every request whose block table has that page at that
place shares it. It is valid while no page it covers was given away or rewritten after the node was built. What is not
valid is built again when a row next needs it, so the nodes are a cache that may be of any size and forget anything.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import jit
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
    """[E], the last of `searches` that needed an entry."""
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
    searches: Ints
    """[1], raised by the caller before the first `resolve` of rows that are searched together (on a CPU each is alone):
    an entry that one of them needs is not given to another."""
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
        The number of jobs, or -1 if there is no room for all nodes of the search's rows at a time.
    """
    wanted = 0
    for level in range(len(index.hand)):
        _note_generations(
            level,
            end >> (FANOUT_BITS * level),
            pages,
            generations,
            index.page_size,
            index.block_size,
            index.generation,
        )
        wanted = _resolve_level(index, level, end >> (FANOUT_BITS * level), pages, snapshot, slots, jobs, wanted)
        if wanted < 0:
            return -1
    return wanted


@jit()
def _resolve_level(
    index: NodeIndex,
    level: int,
    nodes: int,
    pages: Pages,
    snapshot: int,
    slots: NDArray[np.int32],
    jobs: NDArray[np.int32],
    wanted: int,
) -> int:
    """`resolve` for the `nodes` whole nodes of a level, after `wanted` jobs of the levels below."""
    # This runs once per block of the context: arrays out of the tuple first, and no division in the loop but where a
    # page holds several nodes.
    entry_of, used, built, generation = index.entry_of[level], index.used, index.built, index.generation
    search, page_size = index.searches[0], index.page_size
    first_entry, first_slot = index.first_entry[level], index.first_slot[level]
    nodes_per_entry, row_offset = index.nodes_per_entry[level], index.row_offset[level]
    span_bits = FANOUT_BITS * level
    span_tokens = index.block_size << span_bits
    several = span_tokens < page_size  # nodes end in one page
    step_pages, step_tokens = span_tokens // page_size, span_tokens % page_size
    place, within = (span_tokens - 1) // page_size, (span_tokens - 1) % page_size  # of node 0's last token
    entry, entry_place = -1, -1
    for j in range(nodes):
        slot = NO_SLOT
        if (j + 1) << span_bits > index.sink_blocks:
            if place != entry_place:  # nodes that end in one page share its entry
                entry_place, page = place, pages[place]
                entry = entry_of[page]
                if entry < 0:
                    entry = _claim(index, level, page)
                    if entry < 0:
                        forget(index, jobs, wanted)
                        return -1
                used[entry] = search
            slot = first_slot + (entry - first_entry) * nodes_per_entry
            if several:
                slot += within // span_tokens
            if built[slot] < generation[j]:
                built[slot] = snapshot
                jobs[wanted, 0], jobs[wanted, 1], jobs[wanted, 2] = level, slot, j
                wanted += 1
        slots[row_offset + j] = slot
        place += step_pages
        within += step_tokens
        if within >= page_size:
            within -= page_size
            place += 1
    return wanted


@jit()
def forget(index: NodeIndex, jobs: NDArray[np.int32], count: int) -> None:
    """The first `count` of `jobs` do not count as built after all."""
    for job in range(count):
        index.built[jobs[job, 1]] = -1


@jit()
def _note_generations(
    level: int, nodes: int, pages: Pages, generations: Ints, page_size: int, block_size: int, latest: Ints
) -> None:
    """latest[j] = the latest generation among the pages of node j, from its pages or, in place, its children.

    In place is safe: node j is written after its children 8j to 8j + 7 were read.
    """
    if level:
        for j in range(nodes):
            newest = np.int64(0)
            for child in range(j << FANOUT_BITS, (j + 1) << FANOUT_BITS):
                newest = max(newest, latest[child])
            latest[j] = newest
    elif len(generations) == 0:
        latest[:nodes] = 0
    else:
        page, begin = 0, 0  # where the node's first token lies
        for j in range(nodes):
            newest, end = max(np.int64(0), generations[pages[page]]), begin + block_size
            while end > page_size:
                end -= page_size
                page += 1
                newest = max(newest, generations[pages[page]])
            latest[j] = newest
            begin = end
            if begin == page_size:
                page, begin = page + 1, 0


@jit()
def _claim(index: NodeIndex, level: int, page: int) -> int:
    """An entry for `page`: a free one, else one that this search does not need so far; -1 if it needs them all."""
    first, end = index.first_entry[level], index.first_entry[level + 1]
    for _ in range(end - first):
        entry = index.hand[level]
        index.hand[level] = entry + 1 if entry + 1 < end else first
        if index.used[entry] == index.searches[0]:
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
