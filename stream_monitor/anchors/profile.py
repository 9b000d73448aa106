"""What scores requests without cause reach: thresholds with a known rate of false alarms.

A **conformal** p-value of a score s is (1 + requests whose highest score was s or more) / (1 + requests). If a request
is like those of the calibration, it is at most a with probability at most a, whatever the scores' distribution. The
highest score of a request is what counts, so the rate is one per request and not per sentence.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stream_monitor.anchors.heads import NO_RECEIVERS, Head, Receivers
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.reference import Moments, Reference
from stream_monitor.anchors.shift_probe import DISTANCES

VERSION = 8
"""Of a file. One of another version is refused: its thresholds are of scores that this program does not make."""


class ProfileError(ValueError):
    """A profile cannot be made, read or used; one line that says why and what to do."""


@dataclass(frozen=True)
class Profile:
    """Calibration of one model and one way of capturing it.

    Attributes:
        model_name: as vLLM's metrics show it.
        capture: `capture_id` of the engine.
        made_unix: seconds, when the profile was made.
        requests: n, requests it was made from.
        trimmed: highest scores left out per detector, as live traffic may hold what is looked for.
        highest: detector to the requests' highest scores, ascending, at most n; the scores of openings are apart from
            those of sentences (`panel.OPENING`), those by `shift_probe` from the divergence's (`panel.PROBED_SHIFT`).
        receivers: (layer, query head) of the receiver heads, most peaked first; the scores are of these heads alone.
            Empty: of all heads alike.
        reliability: of the heads' kurtosis between two halves of the requests, see `heads.Receivers`; None if unknown.
        references: detector to stratum to (number, mean, standard deviation) of its statistic, see `reference.py`.
        probe: that UNTRUSTED_ANCHOR is scored by, see `untrusted_probe.py`. None: by those heads that the other scores
            are of.
        shift_probe: that ANCHOR_SHIFT is scored by too, see `shift_probe.py`.
    """

    model_name: str
    capture: str
    made_unix: int
    requests: int
    trimmed: int
    highest: Mapping[str, tuple[float, ...]]
    receivers: tuple[Head, ...] = ()
    reliability: float | None = None
    references: Mapping[str, Mapping[str, Moments]] = field(default_factory=dict)
    probe: Probe | None = None
    shift_probe: Probe | None = None

    def reference(self, kind: str) -> Reference | None:
        """What this detector's statistic is compared with; None where it is taken as it is."""
        moments = self.references.get(kind)
        return Reference(moments) if moments else None

    def p_value(self, kind: str, score: float) -> float:
        """Of a score by this detector, among the requests that it could score; 1 if it could score none."""
        scores = self.highest.get(kind, ())
        return (1 + len(scores) - bisect_left(scores, score)) / (len(scores) + 1)

    def threshold(self, kind: str, rate: float) -> float:
        """Scores above it have a p-value of at most `rate`; infinite where no score could have."""
        scores = self.highest.get(kind, ())
        # Infinite where too few requests could be scored to tell of so low a rate.
        allowed = math.floor(rate * (len(scores) + 1) + 1e-9) - 1
        return scores[-1 - allowed] if 0 <= allowed < len(scores) else math.inf

    def can_raise(self, kind: str) -> bool:
        """Whether this detector could score any request: else it is never raised and takes no part of the rate."""
        return bool(self.highest.get(kind))

    def check(self, rate: float) -> None:
        """Raises ProfileError where the profile is too small for a rate, divided among the detectors it can raise."""
        count = max(1, sum(map(self.can_raise, self.highest)))
        least = math.ceil(count / rate - 1e-9) - 1
        if self.requests - self.trimmed < least:
            raise ProfileError(
                f"the profile of {self.model_name} is made from {self.requests - self.trimmed} requests; a rate of "
                f"{rate:g} for {count} detectors needs {least}"
            )

    def write(self, path: Path) -> None:
        """As JSON. Raises ProfileError."""
        probes = {"probe": self.probe, "shift_probe": self.shift_probe}
        content = {"version": VERSION} | vars(self) | {name: one and vars(one) for name, one in probes.items()}
        try:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Raises ProfileError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("version")
            if version != VERSION:
                raise ProfileError(
                    f"{path} is a profile of version {version}, and this program's scores are those of {VERSION}; make "
                    "it anew with `stream-monitor calibrate`"
                )
            highest = {kind: tuple(map(float, scores)) for kind, scores in content.pop("highest").items()}
            receivers = _heads(content.pop("receivers"))
            probe, shift_probe = (_probe(content.pop(name)) for name in ("probe", "shift_probe"))
            references = {
                kind: {
                    name: (int(count), float(mean), float(deviation))
                    for name, (count, mean, deviation) in known.items()
                }
                for kind, known in content.pop("references").items()
            }
            found = cls(
                highest=highest,
                receivers=receivers,
                references=references,
                probe=probe,
                shift_probe=shift_probe,
                **content,
            )
            found._check_content(path)
        except OSError as error:
            raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{path} is not a profile; `stream-monitor calibrate` makes one") from error
        return found

    def _check_content(self, path: Path) -> None:
        ordered = all(list(scores) == sorted(scores) for scores in self.highest.values())
        numbers = all(math.isfinite(score) for scores in self.highest.values() for score in scores)
        few = all(len(scores) <= self.requests - self.trimmed for scores in self.highest.values())
        moments = [one for known in self.references.values() for one in known.values()]
        for probe, shown in ((self.probe, 1), (self.shift_probe, DISTANCES)):
            if probe:
                numbers &= all(map(math.isfinite, (*probe.weights, probe.bias)))
                numbers &= 0 < shown * len(probe.heads) == len(probe.weights)
        numbers &= all(math.isfinite(mean) and 0 <= deviation < math.inf for _, mean, deviation in moments)
        named = isinstance(self.model_name, str) and isinstance(self.capture, str)
        if not (ordered and numbers and few and named and 0 <= self.trimmed <= self.requests):
            raise ProfileError(f"{path} was changed by hand: its numbers do not fit each other")


