"""The search on a GPU (Triton): reads the engine's paged cache in place, one launch for all layers, rows and heads."""

from collections.abc import Sequence

import torch

from stream_kernels.gpu_beam import beam_kernel
from stream_kernels.gpu_descent import descent_kernel
from stream_kernels.gpu_exact import exact_kernel
from stream_kernels.gpu_result import DeviceSummary
from stream_kernels.gpu_setup import (
    make_cache,
    make_plan,
    make_scratch,
    make_shape,
    make_top_scratch,
    processors_of,
    programs_on,
    pyramid_refusals,
    refusals,
    sink_logits,
)
from stream_kernels.gpu_structures import Batch, Pyramid, Results
from stream_kernels.gpu_summaries import Jobs, summarise_blocks_kernel, summarise_nodes_kernel
from stream_kernels.index import levels_for
from stream_kernels.layout import DeviceKeys, with_logit_weights
from stream_kernels.reference import search_units
from stream_kernels.search import SearchConfig

__all__ = ["ROW_INVALID", "ROW_OK", "DeviceSummary", "GpuSearch"]

ROW_OK, ROW_INVALID = 0, 2
"""Statuses of a row: searched; its length, its pages or its summaries do not fit what was declared."""


class GpuSearch:
    """A search over fixed layers and heads, with its memory set aside when constructed.

    It reads the caches through their addresses and keeps them alive; build a new one when the engine replaces its
    caches. Calls of one instance share working memory, so they must follow each other on one stream. Every call only
    enqueues kernels whose grids do not depend on data, so it never waits for the device and can be captured in a CUDA
    graph.

    Args:
        keys: the L watched layers, all on one device, with one page size, head size, element type and number of KV
            heads.
        total_query_heads: query heads H_total of a layer on this rank, a multiple of the KV heads.
        config: what to search for.
        max_rows: most rows of one call.
        max_context: longest context in tokens.
        query_dtype: element type of the query buffer.
        query_heads: the H query heads to watch, in the order of the results; all by default.
        summary_slots: under `beam`, nodes of the pyramid there is room for, in every layer.
        level_offsets: under `beam`, where the nodes of each level start in a row of `node_slots`; its last number is
            the length of a row. There must be at least `levels` of them beside.
        max_programs: bound of the grids, so that a search leaves processors to the engine. By default there are two
            programs for every one.

    Attributes:
        levels: under `beam`, levels of the pyramid that searches use.
        summaries: under `beam`, bfloat16 [L, summary_slots, kv_heads, 1 + outlier_keys, head_dim]: mean and outliers of
            a node's keys.
        spreads: under `beam`, float32 [L, summary_slots, kv_heads]: their variances, summed over the channels.
        units: how many groups of heads search together in a layer.

    Raises:
        ValueError: something above does not hold. The message lists every reason.
    """

    def __init__(
        self,
        keys: Sequence[DeviceKeys],
        total_query_heads: int,
        config: SearchConfig,
        *,
        max_rows: int,
        max_context: int,
        query_dtype: torch.dtype,
        query_heads: Sequence[int] | None = None,
        summary_slots: int = 0,
        level_offsets: Sequence[int] = (),
        max_programs: int | None = None,
    ) -> None:
        watched = list(range(total_query_heads)) if query_heads is None else list(query_heads)
        reasons = refusals(keys, total_query_heads, config, max_rows, max_context, query_dtype, watched)
        reasons += pyramid_refusals(config, max_context, summary_slots, level_offsets)
        if max_programs is not None and max_programs < 1:
            reasons.append(f"max_programs {max_programs} must be positive")
        if reasons:
            raise ValueError("; ".join(reasons))
        self.config = config
        self.layers = len(keys)
        self.query_heads = tuple(watched)
        self.max_rows = max_rows
        self.device = keys[0].tensor.device
        self._keys = tuple(keys)
        self._total_query_heads = total_query_heads
        self._query_dtype = query_dtype
        self._tables = 1 + max(layer.table for layer in keys)
        units = search_units(watched, total_query_heads // keys[0].kv_heads, config)
        self.units = len(units)
        levels = levels_for(config, max_context)
        self.levels = levels.count if config.strategy == "beam" else 0
        group = max(len(slots) for _, slots in units)
        most_programs = max_programs or programs_on(self.device)
        # On an H200 a program that has a multiprocessor to itself searches 32,768 tokens in 139 us with 8 warps and 256
        # keys at a time, in 180 with half of both; where two share one, half of both is faster.
        alone = most_programs <= processors_of(self.device)
        self._shape = make_shape(keys, config, max_context, query_dtype, len(watched), len(units), group, levels, alone)
        self._cache = make_cache(keys)
        self._plan = make_plan(keys, units, watched, self._shape.group_tile)
        self._programs = min(most_programs, self.layers * max_rows * self.units)
        self._update_programs = most_programs
        self._scratch = make_scratch(self._shape, self._programs, self.device)
        self._top_scratch = make_top_scratch(self._shape, self._programs, self.device)
        # Twice the warps, too, where the registers of 4 would not hold what a program works on.
        self._warps = 8 if alone or self._shape.dim_tile > 128 or self._shape.nodes_tile > 2048 else 4
        slots = summary_slots if config.strategy == "beam" else 0
        self.summaries = torch.zeros(
            (self.layers, slots, keys[0].kv_heads, 1 + config.outlier_keys, self._shape.head_dim),
            dtype=torch.bfloat16,
            device=self.device,
        )
        self.spreads = torch.zeros(self.layers, slots, keys[0].kv_heads, device=self.device)
        self._tops = torch.from_numpy(levels.tops).to(self.device)
        self._level_offsets = torch.tensor(level_offsets, dtype=torch.int32, device=self.device)
        self._nodes = level_offsets[-1] if level_offsets else 0

    def allocate_result(self) -> DeviceSummary:
        """Memory for the results of `max_rows` rows on the search's device."""
        return DeviceSummary.allocate(
            self.layers, self.max_rows, len(self.query_heads), self.units, self.config, self.device
        )

    def set_logit_weights(self, scales: Sequence[float], sinks: Sequence[torch.Tensor | None]) -> None:
        """Takes new factors and learned sinks, for each layer what `DeviceKeys.scale` and `.sinks` hold: they come with
        the weights, and an engine may replace its weights. Searches enqueued later on the current stream use them.

        Raises:
            ValueError: not one entry per layer, or one that `DeviceKeys` does not take.
        """
        self._keys = with_logit_weights(self._keys, scales, sinks)
        self._cache.scale.copy_(torch.tensor([layer.scale for layer in self._keys], dtype=torch.float32))
        self._plan.sinks.copy_(sink_logits(self._keys, self.query_heads))

    def update(
        self,
        jobs: torch.Tensor,
        job_count: torch.Tensor,
        block_tables: torch.Tensor,
        node_slots: torch.Tensor,
    ) -> None:
        """Builds nodes of the pyramid in every layer, one launch per level from the blocks up. Under `beam` only.

        Args:
            jobs: int32 [jobs, 4], contiguous: level, slot, row, and number of the node in its level, counted from the
                start of the row's context. All of the node's keys must have been written. Children that a job needs
                are built by other jobs of the same call, in any order, or were built before.
            job_count: int32 [1], how many of `jobs` there are.
            block_tables: as for `run`.
            node_slots: as for `run`.

        Raises:
            ValueError: an argument does not have the shape, type or device above.
        """
        if self.config.strategy != "beam":
            raise ValueError(f"{self.config.strategy} has no block summaries")
        self._check_table("jobs", jobs, (len(jobs), 4))
        self._check_table("job_count", job_count, (1,))
        self._check_tables(block_tables)
        pyramid = self._pyramid(node_slots)
        batch = self._batch(None, block_tables, None, None)
        grid = (min(self._update_programs, len(jobs) * self.layers * self._shape.kv_heads),)
        listed = Jobs(jobs, job_count, len(jobs))
        if len(jobs) == 0:
            return
        summarise_blocks_kernel[grid](self._cache, batch, pyramid, listed, self._shape)
        for level in range(1, self.levels):
            summarise_nodes_kernel[grid](level, pyramid, listed, self._shape)

    def run(
        self,
        queries: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        rows: torch.Tensor,
        out: DeviceSummary,
        node_slots: torch.Tensor | None = None,
    ) -> None:
        """Searches the first `rows` rows in every layer, one launch, and writes those rows of `out`.

        Args:
            queries: [L, max_rows, H_total, D] in the type declared, channels contiguous; unscaled.
            block_tables: int32 [tables, >= max_rows, pages], pages contiguous; `DeviceKeys.table` picks one. A row's
                pages in the order of its context.
            context_lens: int32 [max_rows], contiguous: keys each row attends to. A row of 0 is left empty.
            rows: int32 [1], how many rows there are; at most `max_rows`.
            out: from `allocate_result`.
            node_slots: under `beam`, int32 [>= max_rows, nodes], nodes contiguous: the slot of each whole node of the
                row's context, where `level_offsets` says.

        Raises:
            ValueError: an argument does not have the shape, type or device above.
        """
        lead = (self.layers, self.max_rows, self._total_query_heads, self._shape.head_dim)
        if queries.dtype != self._query_dtype or queries.shape != lead or queries.stride(3) != 1:
            raise ValueError(
                f"queries are {queries.dtype} {list(queries.shape)} with strides {queries.stride()}; "
                f"expected {self._query_dtype} {list(lead)}, channels contiguous"
            )
        if queries.device != self.device:
            raise ValueError(f"queries are on {queries.device}, the keys on {self.device}")
        self._check_tables(block_tables)
        self._check_table("context_lens", context_lens, (self.max_rows,))
        self._check_table("rows", rows, (1,))
        expected = (self.layers, self.max_rows, len(self.query_heads), self.config.top_k)
        if out.block_ids.shape != expected or out.unit_keys_read.shape[2] != self.units:
            raise ValueError(f"out is for {list(out.block_ids.shape)}; expected {list(expected)}")
        if out.storage.device != self.device:
            raise ValueError(f"out is on {out.storage.device}, the keys on {self.device}")
        batch = self._batch(queries, block_tables, context_lens, rows)
        results = Results(
            out.block_ids,
            out.block_lse,
            out.strongest,
            out.forced_lse,
            out.forced_strongest,
            out.unobserved_lse,
            out.learned_sink_lse,
            out.unit_keys_read,
            out.status,
            self.max_rows,
        )
        out.status.zero_()
        grid = (self._programs,)
        if self.config.strategy == "exact":
            exact_kernel[grid](
                self._cache, self._plan, batch, results, self._top_scratch, self._shape, num_warps=self._warps
            )
        elif self.config.strategy == "descent":
            descent_kernel[grid](
                self._cache,
                self._plan,
                batch,
                results,
                self._top_scratch,
                self._scratch,
                self._shape,
                num_warps=self._warps,
            )
        else:
            if node_slots is None:
                raise ValueError("beam needs node_slots")
            pyramid = self._pyramid(node_slots)
            beam_kernel[grid](
                self._cache,
                self._plan,
                batch,
                pyramid,
                results,
                self._top_scratch,
                self._scratch,
                self._shape,
                num_warps=self._warps,
            )

    def _batch(
        self,
        queries: torch.Tensor | None,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> Batch:
        layer, row, head = (0, 0, 0) if queries is None else queries.stride()[:3]
        table_stride, table_row_stride = block_tables.stride()[:2]
        return Batch(rows, queries, layer, row, head, context_lens, block_tables, table_stride, table_row_stride)

    def _pyramid(self, node_slots: torch.Tensor) -> Pyramid:
        rows, nodes = node_slots.shape
        if node_slots.dtype != torch.int32 or nodes < self._nodes or rows < self.max_rows or node_slots.stride(1) != 1:
            raise ValueError(
                f"node_slots are {node_slots.dtype} {list(node_slots.shape)}; expected int32 "
                f"[{self.max_rows}, {self._nodes}], nodes contiguous"
            )
        if node_slots.device != self.device:
            raise ValueError(f"node_slots are on {node_slots.device}, the keys on {self.device}")
        return Pyramid(
            self.summaries.view(torch.int16),
            self.spreads,
            self.summaries.shape[1],
            node_slots,
            node_slots.stride(0),
            self._level_offsets,
            self._tops,
        )

    def _check_tables(self, block_tables: torch.Tensor) -> None:
        if block_tables.dtype != torch.int32 or block_tables.ndim != 3 or block_tables.stride(2) != 1:
            raise ValueError(
                f"block_tables are {block_tables.dtype} {list(block_tables.shape)}; expected int32 "
                "[tables, rows, pages], pages contiguous"
            )
        tables, rows, pages = block_tables.shape
        needed = -(-self._shape.max_context // self._shape.page_size)
        if tables < self._tables or rows < self.max_rows or pages < needed:
            raise ValueError(
                f"block_tables are {list(block_tables.shape)}; expected at least "
                f"[{self._tables}, {self.max_rows}, {needed}]"
            )
        if block_tables.device != self.device:
            raise ValueError(f"block_tables are on {block_tables.device}, the keys on {self.device}")

    def _check_table(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tensor.dtype != torch.int32 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected int32 {list(shape)}, contiguous")
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, the keys on {self.device}")
