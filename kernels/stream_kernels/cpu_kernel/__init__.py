"""The compiled half of `cpu.py`: every watched layer, row and head in one call that never holds the interpreter lock.

Nothing here allocates. Inner loops run over tokens, channels outside: vLLM's CPU caches keep a channel's tokens side by
side, so that eight keys are scored at once and no sum over a vector's lanes is needed. Keys are widened to float32 once
per unit, in a tile [head_dim, tokens] that stays in the first-level cache, and every head of the unit reads it there.

`rows` finds and builds a row's nodes (`nodes`, `summaries`), then calls `unit`, which calls `descent`, or `beam` and
its `reading`; all read through `keys`, `logits` and `selection`. `prompt` calls `beam` for a block of rows at a time.
`packing` writes what was found as it is sent; it is for the results of GPUs too.
"""

from stream_kernels.cpu_kernel.beam_structures import Beam, BeamScratch
from stream_kernels.cpu_kernel.prompt import search_query_block
from stream_kernels.cpu_kernel.rows import search_rows
from stream_kernels.cpu_kernel.structures import (
    BEAM,
    BFLOAT16,
    DESCENT,
    EXACT,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    ROW_INVALID,
    ROW_OK,
    ROW_RACED,
    Geometry,
    Plan,
    Scratch,
)
from stream_kernels.cpu_kernel.summaries import Summaries

__all__ = [
    "BEAM",
    "BFLOAT16",
    "DESCENT",
    "EXACT",
    "FLOAT8_E4M3",
    "FLOAT8_E5M2",
    "FLOAT16",
    "FLOAT32",
    "ROW_INVALID",
    "ROW_OK",
    "ROW_RACED",
    "Beam",
    "BeamScratch",
    "Geometry",
    "Plan",
    "Scratch",
    "Summaries",
    "search_query_block",
    "search_rows",
]
