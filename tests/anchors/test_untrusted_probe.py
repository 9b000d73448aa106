"""The probe that UNTRUSTED_ANCHOR is scored by: how it is fitted, and that the detector asks it."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from stream_monitor.anchors.calibration import Served, calibrated
from stream_monitor.anchors.panel import Kind, Panel
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import ProfileError
from stream_monitor.anchors.untrusted import UntrustedAnchor
from stream_monitor.anchors.untrusted_fitting import FOLLOWED, Labelled, choose, score
from stream_monitor.anchors.untrusted_probe import log_shares
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.records import Role
from tests.anchors.shares import head_shares

HEADS = [(3, 0), (3, 1), (5, 0), (5, 1)]
SYSTEM, DOCUMENT, USER = 0, 1, 2
"""Sentences of a prompt; the output has three more."""
GROUPS = (FOLLOWED, "ignored", "question")
WORDINGS = ("a", "b", "c", "d")

Reads = Callable[[int, str, str], float]
"""Share that a head reads on the document: by the head's place, the request's group and its wording."""


def served(reads: Reads, group: str, wording: str, seed: int) -> Served:
    """Each head reads the document as much as that, with some noise, and the user's sentence for the rest of 0.4."""
    noise = np.random.default_rng(seed).uniform(-0.02, 0.02, len(HEADS))
    on = np.array([reads(place, group, wording) for place in range(len(HEADS))]) + noise
    places = np.arange(len(HEADS))
    shares = head_shares(
        np.concatenate([places, places]),
        np.repeat([DOCUMENT, USER], len(HEADS)),
        np.concatenate([on, 0.4 - on]),
    )
    roles = np.array([Role.SYSTEM, Role.UNTRUSTED, Role.USER] + [Role.ANSWER] * 3, np.uint8)
    return Served(3, HEADS, roles, 12 * np.arange(6), np.full(6, 4), [(index, shares) for index in range(3, 6)], None)


def labelled(reads: Reads, count: int = 4, seed: int = 0) -> list[Labelled]:
    """So many of each group and wording."""
    each = product(GROUPS, WORDINGS, range(count))
    return [
        Labelled(served(reads, group, wording, 1000 * seed + place), group, f"{group} {wording}")
        for place, (group, wording, _) in enumerate(each)
    ]


def telling(place: int, group: str, wording: str) -> float:
    """Head 2 reads what is followed; heads 0 and 1 what is ignored as much more, so that all alike tell nothing."""
    if place == 2:
        return 0.3 if group == FOLLOWED else 0.1
    return 0.3 if place < 2 and group != FOLLOWED else 0.2


def test_the_head_that_tells_in_every_group_weighs_most() -> None:
    found = choose(labelled(telling))
    assert found.probe is not None
    assert found.probe.heads == tuple(HEADS)
    assert np.argmax(found.probe.weights) == 2
    assert found.held_out == {"ignored": 1.0, "question": 1.0}
    assert min(found.alike.values()) < 0.9
    assert found.least > 0.9


def test_labels_that_mean_nothing_make_no_probe() -> None:
    found = [choose(labelled(lambda place, group, wording: 0.2, seed=seed)) for seed in range(40)]
    better = [min(choice.held_out.values()) > min(choice.alike.values()) for choice in found]
    assert sum(better) >= 10, "by chance it seems to tell better"
    assert sum(choice.probe is not None for choice in found) <= 2


def test_a_head_that_tells_among_noise_is_found_and_one_that_tells_the_contrary_too() -> None:
    """What each reads varies by more than it tells."""

    def noisy(place: int, group: str, wording: str) -> float:
        return 0.23 if place == (2 if group == FOLLOWED else 0) else 0.2

    found = [choose(labelled(noisy, seed=seed)) for seed in range(20)]
    probes = [choice.probe for choice in found if choice.probe]
    assert len(probes) >= 18
    assert all(np.argmax(probe.weights) == 2 and np.argmin(probe.weights) == 0 for probe in probes)
    assert np.mean([min(choice.held_out.values()) for choice in found]) < 1


def test_there_is_no_probe_where_all_heads_tell_as_well() -> None:
    found = choose(labelled(lambda place, group, wording: 0.3 if group == FOLLOWED else 0.1))
    assert (found.probe, found.held_out, found.alike) == (None, found.alike, {"ignored": 1.0, "question": 1.0})


