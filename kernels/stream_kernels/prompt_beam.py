"""The beam over a prompt in plain torch, for any device and float64: the specification of `cpu_prompt.py`.

It does for the rows of a query block what `reference_beam.beam` does for one row, and says there what and why; here
only what is looked into takes time.
"""

import math
from dataclasses import dataclass, replace

import torch

from stream_kernels.prompt import Leaves, Prompt, largest
from stream_kernels.reference_beam import Regression, unit_scores
from stream_kernels.statistics import FANOUT, NodeStatistics, bulk_scores, outlier_scores, top_level


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


def search_beam(
    prompt: Prompt, queries: torch.Tensor, rows: int, outside: torch.Tensor, position: int, end: int
) -> Leaves:
    """Searches blocks `sink_blocks` to `end` for queries [U, m, D] from `position` on, rows innermost.

    `outside` [U, m] is the log-sum-exp of what is read whatever the search does.
    """
    config, device = prompt.config, queries.device
    blocks = torch.tensor(end)
    level = int(top_level(blocks, config.box_width, len(prompt.nodes)))
    profile = prompt.profile(end, position)
    ids = torch.arange(end // FANOUT**level, device=device).expand(len(queries), -1)
    every = torch.ones_like(ids, dtype=torch.bool)
    scored, norm, reads = _score(prompt, queries, rows, profile, level, ids, every, outside, None)
    dropped = []
    while level:
        kept = largest(_unit_score(scored.mass() - norm, rows), config.nodes_kept(level))
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
    prompt: Prompt,
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
    own = NodeStatistics(nodes.mean[at], nodes.outliers[at], nodes.spread[at], blocks[:, None])
    block = math.log(config.block_size)
    bulk = bulk_scores(queries, config.spread_weight * profile, own, config.block_size, prompt.softcap) + block
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
    return scored, norm, count + twice * config.outlier_keys


def _unit_score(shares: torch.Tensor, rows: int) -> torch.Tensor:
    """Largest over the rows of the heads' summed shares: log shares [U, m, J] to [U, J]."""
    of_rows = shares.unflatten(1, (-1, rows)).transpose(1, 2).flatten(0, 1)
    every = torch.ones(of_rows.shape[:2], dtype=torch.bool, device=shares.device)
    scores: torch.Tensor = unit_scores(of_rows, every).unflatten(0, (-1, rows)).amax(1)
    return scores


def _read_on(
    prompt: Prompt, queries: torch.Tensor, rows: int, scored: _Scored, scores: torch.Tensor, outside: torch.Tensor
) -> tuple[Leaves, torch.Tensor, Regression]:
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
    return Leaves(ids[:, :taken], read, lse, nothing, nothing[:, 0]), was_read, fit
