"""What `GpuSearch` checks and sets aside when it is built: refusals, sizes, plan, working memory."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import triton

from stream_kernels.gpu_structures import BeamScratch, Cache, DescentScratch, Plan, Shape, TopScratch
from stream_kernels.index import Levels, levels_for
from stream_kernels.layout import DeviceKeys, layer_refusals
from stream_kernels.search import SearchConfig
from stream_kernels.statistics import FANOUT, MAX_RESIDUAL

QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEADS = 16
"""Query heads of a unit: one side of a tensor-core product."""
MOST_TOP_K = 64
MOST_CANDIDATES = 512
_KEYS_READ = 128
"""Keys or summaries that a program reads at a time, and multiplies in one product; twice as many where it has a
multiprocessor to itself, half of it above 128 channels or where they are multiplied in float32."""
_NODES_SCANNED = 256
"""Estimates that a program goes through at a time."""
_PROGRAMS_PER_PROCESSOR = 2
"""As many as a multiprocessor has registers for, in the code compiled for compute capability 9.0."""
_ALIGNMENT = 16
"""Bytes that a thread loads at once."""


def refusals(
    keys: Sequence[DeviceKeys],
    total_query_heads: int,
    config: SearchConfig,
    max_rows: int,
    max_context: int,
    query_dtype: torch.dtype,
    watched: Sequence[int],
) -> list[str]:
    """Every reason not to build a search on a GPU from these arguments."""
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
    reasons += layer_refusals(keys, total_query_heads, watched)
    for index, layer in enumerate(keys):
        size = layer.tensor.element_size()
        if layer.tensor.data_ptr() % _ALIGNMENT or any(s * size % _ALIGNMENT for s in layer.tensor.stride()[:3]):
            reasons.append(f"layer {index} has keys that do not start at a multiple of {_ALIGNMENT} bytes")
        if max(layer.tensor.stride()) >= 2**31:
            reasons.append(f"layer {index} has keys that lie 2^31 elements or more apart from one to the next")
        if layer.table < 0:
            reasons.append(f"layer {index} names block table {layer.table}")
    if not 16 <= first.layout.head_dim <= 256:
        reasons.append(f"head size is {first.layout.head_dim}; valid: 16 to 256")
    if total_query_heads // first.kv_heads > MOST_HEADS:
        reasons.append(f"{total_query_heads // first.kv_heads} query heads share a KV head; at most {MOST_HEADS} may")
    return reasons


def pyramid_refusals(
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


def processors_of(device: torch.device) -> int:
    """Multiprocessors; on the CPU Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs_on(device: torch.device) -> int:
    """Programs to launch where nothing bounds them."""
    return _PROGRAMS_PER_PROCESSOR * processors_of(device)


def _dot_type(query_dtype: torch.dtype, stored: torch.dtype) -> str:
    """What a product of queries and what is stored as `stored` is formed in: their own type where both are of one that
    tensor cores multiply; else float32, as everywhere under Triton's interpreter, whose other products are wrong."""
    native = stored == query_dtype and query_dtype.itemsize == 2 and not triton.knobs.runtime.interpret
    return str(query_dtype).removeprefix("torch.") if native else "float32"


