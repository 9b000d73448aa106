"""Is PROMPT_DETACHMENT causal for the model: where the output looks at the prompt less, does it depend on it less?

The prompt is hidden from all that follows. Its effect on a sentence is the log of the mean KL divergence there. Beside
it stands what the detector makes of the attention: how far the prompt's share has fallen, and the score that sums up
such falls. Both fall off with distance, whatever is said; so their agreement is also given with the place in the text
held fixed, and the place alone is a ranking of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
        fall, control: how the effect changes, nats, from before to behind where the detector's score began to rise to
            its highest, and at its lowest; None where it did not rise, or there is no room.
        alarms: that the detector reported.
    """

    agreement: float
    given_place: float
    place: float
    fall: float | None
    control: float | None
    alarms: int


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
    share, place = np.array([-one.fall for one in judged]), np.array([-one.sentence for one in judged])
    number_of = {one.sentence: number for number, one in enumerate(judged)}

    def change(one: Judged) -> float | None:
        """Of the mean effect, in the sentences up to `SHIFT_SENTENCES` from where the score began to rise."""
        first = number_of[one.began]
        before = effects[max(0, first - SHIFT_SENTENCES) : first]
        behind = effects[first : first + SHIFT_SENTENCES]
        whole = len(before) == len(behind) == SHIFT_SENTENCES
        return float(behind.mean() - before.mean()) if whole else None

    by_score = sorted(judged, key=lambda one: -one.score)
    changes = [(one.score, found) for one in by_score if (found := change(one)) is not None]
    rose = len(changes) > 1 and changes[0][0] > changes[-1][0]
    return PromptTest(
        agreement=rank_correlation(share, effects),
        given_place=rank_correlation(share, effects, [place]),
        place=rank_correlation(place, effects),
        fall=changes[0][1] if rose else None,
        control=changes[-1][1] if rose else None,
        alarms=sum(one.alarm for one in judged),
    )
