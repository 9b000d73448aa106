"""What the compiled search works on: sizes, places and working memory, as named tuples that numba reads by field."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pages = NDArray[np.int32]
Summary = tuple[NDArray[Any], ...]
"""The arrays of a `BlockSummary`, in its order."""

BFLOAT16, FLOAT16, FLOAT32, FLOAT8_E4M3, FLOAT8_E5M2 = range(5)
"""Element types, as a number because one compiled search serves all of them; keys alone are of the 8-bit ones."""
ELEMENT_BYTES = (2, 2, 4, 1, 1)
"""Of each element type."""

ZERO = np.float32(0)
MINUS_INFINITY = np.float32(-np.inf)

DESCENT, EXACT, BEAM = 0, 1, 2
"""Strategies."""

ROW_OK, ROW_RACED, ROW_INVALID = 0, 1, 2
"""Status of a row: searched; its pages were reused while it was; its lengths or pages do not fit what was declared."""


class Geometry(NamedTuple):
    """Sizes fixed for the life of a searcher."""

    layers: int
    query_heads: int
    head_dim: int
    page_size: int
    token_group: int
    channel_pack: int
    key_type: int
    query_type: int
    num_pages: int
    max_context: int
    block_size: int
    top_k: int
    sink_blocks: int
    recent_blocks: int
    strategy: int
    rerank: int
    width: int
    """Most candidates: `width * top_k` of the settings."""
    rows: int
    """Rows that search together: 1 but in a prompt."""


class Plan(NamedTuple):
    """Which heads search together, and where each layer's memory is."""

    unit_kv_head: NDArray[np.int64]
    """[U] KV head of each unit."""
    unit_first: NDArray[np.int64]
    """[U + 1] where a unit's slots start in `unit_slots`."""
    unit_slots: NDArray[np.int64]
    """[H] positions in the output of the units' heads."""
    slot_head: NDArray[np.int64]
    """[H] query head of each output position."""
    key_address: NDArray[np.int64]
    """[L] address of the layer's first tile."""
    page_stride: NDArray[np.int64]
    """[L] elements from a page to the next."""
    head_stride: NDArray[np.int64]
    """[L] elements from a KV head to the next."""
    scale: NDArray[np.float32]
    """[L] dot product to logit."""
    softcap: NDArray[np.float32]
    """[L] bound of the logits, 0 for none."""
    sinks: NDArray[np.float32]
    """[L, H] learned sinks in the order of the output, -inf for none."""
    table: NDArray[np.int64]
    """[L] index of the layer's block table."""
    used_tables: NDArray[np.int64]
    """The distinct ones among them. What other tables hold is none of a row's business: that of a sliding-window
    layer, say, goes on naming pages that were given away long ago."""
    probe_offsets: NDArray[np.int64]
    """[r] offsets in a block of its probe keys."""


class Scratch(NamedTuple):
    """Working memory. n: heads of the largest unit; W: columns of a tile; C: most branches or candidates at a time."""

    query: NDArray[np.float32]
    """[n, D], scaled."""
    tile: NDArray[np.float32]
    """[D, W], keys."""
    logits: NDArray[np.float32]
    """[n, W]"""
    start: NDArray[np.int64]
    """[C] first inner block of a branch."""
    end: NDArray[np.int64]
    """[C] one past its last."""
    peak: NDArray[np.float32]
    """[n, C] largest logit of a branch's probe keys, later of a candidate block."""
    weight: NDArray[np.float32]
    """[n, C] sum of exp(logit - peak) over the same keys."""
    strongest: NDArray[np.uint8]
    """[n, C] offset of a candidate's largest logit."""
    score: NDArray[np.float32]
    """[C]"""
    rank: NDArray[np.int64]
    """[C] sort keys."""
    work: NDArray[np.int64]
    """[C] which nodes were read; then the places of the blocks a head keeps."""
    outside: NDArray[np.float32]
    """[n, 2] peak and weight of forced blocks and the learned sink."""
    left: NDArray[np.float32]
    """[n, 2] peak and weight of all inner blocks that are not kept."""
