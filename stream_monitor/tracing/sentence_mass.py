"""How much attention each sentence gives to each earlier one, read from the kept blocks alone.

Blocks of 32 tokens and sentences do not line up: a query block holds the end of one sentence and the start of the
next, and so does a key block. Shares of whole blocks, however they are divided among sentences, blur just the
sentences that matter. So the kept and the forced blocks are read once more, token by token, as the pass goes through a
layer: each row's mass goes to the sentence that the row belongs to, each key's to the sentence of the key. This costs
what attention to the kept blocks costs.

A key's share is taken of the row's whole attention: the search's estimate of what it did not read is in the
denominator. That part is kept beside as `unobserved` and not spread over sentences, which would only move the ranking
of anchors away from that of exact attention.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.prefill import PrefillSummary
from stream_kernels.search import NO_BLOCK
from stream_kernels.statistics import capped
from stream_monitor.tracing.attention import LayerInputs, visible_keys

_TILE_NUMBERS = 2**22
"""Key numbers gathered at a time: 16 MiB of float32."""


@dataclass(frozen=True)
class SentenceMass:
    """One layer's attention among S sentences in H heads: n non-zero entries, ascending by (query, head, key).

    Attributes:
        query, key: int32 [n], sentences; head: int32 [n].
        mass: float32 [n], share of the key sentence's tokens together in the attention of the query sentence's tokens,
            mean over the latter.
        unobserved: float32 [S, H], the same of everything that was not read. With the masses of a (query, head) it
            sums to 1.
    """

    query: NDArray[np.int32]
    head: NDArray[np.int32]
    key: NDArray[np.int32]
    mass: NDArray[np.float32]
    unobserved: NDArray[np.float32]


@dataclass(frozen=True)
class _Pieces:
    """The parts of B blocks that sentences cut them into, at most P each.

    Attributes:
        first: int64 [B], number of the sentence that a block begins in; its piece p belongs to sentence first + p.
        belongs: float [B, size, P], 1 where a token of the block belongs to the piece.
    """

    first: torch.Tensor
    belongs: torch.Tensor


def read_sentence_mass(
    inputs: LayerInputs, found: PrefillSummary, block_size: int, sentences: NDArray[np.int64]
) -> SentenceMass:
    """Reads the kept and the forced blocks of one layer over a whole context.

    Args:
        inputs: of the layer, with as many queries as keys.
        found: of a search over them with query blocks of `block_size`.
        block_size: tokens per block.
        sentences: int64 [T], the sentence of each token, ascending without gaps.
    """
    length, kv_heads, dim = inputs.keys.shape
    heads, device = inputs.queries.shape[1], inputs.keys.device
    count = int(sentences[-1]) + 1
    pieces = _pieces(torch.from_numpy(sentences).to(device), block_size, inputs.keys.dtype)
    pad = -length % block_size
    keys = torch.nn.functional.pad(inputs.keys.transpose(0, 1), (0, 0, 0, pad)).unflatten(1, (-1, block_size))
    queries = torch.nn.functional.pad(inputs.queries.transpose(0, 1), (0, 0, 0, pad)).unflatten(1, (-1, block_size))
    queries = queries.transpose(0, 1)
    ids = torch.cat([found.block_ids, found.forced_ids[:, None].expand(-1, heads, -1)], -1).long()
    kv_head = torch.arange(heads, device=device)[:, None] // (heads // kv_heads)
    head = torch.arange(heads, device=device)[None, :, None, None, None]

    codes, masses = [], []
    tile = max(1, _TILE_NUMBERS // (heads * ids.shape[2] * block_size * dim))
    for first in range(0, len(ids), tile):
        some = slice(first, first + tile)
        part, place = ids[some], ids[some].clamp(min=0)
        logits = capped(queries[some] @ keys[kv_head, place].flatten(2, 3).mT * inputs.scale, inputs.softcap)
        row = found.first_position[some, None, None] + torch.arange(block_size, device=device)
        key = (place[..., None] * block_size + torch.arange(block_size, device=device)).flatten(2)
        read = visible_keys(row, key, inputs.window) & (part != NO_BLOCK).repeat_interleave(block_size, 2)[:, :, None]
        shares = (logits - found.row_lse[some, ..., None]).masked_fill(~read, -math.inf).exp()
        by_row = (pieces.belongs[some, None].mT @ shares).unflatten(-1, (-1, block_size)).transpose(2, 3)
        by_key = (by_row @ pieces.belongs[place]).transpose(2, 3)  # [b, H, P, C, P]
        piece = torch.arange(pieces.belongs.shape[2], device=device)
        query_sentence = (pieces.first[some, None] + piece)[:, None, :, None, None]
        key_sentence = (pieces.first[place][..., None] + piece)[:, :, None]
        code = (query_sentence * heads + head) * count + key_sentence
        codes.append(code[by_key > 0].cpu().numpy())
        masses.append(by_key[by_key > 0].double().cpu().numpy())

    found_codes, inverse = np.unique(np.concatenate(codes), return_inverse=True)
    query, head_and_key = np.divmod(found_codes, heads * count)
    head_of, key_of = np.divmod(head_and_key, count)
    mass = np.bincount(inverse, np.concatenate(masses), len(found_codes)) / np.bincount(sentences)[query]
    total = np.bincount(query * heads + head_of, mass, count * heads).reshape(count, heads)
    return SentenceMass(
        query=query.astype(np.int32),
        head=head_of.astype(np.int32),
        key=key_of.astype(np.int32),
        mass=mass.astype(np.float32),
        unobserved=np.clip(1 - total, 0, 1).astype(np.float32),
    )


def _pieces(sentences: torch.Tensor, block_size: int, dtype: torch.dtype) -> _Pieces:
    """Of the blocks of tokens that belong to `sentences`, int64 [T]."""
    blocks = torch.nn.functional.pad(sentences, (0, -len(sentences) % block_size), value=NO_BLOCK)
    blocks = blocks.unflatten(0, (-1, block_size))
    first = blocks[:, 0]
    offset = blocks - first[:, None]
    piece = torch.arange(int(offset.max()) + 1, device=sentences.device)
    return _Pieces(first, ((offset[..., None] == piece) & (blocks != NO_BLOCK)[..., None]).to(dtype))
