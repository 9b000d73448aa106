"""Detectors beside the shift's, the panel that runs them all, and profiles."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from stream_monitor.anchors.detachment import PromptDetachment
from stream_monitor.anchors.heads import Receivers
from stream_monitor.anchors.lock import AnchorLock
from stream_monitor.anchors.matrix import SparseMass
from stream_monitor.anchors.panel import OPENING, Kind, Observation, Panel
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import VERSION, Profile, ProfileError, make_profile
from stream_monitor.anchors.untrusted import UntrustedAnchor
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.compiled.periods import FAR_KEYS, LEAST_LAG, MOST_LAG
from stream_monitor.records import Role

PROMPT = 10
"""Sentences of a prompt: the system's, three of an untrusted document, and the user's."""


def observation(index: int, on: dict[int, float], rows: int = 4, lag: int = 0) -> Observation:
    """Sentence `index` of an output, with mass on some sentences, and rows that look back so far (drawn if 0)."""
    mass = np.zeros(index + 1)
    mass[list(on)] = list(on.values())
    roles = np.full(index + 1, Role.REASONING, np.uint8)
    roles[:PROMPT] = [Role.SYSTEM] + [Role.UNTRUSTED] * 3 + [Role.USER] * 6
    shape = rows, FAR_KEYS
    lags = np.full(shape, lag) if lag else np.random.default_rng(index).integers(8, 2000, shape)
    starts = 12 * np.arange(index + 1)
    return Observation(PROMPT, index, SparseMass.of(mass), roles, starts, rows, lags, np.full(shape, 0.05))


def run(panel: Panel, seen: list[Observation]) -> list[tuple[int, Kind]]:
    return [(one.index, alarm.kind) for one in seen for alarm in panel.update(one)]


STEADY = {0: 0.02, 2: 0.03, 5: 0.2, 7: 0.1}


def steady(first: int, count: int) -> list[Observation]:
    return [observation(PROMPT + first + place, STEADY) for place in range(count)]


def test_a_steady_output_raises_nothing() -> None:
    assert run(Panel(), steady(0, 60)) == []


def test_every_kind_is_raised_by_its_cause_alone() -> None:
    lost = [observation(PROMPT + 20 + place, {0: 0.02, 2: 0.03, 5: 0.001, 15: 0.3}) for place in range(12)]
    assert {kind for _, kind in run(Panel(), steady(0, 20) + lost)} == {Kind.ANCHOR_SHIFT, Kind.PROMPT_DETACHMENT}
    moved = [observation(PROMPT + 20 + place, {0: 0.02, 2: 0.03, 5: 0.02, 8: 0.3}) for place in range(12)]
    assert {kind for _, kind in run(Panel(), steady(0, 20) + moved)} == {Kind.ANCHOR_SHIFT}
    looping, panel = [observation(PROMPT + 20 + place, STEADY, lag=57) for place in range(12)], Panel()
    (alarm,) = [alarm for one in steady(0, 20) + looping for alarm in panel.update(one)]
    assert (alarm.kind, alarm.began) == (Kind.ANCHOR_LOCK, PROMPT + 20)
    taken = [observation(PROMPT + place, {2: 0.3, 5: 0.2}) for place in range(12)]
    assert run(Panel(), taken) == [(PROMPT, Kind.UNTRUSTED_ANCHOR)]


def test_an_alarm_says_where_it_began_and_what_moved() -> None:
    panel = Panel()
    moved = [observation(PROMPT + 20 + place, {5: 0.02, 8: 0.3}) for place in range(12)]
    (alarm,) = [alarm for one in steady(0, 20) + moved for alarm in panel.update(one)]
    assert alarm.began == PROMPT + 20
    assert [found[0].sentence for found in (alarm.before, alarm.now)] == [5, 8]
    assert not {one.sentence for one in alarm.before} & {one.sentence for one in alarm.now}
    assert alarm.score > alarm.threshold
    assert alarm.p_value is None


def test_too_few_rows_are_insufficient() -> None:
    panel = Panel()
    panel.update(observation(PROMPT + 3, STEADY, rows=1))
    assert set(panel.verdicts.values()) == {Verdict.INSUFFICIENT}
    assert {highest.sentence for highest in panel.highest.values()} == {-1}


def test_the_last_sentences_of_a_document_count_though_they_are_near() -> None:
    """An answer's first sentence stands less than the gap behind them."""
    seen = observation(PROMPT, {3: 0.3, 9: 0.1})
    roles = seen.roles.copy()
    roles[7:10] = Role.UNTRUSTED
    panel = Panel()
    panel.update(replace(seen, roles=roles, mass=SparseMass(np.array([5, 8]), np.array([0.1, 0.3]))))
    assert panel.highest[Kind.UNTRUSTED_ANCHOR].score == pytest.approx(math.log(3))


