"""The host's own copy of the requests' block tables: model runner V2 keeps them on the device alone.

Needed to find a row's block summaries, and to see whether a block that is about to be rewritten is still being read.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_monitor.engine.compat.schedule import ScheduledRequest, ScheduledStep

Pages = NDArray[np.int32]


@dataclass(slots=True)
class _Table:
    pages: Pages
    count: int = 0

    def extend(self, block_ids: list[int]) -> None:
        end = self.count + len(block_ids)
        self.pages[self.count : end] = block_ids
        self.count = end


class HostTables:
    """Tables of every request that holds blocks, for some KV cache groups.

    Args:
        groups: the KV cache groups to follow.
        pages: most pages of a request, per group of the engine.
    """

    def __init__(self, groups: list[int], pages: list[int]) -> None:
        self._widths = {group: pages[group] for group in groups}
        self._tables: dict[str, dict[int, _Table]] = {}

    def follow(self, step: ScheduledStep) -> None:
        """Requests that ended or begin, and blocks that were added."""
        for request_id in step.finished:
            self._tables.pop(request_id, None)
        for request in step.requests:
            if request.block_ids:
                self._add(request)

    def _add(self, request: ScheduledRequest) -> None:
        tables = self._tables.get(request.request_id)
        if tables is None or request.fresh:
            # A new array, since rows of the request's earlier life may still refer to the old one.
            tables = {group: _Table(np.zeros(width, np.int32)) for group, width in self._widths.items()}
            self._tables[request.request_id] = tables
        for group, table in tables.items():
            table.extend(request.block_ids[group])

    def pages(self, request_id: str, group: int, count: int) -> Pages:
        """The first `count` pages of a request, a view that later steps do not change.

        Raises:
            KeyError: the request is not known. ValueError: it holds fewer pages.
        """
        table = self._tables[request_id][group]
        if count > table.count:
            raise ValueError(f"request holds {table.count} pages of group {group}, and its row needs {count}")
        return table.pages[:count]
