"""What `stream-monitor watch` shows of events and requests; as a user starts it in tests/test_cli.py."""

import io

from rich.console import Console, Group, RenderableType

from stream_monitor.client import Received
from stream_monitor.monitor.watch import _event_line, _requests_table, plain_line
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2

ID = "chatcmpl-9f3a1c52d7e84b0f9a6e3c1d2b4f5a69"
"""As long as those that vLLM gives."""
SUMMARY = "at sentence 221 the anchors moved from sentences 4 and 17 to sentence 189 (divergence 0.71 bit, p = 0.0025)"


def event(external_id: str, summary: str) -> monitor_pb2.Event:
    return monitor_pb2.Event(
        kind=monitor_pb2.EVENT_KIND_ANCHOR_SHIFT,
        severity=monitor_pb2.SEVERITY_WARNING,
        external_id=external_id,
        wall_time_ns=1_795_852_799_125_000_000,
        summary=summary,
    )


def printed(what: RenderableType, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(Group(what))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_an_event_is_one_line_whatever_its_request_is_called() -> None:
    line = plain_line(Received(event("a\n\x1b[2Jb", "at sentence 7"), "cursor", 0, ""))
    assert line == "2026-11-28T07:59:59.125+00:00 a \ufffd[2Jb ANCHOR_SHIFT WARNING at sentence 7"


def test_a_line_says_how_many_events_before_it_were_lost() -> None:
    line = plain_line(Received(event(ID, "at sentence 7"), "cursor", 3, ""))
    assert line.endswith(" at sentence 7 (3 events before it were lost)")


def test_a_finding_is_whole_on_80_columns() -> None:
    lines = printed(_event_line(event(ID, SUMMARY)), 80)
    assert " ".join(map(str.strip, lines)) == f"ANCHOR_SHIFT {ID}: {SUMMARY}"


def test_ids_reasons_and_numbers_are_whole_on_80_columns() -> None:
    numbers = {"prompt_tokens": 12345, "output_tokens": 4321, "sentences": 321, "rows_kept": 4320, "events": 13}
    info = monitor_pb2.RequestInfo(external_id=ID, model_name="tiny", refused_reason="client_disabled", **numbers)
    info.top_anchor.CopyFrom(
        monitor_pb2.Anchor(share=0.4, sentence=monitor_pb2.Sentence(index=17, role=summary_pb2.ROLE_REASONING))
    )
    narrow, wide = (printed(_requests_table([info], width), width) for width in (80, 160))
    for _, heading, *lines in (narrow, wide):
        assert "".join(line[: heading.index("state")].strip() for line in lines) == ID
        cells = [cell for line in lines for cell in line[heading.index("state") :].split()]
        assert cells[:5] == ["refused:", "12345+4321", "321", "4320", "13"]
        assert "client_disabled" in cells
    assert "model" not in narrow[1]
    assert wide[2].endswith(" tiny   #17 reasoning 40% ")
