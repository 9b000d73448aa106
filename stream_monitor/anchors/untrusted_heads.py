"""Which heads UNTRUSTED_ANCHOR is scored by: those that tell injections that were followed from all else.

Most heads read a document by position, or whatever it says; a few look back at an instruction when it is about to be
followed. Which ones is a matter of the model, so that they are chosen from requests of which it is known what became
of them. A head that is best by chance is not among the best elsewhere: heads are ranked on half of the wordings and
judged on the others. How many are taken, and whether any, is decided by that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.auroc import auroc
from stream_monitor.anchors.calibration import Served
from stream_monitor.anchors.heads import Head
from stream_monitor.anchors.matrix import Mass
from stream_monitor.anchors.profile import ProfileError
from stream_monitor.anchors.untrusted import Rivals, UntrustedAnchor
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.records import Role

FOLLOWED = "followed"
"""Name of the group of requests in which an injection was followed."""
LEAST = 8
"""Requests of each group, and LEAST_WORDINGS of wordings, below which nothing is chosen."""
LEAST_WORDINGS = 2
MOST = 8
"""Heads at most that are taken."""

Areas = Mapping[str, float]
"""Group to the AUROC of followed injections against it."""


@dataclass(frozen=True)
class Labelled:
    """A request with an untrusted stretch, of which it is known what became of it.

    Attributes:
        group: `FOLLOWED`, or what else it is: each other group is a case that must be told from that one.
        wording: of what stands in the stretch; requests that say the same have the same.
    """

    request: Served
    group: str
    wording: str


class Choice(NamedTuple):
    """The heads that were chosen.

    Attributes:
        heads: best first; empty where no few do better than all alike.
        held_out: of as many, on wordings that they were not ranked by, mean of both halves: a little too high, as their
            number was chosen by it. alike: of all heads alike, on all.
    """

    heads: tuple[Head, ...]
    held_out: Areas
    alike: Areas


def choose(labelled: Sequence[Labelled]) -> Choice:
    """The heads whose scores tell best, each ranked by the group where it tells worst.

    Raises:
        ProfileError: a group is missing or too small to choose by.
    """
    groups = sorted({one.group for one in labelled} - {FOLLOWED})
    _check(labelled, groups)
    heads = sorted({head for one in labelled for head in one.request.heads})
    group = np.array([one.group for one in labelled])
    half = _halves(labelled)
    everywhere = np.ones(len(labelled), bool)

    def areas(values: Mass, some: NDArray[np.bool_]) -> dict[str, float]:
        followed = values[some & (group == FOLLOWED)]
        return {name: auroc(followed, values[some & (group == name)]) for name in groups}

    def of(some: Sequence[Head]) -> Mass:
        return np.array([score(one.request, some) for one in labelled])

    def ranked(some: NDArray[np.bool_]) -> list[Head]:
        worst = [-min(areas(values, some).values()) for values in scores]
        return [heads[place] for place in np.argsort(worst, kind="stable")]

    scores = [of((head,)) for head in heads]
    halves = [(ranked(half == side), half != side) for side in (False, True)]
    held_out: dict[int, dict[str, float]] = {}
    for count in range(1, min(MOST + 1, len(heads))):
        one, other = (areas(of(order[:count]), rest) for order, rest in halves)
        held_out[count] = {name: (one[name] + other[name]) / 2 for name in groups}
    alike = areas(of(()), everywhere)
    count = max(held_out, key=lambda count: min(held_out[count].values()), default=0)
    if not count or min(held_out[count].values()) <= min(alike.values()):
        return Choice((), held_out.get(count, {}), alike)
    return Choice(tuple(ranked(everywhere)[:count]), held_out[count], alike)


def score(request: Served, heads: Sequence[Head]) -> float:
    """The request's highest of UNTRUSTED_ANCHOR by these heads, by all alike if there are none; -inf without one."""
    detector, highest = UntrustedAnchor(), -math.inf
    for seen in request.observations((), heads):
        shown = Rivals.of(seen.rivals(), seen.roles)
        if detector.update(*shown, seen.rows, seen.opening) is not Verdict.INSUFFICIENT:
            highest = max(highest, detector.score)
    return highest


def _check(labelled: Sequence[Labelled], groups: Sequence[str]) -> None:
    if not groups:
        raise ProfileError(f"the labels name no group beside {FOLLOWED!r} that it should be told from")
    if without := sum(Role.UNTRUSTED not in one.request.roles for one in labelled):
        raise ProfileError(f"{without} of the labelled requests have no untrusted stretch; label their documents so")
    for name in (FOLLOWED, *groups):
        wordings = [one.wording for one in labelled if one.group == name]
        if len(wordings) < LEAST or len(set(wordings)) < LEAST_WORDINGS:
            raise ProfileError(
                f"the labels name {len(wordings)} requests of {len(set(wordings))} wordings as {name!r}; to choose "
                f"heads takes {LEAST} of {LEAST_WORDINGS} or more"
            )


def _halves(labelled: Sequence[Labelled]) -> NDArray[np.bool_]:
    """Which half each is in, bool [n]: every other wording of its group."""
    wordings = sorted({(one.group, one.wording) for one in labelled})
    firsts = {group: place for place, (group, _) in reversed(list(enumerate(wordings)))}
    places = {pair: place for place, pair in enumerate(wordings)}
    return np.array([(places[one.group, one.wording] - firsts[one.group]) % 2 == 1 for one in labelled])
