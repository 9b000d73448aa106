"""The probes of a profile: fitted to labelled requests that a monitor holds, or kept of an earlier profile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from stream_monitor.anchors import shift_fitting, untrusted_fitting
from stream_monitor.anchors.calibration import Served
from stream_monitor.anchors.heads import Head
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.monitor.labels import JointLabel, Label
from stream_monitor.v1alpha1 import monitor_pb2

_T = TypeVar("_T")

Asked = Sequence[tuple[monitor_pb2.RequestInfo, Served]]
"""Requests that were asked for."""


@dataclass(frozen=True)
class Labels:
    """What an operator says of requests, by their id, internal or external; empty without a file.

    Attributes:
        injections: to which the probe of UNTRUSTED_ANCHOR is fitted.
        joints: to which that of ANCHOR_SHIFT is.
    """

    injections: Mapping[str, Label]
    joints: Mapping[str, JointLabel]

    def name(self, info: monitor_pb2.RequestInfo) -> bool:
        """Whether anything is said of this request."""
        return _of(info, self.injections) is not None or _of(info, self.joints) is not None


class Fitted(NamedTuple):
    """The probe of one detector, None without, and what to tell of it."""

    probe: Probe | None
    told: str


def untrusted_probe(asked: Asked, labels: Mapping[str, Label]) -> Fitted:
    """Of UNTRUSTED_ANCHOR. Raises ProfileError where the labels do not do."""
    named = [
        untrusted_fitting.Labelled(request, label.group, label.wording)
        for info, request in asked
        if (label := _of(info, labels)) is not None
    ]
    choice = untrusted_fitting.choose(named)

    def told(areas: Mapping[str, float]) -> str:
        return ", ".join(f"{area:.2f} against {group}" for group, area in areas.items())

    lines = [f"  untrusted_anchor: {len(named)} of {len(labels)} labelled requests are held and captured"]
    if choice.probe:
        lines.append(f"    by a probe of {len(choice.probe.heads)} heads, which tells followed injections better")
    else:
        lines.append("    by the same heads: a probe tells no better, or no more than chance explains")
    lines.append(f"    AUROC of probes fitted to half of the wordings, on the others: {told(choice.held_out)}")
    lines.append(f"    AUROC of all heads alike: {told(choice.alike)}")
    lines.append(f"    where probes tell worst, at least {choice.least:.2f}; what tells nothing has 0.50")
    return Fitted(choice.probe, "\n".join(lines))


def shift_probe(asked: Asked, labels: Mapping[str, JointLabel]) -> Fitted:
    """Of ANCHOR_SHIFT. Raises ProfileError where the labels do not do."""
    named = [
        shift_fitting.Labelled(request, label.subject, _sentence(request, label.token))
        for info, request in asked
        if (label := _of(info, labels)) is not None
    ]
    choice = shift_fitting.choose(named)
    lines = [f"  anchor_shift: {len(named)} of {len(labels)} labelled requests are held and captured"]
    if choice.probe:
        lines.append(f"    by a probe of {len(choice.probe.heads)} heads, too, which tells changes of subject")
    else:
        lines.append("    without a probe: it tells no more than chance explains")
    lines.append(
        f"    on subjects that a probe was not fitted to, {choice.found:.0%} of the changes score above nine of ten "
        f"requests without one; AUROC {choice.area:.2f}, at least {choice.least:.2f}"
    )
    return Fitted(choice.probe, "\n".join(lines))


def kept(path: Path, model_name: str, asked: Asked) -> Profile:
    """An earlier profile, whose probes fit the requests. Raises ProfileError where it has none, or they do not."""
    earlier = Profile.read(path)
    if earlier.model_name != model_name:
        raise ProfileError(f"{path} is a profile of {earlier.model_name}; the requests are of {model_name}")
    if earlier.probe is None and earlier.shift_probe is None:
        raise ProfileError(f"{path} has no probe; fit one with --injections or --joints")
    captured = {head for _, request in asked for head in request.heads}
    heads = [head for probe in (earlier.probe, earlier.shift_probe) if probe for head in probe.heads]
    if absent := [head for head in heads if head not in captured]:
        raise ProfileError(
            f"head {named(absent)} (layer.head) of {path} is not captured; watch it (settings layers, heads and "
            "max_heads), or fit a new probe with --injections or --joints"
        )
    return earlier


def named(heads: Sequence[Head]) -> str:
    """Heads for people: layer.head, layer.head."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def _of(info: monitor_pb2.RequestInfo, labels: Mapping[str, _T]) -> _T | None:
    return labels.get(info.key.request_id) or labels.get(info.external_id)


def _sentence(request: Served, token: int | None) -> int | None:
    """The sentence that begins with this token, or, where none does, the one that holds it."""
    return None if token is None else int(np.searchsorted(request.starts, token, side="right")) - 1
