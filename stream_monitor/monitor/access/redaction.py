"""Text is left out of what is answered to principals without the right to read it, and the answer says so."""

from stream_monitor.monitor.access.rights import NO_TEXT_RIGHT, Principal, Right
from stream_monitor.v1alpha1 import monitor_pb2


def of_event(event: monitor_pb2.Event, principal: Principal) -> monitor_pb2.Event:
    """The event as the principal may see it; a copy where that is less than all."""
    if principal.may(Right.READ_TEXT, event.tenant):
        return event
    copy = monitor_pb2.Event()
    copy.CopyFrom(event)
    _strip_event(copy)
    return copy


def of_trace(trace: monitor_pb2.GetTraceResponse, principal: Principal) -> None:
    """Leaves out, in place, what the principal may not read."""
    if principal.may(Right.READ_TEXT, trace.info.tenant):
        return
    of_info(trace.info, principal)
    for sentence in trace.sentences:
        sentence.text = ""
    for event in trace.events:
        _strip_event(event)


def of_info(info: monitor_pb2.RequestInfo, principal: Principal) -> None:
    """Leaves out, in place, what the principal may not read."""
    if principal.may(Right.READ_TEXT, info.tenant):
        return
    if info.HasField("top_anchor"):
        info.top_anchor.sentence.text = ""
    # That there is none anyway is the better reason.
    info.no_text_reason = info.no_text_reason or NO_TEXT_RIGHT


def _strip_event(event: monitor_pb2.Event) -> None:
    for sentence in (event.sentence, event.began, *(one.sentence for one in (*event.from_anchors, *event.to_anchors))):
        if sentence.text:
            sentence.text = ""
    event.no_text_reason = NO_TEXT_RIGHT
