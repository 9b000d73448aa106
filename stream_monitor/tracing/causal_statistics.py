"""Figures of the causal test over many texts, with intervals that know that pairs of one text go together."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal, NamedTuple, TypeVar

from stream_monitor.tracing.causal import Measured, Outcome, TextResult

_DRAWS = 2000
SHIFTS_NEEDED = 5
"""Shifts below which their median says nothing."""

SAME_PLACE = 2
"""Judged sentences by which the places of two texts may differ and still be the same."""

_One = TypeVar("_One")
Source = Literal["kept", "exact"]
Statistic = Callable[[Sequence[TextResult]], float]

TRIVIAL: dict[str, Callable[[Measured], float]] = {
    "latest": lambda one: one.sentence,
    "earliest": lambda one: -one.sentence,
    "longest": lambda one: one.tokens,
    "overlap": lambda one: one.overlap,
}
"""Rankings that need no attention: what they rank by."""


@dataclass(frozen=True)
class Figure:
    """A value and its 95% interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def figure(texts: Sequence[_One], statistic: Callable[[Sequence[_One]], float], seed: int) -> Figure:
    """A statistic of all texts, or of what was worked out of each, and its interval by drawing whole texts with
    replacement.

    With a handful of texts the interval is rather too narrow. Draws in which the statistic is not defined are left out.
    """
    draw = random.Random(seed)
    values = [statistic(draw.choices(texts, k=len(texts))) for _ in range(_DRAWS)]
    drawn = sorted(value for value in values if math.isfinite(value)) or [math.nan]
    return Figure(statistic(texts), drawn[int(0.025 * len(drawn))], drawn[int(0.975 * len(drawn))])


def outcomes(texts: Sequence[TextResult], source: Source) -> Iterator[Outcome]:
    """All trials of one kind of anchors."""
    for text in texts:
        yield from text.kept if source == "kept" else text.exact


def pairs(texts: Sequence[TextResult], source: Source) -> Iterator[tuple[Measured, Measured]]:
    """Each anchor with each of its controls."""
    for outcome in outcomes(texts, source):
        for control in outcome.controls:
            yield outcome.anchor, control


def median_ratio(source: Source) -> Statistic:
    """Median over anchors of the effect of each less the mean effect of its controls: the log of a ratio of KLs."""

    def statistic(texts: Sequence[TextResult]) -> float:
        ratios = [one.anchor.effect - fmean(c.effect for c in one.controls) for one in outcomes(texts, source)]
        return median(ratios) if ratios else math.nan

    return statistic


def higher_share(source: Source) -> Statistic:
    """Share of pairs in which the anchor has the larger effect."""

    def statistic(texts: Sequence[TextResult]) -> float:
        return _mean([float(anchor.effect > control.effect) for anchor, control in pairs(texts, source)])

    return statistic


def handicapped_share(source: Source) -> Statistic:
    """`higher_share` of the pairs whose control is the later: nearer to the window, which alone would favour it."""

    def statistic(texts: Sequence[TextResult]) -> float:
        found = [(one, other) for one, other in pairs(texts, source) if other.sentence > one.sentence]
        return _mean([float(anchor.effect > control.effect) for anchor, control in found])

    return statistic


def share_of_exact(texts: Sequence[TextResult]) -> float:
    """`higher_share` of the anchors from kept blocks over that of the anchors from exact attention."""
    exact = higher_share("exact")(texts)
    return higher_share("kept")(texts) / exact if exact > 0 else math.nan


def trivial_share(name: str, source: Source = "kept") -> Statistic:
    """Share of the same pairs in which the sentence that a trivial ranking puts higher has the larger effect.

    Where it cannot tell the two apart, half a pair counts.
    """
    key = TRIVIAL[name]

    def statistic(texts: Sequence[TextResult]) -> float:
        return _mean(
            [
                0.5 if key(one) == key(other) else float((key(one) > key(other)) == (one.effect > other.effect))
                for one, other in pairs(texts, source)
            ]
        )

    return statistic


def interactions(texts: Sequence[TextResult], control: bool = False, nearer: bool | None = None) -> list[float]:
    """Of the shifts that were tried, or of their controls; of those whose new anchor is the nearer, or is not."""
    return [
        one.value
        for text in texts
        for one in text.interactions
        if one.control == control and nearer in (None, one.nearer)
    ]


def median_interaction(control: bool = False, nearer: bool | None = None) -> Statistic:
    """Median of `interactions`."""

    def statistic(texts: Sequence[TextResult]) -> float:
        found = interactions(texts, control, nearer)
        return median(found) if found else math.nan

    return statistic


def positive_share(texts: Sequence[TextResult]) -> float:
    """Share of the tried shifts whose interaction is positive."""
    return _mean([float(value > 0) for value in interactions(texts)])


def mean_of_prompt_tests(name: str) -> Statistic:
    """Mean of an attribute of `PromptTest`, over the texts that have it."""

    def statistic(texts: Sequence[TextResult]) -> float:
        found = [getattr(text.prompt, name) for text in texts if text.prompt is not None]
        return _mean([value for value in found if math.isfinite(value)])

    return statistic


class Loss(NamedTuple):
    """How the effect of hiding the prompt changed where the detector saw its share fall, nats; and how much more than
    at the same place of the other texts, in the median."""

    change: float
    beyond_place: float


def prompt_losses(texts: Sequence[TextResult], reported: bool) -> list[Loss]:
    """At most one of each text: where its score began to rise to its highest; or, if `reported`, where that of its
    first finding did. Texts without, or without others to be held against, have none."""
    tests = [text.prompt for text in texts if text.prompt is not None]
    found = []
    for test in tests:
        at = next(iter(test.reported_at), None) if reported else test.rose_at
        if at is None:
            continue
        others = (other.changes for other in tests if other is not test)
        near = [change for changes in others for change in changes[max(0, at - SAME_PLACE) : at + SAME_PLACE + 1]]
        if usual := [change for change in near if math.isfinite(change)]:
            found.append(Loss(test.changes[at], test.changes[at] - median(usual)))
    return [loss for loss in found if math.isfinite(loss.change)]


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