def _heads(content: Iterable[Sequence[int]]) -> tuple[Head, ...]:
    return tuple((int(layer), int(head)) for layer, head in content)


def _probe(content: Mapping[str, Any] | None) -> Probe | None:
    if content is None:
        return None
    heads, weights, bias = (content[name] for name in ("heads", "weights", "bias"))
    return Probe(_heads(heads), tuple(map(float, weights)), float(bias))


def make_profile(
    model_name: str,
    capture: str,
    made_unix: int,
    highest: Mapping[str, Sequence[float]],
    requests: int,
    trim: float = 0.0,
    receivers: Receivers = NO_RECEIVERS,
    references: Mapping[str, Mapping[str, Moments]] | None = None,
) -> Profile:
    """From the highest scores of n requests.

    Args:
        model_name, capture, made_unix: see `Profile`.
        highest: detector to the highest scores of those requests that it could score.
        requests: n, all of them.
        trim: share of the requests whose scores are left out, the highest of each detector: live traffic is not known
            to be without cause.
        receivers, references: that the scores were made with.

    Raises:
        ProfileError: there are no requests, or `trim` is out of its range.
    """
    if requests < 1:
        raise ProfileError("there is no finished request to calibrate from; send some traffic first")
    if not 0 <= trim < 0.5:
        raise ProfileError(f"trim is {trim}; valid: 0 to below 0.5")
    cut = math.floor(trim * requests)
    kept = {kind: tuple(sorted(map(float, scores))[: max(0, len(scores) - cut)]) for kind, scores in highest.items()}
    reliability = receivers.reliability if math.isfinite(receivers.reliability) else None
    return Profile(model_name, capture, made_unix, requests, cut, kept, receivers.heads, reliability, references or {})
