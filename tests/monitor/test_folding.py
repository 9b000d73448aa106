"""What the rows of a sentence say when they are folded, and the matrix of many sentences."""

import numpy as np
import pytest

from stream_monitor.anchors.heads import Head
from stream_monitor.anchors.matrix import SentenceStarts
from stream_monitor.compiled.periods import FAR_KEYS
from stream_monitor.monitor.folding import Unfolded, fold
from stream_monitor.monitor.ranks import Rank, key_of
from stream_monitor.monitor.request_heads import MAX_HEADS, RequestHeads
from stream_monitor.monitor.rows import FAR_KEY, Row
from stream_monitor.monitor.sentence_matrix import Captured, SentenceMatrix
from stream_monitor.v1alpha1 import summary_pb2
from tests.monitor import synthetic

SIZE = 6
"""Tokens of a sentence."""


def rank_of(info: summary_pb2.EngineInfo) -> Rank:
    return Rank(key_of(info), info, ("tiny", "0"))


def far_keys(position: int) -> bytes:
    """One of this lag, and none besides."""
    found = np.zeros(FAR_KEYS, FAR_KEY)
    found[0] = position, 0.2
    return found.tobytes()


def row(draw: np.random.Generator, ranks: list[Rank], position: int) -> Row:
    """Some mass on some keys, a part of it on the first token, and entries without any."""
    heads = [rank.heads for rank in ranks]
    entries = sum(heads) * (synthetic.TOP_K + synthetic.SINK + synthetic.RECENT)
    mass = draw.dirichlet(np.ones(entries)).astype(np.float32) if entries else np.zeros(0, np.float32)
    mass[draw.random(entries) < 0.2] = 0
    keys = draw.integers(0, position + 1, entries).astype(np.uint32)
    sources = tuple(zip(ranks, heads, strict=True))
    return Row("r", position, 0, True, keys, mass, 0.1, sum(heads), sources, far_keys(position))


def unfolded(
    draw: np.random.Generator, sentences: int, rows: int, layers: range, receivers: tuple[Head, ...] = ()
) -> Unfolded:
    """The last sentence of a request of so many, captured by two ranks, one of which watches nothing."""
    starts = SentenceStarts()
    for index in range(sentences):
        starts.append(SIZE * index, SIZE * (index + 1))
    ranks = [rank_of(synthetic.engine(layers=some, heads=range(8))) for some in (layers, range(0))]
    positions = range(SIZE * (sentences - 1), SIZE * (sentences - 1) + rows)
    return Unfolded([row(draw, ranks, position) for position in positions], starts, RequestHeads(), receivers)


def test_many_sentences_and_each_alone() -> None:
    draw = np.random.default_rng(0)
    sentences = [
        unfolded(draw, 20, 3, range(4), receivers=((1, 3), (2, 0))),
        unfolded(draw, 3, 0, range(2)),
        unfolded(draw, 9, 6, range(MAX_HEADS // 8 + 3)),
        unfolded(draw, 1, 1, range(1)),
        unfolded(draw, 4, 2, range(0)),
    ]
    before = unfolded(draw, 7, 2, range(2))
    before.rows[0].by_head = False
    sentences.append(before)
    folds = [fold(each) for each in sentences]
    for each, found in zip(sentences, folds, strict=True):
        mean = found.shares.mean_over(each.heads.weights(each.receivers))
        assert np.array_equal(mean.columns, found.mass.columns)
        assert np.array_equal(mean.shares, found.mass.shares)
    assert [each.telling for each in folds] == [3, 0, 6, 1, 0, 1]
    assert folds[2].shares.heads.max() == len(sentences[2].heads.heads) - 1
    matrix = SentenceMatrix.of([each.folded for each in folds])
    for number, (each, found) in enumerate(zip(sentences, folds, strict=True)):
        expected, mine = SentenceMatrix.of([found.folded]), matrix.rows == number
        assert np.array_equal(expected.columns, matrix.columns[mine])
        assert np.array_equal(expected.shares, matrix.shares[mine])
        captured = Captured.of(found.folded.rows)
        assert captured.rows == matrix.captured[number] == sum(row.heads > 0 for row in each.rows)
        assert captured.unobserved == pytest.approx(matrix.unobserved[number], nan_ok=True)
        assert captured.lags[:, 0].tolist() == [row.position for row in each.rows if row.heads]
        assert captured.lag_mass[:, 0] == pytest.approx(0.2)
        assert not captured.lags[:, 1:].any()
        assert not captured.lag_mass[:, 1:].any()
    mass = sum(float(row.mass.sum()) for row in sentences[2].rows) / sentences[2].rows[0].heads / 6
    assert matrix.shares[matrix.rows == 2].sum() == pytest.approx(mass, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_what_rows_give_is_summed_by_what_is_read(seed: int) -> None:
    draw = np.random.default_rng(seed)
    each = unfolded(draw, 12, 4, range(3))
    found, heads = fold(each), len(each.heads.heads)
    by_row, by_head = np.zeros((4, 12)), np.zeros((heads, 12))
    for number, row in enumerate(each.rows):
        places = np.repeat(np.arange(heads), len(row.keys) // heads)
        for key, mass, place in zip(row.keys.tolist(), row.mass.tolist(), places.tolist(), strict=True):
            by_row[number, key // SIZE] += mass
            by_head[place, key // SIZE] += mass / 4 if key else 0.0
    for number, (row, columns, mass) in enumerate(found.folded.parts()):
        assert row is each.rows[number]
        assert columns.tolist() == by_row[number].nonzero()[0].tolist()
        assert mass == pytest.approx(by_row[number, columns], rel=1e-5)
    places, columns, shares = found.shares
    assert list(zip(places.tolist(), columns.tolist(), strict=True)) == list(zip(*by_head.nonzero(), strict=True))
    assert shares == pytest.approx(by_head[places, columns], rel=1e-5)
    assert found.mass.shares == pytest.approx(by_head.mean(0)[found.mass.columns], rel=1e-5)
    assert found.mass.columns.tolist() == by_head.sum(0).nonzero()[0].tolist()


def test_rows_whose_heads_cannot_be_told_apart_give_no_shares() -> None:
    """Whether or not others of the request can."""
    draw = np.random.default_rng(1)
    silent, telling = unfolded(draw, 5, 2, range(2)), unfolded(draw, 5, 2, range(2))
    for each in silent.rows:
        each.by_head = False
    assert fold(telling).telling == 2
    for found in (fold(silent), fold(silent._replace(heads=telling.heads))):
        assert found.telling == 0
        assert [len(part) for part in (*found.shares, *found.mass)] == [0] * 5
        assert found.folded.mass.sum() == pytest.approx(sum(float(row.mass.sum()) for row in silent.rows))
