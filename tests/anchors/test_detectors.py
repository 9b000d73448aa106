"""The detectors against well-known libraries, and on streams with and without a shift."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river.drift import PageHinkley as RiverPageHinkley
from scipy.spatial.distance import jensenshannon

from stream_monitor.anchors.matrix import SparseMass
from stream_monitor.anchors.page_hinkley import PageHinkley
from stream_monitor.anchors.shift import AnchorShift
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.compiled.divergence import jensen_shannon


@given(st.integers(0, 1 << 16))
def test_divergence_is_scipys_squared(seed: int) -> None:
    generator = np.random.default_rng(seed)
    p, q = (generator.dirichlet(np.full(12, 0.3)) * (generator.random(12) < 0.8) + 1e-9 for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, 2) ** 2, abs=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_page_hinkley_alarms_where_rivers_does(seed: int, alpha: float) -> None:
    generator = np.random.default_rng(seed)
    values = np.concatenate([generator.normal(level, 0.3, 150) for level in (0, 1, 0, 2)])
    ours, theirs = PageHinkley(20, 0.05, 5.0, alpha), RiverPageHinkley(20, 0.05, 5.0, alpha, "up")
    alarms = []
    for value in values:
        ours.update(float(value))
        theirs.update(float(value))
        alarms.append((ours.drift_detected, theirs.drift_detected))
    assert all(a == b for a, b in alarms)
    assert any(a for a, _ in alarms)


def stream(
    generator: np.random.Generator, sentences: int, shift_at: int | None, entering: float = 0.0
) -> list[np.ndarray]:
    """Anchor mass of sentences that rest on one of the first eight anchors, and change that once."""
    base, other = np.full(8, 0.3), np.full(8, 0.3)
    base[1], other[6] = 12.0, 12.0
    result = []
    for index in range(sentences):
        mass = np.zeros(8 + index)
        mass[:8] = 0.5 * generator.dirichlet(other if shift_at is not None and index >= shift_at else base)
        if index:
            mass[-1] += entering
        result.append(mass)
    return result


def shown(detector: AnchorShift, mass: np.ndarray, rows: int = 4) -> Verdict:
    """The verdict on a sentence with mass on every candidate, float64 [candidates]."""
    return detector.update(SparseMass.of(mass), len(mass), rows)


def first_alarm(masses: list[np.ndarray]) -> int | None:
    detector = AnchorShift()
    for index, mass in enumerate(masses):
        shown(detector, mass)
        if detector.drift_detected:
            return index
    return None


def test_a_shift_is_found_soon_and_a_steady_chain_is_left_alone() -> None:
    generator = np.random.default_rng(0)
    found = [first_alarm(stream(generator, 60, 30)) for _ in range(50)]
    assert all(alarm is not None and 30 <= alarm <= 32 for alarm in found)
    false = sum(first_alarm(stream(generator, 60, None)) is not None for _ in range(100))
    assert false <= 5


def test_mass_on_a_new_sentence_is_kept_apart() -> None:
    generator = np.random.default_rng(1)
    false = sum(first_alarm(stream(generator, 60, None, entering=0.3)) is not None for _ in range(50))
    assert false <= 3
    detector = AnchorShift()
    for candidates in range(4, 24):
        shown(detector, np.eye(1, candidates)[0] * 0.5)
    half_on_the_new_one = np.zeros(24)
    half_on_the_new_one[[0, -1]] = 0.25
    shown(detector, half_on_the_new_one)
    assert (detector.divergence, detector.entering) == (0.0, 0.5)


def test_warm_up_and_restart() -> None:
    detector = AnchorShift(warm_up=4)
    one, two = np.array([0.5, 0.0]), np.array([0.0, 0.5])
    assert [shown(detector, one) for _ in range(6)] == [Verdict.WARM_UP] * 4 + [Verdict.STEADY] * 2
    assert shown(detector, two) is Verdict.ALARM
    assert (detector.moved().lost(5), detector.moved().gained(5)) == ([(0, 1.0)], [(1, 1.0)])
    assert [shown(detector, two) for _ in range(4)] == [Verdict.WARM_UP] * 3 + [Verdict.STEADY]


def test_what_moved_is_told_from_before_the_rise_however_long_that_takes() -> None:
    """Not the heaviest: one sentence stays that before and since."""
    detector = AnchorShift(weight=0.05)
    for index in range(40):
        mass = np.zeros(index + 20)
        mass[2], mass[0], mass[5] = (0.4, 0.4, 0.0) if index < 20 else (0.4, 0.1, 0.3)
        detector.update(SparseMass.of(mass), len(mass), rows=3)
        if detector.drift_detected:
            break
    assert detector.drift_detected
    assert index - detector.began == 20
    assert index > 20, "found at once"
    (lost,), (gained,) = detector.moved().lost(1), detector.moved().gained(1)
    assert (lost.sentence, gained.sentence) == (0, 5)
    assert (lost.share, gained.share) == (pytest.approx(1 / 2), pytest.approx(3 / 8))


def test_a_sentence_that_came_up_lately_is_no_evidence_of_a_shift() -> None:
    """The reference has too little of it yet, and what is read more is read more than that."""
    detector = AnchorShift()
    divergences = []
    for index in range(24):
        mass = np.zeros(8 + index)
        mass[0 if index < 10 else [0, 17]] = 0.25
        assert not detector.drift_detected
        shown(detector, mass)
        divergences.append(detector.divergence)
    assert math.isnan(divergences[0]), "there is nothing yet to diverge from"
    assert divergences[1 : 10 + detector.settle] == [0.0] * (9 + detector.settle)
    assert 0 < max(divergences[1:]) < 0.01
    at_once = AnchorShift(settle=1)
    for index in range(12):
        mass = np.zeros(8 + index)
        mass[0 if index < 10 else [0, 17]] = 0.25
        shown(at_once, mass)
    assert at_once.divergence > 0.1


@pytest.mark.parametrize(("mass", "rows"), [(np.full(5, 0.1), 1), (np.full(5, 0.001), 9), (np.zeros(0), 9)])
def test_too_little_to_say_anything(mass: np.ndarray, rows: int) -> None:
    detector = AnchorShift()
    assert shown(detector, mass, rows) is Verdict.INSUFFICIENT
    assert len(detector.reference.columns) == 0
    assert not detector.drift_detected


def test_the_reference_stays_small() -> None:
    """However many sentences were read at some time; the heaviest are remembered."""
    generator = np.random.default_rng(0)
    detector = AnchorShift()
    for index in range(2000):
        mass = np.zeros(4 + index)
        mass[generator.integers(0, len(mass), 40)] = 0.001
        mass[3] = 0.2
        shown(detector, mass)
    assert len(detector.reference.columns) <= 256
    assert 3 in detector.reference.columns


def test_what_moved_lately_is_of_the_newest_four_and_of_none_before_an_alarm() -> None:
    """The probe of a shift asks at any time, also right after the divergence raised an alarm."""
    detector = AnchorShift(lately=4)
    masses = [np.array([0.1, 0.3, 0.0, *np.zeros(index)]) for index in range(20)]
    for mass in masses:
        assert shown(detector, mass) is not Verdict.ALARM
    moved = detector.moved_lately()
    np.testing.assert_allclose(moved.before, moved.since)
    for index in range(3):
        shown(detector, np.array([0.3, 0.1, 0.0, *np.zeros(20 + index)]))
    moved = detector.moved_lately()
    assert [one.sentence for one in moved.lost(5)] == [1]
    assert [one.sentence for one in moved.gained(5)] == [0]
    assert moved.before.tolist() == pytest.approx([0.25, 0.75])
    # Three of the four, the newest counting most.
    learned = 0.25 + 0.5 * (1 - 0.8**3)
    assert moved.since[0] == pytest.approx((learned - 0.8**4 * 0.25) / (1 - 0.8**4))
    detector.threshold = 0.0
    while shown(detector, np.array([0.0, 0.0, 0.4, *np.zeros(30)])) is not Verdict.ALARM:
        pass
    assert not len(detector.moved_lately().columns)
    shown(detector, np.array([0.4, 0.0, 0.0, *np.zeros(30)]))
    moved = detector.moved_lately()
    assert (moved.before.tolist(), moved.since.tolist()) == ([0.0, 1.0], [1.0, 0.0])
    assert moved.columns.tolist() == [0, 2]
