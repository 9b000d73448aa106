"""The search in plain torch: the specification that `cpu.py` is tested against.

It forms every logit and then looks up only those that the search would have read, so it is slow and easy to follow.
All arithmetic is float64. Section numbers are those of the design and of the paper (arXiv 2510.19875).

Words used here and in `cpu.py`:

* **inner blocks**: key blocks that are neither sink nor recent; the search runs over them alone. They are always full,
  because the ragged tail of the context is a recent block. N is their number, and they are numbered from 0.
* **unit**: the query heads that search together: the watched heads of one KV head where `share_kv_group` is set (and
  always under `exact`), else a single query head.
* **candidates**: the blocks left when the search ends; `width * top_k` of them, fewer in a short context.
* Equal scores are decided in favour of the lower block id, everywhere.

`keys_read` counts every read that is done: `probe_keys` per branch scored, two per block summary scored (mean and
variance), `block_size` per candidate read in full, and the keys of the forced blocks. A unit's read counts once,
whatever the number of its heads; a key that two rounds read counts twice. The figure is the units' total over the
number of heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stream_kernels.layout import PagedKeys
from stream_kernels.search import NO_BLOCK, BlockSummary, SearchConfig, forced_block_ids

BEAM_FANOUT = 8
"""Nodes of one level of the summary pyramid under a node of the next."""


@dataclass(frozen=True)
class _Found:
    """What a strategy hands to the leaves.

    Attributes:
        candidates: int64 [C], inner blocks, ascending.
        dropped: float64 [n], estimated log-sum-exp per head of the inner blocks that are not candidates.
        reads: key-equivalents read on the way.
    """

    candidates: torch.Tensor
    dropped: torch.Tensor
    reads: int


def search_units(query_heads: Sequence[int], group: int, config: SearchConfig) -> list[tuple[int, list[int]]]:
    """The units of a search: (KV head, positions in `query_heads` of its heads), ordered by KV head.

    `group` is the number of query heads that the model has per KV head.
    """
    if not (config.share_kv_group or config.strategy == "exact"):
        return [(head // group, [slot]) for slot, head in enumerate(query_heads)]
    kv_heads = sorted({head // group for head in query_heads})
    return [(kv, [slot for slot, head in enumerate(query_heads) if head // group == kv]) for kv in kv_heads]


def probe_offsets(config: SearchConfig) -> list[int]:
    """Where in a block its r = `probe_keys` probe keys lie: spread evenly; the middle key if there is one."""
    r, size = config.probe_keys, config.block_size
    return [i * size // r + size // (2 * r) for i in range(r)]


def search(
    queries: torch.Tensor,
    keys: Sequence[PagedKeys],
    block_tables: Sequence[torch.Tensor],
    context_lens: torch.Tensor,
    config: SearchConfig,
    query_heads: Sequence[int] | None = None,
) -> BlockSummary:
    """Finds the key blocks that each query head reads.

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
        for row in range(rows):
            context = int(context_lens[row])
            if context == 0:
                continue
            pages = block_tables[layer_keys.table][row, : -(-context // layer_keys.layout.page_size)]
            row_keys = layer_keys.gather(pages)[:context]
            row_queries = queries[layer, row, watched].double() * layer_keys.scale
            reads = 0
            for kv_head, slots in units:
                reads += _search_unit(row_queries[slots], row_keys[:, kv_head], config, out, layer, row, slots)
            out.keys_read[layer, row] = reads / len(watched)
    return out


def _search_unit(
    queries: torch.Tensor,
    keys: torch.Tensor,
    config: SearchConfig,
    out: BlockSummary,
    layer: int,
    row: int,
    slots: list[int],
) -> int:
    """Searches for one unit, writes its heads' slots of `out`, returns the key-equivalents read.

    `queries` [n, D] are scaled; `keys` are [context, D].
    """
    size, context = config.block_size, len(keys)
    logits = queries @ keys.T
    reads = 0
    for i, block in enumerate(forced_block_ids(context, config)):
        if block != NO_BLOCK:
            part = logits[:, block * size : (block + 1) * size]
            out.forced_lse[layer, row, slots, i] = part.logsumexp(-1).numpy()
            out.forced_strongest[layer, row, slots, i] = part.argmax(-1).numpy()
            reads += part.shape[1]
    inner = max(0, -(-context // size) - config.forced_blocks)
    if not inner:
        return reads

    span = slice(config.sink_blocks * size, (config.sink_blocks + inner) * size)
    block_logits = logits[:, span].unflatten(1, (inner, size))
    if config.strategy == "descent":
        found = _descent(block_logits, config)
    elif config.strategy == "beam":
        found = _beam(queries, keys[span].unflatten(0, (inner, size)), config)
    else:
        found = _Found(torch.arange(inner), _no_mass(len(queries)), 0)

    # Leaves: every head reads every candidate in full and keeps its K heaviest.
    mass = block_logits[:, found.candidates].logsumexp(-1)
    order = mass.sort(dim=-1, descending=True, stable=True).indices
    kept, left = order[:, : config.top_k], order[:, config.top_k :]
    ids = found.candidates[kept]
    count = ids.shape[1]
    heads = torch.arange(len(queries))[:, None]
    out.block_ids[layer, row, slots, :count] = (ids + config.sink_blocks).numpy()
    out.block_lse[layer, row, slots, :count] = mass.gather(1, kept).numpy()
    out.strongest[layer, row, slots, :count] = block_logits[heads, ids].argmax(-1).numpy()
    unobserved = torch.cat([found.dropped[:, None], mass.gather(1, left)], dim=1).logsumexp(-1)
    out.unobserved_lse[layer, row, slots] = unobserved.numpy()
    return reads + found.reads + len(found.candidates) * size


def _no_mass(heads: int) -> torch.Tensor:
    return torch.full((heads,), -math.inf, dtype=torch.float64)


def _unit_scores(scores: torch.Tensor) -> torch.Tensor:
    """Scores [n, C] of n heads to one [C]: each head's relative to its own best, the maximum over heads."""
    return (scores - scores.amax(dim=1, keepdim=True)).amax(dim=0)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool [C]: the `count` largest of `scores` [C], the lower index where equal."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def _descent(block_logits: torch.Tensor, config: SearchConfig) -> _Found:
    """The paper's hierarchical search (section 3), with the probe keys, width and sharing of the design.

    The N inner blocks are cut into c = `width * top_k` equal branches. Each round halves every branch, scores the 2c
    halves by the keys of their centre block and keeps c, until each branch is a single block.

    `block_logits` are [n, N, block_size].
    """
    inner = block_logits.shape[1]
    probes = block_logits[..., probe_offsets(config)]
    width = config.width * config.top_k
    all_blocks = torch.arange(inner)
    if inner <= config.top_k or (config.rerank and inner <= width):
        return _Found(all_blocks, _no_mass(len(block_logits)), 0)

    if inner <= width:
        # Already single blocks, but without a re-rank something has to choose among them: one round of scores.
        start, end = all_blocks, all_blocks + 1
        rounds = 0
    else:
        bounds = torch.arange(width + 1) * inner // width
        start, end = bounds[:-1], bounds[1:]
        rounds = math.ceil(math.log2(math.ceil(inner / width)))

    dropped, reads = [], 0
    for left in range(max(rounds, 1), 0, -1):
        if rounds:
            middle = start + (end - start) // 2
            start, end = torch.stack([start, middle], 1).flatten(), torch.stack([middle, end], 1).flatten()
            some = end > start  # half of a single block is empty: it scores nothing and is never kept
            start, end = start[some], end[some]
        branch = probes[:, start + (end - start) // 2]
        reads += branch.shape[1] * config.probe_keys
        keep = config.top_k if left == 1 and not config.rerank else width
        kept = _best(_unit_scores(branch.amax(-1)), keep)
        # A dropped branch is taken to hold its probe keys' mean exponential at each of its tokens.
        tokens = (end - start)[~kept] * config.block_size
        dropped.append(branch[:, ~kept].logsumexp(-1) - math.log(config.probe_keys) + tokens.log())
        start, end = start[kept], end[kept]
    return _Found(start, torch.cat(dropped, dim=1).logsumexp(-1), reads)


def _beam(queries: torch.Tensor, block_keys: torch.Tensor, config: SearchConfig) -> _Found:
    """Coarse-to-fine search over block summaries (design, "The estimator").

    Node j of level l stands for inner blocks j * 8**l up to (j + 1) * 8**l and holds the mean and variance of their
    keys, channel by channel; under a diagonal Gaussian its keys' mean exponential has the log
    q.mean + 1/2 sum q^2 var. The search starts at the coarsest level with more nodes than are kept, and each level
    keeps c = `width * top_k`.

    `queries` [n, D] are scaled; `block_keys` are [N, block_size, D].
    """
    inner, size, _ = block_keys.shape
    width = config.width * config.top_k
    if inner <= config.top_k or (config.rerank and inner <= width):
        return _Found(torch.arange(inner), _no_mass(len(queries)), 0)

    level = 0
    while -(-inner // BEAM_FANOUT ** (level + 1)) > width:
        level += 1
    nodes = torch.arange(-(-inner // BEAM_FANOUT**level))
    dropped, reads = [], 0
    while True:
        span = BEAM_FANOUT**level
        lengths = ((nodes + 1) * span).clamp(max=inner) - nodes * span
        spans = [block_keys[node * span : (node + 1) * span].flatten(0, 1) for node in nodes.tolist()]
        mean = torch.stack([keys.mean(0) for keys in spans])
        variance = torch.stack([keys.var(0, correction=0) for keys in spans])
        scores = queries @ mean.T + 0.5 * queries.square() @ variance.T
        reads += 2 * len(nodes)
        keep = config.top_k if level == 0 and not config.rerank else width
        kept = _best(_unit_scores(scores), keep)
        dropped.append(scores[:, ~kept] + (lengths[~kept] * size).log())
        nodes = nodes[kept]
        if level == 0:
            return _Found(nodes, torch.cat(dropped, dim=1).logsumexp(-1), reads)
        level -= 1
        nodes = (nodes[:, None] * BEAM_FANOUT + torch.arange(BEAM_FANOUT)).flatten()
        nodes = nodes[nodes * BEAM_FANOUT**level < inner]
