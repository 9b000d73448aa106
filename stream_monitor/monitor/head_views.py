"""A trace head by head, as messages of `monitor.proto`."""

import numpy as np

from stream_monitor.anchors.calibration import output_kurtosis
from stream_monitor.anchors.heads import HeadMatrix, HeadShares, joined
from stream_monitor.anchors.matrix import Mass, Positions, proximity_corrected, vertical_scores
from stream_monitor.anchors.panel import Alarm, Kind
from stream_monitor.anchors.shift_probe import BEFORE, DISTANCES, TOGETHER, ProbedShift, log_reading, moves
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.records import Role
from stream_monitor.v1alpha1 import monitor_pb2

MOST_CARRIERS = 5
_LOOKED_BACK = 64
"""Sentences before a finding that say what a head read until then."""


def add_heads(trace: RequestTrace, response: monitor_pb2.GetTraceResponse, with_matrix: bool) -> None:
    """What `GetTraceResponse` says of heads."""
    receivers, size = set(trace.panel.receivers), len(trace.spans)
    roles = np.array([span.role for span in trace.spans], np.uint8)
    # The opening is no sentence of the output.
    opening = [] if trace.heads.opening is None else [trace.heads.opening]
    whole = HeadMatrix.of([*opening, *trace.heads.sentences()])
    output = whole.after(len(opening))
    every = output_kurtosis(output.vertical_scores(len(trace.heads.heads), size), roles)
    for head, kurtosis in zip(trace.heads.heads, every, strict=True):
        response.heads.append(monitor_pb2.TraceHead(head=_head(*head), kurtosis=kurtosis, receiver=head in receivers))
    matrix = output.mean_over(trace.heads.weights(trace.panel.receivers), size)
    observed = np.zeros(size, bool)
    observed[output.numbers] = True
    response.receiver_score = vertical_scores(*matrix, observed).astype("<f4").tobytes()
    response.corrected_score = proximity_corrected(*matrix, observed).astype("<f4").tobytes()
    if with_matrix:
        heads, read, given = whole.entries
        response.head_row = np.repeat(whole.numbers.astype("<u4"), np.diff(whole.edges)).tobytes()
        response.head_column = read.astype("<u4", copy=False).tobytes()
        response.head_index = heads.tobytes()
        response.head_share = given.astype("<f4", copy=False).tobytes()


def clear_heads(response: monitor_pb2.GetTraceResponse) -> None:
    """Take the matrices of single heads out, by far the largest part of a trace that has them."""
    for field in ("head_row", "head_column", "head_index", "head_share"):
        response.ClearField(field)


def carriers(trace: RequestTrace, alarm: Alarm, anchors: Positions, shares: HeadShares) -> list[monitor_pb2.HeadShare]:
    """The heads that carry a finding; see `Event.heads`.

    Args:
        trace: with the sentences before the finding's and that one, `shares`, as the newest.
        alarm: the finding.
        anchors: its `to_anchors`, numbers of sentences, ascending.
        shares: of its sentence.
    """
    count = len(trace.heads.heads)
    if alarm.kind is Kind.ANCHOR_SHIFT and (detector := trace.panel.probed_shift) and alarm.by_probe:
        part = _moved(trace, detector)
    elif alarm.kind is Kind.PROMPT_DETACHMENT:
        prompt = trace.spans[: trace.prompt_sentences]
        user = np.array([index for index, span in enumerate(prompt) if span.role == Role.USER], np.int64)
        part = (_before(trace, user, count) - shares.on(user, count)).sum(1)
    elif alarm.kind is Kind.ANCHOR_SHIFT:
        part = np.maximum(shares.on(anchors, count) - _before(trace, anchors, count), 0).sum(1)
    else:
        part = shares.on(anchors, count).sum(1)
    if alarm.kind is Kind.UNTRUSTED_ANCHOR and (probe := trace.panel.probe) and alarm.by_probe:
        part *= trace.heads.probed(probe)
    part = np.maximum(part, 0)
    total = part.sum()
    heaviest = np.argsort(-part, kind="stable")[:MOST_CARRIERS]
    return [
        monitor_pb2.HeadShare(head=_head(*trace.heads.heads[place]), share=part[place] / total)
        for place in heaviest.tolist()
        if part[place] > 0
    ]


def _moved(trace: RequestTrace, detector: ProbedShift) -> Mass:
    """What each head adds to the score of the shift's probe, float64 [heads]."""
    count = len(trace.heads.heads)
    seen = trace.heads.newest(BEFORE + TOGETHER)
    (move,) = moves(np.array([log_reading(index, shares, count) for index, shares in seen]), detector.rows)
    return np.asarray((trace.heads.probed(detector.probe) * move).reshape(DISTANCES, count).sum(0))


def _before(trace: RequestTrace, columns: Positions, count: int) -> Mass:
    """Each head's mean share on each of these sentences, of the sentences before the newest: [count, columns]."""
    seen = [found for _, found in trace.heads.newest(_LOOKED_BACK + 1)[:-1]]
    heads, read, shares = joined(seen)
    there = np.isin(read, columns)
    cells = heads[there].astype(np.int64) * len(columns) + columns.searchsorted(read[there])
    total = np.bincount(cells, shares[there], count * len(columns)).reshape(count, len(columns))
    return total / max(1, len(seen))


def _head(layer: int, query_head: int) -> monitor_pb2.Head:
    return monitor_pb2.Head(layer=layer, query_head=query_head)
