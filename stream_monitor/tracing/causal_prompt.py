"""Is PROMPT_DETACHMENT causal for the model: where the output looks at the prompt less, does it depend on it less?

The prompt is hidden from all that follows. Its effect on a sentence is the log of the mean KL divergence there. Beside
it stands what the detector makes of the attention: how far the prompt's share has fallen, and the score that sums up
such falls. Both fall off with distance, whatever is said; so their agreement is also given with the place in the text
held fixed, the place alone is a ranking of its own, and where the detector sees a fall the effect is held against what
becomes of it at the same place of other texts (`causal_statistics.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.detachment import PromptDetachment
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.tracing.causal_shifts import SHIFT_SENTENCES
from stream_monitor.tracing.ranks import rank_correlation
from stream_monitor.tracing.sentences import Sentence
from stream_monitor.tracing.suppression import effect
from stream_monitor.tracing.thought_anchors import Scores

FEWEST = 20
"""Judged sentences that a text has at least: fewer have no ranks to speak of."""


class Judged(NamedTuple):
    """What the detector says of a sentence: how far the prompt's share has fallen, its score, where that began to rise,
    and whether it is an alarm."""

    sentence: int
    fall: float
    score: float
    began: int
    alarm: bool


@dataclass(frozen=True)
class PromptTest:
    """One text's.

    Attributes:
        agreement: rank correlation, over sentences, of the prompt's share and of what hiding the prompt does.
        given_place: the same with the sentence's number held fixed.
        place: the same of the number alone, the earliest first.
        changes: at each judged sentence, how the mean effect changes, nats, from the `SHIFT_SENTENCES` before it to
            those from it on; NaN where there is no room for both.
        rose_at: place in `changes`, where there is one, at which the detector's score began to rise to its highest;
            None where it did not rise.
        reported_at: the same of each alarm.
    """

    agreement: float
    given_place: float
    place: float
    changes: tuple[float, ...]
    rose_at: int | None
    reported_at: tuple[int, ...]


def prompt_sentences(sentences: Sequence[Sentence], prompt: int) -> int:
    """How many sentences at the beginning are the prompt; see `reasoning_candidates`."""
    if any(sentence.role == "reasoning" for sentence in sentences):
        return next(number for number, sentence in enumerate(sentences) if sentence.role == "reasoning")
    return sum(sentence.start < prompt for sentence in sentences)


def judge_sentences(mass: Scores, sentences: Sequence[Sentence], prompt: int) -> list[Judged]:
    """The live detector at its defaults over the sentences behind the `prompt` first; those that it cannot judge are
    left out.

    The first sentence is left out, as attention rests there; the rest of the prompt is the user's.

    Args:
        mass: float64 [S, S], each sentence's attention on each.
    """
    detector = PromptDetachment()
    starts = [sentence.start for sentence in sentences]
    user = starts[prompt] - starts[1]
    found: list[Judged] = []
    judged: list[int] = []
    for number in range(prompt, len(sentences)):
        of_prompt, of_all = float(mass[number, 1:prompt].sum()), float(mass[number, 1:].sum())
        rows = sentences[number].end - sentences[number].start
        verdict = detector.update(of_prompt, of_all, user / (starts[number] - starts[1]), rows)
        if verdict is Verdict.INSUFFICIENT:
            continue
        judged.append(number)
        began, alarm = judged[-1 - detector.began], verdict is Verdict.ALARM
        found.append(Judged(number, detector.fall, detector.score, began, alarm))
    return found


def weigh_prompt(kl: Scores, judged: Sequence[Judged], sentences: Sequence[Sentence]) -> PromptTest | None:
    """None for a text of less than `FEWEST` judged sentences.

    Args:
        kl: float64 [T], at every token when the prompt is hidden.
    """
    if len(judged) < FEWEST:
        return None
    effects = np.array([effect(kl, sentences[one.sentence].start, sentences[one.sentence].end) for one in judged])
    share, number = np.array([-one.fall for one in judged]), np.array([-one.sentence for one in judged])
    changes = tuple(_change(effects, place) for place in range(len(judged)))
    place_of = {one.sentence: place for place, one in enumerate(judged)}
    by_score = sorted(judged, key=lambda one: -one.score)
    rises = [(one.score, at) for one in by_score if math.isfinite(changes[at := place_of[one.began]])]
    rose = len(rises) > 1 and rises[0][0] > rises[-1][0]
    return PromptTest(
        agreement=rank_correlation(share, effects),
        given_place=rank_correlation(share, effects, [number]),
        place=rank_correlation(number, effects),
        changes=changes,
        rose_at=rises[0][1] if rose else None,
        reported_at=tuple(place_of[one.began] for one in judged if one.alarm),
    )


def _change(effects: NDArray[np.float64], place: int) -> float:
    before = effects[max(0, place - SHIFT_SENTENCES) : place]
    behind = effects[place : place + SHIFT_SENTENCES]
    whole = len(before) == len(behind) == SHIFT_SENTENCES
    return float(behind.mean() - before.mean()) if whole else math.nan
