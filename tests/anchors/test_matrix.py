"""Sentence mass and vertical scores against plain loops over the definitions."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_monitor.anchors.matrix import SentenceStarts, SparseMass, forced_block_ids, vertical_scores

SEEDS = st.integers(0, 1 << 16)


@given(SEEDS, st.booleans(), st.sampled_from([0, (1 << 20) - 100]))
def test_every_token_is_in_the_sentence_that_begins_last_before_it(seed: int, released: bool, base: int) -> None:
    generator = np.random.default_rng(seed)
    edges = [0, *(base + np.unique(generator.integers(1, 400, 12))).tolist()]
    found = SentenceStarts()
    for start, end in pairwise(edges):
        found.append(start, end)
    kept = int(generator.integers(1, len(edges)))
    found.cut(kept)
    for start, end in pairwise(edges[kept - 1 :][1:]):
        found.append(start, end)
    if released:
        found.release()
    assert len(found) == len(found.positions)
    keys = generator.integers(0, found.positions[-1] + 1, 50).astype(np.uint32)
    starts = found.positions.tolist()
    assert found.of(keys).tolist() == [max(j for j, start in enumerate(starts) if start <= key) for key in keys]


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
