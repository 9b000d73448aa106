"""The search in plain torch: the specification that the compiled searches are tested against.

It forms every logit and masks say which of them the search would have read, so it is slow and easy to follow. Shapes
are static and no value is looked at, so `torch.compile` takes `search_dense` whole (static in the longest context).

Words used here and in the compiled searches:

* **inner blocks**: key blocks that are neither sink nor recent; the search runs over them alone. They are always full,
  because the ragged tail of the context is a recent block. N is their number, and they are numbered from 0.
* **unit**: the query heads that search together: the watched heads of one KV head where `share_kv_group` is set (and
  always under `exact`), else a single query head.
* **candidates**: the inner blocks that a search reads in full, at most `width * top_k` of them (all, under `exact`).
* **logits** are scaled, and capped where the layer has a soft cap, wherever a score or a mass is made of them.
* Equal scores are decided in favour of the lower block id, everywhere.

`keys_read` counts every read that is done: `probe_keys` per branch scored, one per block summary scored and one more
per outlier key looked at, `block_size` per candidate read in full, and the keys of the forced blocks. A unit's read
counts once, whatever the number of its heads; a key that two rounds read counts twice. The figure is the units' total
over the number of heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stream_kernels.layout import PagedKeys
from stream_kernels.reference_beam import Found, beam
from stream_kernels.reference_descent import descent, probe_offsets
from stream_kernels.search import NO_BLOCK, BlockSummary, SearchConfig
from stream_kernels.statistics import capped, spread_profile


def search_units(query_heads: Sequence[int], group: int, config: SearchConfig) -> list[tuple[int, list[int]]]:
    """The units of a search: (KV head, positions in `query_heads` of its heads), ordered by KV head.

    `group` is the number of query heads that the model has per KV head.
    """
    if not (config.share_kv_group or config.strategy == "exact"):
        return [(head // group, [slot]) for slot, head in enumerate(query_heads)]
    kv_heads = sorted({head // group for head in query_heads})
    return [(kv, [slot for slot, head in enumerate(query_heads) if head // group == kv]) for kv in kv_heads]


def search(
    queries: torch.Tensor,
    keys: Sequence[PagedKeys],
    block_tables: Sequence[torch.Tensor],
    context_lens: torch.Tensor,
    config: SearchConfig,
    query_heads: Sequence[int] | None = None,
) -> BlockSummary:
    """Finds the key blocks that each query head reads, in float64.

    Args:
        queries: [L, R, H_total, D], after position encoding, unscaled; any float type.
        keys: the L layers' keys. Query head h reads KV head h // (H_total / kv_heads).
        block_tables: integers [R, max_pages] each, a row's pages in the order of the context; `PagedKeys.table` picks.
        context_lens: integers [R], keys that a row attends to (its position + 1). A row of 0 is left empty.
        config: the strategy and its parameters.
        query_heads: the H query heads to watch; all of them by default.

    Returns:
        A `BlockSummary` with the H watched heads in the order given.
    """
    layers, rows, total_heads, _ = queries.shape
    watched = list(range(total_heads)) if query_heads is None else list(query_heads)
    out = BlockSummary.allocate(layers, rows, len(watched), config)
    for layer, layer_keys in enumerate(keys):
        units = search_units(watched, total_heads // layer_keys.kv_heads, config)
        most = max(len(slots) for _, slots in units)
        heads = torch.tensor([[i < len(slots) for i in range(most)] for _, slots in units])
        padded = torch.tensor([slots + slots[:1] * (most - len(slots)) for _, slots in units])
        learned = None if layer_keys.sinks is None else layer_keys.sinks[watched].double()
        for row in range(rows):
            context = int(context_lens[row])
            if context == 0:
                continue
            pages = block_tables[layer_keys.table][row, : -(-context // layer_keys.layout.page_size)]
            row_keys = layer_keys.gather(pages)[:context].transpose(0, 1)[[kv_head for kv_head, _ in units]]
            found = search_dense(
                (queries[layer, row, watched].double() * layer_keys.scale)[padded],
                row_keys,
                torch.full((len(units),), context),
                heads,
                None if learned is None else learned[padded],
                layer_keys.softcap,
                config,
            )
            for unit, (_, slots) in enumerate(units):
                of_unit = (unit, slice(len(slots)))
                out.block_ids[layer, row, slots] = found.block_ids[of_unit].numpy()
                out.block_lse[layer, row, slots] = found.block_lse[of_unit].numpy()
                out.strongest[layer, row, slots] = found.strongest[of_unit].numpy()
                out.forced_lse[layer, row, slots] = found.forced_lse[of_unit].numpy()
                out.forced_strongest[layer, row, slots] = found.forced_strongest[of_unit].numpy()
                out.unobserved_lse[layer, row, slots] = found.unobserved_lse[of_unit].numpy()
            if learned is not None:
                out.learned_sink_lse[layer, row] = learned.numpy()
            out.keys_read[layer, row] = float(found.keys_read.sum()) / len(watched)
    return out


@dataclass(frozen=True)
class DenseSummary:
    """What `search_dense` found: as the fields of `BlockSummary` of these names, for B units of n heads.

    block_ids int64, block_lse and strongest (int64) are [B, n, K]; forced_lse and forced_strongest [B, n, F];
    unobserved_lse [B, n]; keys_read [B], the unit's total.
    """

    block_ids: torch.Tensor
    block_lse: torch.Tensor
    strongest: torch.Tensor
    forced_lse: torch.Tensor
    forced_strongest: torch.Tensor
    unobserved_lse: torch.Tensor
    keys_read: torch.Tensor


def search_dense(
    queries: torch.Tensor,
    keys: torch.Tensor,
    contexts: torch.Tensor,
    heads: torch.Tensor,
    learned_sinks: torch.Tensor | None,
    softcap: float,
    config: SearchConfig,
) -> DenseSummary:
    """Searches B units, each over keys of its own.

    Args:
        queries: [B, n, D], scaled.
        keys: [B, T, D]; those at and beyond a unit's context are ignored.
        contexts: int64 [B], keys each unit attends to, 1 to T.
        heads: bool [B, n], which of the n heads a unit has.
        learned_sinks: [B, n], logits that take mass without a key; None for none.
        softcap: of the logits, 0 for none.
        config: the strategy and its parameters.
    """
    size, tokens = config.block_size, keys.shape[1]
    blocks = max(-(-tokens // size), config.top_k)
    present = torch.arange(blocks * size, device=keys.device) < contexts[:, None]
    keys = torch.nn.functional.pad(keys, (0, 0, 0, blocks * size - tokens)).masked_fill(~present[..., None], 0.0)
    logits = capped(queries @ keys.mT, softcap).masked_fill(~present[:, None], -math.inf)
    block_logits = logits.unflatten(-1, (blocks, size))
    block_lse, strongest = block_logits.logsumexp(-1), block_logits.argmax(-1)

    used = (contexts + size - 1) // size
    forced = _forced_blocks(used, config)
    place = forced.clamp(min=0)[:, None].expand(-1, queries.shape[1], -1)
    absent = (forced == NO_BLOCK)[:, None]
    forced_lse = block_lse.gather(-1, place).masked_fill(absent, -math.inf)
    outside = forced_lse.logsumexp(-1)
    if learned_sinks is not None:
        outside = torch.logaddexp(outside, learned_sinks)

    end = used - config.recent_blocks
    if config.strategy == "descent":
        probes = block_logits[..., probe_offsets(config)]

        def probe(ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = probes.gather(
                2, ids[:, None, :, None].expand(-1, probes.shape[1], -1, probes.shape[3])
            )
            return found

        found = descent(probe, blocks, heads, end, config)
    elif config.strategy == "beam":
        block_keys = keys.unflatten(1, (blocks, size))
        recent = torch.arange(blocks, device=keys.device) >= end.clamp(min=config.sink_blocks)[:, None]
        profile = spread_profile(block_keys, present.unflatten(1, (blocks, size)) & recent[..., None])
        found = beam(queries, block_keys, block_lse, heads, end, outside, profile, softcap, config)
    else:
        ids = torch.arange(blocks, device=keys.device)
        every = (ids >= config.sink_blocks) & (ids < end[:, None])
        found = Found(every, torch.full_like(outside, -math.inf), torch.zeros_like(outside[:, 0]))

    # Leaves: every head reads every candidate in full and keeps its K heaviest.
    mass = block_lse.masked_fill(~found.read[:, None], -math.inf)
    ordered = mass.sort(dim=-1, descending=True, stable=True)
    kept, lse = ordered.indices[..., : config.top_k], ordered.values[..., : config.top_k]
    none = lse == -math.inf
    forced_keys = torch.where(forced == NO_BLOCK, 0, (contexts[:, None] - forced * size).clamp(max=size)).sum(1)
    return DenseSummary(
        block_ids=kept.masked_fill(none, NO_BLOCK),
        block_lse=lse,
        strongest=strongest.gather(-1, kept).masked_fill(none, 0),
        forced_lse=forced_lse,
        forced_strongest=strongest.gather(-1, place).masked_fill(absent, 0),
        unobserved_lse=torch.logaddexp(found.unread, ordered.values[..., config.top_k :].logsumexp(-1)),
        keys_read=found.reads + found.read.sum(1) * size + forced_keys,
    )


def _forced_blocks(used: torch.Tensor, config: SearchConfig) -> torch.Tensor:
    """`forced_block_ids` of contexts of `used` [B] blocks, int64 [B, F]."""
    sink = torch.arange(config.sink_blocks, device=used.device).expand(len(used), -1)
    recent = used[:, None] - config.recent_blocks + torch.arange(config.recent_blocks, device=used.device)
    ids = torch.cat([sink, torch.where(recent >= config.sink_blocks, recent, NO_BLOCK)], dim=1)
    return torch.where(ids < used[:, None], ids, NO_BLOCK)
