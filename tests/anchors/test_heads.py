"""Shares head by head, kurtosis against scipy, the choice of receiver heads, and the correction for proximity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stream_monitor.anchors.heads import (
    HeadMatrix,
    choose_receivers,
    excess_kurtosis,
    weights,
)
from stream_monitor.anchors.matrix import ANCHOR_GAP, proximity_corrected
from tests.anchors.shares import head_shares

SEEDS = st.integers(0, 1 << 16)
HEADS = [(layer, head) for layer in (3, 5) for head in range(4)]


@given(SEEDS)
def test_kurtosis_is_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.standard_t(4, (3, 40))
    values[generator.random(values.shape) < 0.2] = np.nan
    expected = stats.kurtosis(values, axis=-1, fisher=True, bias=True, nan_policy="omit")
    assert np.allclose(excess_kurtosis(values), expected)


def test_kurtosis_of_equal_values_or_none_is_not_a_number() -> None:
    assert np.isnan(excess_kurtosis(np.array([[1.0, 1.0, np.nan], [np.nan] * 3]))).all()


@given(SEEDS)
def test_shares_by_head_are_the_means_over_the_rows(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, heads, columns = 3, 4, 9
    dense = generator.random((rows, heads, columns)) * (generator.random((rows, heads, columns)) < 0.4)
    _, head, column = np.nonzero(dense)
    found = head_shares(head, column, dense[dense > 0], rows)
    again = np.zeros((heads, columns))
    again[found.heads, found.columns] = found.shares
    assert np.allclose(again, dense.mean(0), atol=1e-6)
    assert len(found.shares) == np.count_nonzero(dense.sum(0))
    chosen = generator.dirichlet(np.ones(heads))
    mass = found.mean_over(chosen)
    whole = np.zeros(columns)
    whole[mass.columns] = mass.shares
    assert np.allclose(whole, chosen @ dense.mean(0), atol=1e-6)
    some = np.array([1, 4])
    assert np.allclose(found.on(some, heads), dense.mean(0)[:, some], atol=1e-6)


@given(SEEDS)
def test_vertical_scores_by_head_are_the_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size, heads = int(generator.integers(1, 14)), 3
    dense = np.tril(generator.random((heads, size, size)))
    observed = generator.random(size) < 0.7
    kept = []
    for index in np.flatnonzero(observed).tolist():
        head, column = np.nonzero(dense[:, index])
        kept.append((index, head_shares(head, column, dense[head, index, column])))
    matrix = HeadMatrix.of([(size, head_shares(*np.nonzero(np.ones((heads, size))), np.ones(heads * size))), *kept])
    found = matrix.after(1).vertical_scores(heads, size)
    for column in range(size):
        later = [index for index in range(column + ANCHOR_GAP, size) if observed[index]]
        expected = dense[:, later, column].mean(1) if later else np.full(heads, np.nan)
        assert np.allclose(found[:, column], expected, equal_nan=True, atol=1e-6)
    chosen = generator.dirichlet(np.ones(heads))
    rows, columns, shares = matrix.after(1).mean_over(chosen, size)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (index, column) for index in np.flatnonzero(observed).tolist() for column in range(index + 1)
    ]
    assert np.allclose(shares, np.einsum("h,hij->ij", chosen, dense)[rows, columns], atol=1e-6)


def test_receivers_are_the_heads_that_are_peaked_in_both_halves() -> None:
    generator = np.random.default_rng(0)
    peaked = np.array([0, 0, 9, 0, 0, 6, 0, 0.0])
    kurtosis = peaked + generator.normal(size=(40, 8))
    kurtosis[::3, 1] = np.nan
    # Only the even requests say so of this one.
    kurtosis[0::2, 7] += 8
    found = choose_receivers(HEADS, kurtosis)
    assert found.heads == (HEADS[2], HEADS[5])
    assert 0.5 < found.reliability < 1
    halves = [np.nanmean(half, axis=0) for half in (kurtosis[0::2], kurtosis[1::2])]
    assert found.reliability == pytest.approx(stats.pearsonr(*halves).statistic)
    assert weights(HEADS, found.heads).tolist() == [0, 0, 0.5, 0, 0, 0.5, 0, 0]
    assert weights(HEADS, ()).tolist() == weights(HEADS, [(9, 9)]).tolist() == [1 / 8] * 8


def test_no_receivers_where_the_halves_do_not_agree() -> None:
    noise = np.random.default_rng(0).normal(size=(40, 8))
    found = choose_receivers(HEADS, noise)
    assert found.heads == ()
    assert found.reliability < 0.5
    assert choose_receivers(HEADS, noise[:1]).heads == ()
    assert np.isnan(choose_receivers(HEADS, np.full((4, 8), np.nan)).reliability)


def test_a_sentence_that_is_read_because_it_is_near_is_as_any_other() -> None:
    """Shares that depend on the distance alone are corrected to 1; one that is read three times as much, to 3."""
    size, special = 120, 40
    rows, columns = (axis.astype(np.uint32) for axis in np.tril_indices(size, -ANCHOR_GAP))
    near = 2.0 ** -np.floor(np.log2(rows - columns))
    observed = np.ones(size, bool)
    even = proximity_corrected(rows, columns, near, observed)
    assert np.allclose(even[: size - ANCHOR_GAP], 1)
    assert np.isnan(even[size - ANCHOR_GAP :]).all()
    more = proximity_corrected(rows, columns, np.where(columns == special, 3 * near, near), observed)
    others = np.delete(more[: size - ANCHOR_GAP], special)
    assert more[special] / others.mean() == pytest.approx(3, rel=0.05)


def test_the_correction_counts_observed_sentences_alone() -> None:
    size = 60
    observed = np.arange(size) % 2 == 0
    rows, columns = (axis.astype(np.uint32) for axis in np.tril_indices(size, -ANCHOR_GAP))
    there = observed[rows]
    even = proximity_corrected(rows[there], columns[there], np.full(there.sum(), 0.1), observed)
    assert np.allclose(even[: size - ANCHOR_GAP - 1], 1)
