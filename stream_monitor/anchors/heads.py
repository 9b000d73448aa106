"""Which heads read what: the sentence matrix head by head, receiver heads, and the heads that carry a finding.

Formulas of thought-anchors (Bogdan et al., interp-reasoning/thought-anchors): a head's vertical score of a sentence is
the mean share that it gets from sentences at least `ANCHOR_GAP` later; heads whose vertical scores are peaked (large
excess kurtosis) are **receiver heads**.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import ANCHOR_GAP, Mass, Positions, SparseMass
from stream_monitor.compiled.matrices import sum_from_afar, sum_sentences

LEAST_SENTENCES = 12
"""Scored sentences of an output below which the kurtosis over them says nothing."""
LEAST_RELIABILITY = 0.5
"""Correlation of the heads' kurtosis between two halves of the requests below which no head is chosen."""

Head = tuple[int, int]
"""Layer, and query head counted over the whole layer."""


class HeadShares(NamedTuple):
    """One sentence's attention on each sentence, head by head: n entries, the attention sink left out.

    Attributes:
        heads: uint8 [n], places in the request's list of heads.
        columns: uint32 [n], the sentences that got any.
        shares: float32 [n], of the head's attention, mean over the sentence's rows.
    """

    heads: NDArray[np.uint8]
    columns: NDArray[np.uint32]
    shares: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Of the three arrays."""
        return self.heads.nbytes + self.columns.nbytes + self.shares.nbytes

    def mean_over(self, weights: Mass) -> SparseMass:
        """Mass of the sentence, mean over heads with these weights, float64 [heads], which sum to 1."""
        if not len(self.columns):
            return SparseMass(self.columns.astype(np.int64), np.zeros(0))
        weighted = self.shares * weights[self.heads]
        shares = np.bincount(self.columns, weighted).astype(np.float64)
        columns = np.flatnonzero(shares)
        return SparseMass(columns, shares[columns])

    def on(self, columns: Positions, count: int) -> Mass:
        """Each head's share on each of these sentences, ascending: float64 [count, columns]."""
        found = np.zeros((count, len(columns)))
        there = np.isin(self.columns, columns)
        found[self.heads[there], np.searchsorted(columns, self.columns[there])] = self.shares[there]
        return found


NO_SHARES = HeadShares(np.zeros(0, np.uint8), np.zeros(0, np.uint32), np.zeros(0, np.float32))


def joined(sentences: Sequence[HeadShares]) -> HeadShares:
    """All their entries, one sentence's after another's."""
    return HeadShares(
        *(np.concatenate([none, *(found[place] for found in sentences)]) for place, none in enumerate(NO_SHARES))
    )


def weights(heads: Sequence[Head], receivers: Iterable[Head]) -> Mass:
    """Equal weights of the receivers among `heads`, float64 [heads], sum 1; of all where none of them is there."""
    chosen = set(receivers)
    found = np.array([head in chosen for head in heads], float)
    if not found.any():
        found[:] = 1
    return np.asarray(found / max(1.0, found.sum()))


