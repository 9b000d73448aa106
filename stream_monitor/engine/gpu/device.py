"""The GPU side of the capture: row buffers at load, slots and search once the KV cache exists, waits while it runs."""

from collections import deque
from typing import Any

import numpy as np
import torch

from stream_kernels.gpu_setup import programs_on
from stream_kernels.search import SearchConfig
from stream_monitor.engine.binding import Binding
from stream_monitor.engine.compat.runner import RunnerView
from stream_monitor.engine.compat.schedule import ScheduledStep
from stream_monitor.engine.gpu.rows import GatherTap, GpuSlot, RowBuffers
from stream_monitor.engine.gpu.search import GpuRowSearch
from stream_monitor.engine.gpu.streams import streams_of
from stream_monitor.engine.gpu.tables import HostTables
from stream_monitor.engine.paged_keys import device_keys
from stream_monitor.engine.self_check import check_against_dense


class GpuDevice:
    """`Device` of a CUDA engine.

    Args:
        layers: vLLM's attention layers to watch, in plan order.
        runner: exists, its KV cache does not yet.
        requests: most requests of a batch.
        decode_query_len: most query rows of a decoding request.
        dtype: of the model's queries.
        share: of the GPU's multiprocessors, the part that a search may occupy.
        prompt_stride, tokens: see `prompt_rows`, and most query tokens of a batch.
    """

    slots: list[GpuSlot]
    search: GpuRowSearch

    def __init__(
        self,
        layers: list[Any],
        runner: RunnerView,
        requests: int,
        decode_query_len: int,
        dtype: torch.dtype,
        share: float,
        prompt_stride: int = 0,
        tokens: int = 0,
    ) -> None:
        first = layers[0]
        self._buffers = RowBuffers(
            len(layers),
            requests,
            first.num_heads,
            first.head_size,
            dtype,
            runner.query_start_loc(),
            decode_query_len,
            prompt_stride,
            tokens,
        )
        for index, layer in enumerate(layers):
            layer.impl.stream_tap = GatherTap(self._buffers, index)
        self._layers = layers
        self._share = share
        self._streams = streams_of(self._buffers.rows.device)
        self._reading: deque[GpuSlot] = deque()
        self.waits = 0

    def bind(self, binding: Binding, config: SearchConfig, slots: int) -> None:
        """Build the search over the allocated KV cache, and check it there against dense attention.

        Raises:
            LayoutError, ValueError: the cache would not be read correctly.
        """
        keys = device_keys(binding.caches, binding.layers)
        groups = sorted({layer.table for layer in keys})
        page_tokens = binding.runner.block_tokens()
        inputs = binding.runner.device_inputs()
        self._tables = HostTables(groups, binding.runner.table_pages())
        self.search = GpuRowSearch(
            keys,
            binding.total_query_heads,
            config,
            table=groups[0],
            table_pages=max(inputs.block_tables[group].shape[1] for group in groups),
            max_rows=binding.rows,
            max_context=binding.max_context,
            query_dtype=binding.dtype,
            slot_dtype=binding.query_dtype,
            query_heads=binding.query_heads,
            generations=binding.generations,
            max_programs=max(1, int(self._share * programs_on(self._buffers.rows.device))),
            streams=self._streams,
        )
        self.slots = [
            GpuSlot(
                self._buffers, inputs, self._tables, groups, page_tokens, binding.rows, self._streams, self._reading
            )
            for _ in range(slots)
        ]
        check_against_dense(lambda *row: self.search.search_once(self.slots[0], *row), keys, binding, config)

    def follow(self, step: ScheduledStep) -> None:
        """Copy the step's changes of block tables, and hold the device back where the step may rewrite a block that a
        search still reads.

        Only rows of requests that are not going on can have lost a block: whoever is scheduled owns what it has. Of
        searches that are not enqueued yet nothing is waited for; the block's generation makes their rows raced.
        """
        while self._reading and self._reading[0].finished:
            self._reading.popleft()
        if self._reading:
            given = [block for request in step.requests for block in request.rewritten_blocks]
            given += step.rewritten_blocks
            if given:
                self._hold_back(given, {request.request_id for request in step.requests if not request.fresh})
        self._tables.follow(step)

    def _hold_back(self, given: list[int], going_on: set[str]) -> None:
        for slot in reversed(self._reading):
            lost = [row for row, label in enumerate(slot.labels) if label.request_id not in going_on]
            if slot.launched and any(np.isin(given, pages[row]).any() for pages in slot.pages.values() for row in lost):
                # One side stream: what was enqueued before this search is done as well.
                slot.done.wait()
                self.waits += 1
                return

    def take_tap_ns(self) -> int:
        """None: the taps are launches, most of them inside the engine's CUDA graphs."""
        return 0

    def stop(self) -> None:
        """Keep no rows any more; nodes of captured graphs go on, into memory that nobody reads."""
        for layer in self._layers:
            layer.impl.stream_tap = None
