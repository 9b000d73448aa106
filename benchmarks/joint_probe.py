"""A linear probe of joints: whether heads, each for itself, show what their mean does not.

Where reasoning goes on with another subject, some heads read older sentences less than before, and others their own or
the ones nearby: which ones is a matter of the model. So every head's shares of three distances are compared, four
sentences together with the eight before them, and a penalised logistic regression learns from joints what that says.
It is fitted to joints of other problems than it is judged on, and so is the score above which it counts as having found
one: that of other problems' untouched requests, by probes that did not see those either.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stream_monitor.anchors.calibration import Served
from stream_monitor.anchors.heads import Head, HeadShares
from stream_monitor.anchors.matrix import ANCHOR_GAP, Mass
from stream_monitor.anchors.profile import make_profile
from stream_monitor.anchors.regression import logistic_regression
from stream_monitor.anchors.untrusted_probe import LEAST_SHARE

BEFORE, TOGETHER = 8, 4
"""Captured sentences that are compared: so many before, with so many at a place and behind it."""
LEAST_PROBLEMS = 3
"""One to judge, one to fit to, and one to take the threshold from."""
PENALTY = 0.003
"""Of the squares of the weights. Chosen on the joints that figures are of; from 0.001 to 0.01 they hardly differ."""
_NAME = "joint"


@dataclass(frozen=True)
class Example:
    """A request, untouched and joined.

    Attributes:
        problem: that it is about. joint: the first sentence of the joined one that is about another.
    """

    problem: int
    untouched: Served
    joined: Served
    joint: int


class Found(NamedTuple):
    """Of one example.

    Attributes:
        hit: whether the joint was found, at one of the sentences `within` of it. false: whether one was found in the
            untouched request.
    """

    hit: bool
    false: bool


def judge(examples: Sequence[Example], rate: float, within: int) -> list[Found | None]:
    """What is found in each by a probe fitted to other problems; `rate` of untouched requests may raise an alarm.

    None for what is too short to be compared, and for all if what is long enough is of less than `LEAST_PROBLEMS`.
    """
    heads = sorted(set.intersection(*(set(one.untouched.heads) & set(one.joined.heads) for one in examples)))
    seen = [_Moves(one.problem, moves(one.untouched, heads), moves(one.joined, heads), one.joint) for one in examples]
    whole = [one for one in seen if one.untouched and one.joint + TOGETHER - 1 in one.joined]
    problems = {one.problem for one in whole}
    if len(problems) < LEAST_PROBLEMS:
        return [None for _ in examples]
    detectors = {problem: _detector([one for one in whole if one.problem != problem], rate) for problem in problems}
    return [detectors[one.problem].found(one, within) if one in whole else None for one in seen]


@dataclass(frozen=True, eq=False)
class _Moves:
    """What moved in an example's two requests, by the last sentence."""

    problem: int
    untouched: dict[int, Mass]
    joined: dict[int, Mass]
    joint: int


class _Probe(NamedTuple):
    weights: Mass
    bias: float

    def highest(self, places: Iterable[Mass]) -> float:
        return max((float(self.weights @ move + self.bias) for move in places), default=-np.inf)


class _Detector(NamedTuple):
    probe: _Probe
    threshold: float

    def found(self, one: _Moves, within: int) -> Found:
        behind = [move for last, move in one.joined.items() if 0 <= last - one.joint <= within]
        return Found(
            self.probe.highest(behind) > self.threshold, self.probe.highest(one.untouched.values()) > self.threshold
        )


def _detector(examples: Sequence[_Moves], rate: float) -> _Detector:
    highest = []
    for problem in sorted({one.problem for one in examples}):
        probe = _fit([one for one in examples if one.problem != problem])
        highest += [probe.highest(one.untouched.values()) for one in examples if one.problem == problem]
    calm = make_profile("", "", 0, {_NAME: highest}, len(highest))
    return _Detector(_fit(examples), calm.threshold(_NAME, rate))


def _fit(examples: Sequence[_Moves]) -> _Probe:
    """To the sentences from the joint on, against all places of the untouched."""
    joints = [one.joined[one.joint + TOGETHER - 1] for one in examples]
    others = [move for one in examples for move in one.untouched.values()]
    true = np.repeat([1.0, 0.0], [len(joints), len(others)])
    weight = np.repeat([0.5 / len(joints), 0.5 / len(others)], [len(joints), len(others)])
    return _Probe(*logistic_regression(np.array(joints + others), true, weight, PENALTY))


def moves(request: Served, heads: Sequence[Head]) -> dict[int, Mass]:
    """How much the readings of `TOGETHER` sentences differ from those of the `BEFORE` before them, float64 [3 * heads],
    by the number of the last."""
    places = [request.heads.index(head) for head in heads]
    sentences = [index for index, _ in request.shares]
    log = np.array([np.log(reading(*one, len(request.heads))[:, places] + LEAST_SHARE) for one in request.shares])
    return {
        sentences[first + TOGETHER - 1]: (
            log[first : first + TOGETHER].mean(0) - log[first - BEFORE : first].mean(0)
        ).ravel()
        for first in range(BEFORE, len(sentences) - TOGETHER + 1)
    }


def reading(index: int, shares: HeadShares, heads: int) -> Mass:
    """What each head of a sentence reads, float64 [3, heads]: of sentences that may be its anchors, of nearer ones, and
    of itself."""
    distance = np.where(shares.columns == index, 2, np.where(shares.columns > index - ANCHOR_GAP, 1, 0))
    mass = np.bincount(distance * heads + shares.heads, shares.shares, 3 * heads)
    return mass.astype(float, copy=False).reshape(3, heads)
