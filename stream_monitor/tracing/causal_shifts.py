"""Is ANCHOR_SHIFT causal for the model? Where it says that the reasoning went over from sentence a to sentence b,
hiding b rather than a should weigh more behind the shift than before it.

Few texts raise an alarm at the detector's own threshold; so a text's sentences are tried in the order of its score,
alarms first. That the new anchor is what gained most there would alone favour it there and behind. So the same is
tried, as controls, where the score is lowest. What is near weighs more and loses more of that with every token: a new
anchor nearer than the old one has that against it, a farther one for it, which is why both are told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import ANCHOR_GAP, AnchorShare, SparseMass
from stream_monitor.anchors.shift import AnchorShift
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.tracing.sentences import Sentence
from stream_monitor.tracing.suppression import effect
from stream_monitor.tracing.thought_anchors import Scores

SHIFTS = 3
"""Most that are tried per text, and most controls."""
SHIFT_SENTENCES, SHIFT_TOKENS = 8, 16
"""Most sentences of a window before or behind a shift, and the tokens it has at least."""


class Scored(NamedTuple):
    """What the detector says of a sentence: where the rise of its score began, the score, whether that is an alarm, and
    which sentences lost and gained most since the rise began."""

    began: int
    score: float
    alarm: bool
    old: int | None
    new: int | None


@dataclass(frozen=True)
class Shift:
    """A shift that began at `sentence`, from anchor `old` to anchor `new`; windows are tokens [start, end)."""

    sentence: int
    old: int
    new: int
    before: tuple[int, int]
    after: tuple[int, int]
    alarm: bool = False
    control: bool = False


@dataclass(frozen=True)
class Interaction:
    """How much more the new anchor weighs against the old one behind a shift than before it, nats of log KL.

    Attributes:
        value: it.
        alarm: whether the detector reported the shift.
        control: whether its score was among the lowest.
        nearer: whether the new anchor is the later of the two.
    """

    value: float
    alarm: bool
    control: bool
    nearer: bool


def score_sentences(mass: Scores, candidates: NDArray[np.bool_], tokens: NDArray[np.int64]) -> list[Scored]:
    """The live detector at its defaults over the sentences of a text; those that it cannot judge are left out.

    Args:
        mass: float64 [S, S], each sentence's attention on each. Only what lies on candidates is fed, or the attention
            sink would be the anchor of every sentence.
        candidates: bool [S], which sentences may be anchors; these are also the sentences that are watched.
        tokens: int64 [S], tokens of each.
    """
    detector = AnchorShift()
    found: list[Scored] = []
    judged: list[int] = []
    for sentence in np.flatnonzero(candidates).tolist():
        size = max(0, sentence - ANCHOR_GAP + 1)
        row = SparseMass.of(np.where(candidates[:size], mass[sentence, :size], 0.0))
        verdict = detector.update(row, size, int(tokens[sentence]))
        if verdict is not Verdict.INSUFFICIENT:
            judged.append(sentence)
        if verdict in (Verdict.STEADY, Verdict.ALARM):
            began, alarm = judged[-1 - detector.began], verdict is Verdict.ALARM
            moved = detector.moved()
            found.append(Scored(began, detector.score, alarm, _first(moved.lost(1)), _first(moved.gained(1))))
    return found


def _first(anchors: Sequence[AnchorShare]) -> int | None:
    return anchors[0].sentence if anchors else None


def choose_shifts(scored: Sequence[Scored], sentences: Sequence[Sentence]) -> list[Shift]:
    """Up to `SHIFTS` of the highest score and as many controls of the lowest, all `SHIFT_SENTENCES` apart or more."""
    chosen: list[Shift] = []
    for control in (False, True):
        taken = 0
        for one in sorted(scored, key=lambda one: one.score if control else -one.score):
            shift = place_shift(one, sentences, control)
            apart = all(abs(one.began - other.sentence) >= SHIFT_SENTENCES for other in chosen)
            if shift is not None and apart and taken < SHIFTS:
                chosen.append(shift)
                taken += 1
    return chosen


def place_shift(one: Scored, sentences: Sequence[Sentence], control: bool = False) -> Shift | None:
    """The windows of a shift, both behind both anchors; None where there is no room, or one anchor only."""
    sentence, old, new = one.began, one.old, one.new
    if old is None or new is None or old == new:
        return None
    first = max(sentence - SHIFT_SENTENCES, max(old, new) + ANCHOR_GAP)
    if first >= sentence:
        return None
    last = min(sentence + SHIFT_SENTENCES, len(sentences)) - 1
    before = sentences[first].start, sentences[sentence].start
    after = sentences[sentence].start, sentences[last].end
    if any(end - start < SHIFT_TOKENS for start, end in (before, after)):
        return None
    return Shift(sentence, old, new, before, after, one.alarm, control)


def interaction(old: Scores, new: Scores, shift: Shift) -> Interaction:
    """See `Interaction`.

    Args:
        old, new: float64 [T], KL at every token when the anchor is hidden.
        shift: with its windows.
    """
    behind = effect(new, *shift.after) - effect(old, *shift.after)
    before = effect(new, *shift.before) - effect(old, *shift.before)
    return Interaction(behind - before, shift.alarm, shift.control, nearer=shift.new > shift.old)
