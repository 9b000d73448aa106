"""All detectors of one request: what each is shown of a sentence, or of the opening, and what they raise."""

import math
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.detachment import PromptDetachment
from stream_monitor.anchors.heads import Head
from stream_monitor.anchors.lock import AnchorLock
from stream_monitor.anchors.matrix import ANCHOR_GAP, AnchorShare, SparseMass
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import Profile
from stream_monitor.anchors.reference import Stratum
from stream_monitor.anchors.shift import AnchorShift
from stream_monitor.anchors.shift_probe import TOGETHER, ProbedShift
from stream_monitor.anchors.untrusted import Rivals, UntrustedAnchor, candidates
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.records import Role


class Kind(StrEnum):
    """The findings there are; names as in `monitor.proto`."""

    ANCHOR_SHIFT = "anchor_shift"
    PROMPT_DETACHMENT = "prompt_detachment"
    ANCHOR_LOCK = "anchor_lock"
    UNTRUSTED_ANCHOR = "untrusted_anchor"

    # An enumeration's own is written in Python, and takes longer than most of what is looked up by it.
    __hash__ = str.__hash__


OPENING = "untrusted_anchor_opening"
"""What a profile has the scores of openings under: where a question is answered from a document, the model looks the
answer up there, and reads the document more than any sentence does. They are judged among themselves."""
PROBED_SHIFT = "anchor_shift_probe"
"""What a profile has the scores of ANCHOR_SHIFT by its probe under: it is raised by either score."""

TOLERATED = 0.5
"""Rise of a standardised statistic's mean that is tolerated, standard deviations."""
MOST_ANCHORS = 5
"""That a finding names, of those before and of those now."""
_LOOKED_BACK = 64
"""Scored sentences that an alarm may have begun before."""
_NOTHING = SparseMass.of(np.zeros(0))
_USER = int(Role.USER)
"""A plain number: numpy takes longer to compare with members of an enumeration."""


@dataclass(frozen=True)
class Observation:
    """One closed sentence of the output, or the opening (see `untrusted.py`), as it was captured.

    Attributes:
        prompt: sentences of the prompt, the first; in a session that goes on earlier output is part of it.
        index: its number, prompt included; of the opening, that of the prompt's last sentence, whose last token it is.
        mass: share of its attention on each sentence up to itself, that on the first token left out: every head reads
            that when it has nothing to read (the attention sink).
        roles: uint8 [index + 1], `summary.proto` Role of each sentence.
        starts: int64 [index + 1], first token of each.
        rows: captured rows it has.
        lags: int64 [rows, FAR_KEYS], tokens from each row back to the far keys it reads most.
        lag_mass: float64 [rows, FAR_KEYS], attention on each, in any unit; 0 where there is none.
        log_odds: what a profile's probe of UNTRUSTED_ANCHOR says of it, see `untrusted_probe.py`; NaN where heads are
            missing, None without a probe.
        reading: what a profile's probe of ANCHOR_SHIFT says of it, see `ProbedShift.update`.
        opening: whether it is the opening.
    """

    prompt: int
    index: int
    mass: SparseMass
    roles: NDArray[np.uint8]
    starts: NDArray[np.int64]
    rows: int
    lags: NDArray[np.int64]
    lag_mass: NDArray[np.float64]
    log_odds: float | None = None
    reading: float = math.nan
    opening: bool = False

    @property
    def limit(self) -> int:
        """Number of the sentences that are far enough to be anchors, the first ones."""
        return max(0, self.index - ANCHOR_GAP + 1)

    @cached_property
    def far(self) -> SparseMass:
        """The mass on those."""
        return self.mass.before(self.limit)

    def rivals(self) -> SparseMass:
        """What UNTRUSTED_ANCHOR is shown: the mass on what may be an anchor beside a document."""
        if self.opening:
            # At the end of a document it reads its own sentence because that is so near.
            return self.mass.before(self.index) if self.roles[self.index] == Role.UNTRUSTED else self.mass
        return candidates(self.mass, self.roles, self.limit)


