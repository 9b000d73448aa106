"""Sentences of several requests that are folded together say what each says alone."""

import numpy as np
import pytest

from stream_monitor.anchors.heads import Head
from stream_monitor.anchors.lock import FAR_KEYS
from stream_monitor.anchors.matrix import SentenceStarts
from stream_monitor.monitor import folding
from stream_monitor.monitor.folding import Fold, Unfolded, fold
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


def same(one: Fold, other: Fold) -> bool:
    arrays = [(one.folded.columns, other.folded.columns), (one.folded.mass, other.folded.mass)]
    arrays += [*zip(one.shares, other.shares, strict=True), *zip(one.mass, other.mass, strict=True)]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays) and (
        one.folded.rows,
        one.folded.edges,
        one.telling,
    ) == (other.folded.rows, other.folded.edges, other.telling)


@pytest.mark.parametrize("most", [1, 1 << 20], ids=["one a batch", "in one batch"])
def test_together_and_one_by_one(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
    alone = [fold([each])[0] for each in sentences]
    monkeypatch.setattr(folding, "_MOST_ENTRIES", most)
    together = fold(sentences)
    for each, one, other in zip(sentences, alone, together, strict=True):
        assert same(one, other)
        mean = other.shares.mean_over(each.heads.weights(each.receivers))
        assert np.array_equal(mean.columns, other.mass.columns)
        assert np.array_equal(mean.shares, other.mass.shares)
    assert [each.telling for each in together] == [3, 0, 6, 1, 0, 1]
    assert together[2].shares.heads.max() == len(sentences[2].heads.heads) - 1
    matrix = SentenceMatrix.of([each.folded for each in together])
    for number, (each, one) in enumerate(zip(sentences, alone, strict=True)):
        expected, mine = SentenceMatrix.of([one.folded]), matrix.rows == number
        assert np.array_equal(expected.columns, matrix.columns[mine])
        assert np.array_equal(expected.shares, matrix.shares[mine])
        captured = Captured.of(one.folded.rows)
        assert captured.rows == matrix.captured[number] == sum(row.heads > 0 for row in each.rows)
        assert captured.unobserved == pytest.approx(matrix.unobserved[number], nan_ok=True)
        assert captured.lags[:, 0].tolist() == [row.position for row in each.rows if row.heads]
        assert captured.lag_mass[:, 0] == pytest.approx(0.2)
        assert not captured.lags[:, 1:].any()
        assert not captured.lag_mass[:, 1:].any()
    mass = sum(float(row.mass.sum()) for row in sentences[2].rows) / sentences[2].rows[0].heads / 6
    assert matrix.shares[matrix.rows == 2].sum() == pytest.approx(mass, rel=1e-5)


def test_rows_whose_heads_cannot_be_told_apart_give_no_shares() -> None:
    """Beside sentences that tell, one of the same request among them, into which no division by nothing may reach."""
    draw = np.random.default_rng(1)
    telling, silent = unfolded(draw, 5, 2, range(2)), unfolded(draw, 5, 2, range(2))
    for each in silent.rows:
        each.by_head = False
    same_request = silent._replace(heads=telling.heads)
    with np.errstate(all="raise"):
        folds = fold([silent, telling, same_request])
    assert [each.telling for each in folds] == [0, 2, 0]
    for each in (folds[0], folds[2]):
        assert [len(part) for part in (*each.shares, *each.mass)] == [0] * 5
        assert each.folded.mass.sum() == pytest.approx(sum(float(row.mass.sum()) for row in silent.rows))
    assert same(folds[1], fold([telling])[0])
    assert folds[1].mass.shares.sum() > 0
