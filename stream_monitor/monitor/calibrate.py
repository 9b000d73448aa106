"""`stream-monitor calibrate`: a profile from the requests that a running monitor holds."""

import time
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import grpc
import numpy as np

from stream_monitor.anchors.calibration import Served, calibrated
from stream_monitor.anchors.heads import HeadShares
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.client import Monitor, MonitorError, Target
from stream_monitor.monitor.labels import read_joints, read_labels
from stream_monitor.monitor.probes import Asked, Fitted, Labels, kept, named, shift_probe, untrusted_probe
from stream_monitor.v1alpha1 import monitor_pb2

MOST_REQUESTS = 4096
"""Newest requests that a profile is made of: their attention by head is held in memory, some 200 kB each."""


def calibrate(
    target: Target,
    out: Path,
    model_name: str,
    trim: float,
    injections: Path | None = None,
    joints: Path | None = None,
    probe_of: Path | None = None,
) -> str:
    """Writes the profile `out`; what to tell the operator.

    Args:
        target: the monitor.
        out: file to write.
        model_name: of the requests to take; empty if the monitor holds those of one model alone.
        trim: share of the requests whose highest scores are left out.
        injections: labels (`labels.py`) to which the probe of UNTRUSTED_ANCHOR is fitted. The requests that they name
            are no ordinary traffic, and count for nothing else.
        joints: the same for the probe of ANCHOR_SHIFT.
        probe_of: a profile whose probes are kept where none is fitted.

    Raises:
        MonitorError: the monitor cannot be asked.
        ProfileError: there is nothing to calibrate from or to fit a probe to, the requests are of several models or
            captures, or `probe_of` does not fit them.
    """
    labels = Labels(read_labels(injections) if injections else {}, read_joints(joints) if joints else {})
    with Monitor(target) as monitor:
        whole = filter(_is_whole, monitor.list_requests(model_name=model_name))
        held = list(whole if injections or joints else islice(whole, MOST_REQUESTS))
        infos = [info for info in held if not labels.name(info)][:MOST_REQUESTS]
        infos += [info for info in held if labels.name(info)]
        kinds = sorted({(info.model_name, info.capture) for info in infos})
        if len(kinds) > 1:
            models = sorted({name for name, _ in kinds})
            raise ProfileError(
                f"the monitor holds requests of several models ({', '.join(models)}); name one with --model-name"
                if len(models) > 1
                else f"{models[0]} is captured in {len(kinds)} ways; restart the monitor after a change of the capture"
            )
        if model_name and not infos:
            others = sorted({info.model_name for info in filter(_is_whole, monitor.list_requests())})
            held_of = f"; it holds some of {', '.join(others)}" if others else ""
            raise ProfileError(f"the monitor holds no finished request of {model_name} that was captured{held_of}")
        asked = [(info, request) for info in infos if (request := _asked(monitor, info)) is not None]
    requests = [request for info, request in asked if not labels.name(info)]
    if not requests:
        raise ProfileError("the monitor holds no finished request that was captured; send it some traffic first")
    untrusted, shift = _probes(kinds[0][0], asked, labels, probe_of)
    profile = calibrated(*kinds[0], int(time.time()), requests, trim, untrusted.probe, shift.probe)
    profile.write(out)
    return _told(profile, out, [untrusted.told, shift.told])


def _probes(model_name: str, asked: Asked, labels: Labels, probe_of: Path | None) -> tuple[Fitted, Fitted]:
    """Of UNTRUSTED_ANCHOR and of ANCHOR_SHIFT."""
    untrusted = Fitted(None, "  untrusted_anchor: by the same heads, without a probe")
    shift = Fitted(None, "  anchor_shift: without a probe")
    if probe_of:
        earlier = kept(probe_of, model_name, asked)
        if earlier.probe:
            told = f"  untrusted_anchor: by the probe of {len(earlier.probe.heads)} heads of {probe_of}"
            untrusted = Fitted(earlier.probe, told)
        if earlier.shift_probe:
            told = f"  anchor_shift: by the probe of {len(earlier.shift_probe.heads)} heads of {probe_of}, too"
            shift = Fitted(earlier.shift_probe, told)
    return (
        untrusted_probe(asked, labels.injections) if labels.injections else untrusted,
        shift_probe(asked, labels.joints) if labels.joints else shift,
    )


