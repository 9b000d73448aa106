"""Other ways to score a block, flat over all blocks, in plain torch.

* `min/max`: the upper bound of a block's logits from the least and greatest key of each channel (Quest,
  arXiv:2406.10774), two vectors a block.
* `mean`: the query's product with the block's mean key, one vector a block.

As published, every query head takes its own K best blocks. Shared and re-ranked, the query heads of one KV head take
`width * K` candidates together, read them in full, and each keeps the K of largest exact mass. Reads are counted as
`keys_read` counts them (stream_kernels/reference.py): one per vector scored, the keys of every block read in full (of
the blocks kept, to know their mass, where there is no re-rank) and of the forced blocks, a group's reads divided by
its heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.attention import Attention
from benchmarks.recall.truth import Truth
from stream_kernels.search import SearchConfig

Share = Callable[[torch.Tensor], torch.Tensor]


def by_maximum(scores: torch.Tensor) -> torch.Tensor:
    """A group's scores [..., n, N] to [..., N]: the best of its heads, each relative to its own best block."""
    return (scores - scores.amax(-1, keepdim=True)).amax(-2)


def by_sum(scores: torch.Tensor) -> torch.Tensor:
    """A group's scores [..., n, N] to [..., N]: the heads' shares, as the scores have them, summed."""
    return scores.log_softmax(-1).logsumexp(-2)


SHARINGS: dict[str, Share] = {"maximum": by_maximum, "sum": by_sum}


@dataclass(frozen=True)
class FlatScores:
    """Scores of one method.

    Attributes:
        scores: float32 [L, R, H, N], -inf outside the inner blocks.
        vectors: vectors read per block scored.
    """

    scores: torch.Tensor
    vectors: int


def flat_scores(attention: Attention, truth: Truth, config: SearchConfig) -> dict[str, FlatScores]:
    """`min/max` and `mean` of every inner block."""
    size = config.block_size
    whole = attention.tokens // size
    found: dict[str, list[torch.Tensor]] = {"min/max": [], "mean": []}
    for queries, keys in zip(attention.queries, attention.keys, strict=True):
        scaled = queries.unflatten(1, (len(keys), -1)).float() * attention.scale
        blocks = keys[:, : whole * size].float().unflatten(1, (whole, size))

        def product(q: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
            return torch.einsum("rgnd,gbd->rgnb", q, vectors).flatten(1, 2)

        bound = product(scaled.clamp(min=0.0), blocks.amax(2)) + product(scaled.clamp(max=0.0), blocks.amin(2))
        found["min/max"].append(bound)
        found["mean"].append(product(scaled, blocks.mean(2)))
    outside = ~truth.inner[:, None]
    return {
        name: FlatScores(
            torch.nn.functional.pad(torch.stack(scores), (0, truth.inner.shape[-1] - whole)).masked_fill(
                outside, -torch.inf
            ),
            vectors=2 if name == "min/max" else 1,
        )
        for name, scores in found.items()
    }


def published(flat: FlatScores, truth: Truth, config: SearchConfig) -> tuple[torch.Tensor, float]:
    """Each head's own K best blocks, int64 [L, R, H, K], and the reads over the context."""
    ids = flat.scores.topk(config.top_k, -1).indices
    reads = flat.vectors * truth.inner.sum(-1) + config.top_k * config.block_size + truth.forced_keys(config)
    return ids, float((reads / truth.contexts).mean())


def shared(
    flat: FlatScores, truth: Truth, config: SearchConfig, group: int, width: int, share: Share
) -> tuple[torch.Tensor, float]:
    """`width * K` candidates per group, re-ranked by each head: the K blocks kept, and the reads over the context."""
    inner = truth.inner.sum(-1)
    candidates = inner.clamp(max=width * config.top_k)
    units = share(flat.scores.unflatten(2, (-1, group)))
    best = units.topk(int(candidates.max()), -1).indices
    read = torch.zeros_like(units, dtype=torch.bool).scatter_(-1, best, True) & truth.inner[:, None]
    mass = truth.block_lse.masked_fill(~read.repeat_interleave(group, 2), -torch.inf)
    ids = mass.topk(config.top_k, -1).indices
    reads = (flat.vectors * inner + candidates * config.block_size + truth.forced_keys(config)) / group
    return ids, float((reads / truth.contexts).mean())
