"""Traces as the messages of `monitor.proto`."""

from collections.abc import Iterable

import numpy as np

from stream_monitor.anchors.heads import HeadShares
from stream_monitor.anchors.matrix import AnchorShare, SparseMass, vertical_scores
from stream_monitor.anchors.panel import MOST_ANCHORS, Alarm, Kind
from stream_monitor.monitor.head_views import add_heads, carriers
from stream_monitor.monitor.identity import parse
from stream_monitor.monitor.text import shortened
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.v1alpha1 import monitor_pb2

EVENT_TEXT = 240
"""Characters of a sentence's text in events and lists, of which many thousands are held."""


def trace_key(trace: RequestTrace) -> monitor_pb2.TraceKey:
    """Names the trace."""
    return monitor_pb2.TraceKey(
        engine_instance=trace.instance, request_id=trace.request_id, sample_index=trace.identity.sample_index
    )


def sentence(trace: RequestTrace, index: int) -> monitor_pb2.Sentence:
    """Sentence `index` of the trace, with the beginning of its text if that is known."""
    whole = whole_sentence(trace, index)
    whole.text = shortened(whole.text, EVENT_TEXT)
    return whole


def whole_sentence(trace: RequestTrace, index: int) -> monitor_pb2.Sentence:
    """Sentence `index` of the trace, with all of its text if that is known."""
    span = trace.spans[index]
    text = trace.text.between(span.start, span.end)
    found = monitor_pb2.Sentence(index=index, first_token=span.start, end_token=span.end, text=text)
    found.role = span.role  # type: ignore[assignment]
    return found


def anchors(trace: RequestTrace, shares: Iterable[AnchorShare]) -> list[monitor_pb2.Anchor]:
    """The same with what is known of the sentences."""
    return [monitor_pb2.Anchor(sentence=sentence(trace, index), share=share) for index, share in shares]


def info(trace: RequestTrace) -> monitor_pb2.RequestInfo:
    """The request in short."""
    state = monitor_pb2.REQUEST_STATE_CUT if trace.cut else monitor_pb2.REQUEST_STATE_RUNNING
    if trace.finished:
        state = monitor_pb2.REQUEST_STATE_FINISHED
    top = trace.top_anchor
    return monitor_pb2.RequestInfo(
        key=trace_key(trace),
        external_id=trace.identity.external_id,
        model_name=trace.labels[0],
        engine=trace.labels[1],
        state=state,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        sentences=len(trace.spans),
        rows_kept=trace.token_rows,
        events=trace.finding_count,
        first_seen_ns=trace.first_seen_ns,
        last_seen_ns=trace.last_seen_ns,
        top_anchor=monitor_pb2.Anchor(sentence=sentence(trace, top[0]), share=top[1]) if top else None,
        refused_reason=trace.refused_reason,
        missing_ranks=sorted(trace.missing_ranks),
        scores=scores(trace),
        capture=trace.capture,
        no_text_reason=trace.text.reason,
        joined_late=trace.joined_late,
        tenant=trace.tenant,
    )


def full(trace: RequestTrace, with_heads: bool = False) -> monitor_pb2.GetTraceResponse:
    """The whole trace with its matrix, and that of every head if asked for."""
    matrix = trace.matrix()
    rows, columns, shares = matrix.rows, matrix.columns, matrix.shares
    positions, attempts = trace.rows.token_row_keys()
    response = monitor_pb2.GetTraceResponse(
        info=info(trace),
        sentences=[whole_sentence(trace, index) for index in range(len(trace.spans))],
        matrix_row=rows.astype("<u4").tobytes(),
        matrix_column=columns.astype("<u4").tobytes(),
        matrix_share=shares.astype("<f4").tobytes(),
        unobserved_share=matrix.unobserved.astype("<f4").tobytes(),
        captured_rows=matrix.captured.astype("<u4").tobytes(),
        vertical_score=vertical_scores(rows, columns, shares, matrix.captured > 0).astype("<f4").tobytes(),
        row_positions=np.array(positions, "<u4").tobytes(),
        row_attempts=np.array(attempts, "<u4").tobytes(),
        events=trace.findings,
    )
    add_heads(trace, response, with_heads)
    return response


def event_ids(event: monitor_pb2.Event) -> frozenset[str]:
    """Every id a subscriber may have named the event's request by."""
    return parse(event.key.request_id).aliases | {event.key.request_id, event.external_id}


def progress_event(trace: RequestTrace, kind: monitor_pb2.EventKind.ValueType, now_ns: int) -> monitor_pb2.Event:
    """A request started or finished."""
    if kind == monitor_pb2.EVENT_KIND_REQUEST_STARTED:
        summary = f"started with {trace.prompt_tokens} prompt tokens"
        if trace.refused_reason:
            summary += f"; not captured: {trace.refused_reason}"
    else:
        summary = f"finished after {trace.total_tokens} tokens with {trace.finding_count} findings"
    return monitor_pb2.Event(
        kind=kind,
        severity=monitor_pb2.SEVERITY_INFO,
        key=trace_key(trace),
        external_id=trace.identity.external_id,
        model_name=trace.labels[0],
        engine=trace.labels[1],
        wall_time_ns=now_ns,
        summary=summary,
        tenant=trace.tenant,
    )