def test_heads_that_know_some_wordings_alone_make_no_probe() -> None:
    """Heads 0 and 1 tell two of the wordings each, and take the others for the contrary."""

    def by_wording(place: int, group: str, wording: str) -> float:
        if place > 1:
            return 0.2
        return 0.3 if (group == FOLLOWED) == ((WORDINGS.index(wording) % 2 == 0) == (place == 0)) else 0.1

    found = choose(labelled(by_wording))
    assert found.probe is None
    assert max(found.held_out.values()) < 0.1


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda one: one.group == FOLLOWED, "no group beside 'followed'"),
        (lambda one: one.group != FOLLOWED, "0 requests of 0 wordings as 'followed'"),
        (lambda one: one.group != "ignored" or one.wording.endswith("a"), "4 requests of 1 wordings as 'ignored'"),
    ],
)
def test_too_few_labels_are_refused(keep: Callable[[Labelled], bool], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        choose(list(filter(keep, labelled(telling))))


def test_labelled_requests_must_have_an_untrusted_stretch() -> None:
    one, *others = labelled(telling)
    roles = np.where(one.request.roles == Role.UNTRUSTED, Role.USER, one.request.roles)
    with pytest.raises(ProfileError, match="1 of the labelled requests have no untrusted stretch"):
        choose([replace(one, request=replace(one.request, roles=roles)), *others])


def test_requests_that_cannot_be_scored_are_refused() -> None:
    few = [replace(one, request=replace(one.request, rows=np.ones(6, np.int64))) for one in labelled(telling)]
    with pytest.raises(ProfileError, match="none of a group has a sentence with two captured rows"):
        choose(few)


PROBE = Probe((HEADS[2], HEADS[0]), (2.0, -1.0), 0.5)


def test_weights_of_heads_that_are_not_all_there_are_nan() -> None:
    assert PROBE.weights_of(HEADS).tolist() == [-1, 0, 2, 0]
    assert np.isnan(PROBE.weights_of(HEADS[:2])).all()


def test_a_probe_is_shown_the_untrusted_sentence_that_each_head_reads_most() -> None:
    roles = np.array([Role.SYSTEM, Role.UNTRUSTED, Role.USER, Role.UNTRUSTED, Role.ANSWER], np.uint8)
    shares = head_shares(np.array([0, 0, 0, 1]), np.array([1, 2, 3, 0]), np.array([0.1, 0.9, 0.3, 0.5]))
    np.testing.assert_allclose(np.exp(log_shares(shares, roles, 2)), [0.301, 0.001], rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_shares(shares, roles, 2, but=3)), [0.101, 0.001], rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_shares(shares, np.zeros_like(roles), 2)), [0.001, 0.001], rtol=1e-6)


def test_a_score_is_the_mean_of_two_and_nan_is_none() -> None:
    detector = UntrustedAnchor(threshold=1.0)

    def update(log_odds: float, opening: bool = False) -> tuple[Verdict, float]:
        return detector.update(0.1, 0.2, 0.5, 4, opening, log_odds), detector.score

    assert update(0.5, opening=True) == (Verdict.ALARM, 0.5), "the opening has a threshold of its own, 0"
    assert update(1.0) == (Verdict.STEADY, 0.75)
    assert update(math.nan) == (Verdict.INSUFFICIENT, 0.75)
    assert update(2.0) == (Verdict.ALARM, 1.5)


def test_the_detector_is_scored_by_the_profiles_probe() -> None:
    """The others of the panel go on with all heads; without a head of the probe, there is nothing to say."""
    calm = [served(telling, "ignored", "a", seed) for seed in range(99)]
    profile = calibrated("m", "c", 1, calm, probe=PROBE)
    assert profile.highest["untrusted_anchor"] == tuple(sorted(score(one, PROBE) for one in calm))
    request = served(telling, FOLLOWED, "b", 1000)
    panel = Panel(profile, 0.1)
    (alarm,) = [alarm for seen in request.observations((), PROBE) for alarm in panel.update(seen)]
    assert alarm.kind is Kind.UNTRUSTED_ANCHOR
    assert [one.sentence for one in alarm.now] == [DOCUMENT]
    read = np.log(request.shares[0][1].on(np.array([DOCUMENT]), len(HEADS))[:, 0] + 1e-3)
    assert alarm.score == pytest.approx(2 * read[2] - read[0] + 0.5)
    elsewhere = Panel(profile, 0.1)
    for seen in replace(request, heads=[(8, head) for head in range(4)]).observations((), PROBE):
        assert elsewhere.update(seen) == []
    assert elsewhere.highest[Kind.UNTRUSTED_ANCHOR].sentence == -1
