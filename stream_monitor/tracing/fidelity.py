"""Does a model that reads only the kept blocks still behave like itself?

The dense model runs once over the context and goes on greedily. The **restricted** model, whose every layer attends to
the kept and the forced blocks alone, runs over the same context, then decodes as well, each new token with a search of
its own. What is compared: the likeliest next token and the distribution at every position, and how many tokens of the
dense continuation are repeated before one differs. The paper asks for 2 tokens; that can pass by chance.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

import torch

from stream_kernels.prefill import Reduction
from stream_kernels.search import SearchConfig
from stream_monitor.tracing.attention import dense_attention
from stream_monitor.tracing.generation import RestrictedAttention, greedy, repeated
from stream_monitor.tracing.layer import TraceOptions
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.pruning import PairCount

CONTINUATION = 16
"""Greedy tokens that are compared."""


@dataclass(frozen=True)
class DenseRun:
    """The model as it is.

    Attributes:
        ids: the context, T tokens.
        hidden: float32 [T, C], see `TracedModel.run`.
        continuation: the greedy tokens that follow.
    """

    ids: list[int]
    hidden: torch.Tensor
    continuation: list[int]


@dataclass(frozen=True)
class RestrictedRun:
    """The model restricted to kept blocks.

    Attributes:
        hidden: float32 [T, C].
        matched: tokens of the dense continuation that it repeats before one differs.
        pairs: of blocks in the context.
        keys_read: key-equivalents that the search read, per query head, layer and query block of the context.
    """

    hidden: torch.Tensor
    matched: int
    pairs: PairCount
    keys_read: float


@dataclass(frozen=True)
class Divergence:
    """Between the next-token distributions of two runs, over the positions compared.

    Attributes:
        agreement: share of positions where both find the same token likeliest.
        mean_kl: mean of KL(dense || restricted), nats.
    """

    agreement: float
    mean_kl: float


def dense_run(model: TracedModel, ids: list[int], tokens: int = CONTINUATION) -> DenseRun:
    """Runs the model over `ids` and `tokens` greedy tokens on; those at the end of a chat do not stop it."""
    hidden, following = greedy(model, ids, dense_attention, dense_attention)
    return DenseRun(ids, hidden, list(islice(following, tokens)))


def restricted_run(
    model: TracedModel, dense: DenseRun, search: SearchConfig, reduction: Reduction = "max"
) -> RestrictedRun:
    """Runs the restricted model over the context of `dense`, and looks how far it repeats its continuation."""
    attention = RestrictedAttention(TraceOptions(search, "pruned", reduction))
    hidden, matched = repeated(model, dense.ids, attention.read, attention.decode, dense.continuation)
    return RestrictedRun(hidden, matched, attention.pairs, fmean(attention.keys_read))


def divergence(model: TracedModel, dense: DenseRun, restricted: RestrictedRun, most: int | None = None) -> Divergence:
    """Compares the two at every position; or at `most` positions, spread evenly, the last one among them.

    Some at a time: all logits at once would fill the memory.
    """
    count = len(dense.ids)
    compared = torch.linspace(count - 1, 0, min(count, most or count), dtype=torch.float64).round().long().flip(0)
    agreeing, kl = 0, 0.0
    for some in model.logit_tiles(len(compared)):
        expected = model.logits(dense.hidden[compared[some]]).log_softmax(-1)
        found = model.logits(restricted.hidden[compared[some]]).log_softmax(-1)
        agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
        kl += float((expected.exp() * (expected - found)).sum())
    return Divergence(agreeing / len(compared), kl / len(compared))


@dataclass(frozen=True)
class KSearch:
    """Restricted runs by `top_k`."""

    tried: dict[int, RestrictedRun]

    def smallest(self, tokens: int) -> int | None:
        """The smallest k tried that repeats `tokens` tokens and from which every larger k tried does too.

        Success need not be monotone in k, so a lone success below a failure does not count. None without any.
        """
        found = None
        for k in sorted(self.tried, reverse=True):
            if self.tried[k].matched < tokens:
                break
            found = k
        return found


def search_k(
    model: TracedModel,
    dense: DenseRun,
    search: SearchConfig,
    candidates: Iterable[int],
    reduction: Reduction = "max",
    tokens: int = CONTINUATION,
) -> KSearch:
    """Looks among `candidates` for the smallest `search.top_k` that repeats `tokens` tokens.

    The largest is tried first: where it fails, none can be found, and no other is tried. Between it and the others the
    smallest is found by bisection, which tries about log2 of them; a failure above a success that was not tried is not
    seen.
    """
    tried: dict[int, RestrictedRun] = {}

    def succeeds(k: int) -> bool:
        tried[k] = restricted_run(model, dense, replace(search, top_k=k), reduction)
        return tried[k].matched >= tokens

    ascending = sorted(set(candidates))
    if ascending and succeeds(ascending[-1]):
        low, high = 0, len(ascending) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if succeeds(ascending[middle]) else (middle + 1, high)
    return KSearch(tried)
