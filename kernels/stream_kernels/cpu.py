"""The search on the CPU (numba): reads the engine's paged cache in place, in one call without the interpreter lock."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.cpu_kernel import EXACT, ROW_INVALID, ROW_OK, ROW_RACED, Geometry, search_rows
from stream_kernels.cpu_setup import (
    KEY_TYPES,
    QUERY_TYPES,
    STRATEGIES,
    make_beam,
    make_plan,
    make_scratch,
    query_place,
    refusals,
    sink_logits,
    table_places,
)
from stream_kernels.layout import PagedKeys, with_logit_weights
from stream_kernels.reference import search_units
from stream_kernels.search import BlockSummary, SearchConfig

__all__ = ["ROW_INVALID", "ROW_OK", "ROW_RACED", "Audit", "CpuSearch"]


class Audit(NamedTuple):
    """How a row's summary, in one layer and head, compares with exact attention."""

    recall: float
    """Mass of the inner blocks kept over the mass of the K heaviest ones; 1 where there are none."""
    unobserved_error: float
    """Estimated minus true share of the row's attention on keys neither kept nor forced; -1 to 1."""


class CpuSearch:
    """A search over fixed layers and heads, compiled and with its memory set aside when constructed.

    One instance serves one thread at a time. It reads the caches through their addresses and keeps them alive; build a
    new one when the engine replaces its caches.

    Args:
        keys: the L watched layers. All have one layout, element type and number of KV heads.
        total_query_heads: query heads H_total of a layer on this rank, a multiple of the KV heads.
        config: what to search for.
        max_rows: most rows of one call.
        max_context: longest context in tokens.
        query_dtype: element type of the query buffer.
        query_heads: the H query heads to watch, in the order of the results; all by default.

    Raises:
        ValueError: something above does not hold. The message lists every reason.
    """

    def __init__(
        self,
        keys: Sequence[PagedKeys],
        total_query_heads: int,
        config: SearchConfig,
        *,
        max_rows: int,
        max_context: int,
        query_dtype: torch.dtype,
        query_heads: Sequence[int] | None = None,
    ) -> None:
        watched = list(range(total_query_heads)) if query_heads is None else list(query_heads)
        reasons = refusals(keys, total_query_heads, config, max_rows, max_context, query_dtype, watched)
        if reasons:
            raise ValueError("; ".join(reasons))
        self.config = config
        self.layers = len(keys)
        self.query_heads = tuple(watched)
        self.max_rows = max_rows
        self._total_query_heads = total_query_heads
        self._query_dtype = query_dtype
        self._keys = tuple(keys)
        self._tables = 1 + max(layer.table for layer in keys)
        layout = keys[0].layout
        self._geometry = Geometry(
            layers=len(keys),
            query_heads=len(watched),
            head_dim=layout.head_dim,
            page_size=layout.page_size,
            token_group=layout.token_group,
            channel_pack=layout.channel_pack,
            key_type=KEY_TYPES[keys[0].tensor.dtype],
            query_type=QUERY_TYPES[query_dtype],
            num_pages=min(layer.num_pages for layer in keys),
            max_context=max_context,
            block_size=config.block_size,
            top_k=config.top_k,
            sink_blocks=config.sink_blocks,
            recent_blocks=config.recent_blocks,
            strategy=STRATEGIES[config.strategy],
            rerank=int(config.rerank),
            width=config.width * config.top_k,
            rows=1,
        )
        units = search_units(watched, total_query_heads // keys[0].kv_heads, config)
        self._plan = make_plan(keys, units, watched, config)
        heads = max(len(slots) for _, slots in units)
        self._beam = make_beam(self._geometry, keys[0].kv_heads, heads, config)
        self._scratch = make_scratch(self._geometry, heads, self._beam.scratch.front.size)
        self._context_lens = np.zeros(max_rows, np.int32)
        self._snapshots = np.zeros(max_rows, np.int64)
        self._status = np.zeros(max_rows, np.uint8)
        # An audit is an exact search of one row, layer and head.
        self._audit_geometry = self._geometry._replace(layers=1, query_heads=1, strategy=EXACT)
        self._audit_scratch = make_scratch(self._audit_geometry, 1)
        self._audit_out = BlockSummary.allocate(1, 1, 1, config)
        self._warm_up()

    @property
    def summary_bytes(self) -> int:
        """Bytes that block summaries take; 0 where the strategy needs none."""
        if self.config.strategy != "beam":
            return 0
        index = (part for part in self._beam.nodes if isinstance(part, np.ndarray))
        summaries = self._beam.statistics.nbytes + self._beam.summaries.spreads.nbytes
        return summaries + sum(array.nbytes for array in index)

    def forget(self) -> None:
        """Takes no block summary to be valid any more: where no generations say what was rewritten, or all was."""
        self._beam.nodes.built[:] = -1

    def run(
        self,
        queries: torch.Tensor,
        block_tables: Sequence[NDArray[np.int32]],
        context_lens: NDArray[np.int32],
        out: BlockSummary,
        page_generations: NDArray[np.int64] | None = None,
        row_generations: NDArray[np.int64] | None = None,
    ) -> NDArray[np.uint8]:
        """Searches R rows in every layer and writes rows 0 to R of `out`.

        Args:
            queries: [L, >= R, H_total, D] in the type declared, channels contiguous; unscaled.
            block_tables: int32 [>= R, max_pages] each, columns contiguous; `PagedKeys.table` picks one.
            context_lens: integers [R], keys each row attends to; a row of 0 is left empty.
            out: from `BlockSummary.allocate(L, >= R, H, config)`.
            page_generations: int64 [num_pages], the generation in which each page was last given to another request or
                rewritten; the engine's thread may write it meanwhile. Without it nothing guards against reuse.
            row_generations: int64 [R], the generation at which each row was snapshotted.

        Returns:
            Status of each row, uint8 [R]: `ROW_OK`; `ROW_RACED` (a page's generation is above the row's, before or
            after the search); `ROW_INVALID` (context above `max_context` or the block table, or a page id out of
            range). A row that is not `ROW_OK` holds nothing in `out`. The array is overwritten by the next call.

        Raises:
            ValueError: an argument does not have the shape or type above.
        """
        rows = len(context_lens)
        self._check(queries, block_tables, rows, out, page_generations, row_generations)
        self._context_lens[:rows] = context_lens
        if row_generations is not None:
            self._snapshots[:rows] = row_generations
        status = self._status[:rows]
        search_rows(
            self._geometry,
            self._plan,
            self._scratch,
            self._beam,
            query_place(queries),
            table_places(block_tables),
            self._context_lens[:rows],
            0 if page_generations is None else page_generations.ctypes.data,
            0 if page_generations is None else len(page_generations),
            self._snapshots[:rows],
            tuple(vars(out).values()),
            status,
        )
        return status

    def audit(
        self,
        layer: int,
        row: int,
        slot: int,
        queries: torch.Tensor,
        block_tables: Sequence[NDArray[np.int32]],
        context_lens: NDArray[np.int32],
        summary: BlockSummary,
        page_generations: NDArray[np.int64] | None = None,
        row_generations: NDArray[np.int64] | None = None,
    ) -> Audit | None:
        """Recomputes one layer, row and head exactly and judges what `run` wrote for it.

        Args:
            layer, row, slot: indices into `summary`; `slot` counts the watched heads.
            queries, block_tables, context_lens, page_generations, row_generations: as they were given to `run`.
            summary: what `run` filled.

        Returns:
            The comparison, or None where the row cannot be read (any more): see the statuses of `run`.

        Raises:
            ValueError: as `run`.
        """
        self._check(queries, block_tables, len(context_lens), summary, page_generations, row_generations)
        head = self.query_heads[slot]
        one = self._keys[layer : layer + 1]
        unit = [(head // (self._total_query_heads // one[0].kv_heads), [0])]
        status = np.zeros(1, np.uint8)
        search_rows(
            self._audit_geometry,
            make_plan(one, unit, [head], self.config),
            self._audit_scratch,
            self._beam,
            query_place(queries[layer:, row:]),
            table_places([table[row:] for table in block_tables]),
            np.array([context_lens[row]], np.int32),
            0 if page_generations is None else page_generations.ctypes.data,
            0 if page_generations is None else len(page_generations),
            np.array([0 if row_generations is None else row_generations[row]], np.int64),
            tuple(vars(self._audit_out).values()),
            status,
        )
        if status[0] != ROW_OK:
            return None
        oracle = self._audit_out
        total = float(oracle.total_lse()[0, 0, 0])
        kept, best, forced, sink = (
            float(np.exp(lse.astype(np.float64) - total).sum())
            for lse in (
                summary.block_lse[layer, row, slot],
                oracle.block_lse,
                oracle.forced_lse,
                oracle.learned_sink_lse,
            )
        )
        claimed = float(np.exp(summary.unobserved_lse[layer, row, slot] - summary.total_lse()[layer, row, slot]))
        return Audit(kept / best if best > 0 else 1.0, claimed - max(0.0, 1.0 - kept - forced - sink))

    def set_logit_weights(self, scales: Sequence[float], sinks: Sequence[torch.Tensor | None]) -> None:
        """Takes new factors and learned sinks, for each layer what `PagedKeys.scale` and `.sinks` hold: they come with
        the weights, and an engine may replace its weights. Not while another thread is in `run` or `audit`.

        Raises:
            ValueError: not one entry per layer, or one that `PagedKeys` does not take.
        """
        self._keys = with_logit_weights(self._keys, scales, sinks)
        self._plan.scale[:] = [layer.scale for layer in self._keys]
        self._plan.sinks[:] = sink_logits(self._keys, self.query_heads)

    def _check(
        self,
        queries: torch.Tensor,
        block_tables: Sequence[NDArray[np.int32]],
        rows: int,
        out: BlockSummary,
        page_generations: NDArray[np.int64] | None,
        row_generations: NDArray[np.int64] | None,
    ) -> None:
        """Raises ValueError for whatever would make the compiled code read or write where it must not."""
        g = self._geometry
        if rows > self.max_rows:
            raise ValueError(f"{rows} rows; declared were at most {self.max_rows}")
        if queries.dtype != self._query_dtype or queries.stride(-1) != 1:
            raise ValueError(f"queries are {queries.dtype} with strides {queries.stride()}; see CpuSearch.run")
        layers, query_rows, heads, dim = queries.shape
        if (layers, heads, dim) != (self.layers, self._total_query_heads, g.head_dim) or query_rows < rows:
            raise ValueError(f"queries are {list(queries.shape)}; see CpuSearch.run")
        if len(block_tables) < self._tables:
            raise ValueError(f"{len(block_tables)} block tables; the layers name {self._tables}")
        for table in block_tables:
            if table.dtype != np.int32 or table.ndim != 2 or table.shape[0] < rows or table.strides[1] != 4:
                raise ValueError(f"a block table is {table.dtype} {list(table.shape)}; see CpuSearch.run")
        lead = (self.layers, len(self.query_heads))
        if (out.block_ids.shape[0], *out.block_ids.shape[2:]) != (*lead, g.top_k) or out.block_ids.shape[1] < rows:
            raise ValueError(f"out is for {list(out.block_ids.shape)}; see CpuSearch.run")
        expected = BlockSummary.allocate(0, 0, 0, self.config)
        for name, array in vars(out).items():
            own = array.flags.c_contiguous and array.flags.writeable and array.shape[:2] == out.block_ids.shape[:2]
            if not own or array.dtype != getattr(expected, name).dtype:
                raise ValueError(f"out.{name} does not come from BlockSummary.allocate")
        if page_generations is not None and (
            page_generations.dtype != np.int64
            or not page_generations.flags.c_contiguous
            or len(page_generations) < g.num_pages
        ):
            raise ValueError(f"page_generations must be int64 [{g.num_pages}], contiguous")
        if (page_generations is None) != (row_generations is None):
            raise ValueError("page_generations and row_generations go together")

    def _warm_up(self) -> None:
        """Compiles (or loads) by a call for one empty row: numba compiles under the interpreter lock, never later."""
        g = self._geometry
        self.run(
            torch.zeros(self.layers, 1, self._total_query_heads, g.head_dim, dtype=self._query_dtype),
            [np.zeros((1, 1), np.int32)] * self._tables,
            np.zeros(1, np.int32),
            BlockSummary.allocate(self.layers, 1, len(self.query_heads), self.config),
        )
        # Arguments of any other type are a mistake; they shall fail rather than compile in the middle of serving.
        search_rows.disable_compile()
