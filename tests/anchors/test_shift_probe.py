"""The probe of ANCHOR_SHIFT: it finds what one head shows and the mean hides, in subjects that it did not see, and
nothing in noise; and the panel asks it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from stream_monitor.anchors.calibration import Served, calibrated
from stream_monitor.anchors.heads import HeadShares
from stream_monitor.anchors.panel import PROBED_SHIFT, Alarm, Kind, Panel
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.anchors.shift_fitting import WITHIN, Labelled, choose, fit, moves_of
from stream_monitor.anchors.shift_probe import BEFORE, DISTANCES, MOST_ROWS, TOGETHER, ProbedShift, log_reading, moves
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.records import Role
from tests.anchors.shares import head_shares

PROMPT, SENTENCES, JOINT, HEADS = 2, 28, 20, 6
"""`JOINT` is where the heads change, if they do."""
LOSES, GAINS = 1, 4
"""Heads that read old sentences less, and as much more, behind a joint."""
FAR = 0
"""Which of the distances old sentences are."""


def served(seed: int, joint: int | None, tells: bool = True) -> Served:
    """Each head reads the prompt's first sentence for about 0.3, and for a tenth its own and the one before."""
    draw = np.random.default_rng(seed)
    shares = []
    for index in range(PROMPT, PROMPT + SENTENCES):
        far = 0.3 * np.exp(draw.normal(0, 0.3, HEADS))
        if joint is not None and index >= joint and tells:
            far[LOSES], far[GAINS] = far[LOSES] / 3, far[GAINS] + far[LOSES] * 2 / 3
        columns = np.repeat([0, index - 1, index], HEADS)
        tenth = np.full(2 * HEADS, 0.1)
        shares.append((index, head_shares(np.tile(np.arange(HEADS), 3), columns, np.concatenate([far, tenth]))))
    size = PROMPT + SENTENCES
    roles = np.array([Role.USER] * PROMPT + [Role.REASONING] * SENTENCES, np.uint8)
    heads = [(7, head) for head in range(HEADS)]
    return Served(PROMPT, heads, roles, 20 * np.arange(size), np.full(size, 5), shares, None)


def labelled(tells: bool = True, seed: int = 0, subjects: int = 5, each: int = 8) -> list[Labelled]:
    return [
        Labelled(
            served(10_000 * seed + 2 * place + joined, JOINT if joined else None, tells),
            f"s{place % subjects}",
            JOINT if joined else None,
        )
        for place in range(subjects * each)
        for joined in (False, True)
    ]


def test_the_heads_that_tell_weigh_most() -> None:
    found = choose(labelled())
    assert found.probe is not None
    assert found.probe.heads == tuple((7, head) for head in range(HEADS))
    weights = np.reshape(found.probe.weights, (DISTANCES, HEADS))
    assert (np.argmin(weights[FAR]), np.argmax(weights[FAR])) == (LOSES, GAINS)
    assert found.area > 0.95
    assert 0.9 < found.least <= found.area
    assert found.found > 0.9


def test_labels_that_mean_nothing_make_no_probe() -> None:
    found = [choose(labelled(tells=False, seed=seed)) for seed in range(5)]
    assert [choice.probe for choice in found] == [None] * 5
    assert max(choice.area for choice in found) < 0.5


def test_a_change_that_one_subject_alone_shows_is_none() -> None:
    some = [
        replace(one, request=served(place, one.joint, tells=one.subject == "s0"))
        for place, one in enumerate(labelled())
    ]
    assert choose(some).probe is None


def test_a_place_where_nothing_changes_is_told_by_nothing() -> None:
    """What is found four sentences too late is not found."""
    early = [one if one.joint is None else replace(one, joint=JOINT - 4) for one in labelled()]
    assert choose(early).found < 0.3


def test_each_is_scored_by_a_probe_that_has_not_seen_its_subject() -> None:
    some = labelled()
    seen = moves_of(some)
    scores = choose(some).scores
    for place in (0, 1, 23):
        others = [one for one in seen if one.subject != some[place].subject]
        assert scores[place] == pytest.approx(seen[place].highest(fit(others)))
    assert scores[0] != pytest.approx(seen[0].highest(fit(seen)))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda one: one.joint is None, "0 of the labelled requests have a joint and 40 none, of 5 subjects"),
        (
            lambda one: one.subject in {"s0", "s1", "s2"},
            "24 of the labelled requests have a joint and 24 none, of 3 subjects",
        ),
        (lambda one: one.joint is None or one.subject == "s0", None),
    ],
)
def test_too_few_labels_are_refused(keep, message: str | None) -> None:
    some = list(filter(keep, labelled()))
    if message is None:
        # Eight joints, all of one subject: what judges it was fitted to none.
        with pytest.raises(ProfileError, match="are all of the same few subjects"):
            choose(some)
        return
    with pytest.raises(ProfileError, match=message):
        choose(some)


