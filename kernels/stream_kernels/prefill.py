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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from stream_kernels.cpu_prompt import CompiledBeam
from stream_kernels.prompt import Leaves, Prompt, largest, read_prompt
from stream_kernels.prompt_beam import search_beam
from stream_kernels.reference_descent import descent, probe_offsets
from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_kernels.statistics import capped

Reduction = Literal["max", "mean", "union"]

Strategy = Callable[[torch.Tensor, int, torch.Tensor, int, int], Leaves]
"""Searches blocks `sink_blocks` to `end` for queries [U, m, D], n rows innermost, whose forced blocks' log-sum-exps are
`outside` [U, m]: called with (queries, n, outside, position of the first row, end)."""


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
    """Finds the key blocks that each block of queries reads in one layer.

    Args:
        queries: as `search_prompt` takes them.
        keys: [T, G, D] on the same device, T >= first_query + Q; later ones are ignored. Query head h reads KV head
            h // (H // G).
        config: the strategy and its parameters.
        softcap: bound of the logits as in `PagedKeys`, 0 for none.
        scale, first_query, query_block, reduction, union_limit: as in `search_prompt`.

    Raises:
        ValueError: shapes do not fit each other, or a number is out of its range.
    """
    shapes = f"queries are {list(queries.shape)}, keys {list(keys.shape)}"
    if queries.ndim != 3 or keys.ndim != 3:
        raise ValueError(f"{shapes}; expected [Q, H, D] and [T, G, D]")
    if not 0 <= first_query <= len(keys) - len(queries):
        raise ValueError(f"{shapes}: the keys do not reach from position 0 to the queries that start at {first_query}")
    prompt = read_prompt(keys[: first_query + len(queries)], queries.shape[1], config, softcap)
    return search_prompt(
        queries,
        prompt,
        scale=scale,
        first_query=first_query,
        query_block=query_block,
        reduction=reduction,
        union_limit=union_limit,
    )


def search_prompt(
    queries: torch.Tensor,
    prompt: Prompt,
    *,
    scale: float,
    first_query: int = 0,
    query_block: int = 32,
    reduction: Reduction = "max",
    union_limit: int | None = None,
) -> PrefillSummary:
    """The same over keys that were read before: threads may search parts of the queries side by side.

    On a CPU in float32 `beam` is compiled code; elsewhere plain torch.

    Args:
        queries: [Q, H, D], Q >= 1, after position encoding, unscaled; any float type, on the prompt's device.
        prompt: of `read_prompt`, at least first_query + Q keys; later ones are ignored.
        scale: factor from dot product to logit.
        first_query: position of the first query. Chunks of a prompt, each a multiple of `query_block` but the last,
            give what the whole prompt gives.
        query_block: rows that search together; the last block may be short.
        reduction: over the rows of a query block, see `PrefillSummary`.
        union_limit: most blocks kept per head under `union`, the largest shares first; `4 * top_k` by default.

    Raises:
        ValueError: shapes do not fit each other, or a number is out of its range.
    """
    _check(queries, prompt, scale, first_query, query_block, reduction, union_limit)
    config, rows, units = prompt.config, len(queries), len(prompt.kv_head)
    kept = config.top_k if reduction != "union" else (union_limit or 4 * config.top_k)
    strategy = _strategy(prompt, min(rows, query_block) * queries.shape[1] // units)
    found = []
    for first in range(0, rows, query_block):
        block = queries[first : first + query_block].to(prompt.channels.dtype) * scale
        # Heads of one KV head are neighbours, so that units are rows of this view.
        block = block.transpose(0, 1).unflatten(0, (units, -1))
        found.append(_search_block(prompt, strategy, block, first_query + first, query_block, reduction, kept))
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
    prompt: Prompt,
    scale: float,
    first_query: int,
    query_block: int,
    reduction: str,
    union_limit: int | None,
) -> None:
    """Raises ValueError for arguments that `search_prompt` does not take."""
    kv_heads, blocks, dim, size = prompt.channels.shape
    if queries.ndim != 3 or queries.shape[2] != dim or not queries.shape[0]:
        raise ValueError(f"queries are {list(queries.shape)}; expected [Q, H, {dim}], as the keys are, and Q >= 1")
    if queries.shape[1] % len(prompt.kv_head):
        raise ValueError(f"{queries.shape[1]} query heads do not divide among {kv_heads} KV heads")
    if not 0 <= first_query <= blocks * size - len(queries):
        raise ValueError(f"{len(queries)} queries that start at {first_query} do not reach into {blocks * size} keys")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; valid: positive")
    if query_block < 1 or (union_limit is not None and union_limit < 1):
        raise ValueError(f"query_block is {query_block} and union_limit {union_limit}; valid: at least 1")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; valid: {', '.join(get_args(Reduction))}")


