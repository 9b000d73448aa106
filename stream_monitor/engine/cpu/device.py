"""The CPU side of the capture: slots, taps and the compiled search, bound to the engine's KV cache."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.cpu import CpuSearch
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.binding import Binding
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.compat.schedule import ScheduledStep
from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap
from stream_monitor.engine.paged_keys import paged_keys
from stream_monitor.engine.self_check import check_against_dense, check_ownership
from stream_monitor.records import Audit


class CpuRowSearch:
    """`RowSearch` over CPU slots: one call without the interpreter lock."""

    def __init__(self, search: CpuSearch, summary: BlockSummary, generations: BlockGenerations) -> None:
        self._search = search
        self._generations = generations
        self.summary = summary
        self.summary_bytes = search.summary_bytes

    def run(self, slot: CpuSlot) -> NDArray[np.uint8]:
        """Search the slot's rows; see `RowSearch`."""
        queries, tables, contexts, generations, taken = self._rows(slot)
        return self._search.run(queries, tables, contexts, self.summary, generations, taken)

    def audit(self, slot: CpuSlot, layer: int, row: int, head: int) -> Audit | None:
        """Judge one result; see `RowSearch`."""
        queries, tables, contexts, generations, taken = self._rows(slot)
        found = self._search.audit(layer, row, head, queries, tables, contexts, self.summary, generations, taken)
        return None if found is None else Audit(row, layer, head, found.recall, found.unobserved_error)

    def set_logit_weights(self, scales: list[float], sinks: list[Any]) -> None:
        """See `RowSearch`."""
        self._search.set_logit_weights(scales, sinks)

    def _rows(self, slot: CpuSlot) -> tuple[Any, ...]:
        rows = len(slot.labels)
        return (
            slot.sampled_queries(),
            [table[:rows] for table in slot.tables],
            slot.contexts[:rows],
            self._generations.of_block,
            slot.generations[:rows],
        )


class CpuDevice:
    """`Device` of a CPU engine.

    Args:
        layers: vLLM's attention layers to watch, in plan order.
        decode_query_len: most query rows of a decoding request.
        prompt_stride: see `prompt_rows`; 0: no rows of prompts but the last of each chunk.

    Attributes:
        waits: none; a search that comes too late loses its row.
    """

    slots: list[CpuSlot]
    search: CpuRowSearch

    def __init__(self, layers: list[Any], decode_query_len: int, prompt_stride: int = 0) -> None:
        self._decode_query_len = decode_query_len
        self._prompt_stride = prompt_stride
        self._taps = [LayerTap(index) for index in range(len(layers))]
        for layer, tap in zip(layers, self._taps, strict=True):
            layer.impl.stream_tap = tap
        self.waits = 0

    def bind(self, binding: Binding, config: SearchConfig, slots: int) -> None:
        """Compile the search for the allocated KV cache, and check it there against dense attention.

        Raises:
            LayoutError, ValueError: the cache would not be read correctly.
        """
        keys = paged_keys(binding.caches, binding.layers, binding.dtype)
        search = CpuSearch(
            keys,
            binding.total_query_heads,
            config,
            max_rows=binding.rows,
            max_context=binding.max_context,
            query_dtype=binding.dtype,
            query_heads=binding.query_heads,
        )

        def search_once(queries: torch.Tensor, tables: list[NDArray[np.int32]], context: int) -> BlockSummary:
            summary = BlockSummary.allocate(len(keys), 1, len(binding.query_heads), config)
            search.run(queries, tables, np.asarray([context], np.int32), summary)
            return summary

        check_against_dense(search_once, keys, binding, config)
        search.forget()  # what it knows of the pages that were put back
        summary = BlockSummary.allocate(len(keys), binding.rows, len(binding.query_heads), config)
        self.search = CpuRowSearch(search, summary, binding.generations)
        head_dim, pages = keys[0].layout.head_dim, binding.runner.table_pages()
        self.slots = [
            CpuSlot(
                self._taps,
                binding.rows,
                binding.total_query_heads,
                head_dim,
                pages,
                binding.dtype,
                self._decode_query_len,
                self._prompt_stride,
            )
            for _ in range(slots)
        ]
        if binding.rows >= 2 * self._decode_query_len:  # a batch of one request has nobody to be taken for
            check_ownership(self.slots[0], self.search, keys, binding, config)
            search.forget()

    def follow(self, step: ScheduledStep) -> None:
        """Nothing to do: generations say all."""

    def take_tap_ns(self) -> int:
        """See `Device`."""
        spent = sum(tap.ns for tap in self._taps)
        for tap in self._taps:
            tap.ns = 0
        return spent

    def stop(self) -> None:
        """Keep no rows any more."""
        for tap in self._taps:
            tap.slot = None