def test_what_is_too_short_says_nothing() -> None:
    some = labelled()
    cut = [
        replace(one, request=replace(one.request, shares=one.request.shares[:14])) if one.joint is None else one
        for one in some[:40]
    ]
    both = choose([*cut, *some[40:]])
    alone = choose([one for one in [*cut, *some[40:]] if len(one.request.shares) > 14])
    assert (both.area, both.least, both.found) == (alone.area, alone.least, alone.found)
    assert (both.scores == -math.inf).sum() == 20
    with pytest.raises(ProfileError, match="40 of the labelled requests have a joint and 0 none"):
        choose(
            [
                replace(one, request=replace(one.request, shares=one.request.shares[:14])) if one.joint is None else one
                for one in some
            ]
        )


def test_a_joint_too_close_to_the_end_is_scored_but_not_learned_from() -> None:
    some = labelled()
    some[1] = replace(some[1], joint=PROMPT + SENTENCES - 2)
    seen = moves_of(some)
    assert len(seen[1].telling()) == 0
    assert math.isfinite(choose(some).scores[1])
    beyond = replace(some[1], joint=PROMPT + SENTENCES)
    assert choose([some[0], beyond, *some[2:]]).scores[1] == -math.inf


def test_a_reading_is_by_distance_and_of_what_is_left() -> None:
    shares = HeadShares(
        np.array([0, 0, 1, 1, 1, 1], np.uint8),
        np.array([2, 9, 6, 7, 9, 0], np.uint32),
        np.array([0.1, 0.2, 0.03, 0.04, 0.05, 0.5], np.float32),
    )

    def read(index: int) -> list[list[float]]:
        return (np.exp(log_reading(index, shares, 2)) - 0.003).reshape(DISTANCES, 2).round(6).tolist()

    # Anchors are at least four sentences back.
    assert read(10) == [[0.1, 0.53], [0.2, 0.09], [0, 0], [0.7, 0.38]]
    assert read(9) == [[0.1, 0.5], [0, 0.07], [0.2, 0.05], [0.7, 0.38]]
    assert np.isnan(log_reading(3, head_shares(*np.zeros((3, 0), int)), 2)).all()


ANY = Probe(((7, 0),), (1.0,) * DISTANCES, 0.5)


def test_the_score_is_of_the_newest_four_beside_the_twelve_before() -> None:
    """Each counts by its rows, at most six; and so it is of all places at once."""
    draw = np.random.default_rng(0)
    values, rows = draw.normal(size=30), draw.integers(1, 12, 30)
    detector, scores = ProbedShift(ANY), []
    for index, (value, count) in enumerate(zip(values.tolist(), rows.tolist(), strict=True)):
        verdict = detector.update(value, count)
        assert verdict is (Verdict.WARM_UP if index < BEFORE + TOGETHER - 1 else Verdict.STEADY)
        if verdict is Verdict.STEADY:
            weight, newest = np.minimum(rows[: index + 1], MOST_ROWS), values[: index + 1]
            now = np.average(newest[-TOGETHER:], weights=weight[-TOGETHER:])
            before = np.average(newest[-16:-4], weights=weight[-16:-4])
            scores.append(detector.score)
            assert detector.score == pytest.approx(now - before + 0.5)
    np.testing.assert_allclose(moves(values[:, None], rows)[:, 0] + 0.5, scores)
    assert detector.rows.tolist() == np.minimum(rows, MOST_ROWS)[-16:].tolist()
    assert detector.update(math.nan, 5) is Verdict.INSUFFICIENT
    assert detector.score == scores[-1]
    assert moves(values[:15, None], rows[:15]).shape == (0, 1)


def test_an_alarm_is_raised_once_while_it_stays() -> None:
    detector = ProbedShift(replace(ANY, bias=0.0), threshold=1.0)
    values = [0.0] * 16 + [4.0] * 3 + [0.0] * 16 + [9.0]
    raised = [detector.update(value, 4) is Verdict.ALARM for value in values]
    assert np.flatnonzero(raised).tolist() == [17, 35]


CALM = [served(50_000 + seed, None) for seed in range(60)]


def profile(seed: int = 0) -> Profile:
    probe = choose(labelled(seed=seed)).probe
    assert probe is not None
    return calibrated("m", "c", 1, CALM, shift_probe=probe)


def alarms(panel: Panel, request: Served) -> list[tuple[int, Alarm]]:
    probe = panel.shift_probe
    return [
        (seen.index, alarm)
        for seen in request.observations(panel.receivers, None, probe)
        for alarm in panel.update(seen)
    ]