def _strategy(prompt: Prompt, rows: int) -> Strategy:
    """How the inner blocks of a query block of up to `rows` rows and heads per unit are searched."""
    config = prompt.config
    if config.strategy == "beam" and CompiledBeam.takes(prompt):
        inner: Strategy = CompiledBeam(prompt, rows).search
    elif config.strategy == "beam":

        def inner(queries: torch.Tensor, rows: int, outside: torch.Tensor, position: int, end: int) -> Leaves:
            return search_beam(prompt, queries, rows, outside, position, end)

    else:
        probe_keys = prompt.channels[..., probe_offsets(config)]

        def inner(queries: torch.Tensor, rows: int, outside: torch.Tensor, position: int, end: int) -> Leaves:
            return _descend(prompt, probe_keys, queries, end)

    def search(queries: torch.Tensor, rows: int, outside: torch.Tensor, position: int, end: int) -> Leaves:
        blocks = end - config.sink_blocks
        everything = config.strategy == "exact" or (config.strategy == "beam" and blocks <= 2 * config.top_k)
        if everything or not blocks:
            return _read_all(prompt, queries, end)
        return inner(queries, rows, outside, position, end)

    return search


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
    prompt: Prompt,
    strategy: Strategy,
    queries: torch.Tensor,
    position: int,
    query_block: int,
    reduction: Reduction,
    kept: int,
) -> _QueryBlock:
    """Searches for queries [U, h, n, D], scaled: n rows from `position` on, h heads in each of U units."""
    config, size = prompt.config, prompt.config.block_size
    units, heads, rows, _ = queries.shape
    flat = queries.flatten(1, 2)
    forced = _forced_ids(position, rows, query_block, config).to(flat.device)
    forced_lse = _forced_lse(prompt, flat, forced, position, rows)
    outside = forced_lse.logsumexp(-1)
    end = max(config.sink_blocks, position // size + 1 - config.recent_blocks)
    leaves = strategy(flat, rows, outside, position, end)

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
        of_rows = largest(shares, top_k).any(2)
        best = best.masked_fill(~of_rows, -math.inf)
    return largest(best, kept)


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


def _forced_lse(prompt: Prompt, queries: torch.Tensor, forced: torch.Tensor, position: int, rows: int) -> torch.Tensor:
    """Log-sum-exp of each forced block's keys that a row may see, [U, m, F]; rows are the inner axis of m."""
    logits = prompt.logits(queries, forced.clamp(min=0).expand(len(queries), -1))
    size = prompt.config.block_size
    keys = forced[:, None] * size + torch.arange(size, device=forced.device)
    row = position + torch.arange(rows, device=forced.device)
    visible = (keys <= row[:, None, None]) & (forced != NO_BLOCK)[:, None]
    heads = queries.shape[1] // rows
    return logits.masked_fill(~visible.repeat(heads, 1, 1), -math.inf).logsumexp(-1)


def _read_all(prompt: Prompt, queries: torch.Tensor, end: int) -> Leaves:
    units, count, _ = queries.shape
    ids = torch.arange(prompt.config.sink_blocks, end, device=queries.device).expand(units, -1)
    return Leaves(
        ids=ids,
        read=torch.ones_like(ids, dtype=torch.bool),
        lse=prompt.block_lse(queries, ids),
        unread=queries.new_full((units, count), -math.inf),
        reads=queries.new_zeros(units),
    )


def _descend(prompt: Prompt, probe_keys: torch.Tensor, queries: torch.Tensor, end: int) -> Leaves:
    """`reference_descent.descent`, which looks at nothing but the probe keys [G, N, D, r] of the blocks it asks for."""
    config, (units, count, _) = prompt.config, queries.shape

    def probe(ids: torch.Tensor) -> torch.Tensor:
        keys = probe_keys[prompt.kv_head[:, None], ids].transpose(1, 2).flatten(2, 3)
        found: torch.Tensor = capped(queries @ keys, prompt.softcap).unflatten(-1, (ids.shape[1], -1))
        return found

    every = torch.ones(units, count, dtype=torch.bool, device=queries.device)
    found = descent(probe, end, every, torch.full((units,), end, device=queries.device), config)
    most = int(found.read.sum(1).max())
    ids = (~found.read).sort(dim=-1, stable=True).indices[:, :most]
    read = found.read.gather(1, ids)
    lse = prompt.block_lse(queries, ids).masked_fill(~read[:, None], -math.inf)
    return Leaves(ids, read, lse, found.unread, found.reads)
