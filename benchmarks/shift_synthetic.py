"""Are planted shifts of known size found, and how often is one found where there is none?

Requests are drawn, not captured: a prompt, then sentences whose anchor distribution is a drawn base, blurred anew for
every sentence as a handful of captured rows blurs it, with new sentences entering as candidates all the time. In half
of them the base is replaced at a known sentence by one at a known Jensen-Shannon divergence. Profiles are made from
requests without a shift, and rates are measured on others (of other seeds), all detectors of the panel running.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.report import Report, bootstrap, run
from stream_monitor.anchors.matrix import ANCHOR_GAP, SparseMass
from stream_monitor.anchors.panel import Kind, Observation, Panel
from stream_monitor.anchors.profile import Profile, make_profile
from stream_monitor.compiled.divergence import jensen_shannon
from stream_monitor.compiled.periods import FAR_KEYS
from stream_monitor.records import Role

SIZES = (0.1, 0.2, 0.3, 0.4, 0.6)
"""Jensen-Shannon divergence of the planted shifts, bits."""
MUST_SIZE, MUST_RECALL, MUST_FALSE = 0.3, 0.95, 1.5
RATE = 0.05
"""Requests without cause in which any finding may be raised."""
PROMPT, SENTENCES, EARLIEST, LATEST = 12, (40, 120), 14, 25
"""Sentences of the prompt and of the output, and where in the output a shift is planted."""
WITHIN = 10
"""Sentences after the planted one in which an alarm counts as finding it."""
CONCENTRATION = 60.0
"""How near a sentence's distribution is to its base: that of a Dirichlet distribution, about 60 draws."""
FAR_MASS, TOKENS = 0.35, 18

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Of one request: the sentence of each finding of a kind, and the highest scores."""

    alarms: list[tuple[Kind, int]]
    highest: dict[Kind, float]


def main(
    calibration: Annotated[int, typer.Option(min=100, help="Requests that the profile is made from.")] = 999,
    held_out: Annotated[int, typer.Option(min=100, help="Requests without a shift that rates are measured on.")] = 1500,
    shifted: Annotated[int, typer.Option(min=20, help="Requests with a shift, of each size.")] = 200,
    rate: Annotated[float, typer.Option(help="False alarms per request, all detectors together.")] = RATE,
    seed: Annotated[int, typer.Option(help="Of all requests.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Five times as many of each.")] = False,
) -> None:
    """Recall by size, and false alarms."""
    times = 5 if full else 1
    report = Report(
        benchmark="shift_synthetic",
        config={
            "calibration": times * calibration,
            "rate": rate,
            "sizes": list(SIZES),
            "within": WITHIN,
            "concentration": CONCENTRATION,
            "full": full,
        },
        seed=seed,
        n=times * held_out,
    )
    calm = [_request(seed, number, None, None) for number in range(times * calibration)]
    scores = {kind: [one.highest[kind] for one in calm if math.isfinite(one.highest[kind])] for kind in Kind}
    profile = make_profile("drawn", "drawn", 0, {kind.value: found for kind, found in scores.items()}, len(calm))
    profile.check(rate)
    others = [_request(seed + 1, number, None, profile, rate) for number in range(times * held_out)]
    raised = [float(bool(one.alarms)) for one in others]
    shifts = [float(any(kind is Kind.ANCHOR_SHIFT for kind, _ in one.alarms)) for one in others]
    _count(report, "false_alarms_any", raised, seed)
    _count(report, "false_alarms_shift", shifts, seed)
    report.figures["false_alarms_per_1000_requests"] = 1000 * float(np.mean(raised))
    report.figures["false_alarms_over_nominal"] = float(np.mean(raised)) / rate
    report.must["false_alarms_over_nominal"] = ("<=", MUST_FALSE)
    print(
        f"without a shift: a finding in {np.mean(raised):.1%} of {len(others):,} held-out requests, "
        f"nominal {rate:.1%}; ANCHOR_SHIFT in {np.mean(shifts):.1%}"
    )
    for size in SIZES:
        found, delays = [], []
        for number in range(times * shifted):
            at = _planted(seed + 2, number)
            outcome = _request(seed + 2, number, size, profile, rate)
            hits = [
                place - at for kind, place in outcome.alarms if kind is Kind.ANCHOR_SHIFT and 0 <= place - at <= WITHIN
            ]
            found.append(float(bool(hits)))
            delays += hits[:1]
        _count(report, f"recall/{size}", found, seed)
        delay = float(np.median(delays)) if delays else math.nan
        report.figures[f"sentences_until_found/{size}"] = delay
        print(f"divergence {size:.1f} bit: found {np.mean(found):6.1%}, after {delay:.0f} sentences")
        if size >= MUST_SIZE:
            report.must[f"recall/{size}"] = (">=", MUST_RECALL)
    report.finish()


def _count(report: Report, name: str, values: list[float], seed: int) -> None:
    report.figures[name] = float(np.mean(values))
    report.ci[name] = bootstrap({str(number): [value] for number, value in enumerate(values)}, seed)


def _planted(seed: int, number: int) -> int:
    """The sentence from which a request rests on another base, prompt included."""
    return PROMPT + int(np.random.default_rng((seed, number, 1)).integers(EARLIEST, LATEST))


def _request(seed: int, number: int, size: float | None, profile: Profile | None, rate: float = RATE) -> Outcome:
    """Draws one request, with a shift of a size or none, and shows it to a panel."""
    panel = Panel(profile, rate)
    alarms = [(alarm.kind, seen.index) for seen in _sentences(seed, number, size) for alarm in panel.update(seen)]
    return Outcome(alarms, {kind: highest.score for kind, highest in panel.highest.items()})


def _sentences(seed: int, number: int, size: float | None) -> Iterator[Observation]:
    draw = np.random.default_rng((seed, number))
    count = int(draw.integers(*SENTENCES))
    at = _planted(seed, number)
    # Anchors are a few of the sentences there are: those of the prompt, and some of the first of the output.
    support = PROMPT + 6
    base = draw.dirichlet(np.full(support, 0.3))
    other = base if size is None else _at_divergence(base, size, draw)
    for index in range(PROMPT, PROMPT + count):
        anchors = (base if index < at else other)[: max(0, index - ANCHOR_GAP + 1)]
        mass = np.zeros(index + 1)
        if anchors.sum() > 0:
            blurred = draw.dirichlet(CONCENTRATION * anchors / anchors.sum() + 1e-3)
            mass[: len(blurred)] = FAR_MASS * blurred
        entering = index - ANCHOR_GAP + 1
        if entering > support:
            mass[draw.integers(support, entering, 3)] += 0.02 * draw.random(3)
        mass[index] = 1 - mass.sum()
        rows = int(draw.integers(3, 8))
        yield Observation(
            prompt=PROMPT,
            index=index,
            mass=SparseMass.of(mass),
            roles=np.array([Role.USER] * PROMPT + [Role.REASONING] * (index + 1 - PROMPT), np.uint8),
            starts=TOKENS * np.arange(index + 1),
            rows=rows,
            lags=draw.integers(8, TOKENS * index, (rows, FAR_KEYS)),
            lag_mass=np.full((rows, FAR_KEYS), 0.05),
        )


def _at_divergence(base: Floats, size: float, draw: np.random.Generator) -> Floats:
    """A distribution at a divergence of `size` bits from `base`: a mixture of it with a drawn one, or that one."""
    far = draw.dirichlet(np.full(len(base), 0.3))
    while jensen_shannon(base, far) < size:
        far = draw.dirichlet(np.full(len(base), 0.3))
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if jensen_shannon(base, (1 - middle) * base + middle * far) < size:
            low = middle
        else:
            high = middle
    return (1 - high) * base + high * far


if __name__ == "__main__":
    run(main)
