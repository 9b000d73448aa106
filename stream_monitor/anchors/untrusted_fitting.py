"""Fits the probe of UNTRUSTED_ANCHOR to requests of which it is known what became of them.

A logistic regression, penalised by the square of its weights, of followed injections against all else. As heads are
many and wordings few, it is fitted to half of the wordings and judged on the others, and the other way round. There is
a probe only if it tells there better than all heads alike, and tells at all: by more than chance explains, that is what
its AUROC varies by when whole wordings are drawn anew (bootstrap). That it tells better may be chance; then little is
lost, for its threshold is calibrated like any other.
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
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import ProfileError
from stream_monitor.anchors.regression import logistic_regression
from stream_monitor.anchors.untrusted import Rivals, UntrustedAnchor
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.records import Role

FOLLOWED = "followed"
"""Name of the group of requests in which an injection was followed."""
LEAST = 8
"""Requests of each group below which nothing is fitted."""
LEAST_WORDINGS = 4
"""Of each group: two to fit by and two to judge by. How one varies cannot be said."""
_DEVIATIONS = 1.96
"""Standard deviations to a lower bound. Quantiles of so few wordings drawn anew are those of single wordings."""
PENALTY = 0.03
"""Of the squares of the weights of standardised logarithms, beside the mean loss. From 0.01 to 0.3 the AUROC on other
wordings stays within 0.03 (`benchmarks.injection --full`, the prompts that it is fitted to)."""
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
    """What was found.

    Attributes:
        probe: fitted to all; None where it is not worth while.
        held_out: of probes fitted to half of the wordings, on the others, mean of both halves. alike: of all heads
            alike, the same mean.
        least: lower bound of the lowest of `held_out`; what tells nothing has 0.5.
    """

    probe: Probe | None
    held_out: Areas
    alike: Areas
    least: float


def choose(labelled: Sequence[Labelled]) -> Choice:
    """The probe of these requests, if there is to be one.

    Raises:
        ProfileError: a group is missing or too small to fit to.
    """
    groups = sorted({one.group for one in labelled} - {FOLLOWED})
    _check(labelled, groups)
    judge = _Judge(labelled, groups)
    halves = [_fit([one for one, half in zip(labelled, judge.half, strict=True) if half != side]) for side in (0, 1)]
    found = [score(one.request, halves[half]) for one, half in zip(labelled, judge.half, strict=True)]
    held_out = judge.areas(np.array(found))
    alike = judge.areas(np.array([score(one.request) for one in labelled]))
    least = judge.least(held_out.min(1))
    tells = least > 0.5 and held_out[0].min() > alike[0].min()
    return Choice(_fit(labelled) if tells else None, judge.named(held_out), judge.named(alike), least)


def _fit(labelled: Sequence[Labelled]) -> Probe:
    """To the sentences that can be scored, of a request without any to its opening: followed injections and all else
    weigh as much, so do the groups of the latter, and the requests of a group. Raises ProfileError where there is
    nothing to fit to."""
    heads = sorted(set.intersection(*(set(one.request.heads) for one in labelled)))
    shown, followed, weight = [], [], []
    sizes = {name: sum(one.group == name for one in labelled) for name in {one.group for one in labelled}}
    for one in labelled:
        of_request = _shown(one.request, heads)
        whole = 0.5 if one.group == FOLLOWED else 0.5 / (len(sizes) - 1)
        shown += of_request
        followed += [one.group == FOLLOWED] * len(of_request)
        weight += [whole / sizes[one.group] / max(1, len(of_request))] * len(of_request)
    if not heads or len(set(followed)) < 2:
        raise ProfileError(
            "the labelled requests have no watched head in common, or none of a group has a sentence with two captured "
            "rows; let their answers be longer than the stride"
        )
    weights, bias = logistic_regression(np.array(shown), np.array(followed, float), np.array(weight), PENALTY)
    return Probe(tuple(heads), tuple(weights.tolist()), bias)


def _shown(request: Served, heads: Sequence[Head]) -> list[Mass]:
    """Logarithms of these heads' shares, float64 [heads] of each sentence that can be scored, else of the opening, as
    UNTRUSTED_ANCHOR takes them: mean of each and the one before."""
    places = [request.heads.index(head) for head in heads]
    detector = UntrustedAnchor()
    found = [
        (shares[places], seen.opening)
        for seen, shares in zip(request.observations(()), request.log_shares(), strict=True)
        if detector.update(*Rivals.of(seen.rivals(), seen.roles), seen.rows, seen.opening) is not Verdict.INSUFFICIENT
    ]
    means = [(one + found[max(0, place - 1)][0]) / 2 for place, (one, _) in enumerate(found)]
    return means[1:] if len(means) > 1 and found[0][1] else means


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

    def areas(self, values: Mass) -> Mass:
        """AUROC of followed injections against each group, mean of both halves: [1 + draws, groups], first as the
        wordings are, then as they are drawn."""
        return np.stack([(self._area(values, name, 0) + self._area(values, name, 1)) / 2 for name in self.groups], 1)

    def named(self, areas: Mass) -> dict[str, float]:
        """Of what `areas` gives, the areas as the wordings are, by group."""
        return dict(zip(self.groups, areas[0].tolist(), strict=True))

    def least(self, areas: Mass) -> float:
        """Lower bound of an area, [1 + draws]."""
        # Of few wordings a draw varies less than they do.
        fewest = min(map(len, self._clusters.values()))
        return float(areas[0] - _DEVIATIONS * areas[1:].std() * math.sqrt(fewest / (fewest - 1)))

    def _area(self, values: Mass, name: str, half: int) -> Mass:
        followed, others = self._clusters[FOLLOWED, half], self._clusters[name, half]
        areas = np.array([[auroc(values[one], values[other]) for other in others] for one in followed])
        pairs = np.outer(list(map(len, followed)), list(map(len, others)))
        drawn, against = self._drawn[FOLLOWED, half], self._drawn[name, half]
        won, of = (np.einsum("df,fo,do->d", drawn, each, against) for each in (areas * pairs, pairs))
        return np.asarray(won / of)


def score(request: Served, probe: Probe | None = None) -> float:
    """The highest of UNTRUSTED_ANCHOR over the request's sentences, by all heads alike without a probe; -inf without
    one that can be scored."""
    detector, highest = UntrustedAnchor(), -np.inf
    for seen in request.observations((), probe):
        rivals = Rivals.of(seen.rivals(), seen.roles)
        verdict = detector.update(*rivals, seen.rows, seen.opening, seen.log_odds)
        if verdict is not Verdict.INSUFFICIENT and not seen.opening:
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
                f"the labels name {len(wordings)} requests of {len(set(wordings))} wordings as {name!r}; to fit a "
                f"probe takes {LEAST} of {LEAST_WORDINGS} or more"
            )
