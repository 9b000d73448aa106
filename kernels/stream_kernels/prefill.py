"""The search for a whole prompt: blocks of queries against the keys before them, in plain torch on any device.

For tracing a prompt offline, or capturing it as it is read. Each block of queries is one search: its rows share their
candidates, as the query heads of a unit do (see `reference.py` for the words). Memory is linear in the prompt: the keys
and their summaries, and the logits of one query block at a time.

A key block is **inner** to a query block if it is inner to its first row, so that every row sees all of it. What lies
between, the recent blocks of the first row up to the diagonal, is forced and masked causally.

How the rows of a query block are taken together:

* A node's score is the largest over the rows of the heads' summed shares: what one row looks for shall be found.
  Under `descent` it is the maximum over rows and heads, as it is over heads for one row.
* Every row and head has a regression of its own. Beam reads on while some row's heads may expect to gain enough.
* At the leaves the share of a candidate in each row's attention is exact, up to the row's estimated unobserved mass.
  A head keeps the `top_k` candidates whose shares, reduced over the rows, are largest.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from stream_kernels.reference import search_units
from stream_kernels.reference_beam import Regression, unit_scores
from stream_kernels.reference_descent import descent, probe_offsets
from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_kernels.statistics import (
    FANOUT,
    NodeStatistics,
    bulk_scores,
    capped,
    outlier_scores,
    pyramid,
    spread_profile,
    top_level,
)

Reduction = Literal["max", "mean", "union"]

_TILE_BLOCKS = 128
"""Key blocks read at a time, which bounds the logits in memory."""


@dataclass(frozen=True)
class PrefillSummary:
    """Sparse attention of B blocks of queries in one layer, H query heads each.

    A block's mass is the natural logarithm of its share of a row's attention, reduced over the rows, plus `total_lse`:
    `exp(mass - total_lse)` is the reduced share, and for a single row the mass is the log-sum-exp of its logits. The
    reductions are the largest share (`max`, `union`) and the mean share (`mean`, under which kept, forced and
    unobserved shares sum to 1).

    Attributes:
        first_position: int64 [B], position of each query block's first row.
        rows: int64 [B], its rows.
        block_ids: int32 [B, H, K], kept inner blocks, heaviest first, `NO_BLOCK` where there are fewer. K is `top_k`;
            under `union`, where every row's `top_k` are kept, `union_limit`.
        block_lse: float32 [B, H, K], their masses; -inf where padded.
        forced_ids: int32 [B, F], sink blocks, then recent ones up to the diagonal, ascending; `NO_BLOCK` if absent. F
            is `sink_blocks + recent_blocks`, and as many more as a query block may reach across.
        forced_lse: float32 [B, H, F], their masses.
        unobserved_lse: float32 [B, H], mass of everything else, estimated where it was not read; -inf if none.
        total_lse: float32 [B, H], mean over the rows of the logarithm of the softmax denominator.
        row_lse: float32 [B, H, n], logarithm of each row's softmax denominator, n rows a query block; infinite behind
            the last row.
        keys_read: float32 [B], key-equivalents read for the whole query block, per query head.
    """

    first_position: torch.Tensor
    rows: torch.Tensor
    block_ids: torch.Tensor
    block_lse: torch.Tensor
    forced_ids: torch.Tensor
    forced_lse: torch.Tensor
    unobserved_lse: torch.Tensor
    total_lse: torch.Tensor
    row_lse: torch.Tensor
    keys_read: torch.Tensor


@dataclass(frozen=True)
class _Prompt:
    """What every query block of U units searches.

    Attributes:
        blocks: [G, N, block_size, D], the keys, zero behind the last.
        nodes: the pyramid over them, [G, J, D] each; empty where the strategy has none.
        kv_head: int64 [U], which of the G each unit reads.
    """

    blocks: torch.Tensor
    nodes: list[NodeStatistics]
    kv_head: torch.Tensor
    softcap: float
    config: SearchConfig

    def profile(self, end: int, position: int) -> torch.Tensor:
        """`spread_profile` of the keys from block `end` to `position`, which a row there reads anyway, [U, D]."""
        size = self.config.block_size
        recent = self.blocks[:, end : position // size + 1]
        place = end * size + torch.arange(recent.shape[1] * size, device=recent.device)
        return spread_profile(recent, (place <= position).view(1, -1, size))[self.kv_head]

    def logits(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of queries [U, m, D] with the keys of blocks `ids` [U, C]: [U, m, C, block_size]."""
        keys = self.blocks[self.kv_head[:, None], ids]
        logits: torch.Tensor = queries @ keys.flatten(1, 2).mT
        return capped(logits.view(*logits.shape[:2], *keys.shape[1:3]), self.softcap)

    def block_lse(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Log-sum-exp of each of those blocks' logits, [U, m, C]."""
        parts = [self.logits(queries, part).logsumexp(-1) for part in ids.split(_TILE_BLOCKS, 1)]
        return torch.cat(parts, -1) if parts else queries.new_zeros(*queries.shape[:2], 0)


@dataclass(frozen=True)
class _Leaves:
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


def search_prefill(
    queries: torch.Tensor,
    keys: torch.Tensor,
    config: SearchConfig,
    *,
    scale: float,
    softcap: float = 0.0,
    first_query: int = 0,
    query_block: int = 32,
    reduction: Reduction = "max",
    union_limit: int | None = None,
) -> PrefillSummary:
    """Finds the key blocks that each block of queries reads in one layer, in float32 (float64 if given that).

    Args:
        queries: [Q, H, D], Q >= 1, after position encoding, unscaled; any float type, on any device.
        keys: [T, G, D] on the same device, T >= first_query + Q; later ones are ignored. Query head h reads KV head
            h // (H // G).
        config: the strategy and its parameters.
        scale: factor from dot product to logit.
        softcap: bound of the logits as in `PagedKeys`, 0 for none.
        first_query: position of the first query. Chunks of a prompt, each a multiple of `query_block` but the last,
            give what the whole prompt gives.
        query_block: rows that search together; the last block may be short.
        reduction: over the rows of a query block, see `PrefillSummary`.
        union_limit: most blocks kept per head under `union`, the largest shares first; `4 * top_k` by default.

    Raises:
        ValueError: shapes do not fit each other, or a number is out of its range.
    """
    _check(queries, keys, scale, softcap, first_query, query_block, reduction, union_limit)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    rows, heads, _ = queries.shape
    prompt = _read_prompt(keys[: first_query + rows].to(dtype), heads, softcap, config)
    kept = config.top_k if reduction != "union" else (union_limit or 4 * config.top_k)
    found = []
    for first in range(0, rows, query_block):
        block = queries[first : first + query_block].to(dtype) * scale
        # Heads of one KV head are neighbours, so that units are rows of this view.
        block = block.transpose(0, 1).unflatten(0, (len(prompt.kv_head), -1))
        found.append(_search_block(prompt, block, first_query + first, query_block, reduction, kept))
    starts = torch.arange(0, rows, query_block, device=queries.device)
    return PrefillSummary(
        first_position=first_query + starts,
        rows=(rows - starts).clamp(max=query_block),
        block_ids=torch.stack([part.block_ids for part in found]).int(),
        block_lse=torch.stack([part.block_lse for part in found]).float(),
        forced_ids=torch.stack([part.forced_ids for part in found]).int(),
        forced_lse=torch.stack([part.forced_lse for part in found]).float(),
        unobserved_lse=torch.stack([part.unobserved_lse for part in found]).float(),
        total_lse=torch.stack([part.total_lse for part in found]).float(),
        row_lse=torch.stack([part.row_lse for part in found]).float(),
        keys_read=torch.stack([part.keys_read for part in found]).float(),
    )


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float,
    first_query: int,
    query_block: int,
    reduction: str,
    union_limit: int | None,
) -> None:
    """Raises ValueError for arguments that `search_prefill` does not take."""
    shapes = f"queries are {list(queries.shape)}, keys {list(keys.shape)}"
    if queries.ndim != 3 or keys.ndim != 3 or queries.shape[2] != keys.shape[2] or not queries.shape[0]:
        raise ValueError(f"{shapes}; expected [Q, H, D] and [T, G, D] with one D and Q >= 1")
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(f"{shapes}: the query heads do not divide among the KV heads")
    if not 0 <= first_query <= keys.shape[0] - queries.shape[0]:
        raise ValueError(f"{shapes}: the keys do not reach from position 0 to the queries that start at {first_query}")
    if not scale > 0 or not 0 <= softcap < math.inf:
        raise ValueError(f"scale is {scale} and softcap {softcap}; valid: positive; positive, or 0 for none")
    if query_block < 1 or (union_limit is not None and union_limit < 1):
        raise ValueError(f"query_block is {query_block} and union_limit {union_limit}; valid: at least 1")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; valid: {', '.join(get_args(Reduction))}")


