"""`stream-monitor calibrate`: a profile from the requests that a running monitor holds."""

import time
from collections import defaultdict
from pathlib import Path

from stream_monitor.anchors.panel import Kind
from stream_monitor.anchors.profile import Profile, ProfileError, make_profile
from stream_monitor.monitor.client import all_requests, asking
from stream_monitor.v1alpha1 import monitor_pb2


def calibrate(target: str, out: Path, model_name: str, trim: float) -> str:
    """Writes the profile `out`; what to tell the operator.

    Args:
        target: address of the monitor.
        out: file to write.
        model_name: of the requests to take; empty if the monitor holds those of one model alone.
        trim: share of the requests whose highest scores are left out.

    Raises:
        MonitorError: the monitor cannot be asked.
        ProfileError: there is nothing to calibrate from, or the requests are of several models or captures.
    """
    with asking(target) as service:
        requests = [info for info in all_requests(service, model_name) if _is_whole(info)]
    kinds = sorted({(info.model_name, info.capture) for info in requests})
    if len(kinds) > 1:
        models = sorted({name for name, _ in kinds})
        raise ProfileError(
            f"the monitor holds requests of several models ({', '.join(models)}); name one with --model-name"
            if len(models) > 1
            else f"{models[0]} is captured in {len(kinds)} ways; restart the monitor after a change of the capture"
        )
    if not requests:
        raise ProfileError("the monitor holds no finished request that was captured; send it some traffic first")
    highest: dict[str, list[float]] = defaultdict(list)
    for info in requests:
        for score in info.scores:
            name = monitor_pb2.EventKind.Name(score.kind).removeprefix("EVENT_KIND_")
            highest[Kind[name].value].append(score.highest)
    every = {kind.value: highest[kind.value] for kind in Kind}
    profile = make_profile(*kinds[0], int(time.time()), every, len(requests), trim)
    profile.write(out)
    return _told(profile, out)


def _is_whole(info: monitor_pb2.RequestInfo) -> bool:
    """Whether a request ended and was captured by all ranks, so that its highest scores are those it should have."""
    return (
        info.state == monitor_pb2.REQUEST_STATE_FINISHED
        and not info.refused_reason
        and not info.missing_ranks
        and info.rows_kept > 0
    )


def _told(profile: Profile, out: Path) -> str:
    used = profile.requests - profile.trimmed
    lines = [f"{out}: {profile.model_name}, capture {profile.capture}, {profile.requests} requests"]
    for kind, scores in profile.highest.items():
        lines.append(
            f"  {kind}: {len(scores)} requests could be scored, the highest {scores[-1]:.3g}"
            if scores
            else f"  {kind}: no request could be scored; it will not be raised"
        )
    least = len(profile.highest) / (used + 1)
    lines.append(f"the lowest false_alarm_rate that these requests can tell of is {least:.2g}")
    if profile.trimmed:
        lines.append(
            f"the {profile.trimmed} highest scores of each detector are left out: live traffic may hold what is looked "
            "for. If it does not, more findings will be raised without cause than the rate says"
        )
    else:
        lines.append("nothing is left out: if some of these requests hold what is looked for, findings will be missed")
    return "\n".join(lines)
