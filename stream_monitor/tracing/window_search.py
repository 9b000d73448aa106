"""The search in a layer that sees a sliding window: its few keys are read whole, so that nothing is estimated."""

import math

import torch

from stream_kernels.prefill import PrefillSummary, Reduction
from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_kernels.statistics import capped
from stream_monitor.tracing.attention import LayerInputs, visible_keys


def search_window(inputs: LayerInputs, config: SearchConfig, query_block: int, reduction: Reduction) -> PrefillSummary:
    """Finds the key blocks that each block of queries reads inside the layer's window.

    As `search_prefill` under `exact`, with these differences: no block outside the window of any of the query block's
    rows is kept, sink blocks included, and a block at the window's edge counts with the keys that a row sees of it.

    Args:
        inputs: of a layer with a window; queries start at a multiple of `query_block`, or are fewer than that.
        config: `block_size`, `top_k` and the forced blocks; how it would search does not matter.
        query_block: rows that search together.
        reduction: over these rows, as in `search_prefill`.
    """
    rows = len(inputs.queries)
    found = [
        _search_block(inputs, config, first, min(rows, first + query_block), query_block, reduction)
        for first in range(0, rows, query_block)
    ]
    starts = torch.arange(0, rows, query_block, device=inputs.keys.device)
    columns = {name: torch.stack([part[name] for part in found]) for name in found[0]}
    return PrefillSummary(
        first_position=inputs.first_query + starts, rows=(rows - starts).clamp(max=query_block), **columns
    )


def _search_block(
    inputs: LayerInputs, config: SearchConfig, first: int, last: int, query_block: int, reduction: Reduction
) -> dict[str, torch.Tensor]:
    """Fields of `PrefillSummary` for the query block of rows `first` to `last`."""
    size, device = config.block_size, inputs.keys.device
    row = inputs.first_query + torch.arange(first, last, device=device)
    position, end = int(row[0]), int(row[-1]) + 1
    start = max(0, position + 1 - inputs.window) // size
    blocks = torch.arange(start, -(-end // size), device=device)
    keys = inputs.keys[start * size : end].transpose(0, 1).float()
    queries = inputs.queries[first:last].transpose(0, 1).float().unflatten(0, (len(keys), -1))
    logits = capped(queries @ keys[:, None].mT * inputs.scale, inputs.softcap).flatten(0, 1)
    visible = visible_keys(row, torch.arange(start * size, end, device=device), inputs.window)
    logits = logits.masked_fill(~visible, -math.inf)
    lse = torch.nn.functional.pad(logits, (0, -end % size), value=-math.inf).unflatten(-1, (-1, size)).logsumexp(-1)
    total = lse.logsumexp(-1, keepdim=True)
    shares, level = lse - total, total.mean((1, 2))

    forced = _forced_ids(position, start, int(blocks[-1]), query_block, config).to(device)
    forced_mass = _reduce(shares, reduction)[:, (forced - start).clamp(min=0)] + level[:, None]
    inner = shares.masked_fill(torch.isin(blocks, forced), -math.inf)
    kept, order = _heaviest(inner, config.top_k, reduction)
    lost = torch.cat([inner, torch.full_like(inner[..., :1], -math.inf)], -1)
    lost = lost.scatter(-1, order[:, None].expand(-1, len(row), -1), -math.inf)
    return {
        "block_ids": (order + start).masked_fill(kept == -math.inf, NO_BLOCK).int(),
        "block_lse": kept + level[:, None],
        "forced_ids": forced.int(),
        "forced_lse": forced_mass.masked_fill(forced == NO_BLOCK, -math.inf),
        "unobserved_lse": _reduce(lost.logsumexp(-1), reduction) + level,
        "total_lse": level,
        "row_lse": torch.nn.functional.pad(total[..., 0], (0, query_block - len(row)), value=math.inf),
        "keys_read": torch.tensor(float(end - start * size), device=device),
    }


def _forced_ids(position: int, start: int, last: int, query_block: int, config: SearchConfig) -> torch.Tensor:
    """`PrefillSummary.forced_ids` of a query block at `position` that sees blocks `start` to `last`, int64 [F]."""
    across = -(-(query_block - 1) // config.block_size)
    recent = position // config.block_size + 1 - config.recent_blocks + torch.arange(config.recent_blocks + across)
    recent = recent.masked_fill(recent < config.sink_blocks, NO_BLOCK)
    forced = torch.cat([torch.arange(config.sink_blocks), recent])
    return forced.masked_fill((forced < start) | (forced > last), NO_BLOCK)


def _heaviest(inner: torch.Tensor, top_k: int, reduction: Reduction) -> tuple[torch.Tensor, torch.Tensor]:
    """What each head keeps of log shares [H, n, C], -inf where there is none to keep: masses and places, [H, K].

    Heaviest first; C is the place and -inf the mass where there are fewer than K. Equal masses go to the lower place.
    """
    best, width = _reduce(inner, reduction), top_k
    blocks = best.shape[-1]
    if reduction == "union":
        width = 4 * top_k
        least = inner.topk(min(top_k, blocks), -1).values[..., -1:]
        best = best.masked_fill(~((inner >= least) & (inner > -math.inf)).any(1), -math.inf)
    padded = torch.nn.functional.pad(best, (0, max(0, width - blocks)), value=-math.inf)
    ordered = padded.sort(dim=-1, descending=True, stable=True)
    kept, order = ordered.values[:, :width], ordered.indices[:, :width]
    return kept, order.masked_fill(kept == -math.inf, blocks)


def _reduce(shares: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Log shares [H, n, ...] over the n rows."""
    return shares.logsumexp(1) - math.log(shares.shape[1]) if reduction == "mean" else shares.amax(1)
