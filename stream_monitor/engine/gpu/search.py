"""One search of a slot's rows on the side stream: find nodes, launch, bring the results home. Estimator thread only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.device_nodes import latest_generations, resolve_rows
from stream_kernels.gpu import ROW_INVALID, ROW_OK, GpuSearch
from stream_kernels.gpu_result import DeviceSummary
from stream_kernels.index import allocate_index, levels_for
from stream_kernels.layout import DeviceKeys
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.gpu.rows import GpuSlot
from stream_monitor.engine.gpu.streams import Streams
from stream_monitor.records import Audit

ROW_RACED = 1
"""As in the CPU's search: one of the row's blocks may have been rewritten before it was read."""

_JOBS_AT_A_TIME = 1 << 16
"""Nodes whose building one upload asks for; a step with more of them asks again."""


class GpuRowSearch:
    """`RowSearch` over GPU slots.

    Args:
        keys: the watched layers' caches.
        table: KV cache group whose pages the block summaries are found by; all watched layers are of it under beam.
        table_pages: columns of the slots' block tables.
        max_programs: bound of the grid.
        query_dtype: what queries are searched with in; slots whose queries have 8 bits are widened.
        slot_dtype: element type of the slots' queries.
        max_rows, max_context, query_heads, total_query_heads: as `GpuSearch` has them.
    """

    def __init__(
        self,
        keys: Sequence[DeviceKeys],
        total_query_heads: int,
        config: SearchConfig,
        *,
        table: int,
        table_pages: int,
        max_rows: int,
        max_context: int,
        query_dtype: torch.dtype,
        slot_dtype: torch.dtype,
        query_heads: Sequence[int],
        generations: BlockGenerations,
        max_programs: int,
        streams: Streams,
    ) -> None:
        self._config, self._table, self._generations, self._streams = config, table, generations, streams
        page_size, pages = keys[0].layout.page_size, min(layer.num_pages for layer in keys)
        self._beam = config.strategy == "beam"
        # Without summaries the index is of one page, and never asked.
        index_context, index_pages = (max_context, pages) if self._beam else (config.block_size, 1)
        self._index = allocate_index(config, levels_for(config, index_context), page_size, index_pages, index_context)
        nodes = max(1, int(self._index.row_offset[-1]))

        def build(search: SearchConfig, rows: int) -> GpuSearch:
            summaries = search.strategy == "beam"
            return GpuSearch(
                keys,
                total_query_heads,
                search,
                max_rows=rows,
                max_context=max_context,
                query_dtype=query_dtype,
                query_heads=query_heads,
                summary_slots=len(self._index.built) if summaries else 0,
                level_offsets=self._index.row_offset.tolist() if summaries else (),
                max_programs=max_programs,
            )

        self._search = build(config, max_rows)
        # An audit is an exact search of one row, in all layers and heads.
        self._exact = build(replace(config, strategy="exact"), 1)
        device, pinned = self._search.device, self._search.device.type == "cuda"

        def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Pinned memory and its counterpart on the device."""
            return (
                torch.zeros(shape, dtype=torch.int32, pin_memory=pinned),
                torch.zeros(shape, dtype=torch.int32, device=device),
            )

        self._contexts, self._device_contexts = pair(max_rows)
        self._counts, self._device_counts = pair(2)
        self._slots, self._device_slots = pair(max_rows, nodes)
        self._jobs, self._device_jobs = pair(max(_JOBS_AT_A_TIME, nodes), 4)
        self._listed = np.zeros((nodes, 3), np.int32)
        self._one_row = torch.ones(1, dtype=torch.int32, device=device)
        queries = torch.zeros(
            (len(keys), max_rows, total_query_heads, keys[0].layout.head_dim), dtype=query_dtype, device=device
        )
        self._exact_queries = queries[:, :1].clone()
        self._widened = None if slot_dtype == query_dtype else queries
        self._exact_tables = torch.zeros(
            (1 + max(layer.table for layer in keys), 1, table_pages), dtype=torch.int32, device=device
        )
        self._exact_context = torch.zeros(1, dtype=torch.int32, device=device)
        self._out, self._exact_out = self._search.allocate_result(), self._exact.allocate_result()
        self._host, self._exact_host = (
            DeviceSummary.allocate(len(keys), rows, len(query_heads), search.units, search.config, "cpu", pinned)
            for search, rows in ((self._search, max_rows), (self._exact, 1))
        )
        self._seq_lens = torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned)
        self._passes = torch.zeros(len(keys), dtype=torch.int32, pin_memory=pinned)
        self._passes_seen = np.zeros(len(keys), np.int32)
        self._uploaded, self._audited = streams.event(), streams.event()
        index_bytes = sum(part.nbytes for part in self._index if isinstance(part, np.ndarray))
        summaries = self._search.summaries.nbytes + self._search.spreads.nbytes
        self.summary_bytes = summaries + index_bytes if self._beam else 0
        self.summary = BlockSummary.allocate(len(keys), max_rows, len(query_heads), config)

    def run(self, slot: GpuSlot) -> NDArray[np.uint8]:
        """Search the slot's rows; see `RowSearch`. The calling thread sleeps until the results are there.

        Raises:
            RuntimeError: a watched layer has left no rows since the last snapshot.
        """
        rows = len(slot.labels)
        contexts = np.array([label.position + 1 for label in slot.labels], np.int32)
        status = self._search_rows(slot, contexts)
        stale = np.flatnonzero(self._passes.numpy() == self._passes_seen)
        if len(stale):
            raise RuntimeError(f"watched layer {stale[0]} left no query rows")
        self._passes_seen[:] = self._passes.numpy()
        # The host's labels against what the device's attention really read.
        status[(status == ROW_OK) & (self._seq_lens.numpy()[:rows] != contexts)] = ROW_INVALID
        return status

    def search_once(
        self, slot: GpuSlot, queries: torch.Tensor, tables: list[NDArray[np.int32]], context: int
    ) -> BlockSummary:
        """Search one row that is placed into a slot by hand, then forget its summaries: the self-check.

        Launches every kernel that serving will need, so that none is compiled in the middle of it.
        """
        slot.place(queries, tables, context)
        with self._streams.side():
            slot.ready.wait()
            if self._beam:
                self._counts.zero_()
                self._device_counts.copy_(self._counts)
                self._build(slot)
            self._run_exact(slot, 0)
        self._search_rows(slot, np.array([context], np.int32))
        self._index.built[:] = -1
        return self.summary.first_rows(1)

    def audit(self, slot: GpuSlot, layer: int, row: int, head: int) -> Audit | None:
        """Judge one result by exact attention; see `RowSearch`. Nothing guards the row's blocks by now, so generations
        are compared after its keys were read."""
        with self._streams.side():
            self._run_exact(slot, row)
            self._exact_host.copy_(self._exact_out)
            self._audited.record()
        self._audited.synchronize()
        if self._raced(slot)[row]:
            return None
        oracle = self._exact_host.on_host()
        total = float(oracle.total_lse()[layer, 0, head])
        place = layer, row, head
        kept, best, forced, sink = (
            float(np.exp(lse.astype(np.float64) - total).sum())
            for lse in (
                self.summary.block_lse[place],
                oracle.block_lse[layer, 0, head],
                oracle.forced_lse[layer, 0, head],
                oracle.learned_sink_lse[layer, 0, head],
            )
        )
        claimed = float(np.exp(self.summary.unobserved_lse[place] - self.summary.total_lse()[place]))
        recall = kept / best if best > 0 else 1.0
        return Audit(row, layer, head, recall, claimed - max(0.0, 1.0 - kept - forced - sink))

    def _run_exact(self, slot: GpuSlot, row: int) -> None:
        # From memory of its own: Triton compiles a kernel again where an address is aligned otherwise.
        self._exact_queries.copy_(slot.queries[:, row : row + 1])
        self._exact_tables.copy_(slot.block_tables[:, row : row + 1])
        self._exact_context.copy_(self._device_contexts[row : row + 1])
        self._exact.run(self._exact_queries, self._exact_tables, self._exact_context, self._one_row, self._exact_out)

    def _build(self, slot: GpuSlot) -> None:
        """Build the nodes that the uploaded jobs list. All of their memory is handed over, whatever its use, for the
        same reason."""
        self._search.update(self._device_jobs, self._device_counts[1:2], slot.block_tables, self._device_slots)

    def set_logit_weights(self, scales: list[float], sinks: list[Any]) -> None:
        """See `RowSearch`."""
        self._search.set_logit_weights(scales, sinks)
        self._exact.set_logit_weights(scales, sinks)

    def _search_rows(self, slot: GpuSlot, contexts: NDArray[np.int32]) -> NDArray[np.uint8]:
        rows = len(contexts)
        places = _places(slot.pages[self._table])
        with self._streams.side():
            slot.ready.wait()
            # Rows that are too late already are left empty; their pages may mean nothing by now.
            late = self._raced(slot)
            self._contexts.numpy()[:rows] = np.where(late, 0, contexts)
            built = self._update(slot, places, self._contexts.numpy()[:rows]) if self._beam else None
            self._counts[0] = rows
            self._device_contexts.copy_(self._contexts, non_blocking=True)
            self._device_counts.copy_(self._counts, non_blocking=True)
            self._search.run(
                slot.queries if self._widened is None else self._widened.copy_(slot.queries),
                slot.block_tables,
                self._device_contexts,
                self._device_counts[:1],
                self._out,
                self._device_slots if self._beam else None,
            )
            self._host.copy_(self._out)
            self._seq_lens.copy_(slot.seq_lens, non_blocking=True)
            self._passes.copy_(slot.passes, non_blocking=True)
            slot.done.record()
        slot.launched = True
        # In this order: what is rewritten from here on waits for `done`, what was before shows in the generations.
        raced = self._raced(slot)
        if built is not None and raced.any():
            self._index.built[built] = -1
        slot.done.synchronize()
        slot.finished = True
        self.summary = self._host.on_host()
        status = self._host.status.numpy()[:rows].copy()
        status[raced] = ROW_RACED
        return status

    def _update(self, slot: GpuSlot, places: NDArray[np.int64], contexts: NDArray[np.int32]) -> NDArray[np.int64]:
        """Find every row's nodes, and have those built that are not valid; returns the slots of these."""
        config, rows = self._config, len(contexts)
        ends = -(-contexts.astype(np.int64) // config.block_size) - config.recent_blocks
        ends[ends - config.sink_blocks <= 2 * config.top_k] = 0  # so few that a search reads all
        snapshots = np.full(rows, slot.generation, np.int64)
        generations = self._generations.of_block
        counts = np.zeros(3, np.int64)
        built: list[NDArray[np.int64]] = []
        # All rows are resolved before any is searched: what one needs must not be given to the next.
        self._index.searches[0] += 1
        while counts[0] < rows:
            resolve_rows(
                self._index,
                int(counts[0]),
                places,
                ends,
                generations.ctypes.data,
                len(generations),
                snapshots,
                self._slots.numpy(),
                self._listed,
                self._jobs.numpy(),
                counts,
            )
            done, jobs = int(counts[0]), int(counts[1])
            self._device_slots[:done].copy_(self._slots[:done], non_blocking=True)
            if jobs:
                built.append(self._jobs.numpy()[:jobs, 1].astype(np.int64))
                self._counts[1] = jobs
                self._device_counts.copy_(self._counts, non_blocking=True)
                self._device_jobs[:jobs].copy_(self._jobs[:jobs], non_blocking=True)
                self._build(slot)
                # The staging memory is filled again, here or by the caller, only when it has been read.
                self._uploaded.record()
                self._uploaded.synchronize()
        contexts[ends < 0] = -1  # no room in the index for a row's nodes: the device will call it invalid
        return np.concatenate(built) if built else np.zeros(0, np.int64)

    def _raced(self, slot: GpuSlot) -> NDArray[np.bool_]:
        """Rows of which a page was given away after their step, or is out of range."""
        generations = self._generations.of_block
        raced = np.zeros(len(next(iter(slot.pages.values()))), bool)
        for pages in slot.pages.values():
            latest = np.zeros(len(pages), np.int64)
            latest_generations(_places(pages), generations.ctypes.data, len(generations), latest)
            raced |= (latest > slot.generation) | (latest < 0)
        return raced


def _places(pages: list[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Address and length of each row's pages, int64 [R, 2]."""
    return np.array([(row.ctypes.data, len(row)) for row in pages], np.int64)
