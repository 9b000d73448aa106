"""What `CpuSearch` checks and sets aside when it is built: refusals, plan, working memory, places of its arguments."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.cpu_kernel import (
    BEAM,
    BFLOAT16,
    DESCENT,
    EXACT,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    Beam,
    BeamScratch,
    Geometry,
    Plan,
    Scratch,
    Summaries,
)
from stream_kernels.index import allocate_index, levels_for
from stream_kernels.layout import PagedKeys, layer_refusals
from stream_kernels.reference_descent import probe_offsets
from stream_kernels.search import SearchConfig
from stream_kernels.statistics import FANOUT

STRATEGIES = {"descent": DESCENT, "exact": EXACT, "beam": BEAM}

QUERY_TYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
KEY_TYPES = QUERY_TYPES | {torch.float8_e4m3fn: FLOAT8_E4M3, torch.float8_e5m2: FLOAT8_E5M2}

_TILE_COLUMNS = 64
"""Probe keys scored at a time: at head size 64 a tile of 16 KiB, half of a first-level cache."""


def refusals(
    keys: Sequence[PagedKeys],
    total_query_heads: int,
    config: SearchConfig,
    max_rows: int,
    max_context: int,
    query_dtype: torch.dtype,
    watched: Sequence[int],
) -> list[str]:
    """Every reason not to build a search on a CPU from these arguments."""
    reasons = []
    if query_dtype not in QUERY_TYPES:
        reasons.append(f"queries are {query_dtype}; valid: bfloat16, float16, float32")
    if max_rows < 1 or not 1 <= max_context < 2**31:
        reasons.append(f"max_rows {max_rows} and max_context {max_context} must be positive")
    if not keys:
        return [*reasons, "no layers"]
    if keys[0].layout.head_dim % 4:
        reasons.append(f"head size {keys[0].layout.head_dim} is not a multiple of 4")
    reasons += layer_refusals(keys, total_query_heads, watched)
    reasons += [
        f"layer {index} is on {layer.tensor.device}"
        for index, layer in enumerate(keys)
        if layer.tensor.device.type != "cpu"
    ]
    return reasons


def make_plan(
    keys: Sequence[PagedKeys], units: list[tuple[int, list[int]]], watched: Sequence[int], config: SearchConfig
) -> Plan:
    sizes = [len(slots) for _, slots in units]
    return Plan(
        unit_kv_head=np.array([kv_head for kv_head, _ in units], np.int64),
        unit_first=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        unit_slots=np.array([slot for _, slots in units for slot in slots], np.int64),
        slot_head=np.array(watched, np.int64),
        key_address=np.array([layer.tensor.data_ptr() for layer in keys], np.int64),
        page_stride=np.array([layer.tensor.stride(0) for layer in keys], np.int64),
        head_stride=np.array([layer.tensor.stride(1) for layer in keys], np.int64),
        scale=np.array([layer.scale for layer in keys], np.float32),
        softcap=np.array([layer.softcap for layer in keys], np.float32),
        sinks=sink_logits(keys, watched),
        table=np.array([layer.table for layer in keys], np.int64),
        used_tables=np.array(sorted({layer.table for layer in keys}), np.int64),
        probe_offsets=np.array(probe_offsets(config), np.int64),
    )


def sink_logits(keys: Sequence[PagedKeys], watched: Sequence[int]) -> NDArray[np.float32]:
    """Learned sinks of the watched heads, float32 [L, H]; -inf in layers without."""
    none = np.full(len(watched), -np.inf, np.float32)
    return np.stack([none if layer.sinks is None else layer.sinks[list(watched)].numpy() for layer in keys])


def make_scratch(g: Geometry, heads: int, most_scored: int = 1) -> Scratch:
    """Memory for units of up to `heads` heads; beam scores up to `most_scored` nodes at a time."""
    inner = max(1, -(-g.max_context // g.block_size))
    branches = max(inner if g.strategy == EXACT or inner <= g.width else 2 * g.width, most_scored)
    columns = max(_TILE_COLUMNS, g.block_size)
    return Scratch(
        query=np.zeros((heads, g.head_dim), np.float32),
        tile=np.zeros((g.head_dim, columns), np.float32),
        logits=np.zeros((heads, columns), np.float32),
        start=np.zeros(branches, np.int64),
        end=np.zeros(branches, np.int64),
        peak=np.zeros((heads, branches), np.float32),
        weight=np.zeros((heads, branches), np.float32),
        strongest=np.zeros((heads, branches), np.uint8),
        score=np.zeros(branches, np.float32),
        rank=np.zeros(branches, np.int64),
        work=np.zeros(branches, np.int64),
        outside=np.zeros((heads, 2), np.float32),
        left=np.zeros((heads, 2), np.float32),
    )


def make_beam(g: Geometry, kv_heads: int, heads: int, config: SearchConfig) -> Beam:
    """The pyramid of the whole cache, and memory to search it. Next to nothing where another strategy searches."""
    context = g.max_context if config.strategy == "beam" else config.block_size
    levels = levels_for(config, context)
    index = allocate_index(config, levels, g.page_size, g.num_pages if config.strategy == "beam" else 1, context)
    scored, nodes = levels.most_scored, max(1, int(index.row_offset[-1]))
    vectors = 1 + config.outlier_keys
    statistics = np.zeros((g.layers, kv_heads, vectors, len(index.built), g.head_dim), np.uint16)
    return Beam(
        statistics=statistics,
        min_gain=float(config.min_gain),  # the compiled code takes no whole number
        first_lot=config.first_lot,
        outlier_256ths=config.outlier_256ths,
        spread_weight=np.float32(config.spread_weight),
        width=config.nodes_kept(1),
        upper_width=config.nodes_kept(2),
        tops=levels.tops,
        nodes=index,
        summaries=Summaries(
            address=statistics.ctypes.data + np.arange(g.layers, dtype=np.int64) * statistics.strides[0],
            spreads=np.zeros((g.layers, kv_heads, len(index.built)), np.float32),
            kv_heads=kv_heads,
            slots=len(index.built),
            node=np.zeros((vectors, g.head_dim), np.float32),
            made=np.zeros((vectors, g.head_dim), np.float32),
            candidates=np.zeros((FANOUT * config.outlier_keys, g.head_dim), np.float32),
            distance=np.zeros(FANOUT * config.outlier_keys, np.float32),
        ),
        scratch=BeamScratch(
            profile=np.zeros(g.head_dim, np.float32),
            scale=np.zeros(heads, np.float32),
            slots=np.full(nodes, -1, np.int32),
            jobs=np.zeros((nodes, 3), np.int32),
            front=np.zeros(scored, np.int64),
            below=np.zeros(scored, np.int64),
            centre=np.zeros((heads, scored), np.float32),
            spread=np.zeros((heads, scored), np.float32),
            node_spread=np.zeros(scored, np.float32),
            again=np.zeros(scored, np.int64),
            again_node=np.zeros(scored, np.int64),
            left_estimate=np.zeros((heads, levels.count * scored), np.float32),
            left_blocks=np.zeros(levels.count * scored, np.float32),
            log_blocks=np.zeros(scored, np.float32),
            order=np.zeros(scored, np.int64),
            observed=np.zeros((heads, 2), np.float32),
            norm=np.zeros(heads, np.float32),
            best=np.zeros((heads, g.top_k), np.float32),
            sums=np.zeros((heads, 6), np.float64),
            line=np.zeros((heads, 4), np.float64),
            row_best=np.zeros(scored, np.float32),
        ),
    )


def query_place(queries: torch.Tensor) -> NDArray[np.int64]:
    """Address and the strides of layer, row and head, int64 [4]."""
    return np.array([queries.data_ptr(), *queries.stride()[:3]], np.int64)


def table_places(block_tables: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Address, row stride and columns of each table, int64 [tables, 3]."""
    return np.array([[t.ctypes.data, t.strides[0] // 4, t.shape[1]] for t in block_tables], np.int64)
