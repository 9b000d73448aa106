"""Is the joint of two unrelated reasoning traces found, and how often is a shift found where there is none?

A request is a problem and `SENTENCES` sentences of recorded reasoning about it (`spliced_texts.py`). Behind a known
sentence the reasoning goes on with that of another problem, or, as controls, as it was, or as it was behind a neutral
sentence. A real model reads each of them, and its rows go through the monitor, at default settings unless others are
asked for. For each problem in turn a profile is made of the untouched requests of all others, as `stream-monitor
calibrate` makes it. What a probe fitted to the joints of other problems would find in the same rows stands beside
(`joint_probe.py`). Intervals are by trace.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.joint_probe import LEAST_PROBLEMS, Example, judge
from benchmarks.recording import Recording
from benchmarks.replay import Replay, show
from benchmarks.report import Report, bootstrap, run
from benchmarks.spliced_texts import CUT, SENTENCES, Family, Stretch, families
from stream_monitor.anchors.calibration import Served, calibrated
from stream_monitor.anchors.matrix import ANCHOR_GAP
from stream_monitor.anchors.panel import Kind, Panel
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.config import CaptureSettings, SettingsError
from stream_monitor.monitor import views
from stream_monitor.monitor.calibrate import served
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.tracing.model import load
from stream_monitor.tracing.texts import read_texts
from stream_monitor.v1alpha1 import monitor_pb2

RATE = 0.1
"""Requests without cause in which any finding may be raised; so few requests cannot tell of less."""
WITHIN = 3
"""Sentences behind the joint's first one in which an alarm counts as finding it."""
LOOKED_BEFORE = 8
"""Sentences before the joint that those behind it are held against."""
MUST_RECALL, MUST_FALSE = 0.9, 1.5


@dataclass(frozen=True)
class Seen:
    """A request that was read."""

    stretch: Stretch
    recording: Recording

    def show(self, profile: Profile | None = None, rate: float = RATE) -> RequestTrace:
        """Its trace, by this profile."""
        return show(self.recording, Calibration((profile,) if profile else (), rate))


Requests = tuple[Seen, Seen, Seen]
"""Untouched, with a neutral sentence, joined."""


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    traces: Annotated[Path, typer.Option(help="JSON lines with the strings prompt and reasoning.")],
    most: Annotated[int, typer.Option(min=1, help="Stretches of each trace.")] = 2,
    rate: Annotated[float, typer.Option(help="False alarms per request, all detectors together.")] = RATE,
    seed: Annotated[int, typer.Option(help="Of cuts, joints and resamples.")] = 0,
    layers: Annotated[str, typer.Option(help="Layers to watch, as the setting of that name.")] = "auto",
    heads: Annotated[str, typer.Option(help="Heads to watch in each, as the setting.")] = "auto",
    stride: Annotated[
        int, typer.Option(min=1, max=4096, help="One row in so many, as the setting.")
    ] = CaptureSettings().stride,
    full: Annotated[bool, typer.Option("--full", help="Six stretches of each trace.")] = False,
) -> None:
    """Recall at the joint, and false alarms."""
    try:
        replay = Replay(load(str(model)), CaptureSettings(layers=layers, heads=heads, stride=stride))
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error
    texts = read_texts(traces)
    found = list(families(replay, texts, 6 if full else most, seed))
    if len({family.calm.problem for family in found}) < 2:
        raise typer.BadParameter("the traces must be of two problems at least, with prompts")
    seen = [_read(replay, family) for family in found]
    report = Report(
        benchmark="shift_spliced",
        config={
            "model": model.name,
            "rate": rate,
            "sentences": SENTENCES,
            "cut": list(CUT),
            "within": WITHIN,
            "traces": len({family.calm.text for family in found}),
            "problems": len({family.calm.problem for family in found}),
            "stride": stride,
            "layers": replay.layers,
            "heads": replay.heads,
            "full": full,
        },
        seed=seed,
        n=len(found),
        must={"recall": (">=", MUST_RECALL), "false_alarms_over_nominal": ("<=", MUST_FALSE)},
    )
    uncalibrated = [one.show() for one, _, _ in seen]
    requests = [served(views.full(trace, with_heads=True)) for trace in uncalibrated]
    joined_traces = [joined.show() for _, _, joined in seen]
    joints = [_joint(joined, trace) for (_, _, joined), trace in zip(seen, joined_traces, strict=True)]
    profiles = _profiles(seen, requests, uncalibrated[0], rate)
    counts, delays = _by_profiles(seen, profiles, rate)
    counts |= _by_probe(seen, requests, joined_traces, joints, rate)
    for name, found_in in counts.items():
        report.figures[name] = found_in.mean()
        report.ci[name] = bootstrap(found_in.by_text, seed)
        print(f"{name:<28}{found_in.mean():>7.1%} of {found_in.count()}")
    calm = counts["false_alarms_any"]
    report.figures["false_alarms_per_1000_requests"] = 1000 * calm.mean()
    report.figures["false_alarms_over_nominal"] = calm.mean() / rate
    # As the output grows, both change by themselves.
    undisturbed = _around(zip((one for one, _, _ in seen), joints, strict=True))
    for name, (before, behind) in _around(zip((one for _, _, one in seen), joints, strict=True)).items():
        report.figures |= {f"{name}/before": before, f"{name}/behind": behind}
        report.figures[f"{name}/untouched"] = undisturbed[name][1]
        print(
            f"{name:<28}{before:>7.3f} in the sentences before the joint, {behind:.3f} behind it, "
            f"{undisturbed[name][1]:.3f} there in the untouched"
        )
    if delays:
        report.figures["sentences_until_found"] = float(np.median(delays))
    report.figures["uncalibrated/shift_in_calm"] = _raised(uncalibrated)
    report.figures["uncalibrated/shift_in_joined"] = _raised(joined_traces)
    report.finish()


