"""The beam in plain torch: coarse to fine over block summaries, then exact reads in order of promise.

Specification of the compiled searches, for B units at once: static shapes, no look at a value, so that `torch.compile`
takes it whole. Every node is scored and masks say which the search would have read.
"""

import math
from dataclasses import dataclass

import torch

from stream_kernels.search import SearchConfig
from stream_kernels.statistics import (
    FANOUT,
    MAX_RESIDUAL,
    bulk_scores,
    normal_cdf,
    outlier_scores,
    pyramid,
    top_level,
)


@dataclass(frozen=True)
class Found:
    """What a strategy decided for B units of n heads over N blocks.

    Attributes:
        read: bool [B, N], inner blocks that every head of the unit reads in full.
        unread: [B, n], estimated log-sum-exp of the inner blocks not read; -inf if none.
        reads: [B], key-equivalents read on the way, blocks read in full not counted.
    """

    read: torch.Tensor
    unread: torch.Tensor
    reads: torch.Tensor


def unit_scores(scores: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Log of the heads' summed shares: [B, n, J] log shares and bool [B, n] to [B, J]."""
    return scores.masked_fill(~heads[..., None], -math.inf).logsumexp(1)


def rank(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Place of each of [B, J] scores among those in `among`, 0 for the largest, lower index first where equal.

    Those outside `among` come after all others.
    """
    order = scores.masked_fill(~among, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    # -inf scores that are `among` tie with the masked ones: sort once more by membership, stably.
    order = order.gather(-1, (~among).gather(-1, order).sort(dim=-1, stable=True).indices)
    return torch.zeros_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


@dataclass(frozen=True)
class _Nodes:
    """Nodes whose mass a search estimated and did not look into.

    Attributes:
        log_mass: [B, n, J], estimated log-sum-exp of one of the node's blocks, on average.
        blocks: [J], how many blocks each counts.
        left: bool [B, J].
    """

    log_mass: torch.Tensor
    blocks: torch.Tensor
    left: torch.Tensor


@dataclass(frozen=True)
class Regression:
    """Least squares of y on x per unit and head, each tensor [B, n, 1]; y given x is taken to be Gaussian.

    The slope is held between 0 and 1: an estimate may exaggerate differences between blocks, never invert them.
    """

    centre_x: torch.Tensor
    centre_y: torch.Tensor
    slope: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def fit(cls, x: torch.Tensor, y: torch.Tensor, among: torch.Tensor) -> "Regression":
        """Over the points of x, y [B, n, J] that are in `among` [B, J]; all 0 where there is none."""
        weight = among[:, None].to(x.dtype)
        count = weight.sum(-1, keepdim=True).clamp(min=1.0)
        x, y = x.masked_fill(~among[:, None], 0.0), y.masked_fill(~among[:, None], 0.0)
        centre_x, centre_y = x.sum(-1, keepdim=True) / count, y.sum(-1, keepdim=True) / count
        dx, dy = (x - centre_x) * weight, (y - centre_y) * weight
        slope = ((dx * dy).sum(-1, keepdim=True) / dx.square().sum(-1, keepdim=True).clamp(min=1e-6)).clamp(0.0, 1.0)
        residual = (dy - slope * dx).square().sum(-1, keepdim=True) / count
        return cls(centre_x, centre_y, slope, residual.clamp(max=MAX_RESIDUAL))

    def median(self, x: torch.Tensor) -> torch.Tensor:
        """The median of exp(y) at x, in logarithms."""
        return self.centre_y + self.slope * (x - self.centre_x)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of exp(y) at x, in logarithms."""
        return self.median(x) + 0.5 * self.residual

    def expected_excess(self, x: torch.Tensor, threshold: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Mean of max(0, exp(y) - exp(threshold)) at x, over exp(unit)."""
        deviation = self.residual.clamp(min=1e-4).sqrt()
        distance = (self.median(x) - threshold) / deviation
        above = (self.median(x) + 0.5 * deviation.square() - unit).exp() * normal_cdf(distance + deviation)
        return (above - (threshold - unit).exp() * normal_cdf(distance)).clamp(min=0.0)


def beam(
    queries: torch.Tensor,
    block_keys: torch.Tensor,
    block_lse: torch.Tensor,
    heads: torch.Tensor,
    end: torch.Tensor,
    outside: torch.Tensor,
    profile: torch.Tensor,
    softcap: float,
    config: SearchConfig,
) -> Found:
    """Searches blocks `config.sink_blocks` to `end` of each unit.

    1. From `top_level` down, every level scores its nodes and keeps the `nodes_kept` best of them; the children of
       those, and the up to seven nodes no whole parent covers, are scored next.
    2. A node's estimate is what the mean and spread of its keys say (`bulk_scores`, with `spread_weight`), or what its
       best outlier says (`outlier_scores`) if that is more. Outliers are looked at only in the `outlier_share` best
       nodes by the former.
    3. A node's score is, per head, its estimated share of the row's attention; a unit's score is the heads' sum. Shares
       are relative to `outside` and the top level's nodes, these by their means and spreads.
    4. Blocks are read in order of their score: the first `first_lot`, then `top_k` at a time while the mass that the
       heads may expect to gain by reading them, per block read, is at least `min_gain` of the row's observed attention;
       never more than `width * top_k`. Without `rerank` it is the first `top_k` and no more.
    5. What to expect of a block not read comes from a regression per head, over the blocks read, of their exact
       log-sum-exp on the estimate: the search picks by the estimate, so the estimate is high where it picked.

    Args:
        queries: [B, n, D], scaled.
        block_keys: [B, N, block_size, D].
        block_lse: [B, n, N], exact log-sum-exp of each block's logits.
        heads: bool [B, n], which heads a unit has.
        end: int64 [B], first block that is not inner.
        outside: [B, n], log-sum-exp of what is read whatever the search does: forced blocks and the learned sink.
        profile: [B, D], how the spread of keys divides among the channels (`spread_profile`).
    """
    blocks = block_keys.shape[1]
    inner = (end - config.sink_blocks).clamp(min=0)
    profile = config.spread_weight * profile
    levels = max(1, math.floor(math.log(max(blocks, 1), FANOUT) + 1e-9) + 1)
    top = top_level(end, config.box_width, levels)
    summaries = pyramid(block_keys, levels, config.sink_blocks, config.outlier_keys)
    all_read = inner <= 2 * config.top_k

    reads = torch.zeros_like(outside[:, 0])
    norm = torch.zeros_like(outside)
    kept = torch.zeros_like(end)[:, None].bool()  # of the level above
    dropped: list[_Nodes] = []
    for level in range(levels - 1, -1, -1):
        span = FANOUT**level
        counts = summaries[level].blocks
        nodes = torch.arange(len(counts), device=end.device)
        whole = (nodes < (end // span)[:, None]) & (counts > 0)
        orphan = nodes >= FANOUT * (end // (span * FANOUT))[:, None]
        below = torch.nn.functional.pad(
            kept.repeat_interleave(FANOUT, 1), (0, max(0, len(counts) - FANOUT * kept.shape[1]))
        )
        front = whole & torch.where(
            (top == level)[:, None], True, (top > level)[:, None] & (below[:, : len(counts)] | orphan)
        )
        front = front & ~all_read[:, None]
        scored = front.sum(1)
        twice = (scored * config.outlier_256ths + 255) // 256
        reads = reads + scored + twice * config.outlier_keys

        block, size = math.log(config.block_size), counts.clamp(min=1.0).log()
        bulk = bulk_scores(queries, profile, summaries[level], config.block_size, softcap) + block
        outlier = outlier_scores(queries, summaries[level], config.block_size, softcap) + block
        mass = (bulk + size).masked_fill(~front[:, None], -math.inf)
        norm = torch.where((top == level)[:, None], torch.logaddexp(outside, mass.logsumexp(-1)), norm)
        again = front & (rank(unit_scores(mass - norm[..., None], heads), front) < twice[:, None])
        log_mass = torch.where(again[:, None], torch.maximum(bulk, outlier), bulk)
        place = rank(unit_scores(log_mass + size - norm[..., None], heads), front)
        if level:
            kept = front & (place < config.nodes_kept(level))
            dropped.append(_Nodes(log_mass, counts, front & ~kept))

    read, fit = _read(log_mass, block_lse, heads, front, place, outside, config)
    dropped.append(_Nodes(log_mass, counts, front & ~read))
    unread = [
        (fit.mean(nodes.log_mass) + nodes.blocks.clamp(min=1.0).log()).masked_fill(~nodes.left[:, None], -math.inf)
        for nodes in dropped
    ]
    ids = torch.arange(blocks, device=end.device)
    every = (ids >= config.sink_blocks) & (ids < end[:, None])
    return Found(torch.where(all_read[:, None], every, read), torch.cat(unread, dim=-1).logsumexp(-1), reads)


def _read(
    log_mass: torch.Tensor,
    block_lse: torch.Tensor,
    heads: torch.Tensor,
    front: torch.Tensor,
    place: torch.Tensor,
    outside: torch.Tensor,
    config: SearchConfig,
) -> tuple[torch.Tensor, Regression]:
    """Which blocks of `front` are read, bool [B, N], and what those say about the others.

    `log_mass` and `block_lse` [B, n, N] are estimate and truth, `place` [B, N] is the order of reading.
    """
    most = front.sum(1).clamp(max=config.top_k * (config.width if config.rerank else 1))
    taken = most.clamp(max=config.first_lot)
    active = torch.ones_like(taken).bool()
    for _ in range(config.width - 1):
        read = front & (place < taken[:, None])
        fit = Regression.fit(log_mass, block_lse, read)
        exact = block_lse.masked_fill(~read[:, None], -math.inf)
        threshold = exact.topk(min(config.top_k, exact.shape[-1]), -1).values[..., -1:]
        observed = torch.logaddexp(outside, exact.logsumexp(-1))[..., None]
        more = torch.minimum(taken + config.top_k, most)
        candidates = front & (place >= taken[:, None]) & (place < more[:, None])
        excess = fit.expected_excess(log_mass, threshold, observed)
        gain = excess.masked_fill(~(heads[..., None] & candidates[:, None]), 0.0).sum((1, 2))
        active = active & (more > taken) & (gain >= config.min_gain * (more - taken))
        taken = torch.where(active, more, taken)
    read = front & (place < taken[:, None])
    return read, Regression.fit(log_mass, block_lse, read)