@dataclass(frozen=True)
class Alarm:
    """A finding.

    Attributes:
        kind: which.
        score, threshold: in the detector's unit.
        p_value: how often a request without cause has as high a score, by the profile; None without one.
        began: number of the sentence where it began.
        before: what the output rested on until then, at most `MOST_ANCHORS`; ANCHOR_SHIFT alone keeps it, and has here
            what lost most, with its share until then.
        now: what it rests on, as many, heaviest first; of ANCHOR_SHIFT what gained most, with its share since then.
        detail: what is particular to it, a few words for people.
        by_probe: whether the score is a probe's.
    """

    kind: Kind
    score: float
    threshold: float
    p_value: float | None
    began: int
    before: list[AnchorShare]
    now: list[AnchorShare]
    detail: str
    by_probe: bool = False


@dataclass
class Highest:
    """The largest score of a request by one detector, and the sentence that had it."""

    score: float = -math.inf
    sentence: int = -1


@dataclass
class _Begins:
    """Numbers of the newest sentences that a detector scored."""

    scored: deque[int] = field(default_factory=lambda: deque(maxlen=_LOOKED_BACK))

    def back(self, count: int) -> int:
        """The one so many before the newest, or the oldest that is known."""
        return self.scored[max(0, len(self.scored) - 1 - count)]


class _Prompt(NamedTuple):
    """Of a request: tokens of the user's, and whether any part of it is untrusted."""

    user_tokens: int
    untrusted: bool


class _Detector(Protocol):
    threshold: float

    @property
    def score(self) -> float: ...


