"""The search on a GPU (Triton): reads the engine's paged cache in place, one launch for all layers, rows and heads."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import triton

from stream_kernels.gpu_beam import beam_kernel
from stream_kernels.gpu_descent import descent_kernel
from stream_kernels.gpu_exact import exact_kernel
from stream_kernels.gpu_result import DeviceSummary
from stream_kernels.gpu_structures import Batch, BeamScratch, Cache, DescentScratch, Plan, Pyramid, Results, Shape
from stream_kernels.gpu_summaries import Jobs, summarise_blocks_kernel, summarise_nodes_kernel
from stream_kernels.index import Levels, levels_for
from stream_kernels.layout import DeviceKeys
from stream_kernels.reference import search_units
from stream_kernels.search import SearchConfig
from stream_kernels.statistics import FANOUT, MAX_RESIDUAL

__all__ = ["ROW_INVALID", "ROW_OK", "DeviceSummary", "GpuSearch"]

ROW_OK, ROW_INVALID = 0, 2
"""Statuses of a row: searched; its length, its pages or its summaries do not fit what was declared."""

QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEADS = 16
"""Query heads of a unit: the rows of one tensor-core product."""
MOST_TOP_K = 64
MOST_CANDIDATES = 512
_KEYS_READ = 64
"""Keys or summaries that a program reads at a time, and multiplies in one product; half of it above 128 channels."""
_PROGRAMS_PER_PROCESSOR = 2
"""As many as a multiprocessor has registers for, in the code compiled for compute capability 9.0."""
_ALIGNMENT = 16
"""Bytes that a thread loads at once."""


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
        summaries: under `beam`, bfloat16 [L, summary_slots, kv_heads, 2, head_dim]: mean and outlier of a node's keys.
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
        reasons = _refusals(keys, total_query_heads, config, max_rows, max_context, query_dtype, watched)
        reasons += _pyramid_refusals(config, max_context, summary_slots, level_offsets)
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
        self._shape = _shape(keys, config, max_context, query_dtype, len(watched), len(units), group, levels)
        self._cache = _cache(keys)
        self._plan = _plan(keys, units, watched, self._shape.group_tile)
        most_programs = max_programs or _PROGRAMS_PER_PROCESSOR * _processors(self.device)
        self._programs = min(most_programs, self.layers * max_rows * self.units)
        self._update_programs = most_programs
        self._scratch = _scratch(self._shape, self._programs, self.device)
        # Twice the warps where the registers of 4 would not hold what a program works on.
        self._warps = 8 if self._shape.dim_tile > 128 or self._shape.nodes_tile > 2048 else 4
        slots = summary_slots if config.strategy == "beam" else 0
        self.summaries = torch.zeros(
            self.layers, slots, keys[0].kv_heads, 2, self._shape.head_dim, dtype=torch.bfloat16, device=self.device
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

    def set_sinks(self, sinks: Sequence[torch.Tensor | None]) -> None:
        """Takes new learned sinks, for each layer what `DeviceKeys.sinks` holds: they are weights, and an engine may
        replace its weights. Searches enqueued later on the current stream use them.

        Raises:
            ValueError: not one entry per layer, or one that `DeviceKeys` does not take.
        """
        self._keys = tuple(replace(layer, sinks=own) for layer, own in zip(self._keys, sinks, strict=True))
        self._plan.sinks.copy_(_sink_logits(self._keys, self.query_heads))

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
            exact_kernel[grid](self._cache, self._plan, batch, results, self._shape, num_warps=self._warps)
        elif self.config.strategy == "descent":
            descent_kernel[grid](
                self._cache, self._plan, batch, results, self._scratch, self._shape, num_warps=self._warps
            )
        else:
            if node_slots is None:
                raise ValueError("beam needs node_slots")
            pyramid = self._pyramid(node_slots)
            beam_kernel[grid](
                self._cache, self._plan, batch, pyramid, results, self._scratch, self._shape, num_warps=self._warps
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


def _refusals(
    keys: Sequence[DeviceKeys],
    total_query_heads: int,
    config: SearchConfig,
    max_rows: int,
    max_context: int,
    query_dtype: torch.dtype,
    watched: Sequence[int],
) -> list[str]:
    """Every reason not to build a search from these arguments."""
    reasons = []
    if query_dtype not in QUERY_TYPES:
        reasons.append(f"queries are {query_dtype}; valid: {', '.join(map(str, QUERY_TYPES))}")
    if config.top_k > MOST_TOP_K:
        reasons.append(f"top_k is {config.top_k}; on a GPU at most {MOST_TOP_K}")
    if config.strategy != "exact" and _candidates(config, max_context) > MOST_CANDIDATES:
        reasons.append(
            f"width * top_k is {config.width * config.top_k}; on a GPU at most {MOST_CANDIDATES}, "
            "where max_context has more inner blocks"
        )
    # A descent multiplies candidates by blocks, a beam rounds blocks up to its fan-out: all of it in 32 bits.
    most_context = 2**31 // (2 * MOST_CANDIDATES)
    if max_rows < 1 or not 1 <= max_context <= most_context:
        reasons.append(f"max_rows is {max_rows}, valid: 1 and more; max_context {max_context}: 1 to {most_context}")
    if not keys:
        return [*reasons, "no layers"]
    first = keys[0]
    for index, layer in enumerate(keys):
        if (layer.layout, layer.tensor.dtype, layer.kv_heads) != (first.layout, first.tensor.dtype, first.kv_heads):
            reasons.append(f"layer {index} has another page size, head size, type or number of KV heads than layer 0")
        if layer.tensor.device != first.tensor.device:
            reasons.append(f"layer {index} is on {layer.tensor.device}, layer 0 on {first.tensor.device}")
        size = layer.tensor.element_size()
        if layer.tensor.data_ptr() % _ALIGNMENT or any(s * size % _ALIGNMENT for s in layer.tensor.stride()[:3]):
            reasons.append(f"layer {index} has keys that do not start at a multiple of {_ALIGNMENT} bytes")
        if layer.table < 0:
            reasons.append(f"layer {index} names block table {layer.table}")
        if layer.sinks is not None and len(layer.sinks) != total_query_heads:
            reasons.append(f"layer {index} has {len(layer.sinks)} learned sinks for {total_query_heads} query heads")
    if not 16 <= first.layout.head_dim <= 256:
        reasons.append(f"head size is {first.layout.head_dim}; valid: 16 to 256")
    if total_query_heads % first.kv_heads:
        reasons.append(f"{total_query_heads} query heads do not divide among {first.kv_heads} KV heads")
    elif total_query_heads // first.kv_heads > MOST_HEADS:
        reasons.append(f"{total_query_heads // first.kv_heads} query heads share a KV head; at most {MOST_HEADS} may")
    if not watched or len(set(watched)) < len(watched) or not set(watched) <= set(range(total_query_heads)):
        reasons.append(f"query_heads {list(watched)} must be distinct and among {total_query_heads}")
    return reasons


def _pyramid_refusals(
    config: SearchConfig, max_context: int, summary_slots: int, level_offsets: Sequence[int]
) -> list[str]:
    """Every reason why a beam could not find its summaries."""
    if config.strategy != "beam" or max_context < 1:
        return []
    reasons = []
    if summary_slots < 1:
        reasons.append("beam needs block summaries, and summary_slots is 0")
    levels = levels_for(config, max_context)
    needed = [len(levels.tops[1:]) // FANOUT**level for level in range(levels.count)]
    room = [end - start for start, end in pairwise(level_offsets)]
    if len(room) < levels.count or any(has < needs for has, needs in zip(room, needed, strict=False)):
        reasons.append(f"level_offsets are {list(level_offsets)}; the levels need room for {needed} nodes")
    return reasons


def _candidates(config: SearchConfig, max_context: int) -> int:
    """Most blocks that a descent or a beam reads in full."""
    inner = -(-max_context // config.block_size) - config.recent_blocks - config.sink_blocks
    return min(config.width * config.top_k, max(1, inner))


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU, where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _shape(
    keys: Sequence[DeviceKeys],
    config: SearchConfig,
    max_context: int,
    query_dtype: torch.dtype,
    query_heads: int,
    units: int,
    group: int,
    levels: Levels,
) -> Shape:
    dtype, layout = keys[0].tensor.dtype, keys[0].layout
    dim_tile = triton.next_power_of_2(layout.head_dim)
    keys_read = _KEYS_READ if dim_tile <= 128 else _KEYS_READ // 2
    read_tile = max(1, min(keys_read // config.block_size, triton.next_power_of_2(config.top_k)))
    candidates = _candidates(config, max_context)
    probe_tile = triton.next_power_of_2(config.probe_keys)
    return Shape(
        layers=len(keys),
        units=units,
        query_heads=query_heads,
        kv_heads=keys[0].kv_heads,
        group=group,
        group_tile=max(16, triton.next_power_of_2(group)),
        head_dim=layout.head_dim,
        dim_tile=dim_tile,
        page_size=layout.page_size,
        block_size=config.block_size,
        key_type=str(dtype).removeprefix("torch."),
        # Products of numbers of at most 11 binary digits are exact in TF32; wider ones are taken in three parts.
        dot_precision="tf32x3" if torch.float32 in (dtype, query_dtype) else "tf32",
        softcap=any(layer.softcap > 0 for layer in keys),
        top_k=config.top_k,
        top_tile=max(read_tile, triton.next_power_of_2(config.top_k)),
        sink_blocks=config.sink_blocks,
        recent_blocks=config.recent_blocks,
        forced_tile=triton.next_power_of_2(config.forced_blocks),
        read_tile=read_tile,
        max_context=max_context,
        strategy=config.strategy,
        rerank=config.rerank,
        candidates=candidates,
        candidates_tile=triton.next_power_of_2(max(candidates, 2 * config.top_k, 16)),
        probe_keys=config.probe_keys,
        probe_tile=probe_tile,
        branches_read=max(1, keys_read // probe_tile),
        fanout=FANOUT,
        max_residual=MAX_RESIDUAL,
        first_lot=config.first_lot,
        min_gain=config.min_gain,
        outlier_256ths=config.outlier_256ths,
        levels=levels.count,
        nodes_tile=triton.next_power_of_2(levels.most_scored),
        box_width=config.box_width,
        kept_tile=triton.next_power_of_2(config.box_width),
        nodes_read=keys_read,
    )


def _cache(keys: Sequence[DeviceKeys]) -> Cache:
    device = keys[0].tensor.device

    def numbers(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Cache(
        address=numbers([layer.tensor.data_ptr() for layer in keys], torch.int64),
        page_stride=numbers([layer.tensor.stride(0) for layer in keys], torch.int64),
        token_stride=numbers([layer.tensor.stride(1) for layer in keys], torch.int64),
        head_stride=numbers([layer.tensor.stride(2) for layer in keys], torch.int64),
        num_pages=numbers([layer.num_pages for layer in keys], torch.int32),
        table=numbers([layer.table for layer in keys], torch.int32),
        scale=torch.tensor([layer.scale for layer in keys], device=device),
        softcap=torch.tensor([layer.softcap for layer in keys], device=device),
    )


def _plan(
    keys: Sequence[DeviceKeys], units: list[tuple[int, list[int]]], watched: Sequence[int], group_tile: int
) -> Plan:
    device = keys[0].tensor.device
    slots = [unit + [-1] * (group_tile - len(unit)) for _, unit in units]
    heads = [[-1 if slot < 0 else watched[slot] for slot in unit] for unit in slots]
    return Plan(
        kv_head=torch.tensor([kv_head for kv_head, _ in units], dtype=torch.int32, device=device),
        slot=torch.tensor(slots, dtype=torch.int32, device=device),
        head=torch.tensor(heads, dtype=torch.int32, device=device),
        sinks=_sink_logits(keys, watched).to(device),
    )


def _sink_logits(keys: Sequence[DeviceKeys], watched: Sequence[int]) -> torch.Tensor:
    """Learned sinks of the watched heads, float32 [L, H] on the CPU; -inf where a layer has none."""
    none = torch.full((len(watched),), -math.inf)
    return torch.stack([none if layer.sinks is None else layer.sinks.cpu()[list(watched)] for layer in keys])


def _scratch(shape: Shape, programs: int, device: torch.device) -> BeamScratch | DescentScratch | None:
    """Working memory of every program."""

    def floats(*sizes: int) -> torch.Tensor:
        return torch.zeros(programs, *sizes, device=device)

    def integers(*sizes: int) -> torch.Tensor:
        return torch.zeros(programs, *sizes, dtype=torch.int32, device=device)

    if shape.strategy == "beam":
        return BeamScratch(
            log_mass=floats(shape.levels, shape.group, shape.nodes_tile),
            weight=floats(shape.levels, shape.nodes_tile),
            score=floats(shape.nodes_tile),
            scored=integers(shape.levels),
            again=integers(2, shape.nodes_tile),
            kept=integers(shape.levels + 1, shape.kept_tile),
            chosen=integers(2, shape.candidates_tile),
            order=integers(2, shape.candidates_tile),
        )
    if shape.strategy == "descent":
        return DescentScratch(
            span=integers(2, shape.candidates_tile),
            best=floats(shape.group, 2 * shape.candidates_tile),
            mass=floats(shape.group, 2 * shape.candidates_tile),
        )
    return None