def test_the_highest_scores_do_not_depend_on_thresholds() -> None:
    """A profile is made of them: an alarm begins the detector anew, and must not cut the score off.

    Nor may what was written shortly before count sooner than without the alarm.
    """
    recent = PROMPT + 15
    moved = [observation(PROMPT + 20 + place, {5: 0.02, 8: 0.3, recent: 0.02 * place}) for place in range(30)]
    with_alarms, without = Panel(), Panel()
    without.shift.threshold = math.inf
    for one in steady(0, 20) + moved:
        with_alarms.update(one)
        without.update(one)
    assert without.highest[Kind.ANCHOR_SHIFT].score == with_alarms.highest[Kind.ANCHOR_SHIFT].score > 1.0


SHAPE = 40, FAR_KEYS
"""Rows and keys, as many as ANCHOR_LOCK looks at."""


@pytest.mark.parametrize("period", [3, 5, 17, 60, 64, 65, 128, 300, 512])
def test_loops_of_any_period_lock(period: int) -> None:
    rng = np.random.default_rng(period)
    fewest = -(-LEAST_LAG // period) + (period < LEAST_LAG)
    rounds = rng.integers(fewest, MOST_LAG // period + 1, SHAPE)
    detector = AnchorLock()
    detector.update(rounds * period - rng.integers(0, 2, SHAPE), rng.random(SHAPE))
    assert detector.drift_detected
    assert detector.score == pytest.approx(1.0)
    assert detector.period == period


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_that_of_the_period_that_most_keys_fit(seed: int) -> None:
    """Against loops over the definition, at lags that reach beyond what is looked at."""
    rng = np.random.default_rng(seed)
    lags, mass = rng.integers(0, 1200, SHAPE), rng.random(SHAPE) * (rng.random(SHAPE) < 0.8)
    lags[::2] = 37 * rng.integers(1, 30, (20, FAR_KEYS)) - rng.integers(0, 2, (20, FAR_KEYS))
    lags[5], mass[7] = 3, 0
    detector = AnchorLock()
    for first in range(0, 40, 6):
        detector.update(lags[first : first + 6], mass[first : first + 6])
    parts: dict[int, list[float]] = {period: [] for period in range(3, 513)}
    for of_row, mass_of_row in zip(lags.tolist(), mass.tolist(), strict=True):
        far = [(lag, math.sqrt(m)) for lag, m in zip(of_row, mass_of_row, strict=True) if m and 8 <= lag <= 1024]
        for period, found in parts.items():
            if far:
                fits = sum(weight for lag, weight in far if lag % period in (0, period - 1))
                found.append(fits / sum(weight for _, weight in far))
    assert len(parts[3]) == 38
    scores = {}
    for period, found in parts.items():
        chance = 2 / period
        chance = min(0.99, chance + 2 * math.sqrt(chance * (1 - chance) / len(found)))
        scores[period] = (sum(found) / len(found) - chance) / (1 - chance)
    assert detector.score == pytest.approx(max(scores.values()), abs=1e-6)
    assert detector.period == max(scores, key=lambda period: scores[period]) == 37


def test_lags_at_random_do_not_lock() -> None:
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(300):
        detector = AnchorLock()
        detector.update(rng.integers(LEAST_LAG, 400, SHAPE), rng.random(SHAPE))
        scores.append(detector.score)
    assert max(scores) < 0.1


@pytest.mark.parametrize("steady_sentences", [0, 3, 12])
def test_a_lock_says_where_the_loop_began(steady_sentences: int) -> None:
    """Six of eight keys fit, and by chance some before."""
    rng, detector = np.random.default_rng(steady_sentences), AnchorLock()
    for _ in range(steady_sentences):
        detector.update(rng.integers(LEAST_LAG, 400, (6, FAR_KEYS)), rng.random((6, FAR_KEYS)))
    looping = 0
    while not detector.drift_detected and looping < 9:
        lags = rng.integers(LEAST_LAG, 400, (6, FAR_KEYS))
        lags[:, :6] = 20 * rng.integers(1, 10, (6, 6)) - rng.integers(0, 2, (6, 6))
        detector.update(lags, rng.random((6, FAR_KEYS)))
        looping += 1
    assert detector.drift_detected
    assert detector.began == looping - 1


def test_a_lock_is_raised_once_and_again_after_it_was_left() -> None:
    detector, rng = AnchorLock(), np.random.default_rng(0)
    raised = []
    for lag in [40] * 3 + [0] * 3 + [40] * 3:
        lags = np.full(SHAPE, lag) if lag else rng.integers(LEAST_LAG, 400, SHAPE)
        raised.append(detector.update(lags, np.ones(SHAPE)) is Verdict.ALARM)
    assert raised == [True, False, False, False, False, False, True, False, False]


def test_dilution_is_no_detachment() -> None:
    """The prompt's share falls as the output grows, in proportion to its share of the tokens."""
    detector = PromptDetachment()
    for index in range(400):
        tokens = 10 / (10 + index + 1)
        assert detector.update(0.4 * tokens, 0.4, tokens, 4) is not Verdict.ALARM


def test_an_untrusted_anchor_is_raised_once_while_it_stays() -> None:
    detector = UntrustedAnchor()
    raised = [detector.update(heaviest, 0.2, 0.9, 4) is Verdict.ALARM for heaviest in (0.1, 0.3, 0.4, 0.1, 0.3)]
    assert raised == [False, True, False, False, True]


def profile(scores: dict[str, list[float]], requests: int, trim: float = 0.0) -> Profile:
    return make_profile("m", "c", 1, {kind.value: [] for kind in Kind} | scores, requests, trim)


def opening(on: dict[int, float]) -> Observation:
    """The row of the prompt's last token."""
    return replace(observation(PROMPT - 1, on, rows=1), opening=True)


def test_the_opening_raises_once_and_is_no_sentence() -> None:
    panel, seen = Panel(), [observation(PROMPT + place, {2: 0.3, 5: 0.2}) for place in range(3)]
    assert run(panel, [opening({2: 0.3, 5: 0.2})]) == [(PROMPT - 1, Kind.UNTRUSTED_ANCHOR)]
    assert panel.verdicts == {Kind.UNTRUSTED_ANCHOR: Verdict.ALARM}
    assert panel.opening.sentence == PROMPT - 1
    assert panel.highest[Kind.UNTRUSTED_ANCHOR].sentence == -1
    assert run(panel, seen) == [], "it goes on as it began"
    alone = Panel()
    run(alone, seen)
    assert panel.highest[Kind.ANCHOR_SHIFT] == alone.highest[Kind.ANCHOR_SHIFT]
    assert panel.detachment.score == alone.detachment.score


def test_what_the_opening_reads_of_its_own_sentence_is_no_sign_of_distrust() -> None:
    """At the end of the user's question it counts for that, at the end of a document for nothing."""
    assert run(Panel(), [opening({2: 0.3, 5: 0.2, PROMPT - 1: 0.4})]) == []
    seen = opening({2: 0.1, 5: 0.2, PROMPT - 1: 0.4})
    roles = seen.roles.copy()
    roles[-1] = Role.UNTRUSTED
    panel = Panel()
    assert run(panel, [replace(seen, roles=roles)]) == []
    assert panel.opening.score == pytest.approx(math.log(0.5))


def test_openings_are_judged_among_themselves() -> None:
    """Where documents are asked about, what is usual at an opening would hide what is not in a sentence."""
    seen, sentence = opening({2: 0.3, 5: 0.2}), observation(PROMPT, {2: 0.3, 5: 0.2})
    sentences, openings = {"untrusted_anchor": [-1.0] * 19}, {OPENING: [-1.0] * 18 + [0.0]}
    alarms = Panel(profile(sentences | openings, 19), 0.2).update(seen)
    assert [(alarm.kind, alarm.threshold, alarm.p_value) for alarm in alarms] == [(Kind.UNTRUSTED_ANCHOR, -1.0, 0.05)]
    usual = Panel(profile(sentences | {OPENING: [9.0] * 19}, 19), 0.2)
    assert run(usual, [seen, sentence]) == [(PROMPT, Kind.UNTRUSTED_ANCHOR)]
    without = Panel(profile(sentences, 19), 0.2)
    assert run(without, [seen, sentence]) == [(PROMPT, Kind.UNTRUSTED_ANCHOR)]
    assert without.untrusted.opening_threshold == math.inf


def test_p_values_are_the_conformal_ones() -> None:
    made = profile({"anchor_shift": [1.0, 2.0, 2.0, 3.0]}, 9)
    assert [made.p_value("anchor_shift", score) for score in (3.5, 3.0, 2.0, 0.0)] == [0.2, 0.4, 0.8, 1.0]


def test_a_detector_that_could_score_too_few_requests_is_not_raised() -> None:
    """Such as UNTRUSTED_ANCHOR, calibrated on traffic without labels."""
    made = profile({"untrusted_anchor": [0.1] * 3}, 999)
    assert made.p_value("anchor_lock", 9.0) == 1.0
    assert made.threshold("anchor_lock", 0.2) == made.threshold("untrusted_anchor", 0.2) == math.inf
    assert run(Panel(made, 0.2), [observation(PROMPT + place, {2: 0.3, 5: 0.2}) for place in range(12)]) == []


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_scores_above_the_threshold_are_as_rare_as_said(rate: float) -> None:
    """Over calibrations and requests alike drawn: what one calibration gives varies around it."""
    rng = np.random.default_rng(1)
    raised = 0
    for _ in range(4000):
        made = profile({"anchor_shift": rng.normal(size=99).tolist()}, 99)
        threshold = made.threshold("anchor_shift", rate)
        assert made.p_value("anchor_shift", threshold + 1e-9) <= rate < made.p_value("anchor_shift", threshold)
        raised += rng.normal() > threshold
    assert stats.binomtest(raised, 4000, rate).pvalue > 1e-3


def test_holms_procedure_divides_the_rate_among_what_was_not_raised() -> None:
    scores = {kind.value: np.linspace(0, 1, 399).tolist() for kind in Kind}
    panel = Panel(profile(scores, 399), rate=0.04)
    quarter, third = (panel.profile.threshold("anchor_shift", rate) for rate in (0.01, 0.04 / 3))
    assert panel.shift.threshold == panel.lock.threshold == quarter
    alarms = panel.update(observation(PROMPT, {2: 0.4, 5: 0.1}))
    assert [alarm.kind for alarm in alarms] == [Kind.UNTRUSTED_ANCHOR]
    assert alarms[0].p_value == pytest.approx(1 / 400)
    assert panel.shift.threshold == panel.lock.threshold == third < quarter


def test_what_a_request_cannot_show_takes_no_part_of_the_rate() -> None:
    """Without an untrusted stretch three kinds share it."""
    scores = {kind.value: np.linspace(0, 1, 399).tolist() for kind in Kind}
    panel = Panel(profile(scores, 399), rate=0.03)
    seen = observation(PROMPT, STEADY)
    roles = np.where(seen.roles == Role.UNTRUSTED, Role.USER, seen.roles)
    panel.update(replace(seen, roles=roles))
    assert panel.shift.threshold == panel.profile.threshold("anchor_shift", 0.01)


def test_a_rate_that_so_few_requests_cannot_tell_of_is_refused() -> None:
    scored = {kind.value: [1.0] for kind in Kind}
    with pytest.raises(ProfileError, match=r"made from 398 requests; a rate of 0.01 for 4 detectors needs 399"):
        profile(scored, 398).check(0.01)
    profile(scored, 399).check(0.01)
    # One that could score nothing is never raised and takes no part of the rate.
    profile(scored | {"untrusted_anchor": []}, 299).check(0.01)
    with pytest.raises(ProfileError, match="for 3 detectors needs 299"):
        profile(scored | {"untrusted_anchor": []}, 298).check(0.01)
    assert profile({"anchor_shift": [1.0] * 398}, 398).threshold("anchor_shift", 0.0025) == math.inf


def test_the_highest_scores_are_trimmed() -> None:
    made = profile({"anchor_shift": list(range(100)), "anchor_lock": [5.0, 6.0]}, 100, trim=0.05)
    assert (made.trimmed, made.highest["anchor_shift"][-1], made.highest["anchor_lock"]) == (5, 94.0, ())


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    made = make_profile(
        "m",
        "c",
        1,
        {"anchor_shift": [3.0, 1.0]},
        4,
        receivers=Receivers(((3, 1), (5, 0)), 0.9, np.zeros(4)),
        references={"anchor_shift": {"all": (40, 0.2, 0.1)}},
    )
    made = replace(made, probe=Probe(((5, 1), (3, 1)), (0.5, -2.0), 1.5))
    made.write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "is not a profile; `stream-monitor calibrate` makes one"),
        ("[]", "is not a profile"),
        (f'{{"version": {VERSION}}}', "is not a profile"),
        ({"version": 4}, f"is a profile of version 4, and this program's scores are those of {VERSION}; make it anew"),
        ({"probe": {"heads": [[1, 2, 3]], "weights": [1.0], "bias": 0.0}}, "is not a profile"),
        ({"probe": {"heads": [[1, 2]], "weights": [1.0, 2.0], "bias": 0.0}}, "was changed by hand"),
        ({"probe": {"heads": [[1, 2]], "weights": [math.inf], "bias": 0.0}}, "was changed by hand"),
        ({"probe": {"heads": [], "weights": [], "bias": 0.0}}, "was changed by hand"),
        ({"probe": [1]}, "is not a profile"),
        ({"requests": 1}, "was changed by hand"),
        ({"highest": {"anchor_shift": [2.0, 1.0]}}, "was changed by hand"),
        ({"highest": {"anchor_shift": [math.nan]}}, "was changed by hand"),
        ({"references": {"anchor_shift": {"all": [30, math.inf, 1.0]}}}, "was changed by hand"),
        ({"receivers": [1, 2]}, "is not a profile"),
        ({"surprise": 1}, "is not a profile"),
    ],
)
def test_a_file_that_is_no_profile_is_one_line(content: str | dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile({"anchor_shift": [1.0, 3.0]}, 4).write(path)
    whole = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(ProfileError, match=message):
        Profile.read(path)
    with pytest.raises(ProfileError, match="cannot read the profile"):
        Profile.read(tmp_path / "absent")


def test_a_profile_is_not_told_of_a_divergence_that_was_never_measured() -> None:
    panel = Panel()
    shown = []
    for index in range(PROMPT, PROMPT + 12):
        panel.update(observation(index, {6: 0.4, index: 0.1}))
        if panel.verdicts[Kind.ANCHOR_SHIFT] is not Verdict.INSUFFICIENT:
            shown.append(Kind.ANCHOR_SHIFT in panel.values)
    assert shown[0] is False, "the first has nothing to diverge from"
    assert all(shown[1:])
