"""Which sentences later reasoning keeps looking back to: vertical scores, receiver heads, thought anchors.

Formulas of thought-anchors (Bogdan et al., interp-reasoning/thought-anchors). A head's **vertical score** of a sentence
is the mean attention per pair of tokens that it gets from sentences at least `ANCHOR_GAP` later. Heads whose scores are
peaked over the candidates (large excess kurtosis) are **receiver heads**; the mean of their scores ranks the
**anchors** among these. Candidates are the sentences of the reasoning: see `sentences.anchor_candidates`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.statistics import capped
from stream_monitor.anchors.matrix import ANCHOR_GAP
from stream_monitor.tracing.attention import LayerInputs, visible_keys
from stream_monitor.tracing.ranks import rank_correlation
from stream_monitor.tracing.sentence_mass import SentenceMass

RECEIVER_HEADS = 20
"""Heads that make up the anchor curve (thought-anchors' default)."""
_TILE_LOGITS = 2**22
"""Logits held at a time by exact scores: 16 MiB of float32."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Anchors:
    """The anchor curve of S sentences.

    Attributes:
        kurtosis: float64 [L, H], excess kurtosis of each head's vertical scores; NaN for a head whose scores are equal.
        receivers: (layer, head) of the receiver heads, most peaked first.
        scores: float64 [S], mean vertical score over the receiver heads; NaN for the last `ANCHOR_GAP` sentences.
        candidates: bool [S], which sentences may be anchors.
    """

    kurtosis: Scores
    receivers: tuple[tuple[int, int], ...]
    scores: Scores
    candidates: NDArray[np.bool_]

    @property
    def ranked(self) -> NDArray[np.bool_]:
        """Candidates that have a score, bool [S]."""
        return np.asarray(self.candidates & np.isfinite(self.scores))

    def ranking(self) -> NDArray[np.int64]:
        """Candidates that have a score, highest first."""
        numbers = np.flatnonzero(self.ranked)
        return np.asarray(numbers[np.argsort(-self.scores[numbers], kind="stable")])


@dataclass(frozen=True)
class Agreement:
    """Of two anchor curves over the same sentences.

    Attributes:
        spearman: rank correlation over the candidates that have a score.
        partial: the same given a sentence's index and its tokens, both as ranks.
        top: share of the `top_count` highest sentences of one that are among those of the other.
        shared_receivers: share of receiver heads in common.
    """

    spearman: float
    partial: float
    top: float
    shared_receivers: float


def vertical_scores(layer: SentenceMass, tokens: NDArray[np.int64]) -> Scores:
    """Of one layer's heads, float64 [H, S]; pairs that were not read count as 0, NaN for the last `ANCHOR_GAP`.

    Args:
        layer: its sentence masses.
        tokens: int64 [S], tokens of each sentence.
    """
    count, heads = layer.unobserved.shape
    far = layer.query - layer.key >= ANCHOR_GAP
    code = layer.head[far].astype(np.int64) * count + layer.key[far]
    total = np.bincount(code, layer.mass[far], heads * count).reshape(heads, count)
    return _mean_of_later(total / tokens)


def exact_vertical_scores(inputs: LayerInputs, sentences: NDArray[np.int64]) -> Scores:
    """`vertical_scores` of exact attention, in row tiles: memory is linear in T.

    Args:
        inputs: of a layer over a whole context, T tokens.
        sentences: int64 [T], the sentence of each token, ascending without gaps.
    """
    length, kv_heads, _ = inputs.keys.shape
    heads = inputs.queries.shape[1]
    tokens = np.bincount(sentences)
    firsts = np.cumsum(tokens) - tokens
    total = np.zeros((heads, len(tokens)))
    keys = inputs.keys.transpose(0, 1)
    step = max(1, _TILE_LOGITS // (heads * length))
    for first in range(0, length, step):
        rows = torch.arange(first, min(length, first + step), device=keys.device)
        queries = inputs.queries[first : first + step].transpose(0, 1).unflatten(0, (kv_heads, -1))
        logits = capped(queries @ keys[:, None].mT * inputs.scale, inputs.softcap)
        visible = visible_keys(rows, torch.arange(length, device=keys.device), inputs.window)
        shares = logits.masked_fill(~visible, -torch.inf).softmax(-1).flatten(0, 1).cpu().numpy()
        mass = np.add.reduceat(shares, firsts, axis=-1)  # [H, n, S]
        sentence = sentences[first : first + step]
        far = sentence[:, None] - np.arange(len(tokens)) >= ANCHOR_GAP
        total += np.einsum("hns,ns->hs", mass, far / tokens[sentence][:, None])
    return _mean_of_later(total / tokens)


def _mean_of_later(total: Scores) -> Scores:
    """Sums [H, S] over the sentences at least `ANCHOR_GAP` later, as means."""
    count = total.shape[1]
    later = count - ANCHOR_GAP - np.arange(count)
    return np.where(later > 0, total / np.maximum(later, 1), np.nan)


def find_anchors(vertical: Sequence[Scores], candidates: NDArray[np.bool_]) -> Anchors:
    """The anchor curve of the layers' vertical scores, [H, S] each; layer 0 has no receiver heads (thought-anchors)."""
    scores = np.stack(vertical)
    ranked = candidates & np.isfinite(scores[0, 0])
    kurtosis = np.array([[excess_kurtosis(head[ranked]) for head in heads] for heads in scores])
    peaked = np.where(np.isfinite(kurtosis), kurtosis, -np.inf)
    peaked[0] = -np.inf
    order = np.argsort(-peaked, axis=None, kind="stable")[:RECEIVER_HEADS]
    order = order[np.isfinite(peaked.flat[order])]
    receivers = tuple((int(place) // kurtosis.shape[1], int(place) % kurtosis.shape[1]) for place in order)
    curve = np.mean([scores[head] for head in receivers], axis=0) if receivers else np.full(scores.shape[2], np.nan)
    return Anchors(kurtosis, receivers, curve, candidates)


def excess_kurtosis(values: Scores) -> float:
    """Fisher's, biased; NaN for equal values or none.

    >>> excess_kurtosis(np.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    0.25
    """
    if not len(values) or np.ptp(values) == 0:
        return float("nan")
    centred = values - values.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2 - 3)


def agreement(one: Anchors, other: Anchors, tokens: NDArray[np.int64], top_count: int = 5) -> Agreement:
    """Compares two curves over the same sentences of `tokens` tokens each, int64 [S]."""
    scored = one.ranked & other.ranked
    first, second = one.scores[scored], other.scores[scored]
    highest = [set(anchors.ranking()[:top_count].tolist()) for anchors in (one, other)]
    heads = [set(anchors.receivers) for anchors in (one, other)]
    return Agreement(
        spearman=rank_correlation(first, second),
        partial=rank_correlation(first, second, [np.flatnonzero(scored), tokens[scored]]),
        top=len(highest[0] & highest[1]) / max(1, len(highest[1])),
        shared_receivers=len(heads[0] & heads[1]) / max(1, len(heads[1])),
    )