def make_shape(
    keys: Sequence[DeviceKeys],
    config: SearchConfig,
    max_context: int,
    query_dtype: torch.dtype,
    query_heads: int,
    units: int,
    group: int,
    levels: Levels,
    alone: bool,
) -> Shape:
    """What the kernels are compiled for; `alone`: each program has a multiprocessor to itself."""
    dtype, layout = keys[0].tensor.dtype, keys[0].layout
    dim_tile = triton.next_power_of_2(layout.head_dim)
    dot_type, vector_type = _dot_type(query_dtype, dtype), _dot_type(query_dtype, torch.bfloat16)
    # Of a tensor-core product the columns, or in float32 the rows.
    fewest_heads = 16 if "float32" in (dot_type, vector_type) else 8
    keys_read = _KEYS_READ * (2 if alone else 1) // (1 if dim_tile <= 128 and dot_type != "float32" else 2)
    read_tile = max(1, min(keys_read // config.block_size, triton.next_power_of_2(config.top_k)))
    candidates = _candidates(config, max_context)
    probe_tile = triton.next_power_of_2(config.probe_keys)
    return Shape(
        layers=len(keys),
        units=units,
        query_heads=query_heads,
        kv_heads=keys[0].kv_heads,
        group=group,
        group_tile=max(fewest_heads, triton.next_power_of_2(group)),
        head_dim=layout.head_dim,
        dim_tile=dim_tile,
        page_size=layout.page_size,
        block_size=config.block_size,
        key_type=str(dtype).removeprefix("torch."),
        dot_type=dot_type,
        vector_type=vector_type,
        # Products of numbers of at most 11 binary digits are exact in TF32; wider ones are taken in three parts.
        dot_precision="tf32x3" if torch.float32 in (dtype, query_dtype) else "tf32",
        softcap=any(layer.softcap > 0 for layer in keys),
        top_k=config.top_k,
        top_tile=max(read_tile, triton.next_power_of_2(config.top_k)),
        sink_blocks=config.sink_blocks,
        recent_blocks=config.recent_blocks,
        read_tile=read_tile,
        profile_tile=max(1, min(64 // config.block_size, triton.next_power_of_2(config.recent_blocks))),
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
        spread_weight=float(config.spread_weight),
        outlier_keys=config.outlier_keys,
        outliers_tile=triton.next_power_of_2(config.outlier_keys),
        vectors=1 + config.outlier_keys,
        levels=levels.count,
        nodes_tile=triton.next_power_of_2(levels.most_scored),
        box_width=config.nodes_kept(1),
        upper_width=config.nodes_kept(2),
        kept_tile=triton.next_power_of_2(config.nodes_kept(1)),
        nodes_read=keys_read,
        nodes_scanned=_NODES_SCANNED,
    )


def make_cache(keys: Sequence[DeviceKeys]) -> Cache:
    device = keys[0].tensor.device

    def numbers(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Cache(
        address=numbers([layer.tensor.data_ptr() for layer in keys], torch.int64),
        page_stride=numbers([layer.tensor.stride(0) for layer in keys], torch.int32),
        token_stride=numbers([layer.tensor.stride(1) for layer in keys], torch.int32),
        head_stride=numbers([layer.tensor.stride(2) for layer in keys], torch.int32),
        num_pages=numbers([layer.num_pages for layer in keys], torch.int32),
        table=numbers([layer.table for layer in keys], torch.int32),
        scale=torch.tensor([layer.scale for layer in keys], device=device),
        softcap=torch.tensor([layer.softcap for layer in keys], device=device),
    )


def make_plan(
    keys: Sequence[DeviceKeys], units: list[tuple[int, list[int]]], watched: Sequence[int], group_tile: int
) -> Plan:
    device = keys[0].tensor.device
    slots = [unit + [-1] * (group_tile - len(unit)) for _, unit in units]
    heads = [[-1 if slot < 0 else watched[slot] for slot in unit] for unit in slots]
    return Plan(
        kv_head=torch.tensor([kv_head for kv_head, _ in units], dtype=torch.int32, device=device),
        slot=torch.tensor(slots, dtype=torch.int32, device=device),
        head=torch.tensor(heads, dtype=torch.int32, device=device),
        sinks=sink_logits(keys, watched).to(device),
    )


def sink_logits(keys: Sequence[DeviceKeys], watched: Sequence[int]) -> torch.Tensor:
    """Learned sinks of the watched heads, float32 [L, H] on the CPU; -inf where a layer has none."""
    none = torch.full((len(watched),), -math.inf)
    return torch.stack([none if layer.sinks is None else layer.sinks.cpu()[list(watched)] for layer in keys])


def make_top_scratch(shape: Shape, programs: int, device: torch.device) -> TopScratch:
    """Working memory of every program for the heaviest blocks."""
    sizes = programs, shape.group_tile, 2 * shape.top_tile
    return TopScratch(torch.zeros(sizes, device=device), torch.zeros(sizes, dtype=torch.int32, device=device))


def make_scratch(shape: Shape, programs: int, device: torch.device) -> BeamScratch | DescentScratch | None:
    """Working memory of every program."""

    def floats(*sizes: int) -> torch.Tensor:
        return torch.zeros(programs, *sizes, device=device)

    def integers(*sizes: int) -> torch.Tensor:
        return torch.zeros(programs, *sizes, dtype=torch.int32, device=device)

    if shape.strategy == "beam":
        return BeamScratch(
            log_mass=floats(shape.levels, shape.group, shape.nodes_tile),
            weight=floats(shape.levels, shape.nodes_tile),
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
