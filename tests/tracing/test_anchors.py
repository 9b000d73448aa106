"""Sentence masses and anchors against squares of attention and against scipy."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray

from stream_kernels.prefill import Reduction
from stream_kernels.search import SearchConfig
from stream_monitor.tracing import sentence_mass, thought_anchors
from stream_monitor.tracing.attention import LayerInputs
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.layer import TraceOptions, search_layer
from stream_monitor.tracing.sentence_file import SentenceFile, SentenceWriter
from stream_monitor.tracing.sentence_mass import SentenceMass, read_sentence_mass
from stream_monitor.tracing.thought_anchors import Anchors, agreement, exact_vertical_scores, find_anchors
from tests.tracing import tiny
from tests.tracing.test_attention import read_keys

LENGTH, SIZE = 203, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_mass, "_TILE_NUMBERS", 20_000)
    monkeypatch.setattr(thought_anchors, "_TILE_LOGITS", 20_000)


def sentences_of(length: int = LENGTH) -> NDArray[np.int64]:
    """Sentences of 1 to 20 tokens: int64 [T], the sentence of each."""
    draw = np.random.default_rng(0)
    return np.repeat(np.arange(length), draw.integers(1, 20, length))[:length]


def matrix(shares: torch.Tensor, sentences: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shares [H, T, T] as mean mass of each sentence on each, [H, S, S]."""
    belongs = torch.from_numpy(np.eye(sentences[-1] + 1)[sentences])
    return (((belongs / belongs.sum(0)).T @ shares) @ belongs).numpy()


def square(mass: SentenceMass) -> NDArray[np.float64]:
    """Sentence masses as [H, S, S]."""
    count, heads = mass.unobserved.shape
    dense = np.zeros((heads, count, count))
    dense[mass.head, mass.query, mass.key] = mass.mass
    return dense


def read(
    given: LayerInputs, top_k: int, sentences: NDArray[np.int64], reduction: Reduction = "mean"
) -> tuple[SentenceMass, torch.Tensor]:
    """Sentence masses, and the shares [H, T, T] that they should be made of."""
    search = SearchConfig(strategy="exact", block_size=SIZE, top_k=top_k)
    found = search_layer(given, TraceOptions(search, reduction=reduction))
    shares = tiny.logits(given).softmax(-1) * read_keys(found, given, SIZE)
    return read_sentence_mass(given, found, SIZE, sentences), shares


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("top_k", [2, 64])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (2.0, 0), (0.0, 45)])
def test_mass_is_that_of_the_keys_read(reduction: Reduction, top_k: int, softcap: float, window: int) -> None:
    sentences = sentences_of()
    mass, shares = read(tiny.inputs(LENGTH, softcap=softcap, window=window), top_k, sentences, reduction)
    expected = matrix(shares, sentences)
    np.testing.assert_allclose(square(mass), expected, atol=1e-6)
    np.testing.assert_allclose(square(mass).sum(2).T + mass.unobserved, 1, atol=1e-5)
    if top_k == 2 and not window:
        assert mass.unobserved.max() > 0.1, "nothing was left out"


def test_what_keeps_everything_scores_as_exact_attention() -> None:
    sentences = sentences_of()
    given = tiny.inputs(LENGTH, softcap=2.0)
    mass, _ = read(given, 64, sentences)
    exact = exact_vertical_scores(given, sentences)
    np.testing.assert_allclose(
        thought_anchors.vertical_scores(mass, np.bincount(sentences)), exact, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("window", [0, 45])
def test_vertical_scores_are_means_over_sentences_at_least_four_later(window: int) -> None:
    sentences = sentences_of()
    given = tiny.inputs(LENGTH, window=window)
    pairs = matrix(tiny.logits(given).softmax(-1), sentences) / np.bincount(sentences)
    scores = exact_vertical_scores(given, sentences)
    count = pairs.shape[1]
    for key in range(count - 4):
        np.testing.assert_allclose(scores[:, key], pairs[:, key + 4 :, key].mean(1), rtol=1e-6)
    assert np.isnan(scores[:, count - 4 :]).all()


def test_masses_survive_the_file(tmp_path: Path) -> None:
    mass, _ = read(tiny.inputs(LENGTH), 2, sentences_of())
    writer = SentenceWriter(tmp_path / "sentences.parquet")
    writer.write(mass)
    writer.write(mass)
    writer.close()
    stored = SentenceFile(tmp_path / "sentences.parquet")
    assert stored.layers == 2
    for name, value in vars(stored.layer(1)).items():
        np.testing.assert_array_equal(value, vars(mass)[name])
    (tmp_path / "other.parquet").write_text("no")
    with pytest.raises(TracingError, match="cannot read the sentence masses"):
        SentenceFile(tmp_path / "other.parquet")


def test_kurtosis_and_rank_correlation_are_scipys() -> None:
    draw = np.random.default_rng(1)
    for values in (draw.normal(size=30), draw.exponential(size=31)):
        assert thought_anchors.excess_kurtosis(values) == pytest.approx(scipy.stats.kurtosis(values))
    assert np.isnan(thought_anchors.excess_kurtosis(np.ones(5)))
    one, other = draw.integers(0, 9, 40).astype(float), draw.normal(size=40)
    tokens = draw.integers(1, 30, 40)
    found = agreement(
        *(Anchors(np.zeros((1, 1)), ((1, 0),), curve, np.ones(40, bool)) for curve in (one, other)), tokens
    )
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    given = np.stack([np.ones(40), scipy.stats.rankdata(np.arange(40)), scipy.stats.rankdata(tokens)], 1)
    left, right = (
        ranks - given @ np.linalg.lstsq(given, ranks)[0] for ranks in map(scipy.stats.rankdata, (one, other))
    )
    assert found.partial == pytest.approx(scipy.stats.pearsonr(left, right).statistic)


def test_top_candidates_are_compared_as_sets() -> None:
    curve = np.array([9.0, 9, 8, 7, 6, 5, 4, 3, np.nan])
    other = np.array([9.0, 5, 6, 7, 8, 1, 9, 2, np.nan])
    candidates = np.arange(9) > 0
    one, two = (
        Anchors(np.zeros((1, 1)), heads, scores, candidates)
        for heads, scores in ((((1, 0), (2, 0)), curve), (((2, 0), (3, 0)), other))
    )
    found = agreement(one, two, np.arange(9))
    assert (found.top, found.shared_receivers) == (0.8, 0.5)
    assert one.ranking().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(curve[1:8], other[1:8]).statistic)


def test_receivers_are_the_heads_most_peaked_over_candidates_above_layer_0() -> None:
    scores = np.random.default_rng(2).uniform(size=(3, 4, 20))
    scores[..., -4:] = np.nan
    scores[0, 0, 7] = scores[2, 1, 9] = 50  # peaked, the first in layer 0
    scores[1, 2, 0] = 90  # peaked at what is no candidate
    candidates = np.arange(20) > 0
    found = find_anchors(list(scores), candidates)
    assert found.receivers[0] == (2, 1)
    assert len(found.receivers) == 8, "all heads of two layers"
    assert (1, 2) not in found.receivers[:1]
    np.testing.assert_allclose(found.kurtosis, scipy.stats.kurtosis(scores[..., 1:16], axis=-1))
    np.testing.assert_allclose(found.scores, scores[1:].mean((0, 1)))
    assert found.ranking()[0] == 9
