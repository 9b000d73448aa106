"""Sentence mass and vertical scores against plain loops over the definitions."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_monitor.anchors.matrix import SparseMass, fold, forced_block_ids, sentences_of, sum_by_key, vertical_scores

SEEDS = st.integers(0, 1 << 16)


@given(SEEDS)
def test_folding_loses_no_mass(seed: int) -> None:
    generator = np.random.default_rng(seed)
    starts = np.unique(np.append(0, generator.integers(1, 200, 12)))
    counts = generator.integers(0, 60, 3) * generator.integers(0, 2, 3)
    used = np.arange(60) < counts[:, None]
    keys, mass, edges, _ = sum_by_key(generator.integers(0, 250, used.shape), generator.random(used.shape), used)
    columns, shares, folded = fold(sentences_of(keys.astype(np.uint32), starts), mass, edges)
    assert folded[0] == 0
    assert folded[-1] == len(columns) == len(shares)
    for row, (low, high) in enumerate(pairwise(folded)):
        of_row = slice(edges[row], edges[row + 1])
        expected = np.zeros(len(starts))
        for key, value in zip(keys[of_row], mass[of_row], strict=True):
            expected[max(j for j, start in enumerate(starts) if start <= key)] += value
        dense = np.zeros(len(starts))
        dense[columns[low:high]] = shares[low:high]
        assert np.allclose(dense, expected, rtol=1e-5)
        assert (np.diff(columns[low:high].astype(int)) > 0).all()


@given(SEEDS, st.sampled_from([0, (1 << 28) - 20]), st.integers(0, 4), st.integers(0, 30))
def test_equal_keys_of_a_row_are_joined(seed: int, base: int, rows: int, entries: int) -> None:
    generator = np.random.default_rng(seed)
    shape = rows, entries
    keys, mass = base + generator.integers(0, 20, shape), generator.random(shape)
    used = generator.random(shape) < generator.random((rows, 1))
    joined = sum_by_key(keys, mass, used)
    assert len(joined.edges) == rows + 1
    assert joined.edges[-1] == len(joined.keys) == len(joined.mass)
    places = iter(joined.places.tolist())
    for row, (low, high) in enumerate(pairwise(joined.edges)):
        distinct = joined.keys[low:high]
        assert distinct.tolist() == sorted(set(keys[row, used[row]].tolist()))
        expected = [mass[row, used[row] & (keys[row] == key)].sum() for key in distinct]
        assert np.allclose(joined.mass[low:high], expected)
        assert all(distinct[next(places)] == key for key in keys[row, used[row]])
    assert next(places, None) is None


@given(SEEDS)
def test_vertical_scores_are_the_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 20))
    dense = np.tril(generator.random((size, size))) * (generator.random((size, size)) < 0.5)
    observed = generator.random(size) < 0.7
    dense[~observed] = 0
    rows, columns = (axis.astype(np.uint32) for axis in np.nonzero(dense))
    scores = vertical_scores(rows, columns, dense[rows, columns], observed)
    for j in range(size):
        later = [dense[i, j] for i in range(j + 4, size) if observed[i]]
        if later:
            assert np.isclose(scores[j], np.mean(later))
        else:
            assert np.isnan(scores[j])


def test_sparse_mass_is_the_dense_one() -> None:
    dense = np.array([0.0, 0.1, 0.0, 0.3, 0.2])
    mass = SparseMass.of(dense)
    assert (mass.columns.tolist(), mass.shares.tolist()) == ([1, 3, 4], [0.1, 0.3, 0.2])
    assert mass.before(4).columns.tolist() == [1, 3]
    assert mass.before(0).total == 0
    assert mass.total == dense.sum()
    assert mass.where(mass.shares > 0.15).columns.tolist() == [3, 4]


@given(st.integers(0, 400), st.integers(0, 3), st.integers(1, 5))
def test_forced_blocks_are_first_and_last_each_once(position: int, sink: int, recent: int) -> None:
    (ids,) = forced_block_ids(np.array([position]), 16, sink, recent)
    blocks = position // 16 + 1
    expected = set(range(min(sink, blocks))) | {b for b in range(blocks - recent, blocks) if b >= 0}
    assert sorted(i for i in ids if i >= 0) == sorted(expected)
