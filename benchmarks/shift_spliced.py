"""Is the joint of two unrelated reasoning traces found, and how often is a shift found where there is none?

A request is a problem and `SENTENCES` sentences of recorded reasoning about it (`spliced_texts.py`). Behind a known
sentence the reasoning goes on with that of another problem, or, as controls, as it was, or as it was behind a neutral
sentence. A real model reads each of them, and its rows go through the monitor, at default settings unless others are
asked for. For each problem in turn a profile is made of the untouched requests of all others, as `stream-monitor
calibrate` makes it, with a probe fitted to their joints (`joint_profiles.py`). Intervals are by trace.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from benchmarks.joint_profiles import Example, Made, without_each
from benchmarks.recording import Recording
from benchmarks.replay import Replay, show
from benchmarks.report import Report, bootstrap, run
from benchmarks.spliced_texts import CUT, SENTENCES, Family, Stretch, families
from stream_monitor.anchors.calibration import Served
from stream_monitor.anchors.matrix import ANCHOR_GAP
from stream_monitor.anchors.panel import Kind, Panel
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.anchors.shift_fitting import WITHIN, Choice
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


class Requests(NamedTuple):
    """A family's."""

    untouched: Seen
    put_in: Seen
    joined: Seen
    more: list[Seen]


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    traces: Annotated[Path, typer.Option(help="JSON lines with the strings prompt and reasoning.")],
    most: Annotated[int, typer.Option(min=1, help="Stretches of each trace.")] = 2,
    more: Annotated[
        int, typer.Option(min=0, help="Joints of each beside the one judged, for probes to learn from.")
    ] = 2,
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
    found = list(families(replay, texts, 6 if full else most, seed, more))
    if len({family.calm.problem for family in found}) < 2:
        raise typer.BadParameter("the traces must be of two problems at least, with prompts")
    seen = [_read(replay, family) for family in found]
    report = Report(
        benchmark="shift_spliced",
        config={
            "model": model.name,
            "rate": rate,
            "sentences": SENTENCES,
            "more": more,
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
    uncalibrated = [one.untouched.show() for one in seen]
    joined_traces = [one.joined.show() for one in seen]
    profiles = _profiles(seen, uncalibrated, joined_traces, rate)
    counts, delays = _by_profiles(seen, {problem: made.profile for problem, made in profiles.items()}, rate)
    choices = [made.choice for made in profiles.values() if isinstance(made.choice, Choice)]
    for name in ("area", "least", "found") if choices else ():
        report.figures[f"probe/{name}"] = float(np.mean([getattr(choice, name) for choice in choices]))
    report.figures["probe/made"] = float(np.mean([made.profile.shift_probe is not None for made in profiles.values()]))
    for name, found_in in counts.items():
        report.figures[name] = found_in.mean()
        report.ci[name] = bootstrap(found_in.by_text, seed)
        print(f"{name:<28}{found_in.mean():>7.1%} of {found_in.count()}")
    calm = counts["false_alarms_any"]
    report.figures["false_alarms_per_1000_requests"] = 1000 * calm.mean()
    report.figures["false_alarms_over_nominal"] = calm.mean() / rate
    # As the output grows, both change by themselves.
    joints = [_joint(one.joined, trace) for one, trace in zip(seen, joined_traces, strict=True)]
    undisturbed = _around(zip((one.untouched for one in seen), joints, strict=True))
    for name, (before, behind) in _around(zip((one.joined for one in seen), joints, strict=True)).items():
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
    seen: Sequence[Requests], untouched: Sequence[RequestTrace], joined: Sequence[RequestTrace], rate: float
) -> Mapping[int, Made]:
    """For each problem one that is made of all others."""
    examples = []
    for one, calm, with_joint in zip(seen, untouched, joined, strict=True):
        pairs = [(one.joined, with_joint), *((more, more.show()) for more in one.more)]
        joints = [(_served(trace), _joint(request, trace)) for request, trace in pairs]
        examples.append(Example(one.untouched.stretch.problem, _served(calm), joints))
    profiles = without_each(examples, untouched[0].labels[0], untouched[0].capture)
    try:
        for problem, made in profiles.items():
            made.profile.check(rate)
            print(f"problem {problem}: {_told(made)}", flush=True)
    except ProfileError as error:
        raise typer.BadParameter(f"{error}: take --full, more stretches (--most) or a higher --rate") from error
    return profiles


def _by_profiles(
    seen: Sequence[Requests], profiles: Mapping[int, Profile], rate: float
) -> tuple[dict[str, _Counts], list[int]]:
    """Requests in which something is found, by what it is and where; and sentences from each joint until it is."""
    counts: defaultdict[str, _Counts] = defaultdict(_Counts)
    delays: list[int] = []
    for one in seen:
        profile = profiles[one.untouched.stretch.problem]
        trace = one.joined.show(profile, rate)
        found_after = _delays(one.joined, trace)
        delays += found_after[:1]
        alarms = list(one.untouched.show(profile, rate).findings)
        counts["recall"].add(one.joined, bool(found_after))
        counts["false_alarms_any"].add(one.untouched, bool(alarms))
        shifts = [event for event in alarms if _kind(event) is Kind.ANCHOR_SHIFT]
        counts["false_alarms_shift"].add(one.untouched, bool(shifts))
        counts["false_alarms_probe"].add(one.untouched, any(event.by_probe for event in shifts))
        counts["raised_at_neutral_sentence"].add(one.put_in, bool(_delays(one.put_in, one.put_in.show(profile, rate))))
        others = {_kind(event) for event in trace.findings} - {Kind.ANCHOR_SHIFT}
        counts["other_findings_in_joined"].add(one.joined, bool(others))
    return dict(counts), delays


def _read(replay: Replay, family: Family) -> Requests:
    """In an order in which most of each is read already."""

    def read(part: Stretch) -> Seen:
        return Seen(part, replay.record(part.ids, part.prompt_tokens))

    return Requests(read(family.calm), read(family.neutral), read(family.joined), list(map(read, family.more)))


def _served(trace: RequestTrace) -> Served:
    return served(views.full(trace, with_heads=True))


def _told(made: Made) -> str:
    profile, choice = made
    heads = ", ".join(f"{layer}.{head}" for layer, head in profile.receivers) or "all alike"
    reliability = "unknown" if profile.reliability is None else f"{profile.reliability:.2f}"
    told = f"profile of {profile.requests} requests: receiver heads {heads}; reliability {reliability}"
    if not isinstance(choice, Choice):
        return f"{told}; no probe: {choice}"
    return (
        f"{told}; {'a' if choice.probe else 'no'} probe, AUROC {choice.area:.2f}, at least {choice.least:.2f}, "
        f"{choice.found:.0%} above nine of ten"
    )


def _kind(event: monitor_pb2.Event) -> Kind:
    return Kind[monitor_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")]


def _delays(seen: Seen, trace: RequestTrace) -> list[int]:
    """Sentences from the one at which something was put in or joined to each ANCHOR_SHIFT, of at most `WITHIN`."""
    shifts = [event.sentence.index for event in trace.findings if _kind(event) is Kind.ANCHOR_SHIFT]
    at = _joint(seen, trace)
    return [place - at for place in shifts if 0 <= place - at <= WITHIN]


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
        for seen in _served(one.show()).observations(()):
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
    return float(np.mean([any(_kind(event) is Kind.ANCHOR_SHIFT for event in one.findings) for one in traces]))


if __name__ == "__main__":
    run(main)