def sentence_closed(trace: RequestTrace, index: int) -> monitor_pb2.Event:
    """No more of `sentence_event` than when it was and whose it is."""
    return monitor_pb2.Event(
        kind=monitor_pb2.EVENT_KIND_SENTENCE_CLOSED,
        key=trace_key(trace),
        external_id=trace.identity.external_id,
        model_name=trace.labels[0],
        engine=trace.labels[1],
        closed_time_ns=trace.closed_ns(index),
    )


def sentence_event(
    trace: RequestTrace, index: int, mass: SparseMass, unobserved: float, now_ns: int
) -> monitor_pb2.Event:
    """A sentence of the output was closed and all its rows are in; `mass` is its candidates'."""
    return _closed(trace, index, mass.ranked(MOST_ANCHORS), unobserved, now_ns)


def _closed(
    trace: RequestTrace, index: int, rests_on: Iterable[AnchorShare], unobserved: float, now_ns: int
) -> monitor_pb2.Event:
    event = progress_event(trace, monitor_pb2.EVENT_KIND_SENTENCE_CLOSED, now_ns)
    event.sentence.CopyFrom(sentence(trace, index))
    event.to_anchors.extend(anchors(trace, rests_on))
    event.unobserved_share = unobserved
    event.closed_time_ns = trace.closed_ns(index)
    rests = f"rests on sentence {event.to_anchors[0].sentence.index}" if event.to_anchors else "shows no anchor"
    event.summary = f"sentence {index} {rests}"
    return event


def alarm_event(
    trace: RequestTrace, index: int, alarm: Alarm, shares: HeadShares, unobserved: float, now_ns: int
) -> monitor_pb2.Event:
    """A finding at sentence `index`, or the opening, which has these shares by head, right after it was taken in."""
    event = _closed(trace, index, alarm.now, unobserved, now_ns)
    event.kind = getattr(monitor_pb2, f"EVENT_KIND_{alarm.kind.name}")
    event.severity = monitor_pb2.SEVERITY_WARNING
    event.from_anchors.extend(anchors(trace, alarm.before))
    event.score, event.threshold, event.by_probe = alarm.score, alarm.threshold, alarm.by_probe
    if alarm.p_value is not None:
        event.p_value = alarm.p_value
    event.began.CopyFrom(sentence(trace, alarm.began))
    moved_to = np.array(sorted(anchor.sentence.index for anchor in event.to_anchors), np.int64)
    event.heads.extend(carriers(trace, alarm, moved_to, shares))
    event.summary = _summary(event, index, alarm, opening=index < trace.prompt_sentences)
    return event


def _summary(event: monitor_pb2.Event, index: int, alarm: Alarm, opening: bool) -> str:
    """One sentence for people."""
    rare = "" if alarm.p_value is None else f"; p = {alarm.p_value:.2g}"
    since = f" since sentence {alarm.began}" if alarm.began < index else ""
    to = f"sentence {event.to_anchors[0].sentence.index}" if event.to_anchors else "no sentence in particular"
    if alarm.kind is Kind.ANCHOR_SHIFT:
        origin = f"from sentence {event.from_anchors[0].sentence.index} " if event.from_anchors else ""
        if alarm.by_probe:
            return f"at sentence {index} heads read as where the subject changes{since}, {origin}to {to}{rare}"
        return f"at sentence {index} the anchors moved {origin}to {to}{since} ({alarm.detail}{rare})"
    if alarm.kind is Kind.PROMPT_DETACHMENT:
        return f"at sentence {index} the output looks at the user's prompt less than it did{since}, and at {to}{rare}"
    if alarm.kind is Kind.ANCHOR_LOCK:
        return f"at sentence {index} the output repeats itself: {alarm.detail}{rare}"
    at = "from its first token on" if opening else f"at sentence {index}"
    if alarm.detail:
        return f"{at} the output reads {to}, which is labelled untrusted, {alarm.detail}{rare}"
    return f"{at} the output rests most on {to}, which is labelled untrusted{rare}"


def scores(trace: RequestTrace) -> list[monitor_pb2.DetectorScore]:
    """The request's highest score by each detector that could score it."""
    found = []
    for kind, highest in trace.panel.highest.items():
        if highest.sentence < 0:
            continue
        score = monitor_pb2.DetectorScore(highest=highest.score, sentence=highest.sentence)
        score.kind = getattr(monitor_pb2, f"EVENT_KIND_{kind.name}")
        found.append(score)
    return found