class _Counts:
    """Yes or no, by trace."""

    def __init__(self) -> None:
        self.by_text: dict[str, list[float]] = {}

    def add(self, seen: Seen, yes: bool) -> None:
        self.by_text.setdefault(seen.stretch.text, []).append(float(yes))

    def count(self) -> int:
        return sum(map(len, self.by_text.values()))

    def mean(self) -> float:
        return float(np.mean([value for values in self.by_text.values() for value in values]))


def _profiles(
    seen: Sequence[Requests], requests: Sequence[Served], any_trace: RequestTrace, rate: float
) -> dict[int, Profile]:
    """For each problem one that is made of the untouched requests of all others."""
    profiles = {}
    for problem in sorted({one.stretch.problem for one, _, _ in seen}):
        others = [
            one for one, (untouched, _, _) in zip(requests, seen, strict=True) if untouched.stretch.problem != problem
        ]
        profiles[problem] = calibrated(any_trace.labels[0], any_trace.capture, 0, others)
        _check(profiles[problem], rate)
        print(f"problem {problem}: {_told(profiles[problem])}", flush=True)
    return profiles


def _by_profiles(
    seen: Sequence[Requests], profiles: Mapping[int, Profile], rate: float
) -> tuple[dict[str, _Counts], list[int]]:
    """Requests in which something is found, by what it is and where; and sentences from each joint until it is."""
    counts: defaultdict[str, _Counts] = defaultdict(_Counts)
    delays: list[int] = []
    for untouched, put_in, joined in seen:
        profile = profiles[untouched.stretch.problem]
        trace = joined.show(profile, rate)
        found_after = _delays(joined, trace)
        delays += found_after[:1]
        alarms = list(_alarms(untouched.show(profile, rate)))
        counts["recall"].add(joined, bool(found_after))
        counts["false_alarms_any"].add(untouched, bool(alarms))
        counts["false_alarms_shift"].add(untouched, any(kind is Kind.ANCHOR_SHIFT for kind, _ in alarms))
        counts["raised_at_neutral_sentence"].add(put_in, bool(_delays(put_in, put_in.show(profile, rate))))
        others = {kind for kind, _ in _alarms(trace)} - {Kind.ANCHOR_SHIFT}
        counts["other_findings_in_joined"].add(joined, bool(others))
    return dict(counts), delays


