"""Fits the probe of ANCHOR_SHIFT to requests of which it is known where they go on with another subject.

A logistic regression, penalised by the square of its weights, of the four sentences from there on against any four of
requests that stay with theirs, each less the twelve before. As heads are many and subjects few, it is fitted to most of
the subjects and judged on the others, until each was judged. There is a probe only if it tells there by more than
chance explains: what its AUROC varies by when whole subjects are drawn anew (bootstrap).
"""

from collections.abc import Sequence
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
from stream_monitor.anchors.shift_probe import BEFORE, DISTANCES, TOGETHER, moves

LEAST = 8
"""Requests that stay with their subject, and that do not, below which nothing is fitted."""
LEAST_SUBJECTS = 4
"""How a probe does on subjects that it has not seen cannot be said of fewer."""
WITHIN = TOGETHER - 1
"""Sentences behind the first one about another subject at which the probe is to tell."""
PENALTY = 0.003
"""Of the squares of the weights of standardised numbers, beside the mean loss. From 0.001 to 0.01 joints found hardly
differ (by hand, of those that `benchmarks.shift_spliced` finds)."""
_FOLDS = 7
"""Parts of the subjects, each judged by a probe fitted to the others."""
_DEVIATIONS, _DRAWS = 1.96, 1000
"""Standard deviations to a lower bound, and how often subjects are drawn anew for one."""


@dataclass(frozen=True)
class Labelled:
    """A request of which it is known whether it stays with its subject.

    Attributes:
        subject: that it begins with.
        joint: number of the first sentence that is about another; None if none is.
    """

    request: Served
    subject: str
    joint: int | None


class Choice(NamedTuple):
    """What was found.

    Attributes:
        probe: fitted to all; None where it is not worth while.
        area: AUROC of the highest score at a joint, or at one of the `WITHIN` sentences behind it, against the highest
            of requests without one, on subjects that the probe has not seen.
        least: its lower bound; what tells nothing has 0.5 or less, as requests without a joint are scored at more
            sentences.
        found: share of the joints that score above nine of ten requests without one.
        scores: float64 [n], of each request, by a probe that has not seen its subject; -inf where it is too short.
    """

    probe: Probe | None
    area: float
    least: float
    found: float
    scores: Mass


def choose(labelled: Sequence[Labelled]) -> Choice:
    """The probe of these requests, if there is to be one.

    Raises:
        ProfileError: they are too few, of too few subjects, too short, or have no watched head in common.
    """
    found = moves_of(labelled)
    _check(found)
    subjects = sorted({one.subject for one in found})
    scores = np.full(len(found), -np.inf)
    for fold in range(min(_FOLDS, len(subjects))):
        judged = set(subjects[fold::_FOLDS])
        probe = fit([one for one in found if one.subject not in judged])
        for place, one in enumerate(found):
            if one.subject in judged:
                scores[place] = one.highest(probe)
    # What is too short says nothing, for a probe or against it.
    long = [place for place, one in enumerate(found) if len(one.judged())]
    joined = np.array([found[place].behind is not None for place in long])
    area, least = _area(scores[long], joined, [found[place].subject for place in long])
    above = scores[long][joined] > np.quantile(scores[long][~joined], 0.9, method="higher")
    return Choice(fit(found) if least > 0.5 else None, area, least, float(above.mean()), scores)


@dataclass(frozen=True, eq=False)
class Moves:
    """How much the readings of a request's sentences differ from those before them.

    Attributes:
        heads: that all of the requests have.
        subject: that it begins with.
        at: float64 [n, DISTANCES * heads], see `shift_probe.moves`.
        first: int64 [1 or 0], which of them is of the first `TOGETHER` sentences from the joint on; None without one.
        behind: int64 [n], how many sentences behind the joint each is; None without one.
    """

    heads: Sequence[Head]
    subject: str
    at: Mass
    first: NDArray[np.int64] | None
    behind: NDArray[np.int64] | None

    def telling(self) -> Mass:
        """Those that a probe is fitted to: that of the joint, else all."""
        return self.at if self.first is None else self.at[self.first]

    def judged(self) -> Mass:
        """Those where a finding would be right, else all."""
        return self.at if self.behind is None else self.at[(self.behind >= 0) & (self.behind <= WITHIN)]

    def highest(self, probe: Probe) -> float:
        """Log odds, the highest of the judged; -inf without any."""
        return float((self.judged() @ np.array(probe.weights) + probe.bias).max(initial=-np.inf))


def moves_of(labelled: Sequence[Labelled]) -> list[Moves]:
    """Of each request, by the heads that all of them have."""
    heads = sorted(set.intersection(*(set(one.request.heads) for one in labelled)))
    return [_moves(one, heads) for one in labelled]


def _moves(one: Labelled, heads: Sequence[Head]) -> Moves:
    places = [one.request.heads.index(head) for head in heads]
    found = one.request.log_readings()
    numbers = np.array([index for index, _ in found], np.int64)
    log = np.array([reading for _, reading in found]).reshape(len(found), DISTANCES, len(one.request.heads))
    at = moves(log[:, :, places].reshape(len(found), -1), one.request.rows[numbers])
    if one.joint is None:
        return Moves(heads, one.subject, at, None, None)
    # To learn from, sentences that were captured alone count, as the detector sees no others.
    last = np.arange(len(found) - len(at), len(found))
    first = np.searchsorted(numbers, one.joint) + TOGETHER - 1
    return Moves(heads, one.subject, at, np.flatnonzero(last == first), numbers[last] - one.joint)


def fit(seen: Sequence[Moves]) -> Probe:
    """To all of these, joints and all else weighing as much. Raises ProfileError where there is nothing to fit to."""
    shown = [one.telling() for one in seen]
    joined = np.repeat([one.first is not None for one in seen], list(map(len, shown)))
    heads = seen[0].heads
    if not heads or len(set(joined.tolist())) < 2:
        raise ProfileError(
            "the labelled requests have no watched head in common, or those of one kind are all of the same few "
            "subjects"
        )
    weight = np.where(joined, 0.5 / joined.sum(), 0.5 / (~joined).sum())
    weights, bias = logistic_regression(np.concatenate(shown), joined.astype(float), weight, PENALTY)
    return Probe(tuple(heads), tuple(weights.tolist()), bias)


def _area(scores: Mass, joined: NDArray[np.bool_], subjects: Sequence[str]) -> tuple[float, float]:
    """AUROC, and its lower bound by drawing subjects anew."""
    of = np.array(subjects)
    names = sorted(set(subjects))
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        places = np.concatenate([np.flatnonzero(of == name) for name in draw.choice(names, len(names))])
        there = joined[places]
        if there.any() and not there.all():
            drawn.append(auroc(scores[places][there], scores[places][~there]))
    area = auroc(scores[joined], scores[~joined])
    # Of few subjects a draw varies less than they do.
    spread = float(np.std(drawn)) * (len(names) / (len(names) - 1)) ** 0.5
    return area, area - _DEVIATIONS * spread


def _check(found: Sequence[Moves]) -> None:
    long = [one for one in found if len(one.judged())]
    joined = sum(one.behind is not None for one in long)
    subjects = {one.subject for one in long}
    if min(joined, len(long) - joined) < LEAST or len(subjects) < LEAST_SUBJECTS:
        raise ProfileError(
            f"{joined} of the labelled requests have a joint and {len(long) - joined} none, of {len(subjects)} "
            f"subjects; to fit a probe takes {LEAST} of each, of {LEAST_SUBJECTS} subjects or more. What has not "
            f"{BEFORE} captured sentences before the joint, and {TOGETHER} more, is left out"
        )
