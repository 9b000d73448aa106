"""What `stream-monitor explain` prints on a narrow screen; of a monitor's own requests in test_findings.py."""

import io

import numpy as np
from rich.console import Console, Group

from stream_monitor.client import Trace
from stream_monitor.monitor.explain import _curve, _finding, _findings
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2

SUMMARY = "at sentence 221 it rests on sentence 219 (91%), which is labelled untrusted (score 2.31, p = 0.0025)"
TEXT = "Then the area of the whole square is the sum of these four, which is 36."


def traced() -> Trace:
    """Three late sentences of a long request, the last of them with a finding."""
    sentences = [
        monitor_pb2.Sentence(
            index=219 + n,
            role=summary_pb2.ROLE_UNTRUSTED,
            first_token=12345 + 30 * n,
            end_token=12375 + 30 * n,
            text=TEXT,
        )
        for n in range(3)
    ]
    # Rows go by the sentence's index.
    scores, rows = np.zeros(222, "<f4"), np.full(222, 30, "<u4")
    scores[219:] = 0.3181, 5e-5, np.nan
    event = monitor_pb2.Event(
        kind=monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR, sentence=sentences[2], began=sentences[2], summary=SUMMARY
    )
    event.to_anchors.add(sentence=sentences[0], share=0.91)
    event.heads.extend(
        monitor_pb2.HeadShare(head=monitor_pb2.Head(layer=20 + n, query_head=11), share=0.2) for n in range(5)
    )
    response = monitor_pb2.GetTraceResponse(
        sentences=sentences, vertical_score=scores.tobytes(), captured_rows=rows.tobytes(), events=[event]
    )
    return Trace.of(response)


def test_numbers_and_findings_are_whole_on_80_columns() -> None:
    trace = traced()
    (event,) = trace.events
    console = Console(file=io.StringIO(), width=80)
    console.print(Group(_curve(trace, event), _findings(trace), _finding(trace, event)))
    text = console.file.getvalue()
    _, heading, *lines = text.splitlines()
    assert heading.split()[:8] == ["sentence", "role", "tokens", "rows", "score", "before", "at", "the"]
    assert lines[0].split()[:5] == ["219", "untrusted", "12345-12374", "30", "0.3181"]
    assert "█" in lines[0]
    assert "91%" in lines[0]
    assert lines[1].split()[:5] == ["220", "untrusted", "12375-12404", "30", "<0.0001"]
    assert lines[2].split()[:5] == ["221", "◀", "untrusted", "12405-12434", "30"]
    assert max(map(len, lines)) <= 80
    told = " ".join(text.split())
    assert f"1. {SUMMARY}" in told
    assert "20.11 (20%), 21.11 (20%), 22.11 (20%), 23.11 (20%), 24.11 (20%)" in told


def test_without_a_finding_there_is_room_for_the_text() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(_curve(traced(), None))
    assert "Then the" in console.file.getvalue()
