"""Attention restricted to the key blocks that a search kept, for each block of queries and each head."""

import math

import torch

from stream_kernels.prefill import PrefillSummary
from stream_kernels.search import NO_BLOCK
from stream_kernels.statistics import capped
from stream_monitor.tracing.attention import LayerInputs, visible_keys

_TILE_NUMBERS = 2**23
"""Key numbers gathered at a time: 32 MiB of float32, and as much for the values."""


def sparse_attention(inputs: LayerInputs, found: PrefillSummary, block_size: int) -> torch.Tensor:
    """The layer's output if every row reads the kept and the forced blocks of its query block alone, [Q, H, Dv].

    The softmax runs over what is read, so that its shares sum to 1; inside a block a row sees what the layer would let
    it see (the diagonal block is causal, a window's first block begins in its middle). Time and memory are linear in Q.

    Args:
        inputs: of the layer.
        found: of a search over the same queries and keys.
        block_size: tokens per key block in `found`.
    """
    length, kv_heads, dim = inputs.keys.shape
    heads = inputs.queries.shape[1]
    pad = -length % block_size
    keys, values = (
        torch.nn.functional.pad(x.transpose(0, 1), (0, 0, 0, pad)).unflatten(1, (-1, block_size))
        for x in (inputs.keys, inputs.values)
    )
    ids = torch.cat([found.block_ids, found.forced_ids[:, None].expand(-1, heads, -1)], -1).long()
    kv_head = torch.arange(heads, device=ids.device)[:, None] // (heads // kv_heads)
    rows = int(found.rows[0])
    # The last query block may be short; what its missing rows would read is cut off at the end.
    queries = torch.nn.functional.pad(inputs.queries.transpose(0, 1), (0, 0, 0, len(ids) * rows - len(inputs.queries)))
    queries = queries.unflatten(1, (len(ids), rows)).transpose(0, 1)

    tile = max(1, _TILE_NUMBERS // (heads * ids.shape[2] * block_size * dim))
    parts = []
    for first in range(0, len(ids), tile):
        some = slice(first, first + tile)
        part = ids[some]
        place = part.clamp(min=0)
        logits = capped(queries[some] @ keys[kv_head, place].flatten(2, 3).mT * inputs.scale, inputs.softcap)
        row = found.first_position[some, None, None] + torch.arange(rows, device=ids.device)
        key = (place[..., None] * block_size + torch.arange(block_size, device=ids.device)).flatten(2)
        read = visible_keys(row, key, inputs.window) & (part != NO_BLOCK).repeat_interleave(block_size, 2)[:, :, None]
        shares = logits.masked_fill(~read, -math.inf).softmax(-1)
        parts.append(shares @ values[kv_head, place].flatten(2, 3))
    out = torch.cat(parts).transpose(1, 2).flatten(0, 1)
    return out[: len(inputs.queries)]
