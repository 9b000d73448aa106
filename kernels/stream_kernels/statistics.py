"""What a block summary says about the block's logits: the statistics behind `beam`, in plain torch.

A node of the summary pyramid holds the mean of its keys, the key or keys that lie farthest out, and how far they lie on
average. Level 0 nodes are key blocks; a node of level l stands for `FANOUT**l` of them in a row, numbered from the
start of the context, so that what a node covers never changes while the context grows. Only whole nodes exist. Sink
blocks are left out of every node: the first token's key is unlike all others and would spoil its ancestors.
"""

from dataclasses import dataclass

import torch

FANOUT = 8
"""Nodes of one level under a node of the next."""

MAX_RESIDUAL = 2.0
"""Bound of the regression's residual variance, where it is used to predict: a few stray blocks must not explode it."""


@dataclass(frozen=True)
class NodeStatistics:
    """One level of the pyramid, for B contexts.

    Attributes:
        mean: [B, J, D], of each node's keys.
        outliers: [B, J, O, D], first the key farthest from the mean, then each time the one whose distance to the
            nearest of the mean and those before is largest: in level 0 of all keys, above of its children's outliers.
            The first where several are as far.
        spread: [B, J], the keys' variances, summed over the channels.
        blocks: [J], how many blocks each node counts; 0 where it holds nothing but sink blocks.
    """

    mean: torch.Tensor
    outliers: torch.Tensor
    spread: torch.Tensor
    blocks: torch.Tensor


def spread_limit(count: torch.Tensor) -> torch.Tensor:
    """Standard deviation of logits beyond which `count` keys are too few to show the Gaussian's tail: sqrt(2 ln(n/2)).

    The mean of n exponentials of a Gaussian grows as exp(var / 2) only while the values that dominate that mean are
    likely to be among n draws; beyond, the largest draw decides. This is the freezing transition of Derrida's random
    energy model at sqrt(2 ln n); half of n fits real keys better at every budget tried (docs/design.md).
    """
    return (2.0 * (count / 2.0).clamp(min=2.0).log()).sqrt()


