"""The head that UNTRUSTED_ANCHOR is scored by: how it is chosen, and that the detector is shown what it reads."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from stream_monitor.anchors.calibration import Served, calibrated
from stream_monitor.anchors.heads import weights_of
from stream_monitor.anchors.panel import Kind, Panel
from stream_monitor.anchors.profile import ProfileError
from stream_monitor.anchors.untrusted_heads import FOLLOWED, Labelled, choose, score
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
    return Served(HEADS, roles, 12 * np.arange(6), np.full(6, 4), [(index, shares) for index in range(3, 6)], None)


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


def test_the_head_that_tells_in_every_group_is_chosen() -> None:
    found = choose(labelled(telling))
    assert found.heads == (HEADS[2],)
    assert found.held_out == {"ignored": 1.0, "question": 1.0}
    assert set(found.alike) == set(found.held_out)
    assert found.gain > found.margin


def test_heads_that_tell_better_by_chance_are_not_chosen() -> None:
    """Labels that mean nothing: the best of several numbers of heads seems to gain in most draws."""
    found = [choose(labelled(lambda place, group, wording: 0.2, seed=seed)) for seed in range(40)]
    assert sum(choice.gain > 0 for choice in found) >= 20
    assert sum(bool(choice.heads) for choice in found) <= 2


def test_a_head_that_tells_among_noise_is_found() -> None:
    """What each reads varies by more than it tells, and head 0 tells the contrary."""

    def noisy(place: int, group: str, wording: str) -> float:
        return 0.23 if place == (2 if group == FOLLOWED else 0) else 0.2

    found = [choose(labelled(noisy, seed=seed)) for seed in range(20)]
    assert sum(HEADS[2] in choice.heads for choice in found) >= 18
    assert np.mean([min(choice.held_out.values()) for choice in found]) < 1


def test_none_is_chosen_where_all_heads_tell_as_well() -> None:
    found = choose(labelled(lambda place, group, wording: 0.3 if group == FOLLOWED else 0.1))
    assert (found.heads, found.held_out, found.alike) == ((), found.alike, {"ignored": 1.0, "question": 1.0})


def test_a_head_that_knows_some_wordings_alone_is_not_chosen() -> None:
    """Heads 0 and 1 tell two of the wordings each, and take the others for the contrary."""

    def by_wording(place: int, group: str, wording: str) -> float:
        if place > 1:
            return 0.2
        return 0.3 if (group == FOLLOWED) == ((WORDINGS.index(wording) % 2 == 0) == (place == 0)) else 0.1

    found = choose(labelled(by_wording))
    assert found.heads == ()
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


def test_weights_of_heads_that_are_not_all_there_are_nothing() -> None:
    assert weights_of(HEADS, [(5, 0), (3, 1)]).tolist() == [0, 0.5, 0.5, 0]
    assert weights_of(HEADS, [(5, 0), (9, 9)]).tolist() == [0, 0, 0, 0]


def test_the_detector_is_shown_what_the_profiles_head_reads() -> None:
    """The others of the panel go on with all heads; without the head, there is nothing to say."""
    calm = [served(telling, "ignored", "a", seed) for seed in range(99)]
    profile = calibrated("m", "c", 1, calm, untrusted_heads=(HEADS[2],))
    assert profile.highest["untrusted_anchor"] == tuple(sorted(score(one, [HEADS[2]]) for one in calm))
    request = served(telling, FOLLOWED, "b", 1000)
    panel = Panel(profile, 0.1)
    alarms = [alarm for seen in request.observations((), profile.untrusted_heads) for alarm in panel.update(seen)]
    assert [alarm.kind for alarm in alarms] == [Kind.UNTRUSTED_ANCHOR]
    assert alarms[0].score == pytest.approx(score(request, [HEADS[2]]))
    assert alarms[0].score > score(request, ()) + 0.5
    elsewhere = Panel(profile, 0.1)
    for seen in replace(request, heads=[(8, head) for head in range(4)]).observations((), profile.untrusted_heads):
        assert elsewhere.update(seen) == []
    assert elsewhere.highest[Kind.UNTRUSTED_ANCHOR].sentence == -1