def _by_probe(
    seen: Sequence[Requests],
    untouched: Sequence[Served],
    joined: Sequence[RequestTrace],
    joints: Sequence[int],
    rate: float,
) -> dict[str, _Counts]:
    """The same by a probe; empty where none can be fitted."""
    examples = [
        Example(one.stretch.problem, request, served(views.full(trace, with_heads=True)), joint)
        for (one, _, _), request, trace, joint in zip(seen, untouched, joined, joints, strict=True)
    ]
    counts: defaultdict[str, _Counts] = defaultdict(_Counts)
    for (one, _, _), found in zip(seen, judge(examples, rate, WITHIN), strict=True):
        if found is not None:
            counts["probe/recall"].add(one, found.hit)
            counts["probe/false_alarms"].add(one, found.false)
    if not counts:
        print(f"no probe: it takes joints of {LEAST_PROBLEMS} problems, each between sentences that were captured")
    return dict(counts)


def _read(replay: Replay, family: Family) -> Requests:
    """Untouched, with the neutral sentence, joined: in this order most of each is read already."""
    parts = (family.calm, family.neutral, family.joined)
    calm, neutral, joined = (Seen(part, replay.record(part.ids, part.prompt_tokens)) for part in parts)
    return calm, neutral, joined


def _check(profile: Profile, rate: float) -> None:
    try:
        profile.check(rate)
    except ProfileError as error:
        raise typer.BadParameter(f"{error}: take --full, more stretches (--most) or a higher --rate") from error


def _told(profile: Profile) -> str:
    heads = ", ".join(f"{layer}.{head}" for layer, head in profile.receivers) or "all alike"
    reliability = "unknown" if profile.reliability is None else f"{profile.reliability:.2f}"
    return f"profile of {profile.requests} requests: receiver heads {heads}; reliability {reliability}"


def _alarms(trace: RequestTrace) -> Iterator[tuple[Kind, int]]:
    for event in trace.findings:
        yield Kind[monitor_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")], event.sentence.index


def _delays(seen: Seen, trace: RequestTrace) -> list[int]:
    """Sentences from the one at which something was put in or joined to each ANCHOR_SHIFT, of at most `WITHIN`."""
    at = _joint(seen, trace)
    return [place - at for kind, place in _alarms(trace) if kind is Kind.ANCHOR_SHIFT and 0 <= place - at <= WITHIN]


def _joint(seen: Seen, trace: RequestTrace) -> int:
    assert seen.stretch.at is not None
    return next(index for index, span in enumerate(trace.spans) if span.end > seen.stretch.at)


def _around(places: Iterable[tuple[Seen, int]]) -> dict[str, tuple[float, float]]:
    """What ANCHOR_SHIFT is shown, all heads alike, on average over `LOOKED_BEFORE` sentences before a place, the
    joint's sentence, and over those in which it should be found: the divergence in bits, and the share of attention on
    what may be an anchor."""
    divergence: dict[bool, list[float]] = {False: [], True: []}
    mass: dict[bool, list[float]] = {False: [], True: []}
    for one, at in places:
        panel = Panel()
        for seen in served(views.full(one.show(), with_heads=True)).observations(()):
            panel.update(seen)
            if at - LOOKED_BEFORE <= seen.index <= at + WITHIN and Kind.ANCHOR_SHIFT in panel.values:
                divergence[seen.index >= at].append(panel.values[Kind.ANCHOR_SHIFT][1])
                mass[seen.index >= at].append(seen.mass.before(seen.index - ANCHOR_GAP + 1).total)
    return {
        name: (float(np.mean(found[False])), float(np.mean(found[True])))
        for name, found in (("divergence", divergence), ("anchor_mass", mass))
    }


def _raised(traces: Sequence[RequestTrace]) -> float:
    """Share of requests in which ANCHOR_SHIFT is raised by its own threshold, without a profile."""
    return float(np.mean([any(kind is Kind.ANCHOR_SHIFT for kind, _ in _alarms(one)) for one in traces]))


if __name__ == "__main__":
    run(main)
