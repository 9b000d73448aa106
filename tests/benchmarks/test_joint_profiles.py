"""Each problem's profile is made of the others alone, and so is what its threshold is of."""

import numpy as np

from benchmarks.joint_profiles import Example, without_each
from stream_monitor.anchors.calibration import calibrated
from stream_monitor.anchors.panel import PROBED_SHIFT
from stream_monitor.anchors.shift_fitting import Choice, Labelled, fit, moves_of
from tests.anchors.test_shift_probe import JOINT, served

PROBLEMS, EACH = 5, 8


def examples(tells: bool = True) -> list[Example]:
    return [
        Example(
            place % PROBLEMS,
            served(3 * place, None),
            [(served(3 * place + more, JOINT, tells), JOINT) for more in (1, 2)],
        )
        for place in range(PROBLEMS * EACH)
    ]


def test_thresholds_are_of_problems_that_a_probe_has_not_seen() -> None:
    some = examples()
    profiles = without_each(some, "m", "c")
    assert list(profiles) == list(range(PROBLEMS))
    profile, choice = profiles[2]
    assert isinstance(choice, Choice)
    others = [one for one in some if one.problem != 2]
    assert profile.shift_probe == choice.probe is not None
    assert profile.requests == len(others) == len(profile.highest[PROBED_SHIFT])
    assert len(choice.scores) == 3 * len(others)
    labelled = {
        problem: [
            Labelled(request, "", joint)
            for one in others
            if one.problem == problem
            for request, joint in [(one.untouched, None), *one.joined]
        ]
        for problem in (0, 1, 3, 4)
    }
    of_others = fit(moves_of([one for problem, ones in labelled.items() if problem != 4 for one in ones]))
    untouched = [one.highest(of_others) for one in moves_of(labelled[4]) if one.first is None]
    assert all(np.isclose(profile.highest[PROBED_SHIFT], score).any() for score in untouched)
    assert profile.highest[PROBED_SHIFT] == tuple(sorted(profile.highest[PROBED_SHIFT]))


def test_without_a_probe_the_profile_is_the_ordinary_one() -> None:
    some = examples(tells=False)
    profile, choice = without_each(some, "m", "c")[0]
    assert isinstance(choice, Choice)
    assert choice.probe is None
    assert profile == calibrated("m", "c", 0, [one.untouched for one in some if one.problem])
    assert PROBED_SHIFT not in profile.highest


def test_problems_too_few_for_a_probe_still_make_profiles() -> None:
    some = [one for one in examples() if one.problem < 3]
    for problem, (profile, choice) in without_each(some, "m", "c").items():
        assert profile.requests == sum(one.problem != problem for one in some)
        assert profile.shift_probe is None
        assert "of 2 subjects; to fit a probe takes" in str(choice)