class HeadMatrix(NamedTuple):
    """What some sentences read, head by head.

    Attributes:
        numbers: int64 [sentences], of each.
        edges: int64 [sentences + 1], of each one's entries.
        entries: of all.
    """

    numbers: Positions
    edges: Positions
    entries: HeadShares

    @classmethod
    def of(cls, sentences: Sequence[tuple[int, HeadShares]]) -> "HeadMatrix":
        """Of sentences with their numbers."""
        entries = joined([found for _, found in sentences])
        edges = np.cumsum([0, *(len(found.columns) for _, found in sentences)])
        return cls(np.array([number for number, _ in sentences], np.int64), edges, entries)

    def after(self, count: int) -> "HeadMatrix":
        """Without the first so many of its sentences."""
        return self._replace(numbers=self.numbers[count:], edges=self.edges[count:])

    def mean_over(self, weights: Mass, size: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32], Mass]:
        """The sentence matrix by heads of these weights, which sum to 1: row, column and share of each cell there is.
        `size` is how many sentences there are."""
        heads, columns, shares = self.entries
        found: tuple[NDArray[np.uint32], NDArray[np.uint32], Mass] = sum_sentences(
            self.numbers, self.edges, columns, shares * weights[heads], size
        )
        return found

    def vertical_scores(self, heads: int, size: int) -> Mass:
        """float64 [heads, size]: mean share over the observed sentences i >= j + `ANCHOR_GAP`; NaN without such.

        Args:
            heads: of the request.
            size: sentences there are.
        """
        total = np.zeros((heads, size))
        sum_from_afar(self.numbers, self.edges, *self.entries, ANCHOR_GAP, total)
        observed = np.zeros(size)
        observed[self.numbers] = 1
        later = np.cumsum(observed[::-1])[::-1]
        count = np.zeros(size)
        count[: max(0, size - ANCHOR_GAP)] = later[ANCHOR_GAP:]
        scores = np.full((heads, size), np.nan)
        np.divide(total, count, out=scores, where=count > 0)
        return scores


def excess_kurtosis(values: Mass) -> Mass:
    """Fisher's, biased, over the last axis, NaN omitted; NaN for equal values or none.

    >>> round(excess_kurtosis(np.array([0.0, 0.0, np.nan, 0.0, 0.0, 1.0])).item(), 6)
    0.25
    """
    given = np.isfinite(values)
    count = np.maximum(given.sum(-1, keepdims=True), 1)
    centred = np.where(given, values, 0.0)
    centred = np.where(given, values - centred.sum(-1, keepdims=True) / count, 0.0)
    second, fourth = ((centred**power).sum(-1) / count[..., 0] for power in (2, 4))
    found = np.full(second.shape, np.nan)
    np.divide(fourth, second**2, out=found, where=second > 0)
    return found - 3


class Receivers(NamedTuple):
    """The receiver heads of a model.

    Attributes:
        heads: most peaked first; empty where none can be told.
        reliability: Pearson correlation of the heads' mean kurtosis between the even and the odd requests; NaN if it
            cannot be said.
        kurtosis: mean of each head, in the order given.
    """

    heads: tuple[Head, ...]
    reliability: float
    kurtosis: Mass


NO_RECEIVERS = Receivers((), float("nan"), np.zeros(0))
"""All heads count alike."""


def choose_receivers(heads: Sequence[Head], kurtosis: Mass) -> Receivers:
    """Heads whose kurtosis is above the mean of all heads in both halves of the requests.

    So their number comes from the model: a peak that only one half of the traffic shows is chance. Where the halves do
    not agree on the heads' order (`LEAST_RELIABILITY`), none is chosen and all heads count alike.

    Args:
        heads: of the model, as watched.
        kurtosis: float64 [requests, heads], NaN where a request cannot say.
    """
    means = _means(kurtosis)
    halves = np.stack([_means(kurtosis[0::2]), _means(kurtosis[1::2])])
    said = np.isfinite(halves).all(0)
    if said.sum() < 3 or min(np.ptp(half[said]) for half in halves) == 0:
        return Receivers((), float("nan"), means)
    reliability = float(np.corrcoef(halves[:, said])[0, 1])
    if reliability < LEAST_RELIABILITY:
        return Receivers((), reliability, means)
    above = said & (halves > halves[:, said].mean(1, keepdims=True)).all(0)
    order = sorted(np.flatnonzero(above).tolist(), key=lambda place: -means[place])
    return Receivers(tuple(heads[place] for place in order), reliability, means)


def _means(kurtosis: Mass) -> Mass:
    """Over the requests, NaN omitted."""
    given = np.isfinite(kurtosis)
    found = np.full(kurtosis.shape[1], np.nan)
    np.divide(np.where(given, kurtosis, 0).sum(0), given.sum(0), out=found, where=given.any(0))
    return found
