"""The node index for a search on a GPU: which node of which row has which slot, and what must be built there.

The nodes themselves are on the device; the index is the one of the search on the CPU (`nodes`).
"""

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from stream_kernels.compiling import cached_jit
from stream_kernels.cpu_kernel.intrinsics import pointer
from stream_kernels.cpu_kernel.nodes import NodeIndex, resolve
from stream_kernels.cpu_kernel.structures import Ints


@cached_jit()
def resolve_rows(
    index: NodeIndex,
    first_row: int,
    tables: Ints,
    ends: Ints,
    generations_address: int,
    generations_count: int,
    snapshots: Ints,
    slots: NDArray[np.int32],
    listed: NDArray[np.int32],
    jobs: NDArray[np.int32],
    counts: Ints,
) -> None:
    """`resolve` for the rows from `first_row` on, as long as there is room for what they may need.

    Args:
        tables: int64 [R, 2], address and length of each row's pages, int32.
        ends: [R], blocks to search end before; 0 for a row without nodes.
        generations_address, generations_count: of every page, int64; another thread may write them.
        snapshots: [R].
        slots: [R, nodes], filled for each row.
        listed: [J', 3], working memory for the jobs of one row.
        jobs: [J, 4], filled with (level, slot, row, node).
        counts: int64 [3], set to the rows done, counted from 0; the jobs listed; and the rows without room in the
            index, whose entry in `ends` is set to -1.
    """
    generations = numba.carray(pointer(generations_address, types.int64), (generations_count,))
    counts[:] = 0
    row = first_row
    while row < len(ends) and counts[1] + len(listed) <= len(jobs):
        if ends[row] > 0:
            pages = numba.carray(pointer(tables[row, 0], types.int32), (tables[row, 1],))
            wanted = resolve(index, pages, ends[row], generations, snapshots[row], slots[row], listed)
            if wanted < 0:
                ends[row] = -1
                counts[2] += 1
            for job in range(wanted):
                place = counts[1] + job
                jobs[place, 0], jobs[place, 1] = listed[job, 0], listed[job, 1]
                jobs[place, 2], jobs[place, 3] = row, listed[job, 2]
            counts[1] += max(wanted, 0)
        row += 1
    counts[0] = row


@cached_jit()
def latest_generations(tables: Ints, generations_address: int, generations_count: int, latest: Ints) -> None:
    """The latest generation among each row's pages, into `latest` [R]; -1 where a page is out of range."""
    generations = numba.carray(pointer(generations_address, types.int64), (generations_count,))
    for row in range(len(latest)):
        pages = numba.carray(pointer(tables[row, 0], types.int32), (tables[row, 1],))
        newest = np.int64(0)
        for i in range(len(pages)):
            if not 0 <= pages[i] < generations_count:
                newest = np.int64(-1)
                break
            newest = max(newest, generations[pages[i]])
        latest[row] = newest
