"""For each problem a profile of all others, with a probe fitted to their joints.

As `stream-monitor calibrate --joints` makes it, but for one thing: requests are few, so the untouched ones that the
probe is fitted to also give its threshold, each by the score of a probe that has not seen its problem.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from stream_monitor.anchors.calibration import Served, calibrated
from stream_monitor.anchors.panel import PROBED_SHIFT
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.anchors.shift_fitting import Choice, Labelled, choose


@dataclass(frozen=True)
class Example:
    """A request, untouched and joined.

    Attributes:
        problem: that it is about.
        joined: with reasoning about others, and the number of the first sentence of that, each.
    """

    problem: int
    untouched: Served
    joined: Sequence[tuple[Served, int]]


class Made(NamedTuple):
    """A profile, and what was found for its probe: a choice, or why there is nothing to choose from."""

    profile: Profile
    choice: Choice | ProfileError


def without_each(examples: Sequence[Example], model_name: str, capture: str) -> Mapping[int, Made]:
    """By problem, the profile of all examples but its own."""
    return {
        problem: _of([one for one in examples if one.problem != problem], model_name, capture)
        for problem in sorted({one.problem for one in examples})
    }


def _of(examples: Sequence[Example], model_name: str, capture: str) -> Made:
    profile = calibrated(model_name, capture, 0, [one.untouched for one in examples])
    labelled = [
        Labelled(request, str(one.problem), joint)
        for one in examples
        for request, joint in [(one.untouched, None), *one.joined]
    ]
    try:
        choice = choose(labelled)
    except ProfileError as error:
        return Made(profile, error)
    if choice.probe is None:
        return Made(profile, choice)
    scores = [score for one, score in zip(labelled, choice.scores.tolist(), strict=True) if one.joint is None]
    highest = dict(profile.highest) | {PROBED_SHIFT: tuple(sorted(score for score in scores if score > -math.inf))}
    return Made(replace(profile, shift_probe=choice.probe, highest=highest), choice)
