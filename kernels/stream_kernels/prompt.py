"""A prompt as the search for blocks of queries reads it: its keys in blocks, and what a search says of them."""

import math
from dataclasses import dataclass

import torch

from stream_kernels.reference import search_units
from stream_kernels.search import SearchConfig
from stream_kernels.statistics import FANOUT, NodeStatistics, capped, pyramid, spread_profile

_TILE_BLOCKS = 128
"""Key blocks read at a time, which bounds the logits in memory."""


@dataclass(frozen=True)
class Prompt:
    """What every query block of U units searches: N blocks of keys of G KV heads, the last one filled up with zeros.

    Attributes:
        channels: [G, N, D, block_size], the keys, a channel's tokens side by side, as the compiled search reads them.
        nodes: the pyramid over them, [G, J, D] each; empty where the strategy has none.
        kv_head: int64 [U], which of the G each unit reads.
        softcap: bound of the logits, 0 for none.
        config: the strategy and its parameters.
    """

    channels: torch.Tensor
    nodes: list[NodeStatistics]
    kv_head: torch.Tensor
    softcap: float
    config: SearchConfig

    @property
    def blocks(self) -> torch.Tensor:
        """The keys, [G, N, block_size, D]."""
        return self.channels.mT

    def profile(self, end: int, position: int) -> torch.Tensor:
        """`spread_profile` of the keys from block `end` to `position`, which a row there reads anyway, [U, D]."""
        size = self.config.block_size
        recent = self.blocks[:, end : position // size + 1]
        place = end * size + torch.arange(recent.shape[1] * size, device=recent.device)
        return spread_profile(recent, (place <= position).view(1, -1, size))[self.kv_head]

    def logits(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of queries [U, m, D] with the keys of blocks `ids` [U, C]: [U, m, C, block_size]."""
        keys = self.channels[self.kv_head[:, None], ids]
        logits: torch.Tensor = queries @ keys.transpose(1, 2).flatten(2, 3)
        return capped(logits.unflatten(-1, (-1, self.config.block_size)), self.softcap)

    def block_lse(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Log-sum-exp of each of those blocks' logits, [U, m, C]."""
        parts = [self.logits(queries, part).logsumexp(-1) for part in ids.split(_TILE_BLOCKS, 1)]
        return torch.cat(parts, -1) if parts else queries.new_zeros(*queries.shape[:2], 0)


@dataclass(frozen=True)
class Leaves:
    """What a strategy read for U units of m rows and heads.

    Attributes:
        ids: int64 [U, C], candidates.
        read: bool [U, C], which of them were read.
        lse: [U, m, C], their exact log-sum-exps; -inf where not read.
        unread: [U, m], estimated log-sum-exp of all other inner blocks.
        reads: [U], key-equivalents read on the way, candidates not counted.
    """

    ids: torch.Tensor
    read: torch.Tensor
    lse: torch.Tensor
    unread: torch.Tensor
    reads: torch.Tensor


def read_prompt(keys: torch.Tensor, query_heads: int, config: SearchConfig, softcap: float = 0.0) -> Prompt:
    """Cuts a layer's keys into blocks and, for beam, summarises them; float32, or float64 if `keys` are.

    Args:
        keys: [T, G, D] after position encoding, any float type, on any device.
        query_heads: of the layer; a multiple of G.
        config: the strategy and its parameters.
        softcap: bound of the logits as in `PagedKeys`, 0 for none.

    Raises:
        ValueError: shapes do not fit each other, or `softcap` is out of its range.
    """
    if keys.ndim != 3 or query_heads % max(1, keys.shape[1]):
        raise ValueError(f"{query_heads} query heads do not divide among keys {list(keys.shape)}; expected [T, G, D]")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; valid: positive, or 0 for none")
    length, kv_heads, _ = keys.shape
    size = config.block_size
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    blocks = torch.nn.functional.pad(keys.transpose(0, 1), (0, 0, 0, -length % size)).unflatten(1, (-1, size))
    count, levels = blocks.shape[1], 1
    while FANOUT**levels <= count:
        levels += 1
    nodes = []
    if config.strategy == "beam":
        nodes = pyramid(blocks.contiguous(), levels, config.sink_blocks, config.outlier_keys)
    units = search_units(range(query_heads), query_heads // kv_heads, config)
    return Prompt(
        channels=blocks.mT.contiguous(),
        nodes=nodes,
        kv_head=torch.tensor([kv_head for kv_head, _ in units], device=keys.device),
        softcap=softcap,
        config=config,
    )


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest along the last axis that are not -inf, bool; lower index first where equal."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True) & (values > -math.inf)
