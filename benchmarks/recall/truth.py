"""Exact attention by key block, and how a choice of blocks compares with it."""

from dataclasses import dataclass

import torch

from benchmarks.attention import Attention
from stream_kernels.search import NO_BLOCK, SearchConfig

HEAVY = 0.02
"""Share of a row's attention from which a block counts as heavy."""

MIN_HEAVY = 16
"""Heavy blocks over all rows, one a row, from which a head counts for the worst head: fewer would make it a matter of
one miss."""

MIN_INNER = 1e-6
"""Rows with less attention than this on all inner blocks are left out of the mean over rows: nothing is there."""


@dataclass(frozen=True)
class Truth:
    """Exact attention of R rows on N key blocks.

    Attributes:
        block_lse: float32 [L, R, H, N], log-sum-exp of each block's scaled logits; -inf beyond the row's context.
        inner_mass: float32 [L, R, H, N], share of the row's attention on each inner block, 0 elsewhere.
        inner: bool [R, N], blocks that the search has to choose from; all others in the context are forced.
        contexts: int64 [R], keys each row attends to.
    """

    block_lse: torch.Tensor
    inner_mass: torch.Tensor
    inner: torch.Tensor
    contexts: torch.Tensor

    @classmethod
    def of(cls, attention: Attention, config: SearchConfig) -> "Truth":
        """By dense attention in float32. `config` gives the block size and the forced blocks."""
        rows, size = attention.queries.shape[1], config.block_size
        contexts = torch.arange(attention.tokens - rows + 1, attention.tokens + 1)
        blocks = -(-attention.tokens // size)
        beyond = torch.arange(blocks * size) >= contexts[:, None]
        block_lse = []
        for queries, keys in zip(attention.queries, attention.keys, strict=True):
            grouped = queries.transpose(0, 1).unflatten(0, (len(keys), -1)).float() * attention.scale
            logits = torch.einsum("gnrd,gtd->rgnt", grouped, keys.float()).flatten(1, 2)
            logits = torch.nn.functional.pad(logits, (0, blocks * size - attention.tokens))
            logits = logits.masked_fill(beyond[:, None], -torch.inf)
            block_lse.append(logits.unflatten(-1, (blocks, size)).logsumexp(-1))
        lse = torch.stack(block_lse)
        ids = torch.arange(blocks)
        used = -(-contexts // size)
        inner = (ids >= config.sink_blocks) & (ids < (used - config.recent_blocks)[:, None])
        mass = (lse - lse.logsumexp(-1, keepdim=True)).exp()
        return cls(lse, mass.masked_fill(~inner[:, None], 0.0), inner, contexts)

    def forced_keys(self, config: SearchConfig) -> torch.Tensor:
        """Keys in each row's forced blocks, int64 [R]."""
        return self.contexts - self.inner.sum(-1) * config.block_size


@dataclass(frozen=True)
class Figures:
    """What one choice of blocks reached, over all layers, rows and heads.

    Attributes:
        observed: share of the attention on kept and forced blocks, averaged.
        inner: share of the inner blocks' attention that is on kept ones: sums over rows and heads of each layer,
            then the mean over layers, then over the same figure of the K heaviest blocks.
        inner_by_row: attention on the kept blocks over that on the K heaviest, averaged over rows with `MIN_INNER`.
        heavy: share of heavy inner blocks that are kept, averaged over heads that have any.
        heavy_worst: the same in the worst head with `MIN_HEAVY`; 1 where there is none.
        unobserved_bias: estimated minus true share of attention neither kept nor forced, averaged; NaN without one.
        unobserved_error: the mean absolute difference.
    """

    observed: float
    inner: float
    inner_by_row: float
    heavy: float
    heavy_worst: float
    unobserved_bias: float
    unobserved_error: float


class Judge:
    """Compares choices of K blocks with exact attention."""

    def __init__(self, truth: Truth, top_k: int) -> None:
        self._mass = truth.inner_mass
        self._all_inner = self._mass.sum(-1)
        self._best = self._mass.topk(min(top_k, self._mass.shape[-1]), -1).values.sum(-1)
        self._heavy = (self._mass >= HEAVY).sum((1, 3))

    def figures(self, block_ids: torch.Tensor, unobserved: torch.Tensor | None = None) -> Figures:
        """Of blocks kept, int64 [L, R, H, K] with `NO_BLOCK` where padded.

        `unobserved` [L, R, H] is the estimated share of the attention that is neither kept nor forced.
        """
        kept = self._mass.gather(-1, block_ids.clamp(min=0)) * (block_ids != NO_BLOCK)
        found = kept.sum(-1)
        counted = self._all_inner >= MIN_INNER
        by_head = (kept >= HEAVY).sum((1, 3)) / self._heavy.clamp(min=1)
        many = by_head[self._heavy >= MIN_HEAVY]
        unobserved_truth = (self._all_inner - found).clamp(min=0.0)
        error = torch.tensor(torch.nan) if unobserved is None else unobserved - unobserved_truth
        return Figures(
            observed=float(1.0 - unobserved_truth.mean()),
            inner=float(_by_layer(found, self._all_inner) / _by_layer(self._best, self._all_inner)),
            inner_by_row=float((found[counted] / self._best[counted]).mean()),
            heavy=float(by_head[self._heavy > 0].mean()),
            heavy_worst=float(many.min()) if len(many) else 1.0,
            unobserved_bias=float(error.mean()),
            unobserved_error=float(error.abs().mean()),
        )


def _by_layer(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return (part.sum((1, 2)) / whole.sum((1, 2))).mean()