def _is_whole(info: monitor_pb2.RequestInfo) -> bool:
    """Whether a request ended and was captured by all ranks, so that its highest scores are those it should have."""
    return (
        info.state == monitor_pb2.REQUEST_STATE_FINISHED
        and not info.refused_reason
        and not info.missing_ranks
        and info.rows_kept > 0
    )


def _asked(monitor: Monitor, info: monitor_pb2.RequestInfo) -> Served | None:
    """What the monitor holds of a request; None if it is gone by now, or kept without its heads."""
    key = info.key
    try:
        trace = monitor.get_trace(key.request_id, engine_instance=key.engine_instance, with_heads=True).message
    except MonitorError as error:
        if error.code is grpc.StatusCode.NOT_FOUND:
            return None
        raise
    return served(trace) if trace.head_row else None


def served(trace: monitor_pb2.GetTraceResponse) -> Served:
    """A trace that was asked for with its heads, as calibration takes it."""
    rows = np.frombuffer(trace.captured_rows, "<u4").astype(np.int64)
    of_entry = np.frombuffer(trace.head_row, "<u4")
    columns = np.frombuffer(trace.head_column, "<u4")
    heads = np.frombuffer(trace.head_index, np.uint8)
    shares = np.frombuffer(trace.head_share, "<f4")
    prompt = sum(one.first_token < trace.info.prompt_tokens for one in trace.sentences)
    output = [index for index in range(prompt, len(rows)) if rows[index]]
    edges = np.searchsorted(of_entry, [*output, len(rows)]).tolist()
    # The head by head rows are the output's, but for the opening's, which is the prompt's last.
    before = HeadShares(heads[: edges[0]], columns[: edges[0]], shares[: edges[0]])
    lock = [one.highest for one in trace.info.scores if one.kind == monitor_pb2.EVENT_KIND_ANCHOR_LOCK]
    return Served(
        prompt=prompt,
        heads=[(one.head.layer, one.head.query_head) for one in trace.heads],
        roles=np.array([one.role for one in trace.sentences], np.uint8),
        starts=np.array([one.first_token for one in trace.sentences], np.int64),
        rows=rows,
        shares=[
            (index, HeadShares(heads[start:end], columns[start:end], shares[start:end]))
            for index, (start, end) in zip(output, pairwise(edges), strict=True)
        ],
        lock=lock[0] if lock else None,
        opening=(prompt - 1, before) if edges[0] else None,
    )


def _told(profile: Profile, out: Path, probes: Sequence[str]) -> str:
    lines = [f"{out}: {profile.model_name}, capture {profile.capture}, {profile.requests} requests"]
    lines += [_heads_told(profile), *probes]
    for kind, scores in profile.highest.items():
        lines.append(
            f"  {kind}: {len(scores)} requests could be scored, the highest {scores[-1]:.3g}"
            if scores
            else f"  {kind}: no request could be scored; it will not be raised"
        )
    lines.append(f"the lowest false_alarm_rate that these requests can tell of is {_lowest_rate(profile):.2g}")
    if profile.trimmed:
        lines.append(
            f"the {profile.trimmed} highest scores of each detector are left out: live traffic may hold what is looked "
            "for. If it does not, more findings will be raised without cause than the rate says"
        )
    else:
        lines.append("nothing is left out: if some of these requests hold what is looked for, findings will be missed")
    return "\n".join(lines)


def _lowest_rate(profile: Profile) -> float:
    detectors: Sequence[str] = [kind for kind in profile.highest if profile.can_raise(kind)]
    return len(detectors) / (profile.requests - profile.trimmed + 1)


def _heads_told(profile: Profile) -> str:
    if profile.reliability is None:
        return "  heads: the requests are too short or too few to tell receiver heads; all count alike"
    alike = f"between two halves of the requests the heads' kurtosis correlates with {profile.reliability:.2f}"
    if not profile.receivers:
        return f"  heads: {alike}, too little to choose by; all count alike"
    told = named(profile.receivers)
    return f"  heads: {alike}; {len(profile.receivers)} receiver heads count (layer.head): {told}"