def log_mean_exp(mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Expected logarithm of the mean exponential of `count` Gaussian logits, elementwise.

    var / 2 up to the limit c of `spread_limit`, then on along its tangent in the standard deviation: c * dev - c^2 / 2.
    """
    limit = spread_limit(count)
    beyond = limit * variance.clamp(min=1e-12).sqrt() - 0.5 * limit.square()
    return mean + torch.where(variance < limit.square(), 0.5 * variance, beyond)


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(logits / softcap); unchanged where `softcap` is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def spread_profile(keys: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Each channel's part in the spread of keys, [B, D], summing to 1: measured where all keys are read anyway.

    Args:
        keys: [B, N, block_size, D], of which the row's recent blocks are looked at, each around its own mean.
        present: bool [B, N, block_size], keys of recent blocks.

    Returns:
        The profile; the same for every channel where the keys do not differ.
    """
    weight = present[..., None].to(keys.dtype)
    count = weight.sum(2, keepdim=True).clamp(min=1.0)
    deviation = (keys - (keys * weight).sum(2, keepdim=True) / count) * weight
    variance = deviation.square().sum((1, 2))
    total = variance.sum(-1, keepdim=True)
    even = torch.full_like(variance, 1.0 / variance.shape[-1])
    return torch.where(total > 0.0, variance / total.clamp(min=torch.finfo(keys.dtype).tiny), even)


def bulk_scores(
    queries: torch.Tensor, profile: torch.Tensor, nodes: NodeStatistics, block_size: int, softcap: float
) -> torch.Tensor:
    """Estimated log mean exponential of the logits of each node's keys, taken to be Gaussian.

    Args:
        queries: [B, n, D], scaled.
        profile: [B, D], from `spread_profile`.
        nodes: J of them.
        block_size: tokens per block.
        softcap: of the layer's logits, 0 for none. It acts on the mean, and on the variance by its slope there.

    Returns:
        [B, n, J].
    """
    centre = queries @ nodes.mean.mT
    variance = (queries.square() @ profile[..., None]) * nodes.spread[:, None]
    if softcap:
        slope = 1.0 - torch.tanh(centre / softcap).square()
        centre, variance = capped(centre, softcap), variance * slope.square()
    return log_mean_exp(centre, variance, nodes.blocks * block_size)


def outlier_scores(queries: torch.Tensor, nodes: NodeStatistics, block_size: int, softcap: float) -> torch.Tensor:
    """Log mean exponential of each node's logits if its best outlier had all the mass: [B, n, J], as `bulk_scores`."""
    logits = capped(queries @ nodes.outliers.flatten(1, 2).mT, softcap)
    best: torch.Tensor = logits.unflatten(-1, nodes.outliers.shape[1:3]).amax(-1)
    return best - (nodes.blocks * block_size).clamp(min=1).log()


def pyramid(block_keys: torch.Tensor, levels: int, sink_blocks: int, outlier_keys: int = 1) -> list[NodeStatistics]:
    """All levels over keys [B, N, block_size, D] (N whole blocks), lowest first, with `outlier_keys` outliers a node.

    Vectors are bfloat16 at every level, as a cache of them stores them, and a level is made from the stored one below.
    """
    blocks = torch.arange(block_keys.shape[1], device=block_keys.device)
    mean = block_keys.mean(2)
    distance = (block_keys - mean[:, :, None]).square().sum(-1)
    nodes = NodeStatistics(
        mean=_stored(mean),
        outliers=_stored(_outliers(block_keys, distance, outlier_keys)),
        spread=distance.mean(-1),
        blocks=(blocks >= sink_blocks).to(block_keys.dtype),
    )
    found = [nodes]
    for _ in range(levels - 1):
        count = len(nodes.blocks) // FANOUT
        means, outliers, spreads = (
            part[:, : count * FANOUT].unflatten(1, (count, FANOUT))
            for part in (nodes.mean, nodes.outliers, nodes.spread)
        )
        weight = nodes.blocks[: count * FANOUT].unflatten(0, (count, FANOUT))
        total = weight.sum(1)
        share = weight / total.clamp(min=1.0)[:, None]
        mean = (share[..., None] * means).sum(2)
        spread = (share * (spreads + (means - mean[:, :, None]).square().sum(-1))).sum(2)
        counted = (weight > 0).repeat_interleave(outlier_keys, 1)
        outliers = outliers.flatten(2, 3)
        distance = (outliers - mean[:, :, None]).square().sum(-1).masked_fill(~counted, -1.0)
        nodes = NodeStatistics(_stored(mean), _outliers(outliers, distance, outlier_keys), spread, total)
        found.append(nodes)
    return found


def _outliers(keys: torch.Tensor, distance: torch.Tensor, count: int) -> torch.Tensor:
    """Of keys [B, J, m, D] at `distance` [B, J, m] from the mean, the `count` outliers [B, J, count, D]."""
    found: list[torch.Tensor] = []
    for _ in range(count):
        at = distance.argmax(-1)[..., None, None].expand(-1, -1, 1, keys.shape[-1])
        found.append(keys.gather(2, at))
        distance = torch.minimum(distance, (keys - found[-1]).square().sum(-1))
    return torch.cat(found, 2)


def _stored(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


def top_level(blocks: torch.Tensor, width: int, levels: int) -> torch.Tensor:
    """Where the search starts, int64: the lowest of `levels` levels that is cheap, or cheapest, to score whole.

    Level l has blocks // FANOUT**l whole nodes. It is scored whole if there are at most two per node kept (`width`), or
    if the level above would drop less than a quarter of its own nodes.
    """
    top = torch.full_like(blocks, levels - 1)
    for level in range(levels - 2, -1, -1):
        here, above = blocks // FANOUT**level, blocks // FANOUT ** (level + 1)
        top = torch.where((here <= 2 * width) | (4 * width >= 3 * above), level, top)
    return top


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The standard normal distribution function, to 0.01: the logistic one, which takes an exponential."""
    return torch.sigmoid(1.702 * x)
