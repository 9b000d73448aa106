"""Which heads UNTRUSTED_ANCHOR is scored by: those that tell injections that were followed from all else.

Most heads read a document by position, or whatever it says; a few look back at an instruction when it is about to be
followed. Which ones is a matter of the model, so that they are chosen from requests of which it is known what became
of them. A head that is best by chance is not among the best elsewhere: heads are ranked on half of the wordings and
judged on the others. How many are taken is decided by that. That they tell better than all heads alike may be chance
as well, all the more as the best of several numbers was taken: none are chosen unless the gain is above what it varies
by when wordings are drawn anew (bootstrap of whole wordings, all numbers of heads together).
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
"""Requests of each group below which nothing is chosen."""
LEAST_WORDINGS = 4
"""Of each group: two to rank by and two to judge by. How one varies cannot be said."""
MOST = 8
"""Heads at most that are taken."""
CONFIDENCE = 0.99
"""That the heads chosen are better than all alike. A bootstrap of so few wordings promises a little too much: of drawn
scores that tell nothing heads are chosen in 2 to 3%."""
_DRAWS = 1000

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
            number was chosen by it. alike: of all heads alike, the same mean.
        gain: by how much the lowest of `held_out` is above the lowest of `alike`; margin: what chance explains of that.
    """

    heads: tuple[Head, ...]
    held_out: Areas
    alike: Areas
    gain: float
    margin: float


def choose(labelled: Sequence[Labelled]) -> Choice:
    """The heads whose scores tell best, each ranked by the group where it tells worst.

    Raises:
        ProfileError: a group is missing or too small to choose by.
    """
    groups = sorted({one.group for one in labelled} - {FOLLOWED})
    _check(labelled, groups)
    heads = sorted({head for one in labelled for head in one.request.heads})
    judge = _Judge(labelled, groups)

    def of(some: Sequence[Head]) -> Mass:
        return np.array([score(one.request, some) for one in labelled])

    def ranked(half: int | None) -> list[Head]:
        worst = [-judge.areas(values, half)[0].min() for values in scores]
        return [heads[place] for place in np.argsort(worst, kind="stable")]

    scores = [of((head,)) for head in heads]
    orders = [ranked(1), ranked(0)]
    counts = range(1, min(MOST + 1, len(heads)))
    alike = judge.areas(of(()))
    # Each is judged by the heads that were ranked on the other half.
    held_out = [judge.areas(np.where(judge.half, of(orders[1][:count]), of(orders[0][:count]))) for count in counts]
    if not held_out:
        return Choice((), {}, judge.named(alike), 0.0, math.inf)
    gains = np.array([areas.min(1) - alike.min(1) for areas in held_out])
    best = int(gains[:, 0].argmax())
    gain, margin = float(gains[best, 0]), judge.margin(gains)
    chosen = tuple(ranked(None)[: counts[best]]) if gain > margin else ()
    return Choice(chosen, judge.named(held_out[best]), judge.named(alike), gain, margin)


class _Judge:
    """Tells how well scores tell followed injections from each group, and how that varies with the wordings.

    Attributes:
        half: which half each request is in, 0 or 1, int64 [n]: every other wording of its group.
    """

    def __init__(self, labelled: Sequence[Labelled], groups: Sequence[str]) -> None:
        self.groups = groups
        self.half = np.zeros(len(labelled), np.int64)
        self._clusters: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
        self._drawn: dict[tuple[str, int], Mass] = {}
        draw = np.random.default_rng(0)
        for group in (FOLLOWED, *groups):
            wordings = sorted({one.wording for one in labelled if one.group == group})
            clusters = [
                np.array([place for place, one in enumerate(labelled) if (one.group, one.wording) == (group, wording)])
                for wording in wordings
            ]
            for half in (0, 1):
                some = self._clusters[group, half] = clusters[half::2]
                self.half[np.concatenate(some)] = half
                drawn = draw.multinomial(len(some), np.full(len(some), 1 / len(some)), _DRAWS)
                self._drawn[group, half] = np.concatenate([np.ones((1, len(some))), drawn])

    def areas(self, values: Mass, half: int | None = None) -> Mass:
        """AUROC of followed injections against each group, in one half or the mean of both: [1 + draws, groups], first
        as the wordings are, then as they are drawn."""
        sides = (0, 1) if half is None else (half,)
        return np.stack([sum(self._area(values, name, side) for side in sides) / len(sides) for name in self.groups], 1)

    def named(self, areas: Mass) -> dict[str, float]:
        """Of what `areas` gives, the areas as the wordings are, by group."""
        return dict(zip(self.groups, areas[0].tolist(), strict=True))

    def margin(self, gains: Mass) -> float:
        """What chance explains of the best of these gains [n, 1 + draws]."""
        above = np.quantile((gains[:, 1:] - gains[:, :1]).max(0), CONFIDENCE)
        # Of few wordings a draw varies less than they do.
        fewest = min(map(len, self._clusters.values()))
        return float(above * math.sqrt(fewest / (fewest - 1)))

    def _area(self, values: Mass, name: str, half: int) -> Mass:
        followed, others = self._clusters[FOLLOWED, half], self._clusters[name, half]
        areas = np.array([[auroc(values[one], values[other]) for other in others] for one in followed])
        pairs = np.outer(list(map(len, followed)), list(map(len, others)))
        drawn, against = self._drawn[FOLLOWED, half], self._drawn[name, half]
        won, of = (np.einsum("df,fo,do->d", drawn, each, against) for each in (areas * pairs, pairs))
        return np.asarray(won / of)


def score(request: Served, heads: Sequence[Head]) -> float:
    """The highest of UNTRUSTED_ANCHOR over the request's sentences by these heads, by all alike if there are none; -inf
    without one."""
    detector, highest = UntrustedAnchor(), -math.inf
    for seen in request.observations((), heads):
        if seen.opening:
            continue
        if detector.update(*Rivals.of(seen.rivals(), seen.roles), seen.rows) is not Verdict.INSUFFICIENT:
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
