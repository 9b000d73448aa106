"""A profile from requests that were served: which heads count, what is usual, and how high scores get without cause.

The detectors are run again over what was kept of each request, so that the thresholds are those of the very scores that
the profile will bring about: first with all heads, to choose the receiver heads; then with these, to learn what is
usual; then against that, for the highest scores.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import (
    LEAST_SENTENCES,
    Head,
    HeadMatrix,
    HeadShares,
    Receivers,
    choose_receivers,
    excess_kurtosis,
    weights,
)
from stream_monitor.anchors.matrix import Mass
from stream_monitor.anchors.panel import OPENING, PROBED_SHIFT, Kind, Observation, Panel
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import Profile, make_profile
from stream_monitor.anchors.reference import Moments, Stratum, measure
from stream_monitor.anchors.shift_probe import log_reading
from stream_monitor.anchors.untrusted_probe import log_shares
from stream_monitor.compiled.periods import FAR_KEYS
from stream_monitor.records import Role

_NO_LAGS, _NO_LAG_MASS = np.zeros((0, FAR_KEYS), np.int64), np.zeros((0, FAR_KEYS))
_OUTPUT = (Role.REASONING, Role.ANSWER)


class _Unit(NamedTuple):
    """A sentence of the output, or the opening."""

    sentence: int
    shares: HeadShares
    opening: bool = False


@dataclass(frozen=True)
class Served:
    """One finished request.

    Attributes:
        prompt: sentences of the prompt, the first.
        heads: that were told apart.
        roles: uint8 [sentences]. starts: int64 [sentences], first token of each. rows: int64 [sentences], captured.
        shares: number and shares of each sentence of the output that was captured, ascending.
        opening: number of the prompt's last sentence, and shares of its last row (see `untrusted.py`); None where that
            was not captured, or nothing of the prompt is untrusted.
        lock: highest score of ANCHOR_LOCK, which does not depend on heads; None if it could score nothing.
    """

    prompt: int
    heads: Sequence[Head]
    roles: NDArray[np.uint8]
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    shares: Sequence[tuple[int, HeadShares]]
    lock: float | None
    opening: tuple[int, HeadShares] | None = None

    def observations(
        self, receivers: Sequence[Head], probe: Probe | None = None, shift_probe: Probe | None = None
    ) -> Iterator[Observation]:
        """What the detectors were shown, the opening first, by these heads, or by all alike where none of them is
        there; and what probes say of it."""
        chosen = weights(self.heads, receivers)
        weigh = probe.weights_of(self.heads) if probe else np.zeros(0)
        weigh_shift = shift_probe.weights_of(self.heads) if shift_probe else np.zeros(0)
        for unit in self._units():
            yield Observation(
                prompt=self.prompt,
                index=unit.sentence,
                mass=unit.shares.mean_over(chosen),
                roles=self.roles[: unit.sentence + 1],
                starts=self.starts[: unit.sentence + 1],
                rows=1 if unit.opening else int(self.rows[unit.sentence]),
                lags=_NO_LAGS,
                lag_mass=_NO_LAG_MASS,
                log_odds=float(weigh @ self._log_shares(unit)) + probe.bias if probe else None,
                reading=float(weigh_shift @ self._log_reading(unit)) if shift_probe else math.nan,
                opening=unit.opening,
            )

    def log_readings(self) -> list[tuple[int, Mass]]:
        """What the probe of ANCHOR_SHIFT is shown of each sentence that has anything to show, with its number,
        ascending."""
        every = [(index, self._log_reading(_Unit(index, found))) for index, found in self.shares]
        return [(index, found) for index, found in every if not np.isnan(found).any()]

    def _log_reading(self, unit: "_Unit") -> Mass:
        return log_reading(unit.sentence, unit.shares, len(self.heads))

    def log_shares(self) -> list[Mass]:
        """What a probe is shown, of each of the observations."""
        return list(map(self._log_shares, self._units()))

    def _log_shares(self, unit: "_Unit") -> Mass:
        return log_shares(unit.shares, self.roles, len(self.heads), but=unit.sentence if unit.opening else -1)

    def _units(self) -> list["_Unit"]:
        opening = [] if self.opening is None else [_Unit(*self.opening, opening=True)]
        return [*opening, *(_Unit(index, found) for index, found in self.shares)]

    def kurtosis(self) -> Mass:
        """Of each head's vertical scores over the sentences of the output; NaN where they are too few."""
        scores = HeadMatrix.of(self.shares).vertical_scores(len(self.heads), len(self.roles))
        return output_kurtosis(scores, self.roles)


def output_kurtosis(scores: Mass, roles: NDArray[np.uint8]) -> Mass:
    """Excess kurtosis of vertical scores [heads, sentences] over those of the output, float64 [heads]; NaN where fewer
    than `LEAST_SENTENCES` have one."""
    output = scores[:, np.isin(roles, _OUTPUT)]
    if not output.size or np.isfinite(output[0]).sum() < LEAST_SENTENCES:
        return np.full(len(scores), np.nan)
    return excess_kurtosis(output)


def receivers_of(requests: Sequence[Served]) -> Receivers:
    """The receiver heads that the requests show."""
    heads = sorted({head for request in requests for head in request.heads})
    places = {head: place for place, head in enumerate(heads)}
    kurtosis = np.full((len(requests), len(heads)), np.nan)
    for number, request in enumerate(requests):
        kurtosis[number, [places[head] for head in request.heads]] = request.kurtosis()
    return choose_receivers(heads, kurtosis)


def calibrated(
    model_name: str,
    capture: str,
    made_unix: int,
    requests: Sequence[Served],
    trim: float = 0.0,
    probe: Probe | None = None,
    shift_probe: Probe | None = None,
) -> Profile:
    """The profile of these requests, UNTRUSTED_ANCHOR and ANCHOR_SHIFT by probes that were fitted before. Raises
    ProfileError, see `make_profile`."""
    receivers = receivers_of(requests)
    usual = make_profile(model_name, capture, made_unix, {}, max(1, len(requests)), receivers=receivers)
    references = _references(requests, usual)
    draft = replace(usual, references=references, probe=probe, shift_probe=shift_probe)
    names = [*(kind.value for kind in Kind), OPENING, *([PROBED_SHIFT] if shift_probe else [])]
    highest: dict[str, list[float]] = {name: [] for name in names}
    for request in requests:
        for name, score in _highest(request, draft).items():
            highest[name].append(score)
    made = make_profile(model_name, capture, made_unix, highest, len(requests), trim, receivers, references)
    return replace(made, probe=probe, shift_probe=shift_probe)


def _references(requests: Sequence[Served], profile: Profile) -> dict[str, dict[str, Moments]]:
    values: dict[Kind, list[tuple[Stratum, float]]] = {}
    for request in requests:
        panel = Panel(profile)
        for seen in request.observations(profile.receivers):
            panel.update(seen)
            for kind, value in panel.values.items():
                values.setdefault(kind, []).append(value)
    return {kind.value: measure(found) for kind, found in values.items()}


def _highest(request: Served, profile: Profile) -> dict[str, float]:
    panel = Panel(profile)
    for seen in request.observations(profile.receivers, profile.probe, profile.shift_probe):
        panel.update(seen)
    found = {kind.value: highest.score for kind, highest in panel.highest.items() if highest.sentence >= 0}
    if panel.opening.sentence >= 0:
        found[OPENING] = panel.opening.score
    if panel.probed_highest.sentence >= 0:
        found[PROBED_SHIFT] = panel.probed_highest.score
    if request.lock is not None:
        found[Kind.ANCHOR_LOCK.value] = request.lock
    return found
