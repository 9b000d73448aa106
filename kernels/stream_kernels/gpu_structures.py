"""What the GPU kernels work on: sizes fixed when they are compiled, and places in device memory as named tuples.

Triton takes the tuples apart into plain kernel arguments. A field typed Any is a tensor on the host and a pointer (or
a value on its way through registers) in a kernel.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Shape:
    """Sizes fixed for the life of a search. A `_tile` is a size rounded up to a power of two, as registers hold it."""

    layers: int
    units: int
    """Of one layer and row."""
    query_heads: int
    """Watched ones, over all units."""
    kv_heads: int
    group: int
    """Most query heads of a unit."""
    group_tile: int
    """At least as many as a tensor-core product has of them."""
    head_dim: int
    dim_tile: int
    page_size: int
    block_size: int
    key_type: str
    """`bfloat16`, `float8_e4m3fn`, ...: the name of the cache's element type."""
    dot_type: str
    """What queries and keys are multiplied as, `bfloat16`, `float16` or `float32`; products are summed in float32."""
    vector_type: str
    """The same of queries and summaries."""
    dot_precision: str
    """Triton's name for how products in float32 are formed."""
    softcap: bool
    """Some layer has one."""
    top_k: int
    top_tile: int
    sink_blocks: int
    recent_blocks: int
    read_tile: int
    """Blocks read at a time; divides `top_tile`."""
    profile_tile: int
    """Blocks read at a time for the profile of the keys' spread."""
    max_context: int
    strategy: str
    rerank: bool
    candidates: int
    """Most blocks that a descent or a beam reads in full: `width * top_k` of the settings, or all inner blocks of
    `max_context` if they are fewer."""
    candidates_tile: int
    probe_keys: int
    probe_tile: int
    branches_read: int
    """Branches whose probe keys are read at a time, a power of two."""
    fanout: int
    max_residual: float
    min_gain: float
    first_lot: int
    outlier_256ths: int
    spread_weight: float
    outlier_keys: int
    outliers_tile: int
    vectors: int
    """Of a node: its mean and outliers."""
    levels: int
    """Of the pyramid of summaries."""
    nodes_tile: int
    """Most nodes of one level that a search scores."""
    box_width: int
    """Nodes of level 1 that a search keeps."""
    upper_width: int
    """The same of each level above."""
    kept_tile: int
    nodes_read: int
    """Summaries read at a time."""
    nodes_scanned: int
    """Nodes whose estimates are gone through at a time."""


class Cache(NamedTuple):
    """The watched layers' keys, each [L]."""

    address: Any
    """int64, of the first key."""
    page_stride: Any
    """int32, in elements, as all strides here."""
    token_stride: Any
    head_stride: Any
    num_pages: Any
    """int32."""
    table: Any
    """int32, which block table maps the layer's pages."""
    scale: Any
    """float32."""
    softcap: Any
    """float32, 0 for none."""


class Plan(NamedTuple):
    """Which heads search together."""

    kv_head: Any
    """int32 [U]."""
    slot: Any
    """int32 [U, group_tile], the position of each of a unit's heads in the output, -1 for none."""
    head: Any
    """int32 [U, group_tile], the query head, -1 for none."""
    sinks: Any
    """float32 [L, H], learned sinks by position in the output; -inf for none."""


class Batch(NamedTuple):
    """The rows of one call."""

    rows: Any
    """int32 [1], how many there are."""
    queries: Any
    """[L, rows, H_total, D]."""
    query_layer_stride: Any
    query_row_stride: Any
    query_head_stride: Any
    context_lens: Any
    """int32 [rows]."""
    block_tables: Any
    """int32 [tables, rows, pages]."""
    table_stride: Any
    table_row_stride: Any


class Pyramid(NamedTuple):
    """Block summaries and who owns which."""

    summaries: Any
    """int16, the bits of bfloat16 [L, slots, kv_heads, vectors, head_dim]: mean, outliers."""
    spreads: Any
    """float32 [L, slots, kv_heads]."""
    slots: Any
    node_slots: Any
    """int32 [rows, nodes]."""
    node_row_stride: Any
    level_offsets: Any
    """int32 [levels], where a level's nodes start in a row of `node_slots`."""
    tops: Any
    """int32, the level where a search starts, by the first block that is not searched."""


class Results(NamedTuple):
    """The tensors of a `DeviceSummary`, in its order."""

    block_ids: Any
    block_lse: Any
    strongest: Any
    forced_lse: Any
    forced_strongest: Any
    unobserved_lse: Any
    learned_sink_lse: Any
    unit_keys_read: Any
    status: Any
    rows: Any
    """Rows there is room for."""


class Unit(NamedTuple):
    """One unit of one row and layer: where its keys are and how its logits are formed."""

    layer: Any
    row: Any
    kv_head: Any
    keys: Any
    """Pointer to the KV head's first key."""
    page_stride: Any
    token_stride: Any
    num_pages: Any
    pages: Any
    """Pointer to the row's pages."""
    context: Any
    scale: Any
    softcap: Any
    query: Any
    """[group_tile, dim_tile] as stored, unscaled."""
    slot: Any
    """int32 [group_tile]."""
    present: Any
    """bool [group_tile], which heads there are."""
    status: Any
    """Pointer to the row's status."""


class Top(NamedTuple):
    """The heaviest blocks so far of each head, heaviest first, and the mass of the blocks that fell out."""

    lse: Any
    """float32 [group_tile, top_tile], -inf where there is none."""
    key: Any
    """int32 [group_tile, top_tile], the position in the context of the block's strongest key."""
    rest: Any
    """float32 [group_tile], log-sum-exp."""


class TopScratch(NamedTuple):
    """Working memory for a unit's heaviest blocks, [group_tile, 2 * top_tile]: those so far, then new ones."""

    lse: Any
    """float32."""
    key: Any
    """int32."""


class Moments(NamedTuple):
    """Running first and second moments of estimate x and truth y, per head [group_tile]; `count` is one for all."""

    count: Any
    mean_x: Any
    mean_y: Any
    xx: Any
    xy: Any
    yy: Any


class Fit(NamedTuple):
    """`reference_beam.Regression`, each [group_tile]."""

    centre_x: Any
    centre_y: Any
    slope: Any
    residual: Any


class BeamScratch(NamedTuple):
    """Working memory of the beam, one of each per program."""

    log_mass: Any
    """float32 [levels, group, nodes_tile], estimated log-sum-exp of one block of each node scored."""
    weight: Any
    """float32 [levels, nodes_tile], logarithm of the blocks a node counts, -inf for nodes that were looked into."""
    scored: Any
    """int32 [levels], nodes scored."""
    again: Any
    """int32 [2, nodes_tile], of one level's nodes whose outlier is looked at: position among those scored, number."""
    kept: Any
    """int32 [levels, kept_tile], in ascending order."""
    chosen: Any
    """int32 [2, candidates_tile]: position among the nodes scored, and sortable score, of the blocks to be read."""
    order: Any
    """int32 [2, candidates_tile]: the same in order of reading: block ids, positions."""


class DescentScratch(NamedTuple):
    """Working memory of the descent, one of each per program."""

    span: Any
    """int32 [2, candidates_tile]: first block of each branch, and the one after its last, counted from the sinks."""
    best: Any
    """float32 [group, 2 * candidates_tile], largest logit of a half's probe keys."""
    mass: Any
    """float32 [group, 2 * candidates_tile], estimated log-sum-exp of a half."""