class Panel:
    """The detectors of one request.

    Without a profile each has a threshold of its own, chosen by hand, and no p-value. With one, a finding is raised
    where so high a score is rarer than the rate divided among the kinds that were not raised yet (Holm's procedure);
    kinds that cannot be raised, by the profile or because the request has nothing untrusted, take no part of it. The
    opening counts as a kind of its own there, and so does ANCHOR_SHIFT by a probe.
    A request's highest scores are kept apart from the alarms, which begin some detectors anew.

    Args:
        profile: of this model and capture, or None.
        rate: share of requests without cause that may raise any finding; only with a profile.

    Attributes:
        verdicts: of the newest sentence.
        values: of the newest sentence, what the detectors that a profile has references for were shown, with its
            stratum.
        highest: of the request's sentences so far.
        opening: score of its opening.
        probed_highest: by the probe of ANCHOR_SHIFT.
    """

    def __init__(self, profile: Profile | None = None, rate: float = 0.01) -> None:
        self.profile = profile
        self.rate = rate
        self.shift = self._new_shift()
        self.detachment = self._new_detachment()
        self.lock = AnchorLock()
        self.untrusted = UntrustedAnchor()
        self.probed_shift = ProbedShift(self.shift_probe) if self.shift_probe else None
        self._detectors: dict[Kind, _Detector] = {
            Kind.UNTRUSTED_ANCHOR: self.untrusted,
            Kind.ANCHOR_SHIFT: self.shift,
            Kind.PROMPT_DETACHMENT: self.detachment,
            Kind.ANCHOR_LOCK: self.lock,
        }
        self.verdicts: dict[Kind, Verdict] = {}
        self.values: dict[Kind, tuple[Stratum, float]] = {}
        self.highest = {kind: Highest() for kind in Kind}
        self.opening = Highest()
        self.probed_highest = Highest()
        # Until the first alarm these are the detectors above: nothing else tells them apart.
        self._unbroken_shift: AnchorShift | None = None
        self._unbroken_detachment: PromptDetachment | None = None
        self._raised: set[str] = set()
        self._prompt: _Prompt | None = None
        self._begins = {name: _Begins() for name in (*Kind, PROBED_SHIFT)}
        self._set_thresholds()

    @property
    def receivers(self) -> tuple[Head, ...]:
        """Heads whose attention counts; all alike if empty."""
        return self.profile.receivers if self.profile else ()

    @property
    def probe(self) -> Probe | None:
        """By which UNTRUSTED_ANCHOR is scored, if there is one."""
        return self.profile.probe if self.profile else None

    @property
    def shift_probe(self) -> Probe | None:
        """By which ANCHOR_SHIFT is scored beside the divergence, if there is one."""
        return self.profile.shift_probe if self.profile else None

    def fresh(self) -> "Panel":
        """The same, of a request that begins anew."""
        return Panel(self.profile, self.rate)

    def update(self, seen: Observation) -> list[Alarm]:
        """Take in one sentence, or the opening before the first; what it raised.

        The opening is shown to UNTRUSTED_ANCHOR alone.
        """
        if seen.opening:
            return self._open(seen)
        limit, far = seen.limit, seen.far
        prompt = self._prompt_of(seen)
        user = float(seen.mass.shares[seen.roles[seen.mass.columns] == _USER].sum())
        tokens = min(1.0, prompt.user_tokens / max(1, int(seen.starts[seen.index])))
        role = int(seen.roles[seen.index])
        told = (user, seen.mass.total, tokens, seen.rows, limit, role)
        near = seen.rivals() if prompt.untrusted else _NOTHING
        self.verdicts = {
            Kind.UNTRUSTED_ANCHOR: self._update_untrusted(near, seen),
            Kind.ANCHOR_SHIFT: self.shift.update(far, limit, seen.rows, role),
            Kind.PROMPT_DETACHMENT: self.detachment.update(*told),
            Kind.ANCHOR_LOCK: self.lock.update(seen.lags, seen.lag_mass),
        }
        if self._unbroken_shift is not None:
            self._unbroken_shift.update(far, limit, seen.rows, role)
        elif self.shift.drift_detected:
            self._unbroken_shift = self.shift.unbroken()
        if self._unbroken_detachment is not None:
            self._unbroken_detachment.update(*told)
        elif self.detachment.drift_detected:
            self._unbroken_detachment = self.detachment.unbroken()
        shown = {Kind.ANCHOR_SHIFT: self.shift.divergence, Kind.PROMPT_DETACHMENT: self.detachment.fall}
        stratum = Stratum.of(seen.rows, limit, role)
        # The first sentence that can be judged has nothing to diverge from.
        self.values = {
            kind: (stratum, value)
            for kind, value in shown.items()
            if self.verdicts[kind] is not Verdict.INSUFFICIENT and not math.isnan(value)
        }
        return [*self._raise(seen, far, near), *self._raise_probed(seen)]

    def _open(self, seen: Observation) -> list[Alarm]:
        self.values = {}
        near = seen.rivals() if (seen.roles == Role.UNTRUSTED).any() else _NOTHING
        self.verdicts = {Kind.UNTRUSTED_ANCHOR: self._update_untrusted(near, seen)}
        return self._raise(seen, _NOTHING, near)

    def _update_untrusted(self, near: SparseMass, seen: Observation) -> Verdict:
        return self.untrusted.update(*Rivals.of(near, seen.roles), seen.rows, seen.opening, seen.log_odds)

    def _raise(self, seen: Observation, far: SparseMass, near: SparseMass) -> list[Alarm]:
        """The alarms among the newest verdicts."""
        alarms = []
        for kind, verdict in self.verdicts.items():
            if verdict is Verdict.INSUFFICIENT:
                continue
            self._begins[kind].scored.append(seen.index)
            self._note(kind, seen)
            if verdict is Verdict.ALARM:
                alarms.append(self._alarm(kind, seen, far, near))
                self._raised.add(OPENING if seen.opening else kind)
        if alarms:
            self._set_thresholds()
        return alarms

    def _raise_probed(self, seen: Observation) -> list[Alarm]:
        """ANCHOR_SHIFT by the probe, unless the divergence raises it at the same sentence."""
        detector = self.probed_shift
        if detector is None or (verdict := detector.update(seen.reading, seen.rows)) is Verdict.INSUFFICIENT:
            return []
        self._begins[PROBED_SHIFT].scored.append(seen.index)
        if detector.score > self.probed_highest.score:
            self.probed_highest = Highest(detector.score, seen.index)
        if verdict is not Verdict.ALARM:
            return []
        moved, threshold = self.shift.moved_lately(), detector.threshold
        self._raised.add(PROBED_SHIFT)
        self._set_thresholds()
        if self.verdicts[Kind.ANCHOR_SHIFT] is Verdict.ALARM:
            return []
        self.verdicts[Kind.ANCHOR_SHIFT] = Verdict.ALARM
        return [
            Alarm(
                kind=Kind.ANCHOR_SHIFT,
                score=detector.score,
                threshold=threshold,
                p_value=self.profile.p_value(PROBED_SHIFT, detector.score) if self.profile else None,
                began=self._begins[PROBED_SHIFT].back(TOGETHER - 1),
                before=moved.lost(MOST_ANCHORS),
                now=moved.gained(MOST_ANCHORS),
                detail="",
                by_probe=True,
            )
        ]

    def _new_shift(self) -> AnchorShift:
        reference = self.profile.reference(Kind.ANCHOR_SHIFT) if self.profile else None
        lately = TOGETHER if self.shift_probe else 0
        if reference is None:
            return AnchorShift(lately=lately)
        return AnchorShift(delta=TOLERATED, reference=reference, lately=lately)

    def _new_detachment(self) -> PromptDetachment:
        reference = self.profile.reference(Kind.PROMPT_DETACHMENT) if self.profile else None
        return PromptDetachment(delta=TOLERATED, reference=reference) if reference else PromptDetachment()

    def _prompt_of(self, seen: Observation) -> "_Prompt":
        """Looked at once: it does not change while the output grows."""
        if self._prompt is None:
            roles, tokens = seen.roles[: seen.prompt], np.diff(seen.starts[: seen.prompt + 1])
            self._prompt = _Prompt(int(tokens[roles == Role.USER].sum()), bool((roles == Role.UNTRUSTED).any()))
            self._set_thresholds()
        return self._prompt

    def _note(self, kind: Kind, seen: Observation) -> None:
        if seen.opening:
            self.opening = Highest(self.untrusted.score, seen.index)
            return
        unbroken = {Kind.ANCHOR_SHIFT: self._unbroken_shift, Kind.PROMPT_DETACHMENT: self._unbroken_detachment}
        score = (unbroken.get(kind) or self._detectors[kind]).score
        if score > self.highest[kind].score:
            self.highest[kind] = Highest(score, seen.index)

    def _alarm(self, kind: Kind, seen: Observation, far: SparseMass, near: SparseMass) -> Alarm:
        detector = self._detectors[kind]
        name = OPENING if seen.opening else kind
        back, before, now, detail = 0, list[AnchorShare](), far.ranked(MOST_ANCHORS), ""
        if kind is Kind.ANCHOR_SHIFT:
            back, moved = self.shift.began, self.shift.moved()
            before, now = moved.lost(MOST_ANCHORS), moved.gained(MOST_ANCHORS)
            detail = f"divergence {self.shift.divergence:.2f} bit"
        elif kind is Kind.PROMPT_DETACHMENT:
            back = self.detachment.began
        elif kind is Kind.ANCHOR_LOCK:
            # A loop reads the sentences just before; the gap would hide them.
            back, now = self.lock.began, seen.mass.before(seen.index).ranked(MOST_ANCHORS)
            detail = f"it reads itself {self.lock.period} tokens back"
        elif self.probe is None:
            now = near.ranked(MOST_ANCHORS)
        else:
            # What else it reads may be more: the probe does not compare.
            now = near.where(seen.roles[near.columns] == Role.UNTRUSTED).ranked(MOST_ANCHORS)
            detail = "as before an instruction in it is followed"
        return Alarm(
            kind=kind,
            score=detector.score,
            threshold=self.untrusted.opening_threshold if seen.opening else detector.threshold,
            p_value=None if self.profile is None else self.profile.p_value(name, detector.score),
            began=self._begins[kind].back(back),
            before=before,
            now=now,
            detail=detail,
            by_probe=kind is Kind.UNTRUSTED_ANCHOR and self.probe is not None,
        )

    def _set_thresholds(self) -> None:
        if self.profile is None:
            return
        possible = {name for name in (*Kind, OPENING, PROBED_SHIFT) if self.profile.can_raise(name)}
        if self._prompt is not None and not self._prompt.untrusted:
            possible -= {Kind.UNTRUSTED_ANCHOR, OPENING}
        rate = self.rate / max(1, len(possible - self._raised))
        for kind in Kind:
            self._detectors[kind].threshold = self.profile.threshold(kind, rate)
        self.untrusted.opening_threshold = self.profile.threshold(OPENING, rate)
        if self.probed_shift:
            self.probed_shift.threshold = self.profile.threshold(PROBED_SHIFT, rate)
