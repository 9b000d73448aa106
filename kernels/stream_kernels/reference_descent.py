"""The paper's hierarchical search (arXiv 2510.19875, section 3) in plain torch, widened and shared if so configured.

Specification of the compiled searches, for B units at once; static shapes as in `reference_beam.py`.
"""

import math
from collections.abc import Callable

import torch

from stream_kernels.reference_beam import Found, rank
from stream_kernels.search import SearchConfig

Probe = Callable[[torch.Tensor], torch.Tensor]
"""Logits of the probe keys of blocks [B, J], which differ by unit: [B, n, J, r]."""


def probe_offsets(config: SearchConfig) -> list[int]:
    """Where in a block its r = `probe_keys` probe keys lie: spread evenly; the middle key if there is one."""
    r, size = config.probe_keys, config.block_size
    return [i * size // r + size // (2 * r) for i in range(r)]


def descent(probe: Probe, blocks: int, heads: torch.Tensor, end: torch.Tensor, config: SearchConfig) -> Found:
    """Searches blocks `config.sink_blocks` to `end` of each unit.

    The m inner blocks are cut into c = `width * top_k` equal branches. Each round halves every branch, scores the 2c
    halves by the keys of their centre block and keeps c, until each branch is a single block. A head's scores count
    relative to its best, and a unit's score is the maximum over its heads. With `rerank` the last c are read in full;
    without it the last round keeps `top_k`.

    Args:
        probe: is asked for the centre blocks of the branches that are scored, and for no others.
        blocks: N, of the contexts.
        heads: bool [B, n], which heads a unit has.
        end: int64 [B], first block that is not inner.
    """
    size = config.block_size
    wide = config.width * config.top_k
    inner = (end - config.sink_blocks).clamp(min=0)[:, None]
    all_read = (inner <= config.top_k) | ((inner <= wide) & config.rerank)
    # Up to c blocks: single ones from the start; there is a round only where something has to choose among them.
    single = inner <= wide
    index = torch.arange(wide, device=end.device)
    start = torch.where(single, torch.minimum(index, inner), index * inner // wide)
    stop = torch.where(single, torch.minimum(index + 1, inner), (index + 1) * inner // wide)
    longest = (inner + wide - 1) // wide
    most_rounds = max(1, math.ceil(math.log2(max(2, math.ceil(blocks / wide)))))
    rounds = torch.where(single, 1, sum((longest > 2**r).long() for r in range(most_rounds)))
    rounds = torch.where(all_read, 0, rounds)

    gone = []
    reads = torch.zeros_like(end)
    for r in range(most_rounds):
        middle = torch.where(single, start, start + (stop - start) // 2)  # a single block has one half: itself
        starts = torch.stack([start, middle], 2).flatten(1)
        stops = torch.stack([middle, stop], 2).flatten(1)
        some = (stops > starts) & (rounds > r)
        centre = (config.sink_blocks + starts + (stops - starts) // 2).clamp(max=blocks - 1)
        branch = probe(centre)
        reads = reads + some.sum(1) * config.probe_keys
        best = branch.amax(-1).masked_fill(~some[:, None], -math.inf)
        relative = (best - best.amax(-1, keepdim=True)).masked_fill(~heads[..., None], -math.inf)
        keep = torch.where((rounds == r + 1) & (not config.rerank), config.top_k, wide)
        kept = some & (rank(relative.amax(1), some) < keep)
        # A dropped branch is taken to hold its probe keys' mean exponential at each of its tokens.
        mass = (
            branch.logsumexp(-1) - math.log(config.probe_keys) + ((stops - starts).clamp(min=1) * size).log()[:, None]
        )
        gone.append(mass.masked_fill(~(some & ~kept)[:, None], -math.inf).logsumexp(-1))
        # The kept ones move to the front, in order; all others become empty.
        order = (~kept).sort(dim=-1, stable=True).indices[:, :wide]
        kept = kept.gather(1, order)
        active = rounds > r
        start = torch.where(active, starts.gather(1, order).where(kept, 0), start)
        stop = torch.where(active, stops.gather(1, order).where(kept, 0), stop)

    unread = torch.stack(gone).logsumexp(0)
    found = torch.zeros(len(end), blocks + 1, dtype=torch.bool, device=end.device)
    found = found.scatter(1, torch.where(stop > start, config.sink_blocks + start, blocks), True)[:, :blocks]
    ids = torch.arange(blocks, device=end.device)
    every = (ids >= config.sink_blocks) & (ids < end[:, None])
    return Found(torch.where(all_read, every, found), unread, reads.to(unread.dtype))