def test_the_panel_raises_a_shift_by_the_profiles_probe() -> None:
    made = profile()
    assert len(made.highest[PROBED_SHIFT]) == len(CALM)
    found = [alarms(Panel(made, 0.2), served(90_000 + seed, JOINT)) for seed in range(20)]
    shifts = [(index, alarm) for one in found for index, alarm in one if alarm.by_probe]
    in_time = [any(alarm.by_probe and JOINT <= index <= JOINT + WITHIN for index, alarm in one) for one in found]
    assert sum(in_time) >= 18
    for index, alarm in shifts:
        assert alarm.kind is Kind.ANCHOR_SHIFT
        assert alarm.began == index - TOGETHER + 1
        assert alarm.score > alarm.threshold
        assert alarm.p_value is not None
        assert alarm.p_value <= 0.2
    false = [alarms(Panel(made, 0.2), served(95_000 + seed, None)) for seed in range(100)]
    assert np.mean([bool(one) for one in false]) < 0.3


def test_the_scores_do_not_depend_on_thresholds() -> None:
    made, request = profile(), served(90_000, JOINT)
    some, none = Panel(made, 0.2), Panel(replace(made, highest={}), 0.2)
    assert {alarm.by_probe for _, alarm in alarms(some, request)} == {True}
    assert alarms(none, request) == []
    assert some.probed_highest == none.probed_highest
    assert some.highest == none.highest


def test_a_probe_takes_its_part_of_the_rate() -> None:
    made = profile()
    assert [name for name in made.highest if made.can_raise(name)] == [
        Kind.ANCHOR_SHIFT,
        Kind.PROMPT_DETACHMENT,
        PROBED_SHIFT,
    ], "nothing is known of loops here"
    # Ascending scores, so that no two rates have one threshold.
    made = replace(made, highest={name: tuple(map(float, range(60))) for name in made.highest if made.can_raise(name)})
    panel = Panel(made, 0.3)
    assert panel.probed_shift is not None
    assert panel.probed_shift.threshold == panel.shift.threshold == made.threshold(Kind.ANCHOR_SHIFT, 0.1)
    panel = Panel(
        replace(made, highest={name: made.highest[name] for name in made.highest if name != PROBED_SHIFT}), 0.3
    )
    assert panel.probed_shift is not None
    assert panel.probed_shift.threshold == math.inf
    assert panel.shift.threshold == made.threshold(Kind.ANCHOR_SHIFT, 0.15) < made.threshold(Kind.ANCHOR_SHIFT, 0.1)


def test_without_a_head_of_the_probe_the_divergence_goes_on_alone() -> None:
    made, request = profile(), served(90_000, JOINT)
    panel = Panel(made, 0.2)
    elsewhere = replace(request, heads=[(8, head) for head in range(HEADS)])
    assert [alarm for _, alarm in alarms(panel, elsewhere) if alarm.by_probe] == []
    assert panel.probed_highest.sentence == -1
    assert panel.highest[Kind.ANCHOR_SHIFT].sentence >= 0


def test_an_alarm_of_the_probe_names_what_lost_and_what_gained() -> None:
    """From the four newest sentences on; one that both sides read alike is named on neither."""
    probe = Probe(((7, 0),), (1.0, 0.0, 0.0, 0.0), 0.0)
    quiet = {kind.value: (math.inf,) for kind in Kind}
    made = replace(calibrated("m", "c", 1, CALM), shift_probe=probe, highest=quiet | {PROBED_SHIFT: (0.3,) * 99})
    shares = []
    for index in range(PROMPT, PROMPT + SENTENCES):
        on, mass = (0, 0.2) if index < JOINT else (1, 0.4)
        shares.append((index, head_shares(np.zeros(2, int), np.array([on, 1 - on]), np.array([mass, 0.1]))))
    (index, alarm), *_ = alarms(Panel(made, 0.2), replace(served(0, None), heads=[(7, 0)], shares=shares))
    assert alarm.by_probe
    assert index - alarm.began == TOGETHER - 1
    assert [one.sentence for one in alarm.before] == [0]
    assert [one.sentence for one in alarm.now] == [1]


def test_probes_of_a_file_must_be_whole(tmp_path) -> None:
    made = profile()
    path = tmp_path / "p.json"
    made.write(path)
    assert Profile.read(path) == made
    assert made.shift_probe is not None
    for weights in (made.shift_probe.weights[:-1], made.shift_probe.weights[:HEADS], (math.nan,) * DISTANCES * HEADS):
        replace(made, shift_probe=replace(made.shift_probe, weights=weights)).write(path)
        with pytest.raises(ProfileError, match="was changed by hand"):
            Profile.read(path)