def _read_prompt(keys: torch.Tensor, heads: int, softcap: float, config: SearchConfig) -> _Prompt:
    """Cuts keys [T, G, D] into blocks and, for beam, summarises them."""
    length, kv_heads, _ = keys.shape
    count = -(-length // config.block_size)
    blocks = torch.nn.functional.pad(keys.transpose(0, 1), (0, 0, 0, count * config.block_size - length))
    blocks = blocks.unflatten(1, (count, config.block_size))
    levels = 1
    while FANOUT**levels <= count:
        levels += 1
    units = search_units(range(heads), heads // kv_heads, config)
    return _Prompt(
        blocks=blocks,
        nodes=pyramid(blocks, levels, config.sink_blocks) if config.strategy == "beam" else [],
        kv_head=torch.tensor([kv_head for kv_head, _ in units], device=keys.device),
        softcap=softcap,
        config=config,
    )


@dataclass(frozen=True)
class _QueryBlock:
    """`PrefillSummary` of one query block, without its first axis."""

    block_ids: torch.Tensor
    block_lse: torch.Tensor
    forced_ids: torch.Tensor
    forced_lse: torch.Tensor
    unobserved_lse: torch.Tensor
    total_lse: torch.Tensor
    row_lse: torch.Tensor
    keys_read: torch.Tensor


def _search_block(
    prompt: _Prompt, queries: torch.Tensor, position: int, query_block: int, reduction: Reduction, kept: int
) -> _QueryBlock:
    """Searches for queries [U, h, n, D], scaled: n rows from `position` on, h heads in each of U units."""
    config, size = prompt.config, prompt.config.block_size
    units, heads, rows, _ = queries.shape
    flat = queries.flatten(1, 2)
    forced = _forced_ids(position, rows, query_block, config).to(flat.device)
    forced_lse = _forced_lse(prompt, flat, forced, position, rows)
    outside = forced_lse.logsumexp(-1)
    end = max(config.sink_blocks, position // size + 1 - config.recent_blocks)
    leaves = _leaves(prompt, flat, rows, outside, position, end)

    total = torch.stack([outside, leaves.lse.logsumexp(-1), leaves.unread]).logsumexp(0)
    shares = (leaves.lse - total[..., None]).unflatten(1, (heads, rows))
    keep = _keep(shares, reduction, kept, config.top_k)
    lost = leaves.lse.unflatten(1, (heads, rows)).masked_fill(keep[:, :, None], -math.inf).logsumexp(-1)
    unobserved = torch.logaddexp(leaves.unread, lost.flatten(1, 2)) - total

    by_row = total.unflatten(1, (heads, rows))
    level = by_row.mean(2)
    mass = (_reduce(shares, reduction) + level[..., None]).masked_fill(~keep, -math.inf)
    width = max(0, kept - mass.shape[-1])
    ordered = torch.nn.functional.pad(mass, (0, width), value=-math.inf).sort(dim=-1, descending=True, stable=True)
    block_lse, order = ordered.values[..., :kept], ordered.indices[..., :kept]
    ids = torch.nn.functional.pad(leaves.ids, (0, width))[:, None].expand(-1, heads, -1).gather(-1, order)
    forced_mass = _reduce((forced_lse - total[..., None]).unflatten(1, (heads, rows)), reduction)
    forced_keys = (position + rows - forced * size).clamp(max=size).masked_fill(forced == NO_BLOCK, 0).sum()
    return _QueryBlock(
        block_ids=ids.masked_fill(block_lse == -math.inf, NO_BLOCK).flatten(0, 1),
        block_lse=block_lse.flatten(0, 1),
        forced_ids=forced,
        forced_lse=(forced_mass + level[..., None]).flatten(0, 1),
        unobserved_lse=(_reduce(unobserved.unflatten(1, (heads, rows)), reduction) + level).flatten(0, 1),
        total_lse=level.flatten(0, 1),
        row_lse=torch.nn.functional.pad(by_row.flatten(0, 1), (0, query_block - rows), value=math.inf),
        keys_read=(leaves.reads + leaves.read.sum(1) * size + forced_keys).sum() / (units * heads),
    )


def _reduce(shares: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Log shares [U, h, n, ...] over the n rows."""
    if reduction == "mean":
        return shares.logsumexp(2) - math.log(shares.shape[2])
    return shares.amax(2)


def _keep(shares: torch.Tensor, reduction: Reduction, kept: int, top_k: int) -> torch.Tensor:
    """Which candidates each head keeps, bool [U, h, C]; `shares` [U, h, n, C] are -inf where nothing was read."""
    best = _reduce(shares, reduction)
    if reduction == "union":
        of_rows = _largest(shares, top_k).any(2)
        best = best.masked_fill(~of_rows, -math.inf)
    return _largest(best, kept)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest along the last axis that are not -inf, bool; lower index first where equal."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True) & (values > -math.inf)


def _forced_ids(position: int, rows: int, query_block: int, config: SearchConfig) -> torch.Tensor:
    """`PrefillSummary.forced_ids` of a query block, int64 [F]."""
    size = config.block_size
    last = (position + rows - 1) // size
    first_recent = position // size + 1 - config.recent_blocks
    across = -(-(query_block - 1) // size)
    sink = torch.arange(config.sink_blocks)
    recent = first_recent + torch.arange(config.recent_blocks + across)
    ids = torch.cat([sink, torch.where(recent >= config.sink_blocks, recent, NO_BLOCK)])
    return torch.where(ids <= last, ids, NO_BLOCK)


def _forced_lse(prompt: _Prompt, queries: torch.Tensor, forced: torch.Tensor, position: int, rows: int) -> torch.Tensor:
    """Log-sum-exp of each forced block's keys that a row may see, [U, m, F]; rows are the inner axis of m."""
    logits = prompt.logits(queries, forced.clamp(min=0).expand(len(queries), -1))
    size = prompt.config.block_size
    keys = forced[:, None] * size + torch.arange(size, device=forced.device)
    row = position + torch.arange(rows, device=forced.device)
    visible = (keys <= row[:, None, None]) & (forced != NO_BLOCK)[:, None]
    heads = queries.shape[1] // rows
    return logits.masked_fill(~visible.repeat(heads, 1, 1), -math.inf).logsumexp(-1)


def _leaves(
    prompt: _Prompt, queries: torch.Tensor, rows: int, outside: torch.Tensor, position: int, end: int
) -> _Leaves:
    """Searches blocks `sink_blocks` to `end` and reads the candidates, for queries [U, m, D] from `position` on."""
    config = prompt.config
    inner = end - config.sink_blocks
    if config.strategy == "descent" and inner:
        return _descend(prompt, queries, end)
    if config.strategy == "exact" or inner <= 2 * config.top_k:
        ids = torch.arange(config.sink_blocks, end, device=queries.device).expand(len(queries), -1)
        return _Leaves(
            ids=ids,
            read=torch.ones_like(ids, dtype=torch.bool),
            lse=prompt.block_lse(queries, ids),
            unread=torch.full_like(outside, -math.inf),
            reads=torch.zeros_like(outside[:, 0]),
        )
    return _beam(prompt, queries, rows, outside, position, end)


def _descend(prompt: _Prompt, queries: torch.Tensor, end: int) -> _Leaves:
    """`reference_descent.descent`, which looks at nothing but the logits of probe keys."""
    config, (units, count, _) = prompt.config, queries.shape
    probes = torch.tensor(probe_offsets(config), device=queries.device)
    probe_keys = prompt.blocks[:, :end, probes].flatten(1, 2)[prompt.kv_head]
    logits = queries.new_full((units, count, end, config.block_size), -math.inf)
    logits[..., probes] = capped(queries @ probe_keys.mT, prompt.softcap).unflatten(-1, (end, len(probes)))
    every = torch.ones(units, count, dtype=torch.bool, device=queries.device)
    found = descent(logits, every, torch.full((units,), end, device=queries.device), config)
    del logits
    most = int(found.read.sum(1).max())
    ids = (~found.read).sort(dim=-1, stable=True).indices[:, :most]
    read = found.read.gather(1, ids)
    lse = prompt.block_lse(queries, ids).masked_fill(~read[:, None], -math.inf)
    return _Leaves(ids, read, lse, found.unread, found.reads)


@dataclass(frozen=True)
class _Scored:
    """J nodes of a level, for each of U units of m rows and heads.

    Attributes:
        ids: int64 [U, J], ascending where present.
        present: bool [U, J], the others fill up.
        log_mass: [U, m, J], estimated log-sum-exp of one of the node's blocks, on average.
        blocks: [U, 1, J], how many blocks each counts, at least 1.
    """

    ids: torch.Tensor
    present: torch.Tensor
    log_mass: torch.Tensor
    blocks: torch.Tensor

    def mass(self) -> torch.Tensor:
        """Estimated log-sum-exp of each node, [U, m, J]."""
        return (self.log_mass + self.blocks.log()).masked_fill(~self.present[:, None], -math.inf)


def _beam(prompt: _Prompt, queries: torch.Tensor, rows: int, outside: torch.Tensor, position: int, end: int) -> _Leaves:
    """`reference_beam.beam`, which says what is done and why; here only what is looked into takes time."""
    config, device = prompt.config, queries.device
    blocks = torch.tensor(end)
    level = int(top_level(blocks, config.box_width, len(prompt.nodes)))
    profile = prompt.profile(end, position)
    ids = torch.arange(end // FANOUT**level, device=device).expand(len(queries), -1)
    every = torch.ones_like(ids, dtype=torch.bool)
    scored, norm, reads = _score(prompt, queries, rows, profile, level, ids, every, outside, None)
    dropped = []
    while level:
        kept = _largest(_unit_score(scored.mass() - norm, rows), config.box_width)
        dropped.append((scored, scored.present & ~kept))
        order = (~kept).sort(dim=-1, stable=True).indices[:, : int(kept.sum(1).max())]
        level -= 1
        children = (scored.ids.gather(1, order)[..., None] * FANOUT + torch.arange(FANOUT, device=device)).flatten(1)
        orphans = torch.arange(end // FANOUT ** (level + 1) * FANOUT, end // FANOUT**level, device=device)
        orphans = orphans.expand(len(queries), -1)
        present = torch.cat(
            [kept.gather(1, order).repeat_interleave(FANOUT, 1), torch.ones_like(orphans, dtype=torch.bool)], 1
        )
        ids = torch.cat([children, orphans], 1)
        scored, _, more = _score(prompt, queries, rows, profile, level, ids, present, outside, norm)
        reads = reads + more
    leaves, was_read, fit = _read_on(prompt, queries, rows, scored, _unit_score(scored.mass() - norm, rows), outside)
    dropped.append((scored, scored.present & ~was_read))
    unread = [
        (fit.mean(nodes.log_mass) + nodes.blocks.log()).masked_fill(~left[:, None], -math.inf)
        for nodes, left in dropped
    ]
    return replace(leaves, unread=torch.cat(unread, -1).logsumexp(-1), reads=reads)


def _score(
    prompt: _Prompt,
    queries: torch.Tensor,
    rows: int,
    profile: torch.Tensor,
    level: int,
    ids: torch.Tensor,
    present: torch.Tensor,
    outside: torch.Tensor,
    norm: torch.Tensor | None,
) -> tuple[_Scored, torch.Tensor, torch.Tensor]:
    """Scores nodes `ids` [U, J] of a level; those that count no block are not present.

    Returns the nodes, what shares are relative to [U, m, 1] (`norm`, or where the search starts here, None, `outside`
    and these nodes by their means and spreads), and the key-equivalents read [U].
    """
    config, nodes, at = prompt.config, prompt.nodes[level], (prompt.kv_head[:, None], ids)
    blocks = nodes.blocks[ids]
    own = NodeStatistics(nodes.mean[at], nodes.outlier[at], nodes.spread[at], blocks[:, None])
    block = math.log(config.block_size)
    bulk = bulk_scores(queries, profile, own, config.block_size, prompt.softcap) + block
    scored = _Scored(ids, present & (blocks > 0), bulk, blocks[:, None].clamp(min=1.0))

    if norm is None:
        norm = torch.logaddexp(outside, scored.mass().logsumexp(-1))[..., None]
    count = scored.present.sum(1)
    twice = (count * config.outlier_256ths + 255) // 256
    order = _unit_score(scored.mass() - norm, rows).sort(dim=-1, descending=True, stable=True).indices
    best = torch.arange(ids.shape[1], device=ids.device) < twice[:, None]
    again = scored.present & torch.zeros_like(best).scatter(1, order, best)
    outlier = outlier_scores(queries, own, config.block_size, prompt.softcap) + block
    scored = replace(scored, log_mass=torch.where(again[:, None], torch.maximum(bulk, outlier), bulk))
    return scored, norm, count + twice


def _unit_score(shares: torch.Tensor, rows: int) -> torch.Tensor:
    """Largest over the rows of the heads' summed shares: log shares [U, m, J] to [U, J]."""
    of_rows = shares.unflatten(1, (-1, rows)).transpose(1, 2).flatten(0, 1)
    every = torch.ones(of_rows.shape[:2], dtype=torch.bool, device=shares.device)
    scores: torch.Tensor = unit_scores(of_rows, every).unflatten(0, (-1, rows)).amax(1)
    return scores


def _read_on(
    prompt: _Prompt, queries: torch.Tensor, rows: int, scored: _Scored, scores: torch.Tensor, outside: torch.Tensor
) -> tuple[_Leaves, torch.Tensor, Regression]:
    """Reads blocks in order of their `scores` [U, J], while that is expected to pay.

    Returns what was read, which of the nodes these are, bool [U, J], and the regression over them.
    """
    config = prompt.config
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order[:, : config.top_k * (config.width if config.rerank else 1)]
    ids, available = scored.ids.gather(1, order), scored.present.gather(1, order)
    estimate = scored.log_mass.gather(-1, order[:, None].expand(-1, queries.shape[1], -1))
    read = available[:, : config.first_lot]
    lse = prompt.block_lse(queries, ids[:, : read.shape[1]]).masked_fill(~read[:, None], -math.inf)
    active = torch.ones_like(read[:, 0])
    while True:
        taken = read.shape[1]
        fit = Regression.fit(estimate[..., :taken], lse, read)
        more = slice(taken, min(taken + config.top_k, order.shape[1]))
        count = available[:, more].sum(1)
        threshold = lse.topk(min(config.top_k, taken), -1).values[..., -1:]
        observed = torch.logaddexp(outside, lse.logsumexp(-1))[..., None]
        excess = fit.expected_excess(estimate[..., more], threshold, observed)
        gain = excess.masked_fill(~available[:, None, more], 0.0).sum(-1).unflatten(1, (-1, rows)).sum(1).amax(-1)
        active = active & (count > 0) & (gain >= config.min_gain * count)
        if not active.any():
            break
        new = active[:, None] & available[:, more]
        read = torch.cat([read, new], 1)
        found = prompt.block_lse(queries, ids[:, more]).masked_fill(~new[:, None], -math.inf)
        lse = torch.cat([lse, found], -1)
    was_read = torch.zeros_like(scored.present).scatter(1, order[:, :taken], read)
    nothing = torch.full_like(outside, -math.inf)
    return _Leaves(ids[:, :taken], read, lse, nothing, nothing[:, 0]), was_read, fit
